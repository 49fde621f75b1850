"""Makes published_steps.npz, twenty training steps of each published recipe, run by PyTorch in float64; and trained_unet.npz, a
U-Net-256 that PyTorch trained for fifty steps in float32, with its outputs in both test modes.

It follows the authors' code of pix2pix (junyanz/pytorch-CycleGAN-and-pix2pix) and pix2pixHD (NVIDIA/pix2pixHD): networks,
losses, their weights, the order of the updates, and Adam. It shares nothing with the package. Weights and batches are drawn
from a seed, and the test draws the same ones. To run it: pip install torch; python tests/golden/published_steps.py
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

try:
    import torch
    import torch.nn.functional as f
    from pytorch_float32 import block, conv, global_features, multi_scale, up3
except ImportError:
    torch = f = None  # the test only draws the weights and the batches

STEPS, LEARNING_RATE = 20, 2e-4
FROZEN = 20  # steps that the local enhancer makes with its global generator frozen; then it makes 20 more
SIDES = {"pix2pix": 64, "global": 32, "local": 32}
UNET_LEVELS, UNET_WIDTH = 6, 2  # of six levels the second innermost has dropout, and with one image BatchNorm sees four values
TRAINED_STEPS, TRAINED_LEVELS, TRAINED_SIDE = 50, 8, 256
# VGG19 to relu5_1, an eighth as wide: XLA has no fast convolution in float64.
VGG_WIDTHS = ((8, 8), (16, 16), (32, 32, 32, 32), (64, 64, 64, 64), (64,))
VGG_LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


# ---- what the test draws too -------------------------------------------------------------------------------------------------


def batch(recipe, step):
    """`(source, target)`, uint8 `[1, 3, side, side]`."""
    return noise(step, SIDES[recipe]), noise(1000 + step, SIDES[recipe])


def noise(number, side):
    """A random image, uint8 `[1, 3, side, side]`."""
    return np.random.default_rng([1, number]).integers(0, 256, (1, 3, side, side), dtype=np.uint8)


def scene(number):
    """A smooth image of its own brightness and contrast, uint8 `[1, 3, side, side]`, so that each has other statistics."""
    rng = np.random.default_rng([5, number])
    coarse = rng.uniform(0.3, 0.7) + rng.uniform(0.1, 1.5) * rng.normal(0, 0.3, (1, 3, 16, 16))
    fine = np.kron(coarse, np.ones((TRAINED_SIDE // 16, TRAINED_SIDE // 16)))
    return np.clip(255 * fine, 0, 255).astype(np.uint8)


def kept_units(shape):
    """The units that dropout keeps, the same at every step: a boolean array of the network's own layout."""
    return np.random.default_rng(2).random(shape) < 0.5


def vgg_weights():
    """`{"conv1_1.weight": [out, in, 3, 3], "conv1_1.bias": …}`, scaled so that activations neither grow nor vanish."""
    rng, before, arrays = np.random.default_rng(3), 3, {}
    for i, widths in enumerate(VGG_WIDTHS, 1):
        for j, width in enumerate(widths, 1):
            arrays[f"conv{i}_{j}.weight"] = rng.normal(0, (2 / (9 * before)) ** 0.5, (width, before, 3, 3))
            arrays[f"conv{i}_{j}.bias"] = rng.normal(0, 0.05, width)
            before = width
    return arrays


def weights(recipe):
    """`(generator, discriminator)`: the initial arrays of a recipe in the authors' names."""
    rng = np.random.default_rng(0)

    def draw(shapes):
        arrays = {}
        for name, shape in shapes.items():
            if len(shape) == 4:
                arrays[name] = rng.normal(0, 0.05, shape)
            elif name.endswith(".running_var"):
                arrays[name] = np.ones(shape)
            elif name.endswith(".weight"):  # a norm's scale
                arrays[name] = rng.normal(1, 0.02, shape)
            else:
                arrays[name] = np.zeros(shape) if name.endswith(".running_mean") else rng.uniform(-0.1, 0.1, shape)
        return arrays

    generators = {"pix2pix": lambda: unet_shapes(UNET_LEVELS), "global": lambda: global_shapes(2, True), "local": local_shapes}
    discriminators = {"pix2pix": patchgan_shapes, "global": lambda: scales_shapes(2), "local": lambda: scales_shapes(3)}
    return draw(generators[recipe]()), draw(discriminators[recipe]())


