"""The speed and memory of accelerators, from their makers' data sheets, and a training step's time at the roofline.

FLOP/s are dense, for the multiplications that a training step uses: on TPUs float32 convolutions multiply in bfloat16 by
default, on GPUs in TF32. GB are 10⁹ bytes, except for memory, which is in GiB as XLA counts it.
"""

import re
from dataclasses import dataclass

from autoretouch_jax.errors import Refused


@dataclass(frozen=True)
class Chip:
    """One accelerator."""

    name: str
    float32: float  # FLOP/s of convolutions on float32 arrays
    bfloat16: float  # FLOP/s on bfloat16 arrays
    memory: float  # GiB
    bandwidth: float  # bytes/s of its memory
    links: float  # bytes/s to its neighbours, over all links together, in one direction
    network: float  # bytes/s of a chip's share of the network between hosts; on TPUs, whose links join hosts, that of the links
    per_host: int  # chips of a host in a large machine


def _chip(name: str, float32: float, bfloat16: float, memory: float, bandwidth: float, links: float, network: float, host: int):
    tera, giga = 1e12, 1e9
    return Chip(name, float32 * tera, bfloat16 * tera, memory, bandwidth * giga, links * giga, network * giga, host)


# TPUs: Google Cloud's system architecture pages. Half of the stated interconnect is one direction. GPUs: NVIDIA's data sheets.
# Between GPU hosts we assume one adapter per GPU: 400 Gbit/s for H100 and H200, 200 for A100. Others: 100 per host of eight.
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v4", 275, 275, 32, 1228, 150, 150, 4),
        _chip("v5e", 197, 197, 16, 819, 100, 100, 4),
        _chip("v5p", 459, 459, 95, 2765, 300, 300, 4),
        _chip("v6e", 918, 918, 32, 1640, 224, 224, 4),
        _chip("a100-40", 156, 312, 40, 1555, 300, 25, 8),
        _chip("a100-80", 156, 312, 80, 2039, 300, 25, 8),
        _chip("h100", 494, 989, 80, 3350, 450, 50, 8),
        _chip("h200", 494, 989, 141, 4800, 450, 50, 8),
        _chip("l4", 60, 121, 24, 300, 16, 1.5, 8),
        _chip("rtx3090", 35, 71, 24, 936, 16, 1.5, 8),
        _chip("rtx4090", 82, 165, 24, 1008, 16, 1.5, 8),
    )
}
TPUS = ("v4", "v5e", "v5p", "v6e")
# Hz, for the cycles that XLA expects: at these a large product of matrices reaches nine tenths of the peak. For the other kinds
# of TPUs we have found none at which it does.
CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9}
HOP = 1e-6  # seconds, at least, that a collective needs from one chip to the next


@dataclass(frozen=True)
class Slice:
    """A number of chips of one kind: `v5e:16x16`, `h100:8`."""

    chip: Chip
    topology: str  # as XLA names it; for GPUs the number
    count: int

    @property
    def is_tpu(self) -> bool:
        """Whether XLA can compile for it here."""
        return self.chip.name in TPUS

    @property
    def hosts(self) -> int:
        """How many hosts hold these chips."""
        return -(-self.count // self.chip.per_host)


def read_slice(text: str) -> Slice:
    """Reads `KIND:SIDExSIDE…` for TPUs, `KIND:NUMBER` for GPUs. Raises Refused, naming the known kinds, for anything else."""
    name, _, shape = text.lower().partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise Refused(f"--topology {text}: write v5e:16x16 or h100:8; the kinds known are {', '.join(CHIPS)}")
    if name in TPUS and "x" not in shape:
        raise Refused(f"--topology {text}: a TPU slice is named by its sides, such as {name}:2x2")
    # A slice's chips are the product of its sides.
    count = 1
    for side in shape.split("x"):
        count *= int(side)
    if not count:
        raise Refused(f"--topology {text}: has no chip")
    return Slice(CHIPS[name], text.lower(), count)


@dataclass(frozen=True)
class Time:
    """A step at the roofline: the seconds that computing, memory and communication need by themselves."""

    compute: float
    memory: float
    communication: float

    @property
    def step(self) -> float:
        """Computing and memory overlap. Communication comes at the end of each network's backward pass and does not."""
        return max(self.compute, self.memory) + self.communication


def roofline(chip: Chip, precision: str, flops: float, accessed: float, reduced: float, collectives: int, chips: int) -> Time:
    """Returns the time of a step that computes `flops`, moves `accessed` bytes in memory and averages `reduced` bytes.

    An all-reduce over n chips sends 2 (n − 1) / n of its bytes: over the links within a host, and over the slower of links and
    network beyond it.
    """
    # Within a host the links alone; beyond it, whatever is slower.
    rate = chip.links if chips <= chip.per_host else min(chip.links, chip.network)
    # Reduce-scatter and all-gather each send (n − 1) / n of the bytes.
    sent = 2 * (chips - 1) / chips * reduced / rate
    peak = chip.bfloat16 if precision == "bfloat16" else chip.float32
    hops = collectives * min(2 * (chips - 1), 4 * chips**0.5) * HOP  # round a ring, or along both sides of a torus
    return Time(flops / peak, accessed / chip.bandwidth, sent + hops)
