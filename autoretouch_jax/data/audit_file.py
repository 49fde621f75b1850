"""The file that `autoretouch data audit` wrote, as training, records and data sets use it: weights, groups, what is unsound.

A pair that the audit does not know, because it was added later, is treated as without an audit: it is checked, and weighs 1.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from autoretouch_jax.data.pairing import first_of_each_name, match, match_all, unique_names
from autoretouch_jax.errors import Refused, summarise

File = TypeVar("File")
Named = Sequence[tuple[str, File]]  # names of pairs, and a file for each


@dataclass(frozen=True)
class Audit:
    """What an audit found. `flag` is the argument that names its file, for messages."""

    path: Path
    flag: str
    weights: dict[str, float]
    groups: dict[str, str]  # for pairs that show almost the same photograph, the name that their group goes by
    roots: tuple[str, str]  # the folders that were audited, as they were named then
    unpaired: tuple[frozenset[str], frozenset[str]]  # paths below these folders: files without a partner, or of a taken name

    def keeps(self, name: str) -> bool:
        """Whether a pair is to be used: its weight is above 0, or the audit does not know it."""
        return self.weights.get(name, 1.0) > 0

    def check(self, names: Sequence[str], roots: tuple[Any, Any] | None = None) -> list[str]:
        """Compares the audit with a data set's names and, if it is two folders, with their paths. Returns warnings.

        Raises Refused when it is an audit of other data, and when it leaves no pair.
        """
        unknown = [name for name in names if name not in self.weights]
        # Without this check, an audit of other data would silently have no effect.
        if len(unknown) == len(names):
            raise Refused(f"{self}: knows none of the pairs of this data set; audit the data that is trained on")
        if not any(map(self.keeps, names)):
            raise Refused(f"{self}: gives every pair the weight 0; nothing would be left to train on")
        warnings = [self._moved(roots, bool(unknown))] if roots and all(self.roots) else []
        if unknown:
            warnings.append(
                f"{self}: does not know {len(unknown)} of {len(names)} pairs, which count 1 ({summarise(unknown)}); audit again"
            )
        return list(filter(None, warnings))

    def _moved(self, roots: tuple[Any, Any], unknown: bool) -> str:
        """Returns a warning when the folders that were audited are still there, and are not these, else ""."""
        audited = self._audited()
        if all(Path(root).resolve() in paths for root, paths in zip(roots, audited, strict=True)):
            return ""
        # The folders may have moved since. Then their names tell whether they are the same.
        if not unknown and not any(path.exists() for paths in audited for path in paths):
            return ""
        return f"{self}: was made of {self.roots[0]} and {self.roots[1]}; its weights go to the pairs of the same names"

    def _audited(self) -> list[set[Path]]:
        """The paths that the audited folders may have, source and target."""
        # A relative path was relative to the folder in which the audit ran: often this one, or the one that holds its file.
        return [{(base / root).resolve() for base in (Path(), self.path.parent)} for root in self.roots]

    def refuse_exchanged(self, roots: tuple[Path, Path]) -> None:
        """Refuses folders that were audited the other way round."""
        here, audited = [root.resolve() for root in roots], self._audited()
        if here[0] != here[1] and here[0] in audited[1] and here[1] in audited[0]:
            raise Refused(f"{self}: was made with {self.roots[0]} as source and {self.roots[1]} as target; exchange the two")

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"


def read_audit(path: Path, flag: str) -> Audit:
    """Reads the file that `autoretouch data audit --json` wrote. Raises Refused when it is another file, or unfinished."""
    try:
        content = json.loads(path.read_text())
        pairs = content["pairs"]
        weights = {name: float(pair["weight"]) for name, pair in pairs.items()}
        if odd := [name for name, weight in weights.items() if not 0 <= weight < math.inf]:
            raise ValueError(f"{odd[0]} has the weight {weights[odd[0]]}")
        groups = {name: str(pair["group"]) for name, pair in pairs.items() if pair.get("group")}
        roots = str(content.get("source") or ""), str(content.get("target") or "")
        files = [Path(item["file"]) for item in content.get("unpaired", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{flag} {path}: not what `autoretouch data audit --json` writes ({error})") from error
    below = [frozenset(f.relative_to(root).as_posix() for f in files if root and f.is_relative_to(root)) for root in roots]
    return Audit(path, flag, weights, groups, roots, (below[0], below[1]))


@contextlib.contextmanager
def advising_an_audit(flag: str, audit: Audit | None, roots: tuple[Path, Path]) -> Iterator[None]:
    """Adds to the refusal of two folders that a job without an audit can leave out with one what is unsound."""
    try:
        yield
    except Refused as error:
        if audit or not all(root.exists() for root in roots):
            raise
        raise Refused(f"{error}; or leave out what is unsound: `autoretouch data audit`, then {flag} audit.json") from error


def sound_pairs(
    sources: Named[File], targets: Named[File], roots: tuple[Path, Path], audit: Audit | None
) -> tuple[dict[str, tuple[File, File]], list[str]]:
    """Matches the files of two folders or tar files, without what the audit found unsound. Returns pairs and warnings.

    Raises Refused, naming them, for files without a partner and for two of one name: without an audit for any, with an audit
    for those that it does not know.
    """
    if audit is None:
        return match_all(unique_names(roots[0], sources), unique_names(roots[1], targets), roots), []
    audit.refuse_exchanged(roots)
    sides = [_first_ones(*side, audit, number) for number, side in enumerate(zip((sources, targets), roots, strict=True))]
    pairing = match(sides[0], sides[1])
    strays = [
        f"{name} ({pairing.reasons[name]})"
        for number, only in enumerate((pairing.only_in_source, pairing.only_in_target))
        for name, file in only.items()
        if audit.keeps(name) and _below(file, roots[number]) not in audit.unpaired[number]
    ]
    if strays:
        raise Refused(
            f"{roots[0]} and {roots[1]} do not pair up: {summarise(strays)}, which {audit} does not report; "
            "add the missing or remove the extra files, or audit again"
        )
    warnings = audit.check(list(pairing.pairs), roots)
    return {name: files for name, files in pairing.pairs.items() if audit.keeps(name)}, warnings


def _first_ones(files: Named[File], root: Path, audit: Audit, side: int) -> dict[str, File]:
    """Returns the file of each name that the audit looked at."""
    first, further = first_of_each_name(files)
    new = [(name, file) for name, file in further if audit.keeps(name) and _below(file, root) not in audit.unpaired[side]]
    if new:
        name, file = new[0]
        raise Refused(
            f"{root}: {first[name]} and {file} have the same name {name}, which {audit} does not report; "
            "keep one of them, or audit again"
        )
    return first


def _below(file: Any, root: Path) -> str:
    """The path of a file below its folder or tar file."""
    return Path(str(file)).relative_to(root).as_posix()
