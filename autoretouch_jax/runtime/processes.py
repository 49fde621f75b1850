"""The processes of a run: how they find each other and wait for each other.

On a pod every host runs the same command. `start` makes the processes one run, `barrier` waits for all of them, and `gather`
collects a text from each. With a single process they return at once. `watch.py` deals with lost processes.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed as _distributed  # the coordinator's address has no public name yet

from autoretouch_jax.config import ParallelConfig
from autoretouch_jax.errors import Refused, first_line, summarise
from autoretouch_jax.runtime import storage
from autoretouch_jax.runtime.watch import coordination_client, end_process, end_waiting, leave, own_number

GRACE = 1.5  # seconds by which process 0, which hosts the coordination service, outlives the others
SHUTDOWN_TIMEOUT = 60  # seconds for leaving JAX's service at the end of a run, at most
PROCESS_COUNT_VARIABLES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # set by Slurm and Open MPI
SHARED_WAIT = 10.0  # seconds within which a file written by one process is seen by the others; NFS caches folders for some
CONNECT_TIMEOUT = 5.0  # seconds, for asking whether the coordinator's address still answers
_abort_handler: Any = None  # C keeps only a pointer to it, so it must not be collected


def start(config: ParallelConfig) -> None:
    """Joins the run's other processes where the config or the environment names some. Call it before any other use of JAX.

    Raises Refused when the other processes cannot be reached within `config.timeout`.
    """
    if config.distributed == "off" or coordination_client() is not None:
        return
    arguments = _initialize_arguments(config)
    if arguments is None:
        return
    # The watch names a lost process. By default JAX would end this one in C++ before it can.
    jax.config.update("jax_enable_recoverability", True)
    # JAX's preemption service would replace our SIGTERM handler; `agreed_to_stop` in training/loop.py says why ours is needed.
    jax.config.update("jax_enable_preemption_service", False)
    times: dict[str, Any] = {"initialization_timeout": config.timeout, "heartbeat_timeout_seconds": config.timeout}
    _explain_abort()
    try:
        jax.distributed.initialize(**arguments, **times, shutdown_timeout_seconds=min(SHUTDOWN_TIMEOUT, config.timeout))
    except (RuntimeError, ValueError, TypeError) as error:
        address = arguments.get("coordinator_address", "found by JAX")
        raise Refused(
            f"process {arguments.get('process_id', '?')} of {arguments.get('num_processes', '?')} (coordinator {address}) "
            f"could not start: {first_line(error)}; do all processes run, and is that address reachable from each of them?"
        ) from error


def alone(config: ParallelConfig) -> bool:
    """Whether a run has one process. It can be asked before `start`. Raises Refused as that does."""
    if coordination_client() is not None:
        return count() == 1
    return config.distributed == "off" or _initialize_arguments(config) is None


def _explain_abort() -> None:
    """Adds a message and a status to an abort, which ends a process in C++.

    JAX's client aborts when it has lost process 0: status 75. Where process 0 still answers, JAX or another library has failed
    in this process and would do so again: status 1, for all processes.
    """

    def aborted(_signal: int) -> None:
        if _coordinator_answers():
            leave(coordination_client(), "JAX or another library has aborted (its lines are above)")
        else:
            message = "process 0, the coordinator, is gone or cannot be reached (the lines above are JAX's own)"
            end_process(message, stacks=False)

    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    # Python's own signal handlers run between bytecodes, which an abort in C++ never reaches.
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _abort_handler)


def _coordinator_answers() -> bool:
    """Whether process 0 lives: this is process 0, or its address accepts a connection."""
    if own_number() == 0:
        return True
    host, _, port = str(_distributed.global_state.coordinator_address).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()
    except (OSError, ValueError):
        return False
    return True


def _initialize_arguments(config: ParallelConfig) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`, or None for a single process."""
    if config.coordinator:
        return _explicit(config.coordinator, config.processes, config.process)
    environment = os.environ
    if "JAX_NUM_PROCESSES" in environment:
        try:
            processes, process = int(environment["JAX_NUM_PROCESSES"]), int(environment["JAX_PROCESS_ID"])
            return _explicit(environment["JAX_COORDINATOR_ADDRESS"], processes, process) if processes > 1 else None
        except (KeyError, ValueError) as error:
            raise Refused(
                "JAX_NUM_PROCESSES is set: JAX_PROCESS_ID (a number from 0) and JAX_COORDINATOR_ADDRESS (ADDRESS:PORT) "
                f"belong to it ({error})"
            ) from error
    several = any(int(environment.get(name) or 1) > 1 for name in PROCESS_COUNT_VARIABLES)
    several |= "," in environment.get("TPU_WORKER_HOSTNAMES", "") or config.distributed == "on"
    return {} if several else None  # without arguments JAX reads the scheduler's variables


