"""Every shipped config goes the whole way on shelf-mini: training, evaluation, export, prediction with both files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from detkit import config
from detkit.cli import main

SHELF = Path(__file__).parent.parent / "datasets" / "shelf-mini"
NAMES = sorted(path.stem for path in (SHELF.parent.parent / "configs").glob("*.yaml"))
FEW = [
    f"data.root={SHELF}", "model.weights=none", "train.epochs=1", "train.eval_every=1", "train.batch_size=8",
    "train.workers=0", "train.progressive=[]", "train.recalibrate_bn=0", "train.loggers=[]",
    "train.precision=fp32", "train.schedule.warmup_steps=0", "input.size=[64, 96]",
]  # fmt: skip
# As small as each still is itself.
SMALL = {
    "faster_rcnn_mobilenet": ["model.backbone.width=0.35", "model.neck.channels=16", "model.head.width=32"],
    "faster_rcnn_resnet": ["model.backbone.name=resnet18", "model.neck.channels=16", "model.head.width=32"],
    "faster_rcnn_vgg": ["model.backbone.name=vgg11", "model.head.width=32"],
    "ssd_mobilenet": ["model.backbone.width=0.35", "model.neck.channels=16"],
    "ssd_resnet": ["model.backbone.name=resnet18", "model.neck.channels=16"],
    "ssd_shelf": ["model.backbone.width=0.35", "model.neck.channels=16"],
    "ssd_vgg": ["model.backbone.name=vgg11", "input.size=[300, 300]", "train.batch_size=2",
        "train.epochs=null", "train.iterations=3",
    ],
    "yolo_nano": ["model.backbone.width=0.25", "model.neck.channels=16", "model.head.channels=16"],
    "yolo_resnet": ["model.backbone.name=resnet18", "model.neck.channels=16", "model.head.channels=16"],
    "yolo_v1_vgg": [
        "model.backbone.name=vgg11", "model.head.grid=3", "model.head.channels=16", "model.head.hidden=16",
        "input.size=[96, 96]",
    ],
}  # fmt: skip


# Two thirds of the time of all ten; what is left has each head and each kind of backbone.
SLOW = ("faster_rcnn_resnet", "faster_rcnn_vgg", "ssd_mobilenet", "ssd_resnet", "ssd_vgg")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NAMES])
def test_the_whole_way(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = sorted((SHELF / "JPEGImages").iterdir())[:2]
    own = [f"data.cache={tmp_path / 'cache'}", *FEW, *SMALL[name]]
    for command in (
        [
            "train",
            "--config",
            str(config.shipped() / f"{name}.yaml"),
            *(word for item in own for word in ("--set", item)),
        ],
        ["eval", "--json", "figures.json", "--no-speed"],
        ["export", "--out", "model.onnx"],
        ["predict", *map(str, photos), "--out", "torch", "--score", "0"],
        ["predict", *map(str, photos), "--out", "onnx", "--score", "0", "--model", "model.onnx"],
    ):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert not end.value.code, capsys.readouterr().err
    with (tmp_path / "runs" / f"{name}-1" / "metrics.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    losses = {key: float(value) for key, value in row.items() if key.startswith("loss_")}
    assert len(losses) > 1
    assert all(math.isfinite(value) and value > 0 for value in losses.values())
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["mAP"] == pytest.approx(float(row["mAP"]), abs=1e-6)
    assert len(list((tmp_path / "onnx").glob("*.json"))) == len(photos)


# The smallest, at half their canvas: photos of 25 small products.
LEARNERS = {
    "faster_rcnn_mobilenet": ["model.weights=none"],
    "ssd_mobilenet": ["model.weights=none"],
    "yolo_nano": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_sixteen_photos_are_learnt_by_heart(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = [f"data.root={SHELF}", f"data.cache={tmp_path / 'cache'}", "train.loggers=[]", *LEARNERS[name]]
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", name, "--overfit", "16", *(word for item in own for word in ("--set", item))])
    assert not end.value.code
    with (tmp_path / "runs" / f"{name}-overfit-1" / "metrics.csv").open(encoding="utf-8") as file:
        *_, row = csv.DictReader(file)
    assert float(row["mAP50"]) >= config.LEARNT
