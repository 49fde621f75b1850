"""Our recommended recipe for before/after pairs such as FFHQ/FFHQR: a network that predicts an edit, and a mask for it.

    autoretouch train configs/retouch.py --data.source BEFORE --data.target AFTER --workdir runs/retouch

benchmarks/README.md measures its parts. Seven of ten crops are placed around an edit; edited pixels count five times in the
pixel loss; the adversarial weight rises over the first 2000 steps; neither network has norm layers.

Pairs show by themselves what to leave alone, so no negatives are drawn. But they only show it for photographs like theirs. If
all of them come from one studio and the model is to be used elsewhere, add `--data.negatives PHOTOS`: photographs of anything
in which nothing is to be retouched.
"""

from autoretouch_jax.config import Config, DataConfig, LossConfig, OptimConfig, PatchGAN, Retouch, TrainConfig

config = Config(
    generator=Retouch(width=48, levels=4, blocks=2),
    discriminator=PatchGAN(norm="none"),
    loss=LossConfig(
        pixel="l1",
        pixel_weight=100.0,
        edit_weight=5.0,
        adversarial="lsgan",
        adversarial_weight=1.0,
        adversarial_ramp=2000,
        mask_weight=3.0,
        perceptual_weight=5.0,
        perceptual_layers=("relu1_2", "relu2_2"),
    ),
    data=DataConfig(crop=256, edit_crops=0.7),
    optim=OptimConfig(
        generator_optimizer="muon",
        generator_lr=1e-3,
        discriminator_lr=5e-5,
        beta1=0.9,
        warmup_steps=500,
        decay_share=0.5,
        clip_norm=5.0,
        ema=0.999,
    ),
    train=TrainConfig(steps=100_000, batch=8),
)
