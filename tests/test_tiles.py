"""A network on a photograph of any size: the plan of its tiles, what they give, and the change that comes of it."""

import dataclasses
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from autoretouch_jax.config.networks import AutoRetouch, Retouch
from autoretouch_jax.data.faces import Face
from autoretouch_jax.inference import edit as edit_module
from autoretouch_jax.inference import tiles
from autoretouch_jax.inference.edit import Edit, apply_edit, final_change, find_edit
from autoretouch_jax.inference.tiles import Axis, Plan, canvas_step, network_output, plan_for, plan_tiles
from autoretouch_jax.models.folder import Model
from autoretouch_jax.models.modules import make_generator
from autoretouch_jax.models.outputs import generator_output
from autoretouch_jax.models.pixels import to_float, to_uint8
from autoretouch_jax.runtime import devices

RETOUCH = Retouch(width=4, levels=2, blocks=1)
NETWORKS = [RETOUCH, AutoRetouch(width=4, blocks=1, norm="none", head="residual")]
STEP = 64


def random_model(config, scale: float = 0.2, **fields) -> Model:
    """A generator with random weights in every layer, so that it changes every pixel."""
    shapes = jax.eval_shape(make_generator(config).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)
    return Model(config, jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(np.float32), shapes), **fields)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- the plan ---------------------------------------------------------------------------------------------------------------


def sizes(count: int, smallest: float, largest: float) -> list[tuple[int, int]]:
    """Sizes of photographs between two numbers of pixels, of all proportions up to 1 : 30."""
    rng = np.random.default_rng(count)
    area, ratio = np.exp(rng.uniform(np.log(smallest), np.log(largest), count)), np.exp(rng.uniform(-3.4, 3.4, count))
    return [(max(1, round((a * r) ** 0.5)), max(1, round((a / r) ** 0.5))) for a, r in zip(area, ratio, strict=True)]


def check_cover(axis: Axis, grid: int) -> None:
    """Every pixel of the canvas is valid in a tile, and every tile is on the grid and on the canvas."""
    starts = axis.starts
    assert len(starts) == axis.tiles
    assert all(start % grid == 0 and start + axis.tile <= axis.canvas for start in starts)
    valid = [axis.valid(start) for start in starts]
    assert (valid[0].start, valid[-1].stop) == (0, axis.canvas)
    assert all(before.stop >= after.start for before, after in itertools.pairwise(valid))
    # What is valid is a halo away from each end of its tile that is no end of the canvas.
    for start, part in zip(starts, valid, strict=True):
        assert start == part.start == 0 or part.start - start >= axis.halo
        assert start + axis.tile == part.stop == axis.canvas or start + axis.tile - part.stop >= axis.halo


@pytest.mark.parametrize(("radius", "grid"), [(10, 2), (70, 2), (208, 16), (224, 32)])
@pytest.mark.parametrize("at_once", [1, 8])
def test_from_one_megapixel_on_at_most_1_3_times_the_pixels_are_computed(radius, grid, at_once):
    cameras = [(1000, 1000), (1024, 1024), (1025, 1025), (1080, 1920), (3000, 4000), (4000, 6000), (10000, 10000)]
    for height, width in [*cameras, *sizes(400, 1e6, 2e8)]:
        if min(height, width) < 220:
            continue
        plan = plan_tiles(height, width, STEP, radius, 1 << 23, at_once)
        assert plan.computed == plan.tiles * plan.rows.tile * plan.columns.tile <= 1.3 * height * width, (height, width)
        assert plan.tile <= 14e6, "memory is bounded whatever the size"
        for axis, side in zip(plan, (height, width), strict=True):
            assert 0 <= axis.canvas - side < STEP
            check_cover(axis, grid)


def test_a_strip_is_cut_too_and_computes_its_canvas_a_little_more():
    for height, width in [(1, 10**6), (33, 3 * 10**6), (10**6, 130), (3, 5000), (1, 1), (217, 4700)]:
        plan = plan_tiles(height, width, STEP, 224, 1 << 23)
        canvas = plan.rows.canvas * plan.columns.canvas
        assert plan.computed <= 1.3 * canvas
        assert plan.tile <= 1 << 23
        for axis in plan:
            check_cover(axis, 32)


def test_a_tile_is_as_large_as_permitted_and_devices_share_a_photograph():
    whole, cut = plan_tiles(2000, 2000, STEP, 70, 1 << 22), plan_tiles(2000, 2000, STEP, 70, 1 << 21)
    assert whole.tiles == 1 < cut.tiles
    assert cut.tile <= 1 << 21 < whole.computed < cut.computed
    # Where not even the smallest tiles that are permitted are small enough, they are taken.
    assert plan_tiles(3000, 4000, STEP, 224, 1 << 20).tile < plan_tiles(3000, 4000, STEP, 224, 1 << 23).tile
    assert 1 < plan_tiles(2000, 2000, STEP, 70, 1 << 22, at_once=4).tiles <= 4
    assert plan_tiles(3000, 4000, 256, None, 0) == Plan(Axis(3072, 3072, 0), Axis(4096, 4096, 0))


