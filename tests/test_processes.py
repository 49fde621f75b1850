"""Several processes are one run: the same numbers, agreement to stop, and a clear end when one is lost."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import edited

from autoretouch_jax.config import ParallelConfig
from autoretouch_jax.config.validation import validate
from autoretouch_jax.errors import Refused
from autoretouch_jax.runtime import processes
from autoretouch_jax.runtime.stop import StopRequest, parse_duration
from autoretouch_jax.training import loop
from autoretouch_jax.training.checkpoints import Checkpoints

RUN = """
import pickle, sys
from pathlib import Path
from autoretouch_jax.training import loop
sys.exit(loop.run(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])))
"""


EVALUATE = """
import pickle, sys
from pathlib import Path
from autoretouch_jax import cli
sys.exit(cli.main(pickle.loads(Path(sys.argv[1]).read_bytes())))
"""


# As the command line does, which turns Refused into status 2. Each process may work in its own folder.
REFUSED = """
import os, pickle, sys
from pathlib import Path
from autoretouch_jax.errors import Refused
from autoretouch_jax.training import loop
os.chdir(os.environ.get("FOLDERS", ".").replace("P", os.environ["JAX_PROCESS_ID"]))
try:
    sys.exit(loop.run(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(os.environ.get("WORKDIR", sys.argv[2]))))
except Refused as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""

