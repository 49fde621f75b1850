"""Starting: other scalars are the same program, it is compiled once and kept, and a resumed run makes no fresh state."""

import contextlib
import dataclasses
import gc
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard
from conftest import ROOT, edited
from optuna import distributions
from test_step import batch

from autoretouch_jax.config import Config, ParallelConfig, PatchGAN, Retouch
from autoretouch_jax.config.loading import with_values
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.demo import demo
from autoretouch_jax.runtime import compile_cache, devices, kept_programs, processes
from autoretouch_jax.sweeps import sweep
from autoretouch_jax.tools import doctor
from autoretouch_jax.training import compilation, kept_step, loop
from autoretouch_jax.training.scalars import ALWAYS, UNLESS_OFF, is_off, scalars, without_scalars
from autoretouch_jax.training.state import init_state, make_networks
from autoretouch_jax.training.step import train_step
from autoretouch_jax.training.trainer import Trainer

EVERYTHING_ON = {
    "optim.clip_norm": 5.0,
    "loss.feature_matching_weight": 1.0,
    "loss.mask_weight": 1.0,
    "loss.perceptual_weight": 1.0,
    "loss.perceptual_layers": ("relu1_1",),
    "loss.perceptual_layer_weights": (0.7,),
    "loss.vgg_weights": "random",
    "loss.r1_weight": 0.1,
    "loss.left_share": 0.2,
    "loss.edit_weight": 4.0,
    "loss.edit_weight_steps": 10,
}


@pytest.fixture
def everything(small_config):
    """A run with every loss and remedy on. Of all keys it lacks `optim.global_frozen_share`, which needs a local enhancer."""
    networks = {"generator": Retouch(width=4, levels=2, blocks=1), "discriminator": PatchGAN(width=4, norm="none", layers=2)}
    return with_values(dataclasses.replace(small_config, **networks), EVERYTHING_ON)


def changed(config, *keys):
    """The config with another value of each key that is not off. Decays and shares stay below 1."""
    values = {}
    for key in keys:
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        if not is_off(value) or key in ALWAYS:
            values[key] = jax.tree.map(lambda x: x + 3 if isinstance(x, int) else 0.9 * x, value)
    return with_values(config, values)


# ---- one program ------------------------------------------------------------------------------------------------------------


def lowered(config) -> str:
    networks, frozen = make_networks(config)
    compilation._program.cache_clear()
    return compilation.lowered_step(config, networks, frozen, devices.make_mesh(config.parallel, config.train.batch)).as_text()


@pytest.fixture
def options():
    devices._compiler_options.cache_clear()
    yield devices._compiler_options
    devices._compiler_options.cache_clear()


def test_products_of_matrices_are_not_left_to_a_library_that_is_slow_to_load(options):
    def step(state, batch, frozen):
        return state @ state, {"sum": jnp.tanh(batch["x"]).sum(0)}

    mesh = devices.make_mesh(ParallelConfig(devices=1), 1)
    arguments = np.ones((256, 256), np.float32), {"x": np.ones((4096, 256), np.float32)}, ()
    text = devices.wrap_step(step, mesh, "jit").lower(*arguments).compile().as_text()
    assert "__ynn_fusion" in text, "sums stay with the library"
    product = next(block for block in text.split("\n\n") if " dot(" in block)
    assert product.lstrip().startswith("ENTRY"), "the library's operations have computations of their own"


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_only_cpus_have_options_of_their_own(options, platform):
    assert options(platform) is None


@pytest.mark.parametrize("name", devices.CPU_OPTIONS)
def test_the_users_own_option_stays(options, monkeypatch, name):
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --{name}=")
    assert set(options("cpu")) == set(devices.CPU_OPTIONS) - {name}


