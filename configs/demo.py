"""The config of `autoretouch demo`, for drawn faces and two restyled photos: pixel, mask and adversarial loss.

It has a small generator and discriminator and no VGG, so that the demo needs no download.
"""

from autoretouch_jax.config import (
    AutoRetouchPatchGAN,
    BlemishConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    Retouch,
    TrainConfig,
)

config = Config(
    generator=Retouch(width=24, widest=2, levels=3, blocks=1, gate=0.7),
    discriminator=AutoRetouchPatchGAN(width=4, norm="none"),
    loss=LossConfig(
        pixel="l1",
        pixel_weight=100.0,
        edit_weight=5.0,
        adversarial="lsgan",
        adversarial_weight=0.5,
        mask_weight=8.0,
        perceptual_weight=0.0,
    ),
    data=DataConfig(
        crop=64, zoom=(0.6, 2.5), blemish=BlemishConfig(per_megapixel=(700.0, 5000.0), radius=(1.0, 8.0), strength=(0.25, 0.95))
    ),
    optim=OptimConfig(
        generator_optimizer="muon",
        generator_lr=2e-3,
        discriminator_lr=5e-5,
        beta1=0.9,
        warmup_steps=50,
        decay_share=0.5,
        clip_norm=5.0,
        ema=0.99,
    ),
    train=TrainConfig(steps=2000, batch=8, checkpoint_every=500, log_every=50, sample_every=500),
)
