"""A step gives the same gradients and losses over any number of devices, processes and microbatches, and in both modes."""

import functools
import pickle

import jax
import numpy as np
import optax
import pytest
from conftest import edited
from test_processes import Run

from autoretouch_jax.errors import Refused
from autoretouch_jax.planning import tpu
from autoretouch_jax.runtime import devices
from autoretouch_jax.training import optimizers
from autoretouch_jax.training.compilation import lowered_step
from autoretouch_jax.training.state import make_networks, parameter_count
from autoretouch_jax.training.trainer import Trainer

STEPS = 20
LOSSES = {"adversarial_weight": 1.0, "perceptual_weight": 1.0, "vgg_weights": "random", "perceptual_layers": ("relu1_2",)}

# Plain gradient descent that keeps the last gradient: Adam's first step would blow up what is only rounding.
PROGRAM = """
import pickle, sys, jax, numpy as np, optax
from autoretouch_jax.runtime import devices, processes
from autoretouch_jax.training import optimizers
from autoretouch_jax.training.trainer import Trainer
config, steps, out = pickle.loads(open(sys.argv[1], "rb").read())
optimizers.optimizer = lambda *_: optax.trace(0.0)
with processes.one_run(config.parallel):
    trainer = Trainer(config)
    state, batches, losses = trainer.init(), trainer.batches(0), []
    for step in range(steps):
        state, metrics = trainer.step(state, trainer.put(next(batches)), trainer.frozen)
        losses.append([float(metrics["loss/generator"]), float(metrics["loss/discriminator"])])
        if step == 0:
            gradients = devices.to_host([state.generator.opt_state.trace, state.discriminator.opt_state.trace])
    if processes.is_first():
        open(out, "wb").write(pickle.dumps((gradients, losses)))
"""


@pytest.fixture(scope="module")
def descent_config(small_config):
    return edited(small_config, loss=LOSSES, optim={"generator_lr": 2e-5, "discriminator_lr": 1e-3, "decay_share": 0.0})


def descended(config, monkeypatch, steps: int = STEPS):
    """The first gradients and the losses of some steps of plain gradient descent."""
    monkeypatch.setattr(optimizers, "optimizer", lambda *_: optax.trace(0.0))
    trainer = Trainer(config)
    state, batches, losses, gradients = trainer.init(), trainer.batches(0), [], None
    for _ in range(steps):
        state, metrics = trainer.step(state, trainer.put(next(batches)), trainer.frozen)
        losses.append([float(metrics["loss/generator"]), float(metrics["loss/discriminator"])])
        if gradients is None:
            gradients = devices.to_host([state.generator.opt_state.trace, state.discriminator.opt_state.trace])
    return gradients, losses


def assert_same(ours, theirs):
    """Gradients to 1e-5 of each network's norm, losses to 1e-4."""
    for a, b in zip(ours[0], theirs[0], strict=True):
        difference = optax.global_norm(jax.tree.map(np.subtract, a, b))
        assert difference <= 1e-5 * optax.global_norm(b)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_devices_processes_and_modes_do_not_change_gradients_or_losses(descent_config, norm, monkeypatch, tmp_path):
    groups = {"generator": {"norm": norm}, "discriminator": {"norm": norm}, "train": {"batch_norm": "global"}}
    config = edited(descent_config, **groups)
    spread = functools.partial(edited, config)
    processes = Run((spread(parallel={"devices": 0}), STEPS, str(tmp_path / "out")), tmp_path / "run", program=PROGRAM)
    alone = descended(config, monkeypatch)
    for mode in ("jit", "pmap"):
        assert_same(descended(spread(parallel={"devices": 8, "mode": mode}), monkeypatch), alone)
    ends = processes.end()
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert_same(pickle.loads((tmp_path / "out").read_bytes()), alone)


def test_batch_norm_of_each_device_is_the_same_in_both_modes(descent_config, monkeypatch):
    config = edited(descent_config, generator={"norm": "batch"}, discriminator={"norm": "batch"})
    jit, pmap = (descended(edited(config, parallel={"devices": 4, "mode": mode}), monkeypatch, 3) for mode in ("jit", "pmap"))
    assert_same(jit, pmap)
    alone = descended(config, monkeypatch, 1)
    assert abs(alone[1][0][0] - jit[1][0][0]) > 1e-4 * abs(alone[1][0][0])  # statistics of two images, not of eight


