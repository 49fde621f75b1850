"""Records are lossless, whole and by crop. An interrupted preparation ends in the same bytes, and damage is named."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from conftest import edited
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autoretouch_jax import cli
from autoretouch_jax.data import crops, pipeline, prepare, records, sources, tile_codec
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.data.opening import open_source
from autoretouch_jax.data.records import RecordSource
from autoretouch_jax.data.shards import Shards
from autoretouch_jax.data.sources import whole
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.runtime import cache
from autoretouch_jax.training import loop


def images(kind: str, seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), np.uint8)
    flat = np.full_like(noise, rng.integers(256))
    spotted = noise.copy()
    spotted[height // 3 : height // 2 + 1, width // 3 : width // 2 + 1] += np.uint8(9)
    ramp = np.broadcast_to((np.arange(width) % 256)[None, :, None], noise.shape).astype(np.uint8)
    return {
        "noise": (noise, spotted),
        "flat": (flat, flat + np.uint8(1)),
        "identical": (noise, noise),
        "different": (noise, rng.integers(0, 256, noise.shape, np.uint8)),
        "smooth": (ramp, np.maximum(ramp, 3)),
    }[kind]


KINDS = st.sampled_from(["noise", "flat", "identical", "different", "smooth"])


@settings(max_examples=60, deadline=None)
@given(KINDS, st.integers(0, 9), st.integers(1, 300), st.integers(1, 300), st.data())
def test_any_pair_comes_back_bit_by_bit_whole_and_in_any_box(tmp_path_factory, kind, seed, height, width, data):
    source, target = images(kind, seed, height, width)
    folder = tmp_path_factory.mktemp("one")
    writer = ArrayRecordWriter(str(folder / "s"), records.WRITER_OPTIONS)
    records.write_example(writer, source, target)
    writer.close()
    fields = ["one", height, width, records.tile_side(height, width), 0, 0]
    index = {"format": 1, "license": None, "shards": [{"file": "s"}], "examples": [fields]}
    (folder / "index.json").write_text(json.dumps(index))
    pair = RecordSource(folder)[0]
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = (top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    for y, x, h, w in (box, (0, 0, height, width)):
        cut = pair.cut((y, x, h, w))
        np.testing.assert_array_equal(cut["source"], source[y : y + h, x : x + w])
        np.testing.assert_array_equal(cut["target"], target[y : y + h, x : x + w])
    np.testing.assert_array_equal(pair.edits(), crops.edit_map(source, target))


def test_a_crop_reads_only_the_tiles_it_touches(tmp_path, monkeypatch):
    source, target = images("noise", 0, 1024, 1024)
    pairs = save_pairs(tmp_path, [(source, target)])
    assert prepared(pairs, tmp_path / "r") == 0
    read = []
    real = RecordSource.read
    monkeypatch.setattr(RecordSource, "read", lambda self, entry, offsets: read.extend(offsets) or real(self, entry, offsets))
    RecordSource(tmp_path / "r")[0].cut((130, 300, 256, 256))
    assert read == [1 + 8 * row + column for row in (1, 2, 3) for column in (2, 3, 4)]


def test_a_target_equal_to_its_source_takes_no_bytes():
    source, _ = images("smooth", 0, 128, 128)
    same, other = tile_codec.encode(source, source), tile_codec.encode(source, 255 - source)
    method, _, length = tile_codec.HEADER.unpack_from(same)
    assert len(same) == tile_codec.HEADER.size + length < len(other)
    assert method


def save_pairs(folder: Path, pairs) -> tuple[Path, Path]:
    for number, pair in enumerate(pairs):
        for name, image in zip(("source", "target"), pair, strict=True):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / name / f"{number:03d}.png")
    return folder / "source", folder / "target"


def prepared(pairs: tuple[Path, Path], out: Path, *more: str) -> int:
    return cli.main(["data", "prepare", *map(str, pairs), "--out", str(out), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def small_shards(monkeypatch):
    """Two of the 96² test pairs in each shard; worker processes keep the usual size, so these tests use one worker."""
    monkeypatch.setattr(prepare, "SHARD_PIXELS", 2 * 96 * 96)


def test_records_are_the_folders_pairs_and_train_like_them(pair_folders, tmp_path, small_shards, small_config):
    assert prepared(pair_folders, tmp_path / "r", "--workers", "1", "--license", "CC BY 4.0") == 0
    folder, made = PairSource(*pair_folders), RecordSource(tmp_path / "r")
    assert (made.names, made.license, len(made.shards)) == (folder.names, "CC BY 4.0", 2)
    for ours, theirs in zip(made, folder, strict=True):
        for name, image in whole(theirs).items():
            np.testing.assert_array_equal(whole(ours)[name], image)
    forms = [
        {"root": None, "source": str(pair_folders[0]), "target": str(pair_folders[1])},
        {"root": None, "records": str(tmp_path / "r")},
    ]
    batches = []
    for form in forms:
        config = edited(small_config, data=form | {"edit_crops": 0.5, "colour": 0.1, "extra_blemishes": 0.5})
        batches.append(next(pipeline.batches(open_source(config.data), config, 3)))
    for name in ("source", "target", "weight"):
        np.testing.assert_array_equal(batches[0][name], batches[1][name])


def test_prepared_again_it_is_the_same_and_what_was_damaged_is_made_anew(pair_folders, tmp_path, small_shards, capsys):
    out = tmp_path / "r"
    assert prepared(pair_folders, out, "--workers", "1") == 0
    before = contents(out)
    shard = out / "shard-00001.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert cli.main(["data", "verify", str(out)]) == 1
    assert "shard-00001" in capsys.readouterr().err
    assert prepared(pair_folders, out, "--workers", "1") == 0
    assert "shard-00001.arrayrecord: was damaged; written again" in capsys.readouterr().err
    assert contents(out) == before
    assert cli.main(["data", "verify", str(out)]) == 0


PREPARE = "import sys; from autoretouch_jax import cli; from autoretouch_jax.data import prepare; prepare.SHARD_PIXELS = {}; " \
    "sys.exit(cli.main(sys.argv[1:]))"  # fmt: skip


def test_kill_nine_in_the_middle_then_again_gives_the_same_bytes(tmp_path):
    pairs = save_pairs(tmp_path, [images("noise", seed, 300, 300) for seed in range(12)])
    assert prepared(pairs, tmp_path / "whole", "--workers", "2") == 0
    command = [sys.executable, "-c", PREPARE.format(90_000), "data", "prepare", *map(str, pairs), "--workers", "1", "--out"]
    subprocess.run([*command, str(tmp_path / "undisturbed")], check=True, capture_output=True)
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not len(list(killed.glob("*.arrayrecord"))) >= 4:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "index.json").exists()
    with pytest.raises(Refused, match="did not finish; run it again"):
        RecordSource(killed)
    subprocess.run([*command, str(killed)], check=True, capture_output=True)
    assert contents(killed) == contents(tmp_path / "undisturbed")
    for ours, theirs in zip(RecordSource(killed), RecordSource(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(whole(ours)["target"], whole(theirs)["target"])


def test_a_pair_that_cannot_be_decoded_is_left_out_and_named_or_stops_it(pair_folders, tmp_path, capsys):
    path = pair_folders[0] / "nested" / "face2.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :][:8] = b"garbage!"
    data[2000:2100] = bytes(100)
    path.write_bytes(data)
    assert prepared(pair_folders, tmp_path / "r") == 1
    assert "left out" in (error := capsys.readouterr().err)
    assert "face2.png" in error
    assert RecordSource(tmp_path / "r").names == ["nested/face0", "nested/face1", "nested/face3"]
    for out in ("strict", "r"):  # in "r" the shard is there already, with the pair left out
        assert prepared(pair_folders, tmp_path / out, "--on-bad", "fail") == 1
        assert not (tmp_path / out / "index.json").exists()


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_byte_is_found_named_and_trained_without(pair_folders, tmp_path, small_config, seed):
    assert prepared(pair_folders, tmp_path / "r") == 0
    shard = tmp_path / "r" / "shard-00000.arrayrecord"
    entry = RecordSource(tmp_path / "r").entries[2]
    data = bytearray(shard.read_bytes())
    payload = RecordSource(tmp_path / "r").read(entry, [1])[0]
    data[data.index(payload[1000 * seed :][:32])] ^= 1 << seed
    shard.write_bytes(data)
    config = edited(small_config, data={"root": None, "records": str(tmp_path / "r")})
    source = open_source(config.data)
    faults = pipeline.Faults(config.data, len(source))
    stream = pipeline.batches(source, config, 0, faults=faults)
    assert all(next(stream)["source"].shape == (8, 32, 32, 3) for _ in range(3))
    (fault,) = faults.new_messages()
    assert "nested/face2 is damaged" in fault
    assert not faults.new_messages()
    strict = edited(config, data={"on_bad": "fail"})
    with pytest.raises(BadInput, match="nested/face2 is damaged"):
        [next(pipeline.batches(source, strict, step)) for step in range(3)]


def test_past_the_limit_the_run_stops_with_the_list(pair_folders, tmp_path, small_config):
    assert prepared(pair_folders, tmp_path / "r") == 0
    shard = tmp_path / "r" / "shard-00000.arrayrecord"
    source = RecordSource(tmp_path / "r")
    data = bytearray(shard.read_bytes())
    for entry in source.entries[:2]:
        data[data.index(source.read(entry, [1])[0][100:132])] ^= 255
    shard.write_bytes(data)
    config = edited(small_config, data={"root": None, "records": str(tmp_path / "r")})
    with pytest.raises(BadInput, match=r"2 example\(s\) could not be read: .*face0.*face1|face1.*face0"):
        [next(pipeline.batches(open_source(config.data), config, step)) for step in range(3)]


def test_a_run_goes_on_without_a_damaged_example_and_says_so(pair_folders, tmp_path, small_config, capsys):
    assert prepared(pair_folders, tmp_path / "r") == 0
    source = RecordSource(tmp_path / "r")
    shard = tmp_path / "r" / "shard-00000.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[data.index(source.read(source.entries[3], [1])[0][100:132])] ^= 255
    shard.write_bytes(data)
    config = edited(small_config, data={"root": None, "records": str(tmp_path / "r")})
    assert loop.run(config, tmp_path / "run") == 0
    assert "Replaced by another example" in (error := capsys.readouterr().err)
    assert "nested/face3 is damaged" in error
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["bad_examples"] == 1
    strict = edited(config, data={"on_bad": "fail"}, train={"steps": 12})
    assert loop.run(strict, tmp_path / "run") == 1
    assert re.search(r"stopped at step 6.*: 1 example\(s\) could not be read: .*nested/face3", capsys.readouterr().err)


def test_a_run_without_handles_stops_with_a_checkpoint(pair_folders, small_config, tmp_path, monkeypatch, capsys):
    assert prepared(pair_folders, tmp_path / "r") == 0
    real, left = Shards.read, iter(range(60))

    def read(self, number, offsets):
        in_pipeline = threading.current_thread() is not threading.main_thread()
        if in_pipeline and next(left, None) is None:
            raise cache.out_of_handles(self.root)
        return real(self, number, offsets)

    monkeypatch.setattr(Shards, "read", read)
    config = edited(small_config, data={"root": None, "records": str(tmp_path / "r")}, train={"steps": 1000})
    assert loop.run(config, tmp_path / "run") == 1
    assert "checkpoint written: " in (said := capsys.readouterr().err)
    assert "too many open files" in said
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_records_of_a_longer_list_are_removed(tmp_path, small_shards):
    pairs = save_pairs(tmp_path, [images("noise", seed, 96, 96) for seed in range(6)])
    assert prepared(pairs, tmp_path / "r", "--workers", "1") == 0
    for folder in pairs:
        os.unlink(folder / "005.png"), os.unlink(folder / "004.png")
    assert prepared(pairs, tmp_path / "r", "--workers", "1") == 0
    assert sorted(path.name for path in (tmp_path / "r").glob("shard-*.arrayrecord")) == [
        f"shard-0000{n}.arrayrecord" for n in (0, 1)
    ]


# ---- crops ------------------------------------------------------------------------------------------------------------------


def test_weighted_crops_have_the_mean_of_crops_placed_anywhere():
    """Exact: the chance of every place, times its weight, is what a uniform draw would give it."""
    edits = np.zeros((5, 4), np.uint8)
    edits[1, 2], edits[4, 0] = 9, 200
    height, width, side = 70, 60, 32
    rng = np.random.default_rng(0)
    counts = np.zeros((height - side + 1, width - side + 1))
    weights = np.full_like(counts, np.nan)
    for _ in range(60_000):
        top, left, weight = crops.draw(rng, height, width, edits, side, 0.6)
        counts[top, left] += 1
        assert np.isnan(weights[top, left]) or weights[top, left] == weight
        weights[top, left] = weight
    drawn = ~np.isnan(weights)
    assert drawn.mean() > 0.99
    density = 1 / (counts.size * weights[drawn])  # what the weight says the place was drawn with
    assert density.sum() == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(counts[drawn] / counts.sum(), density, atol=6 * np.sqrt(density.max() / 60_000))
    assert (counts / counts.sum() * np.nan_to_num(weights)).sum() == pytest.approx(1, abs=0.02)


def test_every_edit_crop_holds_the_edit():
    edits = np.zeros((6, 6), np.uint8)
    edits[0, 5] = 1
    rng = np.random.default_rng(0)
    for _ in range(50):
        top, left, weight = crops.draw(rng, 90, 90, edits, 32, 1.0)
        assert top <= 8 < top + 32
        assert left <= 88 < left + 32
        assert weight < 1


def test_a_limit_clips_the_weights_and_moves_no_crop():
    edits = np.zeros((63, 94), np.uint8)
    edits[30:33, 40:43] = 200  # one edited region on a large frame
    drawn = {}
    for limit in (0, 10, 1):
        rng = np.random.default_rng(0)
        drawn[limit] = [crops.draw(rng, 1000, 1500, edits, 64, 0.7, limit) for _ in range(2000)]
    exact, bounded = (np.array([weight for *_, weight in drawn[limit]]) for limit in (0, 10))
    for limit in (10, 1):
        assert [place[:2] for place in drawn[limit]] == [place[:2] for place in drawn[0]]
    assert {weight for *_, weight in drawn[1]} == {1.0}
    np.testing.assert_allclose(bounded, np.clip(exact, 0.1, 10), rtol=1e-12)
    # Without a limit, seven crops of ten have hardly any weight: the fault that the limit is for.
    around = exact < 0.5
    assert around.mean() == pytest.approx(0.7, abs=0.04)
    assert exact[around].sum() / exact.sum() < 0.01
    assert bounded[around].sum() / bounded.sum() == pytest.approx(0.07 / 1.07, abs=0.01)


def test_the_limit_reaches_the_batch(module_pairs, small_config):
    data = {"root": None, "source": str(module_pairs[0]), "target": str(module_pairs[1]), "edit_crops": 0.9}
    weights = {}
    for limit in (0.0, 1.05):
        config = edited(small_config, data=data | {"edit_crops_limit": limit})
        weights[limit] = next(pipeline.batches(open_source(config.data), config, 0))["weight"]
    np.testing.assert_allclose(np.clip(weights[0.0], 1 / 1.05, 1.05), weights[1.05], rtol=1e-6)
    assert (weights[0.0] != weights[1.05]).any()


def test_without_edits_crops_fall_anywhere_with_weight_one():
    rng = np.random.default_rng(0)
    drawn = {crops.draw(rng, 40, 40, np.zeros((3, 3), np.uint8), 32, 0.7) for _ in range(300)}
    assert len({top for top, _, _ in drawn}) == 9
    assert {weight for *_, weight in drawn} == {1.0}


# ---- position ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_goes_on_with_the_same_global_sequence(module_pairs, small_config, processes):
    form = {"root": None, "source": str(module_pairs[0]), "target": str(module_pairs[1]), "edit_crops": 0.5}
    config = edited(small_config, data=form)
    source = open_source(config.data)
    reference = pipeline.batches(source, config, 0)
    for _ in range(3):
        next(reference)
    shares = [pipeline.batches(source, config, 3, share=pipeline.Share(number, processes)) for number in range(processes)]
    for _ in range(2):
        expected, parts = next(reference), [next(share) for share in shares]
        for name, values in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


def test_an_epoch_covers_everything_once_however_many_processes(tmp_path, small_config):
    y = np.zeros((32, 32, 3), np.uint8)
    pairs = save_pairs(tmp_path, [(y + np.uint8(number), y + np.uint8(number)) for number in range(24)])
    config = edited(small_config, data={"root": None, "source": str(pairs[0]), "target": str(pairs[1])})
    source = open_source(config.data)
    orders = []
    for _ in range(2):
        shares = [pipeline.batches(source, config, 0, share=pipeline.Share(number, 2)) for number in range(2)]
        seen = [int(image[0, 0, 0]) for _ in range(6) for share in shares for image in next(share)["target"]]
        assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
        assert seen[:24] != seen[24:], "every epoch has an order of its own"
        orders.append(seen)
    assert orders[0] == orders[1]


def test_an_audits_weights_leave_out_and_down_weight_pairs(module_pairs, small_config, tmp_path):
    weights = {"nested/face0": {"weight": 0.0}, "nested/face1": {"weight": 0.25}}
    (tmp_path / "audit.json").write_text(json.dumps({"pairs": weights}))
    data = {"root": None, "source": str(module_pairs[0]), "target": str(module_pairs[1]), "audit": str(tmp_path / "audit.json")}
    source = open_source(edited(small_config, data=data).data)
    assert source.names == ["nested/face1", "nested/face2", "nested/face3"]
    batch = next(pipeline.batches(source, edited(small_config, data=data), 0))
    assert set(batch["weight"]) == {0.25, 1.0}
    (tmp_path / "audit.json").write_text(json.dumps({"pairs": {"other": {"weight": 1.0}}}))
    with pytest.raises(Refused, match=r"--data.audit .*knows none of the pairs"):
        open_source(edited(small_config, data=data).data)


def test_with_an_audit_an_edit_map_is_still_computed_once(module_pairs, small_config, tmp_path, monkeypatch):
    (tmp_path / "audit.json").write_text(json.dumps({"pairs": {"nested/face1": {"weight": 0.25}}}))
    data = {"root": None, "source": str(module_pairs[0]), "target": str(module_pairs[1]), "audit": str(tmp_path / "audit.json")}
    computed = []
    monkeypatch.setattr(sources, "edit_map", lambda a, b: computed.append(1) or crops.edit_map(a, b))
    source = open_source(edited(small_config, data=data).data)
    for _ in range(3):
        for example in source:
            np.testing.assert_array_equal(example.edits(), crops.edit_map(*(whole(example)[n] for n in ("source", "target"))))
    assert len(computed) == len(source) == 4
    assert {example.name: example.weight for example in source}["nested/face1"] == 0.25


def test_a_folder_without_records_says_what_to_do(tmp_path):
    with pytest.raises(Refused, match="make it with `autoretouch data prepare`"):
        RecordSource(tmp_path)
