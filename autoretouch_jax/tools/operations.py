"""The dearest operations in a trace of JAX's profiler, which XProf and Perfetto also open."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from autoretouch_jax.errors import BadInput

# An operation in the text of a compiled program: `%name = … metadata={op_name="jit(step)/generator/stem/conv"`.
ORIGIN = re.compile(r'%?([\w.-]+) = [^\n]*?op_name="([^"]+)"')
DEVICE = "/device:"  # how the profiler's names of accelerators begin
OPERATIONS = "XLA Ops"  # the profiler's name of an accelerator's line of single operations


class Operation(NamedTuple):
    """An operation of a compiled program: its name there, its seconds over all threads, and its share of all operations'."""

    name: str
    seconds: float
    share: float


def dearest_operations(folder: Path, count: int = 10) -> list[Operation]:
    """Returns the operations that took most time in the newest trace below `folder`, the dearest first.

    On a CPU an operation may run in several threads at once; their times are added up. Raises BadInput without a trace.
    """
    traces = sorted(folder.glob("**/*.trace.json.gz"))
    if not traces:
        raise BadInput(f"{folder}: holds no trace (*.trace.json.gz)")
    with gzip.open(traces[-1]) as file:
        events = json.load(file)["traceEvents"]
    seconds = Counter[str]()
    for event in _operations(events):
        seconds[event["name"]] += event["dur"] / 1e6  # the format counts in microseconds
    total = sum(seconds.values())
    return [Operation(name, spent, spent / total) for name, spent in seconds.most_common(count)]


def operation_origins(program: str) -> dict[str, str]:
    """Returns, for each operation of a compiled program's text, the call in the network or the step that it comes from."""
    return {name: origin.split("/", 1)[-1] for name, origin in ORIGIN.findall(program)}


def _operations(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that are operations of XLA: those of the accelerators' own lines, or those that name one on a CPU."""
    processes = {event["pid"]: _name(event) for event in events if event.get("name") == "process_name"}
    threads = {(event["pid"], event["tid"]): _name(event) for event in events if event.get("name") == "thread_name"}
    timed = [event for event in events if event.get("ph") == "X"]
    on_device = [event for event in timed if processes.get(event["pid"], "").startswith(DEVICE)]
    # Other lines of an accelerator repeat the same time, grouped by module, step and source.
    single = [event for event in on_device if threads.get((event["pid"], event["tid"])) == OPERATIONS]
    if on_device:
        return single or on_device
    return [event for event in timed if "hlo_op" in event.get("args", {})]


def _name(event: dict[str, Any]) -> str:
    return str(event.get("args", {}).get("name", ""))
