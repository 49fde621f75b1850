"""The run that a work directory holds, in `config.json`, and the keys that may differ from it when the run goes on."""

import dataclasses
import json
from typing import Any

from autoretouch_jax.config.loading import PATH_KEYS, WORDS, with_values
from autoretouch_jax.config.schema import PRECISIONS, Config
from autoretouch_jax.errors import Refused

# Keys that may change on resume. `train.steps` changes the decay of the learning rate, and how long a global generator is
# frozen; `ParallelConfig` says what its keys change.
MAY_CHANGE_ON_RESUME = (
    "train.steps",
    "train.precision",
    "train.checkpoint_every",
    "train.log_every",
    "train.sample_every",
    "train.trackers",
    "parallel.",
    "data.on_bad",
    "data.on_change",
    "data.validation.",
    "optim.generator_lr",
    "optim.discriminator_lr",
    "optim.clip_norm",
    "guard.",
)


def to_json(config: Config) -> str:
    """The config as indented JSON, with every value."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def stored_values(stored: Any) -> dict[str, Any]:
    """Returns `{"group.name": value}` of the config.json at the path `stored`. Raises Refused when it cannot be read."""
    try:
        return _flatten_dict(json.loads(stored.read_text()))
    except ValueError as error:
        raise Refused(f"{stored} is not readable JSON ({error}); choose another --workdir") from error


def in_its_precision(config: Config, stored: Any) -> Config:
    """Fills in `train.precision` where it is `auto`, from the config.json at the path `stored`.

    So a run that goes on on other devices computes as before. Raises Refused where the file has an unknown one.
    """
    if config.train.precision != "auto":
        return config
    before = stored_values(stored).get("train.precision", "auto")
    if before not in PRECISIONS:
        raise Refused(f"{stored}: train.precision {before} is unknown; give --train.precision float32 or bfloat16")
    return with_values(config, {"train.precision": before})


def refuse_other_run(config: Config, stored: Any) -> list[str]:
    """Refuses when the config.json at the path `stored` differs from `config` in a key that may not change on resume.

    A key that the file lacks, because an earlier version wrote it, counts as that key's default. Returns the keys whose path
    has changed: files may move, and the caller checks that they are still the same.
    """
    # Through JSON, so that tuples and lists compare equal.
    before, now = stored_values(stored), _flatten_dict(json.loads(to_json(config)))
    defaults = _flatten_dict(json.loads(to_json(_with_defaults(config))))
    before = {key: value for key, value in defaults.items() if key in now} | before
    different = [
        key
        for key in sorted(before.keys() | now.keys())
        # A key that is absent on one side differs from one whose value is null.
        if before.get(key, dataclasses.MISSING) != now.get(key, dataclasses.MISSING)
        and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]
    # A path that is given on one side only is other data, or none. So is a word such as `download` against a file.
    moved = [key for key in different if key in PATH_KEYS and _is_path(before.get(key)) and _is_path(now.get(key))]
    if changed := [key for key in different if key not in moved]:
        described = [f"{key} ({before.get(key, 'absent')} there, {now.get(key, 'absent')} here)" for key in changed]
        raise Refused(
            f"--workdir {stored.parent} holds a run of another config: {', '.join(described)}; "
            "choose another --workdir, or give the values it was started with"
        )
    return moved


def _is_path(value: Any) -> bool:
    return bool(value) and value not in WORDS


def _with_defaults(config: Config) -> Config:
    """A config of the same networks in which every value is the default."""
    return Config(generator=type(config.generator)(), discriminator=type(config.discriminator)())


def _flatten_dict(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
