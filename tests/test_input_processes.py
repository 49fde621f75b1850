"""Batches made in processes: the same ones, faults with their names, and no process that outlives its run."""

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from conftest import edited

from autoretouch_jax import cli
from autoretouch_jax.data import pipeline
from autoretouch_jax.data.negatives import open_negatives
from autoretouch_jax.data.opening import Weighted, open_source
from autoretouch_jax.data.records import RecordSource
from autoretouch_jax.errors import BadInput
from autoretouch_jax.runtime import worker


@pytest.fixture
def records(module_pairs, tmp_path):
    """Pairs as records."""
    home = tmp_path / "records"
    assert cli.main(["data", "prepare", *map(str, module_pairs), "--out", str(home)]) == 0
    return home


def in_processes(config, number=2):
    return edited(config, parallel={"input_processes": number, "input_threads": number})


def taken(stream, number):
    with contextlib.closing(stream):
        return list(itertools.islice(stream, number))


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert set(batch) == set(other)
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


# ---- the same batches -------------------------------------------------------------------------------------------------------


def test_processes_make_the_batches_that_threads_make(small_config, records):
    config = edited(small_config, data={"root": None, "records": str(records), "edit_crops": 0.7})
    source, share = open_source(config.data), pipeline.Share(1, 2)
    expected = taken(pipeline.batches(source, config, 3, share=share), 5)
    made = taken(pipeline.batches(source, in_processes(config), 3, share=share), 5)
    assert_equal(made, expected)
    # Copies: an array of Grain's would keep its shared memory.
    assert {type(value) for batch in made for value in batch.values()} == {np.ndarray}


@pytest.mark.parametrize("form", ["faces", "pairs", "records", "resized", "weighted"])
def test_every_source_can_be_pickled_and_leaves_its_memory_behind(small_config, module_pairs, records, form):
    pairs = {"root": None, "source": str(module_pairs[0]), "target": str(module_pairs[1])}
    data = {
        "faces": {"negative_share": 0.5, "negatives": str(module_pairs[1])},
        "pairs": pairs,
        "records": {"root": None, "records": str(records)},
        "resized": pairs | {"resize": 48, "extra_blemishes": 0.5, "negative_share": 0.3},
        "weighted": pairs,
    }[form]
    config = edited(small_config, data=data)
    source, negatives = open_source(config.data), open_negatives(config.data)
    if form == "weighted":
        source = Weighted(source, {source.names[0]: 0.5}, 0)
    before = len(cloudpickle.dumps((source, negatives)))
    expected = taken(pipeline.batches(source, config, 0, negatives=negatives), 2)
    sent = cloudpickle.dumps((source, negatives))
    assert len(sent) == pytest.approx(before, abs=100), "decoded images are sent too"
    source, negatives = cloudpickle.loads(sent)
    assert_equal(taken(pipeline.batches(source, config, 0, negatives=negatives), 2), expected)


# ---- faults -----------------------------------------------------------------------------------------------------------------


def damage(records):
    """Damages one tile, and returns its example's name."""
    source = RecordSource(records)
    shard = records / "shard-00000.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[data.index(source.read(source.entries[2], [1])[0][100:132])] ^= 255
    shard.write_bytes(data)
    return source.names[2]


def test_what_a_process_cannot_read_is_named_in_the_run(small_config, records):
    name = damage(records)
    config = in_processes(edited(small_config, data={"root": None, "records": str(records)}))
    source = open_source(config.data)
    faults = pipeline.Faults(config.data, len(source))
    taken(pipeline.batches(source, config, 0, faults=faults), 3)
    assert set(faults.messages) == {name}
    with pytest.raises(BadInput, match=rf"1 example\(s\) could not be read: .*{name}"):
        taken(pipeline.batches(source, edited(config, data={"on_bad": "fail"}), 0), 3)


class Unsendable(Exception):
    def __init__(self, first, second):
        super().__init__(first)