def test_photographs_of_similar_sizes_have_one_shape():
    assert plan_tiles(3000, 4000, STEP, 224, 1 << 23) == plan_tiles(2970, 3985, STEP, 224, 1 << 23)


def test_the_largest_array_of_a_tile_is_bounded():
    # The image itself has three values for each pixel, a feature map at half resolution a quarter of its channels.
    for config, values in ((RETOUCH, 3), (AutoRetouch(width=8), 8), (Retouch(), 48 / 4)):
        assert tiles.largest_tile(config) == (1 << 26) // values


# ---- what the tiles give ----------------------------------------------------------------------------------------------------


def small_tiles(config, size: tuple[int, ...]) -> Plan:
    """The canvas of `plan_for`, in far smaller tiles than it would take."""
    return Plan(*(Axis(axis.canvas, min(96, axis.canvas), axis.halo) for axis in plan_for(config, size)))


ODD_SIZES = [(1, 1), (2, 3), (1, 97), (33, 65), (64, 127), (1, 120), (63, 66), (129, 1), (191, 2), (130, 61)]
ODD_SIZES += [(66 + 2 * n, 191 - 2 * n) for n in range(30)]


@functools.partial(jax.jit, static_argnums=0)
def on_the_whole_canvas(config, variables, canvas):
    output = generator_output(make_generator(config).apply(variables, to_float(canvas[None])))
    mask = None if output.mask_logits is None else jax.nn.sigmoid(output.mask_logits[0, ..., 0])
    return to_uint8(output.image[0]), mask


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.network)
def test_tiles_give_what_the_whole_gives_on_forty_odd_sizes(config):
    model, step, cut, apart = random_model(config), canvas_step(config), 0, []
    assert len(set(ODD_SIZES)) == 40
    for height, width in ODD_SIZES:
        image = noise(height, width)
        canvas = np.pad(image, ((0, -height % step), (0, -width % step), (0, 0)), "reflect")
        whole, whole_mask = on_the_whole_canvas(config, model.variables, canvas)
        plan = small_tiles(config, image.shape)
        output, mask = network_output(model, image, plan)
        cut += plan.tiles > 1
        apart.append(np.abs(output.astype(int) - whole[:height, :width]))
        assert apart[-1].max() <= 1, "float32 rounding may tip a level, nothing more"
        assert (mask is None) == (whole_mask is None)
        if mask is not None:
            np.testing.assert_allclose(mask, whole_mask[:height, :width], atol=1e-4)
    assert cut > 30
    assert np.mean([(levels > 0).mean() for levels in apart]) < 0.01


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.network)
def test_a_halo_that_is_too_small_shows(config):
    model, image = random_model(config), noise(100, 150)
    plan = small_tiles(config, image.shape)
    less = config.receptive_radius // 2 // config.grid * config.grid
    short = Plan(*(axis._replace(halo=axis.halo - less) for axis in plan))
    assert (network_output(model, image, short)[0] != network_output(model, image, plan)[0]).mean() > 0.01


def test_a_photograph_of_a_megapixel_is_cut_as_planned(monkeypatch):
    monkeypatch.setattr(tiles, "largest_tile", lambda config: 1 << 19)
    model, image = random_model(RETOUCH), noise(900, 1200)
    plan = plan_for(RETOUCH, image.shape)
    assert 1 < plan.tiles <= 8
    assert plan.computed < 1.3 * 900 * 1200
    whole = Plan(*(axis._replace(tile=axis.canvas) for axis in plan))
    for cut, uncut in zip(network_output(model, image), network_output(model, image, whole), strict=True):
        assert np.abs(cut.astype(float) - uncut).max() <= 1


