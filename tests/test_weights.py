"""Weights: converted exactly, downloaded with a checksum, never executed, never silently random."""

import hashlib
import http.server
import os
import pickle
import threading
import zipfile

import jax
import numpy as np
import pytest

from autoretouch_jax.errors import Refused
from autoretouch_jax.models import torchfile, vgg, vgg_weights
from autoretouch_jax.models.vgg_weights import load_vgg, vgg_params
from autoretouch_jax.models.weights_file import read_arrays
from autoretouch_jax.runtime.download import download

LAYERS = ("relu1_2", "relu2_1")


def vgg_arrays(kind: str) -> dict[str, np.ndarray]:
    """Random VGG16 weights down to relu2_1 in a framework's naming and layout."""
    rng = np.random.default_rng(0)
    shapes = {"1_1": (3, 3, 3, 64), "1_2": (3, 3, 64, 64), "2_1": (3, 3, 64, 128)}
    arrays = {}
    for index, (name, shape) in zip((0, 2, 5), shapes.items(), strict=True):
        kernel, bias = rng.normal(0, 0.05, shape).astype(np.float32), rng.normal(0, 0.1, shape[-1]).astype(np.float32)
        if kind == "torchvision":
            arrays |= {f"features.{index}.weight": kernel.transpose(3, 2, 0, 1), f"features.{index}.bias": bias}
        else:
            block, number = name.split("_")
            arrays |= {f"block{block}_conv{number}/kernel": kernel, f"block{block}_conv{number}/bias": bias}
    return arrays


@pytest.mark.parametrize("kind", ["torchvision", "keras"])
def test_both_layouts_give_the_same_parameters_and_their_own_preprocessing(kind):
    params, found = vgg_params(vgg_arrays(kind), "vgg16", LAYERS)
    assert found == kind
    reference, _ = vgg_params(vgg_arrays("keras"), "vgg16", LAYERS)
    jax.tree.map(np.testing.assert_array_equal, params, reference)
    assert set(params) == {"conv1_1", "conv1_2", "conv2_1"}


def test_features_against_a_plain_convolution(tmp_path):
    np.savez(tmp_path / "vgg.npz", **vgg_arrays("keras"))
    module, params = load_vgg("vgg16", ("relu1_1",), str(tmp_path / "vgg.npz"))
    image = np.random.default_rng(1).uniform(-1, 1, (1, 6, 6, 3)).astype(np.float32)
    feature = np.asarray(module.apply({"params": params}, image)["relu1_1"])
    caffe = (image[..., ::-1] * 127.5 + 127.5) - np.array([103.939, 116.779, 123.68], np.float32)
    kernel, bias = vgg_arrays("keras")["block1_conv1/kernel"], vgg_arrays("keras")["block1_conv1/bias"]
    expected = np.maximum(np.tensordot(caffe[0, 1:4, 2:5], kernel, axes=([0, 1, 2], [0, 1, 2])) + bias, 0)
    np.testing.assert_allclose(feature[0, 2, 3], expected, rtol=1e-4)


def test_max_pool_floors_odd_sizes():
    x = np.arange(5 * 5, dtype=np.float32).reshape(1, 5, 5, 1)
    np.testing.assert_array_equal(vgg.max_pool(x)[0, ..., 0], [[6, 8], [16, 18]])


def test_layers_after_the_last_wanted_are_not_computed():
    module = vgg.VGG("vgg19", ("relu3_4",), "torchvision")
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    assert len(shapes) == 2 + 2 + 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "lack block1_conv1/kernel"),
        ({**vgg_arrays("keras"), "block1_conv2/kernel": np.zeros((3, 3, 64, 32), np.float32)}, "conv1_2/kernel"),
    ],
)
def test_incomplete_and_misshapen_files_are_refused_by_name(tmp_path, arrays, message):
    np.savez(tmp_path / "vgg.npz", **arrays)
    with pytest.raises(Refused, match=message):
        load_vgg("vgg16", LAYERS, str(tmp_path / "vgg.npz"))


def test_broken_files_are_refused_by_name(tmp_path):
    for name, data in (("cut.npz", b"PK\x03\x04abc"), ("cut.pth", b"nonsense"), ("weights.bin", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Refused, match=name):
            read_arrays(tmp_path / name)


# ---- the small copies of large files ----------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A weights file that counts as large, and a cache of its own."""
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vgg_weights, "SMALL", 0)
    np.savez(tmp_path / "vgg.npz", **vgg_arrays("torchvision"))
    return tmp_path / "vgg.npz"


def refuse_to_read(*_):
    raise AssertionError("the large file was read again")


