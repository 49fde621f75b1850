"""Images per second of AutoRetouch's training step and of its generator, beside PyTorch with the same networks and losses.

    python benchmarks/training_speed.py --crop 64 128 --batch 4 --rounds 5

Full size, all three losses, D first, Adam and the moving average. The type is float32 on a CPU, and on a GPU bfloat16 (autocast
in PyTorch) with TF32. Each software has a process of its own. They take turns, so that a slow minute slows both, and the one
that waits does not spin. `--compile` lets `torch.compile` build PyTorch's networks, which needs a C++ compiler. The images are
noise, the weights random: neither changes the time of a step.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

from autoretouch_jax.runtime.memory import keep_freed_memory
from autoretouch_jax.runtime.tables import text_table

STEPS, WARM_UP = 3, 2  # of each turn, and before the first one
SOFTWARE = ("JAX", "PyTorch", "PyTorch, channels last")


# ---- ours -------------------------------------------------------------------------------------------------------------------


def jax_runners(crop, batch):
    """Returns two functions: one makes a training step, the other runs the generator, both to their end."""
    import jax
    import numpy as np

    from autoretouch_jax.config.loading import load
    from autoretouch_jax.models.modules import make_generator
    from autoretouch_jax.planning.plan import plannable
    from autoretouch_jax.tools import bench_step

    config = plannable(load("configs/autoretouch.py"))
    on_cpu = jax.default_backend() == "cpu"
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, crop=crop),
        train=dataclasses.replace(config.train, batch=batch, precision="float32" if on_cpu else "bfloat16"),
        parallel=dataclasses.replace(config.parallel, devices=1),
    )
    _, train, _ = bench_step.ready_step(config)
    module, source = make_generator(config.generator, jax.numpy.dtype(config.train.precision)), (batch, crop, crop, 3)
    weights, apply = bench_step.random_weights(module, crop), jax.jit(module.apply)
    source = jax.device_put(np.random.default_rng(0).uniform(-1, 1, source).astype(np.float32))
    return train, lambda: jax.block_until_ready(apply(weights, source))


# ---- the peer ---------------------------------------------------------------------------------------------------------------


def torch_runners(crop, batch, channels_last, compiled):
    """The same two functions in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(width, eps=1e-3, momentum=0.2) for _ in range(2))

        def forward(self, x):
            y = x
            for conv, norm in zip(self.convs, self.norms, strict=True):
                y = F.leaky_relu(norm(conv(y)), 0.2)
            return x + y

    class Generator(nn.Module):
        def __init__(self, width=64, blocks=15):
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, width, 7, padding=3), nn.Conv2d(width, 2 * width, 3, 2)
            self.blocks = nn.Sequential(*(Block(2 * width) for _ in range(blocks)))
            self.up, self.head = nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)

        def forward(self, source):
            stem = F.leaky_relu(self.stem(source), 0.2)
            x = self.up(self.blocks(self.down(F.pad(stem, (0, 1, 0, 1)))))
            return torch.tanh(self.head(F.leaky_relu(F.interpolate(x, scale_factor=2, mode="nearest"), 0.2) + stem))

    class Discriminator(nn.Module):
        def __init__(self, width=64):
            super().__init__()
            widths = [6, width, 2 * width, 4 * width, 8 * width]
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in itertools.pairwise(widths))
            self.norms = nn.ModuleList(nn.BatchNorm2d(width, eps=1e-3, momentum=0.2) for width in widths[2:])
            self.logits = nn.Conv2d(widths[-1], 1, 4)

        def forward(self, source, image):
            x = F.leaky_relu(self.convs[0](torch.cat([source, image], 1)), 0.2)
            for conv, norm in zip(self.convs[1:], self.norms, strict=True):
                x = norm(F.leaky_relu(conv(x), 0.2))
            return self.logits(F.pad(x, (1, 2, 1, 2)))

    class VGG(nn.Module):
        """VGG16 up to the last layer whose features the config compares."""

        def __init__(self, layers):
            super().__init__()
            self.layers, self.convs = layers, nn.ModuleDict()
            before = 3
            for block, (count, width) in enumerate(zip((2, 2, 3, 3, 3), (64, 128, 256, 512, 512), strict=True), 1):
                for index in range(1, count + 1):
                    self.convs[f"relu{block}_{index}"] = nn.Conv2d(before, width, 3, padding=1)
                    before = width
                    if f"relu{block}_{index}" == layers[-1]:
                        return

        def forward(self, x):
            features = []
            for name, conv in self.convs.items():
                if name.endswith("_1") and name != "relu1_1":
                    x = F.max_pool2d(x, 2)
                x = F.relu(conv(x))
                if name in self.layers:
                    features.append(x)
            return features

    from autoretouch_jax.config.loading import load

    loss = load("configs/autoretouch.py").loss
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    layout = {"memory_format": torch.channels_last if channels_last else torch.contiguous_format}
    generator, discriminator, vgg = (
        net.to(device, **layout) for net in (Generator(), Discriminator(), VGG(loss.perceptual_layers))
    )
    vgg.requires_grad_(False)
    optimizers = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (generator, discriminator)]
    average = [value.detach().clone() for value in generator.parameters()]
    run_generator, run_discriminator, run_vgg = (
        torch.compile(net) if compiled else net for net in (generator, discriminator, vgg)
    )
    source, target = (torch.rand(batch, 3, crop, crop, device=device).mul(2).sub(1).contiguous(**layout) for _ in range(2))
    mixed = torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")

    def bce(logits, real):
        return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, real, dtype=torch.float32))

    def perceptual(fake, real):
        total = 0.0
        for a, b in zip(run_vgg(fake), run_vgg(real), strict=True):
            scale = b.float().square().mean((1, 2, 3), keepdim=True).add(1e-12).rsqrt()
            total = total + ((a.float() - b.float()).abs() * scale).mean() / len(vgg.layers)
        return total

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def train():
        with mixed:
            fake = run_generator(source)
            real_logits, fake_logits = run_discriminator(source, target), run_discriminator(source, fake.detach())
            adversary = 0.5 * (bce(real_logits, 1.0) + bce(fake_logits, 0.0))
        optimizers[1].zero_grad(set_to_none=True)
        adversary.backward()
        optimizers[1].step()
        # No gradient of the discriminator's own weights is computed in the generator's turn.
        discriminator.requires_grad_(False)
        with mixed:
            objective = loss.pixel_weight * F.mse_loss(fake.float(), target)
            objective = objective + loss.adversarial_weight * bce(run_discriminator(source, fake), 1.0)
            objective = objective + loss.perceptual_weight * perceptual(fake, target)
        optimizers[0].zero_grad(set_to_none=True)
        objective.backward()
        optimizers[0].step()
        discriminator.requires_grad_(True)
        torch._foreach_lerp_(average, [value.detach() for value in generator.parameters()], 0.001)
        wait()

    evaluated = Generator().to(device, **layout).eval()
    run_evaluated = torch.compile(evaluated) if compiled else evaluated

    def infer():
        with torch.inference_mode(), mixed:
            run_evaluated(source)
        wait()

    return train, infer


