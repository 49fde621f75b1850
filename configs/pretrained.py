"""How the model in the box was trained: `autoretouch_jax/pretrained/README.md` is its card.

    autoretouch train configs/portraits.py --data.root FACES --data.negatives PHOTOS --workdir runs/portraits \\
        --train.steps 6000 --optim.decay-share 0.5 --loss.edit-weight 5 --data.blemish.pigments 0 --data.warp 0
    autoretouch train configs/pretrained.py --train.start-from runs/portraits \\
        --data.root FACES --data.negatives PHOTOS --workdir runs/first
    autoretouch train configs/pretrained.py --train.start-from runs/first \\
        --data.root FACES --data.negatives PHOTOS --workdir runs/second \\
        --train.steps 8000 --loss.edit-weight 8 --data.blemish.pigments 0.8
    autoretouch average runs/first runs/second --out pretrained

It continues `configs/portraits.py`, with the values that this had then, for longer, with more uneven light, and with a rate
that falls from the first step on: at a constant rate the network is far worse than its average, and most of what it learns
shows only while the rate falls. The mean of the last two models is better than both, on people that none of them has seen.
"""

from autoretouch_jax.config import BlemishConfig, Config, DataConfig, LossConfig, OptimConfig, Retouch, TrainConfig

config = Config(
    generator=Retouch(width=32, widest=3, levels=5, blocks=1, gate=0.3, gate_off_faces=0.6),
    loss=LossConfig(
        pixel="l1", pixel_weight=100.0, edit_weight=5.0, mask_weight=8.0, adversarial_weight=0.0, perceptual_weight=0.0
    ),
    data=DataConfig(
        crop=192,
        face_size=256,
        on_skin=0.85,
        zoom=(0.85, 1.2),
        colour=0.3,
        light=0.4,
        degrade=0.4,
        negative_share=0.2,
        blemish=BlemishConfig(
            per_megapixel=(250.0, 4000.0), radius=(0.7, 5.5), patch=(5.0, 34.0), strength=(0.1, 0.9), hollows=0.6
        ),
    ),
    optim=OptimConfig(
        generator_optimizer="muon", generator_lr=1e-3, beta1=0.9, warmup_steps=100, decay_share=1.0, clip_norm=5.0, ema=0.999
    ),
    train=TrainConfig(steps=14_000, batch=2, checkpoint_every=500, log_every=50, sample_every=2000),
)
