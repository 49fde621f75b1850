"""The watch over a run of several processes: it ends a process that would otherwise wait for a lost one for ever.

A collective that waits for a lost process cannot be interrupted from Python: no exception, no signal handler reaches it. So a
thread of every process reports over JAX's coordination service that it is alive, reads the reports of the others, and ends
its own process with a message when one of them has fallen silent.

Keys in the service, `P` being a process's number:

* `autoretouch/alive/P`: its last report, as JSON: number of the report, step, host and pid.
* `autoretouch/leaving/P`: why it ends before its time, and with which exit status the others should end.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed as _distributed  # the coordination service's client has no public name yet

from autoretouch_jax.errors import EXIT_FAILED, EXIT_REFUSED, EXIT_REQUEUE, Refused, first_line
from autoretouch_jax.runtime.failures import explain

REPORT_EVERY = 5.0  # seconds between two reports of a process
SLOW = 2 * REPORT_EVERY  # seconds without a step after which a process checks the others
SILENT = 2.5 * REPORT_EVERY  # seconds without a new report after which a process counts as silent when a wait has failed
LONGEST_WAIT = 4 * REPORT_EVERY  # seconds, at most, to find the missing processes after a failure
LONGEST_STEP = 3600.0  # seconds allowed for the first step, which compiles

# The last report of each process, and when this process saw it first, by its own monotonic clock.
_seen: dict[str, tuple[str, float]] = {}
_leaving = threading.Event()  # this process only waits for the others to read why it ends


def coordination_client() -> Any:
    """The client of JAX's coordination service, or None for a single process. This does not initialise the devices."""
    return _distributed.global_state.client


def own_number() -> int:
    """The number of this process. JAX's own `process_index` would start the devices, which may hang when it is asked."""
    return _distributed.global_state.process_id


def end_process(message: str, stacks: bool = True, status: int = EXIT_REQUEUE, delay: float = 0.0) -> None:
    """Prints the message and exits, after `delay` seconds, without unwinding: other threads may hang in a collective."""
    if stacks:
        faulthandler.dump_traceback(all_threads=True)
    count = _distributed.global_state.num_processes
    advice = "the same command goes on from the last checkpoint" if status == EXIT_REQUEUE else "fix that first"
    print(f"\nautoretouch: process {own_number()} of {count} ends: {message}; {advice}", file=sys.stderr, flush=True)
    time.sleep(delay)
    os._exit(status)


def announce_leaving(client: Any, reason: str, status: int) -> None:
    """Tells the other processes why this one ends before its time, and with which exit status they should end."""
    with contextlib.suppress(RuntimeError):  # the service is gone: the others end by themselves
        client.key_value_set(f"autoretouch/leaving/{own_number()}", json.dumps([reason, status]), allow_overwrite=True)


def leave(client: Any, reason: str) -> None:
    """Ends this process, and by an announcement the others, with status 1: another start would fail in the same way."""
    _leaving.set()
    # In a thread, because after an abort the service's client may answer no more.
    announcement = threading.Thread(target=announce_leaving, args=(client, reason, EXIT_FAILED), daemon=True)
    announcement.start()
    announcement.join(REPORT_EVERY)
    # The service ends with process 0, so the others must have read the reason before.
    end_process(reason, stacks=False, status=EXIT_FAILED, delay=LONGEST_WAIT if own_number() == 0 else 0.0)


def end_if_another_left(client: Any) -> None:
    """Ends this process, with the status that was announced, when another one has announced that it leaves."""
    # Asked before anyone is called silent: a process that left is silent too, and its reason says more.
    for key, text in client.key_value_dir_get("autoretouch/leaving/"):
        process = key.rsplit("/", 1)[-1]
        if process != str(own_number()):
            reason, status = json.loads(text)
            end_process(f"process {process} has stopped: {reason}", stacks=False, status=status)


def end_waiting(client: Any, what: str, timeout: float) -> None:
    """Ends this process after a wait has failed: as another process announced, or naming those that have fallen silent."""
    with contextlib.suppress(RuntimeError):
        end_if_another_left(client)
    end_process(f"{what}; {name_silent(client, timeout)}")


def name_silent(client: Any, timeout: float) -> str:
    """Waits, `timeout` seconds at most, until a process counts as silent. Returns a text that names the missing processes."""
    deadline = time.monotonic() + min(timeout, LONGEST_WAIT)
    while time.monotonic() < deadline:
        try:
            if silent := _silent_processes(client, SILENT):
                return "missing: " + ", ".join(silent)
        except RuntimeError:  # the service runs in process 0
            return "process 0, the coordinator, does not answer"
        time.sleep(REPORT_EVERY / 5)
    return "every process still reports that it is alive: is one of them slow, or waiting for its data?"


