import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detkit import imaging
from detkit.cli import main
from detkit.data import convert
from detkit.data.convert.common import Images, extents, far_edges, name_all, safe_path
from detkit.data.labels import Photo
from detkit.errors import UserError
from detkit.types import CROWD, DIFFICULT, OCCLUDED, TRUNCATED
from tests.data.convert.sets import CLASSES, Row, annotation, by_name, kinds, make, rows
from tests.data.photos import make_voc, save_image

HELD = {
    "voc": DIFFICULT | TRUNCATED | OCCLUDED,
    "coco": 15,
    "yolo": 0,
    "labelme": 15,
    "cvat": 15,
    "openimages": TRUNCATED | OCCLUDED | CROWD,
    "csv": 15,
}
ORDERED = ("labelme",)  # it holds corners in any order
LAYOUT = {
    "voc": {"Annotations/sub/a.xml", "ImageSets/Main/train.txt", "ImageSets/Main/val.txt", "classes.txt",
            "JPEGImages/sub/a.png", "JPEGImages/b.png", "Annotations/b.xml"},
    "coco": {"annotations/instances_train.json", "annotations/instances_val.json", "images/sub/a.png", "images/b.png"},
    "yolo": {"data.yaml", "images/train/sub/a.png", "labels/train/sub/a.txt", "images/val/b.png", "labels/val/b.txt"},
    "labelme": {"sub/a.png", "sub/a.json", "b.png", "b.json", "classes.txt", "ImageSets/Main/train.txt",
                "ImageSets/Main/val.txt"},
    "cvat": {"annotations.xml", "images/sub/a.png", "images/b.png"},
    "openimages": {"train-annotations-bbox.csv", "train-images-with-rotation.csv", "val-annotations-bbox.csv",
                   "val-images-with-rotation.csv", "class-descriptions-boxable.csv", "images/sub/a.png",
                   "images/b.png"},
    "csv": {"annotations.csv", "classes.txt", "images/sub/a.png", "images/b.png"},
}  # fmt: skip


def decimals(digits: int) -> st.SearchStrategy[float]:
    return st.integers(-(10 ** (3 + digits)), 10 ** (4 + digits)).map(lambda number: number / 10**digits)


def boxes(coordinate: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, float, float, float]]:
    corners = st.tuples(coordinate, coordinate, coordinate, coordinate)
    return corners.map(lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])))


