"""Scenes from cut-outs: exact, repeatable, balanced, and one line for what can't be used."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from detkit.cli import main
from detkit.data import compose as job
from detkit.data.compose import Look, Source, Store, compose
from detkit.errors import UserError
from detkit.types import DIFFICULT, OCCLUDED, TRUNCATED
from tests.data.photos import save_image, save_xml

pytest.importorskip("cv2")
NAMES = ("a b", "Bär", "can")
# Pure colours, which no blend of two of them equals; made-up backgrounds are overpainted with black.
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def disc(path: Path, size: tuple[int, int] = (60, 90), colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    """A cut-out: an ellipse that touches the edges, the rest transparent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", size)
    ImageDraw.Draw(image).ellipse((0, 0, size[0] - 1, size[1] - 1), (*colour, 255))
    image.save(path)
    return path


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cutouts")
    for index, name in enumerate(NAMES):
        disc(root / name / "1.png", (60, 90), (200, 80 * index, 30))
        disc(root / name / "more" / "2.png", (120, 70), (30, 80 * index, 200))
    (root / ".DS_Store").write_bytes(b"x")
    (root / "can" / "._1.png").write_bytes(b"x")
    (root / "can" / "Thumbs.db").write_bytes(b"x")
    return root


def open_store(folder: Path, pictures: list[tuple[int, Path]], backgrounds: list[Path] | None = None) -> Store:
    folder.mkdir()
    levels = [(label, job.cut(Source(str(path), label), "box", 300)[0]) for label, path in pictures]
    job._fill(folder, [*levels, *((-1, [job._background(path, (200, 150))]) for path in backgrounds or [])])
    return job._store(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three classes, one flat colour each, on black."""
    root = tmp_path_factory.mktemp("flat")
    pictures = [(k, disc(root / f"{k}.png", (80, 100), colour)) for k, colour in enumerate(COLOURS.values())]
    black = root / "black.png"
    Image.new("RGB", (300, 200)).save(black)
    return open_store(root / "store", pictures, [black])


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        yield path.relative_to(root).as_posix(), path.read_bytes()


def extent(mask: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


# --- scenes ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(40, 260), st.integers(40, 260)),
    items=st.integers(1, 30),
    scale=st.floats(0.05, 1.2),
    layout=st.sampled_from(["scatter", "shelf", "auto"]),
    index=st.integers(0, 10_000),
)
def test_boxes_are_the_extent_of_what_is_seen(store, size, items, scale, layout, index):
    look = Look(size, (1, items), (scale / 2, scale), layout)
    scene = job.render(store, look, 0, index)
    assert scene.image.shape == (size[1], size[0], 3)
    assert scene.image.dtype == np.uint8
    assert scene.ids.shape == scene.image.shape[:2]
    assert scene.ids.max() <= items
    assert len(scene.boxes) == len(scene.labels) == len(scene.flags) == len(set(scene.numbers))
    for number, box in zip(scene.numbers, scene.boxes, strict=True):
        assert box.tolist() == extent(scene.ids == number)


def test_boxes_are_found_again_by_colour(store):
    """One item on black, no effects: a pixel is the product's where its own colour is at least half there."""
    look = Look((200, 150), (1, 1), (0.4, 0.9), "scatter", effects=False)
    for index in range(20):
        scene = job.render(store, look, 1, index)
        assert len(scene.boxes) == 1
        seen = scene.image.max(axis=2) >= 128
        assert scene.boxes[0].tolist() == extent(seen)
        colour = scene.image[seen].astype(float).mean(axis=0).argmax()
        assert colour == scene.labels[0]


def test_labels_and_occlusion_are_found_again_by_colour(store):
    """Each item's pure pixels lie in its box, and reach to within 2 px of its sides."""
    look = Look((200, 150), (6, 10), (0.2, 0.5), "scatter", effects=False)
    hidden = 0
    for index in range(10):
        scene = job.render(store, look, 2, index)
        for number, label, (x1, y1, x2, y2) in zip(scene.numbers, scene.labels, scene.boxes.tolist(), strict=True):
            mine = scene.ids == number
            colours = scene.image[mine].astype(float)
            assert colours.mean(axis=0).argmax() == label
            pure = mine & (scene.image[..., label] >= 250)
            left, top, right, bottom = extent(pure)
            assert max(left - x1, top - y1, x2 - right, y2 - bottom) <= 2
        hidden += sum(bool(flags & OCCLUDED) for flags in scene.flags)
    assert hidden > 0


def plan_of(monkeypatch: pytest.MonkeyPatch, items: list[job.Item]) -> None:
    monkeypatch.setattr(job, "_scattered", lambda *_: job.Plan(items, [], 50))


@pytest.mark.parametrize(
    ("shift", "annotated", "flags"),
    [(80, 2, 0), (30, 2, OCCLUDED), (20, 2, OCCLUDED | DIFFICULT), (10, 1, None), (0, 1, None)],
)
def test_what_another_item_hides(tmp_path, monkeypatch, shift, annotated, flags):
    """A square 50 px wide, of which another leaves `shift` px."""
    Image.new("RGBA", (50, 50), (255, 0, 0, 255)).save(tmp_path / "square.png")
    squares = open_store(tmp_path / "store", [(0, tmp_path / "square.png")])
    items = [job.Item(0, x, 100, 50, 50, 0, 0, 0) for x in (60, 60 + shift)]
    plan_of(monkeypatch, items)
    scene = job.render(squares, Look((200, 200), (2, 2), layout="scatter", effects=False), 0, 0)
    assert len(scene.boxes) == annotated
    assert scene.boxes[-1].tolist() == [35 + shift, 75, 85 + shift, 125]
    assert scene.flags[-1] == 0
    if annotated == 2:
        assert scene.flags[0] == flags
        assert scene.boxes[0].tolist() == [35, 75, 35 + min(50, shift), 125]


@pytest.mark.parametrize(("x", "flags"), [(25, 0), (15, TRUNCATED), (-2, TRUNCATED | DIFFICULT), (-15, None)])
def test_what_the_edge_cuts(tmp_path, monkeypatch, x, flags):
    Image.new("RGBA", (50, 50), (255, 0, 0, 255)).save(tmp_path / "square.png")
    squares = open_store(tmp_path / "store", [(0, tmp_path / "square.png")])
    plan_of(monkeypatch, [job.Item(0, x, 100, 50, 50, 0, 0, 0)])
    scene = job.render(squares, Look((200, 200), (1, 1), layout="scatter", effects=False), 0, 0)
    assert scene.flags == ([] if flags is None else [flags])
    assert scene.boxes.tolist() == ([] if flags is None else [[0, 75, x + 25, 125]])


def test_alpha_is_honoured(tmp_path, monkeypatch):
    """Holes show the background, half-transparent pixels mix, and the colour below full transparency never shows."""
    pixels = np.zeros((60, 60, 4), np.uint8)
    pixels[..., 1] = 255  # green where nothing is to be seen
    pixels[:, :20] = (255, 0, 0, 255)
    pixels[:, 40:] = (0, 0, 255, 192)
    Image.fromarray(pixels).save(tmp_path / "ring.png")
    Image.new("RGB", (200, 200), (100, 100, 100)).save(tmp_path / "grey.png")
    rings = open_store(tmp_path / "store", [(0, tmp_path / "ring.png")], [tmp_path / "grey.png"])
    plan_of(monkeypatch, [job.Item(0, 100, 100, 60, 60, 0, 0, 0)])
    scene = job.render(rings, Look((200, 200), (1, 1), layout="scatter", effects=False), 0, 0)
    assert scene.image[100, 80].tolist() == [255, 0, 0]
    assert scene.image[100, 100].tolist() == [100, 100, 100]
    assert np.abs(scene.image[100, 120].astype(int) - [25, 25, 217]).max() <= 1
    assert scene.ids[100, [80, 100, 120]].tolist() == [1, 0, 1]
    assert scene.image[..., 1].max() <= 100
    assert scene.boxes.tolist() == [[70, 70, 130, 130]]


def test_effects_leave_the_truth_as_it_is_but_for_soft_edges(store):
    bare, full = (job.render(store, Look((160, 120), (5, 5), effects=on), 3, 4) for on in (False, True))
    assert bare.labels == full.labels
    assert np.abs(bare.boxes - full.boxes).max() <= 2
    assert np.abs(bare.image.astype(int) - full.image).mean() > 3


def test_items_are_as_large_and_as_many_as_asked(store):
    look = Look((300, 200), (4, 4), (0.3, 0.3), "scatter", effects=False)
    for index in range(8):
        scene = job.render(store, look, 5, index)
        assert scene.ids.max() == 4
        whole = [box for box, flags in zip(scene.boxes, scene.flags, strict=True) if not flags]
        longest = [max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in whole]
        assert all(0.6 * 60 <= side <= 1.35 * 60 for side in longest)


@pytest.mark.parametrize("layout", ["scatter", "shelf"])
def test_classes_are_balanced_and_each_scene_begins_with_another(store, layout):
    look = Look((120, 120), (1, 8), layout=layout, effects=False)
    scenes = [job.render(store, look, 6, index) for index in range(150)]
    counts = np.bincount([label for scene in scenes for label in scene.labels], minlength=3)
    assert counts.max() < 1.25 * counts.min()
    for index, scene in enumerate(scenes):
        assert scene.numbers[-1] == scene.ids.max()  # its own class is on top of all others
        assert scene.labels[-1] == index % 3


# --- data sets ------------------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_the_workers(cutouts, tmp_path):
    done: list[tuple[int, int]] = []
    look = Look((96, 64), (2, 5))
    for workers in (1, 2):
        lines = compose(
            tmp_path / str(workers), cutouts, look=look, train=4, val=2, seed=1, workers=workers,
            progress=lambda *k: done.append(k),
        )  # fmt: skip
        assert lines == ["6 cut-outs of 3 classes (6 transparent)"]
    assert dict(contents(tmp_path / "1")) == dict(contents(tmp_path / "2"))
    assert done == [(k, 12) for k in range(1, 13)] * 2
    compose(tmp_path / "other", cutouts, look=look, train=4, val=2, seed=2, workers=1)
    compose(tmp_path / "fewer", cutouts, look=look, train=1, val=0, seed=1, workers=1)
    name = "JPEGImages/scene_00000.jpg"
    first, other, fewer = (dict(contents(tmp_path / folder))[name] for folder in ("1", "other", "fewer"))
    assert first == fewer != other


def test_files_say_what_was_drawn(cutouts, tmp_path):
    save_image(tmp_path / "photos" / "sub" / "p.jpg", (80, 300))
    out = tmp_path / "set"
    look = Look((96, 64), (2, 5))
    lines = compose(out, cutouts, backgrounds=tmp_path / "photos", look=look, train=5, val=1, workers=1)
    assert lines[1] == "1 background photos"
    assert (out / "classes.txt").read_text(encoding="utf-8").splitlines() == sorted(NAMES)
    assert len((out / "ImageSets/Main/train.txt").read_text().split()) == 5
    names = set()
    for xml in (out / "Annotations").glob("*.xml"):
        root = ET.parse(xml).getroot()
        with Image.open(out / "JPEGImages" / f"{xml.stem}.jpg") as image:
            assert image.size == (96, 64)
        names |= {element.findtext("name") for element in root.iter("object")}
    assert names == set(NAMES)


def voc(root: Path) -> Path:
    """Photos of a dark ellipse on white, one of a box in its midst, and boxes not to be cut out."""
    for index in range(3):
        image = Image.new("RGB", (120, 120), (235, 235, 230))
        ImageDraw.Draw(image).ellipse((30, 20, 89, 99), (20, 40 * index, 90))
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        image.save(root / "JPEGImages" / f"p{index}.png")
    hw = (120, 120)
    save_xml(root / "Annotations" / "p0.xml", [("pot", (30, 20, 90, 100))], hw)
    save_xml(root / "Annotations" / "p1.xml", [("pot", (30, 20, 90, 100)), ("lid", (30, 20, 90, 60))], hw)
    save_xml(
        root / "Annotations" / "p2.xml",
        [("pot", (30, 20, 90, 50)), ("pot", (0, 60, 20, 90)), ("pot", (30, 60, 80, 90)), ("lid", (100, 100, 108, 120))],
        hw,
        [DIFFICULT, TRUNCATED, OCCLUDED, 0],
    )
    return root


def test_a_voc_data_set_is_cut_out(tmp_path):
    lists = voc(tmp_path / "voc") / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("p0\np1\np2\n")
    classes, sources, left_out = job.read_voc(tmp_path / "voc", "train")
    assert classes == ("lid", "pot")
    assert [(Path(s.path).stem, s.label, s.box) for s in sources] == [("p0", 1, (30, 20, 90, 100))]
    assert left_out == {"overlapped": 2, "difficult": 1, "truncated": 1, "occluded": 1, "small": 1}
    lines = compose(tmp_path / "set", tmp_path / "voc", look=Look((80, 80)), train=2, val=0, workers=1)
    assert lines[0] == "1 cut-outs of 1 classes (1 masked by GrabCut)"
    assert lines[-1] == "in no scene, for want of a cut-out: lid"
    assert (tmp_path / "set" / "classes.txt").read_text() == "lid\npot\n"


def test_grabcut_finds_the_thing_and_falls_back_to_the_box(tmp_path):
    photo = voc(tmp_path) / "JPEGImages" / "p0.png"
    levels, how = job.cut(Source(str(photo), 0, (30, 20, 90, 100)), "grabcut", 300)
    assert how == "masked by GrabCut"
    solid = levels[0][..., 3] >= 128
    y, x = np.mgrid[0 : solid.shape[0], 0 : solid.shape[1]]
    truth = ((x + 0.5) / solid.shape[1] * 2 - 1) ** 2 + ((y + 0.5) / solid.shape[0] * 2 - 1) ** 2 <= 1
    assert (solid & truth).sum() > 0.93 * (solid | truth).sum()
    assert max(abs(solid.shape[0] - 80), abs(solid.shape[1] - 60)) <= 4
    for masks, box in (("box", (30, 20, 90, 100)), ("grabcut", (0, 0, 120, 120))):  # nothing is around the second
        levels, how = job.cut(Source(str(photo), 0, box), masks, 300)
        assert how == "whole rectangles"
        assert levels[0].shape[:2] == (box[3] - box[1], box[2] - box[0])
        assert (levels[0][..., 3] >= 128).all()


def test_a_strip_is_cut_out_as_it_is(tmp_path):
    Image.new("RGB", (14, 2400)).save(tmp_path / "strip.png")
    levels, how = job.cut(Source(str(tmp_path / "strip.png"), 0), "grabcut", 3000)
    assert (levels[0].shape, how) == ((2400, 14, 4), "whole rectangles")


def test_levels_are_premultiplied_and_halve(tmp_path):
    path = disc(tmp_path / "c.png", (200, 400), (250, 120, 10))
    levels, how = job.cut(Source(str(path), 0), "grabcut", 100)
    assert how == "transparent"
    assert [level.shape for level in levels] == [(100, 50, 4), (50, 25, 4), (25, 12, 4)]
    for level in levels:
        assert (level[..., :3].max(axis=2) <= level[..., 3].astype(int) + 1).all()
        assert level[level.shape[0] // 2, level.shape[1] // 2].tolist() == [250, 120, 10, 255]


def test_turned_as_exif_says_alpha_too(tmp_path):
    pixels = np.zeros((40, 80, 4), np.uint8)
    pixels[:, :40] = (255, 0, 0, 255)
    pixels[:, 40:] = (0, 0, 255, 200)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "t.png", exif=exif)
    levels, _ = job.cut(Source(str(tmp_path / "t.png"), 0), "box", 300)
    assert levels[0].shape == (80, 40, 4)
    assert levels[0][20, 20].tolist() == [255, 0, 0, 255]
    assert np.abs(levels[0][60, 20].astype(int) - [0, 0, 200, 200]).max() <= 1


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, root: Path, match: str, **options: object) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=match) as error:
        compose(tmp_path / "out", root, train=1, val=0, workers=1, **options)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_is_one_line_that_names_the_file(tmp_path):
    root = tmp_path / "in"
    refused(tmp_path, root, r"in: no such folder")
    root.mkdir()
    refused(tmp_path, root, r"in: no class folders here")
    (root / "tea").mkdir()
    refused(tmp_path, root, r"tea: no images here")
    good = disc(root / "tea" / "1.png")
    disc(root / "x.png")
    refused(tmp_path, root, r"x\.png: lies beside the class folders")
    (root / "x.png").unlink()
    refused(tmp_path, good, r"1\.png: not a folder")
    Image.new("RGBA", (50, 50)).save(root / "tea" / "2.png")
    refused(tmp_path, root, r"2\.png: fully transparent")
    disc(root / "tea" / "2.png", (60, 9))
    refused(tmp_path, root, r"2\.png: only 60x9 pixels")
    Image.new("RGB", (3, 90)).save(root / "tea" / "2.png")
    refused(tmp_path, root, r"2\.png: only 3x90 pixels")
    (root / "tea" / "2.png").write_bytes(good.read_bytes()[:-40])
    refused(tmp_path, root, r"2\.png: damaged")
    (root / "tea" / "2.png").write_bytes(b"")
    refused(tmp_path, root, r"2\.png: not an image")
    (root / "tea" / "2.png").unlink()
    refused(tmp_path, root, r"nowhere: no such folder", backgrounds=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, root, r"empty: no images here", backgrounds=tmp_path / "empty")
    (tmp_path / "empty" / "b.jpg").write_bytes(b"no")
    refused(tmp_path, root, r"b\.jpg: not an image", backgrounds=tmp_path / "empty")
    disc(root / "tab\there" / "1.png")
    refused(tmp_path, root, r"class name can't")


