"""Where a run's record goes, and that it is the same whether or not the run was stopped."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from detkit import checkpoint, config, loggers, train
from detkit.data import cache
from detkit.errors import Interrupted, UserError
from detkit.evaluate import evaluate
from detkit.loggers import Histogram
from detkit.types import CROWD, DIFFICULT, Batch
from tests.test_train import settings

QUIET = Console(quiet=True)
TIMED = ("img_s", "data_wait", "memory", "seconds")  # what no two runs have in common


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def untimed(path: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows(path)]


def events(run: Path) -> Any:
    """What TensorBoard makes of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0: keep all of them
    read = EventAccumulator(str(run), size_guidance=dict.fromkeys(("scalars", "images", "histograms"), 0))
    return read.Reload()


# CSV


def test_rows_beyond_the_saved_step_and_half_a_line_are_left_out(tmp_path: Path) -> None:
    files = loggers.CSVFiles(tmp_path, 0)
    for step in (1, 2, 3):
        files.scalars("steps", step, {"loss": 1 / step, "none": math.nan})
    files.scalars("metrics", 3, {"mAP": 1e-7})
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("4,0.2")
    again = loggers.CSVFiles(tmp_path, 2)
    assert again.past == {"steps": 3, "metrics": 3, "classes": 0}
    again.scalars("steps", 3, {"loss": 0.5, "none": 1.0})
    assert [tuple(row.values()) for row in rows(tmp_path / "steps.csv")] == [
        ("1", "1", "nan"), ("2", "0.5", "nan"), ("3", "0.5", "1"),
    ]  # fmt: skip
    assert rows(tmp_path / "metrics.csv") == []


# TensorBoard