def test_an_option_that_xla_does_not_know_is_left_out(options, monkeypatch):
    assert options("cpu") == devices.CPU_OPTIONS
    options.cache_clear()
    monkeypatch.setattr(devices, "CPU_OPTIONS", devices.CPU_OPTIONS | {"xla_cpu_no_such_option": "True"})
    assert set(options("cpu")) == set(devices.CPU_OPTIONS) - {"xla_cpu_no_such_option"}


def test_other_scalars_are_the_same_program(everything):
    """To the letter, so that JAX finds it among the compiled ones of an earlier process."""
    before = lowered(everything)
    assert lowered(changed(everything, *ALWAYS, *UNLESS_OFF)) == before
    # A whole number where a float is meant is no other program either.
    rates = {"generator_lr": 7e-4, "discriminator_lr": 3e-4, "warmup_steps": 3, "decay_share": 0.25, "clip_norm": 5, "ema": 0.5}
    other = edited(everything, loss={"edit_weight": 4}, optim=rates, train={"steps": 77, "seed": 4}, guard={"spike": 50})
    assert lowered(other) == before


@pytest.mark.parametrize("key", ["loss.mask_weight", "loss.r1_weight", "optim.clip_norm", "loss.edit_weight_steps"])
def test_a_scalar_of_zero_leaves_something_out_of_the_program(everything, key):
    config = with_values(everything, {"loss.left_share": 0.0})
    off = with_values(config, {key: 0 if key.endswith("steps") else 0.0})
    assert without_scalars(config) != without_scalars(off)
    assert key in scalars(config)
    assert key not in scalars(off)


def test_every_weight_of_a_loss_is_an_argument(small_config):
    weights = {f"loss.{field.name}" for field in dataclasses.fields(small_config.loss) if field.name.endswith("_weight")}
    assert weights <= {*ALWAYS, *UNLESS_OFF}, "a new weight is a number in the program until it stands here"


def test_arrays_of_scalars():
    assert is_off(0)
    assert is_off(0.0)
    assert not is_off(0.5)
    assert not is_off(()), "no weights of layers is not a weight of 0"
    assert not jax.jit(lambda x: jax.numpy.asarray(is_off(x)))(0.0), "an argument of a program can be any number"
    config = edited(demo.load("demo.py"), train={"seed": 2**32 - 1}, loss={"pixel_weight": 100})
    values = scalars(config)
    assert values["train.seed"].dtype == values["train.steps"].dtype == np.int32
    assert values["loss.pixel_weight"].dtype == np.float32
    # Seeds of up to 32 bits stay different, and draw the same as the number itself.
    for seed in (0, 7, 2**31 + 5, 2**32 - 1):
        given = scalars(edited(config, train={"seed": seed}))["train.seed"]
        a, b = (jax.random.key_data(jax.random.key(x)) for x in (given, np.uint32(seed)))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_the_program_computes_what_the_numbers_of_the_config_say(everything, small_config, mode):
    """Against the same step with the numbers compiled into it, at step 4: there every ramp and decay is on its way."""
    config = everything if mode == "jit" else small_config
    config = edited(config, parallel={"mode": mode, "devices": 2}, optim={"warmup_steps": 9}, loss={"adversarial_ramp": 8})

    def one_step(config, as_numbers: bool):
        trainer = Trainer(config)
        state = dataclasses.replace(trainer.init(), step=devices.put(np.int32(4), trainer.shardings.step))

        def plain(*arguments):
            return train_step(*arguments, networks=trainer.networks, config=config)

        step = devices.wrap_step(plain, trainer.mesh, mode) if as_numbers else trainer.step
        state, metrics = step(state, trainer.put(batch()), trainer.frozen)
        return jax.device_get((state.generator.opt_state.mu, metrics))

    other = changed(config, *ALWAYS, *UNLESS_OFF)
    results = [one_step(one, as_numbers) for one in (config, other) for as_numbers in (True, False)]
    for plain, ours in (results[:2], results[2:]):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5 * np.abs(a).max()), plain, ours)
    assert not np.allclose(results[1][1]["learning_rate"], results[3][1]["learning_rate"])
    assert not np.allclose(results[1][1]["loss/generator"], results[3][1]["loss/generator"])