def _read_reports(client: Any) -> None:
    """Reads the reports of all processes, and notes when each has changed.

    The clocks of two machines may differ by hours, so a report's age is the time for which this process has seen no newer one.
    """
    for key, text in client.key_value_dir_get("autoretouch/alive/"):
        process = key.rsplit("/", 1)[-1]
        if process not in _seen or _seen[process][0] != text:
            _seen[process] = text, time.monotonic()


def _silent_processes(client: Any, seconds: float) -> list[str]:
    """The other processes without a new report for so many seconds, each described in a few words."""
    _read_reports(client)
    others = (process for process in range(jax.process_count()) if process != jax.process_index())
    last = {process: _seen.get(str(process), ("", float("-inf"))) for process in others}
    now = time.monotonic()
    return [_describe(process, text, now - since) for process, (text, since) in last.items() if now - since > seconds]


def _describe(process: int, text: str, age: float) -> str:
    if not text:
        return f"process {process} (never heard of)"
    report = json.loads(text)
    return f"process {process} ({report['host']}, pid {report['pid']}, last heard of {age:.0f} s ago at step {report['step']})"


class Watch:
    """Reports that this process is alive and looks at the others. Use it as a context manager around the loop.

    When this process makes no step for `timeout` seconds, or a collective fails, it prints the stacks of all threads, names the
    missing processes, and ends with status 75: the same command goes on from the last checkpoint. Where another start would not
    help, because memory is too small or the step cannot be compiled, all processes end with status 1. A single process needs
    no watch, and none is started.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._client: Any = coordination_client() if jax.process_count() > 1 else None
        self._reports = 0
        _seen.clear()  # what an earlier run in this process has left
        _leaving.clear()
        self._step, self._last_step_at = 0, time.monotonic()
        self._allowed = max(timeout, LONGEST_STEP)  # until the first step is done
        self._done = threading.Event()

    def __enter__(self) -> "Watch":
        if self._client is not None:
            self._report()  # before the thread starts, so that no process is "never heard of"
            threading.Thread(target=self._run, daemon=True, name="watch").start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self._done.set()
        if self._client is None:
            return
        # A process that has too little memory, or whose step cannot be compiled, would fail again after every start.
        if error is not None and (failure := explain(error)):
            leave(self._client, failure)
        # A collective fails with this error when the connection to another process is lost.
        elif isinstance(error, jax.errors.JaxRuntimeError):
            end_waiting(self._client, f"a collective failed after step {self._step} ({first_line(error)})", self.timeout)
        # Any other error is this process's own: the others wait for it in a collective, so tell them why it will not come.
        elif isinstance(error, Exception | KeyboardInterrupt):
            status = EXIT_REFUSED if isinstance(error, Refused) else EXIT_FAILED
            announce_leaving(self._client, f"{type(error).__name__}: {error}", status)

    def step_done(self, step: int) -> None:
        """Notes that a step is done. From the second one on, a step may take `timeout` seconds."""
        if step > self._step:
            self._allowed = self.timeout
        self._step, self._last_step_at = step, time.monotonic()

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Allows as long as for the first step while other work than a step is done, such as a validation."""
        allowed, self._allowed = self._allowed, max(self._allowed, LONGEST_STEP)
        try:
            yield
        finally:
            self._allowed, self._last_step_at = allowed, time.monotonic()

    def _run(self) -> None:
        while not self._done.wait(REPORT_EVERY):
            waited = time.monotonic() - self._last_step_at
            try:
                self._report()
                _read_reports(self._client)  # at every turn, so that the age of a report is known when it is needed
                self._end_if_lost(waited)
            except RuntimeError as error:  # the service does not answer; a short interruption is tolerated
                if waited > min(self.timeout, LONGEST_WAIT) and not self._done.is_set():
                    reason = f"process 0, the coordinator, does not answer ({first_line(error)})"
                    end_process(f"{reason}; step {self._step} was the last")

    def _end_if_lost(self, waited: float) -> None:
        """Ends this process when another one has left or fallen silent, or when a step takes too long."""
        if _leaving.is_set():
            return
        if waited > SLOW:  # while steps are made, no process is missing
            end_if_another_left(self._client)
            # Less than the whole timeout, so that the silent process is named before the timeout ends this one.
            if silent := _silent_processes(self._client, 0.7 * self.timeout):
                end_process(f"no step for {waited:.0f} s after step {self._step}; missing: {', '.join(silent)}")
        if waited > self._allowed:
            end_waiting(self._client, f"no step for {waited:.0f} s after step {self._step}", self.timeout)

    def _report(self) -> None:
        self._reports += 1  # two reports must differ, or the process would seem silent
        report = {"number": self._reports, "step": self._step, "host": socket.gethostname(), "pid": os.getpid()}
        self._client.key_value_set(f"autoretouch/alive/{own_number()}", json.dumps(report), allow_overwrite=True)
