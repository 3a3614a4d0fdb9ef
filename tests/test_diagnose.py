"""`detkit doctor` on runs made to show each fault, on healthy ones, and on what no run should record."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from detkit import config, diagnose
from detkit.cli import main
from detkit.errors import UserError

RUNS = Path(__file__).parent / "data" / "runs"
# What the names of the runs that benchmarks/faults.py made begin with, and what is to be found in them first.
FAULTS = {
    "healthy": None,
    "rate_high": "rate too high",
    "rate_low": "rate too low",
    "diverging": "diverging",
    "constant": "flat start",
    "flat": "flat start",
    "dead": "dead activations",
    "zero": "dead activations",
    "huge": "exploding gradients",
    "vanishing": "vanishing gradients",
    "overfitting": "overfitting",
    "starved": "data-starved",
    "rare": "classes never predicted",
}


def fault(run: Path) -> str | None:
    return FAULTS[max((start for start in FAULTS if run.name.startswith(start)), key=len)]


def names(run: Path) -> list[str]:
    return [finding.name for finding in diagnose.diagnose(diagnose.Run(run))]


MADE = sorted(path for path in RUNS.glob("*/*") if path.is_dir())


@pytest.mark.parametrize("run", MADE, ids=[f"{run.parent.name}/{run.name}" for run in MADE])
def test_the_fault_that_a_run_was_made_with_is_named_first_and_nothing_in_a_healthy_one(run: Path) -> None:
    found, wanted = names(run), fault(run)
    assert found[:1] == ([wanted] if wanted else [])


def test_there_are_enough_of_them() -> None:
    first = [fault(run) for run in MADE if run.parent.name == "first"]
    assert sum(wanted is not None for wanted in first) >= 12
    assert first.count(None) >= 3
    assert set(first) == set(FAULTS.values())


def test_what_is_to_be_changed_are_settings_that_there_are() -> None:
    for run in MADE:
        for finding in diagnose.diagnose(diagnose.Run(run)):
            assert finding.changes or finding.advice
            settings = config.load(run / "config.yaml", finding.changes)
            assert settings != diagnose.Run(run).settings
            assert finding.sentence[-1] != "."
            assert re.search(r"\d", finding.sentence)


# The command


def test_the_doctor_says_it_on_the_terminal_as_a_page_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = next(run for run in MADE if fault(run) == "overfitting")
    page, tree = tmp_path / "page.html", tmp_path / "found.json"
    with pytest.raises(SystemExit) as end:
        main(["doctor", str(run), "--html", str(page), "--json", str(tree)])
    assert end.value.code == 1
    said = capsys.readouterr().out
    (finding,) = diagnose.diagnose(diagnose.Run(run))
    assert "1. overfitting" in said
    assert finding.sentence[1:] in said
    assert f"--set {' '.join(finding.changes)}" in said
    assert any(block in said for block in "▁▂▃▄▅▆▇█")
    assert json.loads(tree.read_text())["findings"] == [finding.tree()]
    text = html.unescape(page.read_text())
    assert finding.sentence[1:] in text
    assert text.count("data:image/png;base64,") == 1 + len(diagnose.overview(diagnose.Run(run)))
    assert "http" not in text


def test_of_a_healthy_run_it_says_so_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    run = next(run for run in MADE if fault(run) is None)
    with pytest.raises(SystemExit) as end:
        main(["doctor", str(run)])
    assert not end.value.code
    assert capsys.readouterr().out.splitlines()[-1] == "nothing wrong found"


def test_the_newest_run_is_looked_at_unless_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 2
    assert "no run has recorded anything" in capsys.readouterr().err
    for run in MADE[:2]:
        shutil.copytree(run, tmp_path / "runs" / run.name, copy_function=shutil.copyfile)
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert MADE[1].name in capsys.readouterr().out


def test_what_is_no_run_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run of detkit: it has no config\.yaml"):
        diagnose.Run(tmp_path)
    shutil.copyfile(MADE[0] / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"no steps\.csv"):
        diagnose.Run(tmp_path)
    (tmp_path / "steps.csv").write_text("step,loss_class\n1,two\n")
    with pytest.raises(UserError, match=r"steps\.csv: not a table"):
        diagnose.Run(tmp_path)


# Rules, by curves made up


def changed(tmp_path: Path, table: str, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A healthy run, whose table has been changed."""
    healthy = next(run for run in MADE if run.name == "healthy_yolo")
    run = tmp_path / "run"
    shutil.copytree(healthy, run, copy_function=shutil.copyfile)
    with (run / f"{table}.csv").open(encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    columns = dict(zip(head, np.array(rows, float).T, strict=True))
    change(columns)
    lines = [",".join(head), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    (run / f"{table}.csv").write_text("\n".join(lines) + "\n")
    return run


def test_a_loss_that_is_no_number_is_diverging_however_good_it_was(tmp_path: Path) -> None:
    def lose(steps: dict[str, np.ndarray]) -> None:
        steps["loss_class"][-1] = math.nan

    run = changed(tmp_path, "steps", lose)
    (finding,) = diagnose.diagnose(diagnose.Run(run))
    assert finding.name == "diverging"
    assert "no number any more in step 168" in finding.sentence


def test_a_run_that_waits_is_starved_beside_what_else_is_wrong(tmp_path: Path) -> None:
    def wait(steps: dict[str, np.ndarray]) -> None:
        steps["data_wait"][:] = 0.8
        steps["loss_class"][-1] = math.inf

    assert names(changed(tmp_path, "steps", wait)) == ["diverging", "data-starved"]


def test_one_bad_row_is_no_fault(tmp_path: Path) -> None:
    def spike(steps: dict[str, np.ndarray]) -> None:
        for name in ("loss_class", "loss_max", "grad", "grad_max", "update_backbone", "update_neck", "update_head"):
            steps[name][60] *= 1000
        steps["data_wait"][3] = 0.99

    assert names(changed(tmp_path, "steps", spike)) == []


@given(st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 1e30, math.inf, -math.inf, math.nan]), min_size=1, max_size=8))
def test_no_curve_is_too_odd(values: list[float]) -> None:
    run = diagnose.Run(MADE[0])
    for table in (run.steps, run.metrics, run.classes, run.evaluations):
        for name, column in table.items():
            if name not in ("step", "epoch"):
                table[name] = np.resize(values, len(column))
    run.loss, run.val_loss = np.resize(values, len(run.loss)), np.resize(values, len(run.val_loss))
    for finding in diagnose.diagnose(run):
        assert finding.sentence
        for curve in finding.plot.curves:
            assert diagnose.sparkline(curve.y, log=finding.plot.log)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_run_that_has_hardly_begun_has_no_fault(rows: int, tmp_path: Path) -> None:
    healthy = next(run for run in MADE if run.name == "healthy_ssd")
    shutil.copyfile(healthy / "config.yaml", tmp_path / "config.yaml")
    lines = (healthy / "steps.csv").read_text().splitlines(keepends=True)[: rows + 1]
    (tmp_path / "steps.csv").write_text("".join(lines))
    assert names(tmp_path) == []


def test_sparklines() -> None:
    assert diagnose.sparkline(np.arange(8.0)) == "▁▂▃▄▅▆▇█"
    assert diagnose.sparkline(np.array([1.0, math.nan, 3.0])) == "▁x█"
    assert diagnose.sparkline(10.0 ** np.arange(8), log=True) == "▁▂▃▄▅▆▇█"
    assert len(diagnose.sparkline(np.arange(1000.0))) == 40
    assert diagnose.sparkline(np.full(3, math.inf)) == "xxx"
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    run = diagnose.Run(next(run for run in MADE if fault(run) == "overfitting"))
    diagnose.report(run, diagnose.diagnose(run), Console(file=plain))
    plain.flush()  # written in ASCII alone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rate_high_yolo", "overfitting_ssd", "healthy_yolo"])
def test_runs_made_now_are_diagnosed_alike(name: str, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "faults.py"
    command = [sys.executable, str(script), str(tmp_path / "made"), "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "made" / name
    done = subprocess.run([sys.executable, "-m", "detkit", "doctor", str(run)], capture_output=True, text=True)
    wanted = fault(run)
    assert done.returncode == (1 if wanted else 0), done.stderr
    assert (f"1. {wanted}" if wanted else "nothing wrong found") in done.stdout
