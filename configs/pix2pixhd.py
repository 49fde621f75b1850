"""pix2pixHD's global generator as published (Wang et al., CVPR 2018), for before/after pairs.

    autoretouch train configs/pix2pixhd.py --data.source BEFORE --data.target AFTER --workdir runs/global

The crop is ours: the authors train on whole images of 1024×512, and crops of 512² from face photos of 1024² come close to that.
As in the authors' code, images go into the VGG as they are; `--loss.vgg-input imagenet` normalises them as the weights expect.
`configs/pix2pixhd_local.py` goes on with the local enhancer.
"""

from autoretouch_jax.config import Config, DataConfig, LossConfig, OptimConfig, PatchGAN, Pix2PixHDGlobal, TrainConfig

config = Config(
    generator=Pix2PixHDGlobal(),
    discriminator=PatchGAN(norm="instance", widest=512, scales=2, padding=2),
    loss=LossConfig(
        pixel_weight=0.0,
        adversarial="lsgan",
        adversarial_weight=1.0,
        feature_matching_weight=10.0,
        perceptual_weight=10.0,
        perceptual_layers=("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),
        perceptual_layer_weights=(1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0),
        perceptual_scale="none",
        vgg="vgg19",
        vgg_input="raw",
    ),
    data=DataConfig(crop=512),
    optim=OptimConfig(generator_lr=2e-4, discriminator_lr=2e-4, beta1=0.5, decay_share=0.5, ema=0.0),
    train=TrainConfig(steps=0, epochs=200, batch=1, update_order="generator_first"),
)
