"""A retoucher from a folder of clean portraits, in half an hour on a laptop's CPU: all three losses, synthetic blemishes.

    autoretouch train configs/portraits.py --data.root FACES --workdir runs/portraits

It takes before/after pairs too: `--data.source BEFORE --data.target AFTER`. It is a smaller `configs/retouch.py`; the
perceptual loss compares images at half resolution, which needs a quarter of the computation and sees larger spots.
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
    generator=Retouch(width=32, widest=2, levels=4, blocks=1, gate=0.4),
    discriminator=AutoRetouchPatchGAN(width=16, norm="none"),
    loss=LossConfig(
        pixel="l1",
        pixel_weight=100.0,
        edit_weight=5.0,
        adversarial="lsgan",
        adversarial_weight=1.0,
        mask_weight=8.0,
        perceptual_weight=5.0,
        perceptual_layers=("relu1_2",),
        perceptual_downsample=2,
    ),
    data=DataConfig(crop=96, zoom=(0.5, 1.25), blemish=BlemishConfig(per_megapixel=(700.0, 5000.0))),
    optim=OptimConfig(
        generator_optimizer="muon",
        generator_lr=2e-3,
        discriminator_lr=5e-5,
        beta1=0.9,
        warmup_steps=100,
        decay_share=0.5,
        clip_norm=5.0,
        ema=0.998,
    ),
    train=TrainConfig(steps=6000, batch=4, checkpoint_every=500, log_every=50, sample_every=1000),
)