# ---- compiled once ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def traces(monkeypatch) -> list[int]:
    """Grows by one each time the step is traced, which it is before it is compiled."""
    seen: list[int] = []

    def counted(*arguments, **named):
        seen.append(1)
        return train_step(*arguments, **named)

    monkeypatch.setattr(compilation, "train_step", counted)
    compilation._program.cache_clear()
    return seen


@pytest.fixture
def events():
    """How often JAX has reported each event."""
    counts: dict[str, int] = {}

    def count(event, **_):
        counts[event] = counts.get(event, 0) + 1

    jax.monitoring.register_event_listener(count)
    yield counts
    jax.monitoring.unregister_event_listener(count)


def test_a_sweep_of_rates_compiles_once(small_config, module_pairs, tmp_path, traces):
    base = edited(small_config, train={"steps": 1, "trackers": ()})
    space = {
        "optim.generator_lr": distributions.CategoricalDistribution([1e-4, 2e-4, 4e-4]),
        "loss.pixel_weight": distributions.CategoricalDistribution([50.0]),
    }
    definition = sweep.Sweep(base, space, 3, tmp_path / "sweep", "grid", "psnr_pooled", 1, None)
    assert sweep.run(definition, PairSource(*module_pairs)) == 0
    assert len(list((tmp_path / "sweep" / "trials").iterdir())) == 3
    assert traces == [1], "one program for all trials"


def test_the_demo_measures_its_speed_with_the_program_that_it_trains_with(small_config, tmp_path, traces, monkeypatch):
    monkeypatch.setattr(demo, "TIMED_SECONDS", 0.0)
    config = edited(small_config, train={"sample_every": 1000, "checkpoint_every": 1000})
    steps = demo.steps_for(config, 1e-3)
    assert loop.run(edited(config, train={"steps": steps}), tmp_path / "run") == 0
    assert traces == [1]


def test_a_later_process_with_another_rate_reads_the_compiled_step(small_config, events):
    def first_step(config):
        jax.clear_caches()
        compilation._program.cache_clear()
        events.clear()
        trainer = Trainer(config)
        jax.block_until_ready(trainer.step(trainer.init(), trainer.put(batch()), trainer.frozen))
        return events.get("/jax/compilation_cache/cache_misses", 0), events.get("/jax/compilation_cache/cache_hits", 0)

    first_step(edited(small_config, generator={"width": 6}))
    misses, hits = first_step(edited(small_config, generator={"width": 6}, optim={"generator_lr": 3e-3}, train={"steps": 9}))
    assert misses == 0
    assert hits > 0


@pytest.fixture
def whole_programs(tmp_path, monkeypatch):
    """Entries for each program that was compiled, however fast, in a folder of the user's own."""
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(compile_cache.FOLDER, str(compile_cache.folder()))
    monkeypatch.setattr(kept_programs, "SHORTEST", 0.0)
    compile_cache.folder().mkdir(parents=True)
    # What JAX's cache of all tests has would not be kept. So each test has a step of its own.
    step, own = compilation.train_step, np.float32(np.random.default_rng().random())

    def with_own_number(*arguments, **named):
        state, metrics = step(*arguments, **named)
        return state, metrics | {"own": jnp.full((), own)}

    monkeypatch.setattr(compilation, "train_step", with_own_number)
    return lambda: sorted(compile_cache.folder().glob(f"*{compile_cache.WHOLE}"))


def run_as_later_process(config, workdir, until):
    jax.clear_caches()
    compilation._program.cache_clear()
    return loop.run(config, workdir, until=until)