def unet_shapes(levels):
    widths, shapes, at = [UNET_WIDTH * min(8, 2**i) for i in range(levels)], {}, "model"
    shapes["model.0.weight"] = (widths[0], 3, 4, 4)
    for level in range(1, levels):
        innermost = level == levels - 1
        at = f"{at}.1.model" if level == 1 else f"{at}.3.model"
        shapes[f"{at}.1.weight"] = (widths[level], widths[level - 1], 4, 4)
        shapes |= {} if innermost else norm_shapes(f"{at}.2", widths[level])
        up = 3 if innermost else 5
        # A transposed convolution's kernel is [in, out, h, w]. All but the innermost take the skip as well.
        shapes[f"{at}.{up}.weight"] = (widths[level] * (1 if innermost else 2), widths[level - 1], 4, 4)
        shapes |= norm_shapes(f"{at}.{up + 1}", widths[level - 1])
    return shapes | {"model.3.weight": (2 * widths[0], 3, 4, 4), "model.3.bias": (3,)}


def patchgan_shapes():
    shapes, before = {"model.0.weight": (2, 6, 4, 4), "model.0.bias": (2,)}, 2
    for index in (2, 5, 8):
        shapes[f"model.{index}.weight"] = (2 * before, before, 4, 4)
        shapes |= norm_shapes(f"model.{index + 1}", 2 * before)
        before *= 2
    return shapes | {"model.11.weight": (1, before, 4, 4), "model.11.bias": (1,)}