def test_tensorboard_shows_what_was_told_and_only_once_after_a_resume(tmp_path: Path) -> None:
    image = np.full((20, 30, 3), 200, np.uint8)
    figure = Figure(figsize=(2, 1), dpi=100)
    counts = np.array([1, 0, 3])
    histogram = Histogram(counts, np.linspace(-1.0, 2.0, 4), 4.0, 9.0)
    first = loggers.TensorBoard(tmp_path, 0)
    for step in (1, 2, 3):
        first.scalars("steps", step, {"loss": float(step), "none": math.nan})
    first.close()
    second = loggers.TensorBoard(tmp_path, 2)
    second.scalars("steps", 3, {"loss": 30.0})
    second.images(3, {"samples/1": image})
    second.figures(3, {"curve": figure})
    second.histograms(3, {"weights/stem": histogram})
    second.close()
    seen = events(tmp_path)
    assert [(e.step, e.value) for e in seen.Scalars("steps/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "steps/none" not in seen.Tags()["scalars"]
    assert [(e.width, e.height) for e in (*seen.Images("samples/1"), *seen.Images("curve"))] == [(30, 20), (200, 100)]
    value = seen.Histograms("weights/stem")[0].histogram_value
    assert (value.num, value.min, value.max, value.sum) == (4, -1, 2, 4)
    assert value.bucket == [1, 0, 3]


# Services


class Told:
    """A stand-in for a service: what it was told, as (method, step, names)."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fails = False


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Told:
    """A wandb module that keeps what it is told."""
    told, module = Told(), ModuleType("wandb")

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            if told.fails:
                raise ConnectionError("no such host\nand more")
            told.calls.append((step, sorted(values)))

        def finish(self) -> None:
            told.calls.append("finished")

    def init(**arguments: Any) -> Run:
        told.calls.append({name: arguments[name] for name in ("id", "name", "resume")})
        return Run()

    members = {"init": init, "Settings": SimpleNamespace, "Image": lambda image: image}
    for name, member in (members | {"Histogram": lambda np_histogram: np_histogram}).items():
        setattr(module, name, member)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_a_service_is_not_told_again_what_it_knows(tmp_path: Path, wandb: Told) -> None:
    cfg = settings(tmp_path, "train.loggers=[wandb]")
    for step in (0, 1):  # resumed from the state after step 1
        log = loggers.open_all(tmp_path, cfg, step, QUIET)
        for at in range(step + 1, 4):
            log.scalars("steps", at, {"loss": 1.0, "none": math.nan})
        log.images(3, {"sample": np.zeros((2, 2, 3), np.uint8)})
        log.scalars("metrics", 3, {"mAP": 0.5})
        log.close()
    begun = [call for call in wandb.calls if isinstance(call, dict)]
    assert begun[0] == begun[1]
    assert begun[0]["resume"] == "allow"
    assert [call for call in wandb.calls if isinstance(call, tuple)] == [
        (1, ["steps/loss"]), (2, ["steps/loss"]), (3, ["steps/loss"]), (3, ["sample"]), (3, ["metrics/mAP"]),
    ]  # fmt: skip
    assert [row["step"] for row in rows(tmp_path / "steps.csv")] == ["1", "2", "3"]


def test_a_service_that_fails_is_left_out_and_the_run_goes_on(tmp_path: Path, wandb: Told) -> None:
    console = Console(file=io.StringIO(), width=200)
    log = loggers.open_all(tmp_path, settings(tmp_path, "train.loggers=[wandb]"), 0, console)
    wandb.fails = True
    for step in (1, 2):
        log.scalars("steps", step, {"loss": 1.0})
    log.close()
    assert console.file.getvalue() == "WandB is told no more: no such host\n"  # type: ignore[attr-defined]
    assert len(rows(tmp_path / "steps.csv")) == 2
    assert not log.pictures


def test_a_full_disk_is_no_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = loggers.open_all(tmp_path, settings(tmp_path, "train.loggers=[]"), 0, QUIET)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(loggers.CSVFiles, "scalars", full)
    with pytest.raises(OSError, match="No space"):
        log.scalars("steps", 1, {"loss": 1.0})


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_named_before_anything_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"pip install 'detkit\[{name}\]'"):
        train.start(settings(tmp_path, f"train.loggers=[{name}]"), QUIET)
    assert not (tmp_path / "runs").exists()


def test_mlflow_keeps_the_record_in_its_own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    cfg = settings(tmp_path, "train.loggers=[mlflow]")
    run = tmp_path / "run-1"
    run.mkdir()
    for step in (0, 1):
        log = loggers.open_all(run, cfg, step, QUIET)
        for at in range(step + 1, 4):
            log.scalars("steps", at, {"loss": 1 / at, "AP/tin (large)": 0.5})
        log.images(3, {"sample": np.zeros((2, 2, 3), np.uint8)})
        log.histograms(3, {"weights": Histogram(np.array([1]), np.array([0.0, 1.0]), 1.0, 1.0)})
        log.scalars("metrics", 3, {"mAP": 0.5})
        log.close()
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("detkit").experiment_id])
    assert found.info.run_name == "run-1"
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "steps/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert "steps/AP/tin _large_" in found.data.metrics
    assert {item.path for item in client.list_artifacts(found.info.run_id)} == {"config.yaml", "histograms", "sample"}


def test_wandb_keeps_the_record_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = loggers.open_all(tmp_path, settings(tmp_path, "train.loggers=[wandb]"), 0, QUIET)
    log.scalars("steps", 1, {"loss": 1.0})
    log.images(1, {"sample": np.zeros((2, 2, 3), np.uint8)})
    log.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while b"steps/loss" not in kept.read_bytes():  # another process writes it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))


# Whole runs


def test_a_run_records_what_a_practitioner_looks_at(tmp_path: Path) -> None:
    run = train.start(settings(tmp_path, "train.loggers=[tensorboard]", "train.histograms=2"), QUIET)
    steps, metrics, classes = (rows(run / f"{name}.csv") for name in loggers.TABLES)
    assert [row["step"] for row in steps] == [str(n) for n in range(1, 7)]
    assert [row["step"] for row in metrics] == ["3", "6"]
    assert [row["step"] for row in classes] == ["6"]
    assert all(float(row["grad"]) > 0 and 0 < float(row["update_head"]) < 1 for row in steps)
    losses = [float(row["loss_class"]) for row in steps]
    assert float(metrics[0]["loss_class"]) == pytest.approx(np.mean(losses[:3]), rel=1e-4)
    assert math.isnan(float(metrics[0]["val_loss_class"]))
    assert float(metrics[1]["val_loss_class"]) > 0
    assert 0 <= float(metrics[1]["dead_backbone"]) <= 1
    mean = np.mean([float(value) for name, value in classes[0].items() if name.startswith("AP/")])
    assert mean == pytest.approx(float(metrics[1]["mAP"]), abs=1e-6)
    seen = events(run)
    assert {f"steps/{name}" for name in steps[0] if name != "step"} <= {*seen.Tags()["scalars"]}
    assert {*seen.Tags()["images"]} == {"precision_recall", *(f"samples/{n}" for n in range(1, 5))}
    weights = [name for name in seen.Tags()["histograms"] if name.startswith("weights/")]
    assert "weights/backbone.features.0.0.weight" in weights
    assert len(seen.Tags()["histograms"]) > len(weights)  # activations
    counts = config.yaml.safe_load((run / loggers.CLASSES).read_text())
    data = cache.load(settings(tmp_path).data, "val")
    easy = (data.flags & (DIFFICULT | CROWD)) == 0
    assert counts["milk"]["val"] == sum(easy & (data.labels == data.classes.index("milk")))
    assert 0 < sum(each["val"] for each in counts.values()) < len(data.labels)  # some are difficult


@pytest.mark.parametrize("killed", [True, False])
def test_a_resumed_run_records_what_an_unbroken_one_does(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped within a row of two steps; or killed three steps and an evaluation after its last state."""
    more = ["train.epochs=3", "train.eval_every=1", "train.loggers=[tensorboard]", "train.save_steps=4"]
    monkeypatch.setattr("detkit.watch.FIRST", 1)
    monkeypatch.setattr("detkit.watch.ROWS", 5)
    whole = train.start(settings(tmp_path, *more), QUIET)
    assert [row["step"] for row in rows(whole / "steps.csv")] == ["1", "2", "4", "6", "8", "9"]
    step, done, state = train.Run.train_step, 0, b""

    def stopping(run: train.Run, *pieces: Batch) -> dict[str, float]:
        nonlocal done, state
        done += 1
        if done == 5:
            state = (run.folder / checkpoint.STATE).read_bytes()
            if not killed:
                train.signal.raise_signal(train.signal.SIGINT)
        if done == 8:
            (run.folder / checkpoint.STATE).write_bytes(state)
            raise ZeroDivisionError
        return step(run, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_step", stopping)
        with pytest.raises(ZeroDivisionError if killed else Interrupted):
            train.start(settings(tmp_path, *more), QUIET)
    run = tmp_path / "runs" / "ssd_shelf-2"
    train.resume(run, QUIET)
    for name in loggers.TABLES:
        assert untimed(run / f"{name}.csv") == untimed(whole / f"{name}.csv"), name
    seen, wanted = events(run), events(whole)
    for tag in ("steps/grad", "metrics/mAP", "classes/AP/milk"):
        assert [e.step for e in seen.Scalars(tag)] == [e.step for e in wanted.Scalars(tag)], tag
    assert [e.step for e in seen.Images("samples/1")] == [3, 6, 9]


def test_an_evaluation_that_was_recorded_but_not_saved_is_not_recorded_twice(tmp_path: Path) -> None:
    """Killed after an epoch's row was written and before its state was, which comes again from the state before."""
    cfg = settings(tmp_path, "train.epochs=3", "train.eval_every=1", "train.loggers=[tensorboard]")
    whole = train.start(cfg, QUIET)

    def killed(run: train.Run, _figures: dict[str, Any]) -> None:
        if run.epoch == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train.start(cfg, QUIET, judge=killed)
    run = tmp_path / "runs" / "ssd_shelf-2"
    assert [row["epoch"] for row in rows(run / "metrics.csv")] == ["1", "2"]
    train.resume(run, QUIET)
    for name in loggers.TABLES:
        assert untimed(run / f"{name}.csv") == untimed(whole / f"{name}.csv"), name
    # There it comes twice, at one place.
    assert [(e.step) for e in events(run).Scalars("metrics/mAP")] == [3, 6, 6, 9]


def test_what_older_checkpoints_say_of_tensorboard_is_understood(tmp_path: Path) -> None:
    tree = settings(tmp_path).model_dump(mode="json")
    del tree["train"]["loggers"]
    for old, new in ((True, ("tensorboard",)), (False, ())):
        assert config.parse(tree | {"train": tree["train"] | {"tensorboard": old}}, "old").train.loggers == new
    with pytest.raises(UserError, match=r"no setting 'train\.tensorboard'"):
        settings(tmp_path, "train.tensorboard=false")
    with pytest.raises(UserError, match=r"train\.loggers"):
        settings(tmp_path, "train.loggers=[tensorbord]")


@pytest.mark.slow
def test_of_two_processes_the_first_alone_records_and_for_both(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "train.epochs=1", "train.eval_every=1", "train.device=cpu")
    (tmp_path / "both.yaml").write_text(config.dump(cfg))
    command = ["train", "--config", str(tmp_path / "both.yaml"), "--nproc", "2"]
    done = subprocess.run([sys.executable, "-m", "detkit", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "ssd_shelf-1"
    assert [row["step"] for row in rows(run / "steps.csv")] == ["1", "2", "3"]
    (row,) = rows(run / "metrics.csv")
    # The validation loss is of all photos: what one process measures with the same weights.
    predictor = checkpoint.read(run / "last.safetensors").predictor()
    alone = train.Run(cfg, QUIET)
    figures = evaluate(predictor, alone.val_loader, alone.val_data, alone.device, QUIET)
    for name, value in figures["losses"].items():
        assert float(row[f"val_loss_{name}"]) == pytest.approx(value, rel=1e-4)
