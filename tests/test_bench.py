"""`autoretouch bench step`, `infer` and `e2e`: figures on a line each, a trace, and the operations in it."""

import dataclasses
import gzip
import json
import subprocess
import sys

import jax
import pytest

from autoretouch_jax import cli
from autoretouch_jax.config import DataConfig, ParallelConfig, TrainConfig
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.planning import gpu
from autoretouch_jax.tools import bench_step
from autoretouch_jax.tools.operations import dearest_operations, operation_origins


@pytest.fixture(autouse=True)
def _small_ceiling(monkeypatch):
    monkeypatch.setattr(bench_step, "CEILING_SIDE", {"cpu": 64})
    monkeypatch.setattr(bench_step, "WARM_UP", 1)


def on_one_device(config):
    return dataclasses.replace(config, parallel=ParallelConfig(devices=1), train=TrainConfig(steps=9, batch=2, log_every=1))


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_step_is_measured_against_the_ceiling_of_the_same_run_and_traced(small_config, tmp_path, capsys):
    config = on_one_device(small_config)
    for _ in range(2):
        assert bench_step.step(config, 3, tmp_path / "trace", tmp_path / "figures.jsonl") == 0
    printed = capsys.readouterr()
    first, second = lines(printed.out)
    assert lines((tmp_path / "figures.jsonl").read_text()) == [first, second]  # the second run is added to the first
    assert first["steps"] == 3
    assert first["images_per_s"] == pytest.approx(2 / first["seconds"])
    assert first["seconds_p10"] <= first["seconds"] <= first["seconds_p90"]
    assert first["utilisation"] == pytest.approx(first["flops"] / first["seconds"] / first["ceiling_flop_per_s"])
    assert first["flops"] == gpu.estimate(config, 1)["flops"]
    # The operations carry the names of the network's layers, not only the compiler's.
    operations = printed.err.splitlines()
    assert len(operations) == 2 * 10
    assert any("conv" in line and "/" in line.split()[-1] for line in operations)


def test_flops_are_those_of_one_device(small_config, capsys):
    config = on_one_device(small_config)
    for count in (1, 2):
        spread = dataclasses.replace(config, parallel=ParallelConfig(devices=count))
        bench_step.step(dataclasses.replace(spread, train=dataclasses.replace(config.train, batch=2 * count)), 1, None, None)
    one, two = lines(capsys.readouterr().out)
    assert one["flops"] == pytest.approx(two["flops"], rel=1e-3)
    assert two["images_per_s"] == pytest.approx(4 / two["seconds"])


def test_a_generator_is_measured_at_every_size(small_config, tmp_path, capsys):
    assert bench_step.infer(on_one_device(small_config), (32, 64), 2, tmp_path / "trace", None) == 0
    printed = capsys.readouterr()
    small, large = lines(printed.out)
    assert (small["size"], large["size"]) == (32, 64)
    assert large["flops"] == pytest.approx(4 * small["flops"], rel=0.02)
    assert large["megapixels_per_s"] == pytest.approx(64 * 64 / 1e6 / large["seconds"])
    assert len(printed.err.splitlines()) <= 10  # only the largest is traced
    with pytest.raises(Refused, match="--sizes 33: autoretouch takes multiples of 2"):
        bench_step.infer(on_one_device(small_config), (32, 33), 2, None, None)


def test_training_from_data_is_measured_with_its_wait_for_them(small_config, pair_folders, capsys):
    source, target = pair_folders
    config = dataclasses.replace(on_one_device(small_config), data=DataConfig(source=str(source), target=str(target), crop=32))
    assert bench_step.e2e(config, 4, None) == 0
    (figures,) = lines(capsys.readouterr().out)
    assert figures["steps"] == 4
    assert 0 <= figures["input_share"] <= 1


def test_the_command_needs_no_data_for_a_step(capsys):
    words = ["configs/retouch.py", "--generator.width", "4", "--data.crop", "32", "--train.batch", "1", "--steps", "1"]
    assert cli.main(["bench", "infer", *words[:3], "--sizes", "32", "--steps", "1"]) == 0
    assert lines(capsys.readouterr().out)[0]["network"] == "retouch"
    assert cli.main(["bench", "step", *words, "--data.source", "missing", "--loss.vgg-weights", "missing"]) == 2
    assert "--data.target" in capsys.readouterr().err


def test_steps_are_measured_where_nothing_is_installed_that_reads_data():
    program = """
import sys
sys.modules |= {name: None for name in ("grain", "tensorflow_datasets", "array_record", "dlib", "skimage", "pyvips")}
from autoretouch_jax import cli
from autoretouch_jax.tools import bench_step
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"JAX_PLATFORMS": "cpu"})


def trace(folder, events) -> None:
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)


def test_an_accelerators_operations_are_read_from_its_own_line(tmp_path):
    def event(thread: int, name: str, microseconds: float, process: int = 1) -> dict:
        return {"ph": "X", "pid": process, "tid": thread, "name": name, "dur": microseconds}

    named = [(1, 0, "process_name", "/device:GPU:0"), (2, 0, "process_name", "/host:CPU"), (1, 7, "thread_name", "XLA Ops")]
    meta = [{"pid": pid, "tid": tid, "name": kind, "args": {"name": name}} for pid, tid, kind, name in named]
    timed = [event(7, "conv.1", 300), event(7, "add.2", 100), event(7, "conv.1", 600)]
    # The step as a whole, and what the host does meanwhile, are no operations.
    trace(tmp_path / "run", [*meta, *timed, event(3, "jit_step", 1000), event(4, "wait", 5000, process=2)])
    first, second = dearest_operations(tmp_path)
    assert (first.name, second.name) == ("conv.1", "add.2")
    assert first.seconds == pytest.approx(9e-4)
    assert first.share == pytest.approx(0.9)
    with pytest.raises(BadInput, match="holds no trace"):
        dearest_operations(tmp_path / "empty")


def test_operations_are_traced_back_to_layers():
    compiled = jax.jit(lambda x: jax.numpy.sort(jax.numpy.sin(x))).lower(jax.numpy.ones(8)).compile()
    assert any(origin.endswith(("sin", "sort")) for origin in operation_origins(compiled.as_text()).values())
