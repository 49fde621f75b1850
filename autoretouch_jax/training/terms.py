"""Loss terms: each one's value and its gradient at the generator's output. The step adds them up."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from autoretouch_jax.models.outputs import GeneratorOutput
from autoretouch_jax.training.scalars import is_off

Metrics = dict[str, jax.Array]


class Images(NamedTuple):
    """A device's share of the batch, or a microbatch of it: float32 `[n, H, W, 3]` in [-1, 1], and float32 `[n]`."""

    source: jax.Array
    target: jax.Array
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss term, or a weighted sum of terms: its value, and each term's gradient at the generator's output, by name.

    A term can be multiplied by a number and added to another. The gradients stay separate, so that each one's share can be
    logged.
    """

    value: jax.Array | float
    gradients: dict[str, GeneratorOutput]

    def __rmul__(self, weight: jax.Array | float) -> "Term":
        scaled = {name: jax.tree.map(lambda g: weight * g, gradient) for name, gradient in self.gradients.items()}
        return Term(weight * self.value, scaled)

    def __add__(self, other: "Term") -> "Term":
        return Term(self.value + other.value, self.gradients | other.gradients)

    def gradient(self) -> GeneratorOutput:
        """The gradient of the sum."""
        return jax.tree.map(lambda *terms: sum(terms), *self.gradients.values())

    def shares(self) -> Metrics:
        """`share/TERM`: the norm of a term's gradient over the sum of these norms."""
        norms = {name: optax.global_norm(gradient) for name, gradient in self.gradients.items()}
        total = sum(norms.values()) + 1e-30  # all gradients can be 0, where source and target are equal
        return {f"share/{name}": norm / total for name, norm in norms.items()}


class TermEvaluator:
    """Evaluates losses at the generator's output, each with its gradient.

    With `one_by_one` each term is finished before the next one begins. Otherwise a compiler may compute them side by side and
    store the activations of all of them at once.
    """

    def __init__(self, output: GeneratorOutput, images: Images, one_by_one: bool) -> None:
        self._inputs, self._one_by_one = (output, images), one_by_one
        self._terms: dict[str, Term] = {}

    def __call__(self, name: str, weight: jax.Array | float, loss: Callable[[GeneratorOutput, Images], jax.Array]) -> Term:
        """Returns the mean of `loss` over the images, weighted by their weights. With a weight of 0 nothing is computed."""
        if is_off(weight):
            return Term(0.0, {})
        if self._one_by_one:
            gradients = {name: term.gradients for name, term in self._terms.items()}
            self._inputs, _ = jax.lax.optimization_barrier((self._inputs, gradients))
        output, images = self._inputs
        value, gradient = jax.value_and_grad(lambda fake: jnp.mean(images.weight * loss(fake, images)))(output)
        self._terms[name] = Term(value, {name: gradient})
        return self._terms[name]

    def values(self) -> Metrics:
        """`loss/TERM`: the value of every term that was computed, without its weight."""
        return {f"loss/{name}": jnp.asarray(term.value) for name, term in self._terms.items()}
