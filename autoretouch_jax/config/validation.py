"""Checks the values of a config, alone and in combination. An impossible one is refused by name, before any file is opened."""

from collections.abc import Callable, Sequence
from typing import Any

from autoretouch_jax.config.loading import flatten
from autoretouch_jax.config.schema import DATA_FORMS, Config, DataConfig
from autoretouch_jax.errors import Refused

# The keys of each rule that checks a value by itself.
AT_LEAST_ONE = (
    "generator.width", "generator.widest", "generator.levels", "generator.downs", "discriminator.width", "discriminator.layers",
    "discriminator.scales", "train.batch", "train.checkpoint_every", "train.log_every", "train.sample_every",
    "parallel.prefetch", "parallel.accumulate", "parallel.timeout", "loss.perceptual_downsample",
    "loss.r1_every", "data.validation.every", "data.validation.images", "guard.patience",
)  # fmt: skip
NOT_NEGATIVE = (
    "generator.blocks", "generator.global_blocks", "generator.local_blocks", "generator.dead_zone", "discriminator.widest",
    "optim.warmup_steps", "optim.clip_norm", "parallel.devices", "parallel.processes", "parallel.process",
    "train.seed", "train.steps", "train.epochs", "parallel.input_threads", "parallel.input_processes",
    "data.resize", "data.colour", "loss.edit_weight_steps", "loss.pixel_weight", "loss.adversarial_weight",
    "data.face_size", "data.light", "loss.r1_weight",
    "data.validation.patience", "guard.spike", "guard.diverged", "guard.rollbacks",
    "loss.adversarial_ramp", "loss.perceptual_weight", "loss.feature_matching_weight", "loss.mask_weight",
)  # fmt: skip
POSITIVE = ("optim.generator_lr", "optim.discriminator_lr", "loss.edit_weight")
BELOW_ONE = ("optim.beta1", "optim.beta2", "optim.ema", "generator.dropout", "loss.left_share")
SHARES = (
    "optim.decay_share",
    "optim.global_frozen_share",
    "data.blemish.clean_share",
    "data.blemish.hollows",
    "data.blemish.pigments",
    "data.on_skin",
    "data.negative_share",
    "data.degrade",
    "data.edit_crops",
    "data.extra_blemishes",
    "generator.gate",
    "generator.gate_off_faces",
    "guard.rate_factor",
)
RANGES = ("data.zoom", "data.blemish.radius", "data.blemish.strength", "data.blemish.patch", "data.blemish.per_megapixel")

