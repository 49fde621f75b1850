"""Plans: XLA's figures for TPUs, estimates close to them for GPUs. A step that does not fit is a result and not an error."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import edited

from autoretouch_jax import cli
from autoretouch_jax.config import DataConfig, load
from autoretouch_jax.config.validation import validate
from autoretouch_jax.errors import Refused
from autoretouch_jax.models import forms, layers
from autoretouch_jax.planning import chips, gpu, plan, tpu, traffic
from autoretouch_jax.runtime import devices
from autoretouch_jax.training.compilation import lowered_step
from autoretouch_jax.training.state import make_networks

GIB = 2**30
SHIPPED = sorted(path.name for path in Path(__file__).parent.parent.glob("configs/*.py"))
has_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra plan")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "cache"))
    for name in (*plan.SHARE_VARIABLES, "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"):
        monkeypatch.delenv(name, raising=False)  # JAX takes three quarters of a GPU


@pytest.mark.parametrize(
    ("text", "count", "hosts"), [("v5e:2x2", 4, 1), ("v5e:16x16", 256, 64), ("v4:2x2x4", 16, 4), ("h100:24", 24, 3)]
)
def test_slices(text, count, hosts):
    machine = chips.read_slice(text)
    assert (machine.count, machine.hosts) == (count, hosts)


@pytest.mark.parametrize("text", ["v5e", "v5e:8", "h100:2x", "tpu:2x2", "h100:0", ""])
def test_what_is_no_slice_is_refused(text):
    with pytest.raises(Refused, match="--topology"):
        chips.read_slice(text)


def test_the_roofline_is_the_slower_of_computing_and_memory_plus_the_network():
    chip = chips.CHIPS["v5e"]
    alone = chips.roofline(chip, "bfloat16", flops=197e12, accessed=0.5 * 819e9, reduced=0, collectives=0, chips=1)
    assert (alone.compute, alone.memory, alone.communication, alone.step) == (1, 0.5, 0, 1)
    four = chips.roofline(chip, "bfloat16", 197e12, 819e9, reduced=100e9, collectives=0, chips=4)
    assert four.communication == pytest.approx(2 * 3 / 4)
    assert four.step == pytest.approx(1 + 1.5)


def test_the_estimate_counts_the_flops_that_xla_counts(small_config):
    config = edited(small_config, generator={"width": 16, "blocks": 3}, train={"batch": 2})
    networks, frozen = make_networks(config)
    mesh = devices.make_mesh(config.parallel, 2)
    with forms.plain():
        xla = lowered_step(config, networks, frozen, mesh).compile().cost_analysis()["flops"]
    assert gpu.estimate(config, 1)["flops"] == pytest.approx(xla, rel=0.15)


def test_the_estimate_counts_neither_what_nothing_needs_nor_conversions_before_sums():
    frozen, pixels = jnp.ones((8,)), jnp.ones((1000, 8), jnp.bfloat16)

    def program(pixels):
        out, pull = jax.vjp(layers.add_bias, pixels, frozen)
        return pull(out)[0]  # the bias learns nothing

    def sums(pixels):
        return pixels.astype(jnp.float32).sum(0)

    assert gpu.flops(program, pixels) < 1.1 * pixels.size
    traced = jax.make_jaxpr(sums)(pixels).jaxpr
    assert gpu._walk(traced)[2] == pixels.nbytes + 4 * 8


def test_the_estimated_memory_grows_with_the_batch_and_shrinks_with_rematerialisation(small_config):
    big = edited(small_config, generator={"width": 16, "blocks": 8}, data={"crop": 128})

    def peak(**groups) -> int:
        return gpu.estimate(edited(big, **groups), 1)["memory"]["peak"]

    assert 1.8 < peak(train={"batch": 8}) / peak(train={"batch": 4}) < 2.2
    assert peak(parallel={"remat": "full"}) < 0.8 * peak()
    assert peak(parallel={"accumulate": 4}) < 0.5 * peak()
    assert peak(train={"precision": "bfloat16"}) < 0.8 * peak()


def test_a_plan_for_gpus_is_an_estimate_and_says_so(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert cli.main(["plan", "configs/retouch.py", "--topology", "h100:16", "--train.batch", "32", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "2 host(s)" in said
    assert "bfloat16" in said
    assert "arithmetic on the traced step" in said
    result = json.loads(path.read_text())
    assert [row["chips"] for row in result["scaling"]] == [1, 8, 16]
    assert result["scaling"][2]["efficiency"] < result["scaling"][1]["efficiency"] < 1


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_can_be_planned_and_measured_without_data(name):
    validate(plan.plannable(load(f"configs/{name}")))


def test_what_does_not_fit_is_a_result_with_advice(capsys):
    command = "plan configs/autoretouch.py --topology rtx4090:4 --data.crop 1024 --train.batch 64"
    assert cli.main(command.split()) == 1
    said = capsys.readouterr().out
    assert "DOES NOT FIT: needs" in said
    assert "--parallel.remat full" in said


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, 0.75),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}, 0.9),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}, 0.5),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "2"}, 1.0),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, 0.75),  # memory is taken when it is needed, up to the same limit
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}, 1.0),
    ],
)
def test_a_gpu_has_the_memory_that_jax_takes_of_it(small_config, monkeypatch, environment, share):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    figures = plan.analyse(plan.plannable(small_config), chips.read_slice("h100:1"))
    assert figures["limit"] == pytest.approx(share * (80 - plan.RESERVED) * GIB)
    assert figures["share"] == share


@pytest.mark.parametrize("text", ["all", "0", "-1"])
def test_a_share_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", text)
    with pytest.raises(Refused, match=f"XLA_PYTHON_CLIENT_MEM_FRACTION={text}: must be a number above 0"):
        plan.memory_share()


def test_a_step_that_needs_more_than_jaxs_share_does_not_fit_until_the_share_is_raised(small_config, monkeypatch, capsys):
    """Of 79 GiB JAX takes 59."""
    real = gpu.estimate

    def estimate(config, count):
        figures = real(config, count)
        return figures | {"memory": {"argument": GIB, "temp": 69 * GIB, "peak": 70 * GIB}}

    monkeypatch.setattr(gpu, "estimate", estimate)
    command = ["plan", "configs/retouch.py", "--topology", "h100:1"]
    assert cli.main(command) == 1
    said = capsys.readouterr().out
    assert "DOES NOT FIT: needs 70.00 GiB, has 59.44 GiB" in said
    assert "JAX takes 75% of it, which leaves 59.44 GiB for a step; XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in said
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    assert cli.main(command) == 0
    assert "JAX takes 95% of it, which leaves 75.29 GiB for a step\n" in capsys.readouterr().out


FIT = {"generator": {"width": 16, "blocks": 3}, "data": {"crop": 64}, "loss": {"adversarial_weight": 0.0}}


def small_card() -> chips.Slice:
    """Two GPUs with so little memory that it is what limits a small network."""
    machine = chips.read_slice("rtx4090:2")
    # A step may use a quarter of a GiB.
    return dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, memory=plan.RESERVED + 0.25 / plan.JAX_SHARE))


def every_variant(config, machine) -> list:
    """All variants that --fit may choose from, made without its help: crops, remats, powers of two of images."""
    variants = []
    for crop in (config.data.crop // 2, config.data.crop, 2 * config.data.crop):
        for remat in ("none", "norms", "full"):
            for images in (1, 2, 4, 8, 16, 32, 64):
                groups = {"data": {"crop": crop}, "train": {"batch": images * machine.count}, "parallel": {"remat": remat}}
                variants.append(edited(config, **groups))
    return variants


def test_fit_finds_the_fastest_that_fits(small_config):
    """Against all variants, each analysed by itself."""
    machine, config = small_card(), plan.plannable(edited(small_config, **FIT))
    analysed = [(variant, plan.analyse(variant, machine)) for variant in every_variant(config, machine)]
    assert {True, False} == {figures["fits"] for _, figures in analysed}, "the memory must be what decides"

    def speed(variant, figures) -> float:
        return figures["scaling"][-1]["images_per_s"] * variant.data.crop**2

    fastest = max(speed(variant, figures) for variant, figures in analysed if figures["fits"])
    chosen = plan.best_fit(config, machine)
    figures = plan.analyse(chosen, machine)
    assert figures["fits"]
    assert speed(chosen, figures) >= 0.99 * fastest
    assert fastest < max(speed(variant, figures) for variant, figures in analysed), "a larger one would be faster, did it fit"


def test_fit_prints_its_candidates_and_the_flags_to_use(capsys):
    assert cli.main(["plan", "configs/autoretouch.py", "--topology", "rtx4090:2", "--fit", "--generator.blocks", "3"]) == 0
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines() if line.split() and "e+" in line.split()[0]]
    speeds = [float(row[0]) for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert {row[3] for row in rows} == {"none", "norms", "full"}
    assert "DOES NOT FIT" not in output
    flags = output.split("the fastest that fits: ")[1].split()
    assert cli.main(["plan", "configs/autoretouch.py", "--topology", "rtx4090:2", "--generator.blocks", "3", *flags]) == 0


def test_fit_goes_down_where_the_compiler_needs_more_than_the_estimate(small_config, monkeypatch):
    machine, config = small_card(), plan.plannable(edited(small_config, **FIT))
    estimated, real = plan.best_fit(config, machine), plan.analyse

    def analyse(variant, machine):
        figures = real(variant, machine)
        return figures | {"fits": figures["fits"] and variant.train.batch < estimated.train.batch}

    monkeypatch.setattr(plan, "analyse", analyse)
    assert plan.best_fit(config, machine).train.batch < estimated.train.batch
    monkeypatch.setattr(plan, "analyse", lambda variant, machine: real(variant, machine) | {"fits": False})
    with pytest.raises(Refused, match="none of the short list fits"):
        plan.best_fit(config, machine)


def test_the_fingerprint_covers_the_values_and_the_code(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(tpu.importlib.metadata, "version", lambda name: "1")
    before = tpu._fingerprint(small_config, "v5e:2x2")
    assert tpu._fingerprint(edited(small_config, data={"root": "/elsewhere"}), "v5e:2x2") == before
    assert tpu._fingerprint(edited(small_config, train={"seed": 9}), "v5e:2x2") == before
    for changed in (
        {"train": {"batch": 16}},
        {"generator": {"blocks": 2}},
        {"parallel": {"remat": "full"}},
        {"data": {"crop": 64}},
    ):
        assert tpu._fingerprint(edited(small_config, **changed), "v5e:2x2") != before
    assert tpu._fingerprint(small_config, "v5e:4x4") != before
    copy = tmp_path / "package"
    shutil.copytree(tpu.PACKAGE, copy)
    monkeypatch.setattr(tpu, "PACKAGE", copy)
    assert tpu._fingerprint(small_config, "v5e:2x2") == before
    for name in ("training/step.py", "models/layers.py", "runtime/devices.py"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        assert tpu._fingerprint(small_config, "v5e:2x2") != before, name
        before = tpu._fingerprint(small_config, "v5e:2x2")


def test_libtpu_is_offered_by_name_when_it_is_missing(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else real(name, *rest))
    assert cli.main(["plan", "configs/retouch.py"]) == 2
    assert "pip install 'autoretouch-jax[plan]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"), [("--train.batch 6", "--train.batch 6 does not divide over 4"), ("--topology v9:2x2", "v9:2x2")]
)
def test_a_plan_that_makes_no_sense_is_refused(words, message, capsys):
    assert cli.main(["plan", "configs/retouch.py", *words.split()]) == 2
    assert message in capsys.readouterr().err


def figures_with(cycles):
    return {"cycles": cycles, "scaling": [{"memory": 0.001, "communication": 0.002}], "batch_per_device": 8}


def test_the_estimate_is_xlas_cycles_at_the_chips_clock_and_the_all_reduces():
    v5e = chips.read_slice("v5e:2x2")
    estimate = plan._estimate(v5e, figures_with(12_000_000))
    assert estimate == pytest.approx({"operations": 0.008, "step": 0.01, "images_per_s": 3200, "efficiency": 0.8})
    assert plan._estimate(v5e, figures_with(15_000))["operations"] == 0.001, "no less than the memory needs"
    assert plan._estimate(v5e, figures_with(0)) is None
    assert plan._estimate(chips.read_slice("v4:2x2x1"), figures_with(12_000_000)) is None


def test_fit_goes_by_the_estimate_where_there_is_one(small_config, monkeypatch):
    """The bound finds the larger crop faster, the estimate here the smaller one."""
    config, real = plan.plannable(edited(small_config, **FIT)), plan.analyse

    def analyse(variant, machine):
        return real(variant, machine) | {"estimate": {"images_per_s": 1 / variant.data.crop**3}}

    by_bound = plan.best_fit(config, small_card())
    monkeypatch.setattr(plan, "analyse", analyse)
    assert plan.best_fit(config, small_card()).data.crop < by_bound.data.crop


@has_libtpu
def test_the_real_step_is_compiled_for_a_slice_that_is_not_here_and_kept(small_config, tmp_path, monkeypatch):
    config = plan.plannable(dataclasses.replace(small_config, data=DataConfig(crop=32)))
    machine = chips.read_slice("v5e:2x2")
    first = plan.analyse(config, machine)
    assert first["fits"]
    assert not first["cached"]
    assert first["collectives"]["all-reduce"]["count"] == 2
    assert first["memory"]["peak"] > 0
    assert first["flops"] > 0
    assert first["bytes"] > first["collectives"]["all-reduce"]["bytes"]  # the parameters and more are read and written
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # nothing is started a second time
    again = plan.analyse(config, machine)
    assert again.pop("cached")
    assert again == {key: value for key, value in first.items() if key != "cached"}
    report = plan.report(config, machine, first | {"cached": False})
    assert "on v5e:2x2: 4 chip(s), 1 host(s)" in report
    assert f"XLA itself expects {1e3 * first['cycles'] / 1.5e9:.1f} ms of operations on a chip." in report
    # The arithmetic at the peak takes less.
    assert first["estimate"]["operations"] > first["scaling"][0]["compute"]


PROGRAM = """
%sliced (param_0: f32[100,1000], param_1: f32[1000]) -> f32[1000] {
  %param_0 = f32[100,1000]{1,0:T(8,128)} parameter(0)
  %slice.1 = f32[1,1000]{1,0:T(8,128)} slice(%param_0), slice={[3:4], [0:1000]}
  %param_1 = f32[1000]{0:T(1024)} parameter(1)
  ROOT %add.1 = f32[1000]{0:T(1024)} add(%slice.1, %param_1)
}

