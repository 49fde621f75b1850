"""Where a run takes place: files that appear whole, the watch over processes, devices, and requests to stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import edited
from jax.sharding import PartitionSpec as P

from autoretouch_jax.config import ParallelConfig
from autoretouch_jax.errors import EXIT_FAILED, EXIT_REFUSED, EXIT_REQUEUE, BadInput, Refused
from autoretouch_jax.runtime import cache, devices, failures, processes, starts, storage, watch
from autoretouch_jax.runtime.stop import StopRequest, requeue_on_sigterm
from autoretouch_jax.runtime.tables import text_table

# ---- storage ----------------------------------------------------------------------------------------------------------------


def a_device(platform: str, **attributes) -> SimpleNamespace:
    return SimpleNamespace(platform=platform, **attributes)


@pytest.mark.parametrize(
    ("here", "precision"),
    [
        ([a_device("cpu")], "float32"),
        ([a_device("tpu"), a_device("tpu")], "bfloat16"),
        ([a_device("gpu", compute_capability="8.0")], "bfloat16"),
        ([a_device("gpu", compute_capability="12.0")], "bfloat16"),
        ([a_device("gpu", compute_capability="7.5")], "float32"),  # it would emulate it
        ([a_device("gpu", compute_capability="9.0"), a_device("gpu", compute_capability="7.0")], "float32"),
        ([a_device("gpu", compute_capability="gfx942")], "float32"),
        ([a_device("gpu")], "float32"),
    ],
)
def test_the_precision_suits_all_devices(monkeypatch, small_config, here, precision):
    monkeypatch.setattr(jax, "devices", lambda: here)
    assert devices.with_precision(small_config).train.precision == precision
    for asked in ("float32", "bfloat16"):
        assert devices.with_precision(edited(small_config, train={"precision": asked})).train.precision == asked


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
    copy = cache.cached(tmp_path / "object", digest)
    assert copy.path.read_bytes() == b"content"
    (tmp_path / "object").unlink()
    assert cache.cached(tmp_path / "object", digest).path == copy.path
    (tmp_path / "other").write_bytes(b"damaged")
    with pytest.raises(BadInput, match="other: damaged"):
        cache.cached(tmp_path / "other", "0" * 64)


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

    def end(message, stacks=True, status=EXIT_REQUEUE, delay=0.0):
        raise Ended(message, status)

    monkeypatch.setattr(watch, "end_process", end)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(watch, "REPORT_EVERY", 0.01)
    monkeypatch.setattr(watch, "LONGEST_WAIT", 0.05)
    service = Service()
    monkeypatch.setattr(watch, "coordination_client", lambda: service)
    return watch.Watch(timeout=100.0), service


def report(service: Service, process: int, seconds_ago: float, clock: float = 0.0) -> None:
    """A report that this process has first seen so many seconds ago. The peer's own clock is wrong by `clock` seconds."""
    life = {"number": 3, "time": time.time() + clock, "step": 7, "host": "node", "pid": 42}
    text = service.values[f"autoretouch/alive/{process}"] = json.dumps(life)
    if seconds_ago:
        watch._seen[str(process)] = text, time.monotonic() - seconds_ago


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


@pytest.mark.parametrize("clock", [-3600.0, 3600.0])
def test_a_process_whose_clock_is_wrong_is_judged_by_its_reports(watched, clock):
    """A live peer is not lost because its clock is an hour slow, nor a silent one alive because its clock is fast."""
    one, service = watched
    report(service, 1, seconds_ago=0, clock=clock)
    report(service, 2, seconds_ago=90, clock=clock)
    with pytest.raises(Ended) as ended:
        one._end_if_lost(waited=90.0)
    message, _ = ended.value.args
    assert "process 1" not in message
    assert "process 2 (node, pid 42, last heard of 90 s ago" in message


def test_a_new_report_makes_a_process_alive_again(watched):
    one, service = watched
    for process in (1, 2):
        report(service, process, seconds_ago=90)
    for process in (1, 2):
        service.values[f"autoretouch/alive/{process}"] = json.dumps({"number": 4, "step": 7, "host": "node", "pid": 42})
    one._end_if_lost(waited=90.0)


def test_two_reports_of_a_process_differ(watched):
    one, service = watched
    one._report()
    before = service.values["autoretouch/alive/0"]
    one._report()
    assert service.values["autoretouch/alive/0"] != before


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


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory allocating 281474976710656 bytes."
LOST_PEER = "FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:9"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (OUT_OF_MEMORY, "--parallel.remat full, --parallel.accumulate 2, half of --train.batch, a smaller --data.crop"),
        ("INTERNAL: NCCL operation ncclCommInitRank failed (Cuda failure 2 'out of memory')", "autoretouch plan CONFIG"),
        ("RESOURCE_EXHAUSTED: Compilation failure: Ran out of memory in memory space hbm.", "too little memory"),
        ("INVALID_ARGUMENT: Binary op add with incompatible shapes", "XLA cannot compile or run this program"),
        ("UNIMPLEMENTED: select-and-scatter", "XLA cannot compile or run this program (UNIMPLEMENTED: select-and-scatter)"),
        ("INTERNAL: XLA compilation failed: ptxas exited with 255", "version of jax"),
    ],
)
def test_a_failure_that_every_start_repeats_is_explained(message, words):
    assert words in (failures.explain(jax.errors.JaxRuntimeError(message)) or "")


