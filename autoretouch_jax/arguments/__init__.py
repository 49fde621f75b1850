"""The arguments of each verb of the command line.

The docstrings are its `--help`. The first line is the verb's line in `autoretouch --help`, and the whole docstring begins the
verb's own help.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from autoretouch_jax.arguments import data, photographs, training
from autoretouch_jax.config import Config

# In the order in which `autoretouch --help` lists them: first what a newcomer needs.
ARGUMENTS: dict[str, Any] = {
    "demo": training.DemoArguments,
    "train": training.TrainArguments,
    "plan": training.PlanArguments,
    "sweep": training.SweepArguments,
    "doctor": training.DoctorArguments,
    "evaluate": photographs.EvaluateArguments,
    "compare": training.CompareArguments,
    "retouch": photographs.RetouchArguments,
    "export": photographs.ExportArguments,
    "serve": photographs.ServeArguments,
    "models": photographs.ModelsArguments,
    "average": photographs.AverageArguments,
    "convert": photographs.ConvertArguments,
    "data prepare": data.PrepareArguments,
    "data audit": data.AuditArguments,
    "data build": data.BuildArguments,
    "data verify": data.VerifyArguments,
    "bench step": training.BenchStepArguments,
    "bench infer": training.BenchInferArguments,
    "bench e2e": training.BenchE2eArguments,
    "bench data": data.BenchDataArguments,
}


def switches(verb: str) -> list[str]:
    """Returns the flags of a verb that take no value."""
    fields = dataclasses.fields(ARGUMENTS[verb])
    return [f"--{field.name}" for field in fields if field.type == FlagCreatePairsOff[bool]]


def with_defaults(verb: str, config: Config) -> Any:
    """Returns a verb's arguments with a config's values as defaults. What the user must give is marked as missing."""
    required = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(ARGUMENTS[verb])
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    # CONFIG is looked for beforehand; a placeholder lets `--help` and refusals of other flags work without it.
    return ARGUMENTS[verb](**required | {"config": Path("CONFIG.py"), "run": config})