def _explicit(coordinator: str, processes: int, process: int) -> dict[str, Any]:
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def count() -> int:
    """The number of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is process 0, which writes plain files and prints."""
    return jax.process_index() == 0


def barrier(name: str, timeout: float) -> None:
    """Waits until every process has called it. After `timeout` seconds it names the missing ones and ends this process."""
    client = coordination_client()
    if client is None or count() == 1:
        return
    try:
        client.wait_at_barrier(f"autoretouch:{name}", int(timeout * 1000))
    except RuntimeError as error:
        end_waiting(client, f"waited {timeout:.0f} s at the barrier {name!r} in vain ({first_line(error)})", timeout)


def gather(name: str, text: str, timeout: float) -> list[str]:
    """Returns the `text` of every process, in their order. Each name may be used once."""
    client = coordination_client()
    if client is None or count() == 1:
        return [text]
    client.key_value_set(f"autoretouch/{name}/{index()}", text)
    try:
        keys = [f"autoretouch/{name}/{process}" for process in range(count())]
        return [client.blocking_key_value_get(key, int(timeout * 1000)) for key in keys]
    except RuntimeError as error:
        end_waiting(client, f"waited {timeout:.0f} s for {name!r} from every process ({first_line(error)})", timeout)
        raise


def check_shared(workdir: Any, timeout: float) -> None:
    """Raises Refused, in every process, when some do not see in `workdir` the file that process 0 writes there.

    Such a run would make steps, but no checkpoint would ever be complete. Call it once in a run, when process 0 has made the
    folder. It waits for every process, as a barrier does.
    """
    if count() == 1:
        return
    token = uuid.uuid4().hex
    # A random name, so that no cache knows the file as missing. `gather` tells it, after process 0 has written the file.
    if is_first():
        with storage.reachable(f"--workdir {workdir}"):
            storage.write(workdir / f".shared-{token}", token)
    token = gather("the token in the work directory", token, timeout)[0]
    path = workdir / f".shared-{token}"
    answer = json.dumps([socket.gethostname(), _is_there(path, token)])
    answers = [json.loads(text) for text in gather("who sees the work directory", answer, timeout + SHARED_WAIT)]
    if is_first():
        with contextlib.suppress(OSError):
            path.unlink()
    blind = [f"process {number} on {host}" for number, (host, sees) in enumerate(answers) if not sees]
    if blind:
        raise Refused(
            f"--workdir {workdir} is not one folder for all processes: what process 0 on {answers[0][0]} writes there is not "
            f"seen by {summarise(blind)}; choose a folder that all hosts share, or one in gs:// or s3://"
        )


def _is_there(path: Any, content: str) -> bool:
    """Whether the file appears, with this content, within some seconds."""
    deadline = time.monotonic() + SHARED_WAIT
    while True:
        # A file that is missing, a folder that cannot be read, a bucket without access: all mean that it is not shared.
        with contextlib.suppress(Exception):
            if path.read_text() == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


@contextlib.contextmanager
def one_run(config: ParallelConfig) -> Iterator[None]:
    """Starts the processes as one run, and lets them leave together."""
    start(config)
    try:
        yield
        barrier("all are done", config.timeout)  # a process that leaves early breaks the others' connections
    finally:
        if count() > 1:
            if is_first():
                time.sleep(GRACE)
            with contextlib.suppress(RuntimeError):
                jax.distributed.shutdown()