def norm_shapes(name, width):
    return {f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")}


def conv_shapes(name, out, before, size):
    return {f"{name}.weight": (out, before, size, size), f"{name}.bias": (out,)}


def block_shapes(name, width):
    return conv_shapes(f"{name}.conv_block.1", width, width, 3) | conv_shapes(f"{name}.conv_block.5", width, width, 3)


def global_shapes(width, has_head):
    """Three downsamplings and two blocks."""
    shapes, index = conv_shapes("model.1", width, 3, 7), 4
    for i in range(3):
        shapes |= conv_shapes(f"model.{index}", width * 2 ** (i + 1), width * 2**i, 3)
        index += 3
    for _ in range(2):
        shapes |= block_shapes(f"model.{index}", 8 * width)
        index += 1
    for i in (2, 1, 0):
        shapes[f"model.{index}.weight"] = (width * 2 ** (i + 1), width * 2**i, 3, 3)
        shapes[f"model.{index}.bias"] = (width * 2**i,)
        index += 3
    return shapes | (conv_shapes(f"model.{index + 1}", 3, width, 7) if has_head else {})


def local_shapes():
    """An enhancer of width 1 with two blocks, around a global generator of width 2."""
    shapes = global_shapes(2, False) | conv_shapes("model1_1.1", 1, 3, 7) | conv_shapes("model1_1.4", 2, 1, 3)
    shapes |= block_shapes("model1_2.0", 2) | block_shapes("model1_2.1", 2)
    shapes |= {"model1_2.2.weight": (2, 1, 3, 3), "model1_2.2.bias": (1,)}
    return shapes | conv_shapes("model1_2.6", 3, 1, 7)


def scales_shapes(count):
    shapes = {}
    for scale in range(count):
        for layer, (before, out) in enumerate(((6, 2), (2, 4), (4, 8), (8, 16), (16, 1))):
            shapes |= conv_shapes(f"scale{scale}_layer{layer}.0", out, before, 4)
    return shapes


# ---- networks ----------------------------------------------------------------------------------------------------------------


def batch_norm(w, name, x, training=True):
    """In training it moves the running statistics too."""
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    return f.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"], training=training)


def pix2pix_generator(w, x, levels=UNET_LEVELS, training=True):
    def level(x, number, at):
        x = f.leaky_relu(x, 0.2)
        down = conv(w, f"{at}.1", x, 2, 1)
        innermost = number == levels - 1
        inner = down if innermost else level(batch_norm(w, f"{at}.2", down, training), number + 1, f"{at}.3.model")
        up = 3 if innermost else 5
        y = f.conv_transpose2d(f.relu(inner), w[f"{at}.{up}.weight"], None, 2, 1)
        y = batch_norm(w, f"{at}.{up + 1}", y, training)
        if training and 4 <= number < levels - 1:
            kept = kept_units((y.shape[0], *y.shape[2:], y.shape[1])).transpose(0, 3, 1, 2)
            y = 2 * y * torch.from_numpy(kept)
        return torch.cat([x, y], 1)

    x = level(conv(w, "model.0", x, 2, 1), 1, "model.1.model")
    return torch.tanh(f.conv_transpose2d(f.relu(x), w["model.3.weight"], w["model.3.bias"], 2, 1))


def pix2pix_discriminator(w, x):
    x = f.leaky_relu(conv(w, "model.0", x, 2, 1), 0.2)
    for index, stride in ((2, 2), (5, 2), (8, 1)):
        x = f.leaky_relu(batch_norm(w, f"model.{index + 1}", conv(w, f"model.{index}", x, stride, 1)), 0.2)
    return conv(w, "model.11", x, 1, 1)


def head(w, name, x):
    return torch.tanh(conv(w, name, f.pad(x, (3,) * 4, mode="reflect")))


def hd_global(w, x):
    return head(w, "model.25", global_features(w, x, 3, 2))


def hd_local(w, x):
    half = global_features(w, f.avg_pool2d(x, 3, 2, 1, count_include_pad=False), 3, 2)
    x = f.relu(f.instance_norm(conv(w, "model1_1.1", f.pad(x, (3,) * 4, mode="reflect"))))
    x = f.relu(f.instance_norm(conv(w, "model1_1.4", x, 2, 1))) + half
    x = block(w, "model1_2.1", block(w, "model1_2.0", x))
    return head(w, "model1_2.6", up3(w, "model1_2.2", x))


def hd_discriminator(w, x, count):
    """Scales from the finest, each a list of features with the logits last."""
    if count == 3:
        return list(multi_scale(w, x))
    # `multi_scale` reads three scales, of which the coarsest is number 0.
    shifted = {f"scale{int(name[5]) + 1}{name[6:]}": value for name, value in w.items()}
    coarsest = {name.replace("scale1", "scale0", 1): value for name, value in shifted.items() if name.startswith("scale1")}
    return list(multi_scale(shifted | coarsest, x))[:2]


def vgg_features(w, x):
    features = []
    for i, widths in enumerate(VGG_WIDTHS, 1):
        x = f.max_pool2d(x, 2) if i > 1 else x
        for j in range(1, len(widths) + 1):
            x = f.relu(f.conv2d(x, w[f"conv{i}_{j}.weight"], w[f"conv{i}_{j}.bias"], padding=1))
            if j == 1:
                features.append(x)
    return features


# ---- steps -------------------------------------------------------------------------------------------------------------------


def trainable(w, start=""):
    return [value for name, value in w.items() if "running" not in name and name.startswith(start)]


def tensors(arrays):
    w = {name: torch.from_numpy(value).clone() for name, value in arrays.items()}
    for value in trainable(w):
        value.requires_grad_(True)
    return w


def images(recipe, step):
    return (torch.from_numpy(image).double() / 127.5 - 1 for image in batch(recipe, step))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.5, 0.999))


def pix2pix():
    """The discriminator first. The generator then learns through the updated one."""
    g, d = map(tensors, weights("pix2pix"))
    optimizer_g, optimizer_d = adam(trainable(g)), adam(trainable(d))

    def loss(logits, real):
        return f.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    for step in range(STEPS):
        source, target = images("pix2pix", step)
        fake = pix2pix_generator(g, source)
        optimizer_d.zero_grad()
        on_fake = loss(pix2pix_discriminator(d, torch.cat([source, fake.detach()], 1)), False)
        on_real = loss(pix2pix_discriminator(d, torch.cat([source, target], 1)), True)
        ((on_fake + on_real) * 0.5).backward()
        optimizer_d.step()
        optimizer_g.zero_grad()
        adversarial = loss(pix2pix_discriminator(d, torch.cat([source, fake], 1)), True)
        (adversarial + 100 * f.l1_loss(fake, target)).backward()
        optimizer_g.step()
    yield "pix2pix", g, d