@pytest.mark.parametrize(("levels", "blocks"), [(1, 1), (2, 1), (3, 0), (3, 1)])
def test_the_radius_of_our_network_is_how_far_its_pixels_see(levels, blocks):
    config = Retouch(width=1, levels=levels, blocks=blocks)
    variables, radius, side = random_model(config).variables, config.receptive_radius, 256
    furthest = 0
    for pixel in range(side // 2, side // 2 + config.grid):
        # What a NaN reaches, sees it.
        image = np.zeros((1, config.grid, side, 3), np.float32)
        image[:, :, pixel] = np.nan
        reached = np.flatnonzero(np.isnan(make_generator(config).apply(variables, image).mask_logits).any((0, 1, 3)))
        furthest = max(furthest, pixel - reached.min(), reached.max() - pixel)
    assert radius - config.grid < furthest <= radius


# ---- memory, devices, threads -----------------------------------------------------------------------------------------------


def test_weights_are_put_on_the_devices_once(monkeypatch):
    put = []
    monkeypatch.setattr(devices, "copy_to_local_devices", lambda tree, count: (put.append(count), jax.device_put(tree))[1])
    model = random_model(RETOUCH)
    for size in ((40, 50), (60, 60), (50, 40)):
        network_output(model, noise(*size))
    assert put == [1]
    again = dataclasses.replace(model, face_size=100.0)
    network_output(again, noise(40, 50))
    assert put == [1, 1]


def test_weights_are_on_every_device_that_computes():
    model = random_model(RETOUCH)
    leaf = jax.tree.leaves(model.on_devices(4))[0]
    assert len(leaf.sharding.device_set) == 4
    assert leaf.sharding.is_fully_replicated
    assert model.on_devices(4) is model.on_devices(4)


def test_photographs_of_one_canvas_are_compiled_once():
    model = random_model(dataclasses.replace(RETOUCH, width=3))
    before = tiles._apply._cache_size()
    for size in ((65, 100), (128, 128), (70, 127)):
        network_output(model, noise(*size))
    assert tiles._apply._cache_size() == before + 1


def test_threads_share_a_model_and_take_turns(monkeypatch):
    computing, most, real = [], [], tiles._apply

    def apply(*arguments):
        computing.append(1)
        most.append(len(computing))
        result = jax.block_until_ready(real(*arguments))
        computing.pop()
        return result

    monkeypatch.setattr(tiles, "_apply", apply)
    model, images = random_model(RETOUCH), [noise(60 + n, 70) for n in range(12)]
    expected = [network_output(model, image)[0] for image in images]
    with ThreadPoolExecutor(4) as pool:
        for output, (own, _) in zip(expected, pool.map(lambda image: network_output(model, image), images), strict=True):
            np.testing.assert_array_equal(own, output)
    assert len(most) == 24
    assert max(most) == 1, "memory does not grow with the number of threads"


# ---- the edit ---------------------------------------------------------------------------------------------------------------


CONFIG = Retouch(width=4, levels=2, blocks=1, dead_zone=2)


def an_edit(mask: bool = True) -> Edit:
    rng = np.random.default_rng(0)
    change = rng.integers(-40, 41, (30, 20, 3)).astype(np.int16)
    change[:10] = rng.integers(-2, 3, (10, 20, 3))
    return Edit(change, rng.random((30, 20), np.float32) if mask else None, None, 0.5)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 1.5])
@pytest.mark.parametrize("band", [1, 70, 1 << 20])
def test_the_final_change_is_zero_where_a_pixel_is_left_alone(strength, band, monkeypatch):
    monkeypatch.setattr(edit_module, "BAND", band)
    edit = an_edit()
    final = final_change(CONFIG, edit, strength)
    assert final.dtype == np.int16
    alone = (edit.mask < 0.5) | (np.abs(edit.change).max(-1) <= 2)
    assert alone[:10].all()
    assert (final[alone] == 0).all()
    np.testing.assert_array_equal(final[~alone], np.rint(np.float32(strength) * edit.change[~alone]))
    image = noise(30, 20)
    np.testing.assert_array_equal(apply_edit(CONFIG, image, edit, strength), np.clip(image.astype(int) + final, 0, 255))


def test_the_users_mask_multiplies_the_change():
    edit, mask = an_edit(mask=False), np.zeros((30, 20), np.float32)
    mask[:, 5:], mask[:, 15:] = 0.5, 1
    final, full = final_change(CONFIG, edit, 1.0, mask), final_change(CONFIG, edit)
    assert (final[:, :5] == 0).all()
    np.testing.assert_array_equal(final[:, 5:15], np.rint(0.5 * full[:, 5:15]))
    np.testing.assert_array_equal(final[:, 15:], full[:, 15:])


def test_a_face_at_the_border_is_computed_with_a_margin_of_the_radius(monkeypatch):
    seen = []

    def network(model, image, plan):
        seen.append(image.shape)
        assert (plan.rows.canvas % 128, plan.columns.canvas % 128) == (0, 0)
        return image - np.minimum(image, 8), np.ones(image.shape[:2], np.float32)

    monkeypatch.setattr(edit_module, "network_output", network)
    model, radius = Model(CONFIG, {}, face_size=100.0), CONFIG.receptive_radius
    for size, factor in ((100.0, 1), (200.0, 0.5), (60.0, 100 / 60)):
        photo = np.full((600, 700, 3), 90, np.uint8)
        face = Face(20.0, 690.0, size, 1.0)
        monkeypatch.setattr(edit_module, "find_faces", lambda image, sure, face=face: [face])
        found = find_edit(model, photo, "all")
        assert (found.change[:40, -20:] == -8).all()
        assert (found.change[400:] == 0).all()
        # The part of the window that lies in the photograph, and the radius on all sides.
        height, width = factor * (20 + 0.12 * size + 1.1 * size) + 2 * radius, factor * (10 + 0.8 * size) + 2 * radius
        assert np.abs(np.array(seen[-1][:2]) - (height, width)).max() < 5
