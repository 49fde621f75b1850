"""The run that a work directory holds, in `config.json`, and the keys that may differ from it when the run goes on."""

import dataclasses
import json
from typing import Any

from autoretouch_jax.config.schema import Config
from autoretouch_jax.errors import Refused

# Keys that may change on resume. `train.steps` changes the decay of the learning rate, and how long a global generator is
# frozen; `ParallelConfig` says what its keys change.
MAY_CHANGE_ON_RESUME = (
    "train.steps",
    "train.checkpoint_every",
    "train.log_every",
    "train.sample_every",
    "parallel.",
    "data.on_bad",
)


def to_json(config: Config) -> str:
    """The config as indented JSON, with every value."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def refuse_other_run(config: Config, stored: Any) -> None:
    """Refuses when the config.json at the path `stored` differs from `config` in a key that may not change on resume."""
    try:
        before = _flatten_dict(json.loads(stored.read_text()))
    except ValueError as error:
        raise Refused(f"{stored} is not readable JSON ({error}); choose another --workdir") from error
    # Through JSON, so that tuples and lists compare equal.
    now = _flatten_dict(json.loads(to_json(config)))
    changed = [
        f"{key} ({before.get(key, 'absent')} there, {now.get(key, 'absent')} here)"
        for key in sorted(before.keys() | now.keys())
        # A key that is absent on one side differs from one whose value is null.
        if before.get(key, dataclasses.MISSING) != now.get(key, dataclasses.MISSING)
        and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]
    if changed:
        raise Refused(
            f"--workdir {stored.parent} holds a run of another config: {', '.join(changed)}; "
            "choose another --workdir, or give the values it was started with"
        )


def _flatten_dict(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