def trained_unet():
    """A U-Net-256 after fifty steps with an L1 loss: its state dict, and its outputs for one image in both test modes."""
    rng = np.random.default_rng(4)
    arrays = {name: rng.normal(0, 0.2, shape) for name, shape in unet_shapes(TRAINED_LEVELS).items()}
    for name, value in arrays.items():
        if name.endswith(".running_var"):
            value[...] = 1
        elif name.endswith((".5.weight", "model.3.weight")):
            # What comes from below weighs more than the skip, so that dropout and statistics of few values show in the output.
            value[len(value) // 2 :] *= 4
            value[: len(value) // 2] *= 0.5
    g = tensors({name: value.astype(np.float32) for name, value in arrays.items()})
    optimizer = adam(trainable(g))
    for step in range(TRAINED_STEPS):
        source, target = (torch.from_numpy(scene(n)).float() / 127.5 - 1 for n in (step, 1000 + step))
        optimizer.zero_grad()
        f.l1_loss(pix2pix_generator(g, source, TRAINED_LEVELS), target).backward()
        optimizer.step()
    state = {f"state|{name}": value.detach().numpy().copy() for name, value in g.items()}
    outputs = {}
    with torch.no_grad():
        for mode in ("eval", "train"):
            x = torch.from_numpy(scene(2000)).float() / 127.5 - 1
            y = pix2pix_generator(g, x, TRAINED_LEVELS, training=mode == "train")
            outputs[mode] = np.rint((y.numpy() + 1) * 127.5).astype(np.uint8)
    return state | outputs


def pix2pixhd(recipe, generator, scales, stages):
    """One pass through the discriminator; both losses come from it. The generator is updated first."""
    g, d = map(tensors, weights(recipe))
    vgg = {name: torch.from_numpy(value) for name, value in vgg_weights().items()}
    optimizer_d, step = adam(trainable(d)), 0
    for name, start in stages:
        optimizer_g = adam(trainable(g, start))  # each stage makes a new one
        for _ in range(STEPS):
            source, target = images(recipe, step)
            fake = generator(g, source)
            pool = hd_discriminator(d, torch.cat([source, fake.detach()], 1), scales)
            real = hd_discriminator(d, torch.cat([source, target], 1), scales)
            fake_scales = hd_discriminator(d, torch.cat([source, fake], 1), scales)
            loss_d = 0.5 * sum((a[-1] ** 2).mean() + ((b[-1] - 1) ** 2).mean() for a, b in zip(pool, real, strict=True))
            loss_g = sum(((scale[-1] - 1) ** 2).mean() for scale in fake_scales)
            for a, b in zip(fake_scales, real, strict=True):
                loss_g = loss_g + sum(10 / scales * f.l1_loss(x, y.detach()) for x, y in zip(a[:-1], b[:-1], strict=True))
            for weight, x, y in zip(VGG_LAYER_WEIGHTS, vgg_features(vgg, fake), vgg_features(vgg, target), strict=True):
                loss_g = loss_g + 10 * weight * f.l1_loss(x, y)
            for value in trainable(g):
                value.grad = None
            loss_g.backward()
            optimizer_g.step()
            optimizer_d.zero_grad()
            loss_d.backward()
            optimizer_d.step()
            step += 1
        yield name, g, d


def main():
    arrays = {}
    runs = [
        pix2pix(),
        pix2pixhd("global", hd_global, 2, [("global", "")]),
        # The authors' names of the enhancer's layers begin with model1.
        pix2pixhd("local", hd_local, 3, [("local_frozen", "model1"), ("local_unfrozen", "")]),
    ]
    for run in runs:
        for name, g, d in run:
            arrays |= {f"{name}/G/{key}": value.detach().numpy().copy() for key, value in g.items()}
            arrays |= {f"{name}/D/{key}": value.detach().numpy().copy() for key, value in d.items()}
    np.savez_compressed(HERE / "published_steps.npz", **arrays)
    np.savez_compressed(HERE / "trained_unet.npz", **trained_unet())


if __name__ == "__main__":
    main()
