"""AutoRetouch as published (Shafaei, Little and Schmidt, WACV 2021), for before/after pairs such as FFHQ/FFHQR.

    autoretouch train configs/autoretouch.py --data.source BEFORE --data.target AFTER --workdir runs/autoretouch

The network, the discriminator and the three losses are the paper's. No source that we could read states the loss weights,
the crop, the batch or the schedule: those here are ours.
"""

from autoretouch_jax.config import Config, DataConfig, LossConfig, OptimConfig, TrainConfig

config = Config(
    loss=LossConfig(pixel="mse", pixel_weight=100.0, adversarial="bce", adversarial_weight=0.1, perceptual_weight=1.0),
    data=DataConfig(crop=256),
    optim=OptimConfig(generator_lr=2e-4, discriminator_lr=2e-4, beta1=0.5, decay_share=0.5),
    train=TrainConfig(steps=100_000, batch=8),
)
