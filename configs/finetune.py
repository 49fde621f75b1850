"""The model in the box, tuned to a few before/after pairs of your own. benchmarks/README.md measures twenty.

    autoretouch train configs/finetune.py --data.source BEFORE --data.target AFTER --workdir runs/taste

The network and the size of the faces must be those of `configs/pretrained.py`. Most crops are placed where you have edited.
"""

from autoretouch_jax.config import Config, DataConfig, LossConfig, OptimConfig, Retouch, TrainConfig

config = Config(
    generator=Retouch(width=32, widest=3, levels=5, blocks=1, gate=0.3, gate_off_faces=0.6),
    loss=LossConfig(
        pixel="l1", pixel_weight=100.0, edit_weight=5.0, mask_weight=8.0, adversarial_weight=0.0, perceptual_weight=0.0
    ),
    data=DataConfig(crop=192, face_size=256, zoom=(0.85, 1.2), edit_crops=0.7, colour=0.1),
    optim=OptimConfig(
        generator_optimizer="muon", generator_lr=1e-3, beta1=0.9, warmup_steps=50, decay_share=0.7, clip_norm=5.0, ema=0.99
    ),
    train=TrainConfig(steps=1500, batch=2, start_from="pretrained", checkpoint_every=500, log_every=50, sample_every=500),
)