@pytest.mark.parametrize("change", [{"accumulate": 4}, {"accumulate": 2, "devices": 2}, {"remat": "full"}, {"remat": "norms"}])
def test_microbatches_and_rematerialisation_do_not_change_gradients_or_losses(descent_config, change, monkeypatch):
    plain = descended(descent_config, monkeypatch, 3)
    assert_same(descended(edited(descent_config, parallel=change), monkeypatch, 3), plain)


def test_a_sharded_optimizer_state_is_sharded_and_changes_no_parameter(small_config):
    config = edited(small_config, generator={"width": 16}, parallel={"devices": 8}, optim={"clip_norm": 1.0})
    cut = edited(config, parallel={"optimizer_state": "sharded"})
    states = []
    for one in (config, cut):
        trainer = Trainer(one)
        state, batches = trainer.init(), trainer.batches(0)
        for _ in range(2):
            state, _ = trainer.step(state, trainer.put(next(batches)), trainer.frozen)
        states.append(state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), *(s.generator.params for s in states))
    kernel = states[1].generator.opt_state.mu["block0"]["Conv_0"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    assert states[1].generator.params["block0"]["Conv_0"]["kernel"].is_fully_replicated


def collectives(config):
    networks, frozen = make_networks(config)
    mesh = devices.make_mesh(config.parallel, config.train.batch)
    return tpu.collectives(lowered_step(config, networks, frozen, mesh).compile().as_text())


@pytest.mark.parametrize("blocks", [1, 5])
def test_a_step_has_one_all_reduce_for_each_network(descent_config, blocks):
    config = edited(descent_config, generator={"blocks": blocks, "norm": "batch", "width": 16}, parallel={"devices": 8})
    config = edited(config, discriminator={"norm": "batch", "width": 16})
    found = collectives(config)
    trainer = Trainer(config)
    state = trainer.init()
    parameters = parameter_count(state.generator.params) + parameter_count(state.discriminator.params)
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"]["count"] == 2
    assert found["all-reduce"]["bytes"] == pytest.approx(4 * parameters, rel=0.05)


def test_global_batch_norm_communicates_for_every_layer(descent_config):
    config = edited(descent_config, generator={"norm": "batch"}, train={"batch_norm": "global"}, parallel={"devices": 8})
    assert collectives(config)["all-reduce"]["count"] >= 2 + 4  # forwards and backwards of two layers


def test_full_rematerialisation_keeps_only_what_goes_into_a_block(descent_config):
    residuals = {}
    for remat in ("none", "norms", "full"):
        config = edited(descent_config, generator={"blocks": 4, "norm": "batch"}, parallel={"remat": remat})
        networks, _ = make_networks(config)
        image = np.zeros((1, 32, 32, 3), np.float32)
        variables = jax.jit(networks.generator.init)(jax.random.key(0, impl="rbg"), image)

        def pull(params, networks=networks, image=image, stats=variables["batch_stats"]):
            given = {"params": params, "batch_stats": stats}
            apply = functools.partial(networks.generator.apply, train=True, mutable=["batch_stats"])
            return jax.vjp(lambda p: apply(given | {"params": p}, image)[0], params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pull, variables["params"]))
        residuals[remat] = sum(leaf.size for leaf in leaves if leaf.ndim == 4 and leaf.shape[1] >= 16)
    assert residuals["full"] < residuals["norms"] < residuals["none"]


def test_a_share_that_does_not_divide_into_microbatches_is_refused(small_config):
    with pytest.raises(Refused, match=r"--parallel\.accumulate 3"):
        Trainer(edited(small_config, parallel={"accumulate": 3}))


def test_collectives_are_read_from_a_module_of_any_form():
    text = """
  %all-reduce.1 = f32[10]{0} all-reduce(f32[10]{0} %a), replica_groups={}
  %all-reduce-start.2 = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce-start(f32[4] %b, bf16[2,3] %c)
  %all-reduce-done.2 = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce-done(%all-reduce-start.2)
  %all-gather-start = (f32[2]{0}, f32[16]{0}) all-gather-start(f32[2] %d)
"""
    found = tpu.collectives(text)
    assert found["all-reduce"] == {"count": 2, "bytes": 40 + 16 + 12}
    assert found["all-gather"] == {"count": 1, "bytes": 64}