class Broken:
    """A source whose reading raises what no process can send to another."""

    names = ("one",)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise Unsendable("what was wrong", index)


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_that_cannot_be_sent_is_told_all_the_same(small_config, number):
    config = edited(small_config, parallel={"input_processes": number, "input_threads": 1})
    with pytest.raises(RuntimeError, match="Unsendable: what was wrong"):
        taken(pipeline.batches(Broken(), config, 0), 1)


# ---- the ends of a run ------------------------------------------------------------------------------------------------------


PATIENCE = 120  # seconds; a busy machine takes many
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

RUN = """
import pickle, sys
from pathlib import Path
from autoretouch_jax.data import pipeline
from autoretouch_jax.training import loop

init = pipeline.Crops.__init__

def with_the_bytes_of_many_pairs(self, *arguments):
    init(self, *arguments)
    self.padding = bytes(1 << 20)  # more than a pipe holds

pipeline.Crops.__init__ = with_the_bytes_of_many_pairs
sys.exit(loop.run(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])))
"""


TAKE_ONE = """
import pickle, sys
from pathlib import Path
from autoretouch_jax.data import pipeline
from autoretouch_jax.data.opening import open_source
config = pickle.loads(Path(sys.argv[1]).read_bytes())
batches = pipeline.batches(open_source(config.data), config, 0)
next(batches)
"""


@pytest.fixture
def started(small_config, tmp_path):
    """A long run in a group of processes of its own, two of which make its batches. They have just been started."""
    config = in_processes(edited(small_config, train={"steps": 100_000, "log_every": 1}))
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", RUN, str(tmp_path / "config.pickle"), str(tmp_path / "run")]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or len(workers_of(process)) == 2)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def run(started, tmp_path):
    """The same run after its first checkpoint."""
    wait_until(lambda: started.poll() is not None or (tmp_path / "run" / "model").exists())
    assert started.poll() is None, (tmp_path / "log").read_text()
    return started


def wait_until(reached):
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(process):
    """The numbers of the processes that make batches."""
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    with contextlib.suppress(FileNotFoundError):  # a process or thread has just ended
        numbers = [int(number) for file in children for number in file.read_text().split()]
        return [number for number in numbers if b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes()]
    return []


def nothing_is_left(process):
    wait_until(lambda: not alive(process.pid))


def alive(group):
    """The processes of a group that have not ended. One that has may wait for its parent to notice."""
    states = [file.read_text().rpartition(")")[2].split() for file in stat_files()]
    return [state for state in states if int(state[2]) == group and state[0] not in "ZX"]


def stat_files():
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            file.read_text()
            yield file


@linux
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_to_all_processes_stops_the_run_after_a_step(run, tmp_path, sent, status):
    """As a terminal sends it, and a scheduler."""
    os.killpg(run.pid, sent)
    assert run.wait(PATIENCE) == status
    log = (tmp_path / "log").read_text()
    assert "checkpoint written" in log
    assert "Traceback" not in log
    assert "leaked" not in log
    nothing_is_left(run)


@linux
def test_a_signal_before_the_first_batch_stops_the_run_as_well(started):
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(PATIENCE) == 130
    nothing_is_left(started)


@linux
def test_no_process_outlives_a_run_that_is_killed(run):
    run.kill()
    run.wait(PATIENCE)
    nothing_is_left(run)


@linux
def test_a_process_that_dies_ends_the_run_with_a_checkpoint(run, tmp_path):
    os.kill(workers_of(run)[0], signal.SIGKILL)
    assert run.wait(PATIENCE) == 1
    log = (tmp_path / "log").read_text()
    assert "checkpoint written: a process that makes batches has died" in log
    assert "--parallel.input-processes" in log
    nothing_is_left(run)


@pytest.mark.parametrize("number", [0, 2])
def test_a_program_that_ends_with_batches_left_says_nothing(small_config, tmp_path, number):
    config = edited(small_config, parallel={"input_processes": number})
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    ended = subprocess.run([sys.executable, "-c", TAKE_ONE, str(tmp_path / "config.pickle")], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_worker_knows_how_many_share_the_machine(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "_siblings", 1)
    assert worker.siblings() == 1
    worker.start(4)
    assert worker.siblings() == 4
