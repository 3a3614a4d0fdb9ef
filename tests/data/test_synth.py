"""The shelf photos: exact, repeatable, and written whole or not at all."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data import synth
from detkit.errors import UserError
from detkit.types import DIFFICULT, OCCLUDED, TRUNCATED

SIZE = (320, 240)


@pytest.fixture(scope="module")
def scenes() -> list[synth.Scene]:
    return [synth.render(3, index, SIZE) for index in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "shelf"
    synth.synthesise(out, train=4, val=2, size=SIZE, seed=5, workers=1)
    return out


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        yield path.relative_to(root).as_posix(), path.read_bytes()


def test_classes_and_lookalikes() -> None:
    by_name = {p.name: p for p in synth.PRODUCTS}
    assert len(by_name) == len(synth.CLASSES) >= 12
    assert len(synth.LOOKALIKES) == 3
    for a, b in synth.LOOKALIKES:
        assert (by_name[a].shape, by_name[a].cm, by_name[a].brand) == (
            by_name[b].shape,
            by_name[b].cm,
            by_name[b].brand,
        )
        assert by_name[a].band != by_name[b].band
        assert by_name[a].title != by_name[b].title


def test_boxes_are_the_tight_extent_of_what_is_seen(scenes: list[synth.Scene]) -> None:
    for scene in scenes:
        assert scene.ids.shape == SIZE[::-1]
        for number, box in zip(scene.numbers, scene.boxes, strict=True):
            ys, xs = np.nonzero(scene.ids == number)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_boxes_are_inside_and_not_empty(scenes: list[synth.Scene]) -> None:
    for scene in scenes:
        x1, y1, x2, y2 = scene.boxes.T
        assert 3 <= len(scene.boxes) <= synth.MAX_ITEMS
        assert ((x1 >= 0) & (y1 >= 0) & (x1 < x2) & (y1 < y2) & (x2 <= SIZE[0]) & (y2 <= SIZE[1])).all()


def test_truncated_items_touch_the_edge_and_some_items_are_flagged(scenes: list[synth.Scene]) -> None:
    flags = [f for scene in scenes for f in scene.flags]
    for bit in (DIFFICULT, TRUNCATED, OCCLUDED):
        assert 0 < sum(bool(f & bit) for f in flags) < len(flags)
    for scene in scenes:
        touching = (scene.boxes[:, :2] == 0).any(axis=1) | (scene.boxes[:, 2:] == SIZE).any(axis=1)
        for flag, touches in zip(scene.flags, touching, strict=True):
            assert touches or not flag & TRUNCATED


def test_every_package_can_be_drawn() -> None:
    for product, turn in ((k, t) for k in range(len(synth.PRODUCTS)) for t in (-2, 2)):
        sprite = synth.cut_out(product, turn)
        alpha = np.asarray(sprite.getchannel("A")) >= 128
        assert alpha.mean() > 0.5
        assert alpha[[0, -1]].any(axis=1).all()
        assert alpha[:, [0, -1]].any(axis=0).all()


def test_bytes_do_not_depend_on_the_workers(folder: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    synth.synthesise(tmp_path / "two", train=4, val=2, size=SIZE, seed=5, workers=2, progress=lambda *k: done.append(k))
    assert dict(contents(folder)) == dict(contents(tmp_path / "two"))
    assert done == [(k, 6) for k in range(1, 7)]


def test_an_image_does_not_depend_on_how_many_there_are(folder: Path, tmp_path: Path) -> None:
    synth.synthesise(tmp_path / "one", train=1, val=0, size=SIZE, seed=5, workers=1)
    name = "JPEGImages/shelf_00000.jpg"
    assert (folder / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert np.asarray(synth.render(5, 0, SIZE).image).tobytes() != np.asarray(synth.render(6, 0, SIZE).image).tobytes()


def test_voc_files_say_what_was_drawn(folder: Path) -> None:
    train, val = ((folder / f"ImageSets/Main/{part}.txt").read_text().split() for part in ("train", "val"))
    assert (len(train), len(val)) == (4, 2)
    assert tuple((folder / "classes.txt").read_text().split()) == synth.CLASSES
    for index, name in enumerate(train + val):
        scene = synth.render(5, index, SIZE)
        root = ET.parse(folder / f"Annotations/{name}.xml").getroot()
        assert root.findtext("filename") == f"{name}.jpg"
        with Image.open(folder / f"JPEGImages/{name}.jpg") as image:
            assert image.size == SIZE
        assert (root.findtext("size/width"), root.findtext("size/height")) == ("320", "240")
        found = root.findall("object")
        assert [o.findtext("name") for o in found] == [synth.CLASSES[k] for k in scene.labels]
        edges = [[float(o.findtext(f"bndbox/{k}") or "nan") for k in ("xmin", "ymin", "xmax", "ymax")] for o in found]
        assert edges == scene.boxes.tolist()
        for tag, bit in (("difficult", DIFFICULT), ("truncated", TRUNCATED), ("occluded", OCCLUDED)):
            assert [o.findtext(tag) for o in found] == [str(int(bool(f & bit))) for f in scene.flags]


def test_refuses_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty") as error:
        synth.synthesise(tmp_path, train=1, val=0, size=SIZE)
    assert str(tmp_path) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_leaves_nothing_behind_when_stopped(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth.synthesise(tmp_path / "shelf", train=2, val=0, size=SIZE, workers=1, progress=stop)
    assert list(tmp_path.iterdir()) == []