# Keys, the condition that the value of each must meet, and its wording in a message. Keys that a network lacks are skipped.
RULES: tuple[tuple[Sequence[str], Callable[[Any], bool], str], ...] = (
    (AT_LEAST_ONE, lambda value: value >= 1, "must be at least 1"),
    (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
    (POSITIVE, lambda value: value > 0, "must be positive"),
    (BELOW_ONE, lambda value: 0 <= value < 1, "must be in [0, 1)"),
    (SHARES, lambda value: 0 <= value <= 1, "must be in [0, 1]"),
    (RANGES, lambda value: 0 < value[0] <= value[1], "must be two positive numbers, the smaller first"),
    (("data.warp",), lambda value: 0 <= value <= 0.2, "must be in [0, 0.2]: 0.06 bends a face as much as is plausible"),
    (("data.crop",), lambda value: value >= 32 and value % 16 == 0, "must be a multiple of 16, at least 32"),
    (("data.edit_crops_limit",), lambda value: value == 0 or value >= 1, "must be at least 1, or 0 for no limit"),
)


def validate(config: Config) -> None:
    """Refuses impossible values and combinations, naming the key. Opens no file."""
    flat = flatten(config)
    # Single values are checked first, so that the checks of combinations may divide by them.
    for keys, holds, rule in RULES:
        for key in keys:
            if key in flat and not holds(flat[key]):
                raise Refused(f"--{key.replace('_', '-')} {flat[key]}: {rule}")
    _validate_losses(config)
    _validate_run(config)
    _validate_crop(config)
    _validate_data(config.data)
    _validate_validation(config)
    _validate_parallel(config)


def _validate_run(config: Config) -> None:
    if not config.train.steps and not config.train.epochs:
        raise Refused("--train.steps and --train.epochs are both 0: nothing would be trained; give one of them")
    if config.optim.global_frozen_share and config.generator.global_generator is None:
        name = config.generator.network
        raise Refused(f"--optim.global-frozen-share: network {name} has no global generator inside; set it to 0")


def _validate_crop(config: Config) -> None:
    data, grid = config.data, config.generator.grid
    # Inference pads a photograph to the grid. A training crop is not padded.
    if data.crop % grid:
        raise Refused(f"--data.crop {data.crop}: network {config.generator.network} of this depth needs a multiple of {grid}")
    # The crop is cut from the resized photograph.
    if data.resize and data.resize < data.crop:
        raise Refused(f"--data.resize {data.resize} is smaller than --data.crop {data.crop}; make it at least as large, or 0")


def _validate_parallel(config: Config) -> None:
    parallel, optim = config.parallel, config.optim
    # pmap has no sharded state, and Muon needs whole matrices.
    if parallel.optimizer_state == "sharded" and (parallel.mode != "jit" or optim.generator_optimizer != "adam"):
        raise Refused("--parallel.optimizer-state sharded needs --parallel.mode jit and --optim.generator-optimizer adam")
    if bool(parallel.coordinator) != bool(parallel.processes) or parallel.process >= max(1, parallel.processes):
        raise Refused(
            "--parallel.coordinator ADDRESS:PORT, --parallel.processes N and --parallel.process P (0 … N-1) belong together"
        )


def _validate_data(data: DataConfig) -> None:
    given = [form for form in DATA_FORMS if any(getattr(data, key) for key in form)]
    if len(given) > 1:
        names = " and ".join("/".join(f"--data.{key}" for key in form) for form in given)
        raise Refused(f"{names} exclude each other: give clean faces (root), pairs (source and target), records, or tfds")
    if bool(data.source) != bool(data.target):
        missing = "target" if data.source else "source"
        raise Refused(f"--data.{missing} is missing: pairs need both --data.source and --data.target")
    if data.edit_threshold is not None and (data.edit_threshold < 0 or data.root or data.records):
        raise Refused(
            f"--data.edit-threshold {data.edit_threshold}: must be at least 0, and is for pairs of images; "
            "records keep the one of `autoretouch data prepare --edit-threshold`"
        )
    if data.face_size and (data.records or data.tfds or data.resize):
        raise Refused(
            "--data.face-size needs folders, --data.root or --data.source and --data.target, and no --data.resize; "
            "set it to 0, or resize the photographs before"
        )
    if not given:
        raise Refused(
            "no data: give --data.root FOLDER (clean faces), --data.source A --data.target B (pairs), --data.records FOLDER "
            "(made by `autoretouch data prepare`) or --data.tfds FOLDER"
        )


def _validate_validation(config: Config) -> None:
    data = config.data.validation
    given = [form for form in DATA_FORMS if any(getattr(data, key, None) for key in form)]
    if len(given) > 1 or bool(data.source) != bool(data.target):
        raise Refused(
            "--data.validation: give clean faces (--data.validation.root), pairs (--data.validation.source and "
            "--data.validation.target), records or tfds, one of them and in full"
        )
    if given and data.metric == "alone_identical" and not data.alone:
        raise Refused("--data.validation.metric alone_identical needs photographs: --data.validation.alone FOLDER")
    if data.alone and not given and data.metric != "alone_identical":
        raise Refused(
            "--data.validation.alone by itself measures harm only: add --data.validation.metric alone_identical, or pairs"
        )
    if data.patience and not (given or data.alone):
        raise Refused("--data.validation.patience: there is nothing to validate on; give --data.validation.source and .target")
    # Else a run would be praised for what it has learned by heart.
    for form in given:
        key = form[0]
        if getattr(data, key) == getattr(config.data, key) and key != "tfds":
            raise Refused(
                f"--data.validation.{key} and --data.{key} are the same folder; validate on images that are not trained on"
            )


def _validate_losses(config: Config) -> None:
    loss = config.loss
    # The mask loss alone does not train the edit, so it does not count here.
    if loss.pixel_weight + loss.adversarial_weight + loss.perceptual_weight == 0:
        raise Refused(
            "--loss.pixel-weight, --loss.adversarial-weight and --loss.perceptual-weight are all 0: "
            "nothing would be learned; give at least one a positive weight"
        )
    if loss.perceptual_weight > 0 and not loss.perceptual_layers:
        raise Refused(
            "--loss.perceptual-layers is empty: name at least one VGG layer, such as relu2_2, or set --loss.perceptual-weight 0"
        )
    if loss.perceptual_layer_weights and len(loss.perceptual_layer_weights) != len(loss.perceptual_layers):
        raise Refused(
            f"--loss.perceptual-layer-weights has {len(loss.perceptual_layer_weights)} numbers for "
            f"{len(loss.perceptual_layers)} --loss.perceptual-layers; give one for each, or none"
        )
    # Feature matching needs a discriminator that is trained and that returns its features.
    if loss.feature_matching_weight > 0 and (not config.discriminator.returns_features or loss.adversarial_weight == 0):
        raise Refused(
            "--loss.feature-matching-weight compares a PatchGAN's features: choose a config whose discriminator is a PatchGAN, "
            "and an adversarial weight above 0"
        )
    if loss.mask_weight > 0 and not config.generator.predicts_mask:
        name = config.generator.network
        raise Refused(f"--loss.mask-weight {loss.mask_weight}: network {name} predicts no mask; set it to 0")
    if loss.left_share > 0 and loss.mask_weight == 0:
        raise Refused(
            f"--loss.left-share {loss.left_share}: the mask tells which blemishes were left. Take a network that predicts one, "
            "such as retouch, and --loss.mask-weight above 0, or set it to 0"
        )
    if loss.r1_weight > 0 and loss.adversarial_weight == 0:
        raise Refused(
            f"--loss.r1-weight {loss.r1_weight}: without adversarial loss there is no discriminator; set it to 0, or give "
            "--loss.adversarial-weight"
        )
