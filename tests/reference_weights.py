"""Weights of the reference implementations that only tests need: PyTorch's PatchGANs and AutoRetouch's Keras networks."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoretouch_jax.config import networks
from autoretouch_jax.models.pytorch_import import StateDict


def import_patchgan(arrays: dict[str, np.ndarray]) -> tuple[networks.PatchGAN, dict[str, Any]]:
    """`NLayerDiscriminator` of pix2pix (`model.N`), or `MultiscaleDiscriminator` of pix2pixHD (`scaleN_layerM.0`).

    The authors number scales from the coarsest, we from the finest. Their older code pads every convolution by 2 and gives it a
    bias; the newer pads by 1 and has no bias before a norm. Ours has the biases; where they are missing they are zero.
    """
    tensors = StateDict({name: value for name, value in arrays.items() if not name.endswith("num_batches_tracked")})
    found = {int(match[1]) for name in arrays if (match := re.match(r"scale(\d+)_layer", name))}
    for scale in range(max(found, default=0) + 1):
        convolutions = tensors.convolutions(f"scale{max(found) - scale}_") if found else tensors.convolutions("model")
        for i, prefix in enumerate(convolutions):
            name = f"conv{i}" if i < len(convolutions) - 1 else "logits"
            tensors.take_conv(prefix, (f"scale{scale}", name))
            bias = tensors.flat["params", f"scale{scale}", name, "kernel"].shape[-1:]
            tensors.flat.setdefault(("params", f"scale{scale}", name, "bias"), np.zeros(bias, np.float32))
        norms = sorted(
            (n.rsplit(".", 1)[0] for n in tensors.left if n.endswith(".running_mean")), key=lambda n: int(n.split(".")[1])
        )
        for i, prefix in enumerate(norms):
            tensors.take_norm(prefix, (f"scale{scale}", f"norm{i + 1}"))
    biased = f"{convolutions[1]}.bias" in arrays
    config = networks.PatchGAN(
        width=tensors.flat["params", "scale0", "conv0", "kernel"].shape[-1],
        layers=len(convolutions) - 2,
        norm="instance" if found else "batch",
        scales=len(found) or 1,
        padding=2 if found or biased else 1,
    )
    return config, tensors.variables()


def seed_keras_variables(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The seed's Keras generator or discriminator (`conv2d_3/kernel`, `batch_normalization/gamma`, …) → Flax variables.

    Keras numbers its layers in the order they were made: convolutions and norms are matched to ours in that order. Which of
    the two networks it is follows from the first kernel: 7×7 for the generator, 4×4 for the discriminator.
    """
    convolutions, norms = (_keras_layers(arrays, prefix) for prefix in ("conv2d", "batch_normalization"))
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    is_generator = convolutions[0]["kernel"].shape[0] == 7
    if is_generator:
        blocks = len(norms) // 2
        homes: list[tuple[str, ...]] = [
            ("stem",),
            ("down",),
            *((f"block{i}", f"Conv_{j}") for i in range(blocks) for j in (0, 1)),
            ("up",),
            ("head",),
        ]
        norm_homes: list[tuple[str, ...]] = [(f"block{i}", f"BatchNorm_{j}") for i in range(blocks) for j in (0, 1)]
    else:
        homes = [*((f"conv{i}",) for i in range(len(convolutions) - 1)), ("logits",)]
        norm_homes = [(f"norm{i + 1}",) for i in range(len(norms))]
    for home, layer in zip(homes, convolutions, strict=True):
        _place(params, home, {"kernel": layer["kernel"], "bias": layer["bias"]})
    for home, layer in zip(norm_homes, norms, strict=True):
        _place(params, home, {"scale": layer["gamma"], "bias": layer["beta"]})
        _place(stats, home, {"mean": layer["moving_mean"], "var": layer["moving_variance"]})
    return {"params": params, "batch_stats": stats}


def _keras_layers(arrays: Mapping[str, np.ndarray], prefix: str) -> list[dict[str, np.ndarray]]:
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, value in arrays.items():
        layer, leaf = name.split("/")
        if layer == prefix or layer.startswith(prefix + "_"):
            layers.setdefault(int(layer[len(prefix) + 1 :] or 0), {})[leaf] = value
    return [layers[number] for number in sorted(layers)]


def _place(tree: dict[str, Any], home: tuple[str, ...], leaves: dict[str, Any]) -> None:
    for name in home[:-1]:
        tree = tree.setdefault(name, {})
    tree[home[-1]] = leaves
