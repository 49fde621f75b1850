"""No figure of an evaluation can be gained by damage: rows over the same images, pooled sums, intervals, processes, CSV."""

import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_use import random_model

from autoretouch_jax import cli
from autoretouch_jax.arguments.training import SweepArguments
from autoretouch_jax.config import ValidationConfig
from autoretouch_jax.data.sources import Decoded
from autoretouch_jax.errors import BadInput
from autoretouch_jax.evaluation import evaluate as evaluation
from autoretouch_jax.evaluation import metrics, report
from autoretouch_jax.inference.edit import Edit
from autoretouch_jax.models.folder import save_model
from autoretouch_jax.runtime import processes

SEEDS = range(30)
KINDS = ("edited", "untouched", "one pixel", "everywhere")


class Pairs(list):
    """A source in memory. None is a pair that cannot be read."""

    @property
    def names(self):
        return [f"{number}.png" for number in range(len(self))]

    def __getitem__(self, index):
        if (pair := super().__getitem__(index)) is None:
            raise BadInput(f"{index}.png: damaged")
        return Decoded(self.names[index], {"source": pair[0], "target": pair[1]})


def pair(rng, kind):
    size = (*rng.integers(6, 40, 2), 3)  # some are smaller than the window of SSIM
    source = rng.integers(20, 200, size, dtype=np.uint8)
    target = source.copy()
    if kind == "edited":
        target[: size[0] // 2, : size[1] // 2] += rng.integers(1, 30, dtype=np.uint8)
    elif kind == "one pixel":
        target[2, 3, 1] += 1
    elif kind == "everywhere":
        target += 7
    return source, target


def mixture(seed) -> Pairs:
    """A few pairs of any kinds; the first two seeds are all untouched, and all edited."""
    rng = np.random.default_rng(seed)
    kinds = {0: ("untouched",), 1: ("edited",)}.get(seed, KINDS)
    return Pairs(pair(rng, rng.choice(kinds)) for _ in range(rng.integers(1, 6)))


def model(pairs, change, where=lambda source, target: True):
    """A model that changes an image as `change(source, target)` says, int16, if `where` holds for its pair."""
    changes = {s.tobytes(): change(s, t) if where(s, t) else np.zeros(s.shape, np.int16) for s, t in list.__iter__(pairs)}
    return SimpleNamespace(config=SimpleNamespace(dead_zone=0), change=lambda image: changes[image.tobytes()])


def untouched(source, target) -> bool:
    return (source == target).all()


def no_change(source, target):
    return np.zeros(source.shape, np.int16)


def one_level(source, target):
    """The smallest damage: one level of one sample outside the edit."""
    change = no_change(source, target)
    change[-1, -1, 0] = 1
    return change


def noise(source, target):
    return np.random.default_rng(source.size).integers(1, 9, source.shape, dtype=np.int16)


def perfect(source, target):
    return target.astype(np.int16) - source


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    real = evaluation.find_edit

    def find_edit(one, image, faces):
        return Edit(one.change(image), None, None) if isinstance(one, SimpleNamespace) else real(one, image, faces)

    monkeypatch.setattr(evaluation, "find_edit", find_edit)


def measured(pairs, **models):
    return evaluation.evaluate(models, pairs, quiet=True)[0]


# ---- no gain by damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_that_returns_its_input_has_the_identity_row(seed):
    pairs = mixture(seed)
    result = json.loads(json.dumps(measured(pairs, model=model(pairs, no_change)), allow_nan=False))
    assert result["model"] == result["identity"]
    assert all(image["model"] == image["identity"] for image in result["images"])


def test_an_untrained_network_has_the_identity_row_too():
    random = random_model()
    still = dataclasses.replace(random, variables=jax.tree.map(np.zeros_like, random.variables))
    rng = np.random.default_rng(2)
    pairs = Pairs((image, image + np.uint8(edit)) for edit in (0, 3) for image in [rng.integers(9, 99, (32, 32, 3), np.uint8)])
    result = measured(pairs, model=still)
    assert result["model"] == result["identity"]
    assert measured(pairs, model=random)["model"] != result["identity"]


@pytest.mark.parametrize("harm", [one_level, noise])
@pytest.mark.parametrize("seed", SEEDS)
def test_damage_of_untouched_pairs_scores_below_the_identity(seed, harm):
    pairs = mixture(seed)
    pairs.append(pair(np.random.default_rng(seed), "untouched"))
    result = measured(pairs, model=model(pairs, harm, untouched))
    for name in (SweepArguments.metric, ValidationConfig.metric, next(iter(report.COLUMNS))):
        assert metrics.score(result["model"], name) < metrics.score(result["identity"], name)
    for name in ("psnr_rgb_u8", "edit_recovered", "edit_psnr", "edit_psnr_pooled", "outside_identical"):
        ours, theirs = (metrics.score(result[row], name) for row in ("model", "identity"))
        assert ours is theirs is None or ours <= theirs, name


@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_is_over_the_same_images(seed):
    pairs = mixture(seed)
    kinds = {change.__name__: model(pairs, change) for change in (no_change, one_level, noise, perfect)}
    result = measured(pairs, **kinds)
    edits = sum(not untouched(*one) for one in list.__iter__(pairs))
    assert all(row["n"] == result["identity"]["n"] for row in result["models"].values())
    assert result["model"]["n"]["psnr_pooled"] == result["model"]["n"]["psnr_rgb_u8"] == len(pairs)
    assert result["model"]["n"]["edit_recovered"] == result["model"]["n"]["edit_psnr_pooled"] == edits
    best = result["models"]["perfect"]
    assert best["psnr_pooled"] is None
    assert metrics.score(best, "psnr_pooled") == math.inf
    assert metrics.score(best, "edit_recovered") == (1 if edits else None)
    assert metrics.score(best, "edit_psnr_pooled") == (math.inf if edits else None)
    assert best["psnr_rgb_u8"] == pytest.approx(metrics.CEILING)


def test_one_edited_and_five_untouched_photographs():
    """Damaged photographs once joined a mean that the identity had over the edited one alone."""
    rng = np.random.default_rng(0)
    pairs = Pairs(pair(rng, kind) for kind in ("everywhere", *["untouched"] * 5))
    result = measured(pairs, model=model(pairs, lambda s, t: np.ones(s.shape, np.int16), untouched))
    assert result["identity"]["psnr_rgb_u8"] - result["model"]["psnr_rgb_u8"] == pytest.approx(5 / 6 * 10 * math.log10(12))
    pixels = [source.size for source, _ in list.__iter__(pairs)]
    error = (49 * pixels[0] + sum(pixels[1:])) / sum(pixels)
    assert result["model"]["psnr_pooled"] == pytest.approx(10 * math.log10(255**2 / error))


# ---- the figures ------------------------------------------------------------------------------------------------------------


def test_a_small_edit_has_the_weight_of_its_pixels():
    """As a mean of ratios this was −9.75: the one-pixel edit counted as much as the other."""
    source = np.full((20, 20, 3), 100, np.uint8)
    small, large = source.copy(), source.copy()
    small[0, 0] += 1
    large[:10] += 20
    pairs = Pairs([(source, small), (source + np.uint8(1), large + np.uint8(1))])

    def change(source, target):
        half = perfect(source, target) // 2
        return half - 20 if half.max() == 0 else half  # half of the large edit, and the pixel made worse

    result = measured(pairs, model=model(pairs, change))
    drawn, left = (3 + 12000), (3 * 21 + 6000)
    assert result["model"]["edit_recovered"] == 1 - left / drawn
    single = [image["model"]["edit_recovered"] for image in result["images"]]
    assert single == [-20, 0.5]
    low, high = result["model"]["edit_recovered_interval"]
    assert (low, high) == (-20, 0.5)
    # A quarter of all resamples hold the one pair twice, and a quarter the other.
    assert f"{1 - left / drawn:.3f} [-20.00, 0.50]" in report.table(result)


def test_the_interval_is_the_bootstrap_over_pairs():
    rng = np.random.default_rng(3)
    drawn, shares = rng.integers(100, 9000, 12), rng.random(12)
    sums = [{"drawn": int(d), "left": int(d * share)} for d, share in zip(drawn, shares, strict=True)]
    interval = metrics.recovered_interval([*sums, {"drawn": 0, "left": 0}])
    assert interval == metrics.recovered_interval([*sums]), "an untouched pair is no part of it, and it is the same each time"
    values = []
    for _ in range(20_000):
        chosen = [sums[i] for i in rng.integers(12, size=12)]
        values.append(1 - sum(s["left"] for s in chosen) / sum(s["drawn"] for s in chosen))
    np.testing.assert_allclose(interval, np.percentile(values, [2.5, 97.5]), atol=0.006)
    assert metrics.recovered_interval(sums[:1]) is None


def test_the_sums_by_hand():
    source = np.full((2, 2, 3), 100, np.uint8)
    target, output = source.copy(), source.copy()
    target[0, 0] = 250  # uint8 would wrap around
    output[0, 0], output[1, 1] = (0, 250, 240), (100, 103, 100)
    assert metrics.count(source, target, output, source) == {
        "pixels": 4, "edited": 1, "drawn": 450, "left": 260, "squared_error": 250**2 + 10**2 + 9,
        "edit_squared_error": 250**2 + 10**2, "outside_change": 3, "outside_changed": 1, "left_ungated": 450,
    }  # fmt: skip
    values = metrics.ratios(metrics.count(source, target, output))
    assert values["outside_error"] == 1 / 3
    assert values["outside_identical"] == 2 / 3
    black, white = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)
    assert metrics.compare(black, white, black)["psnr_rgb_u8"] == 0, "not the ceiling"
    large = np.full((160, 160, 3), 255, np.uint8)
    assert metrics.count(large, np.zeros_like(large), large)["squared_error"] == 255**2 * large.size, "32 bits overflow"


