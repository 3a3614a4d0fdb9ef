"""How long a run is, when it ends early, and which stages are frozen meanwhile."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from detkit import checkpoint, config, train
from detkit.data.batch import Batch
from detkit.errors import Interrupted, UserError
from detkit.nn.detector import Detector
from tests.test_train import TINY, same_weights, settings

STEPS = 3  # an epoch of shelf-mini has so many


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=300)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[train.Run], object]) -> None:
    """Do something before the step of that number (from 1) of the next run; and only once."""
    step, count = train.Run.train_step, 0

    def watched(run: train.Run, *pieces: Batch) -> dict[str, float]:
        nonlocal count
        count += 1
        if count == number:
            act(run)
        return step(run, *pieces)

    monkeypatch.setattr(train.Run, "train_step", watched)


def test_epochs_are_so_many_iterations(tmp_path: Path, console: Console) -> None:
    first = train.start(settings(tmp_path), console)
    second = train.start(settings(tmp_path, "train.epochs=null", f"train.iterations={2 * STEPS}"), console)
    same_weights(first, second)


def test_a_run_of_iterations_may_end_within_an_epoch(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings(tmp_path, "train.epochs=null", "train.iterations=5", "train.schedule.warmup_steps=0")
    whole = train.start(cfg, console)
    assert [row["epoch"] for row in rows(whole)] == ["1", "2"]
    state = checkpoint.read_state(whole)[0]
    assert state["finished"]
    assert state["schedule"]["last_epoch"] == 5
    assert float(rows(whole)[-1]["lr"]) == pytest.approx(cfg.train.optimizer.lr * cfg.train.schedule.final)
    assert float(rows(whole)[-1]["mAP"]) >= 0
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda run: train.signal.raise_signal(train.signal.SIGINT))
        with pytest.raises(Interrupted):
            train.start(cfg, console)
    stopped = tmp_path / "runs" / "ssd_shelf-2"
    train.resume(stopped, console)
    same_weights(whole, stopped)


def test_a_run_ends_when_it_gets_no_better(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    given, evaluate = iter([0.2, 0.3, 0.1, 0.3, 0.9]), train.evaluate

    def measured(*arguments: Any) -> dict[str, Any]:
        return evaluate(*arguments) | {"mAP": next(given)}

    monkeypatch.setattr(train, "evaluate", measured)
    run = train.start(settings(tmp_path, "train.epochs=9", "train.eval_every=1", "train.patience=2"), console)
    assert len(rows(run)) == 4
    assert checkpoint.read(run / "best.safetensors").epoch == 2
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 evaluations without a better mAP than 0.300 (train.patience)" in said
    with pytest.raises(UserError, match="finished"):
        train.resume(run, console)


def test_a_run_whose_time_is_up_is_measured_and_can_be_gone_on_with(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While stages are set free, and the rate falls by what evaluations say: what the one at the end says doesn't count
    for that."""
    small = settings(tmp_path)
    weights = tmp_path / "base.safetensors"
    torch.manual_seed(7)
    base = Detector(small.model, small.input, 16).state_dict()
    checkpoint.write(weights, base, small, tuple(f"class {i}" for i in range(16)), 1, {})
    more = [
        f"model.weights={weights}", "model.backbone.freeze=3", "train.unfreeze=[[1, 1], [2, 0]]", "train.epochs=3",
        "train.eval_every=1", "train.schedule={name: plateau, warmup_steps: 0, patience: 0, gamma: 0.5}",
        "train.optimizer.layer_decay=0.7",
    ]  # fmt: skip
    cfg = settings(tmp_path, *more)
    assert [cfg.frozen(epoch) for epoch in range(4)] == [3, 1, 0, 0]
    states: list[dict[str, Tensor]] = []
    epoch = train.Run.train_epoch

    def seen(run: train.Run, *arguments: Any) -> dict[str, float]:
        states.append({name: value.clone() for name, value in run.detector.state_dict().items()})
        figures = epoch(run, *arguments)
        states.append({name: value.clone() for name, value in run.detector.state_dict().items()})
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_epoch", seen)
        whole = train.start(cfg, console)
    assert len(states) == 6
    for before, after, frozen in zip(states[::2], states[1::2], (3, 1, 0), strict=True):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        stages = {f"backbone.features.{i}.": stage for i, stage in enumerate((0, 0, 1, 1, 2, 2, 2, 3, 3, 3))}
        moved = {stage for prefix, stage in stages.items() if any(name.startswith(prefix) for name in changed)}
        assert moved == set(range(frozen, 4))
        held = tuple(prefix for prefix, stage in stages.items() if stage < frozen)
        assert not any(name.startswith(held) for name in changed if held)

    with monkeypatch.context() as patch:
        at_step(patch, STEPS + 2, lambda run: setattr(run, "ends", 0.0))
        stopped = train.start(cfg, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"the time is up after step {STEPS + 2} of {3 * STEPS}; go on with  detkit train --resume {stopped}" in said
    last = checkpoint.read(stopped / "last.safetensors")
    assert 0 <= last.metrics["mAP"] <= 1
    assert not checkpoint.read_state(stopped)[0]["finished"]
    assert train.resume(stopped, console) == stopped
    same_weights(whole, stopped)
    assert [row["lr"] for row in rows(whole)] == [row["lr"] for row in rows(stopped)]


def test_time_that_is_up_at_once_still_leaves_a_measured_run(tmp_path: Path, console: Console) -> None:
    run = train.start(settings(tmp_path), console, ends=0)
    assert checkpoint.read(run / "best.safetensors").epoch == 0
    assert "the time is up after step 0 of 6" in console.file.getvalue()  # type: ignore[attr-defined]


def test_nothing_is_frozen_without_weights(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "model.backbone.freeze=3", "train.unfreeze=[[1, 2]]", "model.weights=none")
    assert [cfg.frozen(epoch) for epoch in range(3)] == [0, 0, 0]


def test_a_detector_is_held_and_set_free_as_if_built_so(tmp_path: Path) -> None:
    for norm in ("bn", "frozen"):
        cfg = settings(tmp_path, "model.weights=imagenet", f"model.norm={norm}", "model.backbone.frozen_bn=true")
        changing = Detector(cfg.model, cfg.input, 3).train()
        for freeze in (4, 1, 3, 0, 2):
            backbone = cfg.model.backbone.model_copy(update={"freeze": freeze})
            built = Detector(cfg.model.model_copy(update={"backbone": backbone}), cfg.input, 3).train()
            changing.hold(freeze)
            for one, other in zip(changing.parameters(), built.parameters(), strict=True):
                assert one.requires_grad == other.requires_grad
            for one, other in zip(changing.modules(), built.modules(), strict=True):
                assert one.training == other.training


@pytest.mark.slow
def test_stages_are_set_free_in_two_processes_as_in_one(tmp_path: Path) -> None:
    """DistributedDataParallel is made anew then, for it knows only what was to be trained when it was made."""
    small = settings(tmp_path)
    weights = tmp_path / "base.safetensors"
    state = Detector(small.model, small.input, 16).state_dict()
    checkpoint.write(weights, state, small, tuple(f"class {i}" for i in range(16)), 1, {})
    own = [
        *TINY, f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}", f"model.weights={weights}",
        "model.norm=frozen", "model.backbone.freeze=5", "train.unfreeze=[[1, 2]]", "train.ema=0",
        "train.optimizer={name: sgd, lr: 0.01}", "train.schedule.warmup_steps=0",
    ]  # fmt: skip
    for number in ("1", "2"):
        command = ["train", "-c", "ssd_shelf.yaml", "--nproc", number, "--set", *own]
        done = subprocess.run([sys.executable, "-m", "detkit", *command], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint.read(tmp_path / "runs" / f"ssd_shelf-{n}" / "last.safetensors").weights for n in (1, 2))
    moved = {name for name, tensor in one.items() if not torch.equal(tensor, state[name])}
    assert any(name.startswith("backbone.features.4.") for name in moved)  # of the third stage
    assert not any(name.startswith("backbone.features.3.") for name in moved)
    for name, tensor in one.items():
        assert (tensor - two[name]).double().norm() <= 1e-4 * tensor.double().norm(), name


@pytest.mark.slow
def test_minutes_on_the_command_line(tmp_path: Path) -> None:
    own = [*TINY, "train.epochs=1000", f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}"]
    command = ["train", "-c", "ssd_shelf.yaml", "--max-minutes", "0.3", "--set", *own]
    done = subprocess.run([sys.executable, "-m", "detkit", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the time is up after step " in done.stdout
    run = tmp_path / "runs" / "ssd_shelf-1"
    assert "mAP" in checkpoint.read(run / "last.safetensors").metrics
    assert config.load(run / "config.yaml").train.epochs == 1000
