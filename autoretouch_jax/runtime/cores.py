"""The processor's cores that this process may use."""

import os

MOST_INPUT_THREADS = 16  # they share Python's lock: by the speeds of one and two, so many are at best four times as fast as one


def cores() -> int:
    """Returns how many cores this process may use."""
    # A container or Slurm may have limited it to some of the machine's.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def input_threads(chosen: int) -> int:
    """Returns how many threads make batches where `parallel.input_threads` is `chosen`; 0 is one for each core, 16 at most."""
    return chosen or min(MOST_INPUT_THREADS, cores())
