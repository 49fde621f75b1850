"""The outputs of networks, in one form for all of them."""

from typing import NamedTuple

import jax


class GeneratorOutput(NamedTuple):
    """The fake, float32 `[N, H, W, 3]`, and the logits of its mask, float32 `[N, H, W, 1]`, where the network predicts one.

    The mask's probability is high where a pixel needs an edit.
    """

    image: jax.Array
    mask_logits: jax.Array | None


Scales = list[list[jax.Array]]  # for each scale of a discriminator its features, the logits last


def generator_output(output: jax.Array | GeneratorOutput) -> GeneratorOutput:
    """A generator's output with its mask logits, which are None for networks without a mask."""
    return output if isinstance(output, GeneratorOutput) else GeneratorOutput(output, None)


def discriminator_scales(output: jax.Array | Scales) -> Scales:
    """A discriminator's output as a list of scales, each a list of features with the logits last."""
    return output if isinstance(output, list) else [[output]]
