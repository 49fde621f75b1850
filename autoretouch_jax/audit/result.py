"""What an audit found, as the content of its JSON file and as a text."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from autoretouch_jax.audit.checks import NOTE, CheckedPair
from autoretouch_jax.audit.inputs import UnpairedFile
from autoretouch_jax.errors import NAMED_FAULTS

FORMAT = 3
EXCHANGED = "source and target folders seem to be exchanged"
MOST = 0.5  # share of swapped pairs from which the folders are taken for exchanged


@dataclass
class Audited:
    """The findings, by the names of the pairs. Spots are (row, column, radius) in pixels; a remark concerns all pairs."""

    source: str
    target: str
    checked: dict[str, CheckedPair]
    unpaired: Sequence[UnpairedFile]
    groups: dict[str, str]
    spots: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """Returns what the JSON file holds."""
        pairs = {name: self._pair(pair) for name, pair in self.checked.items()}
        counts = Counter(code for pair in pairs.values() for code in _faults(pair))
        counts += Counter(item.code for item in self.unpaired)
        exchanged = [EXCHANGED] if counts["swapped"] > MOST * len(pairs) else []
        return {
            "format": FORMAT,
            "source": self.source,
            "target": self.target,
            "flagged": sum(pair["flagged"] for pair in pairs.values()) + len(self.unpaired),
            "remarks": exchanged + self.remarks,
            "counts": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            "unpaired": [{"file": str(item.file), "code": item.code, "message": item.message} for item in self.unpaired],
            "pairs": pairs,
        }

    def _pair(self, pair: CheckedPair) -> dict[str, Any]:
        weight = pair.weight
        if any(reason.code == "inconsistent" for reason in pair.reasons):
            # The more spots a pair left, the more it would teach the network to leave them.
            weight = min(weight, round(1 - pair.measures["left_share"], 3))
        reasons = [dataclasses.asdict(reason) for reason in pair.reasons]
        measures = {key: round(float(value), 5) for key, value in pair.measures.items()}
        content = {"weight": weight, "flagged": pair.flagged, "reasons": reasons, "measures": measures}
        if pair.name in self.groups:
            content["group"] = self.groups[pair.name]
        if pair.name in self.spots:
            content["spots"] = [[round(float(value), 1) for value in spot] for spot in self.spots[pair.name]]
        return content


def _faults(pair: dict[str, Any]) -> dict[str, str]:
    """The message of each reason that is more than a note, by its code."""
    return {reason["code"]: reason["message"] for reason in pair["reasons"] if reason["severity"] != NOTE}


def summary(content: dict[str, Any]) -> str:
    """Returns the text that the command prints: the most common reason first, with a few pairs of each."""
    lines = [f"{len(content['pairs'])} pairs, {content['flagged']} flagged", *content["remarks"]]
    lines += [f"  {count:6}  {code}" for code, count in content["counts"].items()]
    for code in content["counts"]:
        if code == "swapped" and EXCHANGED in content["remarks"]:
            continue  # said once, above
        named = [f"{item['file']}: {item['message']}" for item in content["unpaired"] if item["code"] == code]
        named += [
            f"{name}: {message}" for name, pair in content["pairs"].items() if (message := _faults(pair).get(code)) is not None
        ]
        lines += named[:NAMED_FAULTS]
        if len(named) > NAMED_FAULTS:
            lines.append(f"… and {len(named) - NAMED_FAULTS} more: {code}")
    return "\n".join(lines)