def test_no_error_and_no_image_differ_in_the_table():
    pairs = mixture(0)
    result = measured(pairs, still=model(pairs, no_change), noise=model(pairs, noise))
    lines = {line.split("  ")[0]: line.split() for line in report.table(result).splitlines()}
    assert lines["identity"][1:3] == ["∞", "58.92"]
    assert lines["identity"][4:6] == ["–", "–"], "no pair has an edit"
    assert lines["identity"][1:] == lines["still"][1:]
    assert "∞" not in lines["noise"]
    assert lines["images"][1] == str(len(pairs))
    assert lines["images"][4] == "0"
    assert metrics.score({"psnr_pooled": None}, "psnr_pooled") is None, "an older file without n"
    assert report.cell("edit_psnr", {"edit_psnr": 31.25}) == "31.25", "a metric without a column"


def test_the_threshold_of_the_edit_is_stated():
    pairs = mixture(3)
    still = model(pairs, no_change)
    for threshold, words in ((2.5, "threshold 2.5 levels"), (None, "threshold measured for each pair")):
        pairs.edit_threshold = threshold
        result = measured(pairs, model=still)
        assert result["edit_threshold"] == threshold
        assert words in result["protocol"]
    del pairs.edit_threshold
    assert measured(pairs, model=still)["edit_threshold"] == 0, "any difference"


