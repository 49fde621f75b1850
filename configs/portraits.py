"""A retoucher from a folder of clean portraits, in half an hour on a laptop's CPU: all three losses, synthetic blemishes.

    autoretouch train configs/portraits.py --data.root FOLDER_OF_FACES --workdir runs/portraits
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
    generator=GeneratorConfig(width=16, blocks=6, norm="none", head="residual"),
    discriminator=DiscriminatorConfig(width=16, norm="none"),
    loss=LossConfig(
        pixel="l1",
        pixel_weight=100.0,
        adversarial="lsgan",
        adversarial_weight=0.1,
        perceptual_weight=10.0,
        perceptual_layers=("relu1_2", "relu2_2"),
    ),
    data=DataConfig(crop=96, zoom=(0.35, 1.0)),
    optim=OptimConfig(generator_lr=1e-3, discriminator_lr=2e-4, warmup_steps=100, decay_share=0.4, clip_norm=1.0),
    train=TrainConfig(steps=3000, batch=16, checkpoint_every=500, log_every=25, sample_every=500),
)