def test_a_large_file_is_read_once(large, tmp_path, monkeypatch):
    module, params = load_vgg("vgg16", LAYERS, str(large))
    (copy,) = (tmp_path / "cache" / "vgg").iterdir()
    monkeypatch.setattr(vgg_weights, "read_arrays", refuse_to_read)
    again, same = load_vgg("vgg16", LAYERS, str(large))
    assert again == module
    assert module.kind == "torchvision"
    jax.tree.map(np.testing.assert_array_equal, same, params)
    # Deeper layers are not in it.
    with pytest.raises(AssertionError, match="read again"):
        load_vgg("vgg16", ("relu2_2",), str(large))
    # Neither another file nor a damaged copy is taken for it.
    damaged = bytearray(copy.read_bytes())
    damaged[-7] ^= 1
    for content in (bytes(damaged), damaged[:1000], b""):
        copy.write_bytes(content)
        with pytest.raises(AssertionError, match="read again"):
            load_vgg("vgg16", LAYERS, str(large))
    os.utime(large, (1, 1))
    with pytest.raises(AssertionError, match="read again"):
        load_vgg("vgg16", LAYERS, str(large))


def test_a_damaged_copy_is_made_again_and_a_full_disk_costs_only_the_copy(large, tmp_path, monkeypatch):
    _, params = load_vgg("vgg16", LAYERS, str(large))
    (copy,) = (tmp_path / "cache" / "vgg").iterdir()
    copy.write_bytes(copy.read_bytes()[:-1])
    assert vgg_weights._read_copy(copy) is None
    load_vgg("vgg16", LAYERS, str(large))
    jax.tree.map(np.testing.assert_array_equal, vgg_weights._read_copy(copy), (params, "torchvision"))
    copy.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vgg_weights.storage, "write", full)
    jax.tree.map(np.testing.assert_array_equal, load_vgg("vgg16", LAYERS, str(large))[1], params)


def test_a_download_is_hashed_once(large, monkeypatch):
    calls = []
    monkeypatch.setattr(vgg_weights, "download", lambda *which: calls.append(which) or large)
    for _ in range(2):
        load_vgg("vgg16", LAYERS, "download")
    assert calls == [vgg_weights.TORCHVISION["vgg16"]]


def test_a_small_file_needs_no_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "vgg.npz", **vgg_arrays("keras"))
    load_vgg("vgg16", LAYERS, str(tmp_path / "vgg.npz"))
    assert not (tmp_path / "cache").exists()


# ---- state dicts written by PyTorch 2.13.0, in both of its file forms ---------------------------------------------------


@pytest.mark.parametrize("name", ["state_dict_zip.pth", "state_dict_legacy.pth"])
def test_a_pytorch_state_dict_is_read(name):
    from conftest import GOLDEN

    found = torchfile.read_state_dict(GOLDEN / name)
    assert list(found) == ["features.0.weight", "features.0.bias", "strided", "half", "scalar"]
    np.testing.assert_array_equal(found["features.0.weight"], np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2))
    np.testing.assert_array_equal(found["features.0.bias"], np.array([-1, 0.5], np.float32))
    np.testing.assert_array_equal(found["strided"], np.arange(6, dtype=np.float32).reshape(2, 3).T[1:])
    np.testing.assert_array_equal(found["half"], np.array([1.5, 2], np.float16))
    assert found["scalar"] == 7


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_is_never_executed(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w") as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({"a": Bomb()}))
    with pytest.raises(Refused, match=r"bomb\.pth.*print"):
        read_arrays(tmp_path / "bomb.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Refused, match=r"old\.pth"):
        read_arrays(tmp_path / "old.pth")
    assert capsys.readouterr().out == ""


# ---- downloads, from a server on this machine ----------------------------------------------------------------------------

BODY = bytes(range(256)) * 64


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if "missing" not in self.path else 404)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[: len(BODY) // 2] if "cut" in self.path else BODY)

        def log_message(self, *_arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_a_download_is_checked_and_cached(server, tmp_path):
    digest = hashlib.sha256(BODY).hexdigest()
    path = download(f"{server}/vgg.pth", digest[:8], tmp_path)
    assert path.read_bytes() == BODY
    assert download("http://127.0.0.1:1/vgg.pth", digest[:8], tmp_path) == path, "the second time needs no server"


@pytest.mark.parametrize(("name", "message"), [("cut.pth", "cut"), ("wrong.pth", "wrong checksum"), ("missing.pth", "404")])
def test_a_bad_download_leaves_nothing(server, tmp_path, name, message):
    digest = "0" * 8 if name == "wrong.pth" else hashlib.sha256(BODY).hexdigest()[:8]
    with pytest.raises(Refused, match=message):
        download(f"{server}/{name}", digest, tmp_path)
    assert list(tmp_path.iterdir()) == []
