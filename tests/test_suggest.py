import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from detkit import config, geometry, suggest
from detkit.cli import main
from detkit.errors import UserError
from detkit.nn.anchors import default_boxes
from detkit.nn.detector import Detector
from detkit.suggest import MET, Levels
from tests.data.photos import make_voc

NONE = ["model.weights=none"]


def some_boxes(seed: int, count: int, hw: tuple[int, int]) -> NDArray[np.float64]:
    """Tall boxes, as bottles seen from near have."""
    rng = np.random.default_rng(seed)
    height = hw[0] * rng.uniform(0.3, 0.95, count)
    sides = np.minimum(np.stack([height * rng.uniform(0.25, 0.7, count), height], 1), hw[::-1])
    first = rng.random((count, 2)) * (np.array(hw[::-1]) - sides)
    return np.concatenate([first, first + sides], 1)


def priors(head: config.SSD, where: Levels) -> NDArray[np.float64]:
    boxes = default_boxes(
        where.canvas, where.grids, where.steps, head.scales, head.ratios, head.extra_square, torch.device("cpu")
    )
    return boxes.double().numpy()


@pytest.mark.parametrize("name", ["ssd_mobilenet", "ssd_vgg", "ssd_shelf"])
def test_levels_are_those_of_the_network(name: str) -> None:
    settings = config.load(name, NONE)
    detector = Detector(settings.model, settings.input, 3).eval()
    with torch.inference_mode():
        real = detector(torch.zeros(1, 3, *settings.input.size, dtype=torch.uint8)).priors
    where = suggest.levels(settings)
    np.testing.assert_allclose(priors(settings.model.head, where), real.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["ssd_mobilenet", "ssd_vgg", "ssd_shelf"])
def test_fit_is_what_comparing_every_box_gives(name: str) -> None:
    settings = config.load(name, NONE)
    head, where = settings.model.head, suggest.levels(settings)
    boxes = some_boxes(0, 200, settings.input.size)
    best = geometry.iou(boxes, priors(head, where)).max(1)
    found = suggest.fit(boxes, head, where)
    assert found.iou == pytest.approx(best.mean(), abs=1e-6)
    assert found.recall == pytest.approx((best >= MET).mean())
    assert found.recall <= found.possible


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 6), st.floats(4, 40), st.booleans())
def test_fit_on_any_grid(seed: int, rows: int, columns: int, step: float, square: bool) -> None:
    head = config.SSD(scales=(0.2, 0.5, 0.9), ratios=((2.0,), (1.5, 3.0)), extra_square=square)
    where = Levels((100, 140), ((rows, columns), (1, 2)), (step, 50.0))
    boxes = some_boxes(seed, 20, (100, 140))
    best = geometry.iou(boxes, priors(head, where)).max(1)
    assert suggest.fit(boxes, head, where).iou == pytest.approx(best.mean(), abs=1e-6)


@pytest.mark.parametrize("name", ["ssd_mobilenet", "ssd_vgg"])
def test_suggestions_meet_unseen_objects_better(name: str) -> None:
    settings = config.load(name, NONE)
    size = settings.input.size
    own, same, more = suggest.suggest(settings, {"train": some_boxes(1, 600, size), "val": some_boxes(2, 600, size)})
    assert own.boxes == same.boxes
    assert sum(more.boxes) > sum(same.boxes)
    for split in ("train", "val"):
        assert own.fits[split].recall < same.fits[split].recall < 1.01 * more.fits[split].recall
        assert own.fits[split].iou < same.fits[split].iou < more.fits[split].iou
    for suggestion in (same, more):
        tree = yaml.safe_load(suggestion.yaml())
        assignments = [f"model.head.{key}={json.dumps(value)}" for key, value in tree["model"]["head"].items()]
        pasted = config.load(name, NONE + assignments).model.head
        assert pasted == suggestion.head


def test_a_search_never_ends_below_its_start() -> None:
    settings = config.load("ssd_vgg", NONE)
    head, where = settings.model.head, suggest.levels(settings)
    boxes = priors(head, where)[::97]
    boxes = boxes[(boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] <= 300).all(1)]
    assert suggest.fit(boxes, head, where).iou > 0.999
    assert suggest.fit(boxes, suggest.search(boxes, head, where), where).iou > 0.99  # rounded to three decimals


def test_one_object_is_enough_and_none_is_refused() -> None:
    settings = config.load("ssd_shelf", NONE)
    one = suggest.suggest(settings, {"train": np.array([[10.0, 10, 60, 200]]), "val": np.zeros((0, 4))})
    assert one[-1].fits["train"].iou > 0.6
    assert np.isnan(one[-1].fits["val"].iou)
    with pytest.raises(UserError, match="no object"):
        suggest.suggest(settings, {"train": np.zeros((0, 4))})


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_voc(tmp_path / "data")
    with pytest.raises(SystemExit) as stop:
        main(["data", "stats", str(root), "--config", "ssd_shelf", "--json", str(tmp_path / "a.json")])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "recall (val)" in shown
    assert "scales: [" in shown
    tree = json.loads((tmp_path / "a.json").read_text())
    assert tree["canvas"] == {"height": 240, "width": 320, "resize": "stretch"}
    assert [each["name"] for each in tree["default_boxes"]] == ["config", "as many", "one ratio more"]
    with pytest.raises(SystemExit) as stop:
        main(["data", "stats", str(root), "--config", "ssd_shelf", "--size", "99", "99"])
    assert stop.value.code == 2
    assert "--size" in capsys.readouterr().err


def test_a_head_without_default_boxes_has_none_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="head yolo has no default boxes"):
        suggest.suggest(config.load("yolo_nano"), {"train": some_boxes(0, 5, (64, 64))})
    root = make_voc(tmp_path / "data")
    with pytest.raises(SystemExit) as stop:
        main(["data", "stats", str(root), "--config", "yolo_nano", "--json", str(tmp_path / "a.json")])
    assert stop.value.code == 0
    assert "head yolo has no default boxes to fit" in capsys.readouterr().out
    assert "default_boxes" not in json.loads((tmp_path / "a.json").read_text())
