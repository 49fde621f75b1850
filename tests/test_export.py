"""Models written as ONNX and StableHLO: they compute what JAX computes, on any size, and without this package."""

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ROOT
from PIL import Image

from autoretouch_jax import cli
from autoretouch_jax.config import networks
from autoretouch_jax.data.faces import Face
from autoretouch_jax.demo import faces
from autoretouch_jax.errors import Refused
from autoretouch_jax.inference import edit as edit_module
from autoretouch_jax.inference.edit import Edit, apply_edit, find_edit, retouch_array
from autoretouch_jax.inference.export import export, onnx_networks
from autoretouch_jax.inference.export.onnx_model import onnx_model
from autoretouch_jax.models.folder import Model, save_model
from autoretouch_jax.models.modules import make_generator

SMALL = {
    "autoretouch": networks.AutoRetouch(width=4, blocks=2),
    "autoretouch residual": networks.AutoRetouch(width=4, blocks=1, norm="none", head="residual", dead_zone=6),
    "retouch": networks.Retouch(width=4, levels=2, blocks=1, gate=0.4, dead_zone=2),
    "pix2pix": networks.Pix2Pix(width=2, levels=5),
    "pix2pixhd_global": networks.Pix2PixHDGlobal(width=2, downs=2, blocks=1),
    "pix2pixhd_local": networks.Pix2PixHDLocal(width=2, downs=2, global_blocks=1, local_blocks=1),
}
# Ten odd sizes on few canvases, because JAX compiles each canvas.
SIZES = ((1, 1), (1, 63), (63, 1), (2, 3), (7, 31), (31, 32), (33, 47), (50, 61), (59, 63), (65, 37))
# For networks that see the whole image, whose canvas is as small as their grid permits. Instance norm magnifies the rounding
# errors of an image of one colour, so that its output is arbitrary.
WHOLE_SIZES = ((33, 47), (35, 45), (6, 29))


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    """The command compares one size, so that JAX compiles one."""
    monkeypatch.setattr(export, "CHECKED_SIZES", ((9, 13),))


def random_model(name: str, **fields) -> Model:
    """A network with random weights and random statistics, so that it changes most pixels."""
    config = SMALL[name]
    side = max(32, config.grid)
    shapes = jax.eval_shape(make_generator(config).init, jax.random.key(0), np.zeros((1, side, side, 3), np.float32))
    rng = np.random.default_rng(0)

    def values(path, leaf):
        drawn = rng.uniform(0.5, 1.5, leaf.shape) if path[-1].key == "var" else rng.normal(0, 0.15, leaf.shape)
        return drawn.astype(np.float32)

    return Model(config, jax.tree_util.tree_map_with_path(values, shapes), **fields)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def export_to(folder, model: Model, *flags: str, to: str = "onnx"):
    save_model(folder / "model", model, 0)
    out = folder / f"exported.{to}"
    assert cli.main(["export", str(folder / "model"), "--to", to, "--out", str(out), *flags]) == 0
    return out


def run_onnx(session: onnxruntime.InferenceSession, images: np.ndarray) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": images}), strict=True))


# ---- the same as JAX --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_onnx_computes_what_jax_computes_on_odd_sizes(name):
    model = random_model(name)
    _, run, software, _ = export._onnx(model, "float32")
    assert software.startswith("onnxruntime")
    for size in SIZES if model.config.receptive_radius else WHOLE_SIZES:
        image = noise(*size)
        outputs = {key: value[0] for key, value in run(image[None]).items()}
        assert outputs["retouched"].shape == image.shape
        assert outputs.keys() == {"retouched", "ungated"} | ({"mask"} if model.config.predicts_mask else set())
        found = find_edit(model, image, "off")
        deviation = export.deviation_of(model.config, image, found, outputs, export.TOLERANCES["float32"])
        assert deviation.levels <= 1, size
        assert deviation.mask <= 1e-4, size
        assert deviation.share <= 0.01, size


@pytest.mark.parametrize(("name", "smallest"), [("autoretouch", 1), ("retouch", 1), ("pix2pixhd_global", 5)])
def test_stablehlo_computes_what_onnx_computes(name, smallest, tmp_path, capsys):
    model = random_model(name)
    out = export_to(tmp_path, model, to="stablehlo")
    assert f"for sides from {smallest} pixel(s) on; run by jax" in capsys.readouterr().out
    exported = jax.export.deserialize(bytearray(out.read_bytes()))
    assert "HIGHEST" in exported.mlir_module(), "a GPU would otherwise compute less exactly"
    images = np.stack([noise(33, 67), noise(33, 67)[::-1]])
    ours, theirs = jax.device_get(exported.call(images)), export._onnx(model, "float32")[1](images)
    assert ours.keys() == theirs.keys()
    assert np.abs(ours["ungated"].astype(int) - theirs["ungated"]).max() <= 1
    assert (ours["retouched"] != theirs["retouched"]).mean() < 0.01