def test_a_later_process_with_another_rate_does_not_trace_the_step(small_config, tmp_path, traces, whole_programs):
    """And it goes on as the process that compiled the step would have."""
    config = edited(small_config, parallel={"devices": 2}, train={"sample_every": 1000})
    assert loop.run(config, tmp_path / "whole", until=3) == 0
    assert run_as_later_process(config, tmp_path / "run", 1) == 0
    assert run_as_later_process(config, tmp_path / "run", 3) == 0
    assert run_as_later_process(edited(config, optim={"generator_lr": 3e-3}), tmp_path / "other", 1) == 0
    assert (traces, len(whole_programs())) == ([1], 1)
    whole, run = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert whole == run


def test_after_an_edit_that_leaves_the_step_as_it_was_it_is_not_compiled(
    small_config, tmp_path, traces, whole_programs, monkeypatch
):
    config = edited(small_config, train={"sample_every": 1000})
    assert run_as_later_process(config, tmp_path / "run", 1) == 0
    monkeypatch.setattr(kept_programs, "CODE", "edited")
    compiled = []
    monkeypatch.setattr(kept_programs.Kept, "compile", lambda self, lowered: compiled.append(1))
    for until, traced in ((2, [1, 1]), (3, [1, 1])):
        assert run_as_later_process(config, tmp_path / "run", until) == 0
        assert (traces, compiled, len(whole_programs())) == (traced, [], 1)


def test_a_key_that_leaves_the_step_as_it_was_is_no_other_entry(small_config, tmp_path, traces, whole_programs):
    assert run_as_later_process(small_config, tmp_path / "run", 1) == 0
    for flip in (False, True):
        config = edited(small_config, data={"flip": flip})
        assert run_as_later_process(config, tmp_path / f"flip{flip}", 1) == 0
    assert (len(traces), len(whole_programs())) == (2, 1)


def test_what_jaxs_cache_has_is_not_kept_but_compiled_at_the_next_start(small_config, tmp_path, traces, whole_programs):
    """XLA cannot copy a program that it has read: the copy would fail at its first step."""
    own = [compile_cache.folder() / f"jit_{name}-0-cache" for name in ("step", "init")]
    config = edited(small_config, train={"sample_every": 1000}, generator={"width": 5})
    for until in (1, 2):
        for path in own:
            path.write_bytes(b"")
            os.utime(path, (0, 0))
        assert run_as_later_process(config, tmp_path / "run", until) == 0
        # Its entry is deleted where it is at fault, and the others stay.
        assert (len(whole_programs()), own[0].exists(), own[1].exists()) == (
            (1, True, True) if until == 1 else (0, False, True)
        )
        for entry in whole_programs():
            entry.unlink()
    assert traces == [1, 1]


def test_a_step_is_not_kept_twice(small_config, tmp_path, whole_programs, monkeypatch):
    before = compile_cache.folder() / "jit_step-0-cache"
    before.write_bytes(b"")
    os.utime(before, (0, 0))
    new = compile_cache.folder() / "jit_step-1-cache"
    compile_ = kept_programs.Kept.compile
    monkeypatch.setattr(kept_programs.Kept, "compile", lambda *a: (compile_(*a), new.write_bytes(b""))[0])
    assert run_as_later_process(small_config, tmp_path / "run", 1) == 0
    assert (len(whole_programs()), before.exists(), new.exists()) == (1, True, False)


def test_a_run_begins_to_read_its_step_before_it_makes_networks(small_config, tmp_path, traces, whole_programs, monkeypatch):
    reads, read = [], kept_programs._read
    monkeypatch.setattr(kept_programs, "_read", lambda *a: reads.append(a) or read(*a))
    config = edited(small_config, train={"sample_every": 1000})
    kept_step.read_ahead(config)  # nothing is kept yet
    assert run_as_later_process(config, tmp_path / "run", 1) == 0
    assert (reads, traces) == ([], [1])
    kept_step.read_ahead(config, str(tmp_path / "run"))
    assert run_as_later_process(config, tmp_path / "run", 2) == 0
    assert (len(reads), traces, kept_programs._begun) == (1, [1], {})
    # It is the step in the run's own precision, of which none is kept.
    stored = tmp_path / "run" / "config.json"
    stored.write_text(stored.read_text().replace("float32", "bfloat16"))
    kept_step.read_ahead(config, str(tmp_path / "run"))
    kept_step.read_ahead(edited(config, parallel={"devices": 1000}))  # the run refuses it
    kept_step.read_ahead(edited(config, train={"batch": 0}))  # so it does this
    monkeypatch.setattr(processes, "alone", lambda _: False)
    kept_step.read_ahead(config)
    assert len(reads) == 1


