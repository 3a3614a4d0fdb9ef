"""The range test: what it suggests for a curve, how it trains, and whether its suggestion is worth anything."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from detkit import config, lr_find, train
from detkit.errors import UserError
from tests.test_train import settings

RATES = np.geomspace(1e-6, 10, 150)


def losses(fall: float = 0.01, noise: float = 0.0, seed: int = 0) -> NDArray[np.float64]:
    """From 6 to 4, half of it at a rate of `fall`, nine tenths at three times that; then up from 30 times it on."""
    at = np.log10(RATES / fall)
    curve = 6 - 2 / (1 + np.exp(-4.6 * at)) + np.maximum(0, RATES / fall / 30 - 1)
    return np.asarray(curve * (1 + noise * np.random.default_rng(seed).standard_normal(len(RATES))))


def rate(values: NDArray[np.float64], rates: NDArray[np.float64] = RATES) -> float:
    found = lr_find.suggest(lr_find.Curve(rates, values)).rate
    assert found
    return found


@pytest.mark.parametrize("fall", [1e-4, 1e-3, 0.01, 0.1])
def test_the_suggestion_is_where_the_last_of_the_fall_is_done(fall: float) -> None:
    """By the formula, seven tenths of it are done at 1.5 times the rate that half of it is done at, and all but 2% at
    six times."""
    assert 1.5 * fall < rate(losses(fall)) < 6 * fall


@given(st.floats(1e-3, 1e3), st.floats(1e-2, 1e2))
def test_the_unit_of_the_loss_does_not_matter_and_that_of_the_rate_does(unit: float, factor: float) -> None:
    before = rate(losses())
    assert rate(losses() * unit) == before
    assert rate(losses(), RATES * factor) == pytest.approx(before * factor, rel=0.06)  # of two digits


@given(st.integers(0, 10_000), st.floats(0, 0.04))
def test_noise_moves_it_little(seed: int, noise: float) -> None:
    assert 1 / 2.5 < rate(losses(noise=noise, seed=seed)) / rate(losses()) < 2.5


@given(st.integers(0, 139), st.floats(1.5, 1e6))
def test_a_bad_mini_batch_does_not_count(at: int, factor: float) -> None:
    values = losses()
    values[at] *= factor
    found = lr_find.Curve(RATES, values)
    if at > 8:  # not one of those that tell where the loss begins
        assert rate(values) == pytest.approx(rate(losses()), rel=0.25)
    assert found.smoothed().max() < 40


def test_a_loss_that_does_not_fall_suggests_nothing() -> None:
    for values in (np.full(150, 3.0), np.linspace(3, 9, 150), 3 + 0.01 * np.sin(np.arange(150.0))):
        found = lr_find.suggest(lr_find.Curve(RATES, values))
        assert found.rate is None
        assert "falls at no rate from 1e-06 to 10" in found.reason


def test_the_reason_says_what_the_curve_shows() -> None:
    found = lr_find.suggest(lr_find.Curve(RATES, losses()))
    assert "the loss begins at 6 and is lowest, 4.1" in found.reason
    assert f"the last 30% of that fall are done around {found.rate:g}" in found.reason
    assert "on it is higher than at first" in found.reason
    low = RATES < 0.02
    assert "try a higher --max" in lr_find.suggest(lr_find.Curve(RATES[low], losses()[low])).reason


def test_the_last_loss_may_be_infinite() -> None:
    values = losses()[:130]
    values[-1] = math.inf
    found = lr_find.Curve(RATES[:130], values)
    assert np.isfinite(found.smoothed()).all()
    assert rate(values, RATES[:130]) == pytest.approx(rate(losses()), rel=0.1)
    assert lr_find.plot(found, lr_find.suggest(found), "x").startswith(b"\x89PNG")


def small(tmp_path: Path, *more: str) -> config.Config:
    own = ["input.size=[64, 96]", "train.cache=ram", "augment.crop=0", "train.save_steps=0"]
    cfg: config.Config = settings(tmp_path, *own, *more)  # type: ignore[no-untyped-call]
    return cfg


def test_each_group_keeps_its_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train.Run(small(tmp_path, "train.optimizer.backbone_lr=0.1"), Console(quiet=True))
    seen: list[set[float]] = []

    def step(run: train.Run, *_: Any) -> dict[str, float]:
        seen.append({group["lr"] for group in run.optimizer.param_groups})
        return {"a": 1.0, "b": 2.0}

    monkeypatch.setattr(train.Run, "train_step", step)
    rates = np.geomspace(1e-4, 1e-2, 7)
    curve = lr_find.sweep(run, rates)
    assert [sorted(lrs) for lrs in seen] == [pytest.approx([rate / 10, rate]) for rate in rates]
    assert (curve.losses == 3).all()


@pytest.mark.parametrize("end", [math.inf, math.nan, 1e9, train.NotFiniteError("step 3: not finite: class")])
def test_it_ends_when_the_loss_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Any) -> None:
    given, told = iter([3.0, 2.9, 2.8, end]), []

    def step(*_: Any) -> dict[str, float]:
        value = next(given)
        if isinstance(value, UserError):
            raise value
        return {"loss": value}

    monkeypatch.setattr(train.Run, "train_step", step)
    run = train.Run(small(tmp_path), Console(quiet=True))
    curve = lr_find.sweep(run, RATES, lambda done, total: told.append((done, total)))
    assert len(curve.rates) == len(curve.losses) == 4
    assert told[-1] == (4, 150)


def test_it_leaves_a_picture_and_a_table_and_no_run(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=300)
    cfg = small(tmp_path, "train.accumulate=2")
    folders = [lr_find.run(cfg, 1e-4, 1e-2, 20, console) for _ in range(2)]
    assert [folder.name for folder in folders] == ["ssd_shelf-lr-find-1", "ssd_shelf-lr-find-2"]
    assert {path.name for path in folders[0].iterdir()} == {lr_find.PICTURE, lr_find.TABLE}
    tables = [list(csv.DictReader((folder / lr_find.TABLE).open(encoding="utf-8"))) for folder in folders]
    assert tables[0] == tables[1]  # nothing random is left to chance
    assert [float(row["lr"]) for row in tables[0]] == pytest.approx(list(np.geomspace(1e-4, 1e-2, 20)), rel=1e-5)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"plot: {folders[0] / lr_find.PICTURE}" in text
    assert {path.name for path in cfg.runs.iterdir()} == {folder.name for folder in folders}
    with pytest.raises(UserError, match=r"--min 0\.1 --max 0\.001"):
        lr_find.run(cfg, 0.1, 0.001, 20, console)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["{name: sgd, lr: 1}", "{name: adamw, lr: 1, weight_decay: 0.05}"])
def test_the_suggestion_trains_better_than_a_tenth_and_ten_times_of_it(tmp_path: Path, optimizer: str) -> None:
    """60 steps on shelf-mini's 24 photos, measured on the same: what a rate can learn."""
    more = [f"train.optimizer={optimizer}", "train.overfit=24", "train.epochs=20", "train.eval_every=20"]
    cfg = small(tmp_path, *more, "train.schedule.warmup_steps=5", "train.ema=0.9")
    console = Console(file=io.StringIO(), width=300)
    lr_find.run(cfg, 1e-6, 10, 100, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in text.splitlines() if line.startswith("--set train.optimizer.lr=")]
    suggested = float(line.partition("=")[2])
    best = {}
    for factor in (1, 0.1, 10):
        lr = cfg.train.optimizer.model_copy(update={"lr": suggested * factor})
        run = train.start(cfg.model_copy(update={"train": cfg.train.model_copy(update={"optimizer": lr})}), console)
        with (run / "metrics.csv").open(encoding="utf-8") as file:
            best[factor] = max(float(row["mAP"]) for row in csv.DictReader(file) if row["mAP"] != "nan")
    assert best[1] > 2 * best[0.1], best
    assert best[1] > 2 * best[10], best
