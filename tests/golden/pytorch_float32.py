"""Makes pytorch_float32.npz: the published networks on the weights of the .npz files beside it, run by PyTorch in float32.

Those files hold the outputs in 8 bits, round(127.5 · (x + 1)) modulo 256, which is too coarse for a relative error of 1e-5. The
forward passes here are written with torch.nn.functional and the weights' published names, share nothing with the package, and
agree with the 8-bit outputs. To run it: pip install torch; python tests/golden/pytorch_float32.py
"""

from pathlib import Path

import numpy as np

try:
    import torch
    import torch.nn.functional as f
except ImportError:
    torch = f = None  # the test only draws the weights

HERE = Path(__file__).parent


def load(name):
    archive = np.load(HERE / f"{name}.npz")
    weights = {key.split("|")[1]: torch.from_numpy(archive[key]) for key in archive.files if "|" in key}
    return archive, weights, torch.from_numpy(archive["in0"]).float() / 127.5 - 1


def batch_norm(w, name, x):
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    return f.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"])


def conv(w, name, x, stride=1, padding=0):
    return f.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding)


def up4(w, name, x):
    return f.conv_transpose2d(f.relu(x), w[f"{name}.weight"], w.get(f"{name}.bias"), 2, 1)


def up3(w, name, x):
    return f.relu(f.instance_norm(f.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], 2, 1, output_padding=1)))


def mirrored(w, name, x, margin):
    return conv(w, name, f.pad(x, (margin,) * 4, mode="reflect"))


def unet(w, x, levels, level=1, at="model.1.model"):
    x = f.leaky_relu(x, 0.2)
    down = conv(w, f"{at}.1", x, 2, 1)
    if level == levels - 1:
        up = batch_norm(w, f"{at}.4", up4(w, f"{at}.3", down))
    else:
        inner = unet(w, batch_norm(w, f"{at}.2", down), levels, level + 1, f"{at}.3.model")
        up = batch_norm(w, f"{at}.6", up4(w, f"{at}.5", inner))
    return torch.cat([x, up], 1)


def whole_unet(levels):
    return lambda w, x: torch.tanh(up4(w, "model.3", unet(w, conv(w, "model.0", x, 2, 1), levels)))


def block(w, name, x):
    y = f.relu(f.instance_norm(mirrored(w, f"{name}.conv_block.1", x, 1)))
    return x + f.instance_norm(mirrored(w, f"{name}.conv_block.5", y, 1))


def global_features(w, x, downs, blocks):
    x, i = f.relu(f.instance_norm(mirrored(w, "model.1", x, 3))), 4
    for _ in range(downs):
        x, i = f.relu(f.instance_norm(conv(w, f"model.{i}", x, 2, 1))), i + 3
    for _ in range(blocks):
        x, i = block(w, f"model.{i}", x), i + 1
    for _ in range(downs):
        x, i = up3(w, f"model.{i}", x), i + 3
    return x


def hd_global(w, x):
    return torch.tanh(mirrored(w, "model.25", global_features(w, x, 3, 2), 3))


def hd_local(w, x):
    half = global_features(w, f.avg_pool2d(x, 3, 2, 1, count_include_pad=False), 3, 2)
    x = f.relu(f.instance_norm(mirrored(w, "model1_1.1", x, 3)))
    x = f.relu(f.instance_norm(conv(w, "model1_1.4", x, 2, 1))) + half
    x = block(w, "model1_2.1", block(w, "model1_2.0", x))
    return torch.tanh(mirrored(w, "model1_2.6", up3(w, "model1_2.2", x), 3))


def patchgan(w, x):
    x = f.leaky_relu(conv(w, "model.0", x, 2, 2), 0.2)
    for index, stride in ((2, 2), (5, 2), (8, 1)):
        x = f.leaky_relu(batch_norm(w, f"model.{index + 1}", conv(w, f"model.{index}", x, stride, 2)), 0.2)
    return conv(w, "model.11", x, 1, 2)


def multi_scale(w, x):
    for scale in (2, 1, 0):
        y, found = x, []
        for layer, stride in enumerate((2, 2, 2, 1)):
            y = conv(w, f"scale{scale}_layer{layer}.0", y, stride, 2)
            y = f.leaky_relu(f.instance_norm(y) if layer else y, 0.2)
            found.append(y)
        yield [*found, conv(w, f"scale{scale}_layer4.0", y, 1, 2)]
        x = f.avg_pool2d(x, 3, 2, 1, count_include_pad=False)


NETWORKS = {
    "pix2pix_unet128_ngf2": whole_unet(7),
    "pix2pix_unet256_ngf2": whole_unet(8),
    "pix2pixhd_global_ngf4_down3_blocks2": hd_global,
    "pix2pixhd_local_ngf4_down3_global2_local2": hd_local,
    "patchgan70_ndf4_batchnorm": patchgan,
}


