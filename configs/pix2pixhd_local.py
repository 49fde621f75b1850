"""pix2pixHD's local enhancer around a trained global generator (Wang et al., CVPR 2018, section 3.2).

    autoretouch train configs/pix2pixhd_local.py --train.start-from runs/global \\
        --data.source BEFORE --data.target AFTER --workdir runs/local

For the first tenth of the run the global generator is frozen, then both are trained: 10 of 100 passes, as in the authors'
script for cards of 24 GB. Their script for 12 GB makes 200 passes, 20 of them frozen: `--train.epochs 200`. The global
generator is twice as wide as the enhancer: train the one to start from with `--generator.width 64`, the default. Where
`--train.start-from` is a run with its checkpoints, its discriminators come along, as in the authors' code.
"""

from autoretouch_jax.config import Config, DataConfig, LossConfig, OptimConfig, PatchGAN, Pix2PixHDLocal, TrainConfig

config = Config(
    generator=Pix2PixHDLocal(),
    discriminator=PatchGAN(norm="instance", widest=512, scales=3, padding=2),
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
    data=DataConfig(crop=1024),
    optim=OptimConfig(generator_lr=2e-4, discriminator_lr=2e-4, beta1=0.5, decay_share=0.5, global_frozen_share=0.1, ema=0.0),
    train=TrainConfig(steps=0, epochs=100, batch=1, update_order="generator_first"),
)
