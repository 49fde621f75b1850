"""A retoucher from a folder of clean portraits, in half an hour on a laptop's CPU: all three losses, synthetic blemishes.

    autoretouch train configs/portraits.py --data.root FACES --workdir runs/portraits

It takes before/after pairs too: `--data.source BEFORE --data.target AFTER`. The recipe is ours: see the README.
"""

from autoretouch_jax.config import (
    Config,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)

config = Config(
    generator=GeneratorConfig(width=16, blocks=6, norm="none", head="residual", dead_zone=2),
    discriminator=DiscriminatorConfig(width=16, norm="none"),
    loss=LossConfig(
        pixel="l1",
        pixel_weight=100.0,
        edit_weight=2.5,
        edit_weight_steps=12000,
        adversarial="lsgan",
        adversarial_weight=0.5,
        perceptual_weight=5.0,
        perceptual_layers=("relu1_2", "relu2_2"),
    ),
    data=DataConfig(crop=64, zoom=(0.35, 1.25)),
    optim=OptimConfig(
        generator_lr=2e-3, discriminator_lr=2e-4, beta1=0.9, warmup_steps=100, decay_share=0.4, clip_norm=5.0, ema=0.998
    ),
    train=TrainConfig(steps=6000, batch=8, checkpoint_every=500, log_every=50, sample_every=1000),
)
