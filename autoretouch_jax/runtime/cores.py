"""The processor's cores that this process may use."""

import os


def cores() -> int:
    """Returns how many cores this process may use."""
    # A container or Slurm may have limited it to some of the machine's.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