@pytest.mark.parametrize("to", ["onnx", "stablehlo"])
def test_float16_is_smaller_and_near(to, tmp_path, capsys):
    model = random_model("retouch")
    full = export_to(tmp_path, model, to=to).stat().st_size
    half = export_to(tmp_path, model, "--precision", "float16", to=to).stat().st_size
    assert half < full
    printed = capsys.readouterr().out
    assert "float16" in printed
    assert int(re.findall(r"at most (\d) of 255", printed)[-1]) <= 4


def test_batchnorm_is_folded_and_weights_are_float16(tmp_path):
    model = random_model("autoretouch")
    graph = onnx_model(model, 0.0, {}, np.float16).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer if "kernel" in w.name}
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float16)}
    scale = model.variables["params"]["block0"]["BatchNorm_0"]["scale"]
    scale = scale / np.sqrt(model.variables["batch_stats"]["block0"]["BatchNorm_0"]["var"] + 1e-3)
    kernel = model.variables["params"]["block0"]["Conv_0"]["kernel"] * scale
    np.testing.assert_allclose(weights["block0/Conv_0/kernel"], kernel.transpose(3, 2, 0, 1), rtol=2e-3, atol=1e-6)


# ---- what is left alone -----------------------------------------------------------------------------------------------------


def test_the_gate_is_in_the_file_and_what_it_leaves_alone_comes_back_exactly(tmp_path):
    model = random_model("retouch", face_size=60.0)
    stricter = dataclasses.replace(model, config=dataclasses.replace(model.config, gate_off_faces=0.55, dead_zone=40))
    image = noise(50, 61)
    outputs = run_onnx(onnxruntime.InferenceSession(export_to(tmp_path, stricter)), image[None])
    left = (outputs["mask"] < 0.55)[0]
    assert 0.05 < left.mean() < 0.95
    np.testing.assert_array_equal(outputs["retouched"][0][left], image[left])
    assert (outputs["ungated"][0][left] != image[left]).any()
    change = np.abs(outputs["ungated"].astype(int) - image)[0].max(-1)
    applied, dead = ~left & (change > 40), ~left & (change > 0) & (change <= 40)
    np.testing.assert_array_equal(outputs["retouched"][0][applied], outputs["ungated"][0][applied])
    assert dead.any()
    np.testing.assert_array_equal(outputs["retouched"][0][dead], image[dead])


def test_the_metadata_say_what_an_app_needs(tmp_path):
    model = random_model("retouch", face_size=60.0, data_license="CC0")
    about = {entry.key: entry.value for entry in onnx.load(export_to(tmp_path, model)).metadata_props}
    assert about["data_license"] == "CC0"
    assert about["precision"] == "float32"
    numbers = {key: json.loads(about[key]) for key in ("gate", "gate_on_faces", "dead_zone", "face_size", "receptive_radius")}
    assert numbers == {
        "gate": 0.4,
        "gate_on_faces": 0.4,
        "dead_zone": 2,
        "face_size": 60.0,
        "receptive_radius": model.config.receptive_radius,
    }
    assert networks.generator_from_json(json.loads(about["generator"])) == model.config


# ---- what is refused --------------------------------------------------------------------------------------------------------


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch, capsys):
    model = random_model("autoretouch residual")  # which has no mask that could differ
    out = export_to(tmp_path, model)
    before = out.read_bytes()
    monkeypatch.setattr(onnx_networks, "LEAK", 0.25)
    assert cli.main(["export", str(tmp_path / "model"), "--to", "onnx", "--out", str(out)]) == 1
    assert re.search(r"not written: on \d+ × \d+ pixels .* of 255 levels", capsys.readouterr().err)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported.onnx", "model"]


