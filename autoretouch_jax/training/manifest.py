"""The manifest of a run's data: what it is trained on, by name, so that a later start can say what has changed."""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from autoretouch_jax.data.negatives import Negatives
from autoretouch_jax.data.sources import Source
from autoretouch_jax.errors import summarise

# Increased whenever the marks of the same data change: manifests of another format are not compared.
FORMAT = 1
FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """For each name a mark that changes with the example's files, but not when they move; and the weights other than 1."""

    data: dict[str, str]
    weights: dict[str, float]
    negatives: dict[str, str]

    @functools.cached_property
    def digest(self) -> str:
        """The digest of all of it and of its order, which every checkpoint's clock holds."""
        return f"{FORMAT}:{hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:32]}"

    def to_json(self) -> str:
        """Returns the content of the file."""
        return json.dumps({"format": FORMAT} | asdict(self)) + "\n"

    def changes_to(self, now: "Manifest") -> str:
        """Says what has changed: what was added, removed, changed and weighted differently, by name."""
        parts = _differences(self.data, now.data)
        both = self.data.keys() & now.data.keys()
        weights = [(name, self.weights.get(name, 1.0), now.weights.get(name, 1.0)) for name in sorted(both)]
        other = [f"{name} {before:g} to {after:g}" for name, before, after in weights if before != after]
        parts += [f"weighted otherwise {len(other)} ({summarise(other)})"] if other else []
        parts += [f"negatives {part}" for part in _differences(self.negatives, now.negatives)]
        return "; ".join(parts) or "the order of the examples"


def _differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    names = {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": sorted(name for name in before.keys() & after.keys() if before[name] != after[name]),
    }
    return [f"{what} {len(those)} ({summarise(those)})" for what, those in names.items() if those]


def take_manifest(source: Source, negatives: Negatives | None) -> Manifest:
    """Returns the manifest of a run's data. It looks at every file of a folder, and reads none in full."""
    weights: dict[str, float] = getattr(source, "weights", None) or {}
    other = {name: weights[name] for name in source.names if weights.get(name, 1.0) != 1.0}
    photos = negatives.photos if negatives else None
    return Manifest(_marks(source), other, _marks(photos) if photos else {})


def _marks(source: Any) -> dict[str, str]:
    # A source of one's own need not give marks. Then only its names are compared.
    marks = source.marks() if hasattr(source, "marks") else [""] * len(source)
    return dict(zip(source.names, marks, strict=True))


def read_manifest(workdir: Any) -> Manifest | None:
    """Returns the manifest of a run's last start; None where an earlier version made the run, or the file is damaged."""
    try:
        content = json.loads((workdir / FILE).read_text())
        if content.pop("format") == FORMAT:
            return Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None
