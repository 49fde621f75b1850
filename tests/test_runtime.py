"""Where a run takes place: files that appear whole, the watch over processes, devices, and requests to stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from autoretouch_jax.config import ParallelConfig
from autoretouch_jax.errors import EXIT_FAILED, EXIT_REFUSED, EXIT_REQUEUE, BadInput, Refused
from autoretouch_jax.runtime import devices, processes, storage, watch
from autoretouch_jax.runtime.stop import StopRequest, requeue_on_sigterm
from autoretouch_jax.runtime.tables import text_table

# ---- storage ----------------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    storage.write(path, "before")

    def break_off():
        with storage.replacing(path) as part:
            part.write_text("half of what was to be wri")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert path.read_text() == "before"
    storage.write(path, b"after")
    assert path.read_bytes() == b"after"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_many_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    texts = [str(number) * 100_000 for number in range(8)]
    writers = [threading.Thread(target=storage.write, args=(tmp_path / "file", text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "file").read_text() in texts
    assert len(list(tmp_path.iterdir())) == 1


def test_a_killed_writer_leaves_the_file_as_it_was(tmp_path):
    storage.write(tmp_path / "file", "before")
    code = """
import os, sys
from pathlib import Path
from autoretouch_jax.runtime import storage
with storage.replacing(Path(sys.argv[1])) as part:
    part.write_text("half")
    os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "before"


def test_a_requested_output_gets_its_folder(tmp_path):
    storage.write_output(tmp_path / "a" / "b" / "out.json", "{}")
    assert (tmp_path / "a" / "b" / "out.json").read_text() == "{}"


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "empty").touch()
    assert storage.sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_an_object_is_copied_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "object").write_bytes(b"content")
    digest = storage.sha256(tmp_path / "object")
    copy = storage.cached(tmp_path / "object", digest)
    assert copy.read_bytes() == b"content"
    (tmp_path / "object").unlink()
    assert storage.cached(tmp_path / "object", digest) == copy
    (tmp_path / "other").write_bytes(b"damaged")
    with pytest.raises(BadInput, match="other: damaged"):
        storage.cached(tmp_path / "other", "0" * 64)


def test_what_cannot_be_used_is_refused_and_a_bug_is_not_hidden():
    with pytest.raises(Refused, match=r"--workdir x: cannot be used \(no space\)"), storage.reachable("--workdir x"):
        raise OSError("no space")
    with pytest.raises(Refused, match="as it was"), storage.reachable("--workdir x"):
        raise Refused("as it was")
    with pytest.raises(KeyError), storage.reachable("--workdir x"):
        raise KeyError("a bug")


# ---- the watch, with a stand-in for JAX's coordination service --------------------------------------------------------------


class Service:
    """The key-value store of the coordination service, of which only the methods that the watch uses exist."""

    def __init__(self, values: dict[str, str] | None = None, broken: bool = False):
        self.values, self.broken = values or {}, broken

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        if self.broken:
            raise RuntimeError("UNAVAILABLE: failed to connect\nmore lines")
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        if self.broken:
            raise RuntimeError("UNAVAILABLE: failed to connect")
        assert allow_overwrite or key not in self.values
        self.values[key] = value


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def watched(monkeypatch):
    """A watch of process 0 of 3, over a stand-in for the service. Its end raises `Ended`."""

    def end(message, stacks=True, status=EXIT_REQUEUE):
        raise Ended(message, status)

    monkeypatch.setattr(watch, "end_process", end)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(watch, "REPORT_EVERY", 0.01)
    monkeypatch.setattr(watch, "LONGEST_WAIT", 0.05)
    service = Service()
    monkeypatch.setattr(watch, "coordination_client", lambda: service)
    return watch.Watch(timeout=100.0), service


def report(service: Service, process: int, seconds_ago: float) -> None:
    life = {"time": time.time() - seconds_ago, "step": 7, "host": "node", "pid": 42}
    service.values[f"autoretouch/alive/{process}"] = json.dumps(life)


def test_no_process_is_checked_while_steps_are_made(watched):
    one, _ = watched
    one._end_if_lost(waited=1.0)


def test_a_silent_process_is_named_with_its_host_and_step(watched):
    one, service = watched
    report(service, 1, seconds_ago=1)
    report(service, 2, seconds_ago=90)
    with pytest.raises(Ended) as ended:
        one._end_if_lost(waited=90.0)
    message, status = ended.value.args
    assert "missing: process 2 (node, pid 42, last heard of 90 s ago at step 7)" in message
    assert "process 1" not in message
    assert status == EXIT_REQUEUE


def test_a_process_that_never_reported_is_named_so(watched):
    one, service = watched
    report(service, 1, seconds_ago=1)
    with pytest.raises(Ended, match="process 2 \\(never heard of\\)"):
        one._end_if_lost(waited=90.0)


def test_a_process_that_left_hands_on_its_reason_and_status(watched):
    one, service = watched
    for process in (1, 2):
        report(service, process, seconds_ago=1)
    service.values["autoretouch/leaving/1"] = json.dumps(["Refused: no data", EXIT_REFUSED])
    with pytest.raises(Ended) as ended:
        one._end_if_lost(waited=30.0)
    assert ended.value.args == ("process 1 has stopped: Refused: no data", EXIT_REFUSED)


def test_a_step_that_takes_too_long_ends_though_all_are_alive(watched):
    one, service = watched
    one.step_done(1)  # the first step may take an hour, the second only the time-out
    for process in (1, 2):
        report(service, process, seconds_ago=0)
    one._end_if_lost(waited=99.0)
    with pytest.raises(Ended, match="every process still reports that it is alive"):
        one._end_if_lost(waited=101.0)


