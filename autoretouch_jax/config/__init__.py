"""Values only: what a run is made of. A config file needs nothing but `from autoretouch_jax.config import …`."""

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
    LossConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)

# What `from autoretouch_jax.config import *` gives a config file.
__all__ = [
    "AutoRetouch",
    "AutoRetouchPatchGAN",
    "BlemishConfig",
    "Config",
    "DataConfig",
    "Discriminator",
    "Generator",
    "LossConfig",
    "OptimConfig",
    "ParallelConfig",
    "PatchGAN",
    "Pix2Pix",
    "Pix2PixHDGlobal",
    "Pix2PixHDLocal",
    "Retouch",
    "TrainConfig",
    "load",
]