# ---- processes, files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7])
def test_any_number_of_processes_gives_the_same_digits(monkeypatch, count):
    rng = np.random.default_rng(5)
    pairs = Pairs(pair(rng, KINDS[i % 4]) for i in range(6))
    pairs.insert(1, None)
    rough = model(Pairs(one for one in list.__iter__(pairs) if one), noise)
    expected = evaluation.evaluate({"model": rough}, pairs, quiet=True)
    monkeypatch.setattr(processes, "count", lambda: count)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    sent: list[list[str]] = []
    for number in reversed(range(count)):
        monkeypatch.setattr(processes, "index", lambda number=number: number)
        calls: list[str] = []
        sent.insert(0, calls)

        def gather(name, text, timeout, calls=calls, number=number):
            calls.append(text)
            # The first process gets the others' answers, which have been made before.
            return [text, *(others[len(calls) - 1] for others in sent[1:])] if number == 0 else [text]

        monkeypatch.setattr(processes, "gather", gather)
        try:
            result = evaluation.evaluate({"model": rough}, pairs, quiet=True)
        except BadInput:
            assert number > 0, "its share holds no readable pair"
    assert result == expected
    assert expected[1] == ["1.png: damaged"]


def test_the_csv_holds_every_value_of_every_image(pair_folders, face_folder, tmp_path, capsys):
    save_model(tmp_path / "identity" / "model", random_model(), 1)
    out, numbers = tmp_path / "new" / "images.csv", tmp_path / "e.json"
    argv = ["evaluate", str(tmp_path / "identity"), "--source", str(pair_folders[0]), "--target", str(pair_folders[1])]
    argv += ["--leave-alone", str(face_folder), "--json", str(numbers)]
    assert cli.main([*argv, "--csv", str(tmp_path)]) == 2
    assert f"--csv {tmp_path}: is a folder" in capsys.readouterr().err
    assert cli.main([*argv[:2], *argv[1:], "--csv", str(out)]) == 0
    result = json.loads(numbers.read_text())
    assert list(result["models"]) == ["identity-2", "identity-3"], "identity is the name of another row"
    rows = list(csv.DictReader(out.open()))
    labels = ["identity", "identity-2", "identity-3"]
    assert [(row["image"], row["model"]) for row in rows[:6]] == [
        (image["name"], label) for image in result["images"][:2] for label in labels
    ]
    assert len(rows) == 3 * (4 + 4)
    assert "sums" not in rows[0]
    values = result["images"][1]["models"]["identity-3"]
    for name, value in values.items():
        if name != "sums":
            assert rows[5][name] == ("" if value is None else str(value)), name
    assert int(rows[5]["squared_error"]) == values["sums"]["squared_error"]
    assert rows[-1]["psnr_rgb_u8"] == "", "a photograph to be left alone has no target"
    assert float(rows[-1]["alone_identical"]) < float(rows[-3]["alone_identical"]) == 1
    assert [path.name for path in out.parent.iterdir()] == ["images.csv"]
