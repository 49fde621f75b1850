"""Failures of JAX that every start would repeat: too little memory, programs that XLA cannot compile. What to do about them.

Exit status 75 asks for another start, so it must not end a process that failed in one of these ways.
"""

import re

import jax

from autoretouch_jax.errors import first_line

# XLA raises one exception for everything. Its message begins with the status; drivers and NCCL name memory further on.
OUT_OF_MEMORY = re.compile(r"^RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
CANNOT_COMPILE = re.compile(
    r"^(INVALID_ARGUMENT|UNIMPLEMENTED)|compilation (failed|failure|error)|failed to compile", re.IGNORECASE
)
# A broken connection to another process may carry any status, and another start may help.
CONNECTION = re.compile(r"gloo|connection|socket|peer", re.IGNORECASE)

LESS_MEMORY = (
    "To need less, change one after another: --parallel.remat full, --parallel.accumulate 2, half of --train.batch, a smaller "
    "--data.crop. `autoretouch plan CONFIG --topology KIND:NUMBER --fit` says what fits"
)
FREE_MEMORY = "end other programs that use the device, or set JAX_PLATFORMS=cpu to use the computer's own memory"
OTHER_PROGRAM = "To compile another one, change --parallel.mode, --parallel.remat or --train.precision, or the version of jax"


def explain(error: BaseException, training: bool = True) -> str | None:
    """Returns what went wrong and what to do about it, or None for an error that another start may not meet, or a bug.

    `training` says whether the command takes the flags of a run; the advice names them.
    """
    text = str(error).strip()
    # A Python error with such words comes from elsewhere, and its traceback says from where.
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if OUT_OF_MEMORY.search(text):
        return f"the device has too little memory ({first_line(error)}). {LESS_MEMORY if training else FREE_MEMORY}"
    # Only the first line: the rest may hold the program, and any name in it.
    if CANNOT_COMPILE.search(text) and not CONNECTION.search(first_line(error)):
        advice = f". {OTHER_PROGRAM}" if training else "; another version of jax may do"
        return f"XLA cannot compile or run this program ({first_line(error)}){advice}"
    return None