# Process FAILING fails at its fourth batch, as FAILURE says.
FAILS = """
import os, pickle, sys
from pathlib import Path
import jax.numpy as jnp
from autoretouch_jax.training import loop
batches, put = [], loop.Trainer.put

def failing(trainer, batch, *rest):
    batches.append(0)
    if len(batches) == 4 and os.environ["JAX_PROCESS_ID"] == os.environ["FAILING"]:
        jnp.zeros(1 << 46).block_until_ready() if os.environ["FAILURE"] == "memory" else os.abort()
    return put(trainer, batch, *rest)

loop.Trainer.put = failing
sys.exit(loop.run(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """Several processes on this machine, each with its share of eight fake devices."""

    def __init__(self, given, workdir: Path, processes: int = 2, program: str = RUN, cwd: Path | None = None):
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.stored = workdir.parent / f"{workdir.name}.pickle"
        self.stored.write_bytes(pickle.dumps(given))
        address, self.members = f"127.0.0.1:{free_port()}", []
        for number in range(processes):
            environment = os.environ | {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
            command = [sys.executable, "-c", program, str(self.stored), str(workdir)]
            self.members.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)
            )

    def end(self, timeout: float = 240) -> list[tuple[int, str, str]]:
        """Exit status, output and errors of each process."""
        said = [member.communicate(timeout=timeout) for member in self.members]
        return [(member.returncode, out, errors) for member, (out, errors) in zip(self.members, said, strict=True)]

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        until = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < until, [member.poll() for member in self.members]
            time.sleep(0.1)


def losses(workdir: Path, name: str = "loss/generator") -> list[float]:
    return [json.loads(line)[name] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def spread_config(small_config):
    """Eight images over eight devices; BatchNorm over all of them."""
    return edited(
        small_config,
        generator={"norm": "batch"},
        discriminator={"norm": "batch"},
        optim={"decay_share": 0.0},
        train={"batch_norm": "global", "log_every": 1},
        parallel={"devices": 0, "timeout": 20},
    )


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_two_processes_are_one_run(spread_config, tmp_path, mode):
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert loop.run(spread_config, alone) == 0
    both = Run(edited(spread_config, parallel={"mode": mode}), together).end()
    assert [status for status, _, _ in both] == [0, 0], both
    assert "done, 6 steps" in both[0][1]
    assert "done" not in both[1][1]  # only the first process prints
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-5)
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}


def test_a_signal_to_one_process_stops_all_at_the_same_step_and_one_process_goes_on(spread_config, tmp_path):
    long = edited(spread_config, train={"steps": 100_000, "checkpoint_every": 4})
    run = Run(long, tmp_path / "run")
    run.wait_for(tmp_path / "run" / "checkpoints" / "4")
    run.members[1].send_signal(signal.SIGTERM)
    ends = run.end()
    assert [status for status, _, _ in ends] == [75, 75], ends
    last = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"stopped at step {last} " in ends[0][1]
    again = edited(long, train={"steps": last + 1}, parallel={"devices": 2, "mode": "pmap"})
    assert loop.run(again, tmp_path / "run") == 0
    whole = tmp_path / "whole"
    assert loop.run(edited(long, train={"steps": last + 2}), whole) == 0
    # A line holds the metrics of the step before its own. Only the first line after a start holds those of its own step.
    assert losses(tmp_path / "run")[-1] == pytest.approx(losses(whole)[-1], rel=1e-5)


def test_two_processes_measure_what_one_does(spread_config, module_pairs, tmp_path):
    assert loop.run(edited(spread_config, train={"steps": 1}), tmp_path / "run") == 0
    words = ["evaluate", str(tmp_path / "run"), "--source", str(module_pairs[0]), "--target", str(module_pairs[1])]
    results = []
    for count in (1, 2):
        path = tmp_path / f"{count}.json"
        ends = Run([*words, "--json", str(path)], tmp_path / f"evaluated{count}", count, program=EVALUATE).end()
        assert [status for status, _, _ in ends] == [0] * count, ends
        assert [("identity" in said) for _, said, _ in ends] == [True, False][:count]
        results.append(json.loads(path.read_text()))
    assert results[0] == results[1]
    assert results[0]["n"] == 4


def test_what_eight_devices_saved_goes_on_on_four_two_and_one(spread_config, tmp_path):
    """The same next batch and the same loss, to rounding."""
    saved = edited(spread_config, train={"steps": 3})
    assert loop.run(saved, tmp_path / "eight") == 0
    found = []
    for devices in (8, 4, 2, 1):
        trainer = loop.Trainer(edited(saved, train={"steps": 4}, parallel={"devices": devices}))
        with Checkpoints(tmp_path / "eight" / "checkpoints") as checkpoints:
            state, _ = checkpoints.restore(3, trainer.shapes, trainer.init)
        batch = next(trainer.batches(3))
        _, metrics = trainer.step(state, trainer.put(batch), trainer.frozen)
        found.append((batch, float(metrics["loss/generator"])))
    for batch, loss in found[1:]:
        for name, values in batch.items():
            np.testing.assert_array_equal(values, found[0][0][name])
        assert loss == pytest.approx(found[0][1], rel=1e-5)


def test_the_doctor_looks_at_two_processes_at_once(tmp_path):
    ends = Run(["doctor", "--workdir", str(tmp_path / "work")], tmp_path / "asked", program=EVALUATE).end()
    assert [status for status, _, _ in ends] == [0, 0], ends
    said = ends[0][1]
    for word in ("2 processes, all answered", "16 MiB over 8 device(s)", "s apart", "1 MiB written, read and deleted"):
        assert word in said
    assert "BAD" not in said
    assert "processes" not in ends[1][1]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_named_within_the_timeout(spread_config, tmp_path, lost):
    run = Run(edited(spread_config, train={"steps": 100_000, "checkpoint_every": 4}), tmp_path / "run")
    run.wait_for(tmp_path / "run" / "checkpoints" / "4")
    run.members[lost].kill()
    killed = time.monotonic()
    ends = run.end()
    assert time.monotonic() - killed < 25  # parallel.timeout, and the time to say so
    status, _, errors = ends[1 - lost]
    assert status == 75, errors
    message = errors.strip().splitlines()[-1]
    assert f"process {lost}" in message
    assert "the same command goes on from the last checkpoint" in message


def test_what_one_process_refuses_ends_the_others_with_its_reason_and_status(spread_config, module_pairs, tmp_path):
    """One host does not see the data. Status 2 tells the launchers not to start again."""
    program = RUN.replace("import pickle, sys", "import os, pickle, sys\nos.chdir(os.environ['JAX_PROCESS_ID'])")
    for number, target in enumerate((spread_config.data.root, tmp_path / "nothing")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "faces").symlink_to(target)
    config = edited(spread_config, data={"root": "faces"})
    ends = Run(config, tmp_path / "run", program=program, cwd=tmp_path).end()
    assert [status for status, _, _ in ends] == [2, 1], ends  # 1: only the command line turns Refused into 2
    assert "process 1 has stopped: Refused" in ends[0][2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("failing", "failure", "words"),
    [
        (1, "memory", "--parallel.accumulate 2"),
        (1, "abort", "JAX or another library has aborted"),
        (0, "abort", "JAX or another library has aborted"),
    ],
)
def test_a_failure_that_every_start_would_repeat_ends_all_with_status_1(
    spread_config, tmp_path, monkeypatch, failing, failure, words
):
    """Status 75 would start the run again without end."""
    monkeypatch.setenv("FAILURE", failure)
    monkeypatch.setenv("FAILING", str(failing))
    ends = Run(edited(spread_config, train={"steps": 100_000}), tmp_path / "run", program=FAILS).end()
    assert [status for status, _, _ in ends] == [1, 1], ends
    assert words in ends[failing][2]
    assert f"process {failing} has stopped: " in ends[1 - failing][2]
    assert words in ends[1 - failing][2]
    assert not any("is gone" in errors or "goes on from" in errors for _, _, errors in ends)


def test_a_work_directory_that_is_not_shared_is_refused(spread_config, tmp_path, monkeypatch):
    """Every process has a folder of that name on its own disk."""
    for number in "01":
        (tmp_path / number).mkdir()
    monkeypatch.setenv("FOLDERS", str(tmp_path / "P"))
    monkeypatch.setenv("WORKDIR", "run")
    ends = Run(spread_config, tmp_path / "run", program=REFUSED).end()
    assert [status for status, _, _ in ends] == [2, 2], ends
    for _, _, errors in ends:
        assert f"is not seen by process 1 on {socket.gethostname()}; choose a folder that all hosts share" in errors
    assert not list(tmp_path.glob("*/run/checkpoints/*"))
    assert not list(tmp_path.glob("*/run/.shared*"))


def test_a_run_that_makes_no_progress_is_refused_by_all_processes(spread_config, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORETOUCH_GIVE_UP", "2")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "starts.json").write_text('{"step": 0, "starts": 2}')
    ends = Run(spread_config, tmp_path / "run", program=REFUSED).end()
    assert [status for status, _, _ in ends] == [2, 2], ends
    assert all("2 start(s) in a row began at step 0, and none of them wrote a checkpoint" in errors for _, _, errors in ends)


def test_a_coordinator_that_never_comes_is_named():
    environment = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    code = """
