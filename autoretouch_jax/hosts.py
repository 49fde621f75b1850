"""The processes of a run: how they find each other, wait for each other, and notice that one is gone.

On a pod every host runs the same command. `start` makes them one run, `barrier` waits for all of them by name, and a `Watch`
ends a process that would otherwise wait for a lost one for ever. A single process needs none of it and pays nothing.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed as _distributed  # the coordination service's client has no public name yet

from autoretouch_jax.config import ParallelConfig
from autoretouch_jax.errors import Refused
from autoretouch_jax.stop import EXIT_FAILED, EXIT_REFUSED, EXIT_REQUEUE

BEAT = 5.0  # seconds between two signs of life; a slow peer is asked about after two of them
GOODBYE = 1.5  # seconds by which the coordinator outlives the others
LONGEST_STEP = 3600.0  # for the first step, which compiles
_on_abort: Any = None
SCHEDULERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # the number of processes, as Slurm and Open MPI say it


def start(config: ParallelConfig) -> None:
    """Become one of several processes where the config or the environment says so; before any other use of JAX.

    Raises Refused when the peers cannot be reached within `config.timeout`.
    """
    if config.distributed == "off" or _distributed.global_state.client is not None:
        return
    arguments = _described(config)
    if arguments is None:
        return
    jax.config.update("jax_enable_recoverability", True)  # a lost peer is for `Watch` to name, not for a crash in C++
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: see stop.py
    times: dict[str, Any] = {"initialization_timeout": config.timeout, "heartbeat_timeout_seconds": config.timeout}
    _name_a_lost_coordinator()
    try:
        jax.distributed.initialize(**arguments, **times, shutdown_timeout_seconds=min(60, config.timeout))
    except (RuntimeError, ValueError, TypeError) as error:
        place = arguments.get("coordinator_address", "found by JAX")
        raise Refused(
            f"process {arguments.get('process_id', '?')} of {arguments.get('num_processes', '?')} (coordinator {place}) could "
            f"not start: {_first_line(error)}; do all processes run, and is that address reachable from each of them?"
        ) from error


def _name_a_lost_coordinator() -> None:
    """Turn the abort by which JAX's client ends, in C++, when process 0 is gone, into a message and status 75."""

    def aborted(_signal: int) -> None:
        _end("process 0, the coordinator, is gone or cannot be reached (the lines above are JAX's own)", stacks=False)

    global _on_abort  # C keeps only a pointer to it
    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _on_abort)


def _described(config: ParallelConfig) -> dict[str, Any] | None:
    """What to tell `jax.distributed.initialize`; None for a single process."""
    if config.coordinator:
        return _explicit(config.coordinator, config.processes, config.process)
    environment = os.environ
    if "JAX_NUM_PROCESSES" in environment:
        try:
            count, number = int(environment["JAX_NUM_PROCESSES"]), int(environment["JAX_PROCESS_ID"])
            return _explicit(environment["JAX_COORDINATOR_ADDRESS"], count, number) if count > 1 else None
        except (KeyError, ValueError) as error:
            raise Refused(
                "JAX_NUM_PROCESSES is set: JAX_PROCESS_ID (a number from 0) and JAX_COORDINATOR_ADDRESS (ADDRESS:PORT) "
                f"belong to it ({error})"
            ) from error
    several = any(int(environment.get(name) or 1) > 1 for name in SCHEDULERS)
    several |= "," in environment.get("TPU_WORKER_HOSTNAMES", "") or config.distributed == "on"
    return {} if several else None