def test_a_device_that_cannot_be_started_ends_the_run(small_config, monkeypatch):
    """JAX says so once. Asked again, it would go on with CPUs."""

    def fails():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fails)
    with pytest.raises(RuntimeError, match="cuda"):
        kept_step.read_ahead(small_config)


@pytest.mark.parametrize(
    ("config", "variables", "alone"),
    [
        ({}, {}, True),
        ({"distributed": "on"}, {}, False),
        ({"coordinator": "10.0.0.1:1234", "processes": 2}, {}, False),
        ({}, {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, False),
        ({"distributed": "off"}, {"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({}, {"SLURM_STEP_NUM_TASKS": "4"}, False),
        ({}, {"SLURM_STEP_NUM_TASKS": "1"}, True),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, False),
    ],
)
def test_whether_a_run_has_one_process_is_known_before_it_starts(config, variables, alone, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.alone(ParallelConfig(**config)) is alone


def test_reading_a_step_ahead_imports_neither_networks_nor_data():
    text = "import sys; from autoretouch_jax.training import kept_step; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.split()
    assert not {"flax", "optax", "grain", "orbax", "scipy"} & {*modules}


def test_other_data_is_the_same_step_and_another_network_batch_device_or_vgg_is_not(small_config, tmp_path, whole_programs):
    def name(config, count=1):
        return kept_step.kept(config, devices.make_mesh(ParallelConfig(devices=count), count)).pointer

    first = name(small_config)
    assert first
    assert name(edited(small_config, data={"source": "/elsewhere", "target": "/there"}, train={"log_every": 7})) == first
    assert name(edited(small_config, parallel={"input_threads": 3, "input_processes": 2, "prefetch": 5})) == first
    others = [{"generator": {"width": 6}}, {"train": {"batch": 2}}, {"data": {"crop": 128}}]
    names = [first, name(small_config, 2), *(name(edited(small_config, **other)) for other in others)]
    vgg = tmp_path / "vgg.npz"
    config = edited(small_config, loss={"perceptual_weight": 1.0, "vgg_weights": str(vgg)})
    names.append(name(config))
    for content in (b"a", b"other"):
        vgg.write_bytes(content)
        names.append(name(config))
    assert len({*names}) == len(names)


def test_a_name_file_that_holds_no_name_is_passed_over(whole_programs):
    kept = kept_programs.Kept("a step", jax.devices())
    for content in (b"", b"a/b", b"\xff", b"lost.whole"):
        kept.pointer.write_bytes(content)
        assert not kept.is_there()
        kept.entry = None


def test_a_step_of_another_signature_is_not_used(small_config, tmp_path, traces, whole_programs, monkeypatch):
    """The name of the config stands for networks that were made by hand, too."""
    config = edited(small_config, train={"sample_every": 1000})
    assert run_as_later_process(config, tmp_path / "run", 1) == 0
    init = kept_programs.Kept.__init__
    monkeypatch.setattr(kept_programs.Kept, "__init__", lambda self, text, used, signature="": init(self, text, used, "other"))
    assert run_as_later_process(config, tmp_path / "run", 2) == 0
    assert traces == [1, 1]


def test_our_code_and_the_environment_decide_the_entry(whole_programs, tmp_path, monkeypatch):
    def name():
        return kept_programs.Kept("a step", jax.devices()).pointer

    names = {name()}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    names.add(name())
    monkeypatch.setattr(kept_programs, "CODE", "another")
    names.add(name())
    assert len(names) == 3
    assert all(names)
    monkeypatch.setattr(kept_programs.processes, "count", lambda: 2)
    assert name() is None, "some processes might read the step while others compile it"
    monkeypatch.undo()
    monkeypatch.setenv(compile_cache.FOLDER, str(tmp_path))
    assert name() is None, "reading an entry can run code, so a folder that others may write to has none"


def test_the_digest_of_the_code_covers_files_and_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_programs, "PACKAGE", tmp_path)
    digests = {kept_programs._digest_of_code()}
    (tmp_path / "layers.py").write_text("x = 1")
    digests.add(kept_programs._digest_of_code())
    monkeypatch.setattr(kept_programs.importlib.metadata, "version", lambda name: "another")
    digests.add(kept_programs._digest_of_code())
    assert len(digests) == 3
    monkeypatch.undo()
    monkeypatch.setattr(kept_programs, "LIBRARIES", ("no such library",))
    assert kept_programs._digest_of_code() == "", "then nothing is kept, and the run goes on"


def test_the_name_is_the_same_in_every_process(small_config, tmp_path):
    """No address and no order of a set is in it."""
    text = "import test_startup; print(test_startup.name_of_a_step())"
    environment = os.environ | {"AUTORETOUCH_CACHE": str(tmp_path), compile_cache.FOLDER: ""}
    run = lambda seed: subprocess.run(  # noqa: E731
        [sys.executable, "-c", text],
        cwd=ROOT / "tests",
        env=environment | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
    )
    first, second = (run(seed) for seed in ("1", "2"))
    assert first.stdout.strip().endswith(compile_cache.WHOLE), first.stderr
    assert first.stdout == second.stdout


def name_of_a_step() -> str:
    os.environ[compile_cache.FOLDER] = str(compile_cache.folder())
    config = demo.load("retouch.py")
    config = with_values(config, {"loss.vgg_weights": "random", "parallel.devices": 1})
    networks, frozen = make_networks(config)
    _, step = compilation.compiled_step(config, networks, devices.make_mesh(config.parallel, config.train.batch))
    step._begin = lambda *_: None
    step.lower = lambda *_: types.SimpleNamespace(in_tree="", out_tree="", as_text=lambda: "")
    step.compile_ahead({}, frozen)
    kept = step.program.kept
    assert kept
    assert kept.pointer
    assert kept.entry
    return f"{kept.pointer.name} {kept.entry.name}"


def test_what_the_compiled_step_refuses_is_compiled_anew(small_config, traces):
    """A batch of another shape, for example."""
    trainer = Trainer(small_config)
    trainer.compile_ahead()
    other = jax.tree.map(lambda x: np.concatenate([x, x]), batch())
    _, metrics = trainer.step(trainer.init(), trainer.put(other), trainer.frozen)
    assert traces == [1, 1]
    assert np.isfinite(metrics["loss/generator"])


def test_a_step_whose_classes_have_moved_is_compiled(small_config, tmp_path, traces, whole_programs, monkeypatch):
    config = edited(small_config, train={"sample_every": 1000})
    assert run_as_later_process(config, tmp_path / "run", 1) == 0

    def moved(self):
        raise ModuleNotFoundError("No module named 'autoretouch_jax.training.state'")

    monkeypatch.setattr(kept_programs.Program, "trees", property(moved))
    assert run_as_later_process(config, tmp_path / "run", 2) == 0
    assert (traces, whole_programs()) == ([1, 1], [])


@pytest.mark.parametrize("when", ["at once", "while it runs"])
def test_a_kept_step_that_fails_is_not_read_again(when):
    error, forgotten = jax.errors.JaxRuntimeError("INTERNAL"), threading.Event()

    class Metric:
        def block_until_ready(self):
            raise error

    def fails(*_):
        if when == "at once":
            raise error
        return None, {"loss": Metric()}

    mesh = devices.make_mesh(ParallelConfig(devices=1), 1)
    kept = types.SimpleNamespace(forget=forgotten.set)
    step = compilation.Step(compilation._Program("broken", mesh, None, None, None, fails, kept), {}, None)
    step._begin(lambda: fails)
    with pytest.raises(jax.errors.JaxRuntimeError) if when == "at once" else contextlib.nullcontext():
        step(None, {}, None)
    assert forgotten.wait(10)


@pytest.mark.parametrize("fault", ["cut short", "another program's", "unwritable"])
def test_an_entry_that_cannot_be_used_costs_a_compilation_only(
    small_config, tmp_path, traces, whole_programs, fault, monkeypatch
):
    config = edited(small_config, train={"sample_every": 1000})
    if fault == "unwritable":
        monkeypatch.setattr(kept_programs.pickle, "dumps", lambda _: 1 / 0)
    assert loop.run(config, tmp_path / "run", until=1) == 0
    if fault == "unwritable":
        assert whole_programs() == []
    else:
        (entry,) = whole_programs()
        entry.write_bytes(entry.read_bytes()[:-100] if fault == "cut short" else zstandard.compress(pickle.dumps((b"", 1, 2))))
    assert run_as_later_process(config, tmp_path / "run", 2) == 0
    assert traces == [1, 1]


def test_a_resumed_run_makes_no_fresh_state(small_config, tmp_path, monkeypatch):
    assert loop.run(small_config, tmp_path / "run", until=3) == 0

    def refuse(self):
        raise AssertionError("a state was made only to be thrown away")

    monkeypatch.setattr(Trainer, "init", refuse)
    assert loop.run(small_config, tmp_path / "run") == 0


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_the_step_compiled_ahead_is_the_one_that_is_called(small_config, tmp_path, traces, mode):
    """Had it other shapes, shardings or types than the real batches and state, the step would be compiled twice."""
    sharded = {"optimizer_state": "sharded" if mode == "jit" else "replicated"}
    config = edited(small_config, parallel={"devices": 4, "mode": mode} | sharded, train={"sample_every": 1000})
    assert loop.run(config, tmp_path / "run", until=2) == 0
    assert loop.run(config, tmp_path / "run", until=3) == 0
    assert traces == [1]


def test_what_fails_while_compiling_ahead_fails_in_the_step():
    class Program:
        """A step that cannot be compiled."""

        def lower(self, *_):
            return self

        def compile(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

        def __call__(self, *_):
            self.compile()

    mesh = devices.make_mesh(ParallelConfig(devices=1), 1)
    step = compilation.Step(compilation._Program("broken", mesh, None, None, Program()), {}, Config())
    step.compile_ahead({}, None)
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="out of memory"):
        step(None, {}, None)


def test_the_fresh_state_is_the_one_of_the_seed(small_config):
    config = edited(small_config, train={"seed": 5}, generator={"norm": "batch"})
    trainer = Trainer(config)
    expected = init_state(config, trainer.networks)
    jax.tree.map(np.testing.assert_array_equal, trainer.init(), expected)
    other = Trainer(edited(config, train={"seed": 6})).init()
    assert not np.array_equal(*(jax.tree.leaves(state.generator.params)[-1] for state in (other, expected)))


# ---- where compiled programs are kept ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A user's cache folder, and an environment in which nothing about compiled programs has been decided."""
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "cache"))
    for name in (compile_cache.FOLDER, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name)
    return tmp_path / "cache"