def test_a_voc_data_set_without_a_whole_product_is_refused(tmp_path):
    root = tmp_path / "voc"
    save_image(root / "JPEGImages" / "p.jpg", (100, 100))
    save_xml(root / "Annotations" / "p.xml", [("pot", (10, 10, 60, 60))], (100, 100), [DIFFICULT])
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("p\n")
    with pytest.raises(UserError, match=r"no box of split 'train' can be cut out \(1 difficult\)"):
        compose(tmp_path / "out", root, train=1, val=0, workers=1)
    assert not (tmp_path / "out").exists()


def test_a_picture_without_transparency_is_masked(tmp_path):
    photo = voc(tmp_path / "voc") / "JPEGImages" / "p0.png"
    (tmp_path / "in" / "pot").mkdir(parents=True)
    with Image.open(photo) as image:
        image.crop((26, 16, 94, 104)).save(tmp_path / "in" / "pot" / "p.jpg")
    for masks, words in (("grabcut", "masked by GrabCut"), ("box", "whole rectangles")):
        lines = compose(tmp_path / masks, tmp_path / "in", look=Look((64, 64)), masks=masks, train=1, val=0, workers=1)
        assert lines == [f"1 cut-outs of 1 classes (1 {words})"]


def test_refuses_a_folder_with_something_in_it(cutouts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        compose(tmp_path, cutouts, train=1, val=0, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("settings_", "option"),
    [
        ({"size": (10, 100)}, "--size"),
        ({"items": (0, 3)}, "--items"),
        ({"items": (5, 3)}, "--items"),
        ({"scale": (0.5, 0.2)}, "--scale"),
        ({"scale": (0.0, 0.2)}, "--scale"),
        ({"scale": (0.1, float("nan"))}, "--scale"),
    ],
)
def test_settings_out_of_range(settings_, option):
    with pytest.raises(UserError, match=option):
        Look(**settings_)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(cutouts, tmp_path, capsys):
    options = ["--size", "80", "60", "--train", "2", "--val", "1", "--workers", "1", "--items", "1", "2"]
    options += ["--scale", "0.2", "0.5", "--layout", "shelf", "--masks", "box"]
    with pytest.raises(SystemExit) as stop:
        main(["data", "synth", "--from", str(cutouts), "--out", str(tmp_path / "set"), *options])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "6 cut-outs of 3 classes (6 transparent)" in printed
    assert "2 train and 1 val photos" in printed
    assert len(list((tmp_path / "set" / "JPEGImages").iterdir())) == 3


@pytest.mark.parametrize("option", ["items", "scale", "layout", "masks", "split", "backgrounds"])
def test_options_that_need_from(tmp_path, capsys, option):
    values = {"items": ["1", "2"], "scale": ["0.1", "1"], "layout": ["shelf"], "masks": ["box"]}.get(option, ["x"])
    with pytest.raises(SystemExit) as stop:
        main(["data", "synth", "--out", str(tmp_path / "set"), f"--{option}", *values])
    assert stop.value.code == 2
    assert f"--{option} is for scenes of your own products" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