def _explicit(coordinator: str, processes: int, process: int) -> dict[str, Any]:
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def number() -> int:
    """Which process this is, from 0."""
    return jax.process_index()


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes plain files and talks."""
    return jax.process_index() == 0


def barrier(name: str, timeout: float) -> None:
    """Wait until every process has come here; after `timeout` seconds end, saying which have not."""
    client = _distributed.global_state.client
    if client is None or jax.process_count() == 1:
        return
    try:
        client.wait_at_barrier(f"autoretouch:{name}", int(timeout * 1000))
    except RuntimeError as error:
        _end(f"waited {timeout:.0f} s at the barrier {name!r} in vain ({_first_line(error)}); {_missing(client, timeout)}")


def gather(name: str, text: str, timeout: float) -> list[str]:
    """What every process says under `name`, in their order. Each name may be used once."""
    client = _distributed.global_state.client
    if client is None or jax.process_count() == 1:
        return [text]
    client.key_value_set(f"autoretouch/{name}/{number()}", text)
    try:
        keys = [f"autoretouch/{name}/{process}" for process in range(count())]
        return [client.blocking_key_value_get(key, int(timeout * 1000)) for key in keys]
    except RuntimeError as error:
        _end(
            f"waited {timeout:.0f} s for what each process says of {name!r} ({_first_line(error)}); {_missing(client, timeout)}"
        )
        raise


class Watch:
    """Signs of life of this process, and an eye on the others: use as a context manager around the loop.

    When this process makes no step for `timeout` seconds, or a collective fails, it prints all threads' stacks, names the
    processes that are missing, and ends with status 75: the last checkpoint is there, the same command goes on from it.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._client: Any = _distributed.global_state.client if jax.process_count() > 1 else None
        self._step, self._moved, self._allowed = 0, time.monotonic(), max(timeout, LONGEST_STEP)
        self._done = threading.Event()

    def __enter__(self) -> "Watch":
        if self._client is not None:
            self._beat()
            threading.Thread(target=self._run, daemon=True, name="watch").start()
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        self._done.set()
        if self._client is None:
            return
        if isinstance(error, jax.errors.JaxRuntimeError):
            _end(f"a collective failed after step {self._step} ({_first_line(error)}); {self._who()}")
        if isinstance(error, Exception | KeyboardInterrupt):
            status = EXIT_REFUSED if isinstance(error, Refused) else EXIT_FAILED
            self.farewell(f"{type(error).__name__}: {error}", status)

    def step(self, number: int) -> None:
        """Step `number` is done."""
        self._allowed = self.timeout if number > self._step else self._allowed
        self._step, self._moved = number, time.monotonic()

    def farewell(self, reason: str, status: int) -> None:
        """Tell the others why this process ends before its time, and with what status they had better end too."""
        if self._client is not None:
            with contextlib.suppress(RuntimeError):
                said = json.dumps([reason, status])
                self._client.key_value_set(f"autoretouch/farewell/{number()}", said, allow_overwrite=True)

    def _run(self) -> None:
        while not self._done.wait(BEAT):
            try:
                self._beat()
                waited = time.monotonic() - self._moved
                if waited > 2 * BEAT and (said := dict(self._client.key_value_dir_get("autoretouch/farewell/"))):
                    who, (reason, status) = next((key, json.loads(text)) for key, text in said.items())
                    _end(f"process {who.rsplit('/', 1)[-1]} has stopped: {reason}", stacks=False, status=status)
                if waited > 2 * BEAT and (quiet := _quiet(self._client, 0.7 * self.timeout)):
                    _end(f"no step for {waited:.0f} s after step {self._step}; missing: {', '.join(quiet)}")
                if waited > self._allowed:
                    _end(f"no step for {waited:.0f} s after step {self._step}; {self._who()}")
            except RuntimeError as error:
                if time.monotonic() - self._moved > min(self.timeout, 4 * BEAT) and not self._done.is_set():
                    _end(f"process 0, the coordinator, does not answer ({_first_line(error)}); step {self._step} was the last")

    def _beat(self) -> None:
        life = {"time": time.time(), "step": self._step, "host": socket.gethostname(), "pid": os.getpid()}
        self._client.key_value_set(f"autoretouch/beat/{number()}", json.dumps(life), allow_overwrite=True)

    def _who(self) -> str:
        return _missing(self._client, self.timeout)


def _missing(client: Any, timeout: float) -> str:
    """Waits for signs of life, `timeout` at most, and says which processes give none."""
    until = time.monotonic() + min(timeout, 4 * BEAT)
    while time.monotonic() < until:
        try:
            if quiet := _quiet(client, 2.5 * BEAT):
                return "missing: " + ", ".join(quiet)
        except RuntimeError:
            return "process 0, the coordinator, does not answer"
        time.sleep(BEAT / 5)
    return "every process still gives signs of life: is one of them slow, or waiting for its data?"


def _quiet(client: Any, silence: float) -> list[str]:
    """The processes not heard of for so many seconds, each in a few words."""
    beats = {key.rsplit("/", 1)[-1]: json.loads(text) for key, text in client.key_value_dir_get("autoretouch/beat/")}
    lives = ((process, beats.get(str(process))) for process in range(jax.process_count()) if process != number())
    return [_portrait(p, life) for p, life in lives if life is None or time.time() - life["time"] > silence]


def _portrait(process: int, life: dict[str, Any] | None) -> str:
    if life is None:
        return f"process {process} (never heard of)"
    ago = time.time() - life["time"]
    return f"process {process} ({life['host']}, pid {life['pid']}, last heard of {ago:.0f} s ago at step {life['step']})"


def _end(message: str, stacks: bool = True, status: int = EXIT_REQUEUE) -> None:
    """Say it and leave at once: a collective that waits for a lost peer can be interrupted by nothing else."""
    if stacks:
        faulthandler.dump_traceback(all_threads=True)
    me = _distributed.global_state  # asking jax itself would start its devices
    again = "the same command goes on from the last checkpoint" if status == EXIT_REQUEUE else "mend that first"
    print(f"\nautoretouch: process {me.process_id} of {me.num_processes} ends: {message}; {again}", file=sys.stderr, flush=True)
    os._exit(status)


@contextlib.contextmanager
def one_run(config: ParallelConfig) -> Iterator[None]:
    """`start`, and an orderly goodbye at the end."""
    start(config)
    try:
        yield
        barrier("all are done", config.timeout)  # whoever leaves first may take the others with it
    finally:
        if jax.process_count() > 1:
            if is_first():
                time.sleep(GOODBYE)
            with contextlib.suppress(RuntimeError):
                jax.distributed.shutdown()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
