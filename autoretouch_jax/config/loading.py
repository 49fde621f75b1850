"""Makes a `Config` from a config file and the command line."""

import dataclasses
import re
import runpy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from autoretouch_jax.config.paths import PRETRAINED, absolute
from autoretouch_jax.config.schema import DATA_FORMS, Config
from autoretouch_jax.errors import Refused, did_you_mean

PACKAGE = Path(__file__).resolve().parent.parent
# A checkout has the shipped configs beside the package, an installed wheel inside it.
SHIPPED_CONFIGS = (PACKAGE.parent / "configs", PACKAGE / "configs")
# Keys whose values are paths of files and folders.
PATH_KEYS = (
    *(f"{group}.{key}" for group in ("data", "data.validation") for form in DATA_FORMS for key in form),
    "data.validation.alone",
    "data.audit",
    "data.negatives",
    "train.start_from",
    "loss.vgg_weights",
)
# Values of these keys that are no paths. The model in the box is known by its name, wherever the package is installed.
WORDS = (PRETRAINED, "download", "random")


def config_argument(argv: Sequence[str], switches: Collection[str] = ()) -> str | None:
    """Returns the CONFIG among a verb's arguments: the first `.py` file that is not a flag's value, or None.

    It is needed before the arguments are parsed, because the config decides which flags there are. `switches` are the flags
    that take no value. Example: `--space lr.py CONFIG.py` names CONFIG.py.
    """
    before = ""
    for argument in argv:
        is_value = before.startswith("--") and "=" not in before and before not in switches
        if argument.endswith(".py") and not argument.startswith("-") and not is_value:
            return argument
        before = argument
    return None


def find(path: str | Path) -> Path:
    """Returns the config file: as given, or, for `NAME.py` and `configs/NAME.py`, the one that comes with the package.

    Any other path is taken literally: a mistyped `experiments/retouch.py` must not train the shipped `retouch.py`.
    """
    # A file that exists takes precedence over a shipped config of the same name.
    path = Path(path)
    if path.is_file():
        return path
    if path.parent in (Path("."), Path("configs")):
        for folder in SHIPPED_CONFIGS:
            if (folder / path.name).is_file():
                return folder / path.name
    shipped = sorted({file.name for folder in SHIPPED_CONFIGS for file in folder.glob("*.py")})
    hint = did_you_mean(path.name, shipped)
    raise Refused(f"config {path}: no such file; the configs that come with the package are {', '.join(shipped)}{hint}")


def load(path: str | Path) -> Config:
    """Runs the config file and returns its `config`. Raises Refused, naming the file, when it fails or defines no `Config`."""
    path = find(path)
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        # A misspelt field raises a TypeError inside the file, whose message names only the constructor.
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        hint = did_you_mean(unknown[1], [part for key in flatten(Config()) for part in key.split(".")]) if unknown else ""
        raise Refused(f"config {path}: {type(error).__name__}: {error}{hint}") from error
    if not isinstance(config, Config):
        raise Refused(f"config {path}: must define `config = Config(...)` from autoretouch_jax.config")
    return config


def choose_data(config: Config, argv: Sequence[str]) -> Config:
    """Drops the config's form of data where the command line names another one, so that only the latter remains."""
    # Whoever gives --data.records to a config with a `root` wants the records, not a refusal.
    named = {argument.split("=")[0].removeprefix("--data.") for argument in argv if argument.startswith("--data.")}
    chosen = [form for form in DATA_FORMS if named & set(form)]
    if not chosen:
        return config
    return with_values(config, {f"data.{key}": None for form in DATA_FORMS if form not in chosen for key in form})


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns `{"group.name": value}` for every leaf of a config; tuples become lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        # `data.blemish` is a group inside a group.
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = list(value) if isinstance(value, tuple) else value
    return flat


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Returns the config with some of its keys, `group.name`, set to other values."""
    for key, value in values.items():
        *groups, name = key.split(".")
        config = _with_value(config, groups, name, value)
    return config


def _with_value(config: Any, groups: list[str], name: str, value: Any) -> Any:
    if groups:
        name, value = groups[0], _with_value(getattr(config, groups[0]), groups[1:], name, value)
    return dataclasses.replace(config, **{name: value})


def resolve(config: Config) -> Config:
    """Makes every path absolute, so that the same run can be resumed from any folder."""
    # Object storage has no working directory; `absolute` leaves its paths alone.
    flat = flatten(config)
    # Validation has no key for a form of data of your own, unless you add one.
    given = {key: flat[key] for key in PATH_KEYS if flat.get(key) and flat[key] not in WORDS}
    return with_values(config, {key: absolute(path) for key, path in given.items()})