def objects(coordinate: st.SearchStrategy[float]) -> st.SearchStrategy[list[Row]]:
    return st.lists(st.tuples(st.sampled_from(CLASSES), boxes(coordinate), st.integers(0, 15)), max_size=5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos of a size that no short decimal divides."""
    root = tmp_path_factory.mktemp("photos")
    save_image(root / "sub" / "a.png", (333, 701))
    save_image(root / "b.png", (333, 701))
    return root


def there_and_back(
    tmp: Path, root: Path, formats: tuple[str, ...], content: dict[str, list[Row]]
) -> dict[str, list[Row]]:
    """The photos written in the first format, then converted to each of the others in turn; as they are read last."""
    source = {
        split: [Photo(name, "", annotation(content[name], (333, 701)))]
        for split, name in (("train", "sub/a.png"), ("val", "b.png"))
    }
    convert.write(formats[0], source, CLASSES, root, tmp / "0", "link")
    for index, format_name in enumerate(formats[1:]):
        convert.convert(tmp / str(index), tmp / str(index + 1), format_name, images="link")
    last = tmp / str(len(formats) - 1)
    found = [*convert.read(formats[-1], last, "train").photos, *convert.read(formats[-1], last, "val").photos]
    return by_name(found)


PAIRS = [(a, b) for a in convert.FORMATS for b in convert.FORMATS]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(pair))
@given(st.data())
@settings(max_examples=5)
def test_there_and_back_is_exact(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, pair: tuple[str, str], data: st.DataObject
) -> None:
    coordinate = data.draw(st.sampled_from([decimals(0), decimals(1), decimals(6)]))
    content = {name: data.draw(objects(coordinate)) for name in ("sub/a.png", "b.png")}
    first, second = pair
    found = there_and_back(tmp_path_factory.mktemp("x"), photos, (first, second, first), content)
    held = HELD[first] & HELD[second]
    assert found == {
        Path(name).name: [(label, box, flags & held) for label, box, flags in known] for name, known in content.items()
    }


ANY = st.floats(-1e4, 1e5, allow_nan=False)


@given(objects(ANY), st.sampled_from(convert.FORMATS))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_float_comes_back_to_the_last_digit(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, known: list[Row], format_name: str
) -> None:
    content = {"sub/a.png": known, "b.png": []}
    found = there_and_back(tmp_path_factory.mktemp("x"), photos, (format_name,), content)["a.png"]
    for (label, box, _), (own_label, own, _) in zip(known, found, strict=True):
        assert label == own_label
        if format_name == "coco":
            assert box[:2] == own[:2]
            spans = [max(abs(box[i]), abs(box[i + 2]), box[i + 2] - box[i]) for i in (0, 1)]
            assert abs(np.subtract(box, own))[2:].tolist() <= np.spacing(spans).tolist()
        elif format_name in ("yolo", "openimages"):
            np.testing.assert_allclose(own, box, rtol=0, atol=1e-20 * 701)
        else:
            assert own == box


@given(boxes(ANY))
def test_extents_give_the_far_edges_again(box: tuple[float, float, float, float]) -> None:
    near, far = np.array(box[:2]), np.array(box[2:])
    assert (
        np.abs(far_edges(near, extents(near, far)) - far) <= np.spacing(np.maximum(np.abs(near), np.abs(far)))
    ).all()


def test_a_sum_of_decimals_is_one() -> None:
    assert far_edges(np.array([0.1, 1 / 3]), np.array([0.2, 1 / 3])).tolist() == [0.3, 2 / 3]
    assert extents(np.array([0.1]), np.array([0.3])).tolist() == [0.2]


@pytest.mark.parametrize("format_name", convert.FORMATS)
def test_layout_classes_and_photos(tmp_path: Path, format_name: str) -> None:
    box = ("box", (1.0, 2.0, 30.5, 40.0), 0)
    first, second = make(tmp_path / "in", {"JPEGImages/sub/a.png": [box, ("can", (0, 0, 64, 48), 0)], "b.png": []})
    out = tmp_path / "out"
    findings = convert.write(
        format_name, {"train": [first], "val": [second]}, ("tin", "can", "box"), tmp_path / "in", out
    )
    assert findings == []
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == LAYOUT[format_name]
    for copy in out.rglob("*.png"):
        assert copy.read_bytes() == next((tmp_path / "in").rglob(copy.name)).read_bytes()
    assert convert.sniff(out) == format_name
    train, val = (convert.read(format_name, out, split) for split in ("train", "val"))
    assert by_name(train.photos) == {"a.png": rows(first)}
    assert by_name(val.photos) == {"b.png": []}  # listed, and without objects
    assert sorted(by_name(convert.read(format_name, out, None).photos)) == ["a.png", "b.png"]
    done = convert.convert(out, tmp_path / "again", "yolo")
    assert done.classes == ("tin", "can", "box")  # the order and the unused one are kept


@pytest.mark.parametrize("format_name", convert.FORMATS)
def test_what_a_format_cannot_hold_is_counted(tmp_path: Path, format_name: str) -> None:
    every = [("can", (1.0, 2.0, 3.0, 4.0), 15), ("can", (1.0, 2.0, 3.0, 5.0), 15), ("can", (5.0, 5.0, 9.0, 9.0), 0)]
    photos = make(tmp_path / "in", {"a.png": every})
    findings = convert.write(format_name, {"": photos}, ("can",), tmp_path / "in", tmp_path / "out")
    lost = {name for name, bit in (("difficult", 1), ("truncated", 2), ("occluded", 4), ("crowd", 8))
            if not HELD[format_name] & bit}  # fmt: skip
    assert sorted(finding.what for finding in findings) == sorted(f"2 objects marked {name}" for name in lost)
    (read,) = convert.read(format_name, tmp_path / "out", None).photos
    assert [flags for _, _, flags in rows(read)] == [HELD[format_name], HELD[format_name], 0]


@pytest.mark.parametrize("format_name", convert.FORMATS)
def test_photos_without_annotation_stay_so(tmp_path: Path, format_name: str) -> None:
    photos = make(tmp_path / "in", {"a.png": [("can", (1.0, 2.0, 3.0, 4.0), 0)], "b.png": None})
    findings = convert.write(format_name, {"": photos}, ("can",), tmp_path / "in", tmp_path / "out")
    listed = format_name in ("voc", "yolo", "labelme")
    assert kinds(findings) == ([] if listed else ["unlabelled not listed"])
    read = convert.read(format_name, tmp_path / "out", None).photos
    assert {Path(photo.image).name: photo.annotation is None for photo in read} == {"a.png": False, "b.png": True}


@pytest.mark.parametrize("format_name", convert.FORMATS)
def test_equal_names_in_different_folders_stay_apart(tmp_path: Path, format_name: str) -> None:
    names = ["train/x.png", "val/x.png", "val/X.jpg", "deep/er/x.png"]
    content = {name: [("can", (float(index), 0.0, 20.0, 20.0), 0)] for index, name in enumerate(names)}
    photos = make(tmp_path / "in", content)
    out = tmp_path / "out"
    findings = convert.write(format_name, {"train": photos[:1], "val": photos[1:]}, ("can",), tmp_path / "in", out)
    assert kinds(findings) == ["photo renamed"]
    found = [
        rows(photo)[0][1][0] for split in ("train", "val") for photo in convert.read(format_name, out, split).photos
    ]
    assert sorted(found) == [0, 1, 2, 3]
    images = [photo.image for photo in convert.read(format_name, out, None).photos]
    assert len({image.rpartition(".")[0].lower() for image in images}) == 4


@pytest.mark.parametrize("images", ["copy", "link", "none"])
def test_what_becomes_of_the_photos(tmp_path: Path, images: convert.Images) -> None:
    photos = make(tmp_path / "in", {"a.png": []})
    convert.write("coco", {"": photos}, ("can",), tmp_path / "in", tmp_path / "out", images)
    written = tmp_path / "out/images/a.png"
    assert written.exists() == (images != "none")
    assert written.is_symlink() == (images == "link")
    (read,) = convert.read("coco", tmp_path / "out", "train").photos
    assert read.image == ("images/a.png" if images != "none" else "")
    (read,) = convert.read("coco", tmp_path / "out", "train", images=tmp_path / "in").photos
    assert (tmp_path / "out" / read.image).samefile(tmp_path / "in/a.png")


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    photos = make(tmp_path / "in", {"a.png": [], "b.png": []})
    (tmp_path / "in/b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png"):
        convert.write("voc", {"": photos}, ("can",), tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    photos = make(tmp_path, {"a.png": []})
    with pytest.raises(UserError, match="not empty"):
        convert.write("voc", {"": photos}, ("can",), tmp_path, tmp_path)
    (tmp_path / "empty").mkdir()
    convert.write("voc", {"": photos}, ("can",), tmp_path, tmp_path / "empty")
    assert (tmp_path / "empty/JPEGImages/a.png").exists()


@pytest.mark.parametrize(
    ("classes", "format_name", "reason"),
    [
        (("box",), "coco", "class 'can' is not in the list"),
        (("can", "can"), "coco", "twice"),
        (("can", "a\x01b"), "voc", "can't be written"),
        (("can", "a\x01b"), "cvat", "can't be written"),
        (("can", "\ud800"), "csv", "not valid Unicode"),
        (("can", " "), "yolo", "can't be written"),
        (("can", "two\x85lines"), "csv", "can't be written"),
    ],
)
def test_classes_that_cannot_be_written(
    tmp_path: Path, classes: tuple[str, ...], format_name: str, reason: str
) -> None:
    photos = make(tmp_path / "in", {"a.png": [("can", (1.0, 2.0, 3.0, 4.0), 0)]})
    with pytest.raises(UserError, match=reason):
        convert.write(format_name, {"": photos}, classes, tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("format_name", convert.FORMATS)
def test_names_never_leave_the_folder(tmp_path: Path, format_name: str) -> None:
    """Photos that aren't there are known by the names in the annotations only."""
    names = [
        "../../up.jpg",
        "/etc/passwd",
        "C:\\Users\\x\\img.jpg",
        "https://host/p/i.jpg",
        "..",
        "a\nb.jpg",
        ".hidden.png",
    ]
    found = [Photo("", "x", annotation([("can", (1.0, 2.0, 3.0, 4.0), 0)], filename=name)) for name in names]
    out = tmp_path / "deep" / "out"
    convert.write(format_name, {"train": found}, ("can",), tmp_path, out, "none")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert all(path.is_relative_to(out) for path in written)
    assert not any(part.startswith(".") for path in written for part in path.relative_to(out).parts)
    if format_name not in ("yolo", "openimages"):  # which need the photos when they are read
        again = convert.read(format_name, out, None).photos
        assert sum(len(photo.annotation.names) for photo in again if photo.annotation) == len(names)


@given(st.text(max_size=30))
def test_safe_paths_stay_below(name: str) -> None:
    path = safe_path(name)
    assert Path(os.path.normpath(Path("/root/folder") / path)).is_relative_to("/root/folder")
    assert all(part.strip() == part and part.isprintable() and not part.startswith(".") for part in path.split("/"))


def test_photos_of_one_name_are_numbered() -> None:
    tally = SimpleNamespace(add=lambda *_: None)
    photos = [Photo(name, "", None) for name in ("a/x.jpg", "a/X.png", "a/x_2.jpg", "a/x.webp")]
    names = list(name_all(photos, (), tally).values())  # type: ignore[arg-type]
    assert names[0] == "a/x.jpg"
    assert len({name.rpartition(".")[0].lower() for name in names}) == 4


def test_photos_are_found_by_their_last_parts() -> None:
    images = Images(["images/train/a.jpg", "images/val/a.jpg", "b/c.jpg", "b/d e.jpg"])
    assert images.find("images/val/a.jpg") == "images/val/a.jpg"
    assert images.find("a.jpg") == ""
    assert images.find("a.jpg", ["images/val"]) == "images/val/a.jpg"
    assert images.find("C:\\data\\val\\a.jpg") == "images/val/a.jpg"
    assert images.find("../b/./c.jpg") == "b/c.jpg"
    assert images.find("http://host/x/c.jpg") == "b/c.jpg"
    assert images.find("c", suffix=False) == "b/c.jpg"
    assert images.find("b/d e", suffix=False) == "b/d e.jpg"
    assert images.find("") == images.find("x.jpg") == images.find("../" * 10_000) == ""


@pytest.mark.parametrize("format_name", convert.FORMATS)
@pytest.mark.parametrize(
    "name", [";", ",", '"', "#", "- a", "no", "007", "LabelName", "<a>", "~", "a: b", "__ignore__"]
)
def test_class_names_that_mean_something_to_the_file(tmp_path: Path, format_name: str, name: str) -> None:
    photos = make(tmp_path / "in", {"a.png": [(name, (1.0, 2.0, 3.0, 4.0), 0)]})
    convert.write(format_name, {"": photos}, (name,), tmp_path / "in", tmp_path / "out")
    source = convert.read(format_name, tmp_path / "out", None)
    assert by_name(source.photos) == {"a.png": rows(photos[0])}
    assert source.classes == (name,)


# --- photos whose EXIF turns them, and other sizes than stated


def turned(root: Path, orientation: int) -> Path:
    exif = imaging.Image.Exif()
    exif[0x0112] = orientation
    return save_image(root / "a.jpg", (40, 60), exif=exif)


@pytest.mark.parametrize("format_name", ["yolo", "openimages"])
def test_boxes_drawn_before_the_turn_are_turned_with_the_photo(tmp_path: Path, format_name: str) -> None:
    turned(tmp_path / "in", 6)  # stored 60 wide and 40 high, seen 40 wide and 60 high, turned clockwise
    photo = Photo("a.jpg", "", annotation([("can", (1.0, 2.0, 11.0, 32.0), 0)], (40, 60)))
    findings = convert.write(format_name, {"train": [photo]}, ("can",), tmp_path / "in", tmp_path / "out")
    assert kinds(findings) == ["boxes turned"]
    (read,) = convert.read(format_name, tmp_path / "out", "train").photos
    assert rows(read) == [("can", (8.0, 1.0, 38.0, 11.0), 0)]
    assert read.annotation is not None
    assert read.annotation.hw == (60, 40)


@pytest.mark.parametrize("format_name", convert.FORMATS)
def test_boxes_on_the_upright_photo_stay(tmp_path: Path, format_name: str) -> None:
    turned(tmp_path / "in", 6)
    photo = Photo("a.jpg", "", annotation([("can", (1.0, 2.0, 11.0, 32.0), 0)], (60, 40)))
    assert convert.write(format_name, {"train": [photo]}, ("can",), tmp_path / "in", tmp_path / "out") == []
    (read,) = convert.read(format_name, tmp_path / "out", "train").photos
    assert rows(read) == rows(photo)


@pytest.mark.parametrize("format_name", ["voc", "coco", "labelme", "cvat", "csv"])
def test_a_stated_size_is_kept_with_its_boxes(tmp_path: Path, format_name: str) -> None:
    turned(tmp_path / "in", 6)
    photo = Photo("a.jpg", "", annotation([("can", (1.0, 2.0, 11.0, 32.0), 0)], (40, 60)))
    convert.write(format_name, {"train": [photo]}, ("can",), tmp_path / "in", tmp_path / "out")
    (read,) = convert.read(format_name, tmp_path / "out", "train").photos
    assert rows(read) == rows(photo)
    assert read.annotation is not None
    assert read.annotation.hw == (40, 60)


def test_boxes_of_a_larger_copy_are_scaled(tmp_path: Path) -> None:
    save_image(tmp_path / "in/a.png", (48, 64))
    large = Photo("a.png", "", annotation([("can", (20.0, 40.0, 600.0, 440.0), 0)], (480, 640)))
    wrong = Photo("b.png", "", annotation([("can", (2.0, 4.0, 60.0, 44.0), 0)], (30, 30)))
    save_image(tmp_path / "in/b.png", (48, 64))
    findings = convert.write("yolo", {"train": [large, wrong]}, ("can",), tmp_path / "in", tmp_path / "out")
    assert kinds(findings) == ["boxes scaled", "size disagrees"]
    assert by_name(convert.read("yolo", tmp_path / "out", "train").photos) == {
        "a.png": [("can", (2.0, 4.0, 60.0, 44.0), 0)],
        "b.png": [("can", (2.0, 4.0, 60.0, 44.0), 0)],
    }


def test_a_photo_annotated_twice_keeps_every_object(tmp_path: Path) -> None:
    one, other = ("can", (1.0, 2.0, 3.0, 4.0), 0), ("box", (5.0, 5.0, 9.0, 9.0), 0)
    make(tmp_path / "in", {"a.png": []})
    photos = [Photo("a.png", "", annotation([one])), Photo("a.png", "", annotation([one, other]))]
    for name, source in (("in one", {"train": photos}), ("in two", {"train": photos[:1], "val": photos[1:]})):
        findings = convert.write("voc", source, ("can", "box"), tmp_path / "in", tmp_path / name)
        assert kinds(findings) == ["photo annotated twice"]
        assert by_name(convert.read("voc", tmp_path / name, "train").photos) == {"a.png": [one, other]}


# --- the verb


def test_the_verb_says_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_voc(tmp_path / "in")
    save_image(root / "JPEGImages/lone.jpg")
    xml = root / "Annotations/p0.xml"
    xml.write_text(xml.read_text().replace("<difficult>0", "<difficult>1", 1))
    with pytest.raises(SystemExit) as stop:
        main(["data", "convert", str(root), str(tmp_path / "out"), "--to", "yolo"])
    assert stop.value.code == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "train: 4 photos, 8 objects, 2 classes"
    assert out[1] == "val: 2 photos, 4 objects, 2 classes"
    assert any("1 objects marked difficult (YOLO has no such mark)" in line for line in out)
    assert any(line.startswith("in no split: 1 photos") for line in out)
    assert (tmp_path / "out/labels/val/p5.txt").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--to", "kitti"], "no format 'kitti'"),
        (["--to", "coco", "--from", "cocoa"], "did you mean 'coco'"),
        (["--to", "coco", "--split", "tran"], "did you mean 'train'"),
        (["--to", "coco", "--image-folder", "nowhere"], "no such folder"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    root = make_voc(tmp_path / "in")
    with pytest.raises(SystemExit) as stop:
        main(["data", "convert", str(root), str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_no_plain_format_must_be_named(tmp_path: Path) -> None:
    save_image(tmp_path / "in/a.png")
    with pytest.raises(UserError, match="--from"):
        convert.convert(tmp_path / "in", tmp_path / "out", "coco")
    with pytest.raises(UserError, match="no such file or folder"):
        convert.convert(tmp_path / "nowhere", tmp_path / "out", "coco")


def test_one_split_and_one_file(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "in")
    done = convert.convert(root, tmp_path / "coco", "coco", split=["val"])
    assert done.counts == {"val": (2, 4)}
    single = tmp_path / "coco/annotations/instances_val.json"
    done = convert.convert(single, tmp_path / "csv", "csv", image_folder=root / "JPEGImages")
    assert done.counts == {"": (2, 4)}
    assert sorted(path.name for path in (tmp_path / "csv/images").iterdir()) == ["p4.jpg", "p5.jpg"]


def test_devkit_coordinates(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "in", 1, 0)
    convert.convert(root, tmp_path / "out", "coco", convention="devkit", split=["train"])
    (photo,) = convert.read("coco", tmp_path / "out", "train").photos
    assert [box for _, box, _ in rows(photo)] == [(1, 2, 20, 30), (9.5, 3.25, 60, 40)]


@pytest.mark.parametrize("format_name", ["labelme", "cvat", "csv"])
def test_formats_without_splits_take_the_split_files(tmp_path: Path, format_name: str) -> None:
    photos = make(tmp_path / "in", {"a.png": [], "b.png": [("can", (1.0, 2.0, 3.0, 4.0), 0)]})
    out = tmp_path / "out"
    convert.write(format_name, {"": photos}, ("can",), tmp_path / "in", out)
    assert convert.splits(format_name, out) == ()
    lists = out / "ImageSets/Main"
    lists.mkdir(parents=True)
    prefix = {"labelme": ""}.get(format_name, "images/")
    (lists / "mine.txt").write_text(f"{prefix}b\n")
    assert list(by_name(convert.read(format_name, out, "mine").photos)) == ["b.png"]
    done = convert.convert(out, tmp_path / "again", "coco")
    assert done.counts == {"mine": (1, 1)}
    assert kinds(done.findings) == ["in no split"]
