"""One model whose weights are the means of those of several: a model soup (Wortsman et al. 2022, section 2)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from autoretouch_jax.config.networks import RETOUCHING_ONLY
from autoretouch_jax.errors import EXIT_DONE, Refused
from autoretouch_jax.models.folder import Model, load_model, save_model


def run(models: Sequence[str], out: Path) -> int:
    """Writes the mean of some models as another one."""
    model = average({name: load_model(name) for name in models})
    save_model(out, model, 0)
    print(f"{out}: the mean of {len(set(models))} models")
    return EXIT_DONE


def average(models: Mapping[str, Model]) -> Model:
    """Returns the mean of two models or more. What is not a weight, as the gate, is the first one's; all licences are named.

    The mean is a useful network only where the models were trained from the same weights on. Raises Refused, with the name
    of a model, where the networks or the sizes of their faces differ, and where they have BatchNorm: its moving averages
    belong to the weights that they were measured with.
    """
    if len(models) < 2:
        raise Refused("MODEL: name at least two different models to average")
    (first_name, first), *others = models.items()
    if first.variables.get("batch_stats"):
        raise Refused(f"{first_name}: a network with BatchNorm cannot be averaged; its statistics fit its own weights alone")
    for name, model in others:
        if _network(model) != _network(first):
            raise Refused(
                f"{name}: {model.config}, faces of {model.face_size} pixels, is not the network of {first_name}: "
                f"{first.config}, faces of {first.face_size} pixels"
            )
    mean = jax.tree.map(_mean, *(model.variables for model in models.values()))
    licenses = dict.fromkeys(model.data_license for model in models.values() if model.data_license)
    return dataclasses.replace(first, variables=mean, data_license="; ".join(licenses) or None)


def _network(model: Model) -> tuple[object, ...]:
    values = dataclasses.asdict(model.config)
    return type(model.config), {name: value for name, value in values.items() if name not in RETOUCHING_ONLY}, model.face_size


def _mean(*arrays: np.ndarray) -> np.ndarray:
    return np.mean([np.asarray(array, np.float64) for array in arrays], axis=0).astype(arrays[0].dtype)
