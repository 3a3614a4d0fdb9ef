import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from detkit.cli import main
from detkit.config import Data
from detkit.data import cache, stats
from detkit.data.labels import DataSet
from detkit.types import CROWD, DIFFICULT
from tests.data.photos import BOX, CAN, make_voc, save_image, save_xml


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of 64x48: p0 to p3 with a can and a box, p1 with a difficult jar too; and a tall one without objects."""
    root = make_voc(tmp_path_factory.mktemp("stats") / "data", train=4, val=2)
    save_xml(root / "Annotations" / "p1.xml", [CAN, BOX, ("jar", (0.0, 0.0, 8.0, 8.0))], flags=[0, 0, DIFFICULT])
    save_image(root / "JPEGImages" / "tall.jpg", (96, 64))
    save_xml(root / "Annotations" / "tall.xml", [], (96, 64))
    with (root / "ImageSets" / "Main" / "train.txt").open("a") as file:
        file.write("tall\n")
    return root


@pytest.fixture
def dataset(root: Path) -> DataSet:
    return cache.load(Data(root=root), "train")


def test_objects_are_counted(dataset: DataSet) -> None:
    found = stats.collect(dataset, "train", (96, 128), "stretch")
    assert found.classes == ("box", "can", "jar")
    assert found.objects.tolist() == [4, 4, 1]
    assert found.photos_with.tolist() == [4, 4, 1]
    assert found.a_photo.tolist() == [2, 3, 2, 2, 0]
    assert found.ignored == 1
    assert found.together.tolist() == [[4, 4, 1], [4, 4, 1], [1, 1, 1]]
    tree = json.loads(json.dumps(found.tree()))
    assert tree["photos_without_objects"] == 1
    assert tree["classes"][1] == {"name": "can", "objects": 4, "photos": 4}


def test_sizes_are_those_on_the_canvas(dataset: DataSet) -> None:
    stretched = stats.collect(dataset, "train", (48, 128), "stretch")
    np.testing.assert_allclose(stretched.boxes[0], [4, 3, 40, 30])
    np.testing.assert_allclose(stretched.sides[0], [36, 27])
    np.testing.assert_allclose(stretched.aspects[0], 36 / 27)
    boxed = stats.on_canvas(dataset, (96, 96), "letterbox", dataset.labels == 1)
    np.testing.assert_allclose(boxed, np.tile([3, 4.5, 30, 45], (4, 1)))


def test_shares_have_coco_s_borders(dataset: DataSet) -> None:
    found = stats.collect(dataset, "train", (48, 64), "stretch")
    # 18x27 and 49.5x35.75 pixels: only the latter have 32² or more.
    assert found.shares() == pytest.approx({"small": 5 / 9, "medium": 4 / 9, "large": 0})


def test_heat_is_the_share_of_photos_with_an_object_there(dataset: DataSet) -> None:
    expected = np.zeros((stats.HEAT, stats.HEAT))
    for index in range(len(dataset)):
        record = dataset[index]
        covered = np.zeros_like(expected, bool)
        for x1, y1, x2, y2 in record.boxes / np.tile(record.hw[::-1], 2) * stats.HEAT:
            covered[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
        expected += covered
    np.testing.assert_allclose(stats.collect(dataset, "train", (48, 64), "stretch").heat, expected / len(dataset))


def test_sums_over_chunks_of_photos_are_the_same(dataset: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stats.collect(dataset, "train", (48, 64), "stretch")
    monkeypatch.setattr(stats, "_PHOTOS", 2)
    parts = stats.collect(dataset, "train", (48, 64), "stretch")
    np.testing.assert_array_equal(parts.heat, whole.heat)
    np.testing.assert_array_equal(parts.together, whole.together)


def test_difficult_and_crowd_objects_are_not_learnt_from() -> None:
    flags = np.array([0, DIFFICULT, CROWD, 2], np.uint8)
    empty = np.zeros((0, 4))
    dataset = DataSet(
        root="",
        classes=("can",),
        paths=np.zeros(0, np.uint8),
        path_ends=np.zeros(1, np.int64),
        hw=np.ones((1, 2), np.int32),
        boxes=empty,
        labels=np.zeros(0, np.int32),
        flags=flags,
        box_ends=np.zeros(1, np.int64),
        findings=(),
    )
    assert stats.measured(dataset).tolist() == [True, False, False, True]
    nothing = stats.collect(dataset, "train", (8, 8), "stretch")
    assert json.dumps(nothing.tree())
    assert len(stats.plots(nothing)) == 6


sides = st.lists(st.tuples(st.floats(1, 500), st.floats(1, 500)), min_size=1, max_size=60)


@given(sides, sides)
def test_overlap_is_the_iou_of_boxes_with_one_centre(
    a: list[tuple[float, float]], b: list[tuple[float, float]]
) -> None:
    def area(x: tuple[float, float]) -> float:
        return x[0] * x[1]

    for one, row in zip(a, stats.overlap(np.array(a), np.array(b)), strict=True):
        for other, found in zip(b, row, strict=True):
            common = min(one[0], other[0]) * min(one[1], other[1])
            assert found == pytest.approx(common / (area(one) + area(other) - common))


@given(sides, st.integers(1, 8))
def test_clusters_are_no_more_than_asked_and_inside_the_data(found: list[tuple[float, float]], count: int) -> None:
    boxes = np.array(found)
    centres = stats.clusters(boxes, count)
    assert len(centres) == min(count, len(np.unique(boxes, axis=0)))
    assert (centres >= boxes.min(0) - 1e-6).all()
    assert (centres <= boxes.max(0) + 1e-6).all()
    assert (np.diff(centres.prod(1)) >= 0).all()


def blobs(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    centres = np.array([[20.0, 20], [30, 120], [120, 30], [200, 200]])
    rng = np.random.default_rng(seed)
    return centres, np.concatenate([centre * rng.normal(1, 0.03, (100, 2)) for centre in centres])


def test_clusters_find_what_was_planted() -> None:
    centres, boxes = blobs(0)
    found = stats.clusters(boxes, 4)
    assert stats.overlap(centres, found).max(1).min() > 0.97
    one = stats.overlap(boxes, stats.clusters(boxes, 1)).max(1).mean()
    assert stats.overlap(boxes, found).max(1).mean() > 0.93 > one
    np.testing.assert_array_equal(found, stats.clusters(boxes, 4))


def test_plots_are_pictures(dataset: DataSet) -> None:
    pictures = stats.plots(stats.collect(dataset, "train", (48, 64), "stretch"))
    assert set(pictures) == {"classes", "objects", "sizes", "aspects", "places", "together"}
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


def test_the_command_line_writes_what_is_asked(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"--json": tmp_path / "a.json", "--html": tmp_path / "a.html", "--plots": tmp_path / "plots"}
    command = ["data", "stats", str(root), "--size", "96", "128"]
    with pytest.raises(SystemExit) as stop:
        main([*command, *(str(word) for pair in files.items() for word in pair)])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "9 objects of 3 classes, 1 of them difficult" in shown
    tree = json.loads(files["--json"].read_text())
    assert tree["canvas"] == {"height": 96, "width": 128, "resize": "stretch"}
    assert len(tree["clusters"]["shapes"]) == 2  # the difficult jar is left out
    page = files["--html"].read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page
    assert Image.open(tmp_path / "plots" / "sizes.png").size[0] > 500
    with pytest.raises(SystemExit) as stop:
        main([*command, "--plots", str(tmp_path / "plots")])
    assert stop.value.code == 2
    assert "--plots" in capsys.readouterr().err