def test_compiled_programs_are_kept_in_the_users_cache(cache):
    compile_cache.enable()
    assert os.environ[compile_cache.FOLDER] == str(compile_cache.folder())
    assert compile_cache.folder().is_relative_to(cache)
    assert compile_cache.folder().stat().st_mode & 0o077 == 0, "whoever can write there can run code as this user"


def test_a_folder_that_the_user_has_chosen_stays(cache, monkeypatch):
    monkeypatch.setenv(compile_cache.FOLDER, "/elsewhere")
    compile_cache.enable()
    assert os.environ[compile_cache.FOLDER] == "/elsewhere"
    assert not cache.exists()


@pytest.mark.parametrize("fault", ["a file in its place", "another user's", "read-only", "full"])
def test_without_a_usable_folder_there_is_no_cache_and_no_error(cache, monkeypatch, fault):
    if fault == "a file in its place":
        cache.write_text("")
    if fault == "another user's":
        real = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: real + 1)
    if fault == "read-only":
        monkeypatch.setattr(os, "access", lambda *_: False)
    if fault == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 0))
    compile_cache.enable()
    assert compile_cache.FOLDER not in os.environ


def entry(home: Path, name: str, size: int, age: float) -> Path:
    """An entry of the cache as JAX writes it, that was last used `age` seconds ago."""
    path = home / f"{name}-cache"
    path.write_bytes(zstandard.ZstdCompressor().compress(np.random.default_rng(0).bytes(size)))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_the_least_recently_used_programs_make_room(tmp_path):
    home = tmp_path / "processor"
    home.mkdir()
    oldest, used, newest = (entry(home, name, 10_000, age) for name, age in (("a", 9000), ("b", 6000), ("c", 3000)))
    os.utime(oldest, (time.time() - 100, time.time() - 9000))  # read a moment ago
    compile_cache.tidy(tmp_path, 25_000)
    assert [path.exists() for path in (oldest, used, newest)] == [True, False, True]
    compile_cache.tidy(tmp_path, 25_000)
    assert newest.exists()


