"""Audits pairs, and writes a page, a JSON file and a summary.

Each pair gets a weight and reasons. `--data.audit FILE` makes training leave out or down-weight flagged pairs. An audit that
was stopped at any moment goes on with the same command (`journal.py`).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autoretouch_jax.audit import copies, page, renamed, result
from autoretouch_jax.audit.checking import check_all
from autoretouch_jax.audit.checks import NOTE, WARNING, CheckedPair
from autoretouch_jax.audit.inputs import Inputs, Pair
from autoretouch_jax.audit.journal import Journal
from autoretouch_jax.audit.reading import read_reduced_pair
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, Refused
from autoretouch_jax.runtime import storage

if TYPE_CHECKING:
    from autoretouch_jax.audit.labels import Finding

# Reasons that do not hide which spots the retoucher removed. Any other may: a pair that is shifted, say, differs everywhere.
COMPARABLE = {"no_edit", "duplicate", "leak", "profile", "lossy_target"}
LOST = 0.25  # share of edited pixels from which losses cannot be told from edits


def run(
    inputs: Inputs, json_path: Path | None, html_path: Path | None, workers: int, check_labels: bool, labels_sample: int
) -> int:
    """Audits, writes the requested files and prints a summary. Returns the exit status: 1 when something is flagged.

    Spots that were left are looked for in at most `labels_sample` pairs, 0 for all.
    """
    for path in (json_path, html_path):
        if path and path.is_dir():
            raise Refused(f"{path}: is a folder; give a file name")
    if labels_sample < 0:
        raise Refused(f"--labels-sample {labels_sample} is negative; give a number of pairs, or 0 for all")
    beside = json_path or html_path
    journal = Journal(beside and beside.with_name(beside.name + ".part"), [inputs.source, inputs.target])
    stamps = {name: pair.stamp() for name, pair in inputs.pairs.items()}
    checked = check_all(inputs.pairs, journal.section("pair", stamps.__getitem__), workers)
    unpaired = renamed.explain(inputs.unpaired, journal)
    groups = copies.flag_copies(list(checked.values()))
    audited = result.Audited(inputs.source, inputs.target, checked, unpaired, groups)
    if check_labels:
        _flag_inconsistent(audited, inputs.pairs, stamps, labels_sample, journal)
    content = audited.content()
    if json_path:
        storage.write_output(json_path, json.dumps(content, indent=1) + "\n")
    if html_path:
        storage.write_output(html_path, page.render(content, inputs.pairs))
    journal.remove()
    print(result.summary(content))
    return EXIT_FAILED if content["flagged"] else EXIT_DONE


def _flag_inconsistent(
    audited: result.Audited, pairs: Mapping[str, Pair], stamps: Mapping[str, str], most: int, journal: Journal
) -> None:
    """Flags pairs whose target still has spots of the kind that is removed elsewhere."""
    # Here, because JAX takes 300 MB, which the checks need.
    from autoretouch_jax.audit import labels

    comparable = [name for name, pair in audited.checked.items() if _is_comparable(pair)]
    names = _evenly(comparable, most)
    # The spots that are found depend on all pairs that the network has learned from.
    learned = hashlib.sha256(repr([(name, stamps[name]) for name in labels.learned_from(names)]).encode()).hexdigest()
    findings = labels.find(
        names,
        lambda name: _read(pairs[name]),
        journal.section("params", lambda _: learned),
        journal.section("spots", lambda name: stamps[name] + learned),
    )
    if not findings:
        audited.remarks.append(
            f"spots that were left were not looked for: that needs {labels.FEWEST_PAIRS} comparable pairs, "
            f"and there are {len(comparable)}"
        )
        return
    audited.remarks.append(f"spots that were left were looked for in {len(findings)} of {len(comparable)} comparable pairs")
    for name, finding in findings.items():
        _judge(audited, name, finding, labels.INCONSISTENT)


def _judge(audited: result.Audited, name: str, finding: "Finding", limit: float) -> None:
    pair = audited.checked[name]
    pair.measures["left_share"] = finding["score"]
    if finding["score"] >= limit:
        counts = f"{finding['left']} spots were left that look like the {finding['removed']} removed here and those elsewhere"
        pair.flag("inconsistent", counts, WARNING)
    if pair.flagged:
        audited.spots[name] = finding["left_spots"]


def _is_comparable(pair: CheckedPair) -> bool:
    faults = {reason.code for reason in pair.reasons if reason.severity != NOTE}
    lost = "lossy_target" in faults and pair.measures.get("edited_share", 1.0) > LOST
    return pair.thumbnail is not None and faults <= COMPARABLE and not lost


def _evenly(names: list[str], most: int) -> list[str]:
    """Returns at most so many names, 0 for all, evenly spread over the list."""
    if not most or len(names) <= most:
        return names
    return [names[i] for i in np.linspace(0, len(names) - 1, most).round().astype(int)]


def _read(pair: Pair) -> tuple[tuple[np.ndarray, np.ndarray], float] | None:
    """Returns a pair, reduced, and the factor, or None when it can no longer be read."""
    # Anything may be raised: the pair was whole when it was checked, but files change and disks vanish.
    try:
        with pair.files() as files:
            images, reduced = read_reduced_pair(*files)
    except Exception:
        return None
    return (images, reduced) if images[0].shape == images[1].shape else None
