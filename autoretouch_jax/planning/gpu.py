"""Estimates a step's memory, FLOPs and bytes from its trace, for GPUs, because XLA compiles for a GPU only where there is one.

An array of the traced program lives from the operation that makes it to the last one that reads it, and an operation reads and
writes its arrays once. What a compiler would fuse is counted as fused: an array that only elementwise operations read is not
stored. The results are estimates, for comparisons and for a first answer. XLA's own figures are better where they can be had.
"""

import math
from typing import Any

import jax
from jax.interpreters import partial_eval

from autoretouch_jax.config import Config
from autoretouch_jax.models import forms
from autoretouch_jax.runtime import devices
from autoretouch_jax.training.compilation import batch_shapes
from autoretouch_jax.training.state import init_state, make_networks, parameter_count, state_specs
from autoretouch_jax.training.step import train_step

# Operations that a compiler does not fuse into their neighbours: their inputs and outputs pass through memory.
COSTLY = {"conv_general_dilated", "dot_general", "reduce_window_sum", "reduce_sum", "reduce_max", "scan", "while", "sort"}


def estimate(config: Config, count: int) -> dict[str, Any]:
    """Returns the figures of `tpu.compile_for` but for the cycles, per device, for `config` spread over `count` devices."""
    networks, frozen = make_networks(config)
    state = jax.eval_shape(lambda: init_state(config, networks))
    batch = batch_shapes(config, config.train.batch // count)

    def step(*arguments: Any) -> Any:
        return train_step(*arguments, networks=networks, config=config)

    # With an axis of one device, the traced program has the shapes of one device.
    with forms.plain():
        traced = jax.make_jaxpr(step, axis_env=[(devices.AXIS, 1)])(state, batch, frozen)
    specs = state_specs(state, count if config.parallel.optimizer_state == "sharded" else 1)
    # State, batch and the frozen VGG live during the whole step.
    argument = _bytes(batch) + _bytes(frozen) + devices.bytes_per_device(state, specs, count)
    peak, flops, accessed = _walk(_needed(traced.jaxpr))
    # Each network is averaged in one all-reduce; metrics are too few to count.
    learners = [learner for learner in (state.generator, state.discriminator) if learner is not None]
    reduced = sum(4 * parameter_count((learner.params, learner.batch_stats)) for learner in learners)
    reduce = {"all-reduce": {"count": len(learners), "bytes": reduced}} if count > 1 else {}
    memory = {"argument": argument, "temp": peak, "peak": argument + peak}
    return {"memory": memory, "flops": flops, "bytes": accessed, "collectives": reduce}


def flops(function: Any, *arguments: Any) -> float:
    """Returns the FLOPs of a function's trace: two for a multiply-accumulate, padding included, one for any other element.

    They are those of plain convolutions, on a CPU too.
    """
    with forms.plain():
        return _walk(_needed(jax.make_jaxpr(function)(*arguments).jaxpr))[1]


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _needed(jaxpr: Any) -> Any:
    """The traced program without what none of its results needs, such as the gradients of a frozen network's biases."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _walk(jaxpr: Any) -> tuple[int, float, float]:
    """Returns the peak bytes of what the program makes, its FLOPs, and the bytes that its operations read and write."""
    last: dict[Any, int] = {}  # for each array the number of the operation that reads it last
    converted = _converted(jaxpr)
    for number, equation in enumerate(jaxpr.eqns):
        last |= dict.fromkeys(_read(equation, converted), number)
    last |= {variable: len(jaxpr.eqns) for variable in jaxpr.outvars if not hasattr(variable, "val")}
    # Now that the last use of every array is known, walk through the program and free each array after it.
    stored = _stored(jaxpr, converted)
    live, peak, flops, accessed = 0, 0, 0.0, 0.0
    alive: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        inner = [_walk(body) for body in _bodies(equation)]
        # The FLOPs and bytes of a loop's body count once per pass, but every pass uses the same memory.
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        flops += times * sum(part[1] for part in inner) + _flops(equation)
        accessed += times * sum(part[2] for part in inner)
        made = {variable: _size(variable) for variable in equation.outvars if variable in stored}
        if not inner:
            accessed += sum(made.values())
            if equation.primitive.name in COSTLY:
                accessed += sum(map(_size, _read(equation, converted)))
        # At an operation, its own results live beside everything that is read later.
        peak = max(peak, live + max([part[0] for part in inner], default=0), live + sum(made.values()))
        alive |= made
        live += sum(made.values())
        for variable in {*_read(equation, converted), *made}:
            if last.get(variable, number) <= number and variable in alive:
                live -= alive.pop(variable)
    return peak, flops, accessed


def _converted(jaxpr: Any) -> dict[Any, Any]:
    """Returns the arrays that are others in a wider type, and these."""
    pairs = [(*one.outvars, *one.invars[:1]) for one in jaxpr.eqns if one.primitive.name == "convert_element_type"]
    return {made: source for made, source in pairs if not hasattr(source, "val") and _size(source) < _size(made)}


def _read(equation: Any, converted: dict[Any, Any]) -> list[Any]:
    """The arrays that an operation reads. A reduction converts them by itself."""
    read = [variable for variable in equation.invars if not hasattr(variable, "val")]
    return [converted.get(v, v) for v in read] if equation.primitive.name.startswith("reduce_") else read


def _stored(jaxpr: Any, converted: dict[Any, Any]) -> set[Any]:
    """Returns the arrays that a compiler stores: those that a costly operation makes or reads, and those returned."""
    kept = {variable for variable in [*jaxpr.outvars, *jaxpr.invars] if not hasattr(variable, "val")}
    for equation in jaxpr.eqns:
        if equation.primitive.name in COSTLY or _bodies(equation):
            kept |= {*_read(equation, converted), *equation.outvars}
    return kept


def _bodies(equation: Any) -> list[Any]:
    values = [value for value in equation.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns")]
    return [getattr(value, "jaxpr", value) for value in values]


def _size(variable: Any) -> int:
    aval = variable.aval
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def _flops(equation: Any) -> float:
    """Counts two for a multiply-accumulate, padding included, and one per element for any other operation."""
    if equation.primitive.name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        numbers = equation.params["dimension_numbers"]
        # A dilated input is mostly zeros, which a compiler does not multiply.
        holes = math.prod(equation.params["lhs_dilation"])
        per_output = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        return 2.0 * math.prod(out) * per_output / holes / equation.params["batch_group_count"]
    if equation.primitive.name == "dot_general":
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        contracted = math.prod(left[i] for i in equation.params["dimension_numbers"][0][0])
        return 2.0 * math.prod(out) * contracted
    return float(sum(math.prod(out.aval.shape) for out in equation.outvars if hasattr(out.aval, "shape")))
