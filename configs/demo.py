"""What `autoretouch demo` trains, on drawn faces and two restyled photos: a small generator, adversarial and pixel loss.

No VGG: the demo needs no download.
"""

from autoretouch_jax.architecture import AutoRetouch, SeedPatchGAN
from autoretouch_jax.config import (
    BlemishConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)

config = Config(
    generator=AutoRetouch(width=16, blocks=6, norm="none", head="residual", dead_zone=6),
    discriminator=SeedPatchGAN(width=4, norm="none"),
    loss=LossConfig(
        pixel="l1",
        pixel_weight=100.0,
        edit_weight=3.0,
        edit_weight_steps=900,
        adversarial="lsgan",
        adversarial_weight=0.5,
        perceptual_weight=0.0,
    ),
    data=DataConfig(crop=64, zoom=(0.6, 2.5), blemish=BlemishConfig(radius=(1.0, 8.0), strength=(0.25, 0.95))),
    optim=OptimConfig(
        generator_lr=2e-3, discriminator_lr=2e-4, beta1=0.9, warmup_steps=50, decay_share=0.4, clip_norm=5.0, ema=0.99
    ),
    train=TrainConfig(steps=2000, batch=8, checkpoint_every=500, log_every=50, sample_every=500),
)
