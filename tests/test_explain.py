"""`detkit explain`: it shows what the network computes, for every head; mistakes are one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from detkit import checkpoint, config, explain
from detkit.cli import main
from detkit.errors import UserError
from detkit.explain import Options
from detkit.nn.contract import Decoded
from detkit.nn.detector import Detector, Predictor
from detkit.types import Targets
from tests.test_manifest import manifest

SHELF = Path(__file__).parent.parent / "datasets" / "shelf-mini"
CLASSES = tuple((SHELF / "classes.txt").read_text(encoding="utf-8").split("\n")[:16])
PHOTO = SHELF / "JPEGImages" / "shelf_00000.jpg"
SIZE = (96, 96)
SMALL = ("input.size=[96, 96]", "model.weights=none", "model.backbone.width=0.35", "model.neck.channels=16")
VGG = ("input.size=[96, 96]", "model.weights=none", "model.backbone.name=vgg11", "model.head.grid=3")
HEADS: dict[str, tuple[str, ...]] = {
    "aligned": ("ssd_shelf", *SMALL),
    "multibox": ("ssd_shelf", *SMALL, "model.head.loss=multibox"),
    "yolo": ("yolo_nano", *SMALL),
    "yolo_v1": ("yolo_v1_vgg", *VGG, "model.head.channels=16", "model.head.hidden=16"),
    "faster_rcnn": ("faster_rcnn_mobilenet", *SMALL, "model.head.width=24", "model.head.proposals=40"),
}


def settings_of(head: str) -> config.Config:
    name, *more = HEADS[head]
    return config.load(name, [*more, f"data.root={SHELF}", "model.select.score=0.001", "model.select.iou=0.05"])


def detector_of(head: str) -> Detector:
    """With random weights, whose scores differ from place to place."""
    settings = settings_of(head)
    detector = Detector(settings.model, settings.input, len(CLASSES)).train()
    with torch.no_grad():
        for _ in range(3):
            detector(images(4))
        for name, parameter in detector.head.named_parameters():
            if parameter.dim() > 1 and ("scores" in name or "predict" in name):
                parameter.normal_(std=1.0 if "scores" in name else 0.3)
    return detector.eval()


def images(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 255
    return nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    for head in HEADS:
        path, figures = folder / head / "best.safetensors", {"score": 0.5}
        checkpoint.write(path, detector_of(head).state_dict(), settings_of(head), CLASSES, 1, figures)
    return folder


TARGETS = Targets(
    torch.tensor([[[8.0, 10, 50, 60], [40, 30, 90, 80], [20, 20, 30, 32], [60, 0, 90, 20]]]),
    torch.tensor([[0, 1, 2, -1]]),
    torch.tensor([[False, False, True, False]]),
)


@pytest.mark.parametrize("head", HEADS)
def test_what_matched_is_what_the_loss_moves(head: str) -> None:
    detector = detector_of(head)
    rng = torch.zeros(1, dtype=torch.int64)
    outputs = detector(images(1), TARGETS if head == "faster_rcnn" else None, rng)
    name = {"yolo": "sides", "yolo_v1": "boxes", "faster_rcnn": "deltas"}.get(head, "offsets")
    raw = getattr(outputs, name).detach().requires_grad_()
    outputs = outputs._replace(**{name: raw})
    match, places = detector.head.match(outputs, TARGETS), detector.head.places(outputs)
    loss = detector.head.loss(outputs, TARGETS).sums["rpn_box" if head == "faster_rcnn" else "box"]
    (moved,) = torch.autograd.grad(loss, raw)
    assert places.shape == (match.positive.shape[1], 4)
    assert (moved.reshape(1, len(places), -1).abs().amax(2) > 0).equal(match.positive)
    assert set(match.object[match.positive].tolist()) == {0, 1}  # neither padding nor what is ignored
    if head in ("multibox", "faster_rcnn"):
        corners = torch.maximum(places[:, None, :2], TARGETS.boxes[0, :, :2])
        sides = (torch.minimum(places[:, None, 2:], TARGETS.boxes[0, :, 2:]) - corners).clamp(min=0)
        assert (sides.prod(2)[match.positive[0], match.object[match.positive]] > 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_before_nms_there_is_all_that_is_left_after_it(head: str) -> None:
    predictor = Predictor(detector_of(head), settings_of(head).model.select)
    with torch.no_grad():
        decoded = predictor.detector.head.decode(predictor.detector(images(1)))
        seen = explain.candidates(predictor, decoded, SIZE, manifest(classes=CLASSES, score=0.02))
        boxes, scores, labels = (each[0].numpy() for each in predictor(images(1)))
    left = scores > 0
    assert 3 < left.sum() < len(seen.kept)
    assert np.array_equal(seen.found.boxes[seen.kept], boxes[left])
    assert np.array_equal(seen.found.scores[seen.kept], scores[left])
    assert np.array_equal(seen.found.labels[seen.kept], labels[left])
    assert np.array_equal(seen.shown, seen.found.scores >= np.float32(0.02))
    removed = np.flatnonzero(seen.rival >= 0)
    assert len(removed)
    assert not seen.kept[removed].any()
    assert (seen.rival[removed] < removed).all()  # a surer one
    same = seen.found.labels[removed] == seen.found.labels[seen.rival[removed]]
    assert predictor.rule.agnostic or same.all()
    for number in range(0, len(seen.kept), 7):
        place, label = explain.origin(decoded, seen.found, number), seen.found.labels[number]
        assert float(decoded.scores[0, place, label]) == seen.found.scores[number]


class Spots(nn.Module):
    """A detector that is sure of class 0 where it is red and of class 1 where it is blue, a candidate a cell of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 3, 1, bias=False)
        self.backbone.weight.data = torch.eye(3)[..., None, None] / 255
        self.head = self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(self.backbone(x), 8)

    def decode(self, outputs: Tensor) -> Decoded:
        scores = outputs[:, [0, 2]].flatten(2).transpose(1, 2)
        return Decoded(torch.zeros(1, scores.shape[1], 1, 4), scores)