def agree(ours, theirs):
    rounded = np.mod(np.rint((ours.numpy().astype(np.float64) + 1) * 127.5), 256)
    assert (rounded == theirs).mean() > 0.9999


# ---- LPIPS on random weights, which the test draws again from the same seed -------------------------------------------------


def random_lpips(backbone):
    """`({name: array} in torchvision's names, heads)`: any weights will do to compare two programs."""
    rng = np.random.RandomState(0)
    arrays = {}
    for name, shape in SHAPES[backbone].items():
        arrays[f"{name}.weight"] = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
        arrays[f"{name}.bias"] = rng.normal(0, 0.05, shape[0]).astype(np.float32)
    return arrays, {f"lin{i}": rng.uniform(0, 1, width).astype(np.float32) for i, width in enumerate(HEADS[backbone])}


def fire(index, before, squeeze, expand):
    name = f"features.{index}"
    return {
        f"{name}.squeeze": (squeeze, before, 1, 1),
        f"{name}.expand1x1": (expand, squeeze, 1, 1),
        f"{name}.expand3x3": (expand, squeeze, 3, 3),
    }


FIRES = ((3, 64, 16, 64), (4, 128, 16, 64), (6, 128, 32, 128), (7, 256, 32, 128))
FIRES += ((9, 256, 48, 192), (10, 384, 48, 192), (11, 384, 64, 256), (12, 512, 64, 256))
VGG = ((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256))
VGG += ((17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512))
ALEX = ((0, 3, 64, 11, 4, 2), (3, 64, 192, 5, 1, 2), (6, 192, 384, 3, 1, 1), (8, 384, 256, 3, 1, 1), (10, 256, 256, 3, 1, 1))
SHAPES = {
    "squeeze": {"features.0": (64, 3, 3, 3)} | {name: shape for row in FIRES for name, shape in fire(*row).items()},
    "vgg16": {f"features.{index}": (after, before, 3, 3) for index, before, after in VGG},
    "alex": {f"features.{index}": (after, before, size, size) for index, before, after, size, *_ in ALEX},
}
HEADS = {"squeeze": (64, 128, 256, 384, 384, 512, 512), "vgg16": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}


def squeezenet(w, x):
    x = f.relu(conv(w, "features.0", x, 2))
    yield x
    for index, *_ in FIRES:
        name = f"features.{index}"
        x = f.max_pool2d(x, 3, 2, ceil_mode=True) if index in (3, 6, 9) else x
        x = f.relu(conv(w, f"{name}.squeeze", x))
        x = f.relu(torch.cat([conv(w, f"{name}.expand1x1", x), conv(w, f"{name}.expand3x3", x, 1, 1)], 1))
        if index not in (3, 6):
            yield x


def vgg16(w, x):
    for index, *_ in VGG:
        x = f.max_pool2d(x, 2) if index in (5, 10, 17, 24) else x
        x = f.relu(conv(w, f"features.{index}", x, 1, 1))
        if index in (2, 7, 14, 21, 28):
            yield x


def alexnet(w, x):
    for index, _, _, _, stride, padding in ALEX:
        x = f.max_pool2d(x, 3, 2) if index in (3, 6) else x
        x = f.relu(conv(w, f"features.{index}", x, stride, padding))
        yield x


def lpips(backbone, a, b):
    arrays, heads = random_lpips(backbone)
    w = {name: torch.from_numpy(value) for name, value in arrays.items()}
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    network = {"squeeze": squeezenet, "vgg16": vgg16, "alex": alexnet}[backbone]
    total = 0.0
    for head, x, y in zip(heads.values(), *(network(w, (image - shift) / scale) for image in (a, b)), strict=True):
        x, y = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
        total += float(((x - y).square() * torch.from_numpy(head)[None, :, None, None]).sum(1).mean())
    return total


def main():
    arrays = {}
    for name, network in NETWORKS.items():
        archive, weights, image = load(name)
        output = network(weights, image)
        agree(output, archive["infer"])
        arrays[name] = output.numpy() if "patchgan" in name else output.numpy()[:, :, ::4, ::4]
    archive, weights, image = load("pix2pixhd_multiscale_d_ndf4_num3")
    for scale, features in enumerate(multi_scale(weights, image)):
        for layer, feature in enumerate(features):
            agree(feature, archive[f"infer.{scale}.{layer}"])
            arrays[f"multiscale.{scale}.{layer}"] = feature.numpy()[:, ::4]
    pairs = np.load(HERE / "metrics.npz")
    a, b = (torch.from_numpy(pairs[f"0/{name}"]).permute(2, 0, 1)[None].float() / 127.5 - 1 for name in "ab")
    for backbone in HEADS:
        arrays[f"lpips.{backbone}"] = np.float64(lpips(backbone, a[..., :95, :], b[..., :95, :]))
    np.savez_compressed(HERE / "pytorch_float32.npz", **arrays)


if __name__ == "__main__":
    with torch.no_grad():
        main()
