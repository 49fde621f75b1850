"""AutoRetouch in JAX: train a face retoucher on before/after pairs, measure it honestly, run it on photographs.

Importing this package touches no device and downloads nothing. The public API is small:

* `Retoucher.load()` returns a retoucher with the model in the box; `retoucher(image)` retouches an array, a Pillow image or a
  file; `.batch(images)` and `.stream(images)` retouch many.
* `load_model(folder)` returns a trained generator from a run or a `model/` folder.
* `retouch_array(model, image)` takes and returns one `uint8[H, W, 3]` image.
* `load_config(path)` returns the `Config` of a file under `configs/`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # type checkers do not run `__getattr__`
    from autoretouch_jax.config.loading import load as load_config
    from autoretouch_jax.inference.edit import retouch_array
    from autoretouch_jax.inference.retoucher import Retoucher
    from autoretouch_jax.models.folder import load_model

__version__ = "0.1.0"
__all__ = ["Retoucher", "load_config", "load_model", "retouch_array"]

_DEFINED_IN = {
    "Retoucher": ("autoretouch_jax.inference.retoucher", "Retoucher"),
    "load_config": ("autoretouch_jax.config.loading", "load"),
    "load_model": ("autoretouch_jax.models.folder", "load_model"),
    "retouch_array": ("autoretouch_jax.inference.edit", "retouch_array"),
}


def __getattr__(name: str):  # PEP 562: JAX takes seconds to import, so a name is imported when it is first used
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    import importlib

    module, attribute = _DEFINED_IN[name]
    return getattr(importlib.import_module(module), attribute)
