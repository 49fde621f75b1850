"""What accelerators can do, from their makers' data sheets, and the two clocks of a training step: a roofline of our own.

FLOP/s are dense, for the multiplications that a training step uses: on TPUs float32 convolutions multiply in bfloat16 by
default, on GPUs in TF32. Bytes are 10⁹ based except memory, which is GiB as XLA counts.
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
    links: float  # bytes/s that it sends to its neighbours, all links together, one direction
    network: float  # bytes/s a chip gets between hosts; where the links go on between hosts, theirs
    per_host: int  # chips of a host in a large machine


def _chip(name: str, float32: float, bfloat16: float, memory: float, bandwidth: float, links: float, network: float, host: int):
    tera, giga = 1e12, 1e9
    return Chip(name, float32 * tera, bfloat16 * tera, memory, bandwidth * giga, links * giga, network * giga, host)


# TPUs: Google Cloud's system architecture pages; half of the stated interconnect is one direction. GPUs: NVIDIA's data sheets;
# between GPU hosts one 400 Gbit/s adapter a GPU for the large ones, 100 Gbit/s a host of eight for the others.
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
HOP = 1e-6  # seconds a collective needs per chip on its way round, at the least


@dataclass(frozen=True)
class Slice:
    """So many chips of a kind: `v5e:16x16`, `h100:8`."""

    chip: Chip
    topology: str  # as XLA names it; for GPUs the number
    count: int

    @property
    def is_tpu(self) -> bool:
        """Whether XLA can compile for it here."""
        return self.chip.name in TPUS

    @property
    def hosts(self) -> int:
        """How many machines that makes."""
        return -(-self.count // self.chip.per_host)


def read_slice(text: str) -> Slice:
    """`KIND:SIDExSIDE…` for TPUs, `KIND:NUMBER` for GPUs. Raises Refused, naming what is known, for anything else."""
    name, _, shape = text.lower().partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise Refused(f"--topology {text}: write v5e:16x16 or h100:8; the kinds known are {', '.join(CHIPS)}")
    if name in TPUS and "x" not in shape:
        raise Refused(f"--topology {text}: a TPU slice is named by its sides, such as {name}:2x2")
    count = 1
    for side in shape.split("x"):
        count *= int(side)
    if not count:
        raise Refused(f"--topology {text}: has no chip")
    return Slice(CHIPS[name], text.lower(), count)


@dataclass(frozen=True)
class Time:
    """Seconds of a step at the roofline: what computing, memory and communication need by themselves."""

    compute: float
    memory: float
    communication: float

    @property
    def step(self) -> float:
        """Computing and memory overlap; communication, at the end of each network's backward pass, does not."""
        return max(self.compute, self.memory) + self.communication


def roofline(chip: Chip, precision: str, flops: float, accessed: float, reduced: float, collectives: int, chips: int) -> Time:
    """The time of a step that makes `flops`, moves `accessed` bytes in memory, and averages `reduced` bytes over `chips`.

    An all-reduce sends 2 (n − 1) / n of its bytes, over the links within a host, over the slower of links and network beyond.
    """
    rate = chip.links if chips <= chip.per_host else min(chip.links, chip.network)
    sent = 2 * (chips - 1) / chips * reduced / rate
    peak = chip.bfloat16 if precision == "bfloat16" else chip.float32
    hops = collectives * min(2 * (chips - 1), 4 * chips**0.5) * HOP  # round a ring, or along both sides of a torus
    return Time(flops / peak, accessed / chip.bandwidth, sent + hops)