def test_an_entry_that_is_cut_short_is_deleted_and_one_that_is_being_written_stays(tmp_path):
    whole, cut, written = (entry(tmp_path, name, 1000, age) for name, age in (("a", 500), ("b", 500), ("c", 1)))
    for path in (cut, written):
        status = path.stat()
        path.write_bytes(path.read_bytes()[:-10])
        os.utime(path, (status.st_atime, status.st_mtime))
    compile_cache.tidy(tmp_path, 1e9)
    assert [path.exists() for path in (whole, cut, written)] == [True, False, True]
    # Only what is new since then is read again.
    os.utime(written, (time.time() - 30, time.time() - 30))
    whole.write_bytes(b"")
    os.utime(whole, (time.time() - 500, time.time() - 500))
    compile_cache.tidy(tmp_path, 1e9)
    assert whole.exists()


def test_a_name_without_its_program_is_deleted(tmp_path):
    for name, content in {"kept": "kept.whole", "lost": "lost.whole", "empty": "", "path": "a/b", "binary": "\x00"}.items():
        (tmp_path / f"{name}.name").write_text(content)
    (tmp_path / "kept.whole").write_bytes(b"")
    compile_cache.tidy(tmp_path, 1e9)
    assert [path.name for path in sorted(tmp_path.glob("*.name"))] == ["kept.name"]


def test_the_command_keeps_programs_and_the_doctor_shows_where(cache):
    """In a process of its own, because JAX reads the environment once. `doctor` compiles an all-reduce."""
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "autoretouch_jax.cli", "doctor"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT).stdout
    (line,) = [line for line in said.splitlines() if " compiled " in line]
    assert line.startswith("ok")
    assert str(compile_cache.folder()) in line
    assert list(compile_cache.folder().glob("*-cache"))


def test_the_doctor_says_why_nothing_is_kept(monkeypatch):
    before = jax.config.values
    for changes, words in (
        ({"jax_compilation_cache_dir": None}, "every start compiles its programs"),
        ({"jax_enable_compilation_cache": False}, "switched off by JAX_ENABLE_COMPILATION_CACHE"),
    ):
        monkeypatch.setattr(doctor, "jax", types.SimpleNamespace(config=types.SimpleNamespace(values=before | changes)))
        assert words in doctor._compiled().result
