"""The watch over a run of several processes: it ends a process that would otherwise wait for a lost one for ever.

A collective that waits for a lost process cannot be interrupted from Python: no exception, no signal handler reaches it. So a
thread of every process reports over JAX's coordination service that it is alive, reads the reports of the others, and ends
its own process with a message when one of them has fallen silent.

Keys in the service, `P` being a process's number:

* `autoretouch/alive/P`: its last report, as JSON: time, step, host and pid.
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
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed as _distributed  # the coordination service's client has no public name yet

from autoretouch_jax.errors import EXIT_FAILED, EXIT_REFUSED, EXIT_REQUEUE, Refused, first_line

REPORT_EVERY = 5.0  # seconds between two reports of a process
SLOW = 2 * REPORT_EVERY  # seconds without a step after which a process checks the others
SILENT = 2.5 * REPORT_EVERY  # seconds without a report after which a process counts as silent when a wait has failed
LONGEST_WAIT = 4 * REPORT_EVERY  # seconds, at most, to find the missing processes after a failure
LONGEST_STEP = 3600.0  # seconds allowed for the first step, which compiles


def coordination_client() -> Any:
    """The client of JAX's coordination service, or None for a single process. This does not initialise the devices."""
    return _distributed.global_state.client


def end_process(message: str, stacks: bool = True, status: int = EXIT_REQUEUE) -> None:
    """Prints the message and exits at once, without unwinding: other threads may hang in a collective."""
    if stacks:
        faulthandler.dump_traceback(all_threads=True)
    # JAX's own `process_index` would start the devices, which may hang by now.
    own = _distributed.global_state
    advice = "the same command goes on from the last checkpoint" if status == EXIT_REQUEUE else "fix that first"
    print(
        f"\nautoretouch: process {own.process_id} of {own.num_processes} ends: {message}; {advice}", file=sys.stderr, flush=True
    )
    os._exit(status)


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


def _silent_processes(client: Any, seconds: float) -> list[str]:
    """The other processes that have not reported for so many seconds, each described in a few words."""
    reports = {key.rsplit("/", 1)[-1]: json.loads(text) for key, text in client.key_value_dir_get("autoretouch/alive/")}
    others = (process for process in range(jax.process_count()) if process != jax.process_index())
    last_reports = ((process, reports.get(str(process))) for process in others)
    return [_describe(process, report) for process, report in last_reports if report is None or _age(report) > seconds]


def _age(report: dict[str, Any]) -> float:
    return time.time() - report["time"]


def _describe(process: int, report: dict[str, Any] | None) -> str:
    if report is None:
        return f"process {process} (never heard of)"
    return (
        f"process {process} ({report['host']}, pid {report['pid']}, last heard of {_age(report):.0f} s ago "
        f"at step {report['step']})"
    )


class Watch:
    """Reports that this process is alive and looks at the others. Use it as a context manager around the loop.

    When this process makes no step for `timeout` seconds, or a collective fails, it prints the stacks of all threads, names the
    missing processes, and ends with status 75: the same command goes on from the last checkpoint. A single process needs no
    watch, and none is started.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._client: Any = coordination_client() if jax.process_count() > 1 else None
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
        # A collective fails with this error when the connection to another process is lost.
        if isinstance(error, jax.errors.JaxRuntimeError):
            missing = name_silent(self._client, self.timeout)
            end_process(f"a collective failed after step {self._step} ({first_line(error)}); {missing}")
        # Any other error is this process's own: the others wait for it in a collective, so tell them why it will not come.
        if isinstance(error, Exception | KeyboardInterrupt):
            status = EXIT_REFUSED if isinstance(error, Refused) else EXIT_FAILED
            self._announce_leaving(f"{type(error).__name__}: {error}", status)

    def step_done(self, step: int) -> None:
        """Notes that a step is done. From the second one on, a step may take `timeout` seconds."""
        if step > self._step:
            self._allowed = self.timeout
        self._step, self._last_step_at = step, time.monotonic()

    def _announce_leaving(self, reason: str, status: int) -> None:
        with contextlib.suppress(RuntimeError):  # the service is gone: the others end by themselves
            key, text = f"autoretouch/leaving/{jax.process_index()}", json.dumps([reason, status])
            self._client.key_value_set(key, text, allow_overwrite=True)

    def _run(self) -> None:
        while not self._done.wait(REPORT_EVERY):
            waited = time.monotonic() - self._last_step_at
            try:
                self._report()
                self._end_if_lost(waited)
            except RuntimeError as error:  # the service does not answer; a short interruption is tolerated
                if waited > min(self.timeout, LONGEST_WAIT) and not self._done.is_set():
                    reason = f"process 0, the coordinator, does not answer ({first_line(error)})"
                    end_process(f"{reason}; step {self._step} was the last")

    def _end_if_lost(self, waited: float) -> None:
        """Ends this process when another one has left or fallen silent, or when a step takes too long."""
        if waited > SLOW:  # while steps are made, no process is missing and the service need not be asked
            for key, text in self._client.key_value_dir_get("autoretouch/leaving/"):
                reason, status = json.loads(text)
                end_process(f"process {key.rsplit('/', 1)[-1]} has stopped: {reason}", stacks=False, status=status)
            # Less than the whole timeout, so that the silent process is named before the timeout ends this one.
            if silent := _silent_processes(self._client, 0.7 * self.timeout):
                end_process(f"no step for {waited:.0f} s after step {self._step}; missing: {', '.join(silent)}")
        if waited > self._allowed:
            missing = name_silent(self._client, self.timeout)
            end_process(f"no step for {waited:.0f} s after step {self._step}; {missing}")

    def _report(self) -> None:
        report = {"time": time.time(), "step": self._step, "host": socket.gethostname(), "pid": os.getpid()}
        self._client.key_value_set(f"autoretouch/alive/{jax.process_index()}", json.dumps(report), allow_overwrite=True)
