"""AutoRetouch in JAX: train a face retoucher on before/after pairs, measure it honestly, run it on photographs.

Importing this package touches no device and downloads nothing. The public API is small:

* `load_model(folder)`: a trained generator from a run or a `model/` folder.
* `retouch_array(model, image)`: one `uint8[H, W, 3]` image in, one out.
* `load_config(path, argv)`: a config file under `configs/` plus command-line overrides.
"""

__version__ = "0.1.0"
__all__ = ["load_config", "load_model", "retouch_array"]

_HOME = {
    "load_config": ("autoretouch_jax.config", "load"),
    "load_model": ("autoretouch_jax.models.bundle", "load_model"),
    "retouch_array": ("autoretouch_jax.models.bundle", "retouch_array"),
}


def __getattr__(name: str):  # PEP 562: the heavy imports happen when a name is first used
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    import importlib

    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