def test_the_first_step_may_take_an_hour(watched):
    one, service = watched
    for process in (1, 2):
        report(service, process, seconds_ago=0)
    one._end_if_lost(waited=3000.0)


def test_a_lost_coordinator_is_named(watched):
    one, service = watched
    service.broken = True
    assert watch.name_silent(service, 0.1) == "process 0, the coordinator, does not answer"
    one.timeout, one._last_step_at = 0.0, time.monotonic() - 10
    with pytest.raises(Ended, match="process 0, the coordinator, does not answer \\(UNAVAILABLE: failed to connect\\)"):
        one._run()


@pytest.mark.parametrize(("error", "status"), [(Refused("no"), EXIT_REFUSED), (ValueError("a bug"), EXIT_FAILED)])
def test_an_own_error_is_announced_to_the_others(watched, error, status):
    one, service = watched
    with pytest.raises(type(error)), one:
        raise error
    reason, announced = json.loads(service.values["autoretouch/leaving/0"])
    assert announced == status
    assert type(error).__name__ in reason


def test_a_single_process_needs_no_watch():
    before = threading.active_count()
    with watch.Watch(1.0) as one:
        one.step_done(1)
        assert threading.active_count() == before


def test_a_single_process_waits_for_nobody():
    processes.barrier("alone", timeout=0.001)
    assert processes.gather("alone", "text", timeout=0.001) == ["text"]
    assert (processes.index(), processes.count(), processes.is_first()) == (0, 1, True)


# ---- devices ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3, 64, 128), P(None, None, None, devices.AXIS)),
        ((7, 7, 3, 64), P(None, None, None, devices.AXIS)),
        ((4096, 3), P(devices.AXIS, None)),
        ((3, 3, 3, 3), P()),
        ((64,), P()),
        ((), P()),
        ((1025, 3), P()),
    ],
)
def test_arrays_are_sharded_along_their_longest_side_that_divides(shape, expected):
    assert devices.partition_spec(shape, 8) == expected
    assert devices.partition_spec(shape, 1) == P()


def test_parts_join_to_the_whole():
    tree = {"kernel": np.arange(3 * 3 * 16 * 64, dtype=np.float32).reshape(3, 3, 16, 64), "bias": np.ones(64, np.float32)}
    mesh = devices.make_mesh(ParallelConfig(devices=8), 8)

    def there_and_back(state, batch, frozen):
        parts = devices.own_part(state)
        assert parts["kernel"].size == state["kernel"].size // 8
        assert parts["bias"].size == state["bias"].size
        return devices.join_parts(parts, state), {"number": devices.mean(batch)}

    step = devices.wrap_step(there_and_back, mesh, "jit")
    batch = devices.shard_batch({"x": np.arange(8, dtype=np.float32)}, mesh, "jit")
    joined, metrics = step(devices.replicate(tree, mesh), batch, None)
    jax.tree.map(np.testing.assert_array_equal, joined, tree)
    assert float(metrics["number"]["x"][0]) == np.arange(8).mean()


def test_what_a_device_holds_of_a_sharded_tree():
    tree = {"kernel": jax.ShapeDtypeStruct((64, 64), np.float32), "bias": jax.ShapeDtypeStruct((64,), np.float32)}
    specs = jax.tree.map(lambda leaf: devices.partition_spec(leaf.shape, 8), tree)
    assert devices.bytes_per_device(tree, specs, 8) == 64 * 64 * 4 // 8 + 64 * 4


@pytest.mark.parametrize(
    ("count", "batch", "accumulate", "message"),
    [(9, 9, 1, "only 8 cpu"), (8, 12, 1, "--train.batch 12"), (4, 8, 4, "--parallel.accumulate 4")],
)
def test_a_mesh_that_does_not_fit_is_refused(count, batch, accumulate, message):
    with pytest.raises(Refused, match=message):
        devices.make_mesh(ParallelConfig(devices=count, accumulate=accumulate), batch)


def test_an_all_reduce_is_timed_and_checked():
    seconds, right = devices.time_all_reduce(1 << 16, rounds=1)
    assert right
    assert seconds > 0


# ---- stopping ---------------------------------------------------------------------------------------------------------------


def test_a_sigterm_before_anything_has_begun_means_requeue():
    code = """
import os, signal
from autoretouch_jax.runtime.stop import requeue_on_sigterm
before = signal.getsignal(signal.SIGTERM)
with requeue_on_sigterm():
    pass
assert signal.getsignal(signal.SIGTERM) is before
with requeue_on_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == EXIT_REQUEUE


def test_outside_the_main_thread_signals_are_the_callers():
    failures = []

    def enter():
        try:
            with requeue_on_sigterm(), StopRequest() as stop:
                assert stop.exit_code is None
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failures


def test_a_second_ctrl_c_stops_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# ---- tables -----------------------------------------------------------------------------------------------------------------


def test_a_table_is_aligned_and_leaves_formatted_cells_alone():
    text = text_table(["", "PSNR dB", "share"], [["identity", "39.10", "100.00%"], ["model", "–", "0.50%"]])
    lines = text.splitlines()
    assert [line.split() for line in lines] == [
        ["PSNR", "dB", "share"],
        ["identity", "39.10", "100.00%"],
        ["model", "–", "0.50%"],
    ]
    assert lines[1].startswith("identity")
    assert len({len(line) for line in lines}) == 1, "the last column is aligned to the right"