def test_grad_cam_shows_all_of_the_class_and_cell_by_cell_only_the_detection() -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[0, 0, :8, :8] = image[0, 0, 16:24, 16:24] = 255
    image[0, 2, 24:, :8] = 255
    spots: Any = Spots()
    whole = explain.activation(spots, spots.backbone, image, (0, 0), local=False)
    assert whole.equal((image[0, 0] > 0).float())
    own = explain.activation(spots, spots.backbone, image, (0, 0), local=True)
    assert own[:8, :8].eq(1).all()
    assert own.sum() == 64
    assert explain.activation(spots, spots.backbone, image, (12, 1), local=True)[24:, :8].eq(1).all()


def test_a_regions_score_rests_on_its_own_cells() -> None:
    detector = detector_of("faster_rcnn")
    with torch.no_grad():
        outputs = detector(images(1))
    sides = outputs.regions[0, :, 2:] - outputs.regions[0, :, :2]
    place = int((sides.prod(1) + 1e9 * ~outputs.real[0]).argmin())
    heat = explain.activation(detector, detector.neck, images(1), (place, 3), local=True)
    x1, y1, x2, y2 = outputs.regions[0, place].round().int().tolist()
    edge = 2 * detector.neck.strides[0]  # between cells' centres it fades
    inside = heat[max(0, y1 - edge) : y2 + edge, max(0, x1 - edge) : x2 + edge]
    assert heat.max() == 1
    assert inside.sum() > 0.999 * heat.sum()
    assert inside.numel() < heat.numel()


@pytest.mark.parametrize("head", HEADS)
def test_a_page_pictures_and_scores_of_a_photo(head: str, runs: Path, tmp_path: Path) -> None:
    out = explain.run(str(runs / head), [str(PHOTO)], tmp_path / "out", Options(detections=2), Console(quiet=True))
    html = (out / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)
    for title in ("Detections", "Scores before and after NMS", "Class activation maps", "Anchors and cells", "Feature"):
        assert f"<h3>{title}" in html
    assert ("<h3>Proposals" in html) == (head == "faster_rcnn")
    assert html.count("data:image/jpeg") == len(list(out.glob("*.png"))) >= 12
    for picture in out.glob("*-class-*.png"):
        assert picture.stat().st_size > 1000
    (found,) = checkpoint.TorchSession(runs / head / "best.safetensors", "cpu").detect([explain.imaging.decode(PHOTO)])
    rows = json.loads((out / "shelf_00000.json").read_text(encoding="utf-8"))["candidates"]
    left = [row for row in rows if row["kept"]]
    assert [row["label"] for row in left] == [CLASSES[label] for label in found.labels]
    np.testing.assert_allclose([row["box"] for row in left], found.boxes, atol=0.02)
    assert [row["shown"] for row in left] == (found.scores >= np.float32(0.5)).tolist()


def test_labels_are_those_beside_the_photo_and_what_has_none_shows_where_detections_came_from(
    runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    photo = Path(shutil.copy(PHOTO, tmp_path / "photos"))
    options = Options(layer="backbone", detections=1)
    out = explain.run(str(runs / "yolo"), [str(photo)], tmp_path / "none", options, Console(quiet=True))
    html = (out / "index.html").read_text(encoding="utf-8")
    assert "Where detections came from" in html
    assert "labels:" not in html
    assert "neck" not in html
    (tmp_path / "Annotations").mkdir()
    shutil.copy(SHELF / "Annotations" / "shelf_00000.xml", tmp_path / "Annotations")
    texts = []
    for path, name in ((photo, "beside"), (PHOTO, "set")):
        out = explain.run(str(runs / "yolo"), [str(path)], tmp_path / name, options, Console(quiet=True))
        texts.append(re.findall("labels: [1-9]\\d*|\\w+: \\d+ candidates answer", (out / "index.html").read_text()))
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]


def test_mistakes_are_one_line_and_leave_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["explain", *(str(word) for word in words), "--out", str(tmp_path / "out")])
        text = capsys.readouterr().err
        assert stop.value.code == 2
        assert text.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return text

    assert "has no gradients" in said("model.onnx", PHOTO)
    assert "no such photo" in said(runs / "yolo", tmp_path / "none.jpg")
    assert "no such class" in said(runs / "yolo", PHOTO, "--class", "shoe")
    assert "did you mean 'backbone'?" in said(runs / "yolo", PHOTO, "--layer", "backbon")
    assert "--layer head: gives no feature maps" in said(runs / "yolo", PHOTO, "--layer", "head")
    assert "classes.txt" in said(runs / "yolo", SHELF / "classes.txt", PHOTO)
    detector = detector_of("yolo_v1")
    assert list(explain._layers(detector, None)) == ["backbone"]  # its neck is none
    assert list(explain._layers(detector, "neck")) == ["neck"]
    with pytest.raises(UserError, match="4; take another layer"):
        explain.activation(detector, detector.head.hidden, images(1), (0, 0), local=False)
