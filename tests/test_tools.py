"""The small verbs: `doctor` reports every fault and runs to its end, `bench data` measures the given pairs."""

import json

import pytest

from autoretouch_jax import cli
from autoretouch_jax.tools import bench, doctor


def lines(capsys) -> dict[str, list[tuple[str, str]]]:
    """The doctor's lines: for each subject its marks and results."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in capsys.readouterr().out.splitlines():
        mark, subject, *rest = line.split(maxsplit=2)
        found.setdefault(subject, []).append((mark, rest[0]))
    return found


def test_the_doctor_runs_every_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "cache"))
    assert cli.main(["doctor", "--workdir", str(tmp_path / "work")]) == 0
    found = lines(capsys)
    assert {"python", "libraries", "devices", "processes", "all-reduce", "clocks", "cache", "workdir"} <= set(found)
    assert not any(mark == "BAD" for entries in found.values() for mark, _ in entries)
    assert "8 cpu" in found["devices"][0][1]
    assert list((tmp_path / "work").iterdir()) == [], "the probe is deleted"


def test_a_check_that_fails_is_a_finding_and_the_others_still_run(tmp_path, monkeypatch, capsys):
    def broken():
        raise RuntimeError("the link is down\nmore lines")

    monkeypatch.setattr(doctor, "_all_reduce", broken)
    (tmp_path / "file").touch()
    assert cli.main(["doctor", "--workdir", str(tmp_path / "file" / "work")]) == 1
    found = lines(capsys)
    assert found["all-reduce"] == [("BAD", "RuntimeError: the link is down")]
    assert found["workdir"][0][0] == "BAD"
    assert found["clocks"][0][0] == "ok"


@pytest.mark.parametrize("seconds", ["0.05"])
def test_the_data_benchmark_measures_the_crops_that_fit(pair_folders, tmp_path, capsys, monkeypatch, seconds):
    """The pairs are 96² pixels: no crop of 256 fits, the whole image does."""
    monkeypatch.setattr(bench, "cores", lambda: 2)
    folders = ["--source", str(pair_folders[0]), "--target", str(pair_folders[1])]
    assert cli.main(["bench", "data", *folders, "--seconds", seconds, "--json", str(tmp_path / "b.json")]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert [row["crop"] for row in result["pairs_per_s_per_core"]] == [None]
    row = result["pairs_per_s_per_core"][0]
    assert row["ratio"] == pytest.approx(row["records"] / row["png"])
    assert result["sizes"] == ["96x96"]
    assert set(result["pipeline_pairs_per_s_by_threads"]) == {"1", "2"}
    assert set(result["pipeline_pairs_per_s_by_processes"]) == {"2"}
    assert "whole" in capsys.readouterr().out


def test_one_side_of_the_pairs_is_not_enough(capsys):
    assert cli.main(["bench", "data", "--source", "a"]) == 2
    assert "belong together" in capsys.readouterr().err