%body (pair: (s32[], bf16[1000])) -> (s32[], bf16[1000]) {
  %pair = (s32[], bf16[1000]{0}) parameter(0)
  %count = s32[] get-tuple-element(%pair), index=0
  %value = bf16[1000]{0} get-tuple-element(%pair), index=1
  %twice = bf16[1000]{0} add(%value, %value)
  ROOT %next = (s32[], bf16[1000]{0}) tuple(%count, %twice)
}

%condition (pair.1: (s32[], bf16[1000])) -> pred[] {
  %pair.1 = (s32[], bf16[1000]{0}) parameter(0)
  ROOT %go = pred[]{:S(1)} constant(true)
}

%doubled (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0:T(1024)} parameter(0)
  ROOT %sum.2 = f32[1000]{0:T(1024)} add(%x, %x)
}

%negated (y: f32[1000]) -> f32[1000] {
  %y = f32[1000]{0:T(1024)} parameter(0)
  ROOT %minus = f32[1000]{0:T(1024)} negate(%y)
}

ENTRY %main (all: f32[100,1000], small: f32[1000], half: bf16[1000]) -> (f32[1000], bf16[1000]) {
  %all = f32[100,1000]{1,0:T(8,128)} parameter(0)
  %small = f32[1000]{0:T(1024)} parameter(1)
  %half = bf16[1000]{0:T(1024)(2,1)} parameter(2)
  LINES
  ROOT %out = (f32[1000]{0}, bf16[1000]{0}) tuple(%small, %half)
}
"""


@pytest.mark.parametrize(
    ("lines", "moved"),
    [
        ("%sum = f32[1000]{0:T(1024)} add(%small, %small)", 12_000),  # two operands and the result
        ("%sum = f32[1000]{0:T(1024)S(1)} add(%small, %small)", 8000),  # the result stays on the chip
        ("%row = f32[1000]{0:T(1024)} fusion(%all, %small), kind=kLoop, calls=%sliced", 12_000),  # a row of the hundred
        (  # the copy is read once, and its end is no second transfer
            "%start = (f32[1000]{0:T(1024)S(1)}, f32[1000]{0:T(1024)}, u32[]{:S(2)}) copy-start(%small)\n"
            "  %done = f32[1000]{0:T(1024)S(1)} copy-done(%start)\n"
            "  %used = f32[1000]{0:T(1024)S(1)} negate(%done)",
            4000,
        ),
        (
            "%start = ((f32[100,1000]{1,0:T(8,128)}), f32[5,1000]{1,0:T(8,128)S(1)}, s32[]) slice-start(%all), calls=%x\n"
            "  %done = f32[5,1000]{1,0:T(8,128)S(1)} slice-done(%start)",
            20_000,
        ),
        ("%few = f32[2,1000]{1,0:T(8,128)} slice(%all), slice={[0:2], [0:1000]}", 16_000),
        (  # the dearer branch
            "%chosen = f32[1000]{0:T(1024)} conditional(%which, %small, %small), branch_computations={%doubled, %negated}",
            12_000,
        ),
        (
            "%begin = (s32[], bf16[1000]{0}) tuple(%zero, %half)\n  %loop = (s32[], bf16[1000]{0}) while(%begin), "
            'condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}',
            7 * 6000,
        ),
    ],
)
def test_the_bytes_of_a_program_are_those_that_leave_the_chip(lines, moved):
    assert traffic.bytes_through_memory(PROGRAM.replace("LINES", lines)) == moved


def test_the_cycles_of_a_program_count_a_loops_body_as_often_as_it_runs():
    def cycles(number):
        return f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'

    lines = (
        f"%sum = f32[1000]{{0}} fusion(%small), kind=kLoop, calls=%sliced, {cycles(400)}\n"
        "  %begin = (s32[], bf16[1000]{0}) tuple(%zero, %half)\n  %loop = (s32[], bf16[1000]{0}) while(%begin), "
        'condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    looped = PROGRAM.replace("LINES", lines).replace("add(%value, %value)", f"add(%value, %value), {cycles(30)}")
    assert "add(%value, %value), backend" in looped
    assert traffic.estimated_cycles(looped) == 400 + 7 * 30
    assert traffic.estimated_cycles(PROGRAM.replace("LINES", "")) == 0


def test_the_bytes_of_a_program_for_this_machine_are_those_of_its_arrays():
    x = jnp.ones((300, 1000))
    text = jax.jit(lambda x: (2 * x + 1).sum(0)).lower(x).compile().as_text()
    assert x.nbytes <= traffic.bytes_through_memory(text) <= 1.1 * x.nbytes


@has_libtpu
def test_a_slice_that_libtpu_does_not_know_is_refused(small_config):
    config = plan.plannable(edited(small_config, train={"batch": 6}))
    with pytest.raises(Refused, match="v5e:2x3: could not be compiled for"):
        plan.analyse(config, chips.read_slice("v5e:2x3"))


def test_the_memory_needed_is_read_from_the_compilers_error(small_config, monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (15.89G) exceeds available HBM (15.75G)."
            )

    monkeypatch.setattr("autoretouch_jax.training.compilation.lowered_step", lambda *_: Lowered())
    monkeypatch.setattr(devices, "mesh_of_slice", lambda _: None)
    found = tpu._analysis(small_config, "v5e:2x2")
    assert not found["fits"]
    assert (found["need"] / GIB, found["limit"] / GIB) == pytest.approx((15.89, 15.75))
    found |= {"batch_per_device": 1, "cached": False}
    assert "needs 15.89 GiB, has 15.75 GiB" in plan.report(small_config, chips.read_slice("v5e:2x2"), found)