# ---- taking turns -----------------------------------------------------------------------------------------------------------


def work(software, crop, batch, compiled):
    """Answers each line on standard input with the seconds of a step and of an image through the generator."""
    # Both gain from it; which of them the C library makes wait for pages would be chance.
    keep_freed_memory()
    ours, last = software == "JAX", software.endswith("last")
    runners = jax_runners(crop, batch) if ours else torch_runners(crop, batch, last, compiled)
    for run in runners:
        for _ in range(WARM_UP):
            run()
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = []
        for run in runners:
            started = time.perf_counter()
            for _ in range(STEPS):
                run()
            seconds.append((time.perf_counter() - started) / STEPS)
        print(json.dumps(seconds), flush=True)


def start(software, crop, batch, compiled):
    """Starts a worker, and waits until it is warm."""
    words = [sys.executable, __file__, "--worker", software, "--crop", str(crop), "--batch", str(batch)]
    # Threads of OpenMP that wait by spinning would slow down whoever's turn it is.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    worker = subprocess.Popen(
        words + ["--compile"] * compiled, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    while (line := worker.stdout.readline()) and line != "ready\n":
        pass
    if not line:
        raise SystemExit(f"{software}: the worker ended; its messages are above")
    return worker


def compare(crop, batch, rounds, compiled):
    """Returns a row for each software: images per second in training and through the generator, and the ratios to PyTorch's."""
    workers = {software: start(software, crop, batch, compiled) for software in SOFTWARE}
    seconds = {software: [] for software in SOFTWARE}
    for _ in range(rounds):
        for software, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            seconds[software].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    speeds = {
        software: [batch / statistics.median(column) for column in zip(*turns, strict=True)]
        for software, turns in seconds.items()
    }
    best = [max(speeds[software][i] for software in SOFTWARE[1:]) for i in range(2)]
    return [
        [
            f"{crop}²",
            software,
            *(text for speed, peer in zip(pair, best, strict=True) for text in (f"{speed:.2f}", f"{speed / peer:.2f}")),
        ]
        for software, pair in speeds.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, nargs="+", default=[64, 128], help="sides of the images in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each software")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--worker", choices=SOFTWARE, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.crop[0], arguments.batch, arguments.compile)
        return
    rows = []
    for crop in arguments.crop:
        rows += compare(crop, arguments.batch, arguments.rounds, arguments.compile)
    print(text_table(["crop", "software", "training, images/s", "ratio", "generator, images/s", "ratio"], rows, left=(0, 1)))
    print(f"batch {arguments.batch}, medians of {arguments.rounds} turns of {STEPS} steps, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