from autoretouch_jax.config import ParallelConfig
from autoretouch_jax.runtime import processes
processes.start(ParallelConfig(timeout=3))
"""
    said = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 75
    assert "process 1 of 2 ends: process 0, the coordinator, is gone or cannot be reached" in said.stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "h:1"}, None),
        (
            {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "h:1"},
            {"coordinator_address": "h:1", "num_processes": 3, "process_id": 2, "cluster_detection_method": "deactivate"},
        ),
    ],
)
def test_the_processes_are_found_from_the_environment(monkeypatch, environment, expected):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "JAX_NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._initialize_arguments(ParallelConfig()) == expected


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(Refused, match="JAX_PROCESS_ID"):
        processes._initialize_arguments(ParallelConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        {"coordinator": "h:1"},
        {"processes": 2},
        {"coordinator": "h:1", "processes": 2, "process": 2},
        {"optimizer_state": "sharded", "mode": "pmap"},
    ],
)
def test_parallel_keys_that_do_not_fit_are_refused(small_config, wrong):
    with pytest.raises(Refused, match=r"--parallel\."):
        validate(edited(small_config, parallel=wrong))


@pytest.mark.parametrize(("text", "expected"), [("11h50m", 42600), ("90m", 5400), ("45s", 45), ("30", 30), ("1d", 86400)])
def test_times(text, expected):
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1.5h", "-3"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(Refused, match="not a time"):
        parse_duration(text)


def test_max_time_ends_a_run_with_a_checkpoint(small_config, tmp_path):
    stop = StopRequest(max_seconds=1e-3)
    time.sleep(0.01)
    assert loop.run(small_config, tmp_path / "run", stop) == 75
    assert loop.run(small_config, tmp_path / "run") == 0