@pytest.mark.parametrize(
    "error",
    [
        ValueError(OUT_OF_MEMORY),
        jax.errors.JaxRuntimeError(LOST_PEER),
        jax.errors.JaxRuntimeError("INTERNAL: a bug"),
        jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Gloo all-reduce failed: Connection closed by peer"),
    ],
)
def test_any_other_error_is_not_explained(error):
    assert failures.explain(error) is None


def test_only_the_verbs_that_train_are_told_to_change_a_run():
    advice = failures.explain(jax.errors.JaxRuntimeError(OUT_OF_MEMORY), training=False)
    assert advice
    assert "--" not in advice


def test_too_little_memory_ends_all_processes_with_status_1(watched):
    one, service = watched
    with pytest.raises(Ended) as ended, one:
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
    message, status = ended.value.args
    assert status == EXIT_FAILED
    assert "too little memory" in message
    assert json.loads(service.values["autoretouch/leaving/0"]) == [message, EXIT_FAILED]


def test_a_broken_collective_ends_with_the_status_of_the_process_that_broke_it(watched):
    one, service = watched
    for process in (1, 2):
        report(service, process, seconds_ago=0)
    service.values["autoretouch/leaving/2"] = json.dumps(["too little memory", EXIT_FAILED])
    with pytest.raises(Ended) as ended, one:
        raise jax.errors.JaxRuntimeError(LOST_PEER)
    assert ended.value.args == ("process 2 has stopped: too little memory", EXIT_FAILED)


def test_a_broken_collective_without_a_reason_means_start_again(watched):
    one, _ = watched
    with pytest.raises(Ended) as ended, one:
        raise jax.errors.JaxRuntimeError(LOST_PEER)
    message, status = ended.value.args
    assert status == EXIT_REQUEUE
    assert "a collective failed after step 0" in message


def test_a_single_process_needs_no_watch():
    before = threading.active_count()
    with watch.Watch(1.0) as one:
        one.step_done(1)
        assert threading.active_count() == before


def test_a_single_process_waits_for_nobody():
    processes.barrier("alone", timeout=0.001)
    assert processes.gather("alone", "text", timeout=0.001) == ["text"]
    assert (processes.index(), processes.count(), processes.is_first()) == (0, 1, True)


# ---- starts without progress ------------------------------------------------------------------------------------------------


def test_without_the_variable_starts_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.delenv(starts.VARIABLE, raising=False)
    for _ in range(9):
        starts.note_start(tmp_path, 0, timeout=1.0)
    assert not list(tmp_path.iterdir())


def test_after_three_starts_from_one_step_the_fourth_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(starts.VARIABLE, "3")
    for _ in range(2):
        starts.note_start(tmp_path, 0, timeout=1.0)
    for _ in range(3):  # a checkpoint was made: the count begins anew
        starts.note_start(tmp_path, 40, timeout=1.0)
    for _ in range(2):  # and a refusal does not count as a start
        with pytest.raises(Refused, match=r"3 start\(s\) in a row began at step 40, .*the last log says why.*starts\.json"):
            starts.note_start(tmp_path, 40, timeout=1.0)
    assert json.loads((tmp_path / "starts.json").read_text()) == {"step": 40, "starts": 3}
    starts.note_start(tmp_path, 50, timeout=1.0)
    (tmp_path / "starts.json").unlink()
    starts.note_start(tmp_path, 40, timeout=1.0)


def test_a_finished_run_may_be_started_any_number_of_times(tmp_path, monkeypatch):
    monkeypatch.setenv(starts.VARIABLE, "1")
    for _ in range(3):
        starts.note_start(tmp_path, 40, timeout=1.0, until=40)
    assert not list(tmp_path.iterdir())
    starts.note_start(tmp_path, 40, timeout=1.0, until=50)
    with pytest.raises(Refused, match="began at step 40"):
        starts.note_start(tmp_path, 40, timeout=1.0, until=50)


@pytest.mark.parametrize("damaged", [b"", b"[3]", b'{"step": 0}', b'{"step": 0, "starts": "many"}', b"\xff"])
def test_a_damaged_count_of_starts_counts_as_none(tmp_path, monkeypatch, damaged):
    monkeypatch.setenv(starts.VARIABLE, "1")
    (tmp_path / "starts.json").write_bytes(damaged)
    starts.note_start(tmp_path, 0, timeout=1.0)
    with pytest.raises(Refused, match="began at step 0"):
        starts.note_start(tmp_path, 0, timeout=1.0)


@pytest.mark.parametrize("text", ["0", "-1", "three"])
def test_a_number_of_starts_that_is_none_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setenv(starts.VARIABLE, text)
    with pytest.raises(Refused, match=f"AUTORETOUCH_GIVE_UP={text}"):
        starts.note_start(tmp_path, 0, timeout=1.0)


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
