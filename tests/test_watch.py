"""What is measured of a run in training, against plain arithmetic."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from detkit import config, loggers, matches, metrics, train, watch
from detkit.errors import UserError
from detkit.evaluate import Totals, evaluate
from detkit.nn.contract import Losses
from detkit.nn.detector import Detector, Trainable
from detkit.types import Batch, Detections, Record
from tests.test_distributed import HEADS, tiny
from tests.test_train import settings

QUIET = Console(quiet=True)


def prepared(tmp_path: Path, *more: str) -> tuple[train.Run, Batch]:
    run = train.Run(settings(tmp_path, "train.schedule.warmup_steps=0", *more), QUIET)
    return run, next(run.loader.epoch(0))


def weights(run: train.Run, group: str) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in getattr(run.detector, group).parameters()])


# Steps


def test_norms_and_moves_are_those_of_the_step_and_training_is_as_without(tmp_path: Path) -> None:
    run, batch = prepared(tmp_path, "train.clip_norm=0.5")
    before = {group: weights(run, group).clone() for group in watch.GROUPS}
    gradients: dict[str, torch.Tensor] = {}
    measure = run.watch.gradients

    def keep(step: int) -> torch.Tensor:
        for group in watch.GROUPS:
            gradients[group] = torch.cat([p.grad.flatten() for p in getattr(run.detector, group).parameters()])
        gradients["first"] = run.detector.backbone.features[0][0].weight.grad.clone()  # type: ignore[index, union-attr]
        total = nn.utils.get_total_norm([p.grad for p in run.detector.parameters() if p.grad is not None])
        wanted = [p.grad * 0.5 / (total + 1e-6) for p in run.detector.parameters() if p.grad is not None]
        norm: torch.Tensor = measure(step)
        for parameter, gradient in zip(run.detector.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=0)
        return norm

    run.watch.gradients = keep  # type: ignore[method-assign]
    lr = run.optimizer.param_groups[-1]["lr"]
    losses = run.train_step(batch)
    row = run.watch.step(1, losses, images=8, waited=0.5, seconds=2.0)
    assert row is not None
    norms = {name: float(value.double().norm()) for name, value in gradients.items()}
    total = math.hypot(*(norms[group] for group in watch.GROUPS))
    assert row["grad"] == row["grad_max"] == pytest.approx(total, rel=1e-5)
    assert row["grad_first"] == pytest.approx(norms["first"], rel=1e-5)
    for group in watch.GROUPS:
        assert row[f"grad_{group}"] == pytest.approx(norms[group], rel=1e-5)
        moved = float((weights(run, group) - before[group]).double().norm() / before[group].double().norm())
        assert row[f"update_{group}"] == pytest.approx(moved, rel=1e-3)
    assert (row["clipped"], row["skipped"], row["img_s"], row["data_wait"], row["lr"]) == (1, 0, 4, 0.25, lr)
    assert row["loss_class"] == losses["class"]
    assert row["loss_max"] == pytest.approx(sum(losses.values()))
    assert row["memory"] > 100


def test_a_run_of_any_length_has_a_bounded_number_of_rows(tmp_path: Path) -> None:
    detector = Detector(settings(tmp_path).model, settings(tmp_path).input, 3)
    for steps in (1, 64, 65, 1000, 1001, 10**6 + 1):
        seen = watch.Watch(detector, steps, 0)
        ends = [step for step in range(1, steps + 1) if seen.ends_row(step)]
        assert ends[-1] == steps
        assert ends[:64] == list(range(1, min(steps, 64) + 1))
        assert len(ends) <= watch.ROWS + watch.FIRST + 1
        assert len(ends) > min(steps, watch.ROWS) / 2


class Kept(loggers.Loggers):
    """Rows, as they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int, dict[str, float]]] = []

    def scalars(self, table: loggers.Table, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((table, step, dict(values)))


def test_a_row_is_the_mean_of_its_steps_and_survives_being_saved_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "FIRST", 0)
    monkeypatch.setattr(watch, "ROWS", 2)  # of 6 steps: rows of three
    run, batch = prepared(tmp_path, "train.clip_norm=0")
    run.log = kept = Kept()
    norms, losses = [], []
    for seconds in (1.0, 2.0, 5.0):
        losses.append(run.train_step(batch))
        norms.append(float(nn.utils.get_total_norm([p.grad for p in run.detector.parameters() if p.grad is not None])))
        run._note(losses[-1], 0.5, seconds)
        buffer = io.BytesIO()
        torch.save(run.watch.state_dict(), buffer)
        buffer.seek(0)
        run.watch.load_state_dict(torch.load(buffer, weights_only=True))
    ((table, step, row),) = kept.rows
    assert (table, step) == ("steps", 3)
    assert row["grad"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert row["grad_max"] == pytest.approx(max(norms), rel=1e-5)
    assert row["loss_box"] == pytest.approx(np.mean([each["box"] for each in losses]))
    assert row["loss_max"] == pytest.approx(max(sum(each.values()) for each in losses))
    assert (row["img_s"], row["data_wait"], row["clipped"]) == (3 * 8 / 8, 1.5 / 8, 0)


def test_what_is_frozen_has_no_gradient_to_be_told(tmp_path: Path) -> None:
    run, batch = prepared(tmp_path)
    run.detector.backbone.requires_grad_(False)
    losses = run.train_step(batch)
    row = run.watch.step(1, losses, images=8, waited=0, seconds=1)
    assert row is not None
    assert math.isnan(row["grad_backbone"])
    assert math.isnan(row["update_backbone"])
    assert row["grad_first"] > 0  # of the neck's
    assert row["grad"] == pytest.approx(math.hypot(row["grad_neck"], row["grad_head"]), rel=1e-5)
    run.detector.backbone.requires_grad_(True)
    losses = run.train_step(batch)
    row = run.watch.step(2, losses, images=8, waited=0, seconds=1)
    assert row is not None
    assert row["grad_backbone"] > 0


def test_a_step_that_the_scaler_leaves_out_is_counted_and_spoils_no_mean(tmp_path: Path) -> None:
    run, _ = prepared(tmp_path)
    seen = run.watch
    for parameter in run.detector.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    seen.ends_row = lambda step: step == 2  # type: ignore[method-assign]
    seen.gradients(1)
    seen.moved([0.1])
    assert seen.step(1, {"a": 1.0}, images=8, waited=0, seconds=1) is None
    next(run.detector.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
    seen.gradients(2)
    seen.moved([0.1])
    row = seen.step(2, {"a": 1.0}, images=8, waited=0, seconds=1)
    assert row is not None
    assert row["skipped"] == 1
    assert row["grad"] == pytest.approx(1e-3 * math.sqrt(sum(p.numel() for p in run.detector.parameters())), rel=1e-4)


def test_a_loss_that_is_not_finite_leaves_a_last_row(tmp_path: Path) -> None:
    more = ("train.optimizer.lr=1e18", "train.clip_norm=0", "train.epochs=9", "train.schedule.warmup_steps=0")
    with pytest.raises(UserError, match="not finite"):
        train.start(settings(tmp_path, *more), QUIET)
    lines = (tmp_path / "runs" / "ssd_shelf-1" / "steps.csv").read_text().splitlines()
    head, *rows = (line.split(",") for line in lines)
    assert [row[0] for row in rows] == [str(step) for step in range(1, len(rows) + 1)]
    assert not all(math.isfinite(float(row[head.index("loss_class")])) for row in rows[-1:])
    assert all(len(row) == len(head) for row in rows)


# Evaluations


@pytest.mark.parametrize("head", HEADS)
def test_the_validation_loss_is_that_of_the_averaged_weights_and_detections_stay(head: str, tmp_path: Path) -> None:
    run = train.Run(tiny(head, tmp_path), QUIET)
    run.predictor.follow(run.detector, 0)
    totals = Totals()
    found = []
    with torch.inference_mode():
        for batch in run.val_loader.epoch():
            outputs, losses = run.predictor.measure(batch)
            totals.add(losses)
            plain = run.predictor(batch.images)
            found += [torch.equal(one, other) for one, other in zip(outputs, plain, strict=True)]
            again = run.predictor.measure(batch)[1]
            assert {name: float(v) for name, v in again.sums.items()} == {n: float(v) for n, v in losses.sums.items()}
            if not run.detector.head.two_stage:
                wanted: Losses = Trainable(run.predictor.detector)(batch)
                for name, value in wanted.sums.items():
                    assert float(losses.sums[name]) == pytest.approx(float(value), rel=1e-5)
    assert all(found)
    figures = evaluate(run.predictor, run.val_loader, run.val_data, run.device, QUIET)
    assert figures["losses"] == totals.means()
    assert all(math.isfinite(value) and value > 0 for value in figures["losses"].values())


def seen(detector: Detector, images: torch.Tensor) -> dict[str, float]:
    return watch.look(detector, detector, images, histograms=False).shares


def test_dead_and_like_channels_are_counted_and_looking_changes_nothing(tmp_path: Path) -> None:
    run, batch = prepared(tmp_path)
    images = run.detector.normalise(batch.images)
    averaged = run.predictor.detector
    before = {name: value.clone() for name, value in averaged.state_dict().items()}
    healthy = watch.look(averaged, run.detector, images, histograms=True)
    after = averaged.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(layer.training for layer in averaged.modules())
    assert not any(layer._forward_hooks for layer in averaged.modules())
    assert healthy.shares["dead_backbone"] < 0.05
    assert math.isnan(healthy.shares["dead_head"])  # this head has no activations
    assert healthy.shares["alike"] < 0.05
    assert {name.partition("/")[0] for name in healthy.histograms} == {"activations"}
    stem = healthy.histograms["activations/backbone.features.0.2"]
    assert stem.counts.sum() == 8 * 16 * 48 * 64
    assert stem.edges[0] >= 0

    norm = run.detector.backbone.features[0][1]  # type: ignore[index]
    with torch.no_grad():
        norm.bias[:4] = -50
    some = seen(run.detector, images)
    assert some["dead_most"] == 4 / 16
    assert 0 < some["dead_backbone"] < 4 / 16
    with torch.no_grad():
        norm.bias.zero_()
        norm.weight[:4], run.detector.backbone.features[0][0].weight[:4] = 1, 0.1  # type: ignore[index]
    assert seen(run.detector, images)["alike"] > some["alike"]
    with torch.no_grad():
        for parameter in run.detector.parameters():
            parameter.zero_()
    assert seen(run.detector, images)["dead_backbone"] == 1


def test_one_activation_behind_layers_of_several_widths_is_seen_behind_each() -> None:
    """As in a ResNet50's blocks, whose ReLU follows 64, 64 and 256 channels."""
    noted = watch.Seen(histograms=True)
    live = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for output in (live, torch.zeros(2, 12, 3, 3), live):
        noted.note("backbone.relu", output)
    assert noted.shares["dead_backbone"] == 12 / 16
    assert noted.shares["dead_most"] == 1
    assert list(noted.histograms) == ["activations/backbone.relu"]


def test_curves_are_those_whose_area_is_ap() -> None:
    rng = np.random.default_rng(0)
    records, found = [], []
    for _ in range(30):
        corners = rng.uniform(0, 60, (4, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 40, (4, 2))], 1)
        records.append(Record("a.jpg", (100, 100), boxes, rng.integers(0, 2, 4), np.zeros(4, np.uint8)))
        moved = (boxes + rng.normal(0, 4, boxes.shape)).astype(np.float32)
        scores = -np.sort(-rng.uniform(0, 1, 4)).astype(np.float32)
        found.append(Detections(moved, scores, rng.integers(0, 2, 4), (100, 100)))
    names = ("a", "b", "never there")
    pool = matches.pool(records, found, names)
    curves = metrics.curves(pool, matches.match(pool, (0.5,)).state[0, 0])
    ap = metrics.of_pool(pool)["per_class"]
    assert set(curves) == {"a", "b"}
    for name, curve in curves.items():
        assert curve.shape == (metrics.RECALLS,)
        assert (np.diff(curve) <= 1e-12).all()
        assert curve.mean() == pytest.approx(ap[name][1])


def test_samples_show_truth_and_detections_side_by_side(tmp_path: Path) -> None:
    run, _ = prepared(tmp_path)
    data = run.val_data
    blank = [Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), (360, 480))] * 8
    none = watch.samples(data, blank, 0.3)
    assert list(none) == [f"samples/{n}" for n in range(1, 5)]
    record = data[0]
    right = Detections(
        record.boxes.astype(np.float32), np.full(len(record.labels), 0.9, np.float32), record.labels, record.hw
    )
    some = watch.samples(data, [right, *blank[1:]], 0.3)
    image, other = none["samples/1"], some["samples/1"]
    assert image.shape == other.shape
    half = image.shape[1] // 2
    assert abs(image.shape[1] / image.shape[0] - 8 / 3) < 0.05  # two photos of 4 to 3
    assert np.array_equal(image[:, : half - 4], other[:, : half - 4])
    assert not np.array_equal(image[:, half + 4 :], other[:, half + 4 :])


def test_histograms_come_at_the_evaluation_that_follows(tmp_path: Path) -> None:
    cfg = config.load("ssd_shelf", ["train.eval_every=4", "train.histograms=6"]).train
    assert [epoch + 1 for epoch in range(3, 40, 4) if cfg.due(epoch, cfg.histograms)] == [8, 12, 20, 24, 32, 36]
    assert not any(cfg.due(epoch, 0) for epoch in range(40))
