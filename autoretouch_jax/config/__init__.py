"""The values that describe a run. A config file imports nothing but `from autoretouch_jax.config import …`."""

from autoretouch_jax.config.loading import load
from autoretouch_jax.config.networks import (
    AutoRetouch,
    AutoRetouchPatchGAN,
    Discriminator,
    Generator,
    PatchGAN,
    Pix2Pix,
    Pix2PixHDGlobal,
    Pix2PixHDLocal,
    Retouch,
)
from autoretouch_jax.config.schema import (
    BlemishConfig,
    Config,
    DataConfig,
    GuardConfig,
    LossConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    ValidationConfig,
)

# The names that `from autoretouch_jax.config import *` gives to a config file.
__all__ = [
    "AutoRetouch",
    "AutoRetouchPatchGAN",
    "BlemishConfig",
    "Config",
    "DataConfig",
    "Discriminator",
    "Generator",
    "GuardConfig",
    "LossConfig",
    "OptimConfig",
    "ParallelConfig",
    "PatchGAN",
    "Pix2Pix",
    "Pix2PixHDGlobal",
    "Pix2PixHDLocal",
    "Retouch",
    "TrainConfig",
    "ValidationConfig",
    "load",
]
