"""Time per megapixel of an exported ONNX file in onnxruntime, beside JAX and, where it is installed, PyTorch.

    python benchmarks/export_speed.py --side 512 --rounds 5

The networks are the model in the box and the full-size AutoRetouch with random weights and statistics. All take and return
uint8 `[1, side, side, 3]`, with gate and the step to levels inside. They take turns. The medians are printed, with the largest
difference of their outputs to JAX'. Where other programs run, the processor's time on one core says more than the clock:
`taskset -c 0 python benchmarks/export_speed.py`.
"""

import argparse
import os
import statistics
import time

import jax
import numpy as np
import onnxruntime

from autoretouch_jax.config import networks
from autoretouch_jax.demo import faces
from autoretouch_jax.inference.export.export import whole_gate
from autoretouch_jax.inference.export.onnx_model import onnx_model
from autoretouch_jax.inference.export.stablehlo import retouching
from autoretouch_jax.models.folder import Model, load_model
from autoretouch_jax.models.modules import make_generator
from autoretouch_jax.runtime.cores import cores
from autoretouch_jax.runtime.tables import text_table

try:
    import torch
    import torch.nn.functional as F
except ModuleNotFoundError:
    torch = None

CORES = cores()


def random_autoretouch() -> Model:
    """The published network, full size, with random weights and BatchNorm statistics."""
    config = networks.AutoRetouch()
    shapes = jax.eval_shape(make_generator(config).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)

    def values(path, leaf):
        if path[-1].key in ("var", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:3]) if leaf.ndim == 4 else 100
        # The blocks add up. A smaller head keeps tanh from saturating, where all outputs would agree.
        fan_in *= 1000 if path[-2].key == "head" else 1
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)

    return Model(config, jax.tree_util.tree_map_with_path(values, shapes))


# ---- the same networks in PyTorch -------------------------------------------------------------------------------------------


class TorchLayers:
    """A network's weights as PyTorch tensors, and the layers that the two networks need."""

    def __init__(self, variables, memory_format) -> None:
        self.variables, self.memory_format = variables, memory_format
        self.cache = {}

    def get(self, *path, axes=None, order=None):
        """The array at this path as a tensor, in PyTorch's axes, with its channels in another order."""
        if (path, axes) not in self.cache:
            array = self.variables
            for name in path:
                array = array[name]
            array = np.asarray(array) if axes is None else np.asarray(array).transpose(axes)
            array = array if order is None else order(array)
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            self.cache[path, axes] = tensor.contiguous(memory_format=self.memory_format) if axes else tensor
        return self.cache[path, axes]

    def conv(self, x, *path, stride=1, padding=None, order=None, bias_order=None):
        kernel = self.get("params", *path, "kernel", axes=(3, 2, 0, 1), order=order)
        padding = kernel.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, kernel, self.get("params", *path, "bias", order=bias_order), stride, padding)

    def norm(self, x, *path):
        statistics = [self.get("batch_stats", *path, name) for name in ("mean", "var")]
        learned = [self.get("params", *path, name) for name in ("scale", "bias")]
        return F.batch_norm(x, *statistics, *learned, eps=1e-3)


def leaky(x):
    return F.leaky_relu(x, 0.2)


def torch_autoretouch(layers, config, source):
    stem = leaky(layers.conv(source, "stem"))
    x = layers.conv(F.pad(stem, (0, 1, 0, 1)), "down", stride=2, padding=0)
    for i in range(config.blocks):
        y = x
        for n in (0, 1):
            y = leaky(layers.norm(layers.conv(y, f"block{i}", f"Conv_{n}"), f"block{i}", f"BatchNorm_{n}"))
        x = x + y
    x = leaky(F.interpolate(layers.conv(x, "up"), scale_factor=2, mode="nearest")) + stem
    return torch.tanh(layers.conv(x, "head")), None