@pytest.mark.parametrize("missing", ["onnx", "flatbuffers"])
def test_a_missing_package_is_named_with_its_extra(missing, tmp_path, monkeypatch):
    save_model(tmp_path / "model", random_model("retouch"), 0)
    for name in [name for name in sys.modules if re.match(rf"{missing}$|{missing}\.|jax\._src\.export\.serial", name)]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("onnx_model", "onnx_graph", "onnx_networks"):
        monkeypatch.delitem(sys.modules, f"autoretouch_jax.inference.export.{name}")
    monkeypatch.setitem(sys.modules, missing, None)
    to = "onnx" if missing == "onnx" else "stablehlo"
    with pytest.raises(Refused, match=rf"{missing} is not installed: pip install 'autoretouch-jax\[{to}\]'"):
        export.run(str(tmp_path / "model"), to, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_without_onnxruntime_onnx_itself_runs_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    export_to(tmp_path, random_model("retouch"))
    assert "run by onnx\n" in capsys.readouterr().out


def test_what_cannot_be_exported_is_refused_by_name(tmp_path, monkeypatch):
    model = random_model("pix2pix")
    save_model(tmp_path / "model", model, 0)
    with pytest.raises(Refused, match="is a folder"):
        export.run(str(tmp_path / "model"), "onnx", tmp_path, "float32")
    monkeypatch.delitem(onnx_networks.NETWORKS, networks.Pix2Pix)
    with pytest.raises(Refused, match="network pix2pix: cannot be written as ONNX"):
        export.run(str(tmp_path / "model"), "onnx", tmp_path / "out", "float32")
    trained = dataclasses.replace(model, config=dataclasses.replace(model.config, test_mode="train"))
    save_model(tmp_path / "model", trained, 0)
    with pytest.raises(Refused, match="test_mode train cannot be exported"):
        export.run(str(tmp_path / "model"), "stablehlo", tmp_path / "out", "float32")


def test_weights_beyond_the_format_are_refused(monkeypatch):
    monkeypatch.setattr("autoretouch_jax.inference.export.onnx_graph.LARGEST_FILE", 1000)
    with pytest.raises(Refused, match="--precision float16"):
        onnx_model(random_model("retouch"), 0.0, {}, np.float32)


# ---- the comparison ---------------------------------------------------------------------------------------------------------


def test_a_pixel_on_the_gate_may_go_either_way_and_no_third():
    config = networks.Retouch(gate=0.5)
    image = np.full((1, 3, 3), 100, np.uint8)
    found = Edit(np.full((1, 3, 3), 20, np.int16), np.array([[0.9, 0.5004, 0.1]], np.float32), None, 0.5)
    outputs = {"ungated": image + np.uint8(21), "mask": found.mask, "retouched": apply_edit(config, image, found)}
    tolerance = export.TOLERANCES["float32"]

    def levels(**pixels) -> int:
        changed = outputs["retouched"].copy()
        for column, value in pixels.items():
            changed[0, int(column[1])] = value
        return export.deviation_of(config, image, found, outputs | {"retouched": changed}, tolerance).levels

    assert levels(_0=121, _1=121) == 1
    assert levels(_0=121, _1=100) == 1, "left alone: undecided"
    assert levels(_0=121, _1=110) == 255, "neither the input's pixel nor the network's"
    assert levels(_0=100, _1=121) == 20, "left alone, though the mask is far above the gate"
    assert levels(_0=121, _1=121, _2=121) == 21, "edited, though it is far below"


def test_the_pictures_compared_are_edited_in_part():
    """The model in the box changes some pixels of the drawn skin and leaves others alone; else the comparison shows nothing."""
    from autoretouch_jax.models.folder import load_model

    model = load_model("pretrained")
    image = export._picture(np.random.default_rng(0), 39, 61)
    assert 0.02 < (retouch_array(model, image, faces="off") != image).any(-1).mean() < 0.98


# ---- the example ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("retouch_onnx", ROOT / "docs" / "retouch_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_needs_nothing_of_this_project(tmp_path):
    model = random_model("retouch")
    Image.fromarray(noise(33, 47)).save(tmp_path / "photo.png")
    words = [export_to(tmp_path, model), tmp_path / "photo.png", tmp_path / "out.png"]
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
    code += "print(sorted({'jax', 'flax', 'onnx', 'autoretouch_jax'} & set(sys.modules)))"
    argv = [sys.executable, "-c", code, ROOT / "docs" / "retouch_onnx.py", *words]
    ended = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    with Image.open(tmp_path / "out.png") as out:
        expected = retouch_array(model, noise(33, 47), faces="off")
        assert (np.abs(np.asarray(out).astype(int) - expected).max(-1) > 1).mean() < 0.002


@pytest.mark.parametrize("size", [30.0, 58.0])
def test_the_examples_face_is_the_commands_face(size, example, tmp_path, monkeypatch):
    """At the trained size, and brought to it: the same pixels, but where a rounded level crosses gate or dead zone."""
    model = random_model("retouch", face_size=56.0)
    image = faces.draw_face(1, side=250)
    monkeypatch.setattr(edit_module, "find_living_faces", lambda _: [Face(y=70.0, x=85.0, size=size, score=1.0)])
    expected = retouch_array(model, image).astype(int)
    session = onnxruntime.InferenceSession(export_to(tmp_path, model))
    result = example.retouch_face(session, image, 85.0, 70.0, size).astype(int)
    assert 0.02 < (expected != image).any(-1).mean() < 0.9
    assert (np.abs(result - expected).max(-1) > 1).mean() < 0.005
    without = dataclasses.replace(model, face_size=None)
    with pytest.raises(SystemExit, match="trained without faces"):
        example.retouch_face(onnxruntime.InferenceSession(export_to(tmp_path, without)), image, 85.0, 70.0, size)


def test_the_pages_commands_and_python_run(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "export.md").read_text()
    monkeypatch.chdir(tmp_path)
    Image.fromarray(faces.draw_face(3, 96)).save("PHOTO.jpg", quality=95)
    monkeypatch.setattr(export, "load_model", lambda _: random_model("retouch"))
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    for line in lines:
        words = shlex.split(line)
        if words[0] == "autoretouch":
            assert cli.main(words[1:]) == 0
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        exec(compile(block, "docs/export.md", "exec"), {})
    assert (tmp_path / "RETOUCHED.png").is_file()
