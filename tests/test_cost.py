"""What a step costs: its FLOPs beside the fewest that its convolutions need, and its memory beside the record.

python tests/test_cost.py    # records what this jax and this kind of machine count, in tests/golden/cost.json
"""

import dataclasses
import json
import math
import os
import platform
import sys
from pathlib import Path

import jax
import pytest

from autoretouch_jax.config.loading import load
from autoretouch_jax.models import forms
from autoretouch_jax.planning.plan import plannable
from autoretouch_jax.runtime import devices
from autoretouch_jax.tools import catalogue
from autoretouch_jax.training.compilation import lowered_step
from autoretouch_jax.training.state import init_state, make_networks

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "golden" / "cost.json"
SIDE = 256
CONFIGS = ("autoretouch", "retouch")
# Layers whose input needs no gradient: the first of the generator, and the first of the discriminator in its own pass.
FIRST_TAPS = {
    "autoretouch": ((7 * SIDE - 12) ** 2 * 3 * 64, (4 * SIDE // 2 - 2) ** 2 * 6 * 64),
    "retouch": ((3 * SIDE // 2 - 2) ** 2 * 12 * 48, (4 * (SIDE // 2 + 1) - 4) ** 2 * 6 * 64),
}
VGG_LAYERS = {"relu1_2": ((SIDE, 3, 64), (SIDE, 64, 64)), "relu2_2": ((SIDE // 2, 64, 128), (SIDE // 2, 128, 128))}
VGG_LAYERS["relu3_3"] = ((SIDE // 4, 128, 256), *((SIDE // 4, 256, 256),) * 2)
NEWTON_SCHULZ = 5  # iterations of Muon in a step
# Everything else in the step, such as norms, losses and Adam, in shares of the least.
ELSE = 0.005


def config_of(name):
    config = plannable(load(ROOT / "configs" / f"{name}.py"))
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, devices=1))


def compiled(config):
    """The step for one device, with plain convolutions: XLA counts a loop's body, and Winograd's bands are loops, only once."""
    with forms.plain():
        lowered = lowered_step(config, *make_networks(config), devices.make_mesh(config.parallel, config.train.batch))
    step = lowered.compile()
    cost, memory = step.cost_analysis(), step.memory_analysis()
    return {"flops": cost["flops"], "bytes": cost["bytes accessed"], "temporaries": memory.temp_size_in_bytes}


def least_flops(name, config):
    """Two for each tap that lies in an image, once for each direction that is needed, and those of Muon."""
    assert config.data.crop == SIDE
    generator, discriminator = (catalogue.multiply_accumulates(part, SIDE) for part in (config.generator, config.discriminator))
    vgg = 0
    for last, layers in VGG_LAYERS.items():
        vgg += sum((3 * side - 2) ** 2 * inputs * outputs for side, inputs, outputs in layers)
        if last == config.loss.perceptual_layers[-1]:
            break
    first, first_of_discriminator = FIRST_TAPS[name]
    image = 3 * generator - first
    image += 2 * (3 * discriminator - first_of_discriminator)  # the real and the fake
    image += 2 * discriminator  # through which the generator learns
    image += 3 * vgg  # the fake, the target, and back to the fake
    return 2 * (config.train.batch * image + muon(config))


def muon(config):
    if config.optim.generator_optimizer != "muon":
        return 0
    total = 0
    networks, _ = make_networks(config)
    for kernel in jax.tree.leaves(jax.eval_shape(lambda: init_state(config, networks)).generator.params):
        if len(kernel.shape) == 4 and min(kernel.shape[2:]) > 12:
            short, long = sorted((math.prod(kernel.shape[:3]), kernel.shape[3]))
            total += NEWTON_SCHULZ * (2 * short * short * long + short**3)
    return total


def machine():
    """What the compiler's choices depend on."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    wide = "avx512" if "avx512f" in flags else "plain"
    return f"jax {jax.__version__}, {platform.system()} {platform.machine()} {wide}, {os.cpu_count()} cores"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_computes_nothing_twice_and_takes_no_more_memory_than_recorded(name):
    config = config_of(name)
    counted, least = compiled(config), least_flops(name, config)
    assert least < counted["flops"] <= (1 + ELSE) * least
    recorded = json.loads(RECORD.read_text()).get(machine())
    if recorded is None:
        pytest.skip(f"FLOPs are right; {RECORD.name} has no record of {machine()}")
    for key in ("bytes", "temporaries"):
        assert counted[key] <= 1.02 * recorded[name][key], f"{key} rose; if they must, run python {Path(__file__).name}"


if __name__ == "__main__":
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    record[machine()] = {name: compiled(config_of(name)) for name in CONFIGS}
    RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