def torch_retouch(layers, config, source):
    def blocks(x, name):
        for i in range(config.blocks):
            y = layers.conv(leaky(x), f"{name}_block{i}", "first")
            x = x + layers.conv(leaky(y), f"{name}_block{i}", "second")
        return x

    def channels_first(kernel):  # our folded channels are pixel by pixel, PyTorch's channel by channel
        return kernel.reshape(kernel.shape[0], 4, 3, 3, 3).swapaxes(1, 2).reshape(kernel.shape)

    def outputs_first(array):
        return array.reshape(4, 3, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    x, skips = blocks(layers.conv(F.pixel_unshuffle(source, 2), "stem", order=channels_first), "down0"), []
    for level in range(1, config.levels):
        skips.append(x)
        x = blocks(layers.conv(x, f"down{level}", stride=2, padding=0), f"down{level}")
    for level in reversed(range(config.levels - 1)):
        up = F.interpolate(layers.conv(x, f"up{level}"), scale_factor=2, mode="nearest")
        x = blocks(up + skips[level], f"up{level}")
    x = leaky(x)
    edit = F.pixel_shuffle(layers.conv(x, "edit", order=outputs_first, bias_order=outputs_first), 2)
    return source + edit, torch.sigmoid(F.pixel_shuffle(layers.conv(x, "mask"), 2))


def torch_runner(model, gate, memory_format):
    network = {"autoretouch": torch_autoretouch, "retouch": torch_retouch}[model.config.network]
    layers = TorchLayers(model.variables, memory_format)

    def run(images):
        with torch.inference_mode():
            image = torch.from_numpy(images)
            source = (image.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=memory_format)
            output, mask = network(layers, model.config, source)
            retouched = ((output.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
            if mask is not None:
                retouched = torch.where((mask >= gate).permute(0, 2, 3, 1), retouched, image)
            return retouched.numpy()

    return run


# ---- the comparison ---------------------------------------------------------------------------------------------------------


def runners(model):
    """Returns `{name: function}`: uint8 `[1, H, W, 3]` → the same, retouched."""
    gate = whole_gate(model)
    content = onnx_model(model, gate, {}, np.float32).SerializeToString()
    options = onnxruntime.SessionOptions()
    # Threads that wait by spinning would slow down the others, which run in between.
    options.intra_op_num_threads = CORES
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    jitted = jax.jit(retouching(model, gate, np.float32))
    found = {
        f"JAX {jax.__version__}": lambda images: np.asarray(jitted(images)["retouched"]),
        f"onnxruntime {onnxruntime.__version__}": lambda images: session.run(["retouched"], {"image": images})[0],
    }
    if torch is not None:
        found[f"PyTorch {torch.__version__}"] = torch_runner(model, gate, torch.contiguous_format)
        found[f"PyTorch {torch.__version__}, channels last"] = torch_runner(model, gate, torch.channels_last)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    images = np.array(faces.draw_face(0, side=arguments.side))[None]
    megapixels = arguments.side**2 / 1e6
    print(f"{CORES} core(s), load before {os.getloadavg()[0]:.2f}")
    rows = []
    for name, model in {"the box": load_model("pretrained"), "AutoRetouch, full size": random_autoretouch()}.items():
        found = runners(model)
        outputs = {what: run(images) for what, run in found.items()}  # the first call compiles
        times = {what: [] for what in found}
        for _ in range(arguments.rounds):
            for what, run in found.items():
                start = time.perf_counter(), time.process_time()
                run(images)
                times[what].append(
                    ((time.perf_counter() - start[0]) / megapixels, (time.process_time() - start[1]) / megapixels)
                )
        expected = next(iter(outputs.values())).astype(int)
        for what, values in times.items():
            apart = np.abs(outputs[what] - expected).max()
            clock, processor = zip(*values, strict=True)
            figures = [f"{figure(clock):.2f}" for figure in (statistics.median, min, max)]
            figures.append(f"{statistics.median(processor):.2f}")
            rows.append([name, what, *figures, str(apart)])
    header = ["network", "software", "s per megapixel", "least", "most", "processor s", "levels from JAX"]
    print(text_table(header, rows, left=(0, 1)))
    print(f"{images.shape[1]}², {arguments.rounds} rounds, load after {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
