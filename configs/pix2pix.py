"""pix2pix as published (Isola et al., CVPR 2017), for before/after pairs.

    autoretouch train configs/pix2pix.py --data.source BEFORE --data.target AFTER --workdir runs/pix2pix

Photos are resized to 286² and cropped to 256². Training makes 200 passes over the pairs, one pair a step, and the learning rate
falls over the second half. `--data.resize 0` crops from full resolution instead, which suits the retouching of large photos.
"""

from autoretouch_jax.config import Config, DataConfig, LossConfig, OptimConfig, PatchGAN, Pix2Pix, TrainConfig

config = Config(
    generator=Pix2Pix(),
    discriminator=PatchGAN(),
    loss=LossConfig(pixel="l1", pixel_weight=100.0, adversarial="bce", adversarial_weight=1.0, perceptual_weight=0.0),
    data=DataConfig(resize=286, crop=256),
    optim=OptimConfig(generator_lr=2e-4, discriminator_lr=2e-4, beta1=0.5, decay_share=0.5, ema=0.0),
    train=TrainConfig(steps=0, epochs=200, batch=1),
)
