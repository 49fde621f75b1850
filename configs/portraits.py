"""A retoucher from a folder of clean portraits, in half an hour on a laptop's CPU, with synthetic blemishes.

    autoretouch train configs/portraits.py --data.root FACES --data.negatives PHOTOS --workdir runs/portraits

FACES are portraits of many people. PHOTOS, which may be left out, are photographs in which nothing is to be retouched: cloth,
flowers, houses, people far away. Without them, drawn patterns alone teach the network what to leave alone.

Faces are found and brought to one size, so that a blemish has the same size in every photograph. `retouch` does the same.
The config takes before/after pairs too, `--data.source BEFORE --data.target AFTER`. Pairs show by themselves what to leave
alone, so they need no negatives, as long as they come from as many places as what is to be retouched.

Only the pixel and the mask loss are used. The edit is resized to the photograph, so its texture is the photograph's. The
adversarial and the perceptual loss made a step half as long again. To add them, which needs a VGG, take `loss` and
`discriminator` from `configs/retouch.py`.
"""

from autoretouch_jax.config import (
    BlemishConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    Retouch,
    TrainConfig,
)

config = Config(
    generator=Retouch(width=32, widest=3, levels=5, blocks=1, gate=0.45, gate_off_faces=0.85),
    loss=LossConfig(
        pixel="l1", pixel_weight=100.0, edit_weight=8.0, mask_weight=8.0, adversarial_weight=0.0, perceptual_weight=0.0
    ),
    data=DataConfig(
        crop=192,
        face_size=256,
        on_skin=0.85,
        zoom=(0.85, 1.2),
        colour=0.3,
        light=0.3,
        degrade=0.4,
        warp=0.06,
        negative_share=0.2,
        blemish=BlemishConfig(
            per_megapixel=(250.0, 4000.0), radius=(0.7, 5.5), patch=(5.0, 34.0), strength=(0.1, 0.9), hollows=0.6, pigments=0.8
        ),
    ),
    optim=OptimConfig(
        generator_optimizer="muon",
        generator_lr=2e-3,
        beta1=0.9,
        warmup_steps=100,
        decay_share=1.0,
        clip_norm=5.0,
        ema=0.999,
    ),
    train=TrainConfig(steps=9000, batch=2, checkpoint_every=500, log_every=50, sample_every=1000),
)
