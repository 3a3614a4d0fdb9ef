from pathlib import Path

import pytest
from yaml import safe_load

from detkit.data import convert
from tests.data.convert.sets import by_name, kinds, put, refusal, rows
from tests.data.photos import save_image

YAML = "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [can, box]\n"
LINE = "1 0.5 0.5 0.25 0.125\n"
BOX = ("box", (24.0, 21.0, 40.0, 27.0), 0)  # of LINE, in 64 x 48


def make_yolo(root: Path, yaml: str = YAML, label: object = LINE) -> Path:
    """a.jpg in train with a label, b.jpg there without objects, c.jpg in val without a label file."""
    for place in ("train/a", "train/b", "val/c"):
        save_image(root / f"images/{place}.jpg")
    put(root / "labels/train/a.txt", label)
    put(root / "labels/train/b.txt", "")
    put(root / "data.yaml", yaml)
    return root


def test_labels_negatives_and_photos_without_label(tmp_path: Path) -> None:
    make_yolo(tmp_path)
    assert convert.splits("yolo", tmp_path) == ("train", "val")
    source = convert.read("yolo", tmp_path, "train")
    assert source.classes == ("can", "box")
    assert by_name(source.photos) == {"a.jpg": [BOX], "b.jpg": []}
    assert source.photos[0].file == "labels/train/a.txt"
    assert source.photos[0].annotation is not None
    assert source.photos[0].annotation.lines.tolist() == [1]
    assert convert.read("yolo", tmp_path, "val").photos[0].annotation is None
    assert len(convert.read("yolo", tmp_path, None).photos) == 3


@pytest.mark.parametrize(
    "yaml",
    [
        "train: images/train\nnames: {0: can, 1: box}\n",
        "train: ./images/train/\nnames:\n  - can\n  - box\n",
        "train: ../images/train\nnames: [can, box]\n",
        "path: /content/datasets/shop\ntrain: images/train\nnames: [can, box]\n",
        "train: /home/somebody/shop/images/train\nnames: [can, box]\n",
        "train: C:\\\\shop\\\\images\\\\train\nnames: [can, box]\n",
        "path: images\ntrain: [train]\nnames: [can, box]\n",
        "train: train.txt\nnames: [can, box]\n",
        "train: [train.txt, images/train]\nnames: [can, box]\n",
        "\ufefftrain: images/train\r\nnames: [can, box]\r\n",
    ],
)
def test_ways_to_say_where_the_photos_are(tmp_path: Path, yaml: str) -> None:
    make_yolo(tmp_path, yaml)
    put(tmp_path / "train.txt", b"./images/train/a.jpg\r\n\r\nC:\\shop\\images\\train\\b.jpg\r\n")
    source = convert.read("yolo", tmp_path, "train")
    assert by_name(source.photos) == {"a.jpg": [BOX], "b.jpg": []}
    assert source.classes == ("can", "box")


def test_a_list_names_a_photo_that_is_not_there(tmp_path: Path) -> None:
    make_yolo(tmp_path, "train: train.txt\nnames: [can, box]\n")
    put(tmp_path / "train.txt", "images/train/gone.jpg\nimages/train/a.jpg\n")
    put(tmp_path / "labels/train/gone.txt", LINE)
    gone, there = convert.read("yolo", tmp_path, "train").photos
    assert (gone.image, gone.file, gone.annotation) == ("", "labels/train/gone.txt", None)
    assert there.image == "images/train/a.jpg"
    done = convert.convert(tmp_path, tmp_path / "out", "coco")
    assert done.counts == {"train": (1, 1)}
    assert "photo absent" in kinds(done.findings)


def test_a_label_without_photo(tmp_path: Path) -> None:
    make_yolo(tmp_path)
    put(tmp_path / "labels/val/lone.txt", LINE)
    assert [photo.file for photo in convert.read("yolo", tmp_path, None).photos if not photo.image] == [
        "labels/val/lone.txt"
    ]


def test_names_are_taken_as_they_stand(tmp_path: Path) -> None:
    make_yolo(
        tmp_path, "train: images/train\nnames: [no, 007, 1.0, ~, 'a: b']\n", "0 .5 .5 1 1\n1 .5 .5 1 1\n3 .5 .5 1 1"
    )
    source = convert.read("yolo", tmp_path, "train")
    assert source.classes == ("no", "007", "1.0", "~", "a: b")
    assert [name for name, _, _ in rows(source.photos[0])] == ["no", "007", "~"]


@pytest.mark.parametrize("name", ["classes.txt", "obj.names", "labels/classes.txt"])
def test_names_without_yaml(tmp_path: Path, name: str) -> None:
    make_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    put(tmp_path / name, "can\r\nbox\r\n")
    source = convert.read("yolo", tmp_path, None)
    assert source.classes == ("can", "box")
    assert by_name(source.photos) == {"a.jpg": [BOX], "b.jpg": []}
    assert convert.sniff(tmp_path) == "yolo"


def test_labels_beside_their_photos(tmp_path: Path) -> None:
    save_image(tmp_path / "data/a.v1.jpg")
    put(tmp_path / "data/a.v1.txt", LINE)
    put(tmp_path / "data.yaml", "train: data\nnames: [can, box]\n")
    assert by_name(convert.read("yolo", tmp_path, "train").photos) == {"a.v1.jpg": [BOX]}


def test_polygons_turned_boxes_and_scores(tmp_path: Path) -> None:
    label = "0 0.25 0.5 0.75 0.5 0.5 0.625\n\n1 0.1 0.2 0.3 0.1 0.4 0.3 0.2 0.4\n0.0 0.5 0.5 0.25 0.125 0.93\n"
    source = convert.read("yolo", make_yolo(tmp_path, label=label), "train")
    (first, second, third) = rows(source.photos[0])
    assert first == ("can", (16, 24, 48, 30), 0)
    assert second[1] == pytest.approx((6.4, 4.8, 25.6, 19.2), abs=1e-12)
    assert third == ("can", BOX[1], 0)
    assert kinds(source.findings) == ["polygon", "polygon", "not read"]
    assert [finding.line for finding in source.findings] == [1, 3, 0]


def test_keypoints_are_left_out(tmp_path: Path) -> None:
    make_yolo(tmp_path, YAML + "kpt_shape: [2, 3]\n", LINE.strip() + " 0.1 0.2 2 0.3 0.4 1\n")
    source = convert.read("yolo", tmp_path, "train")
    assert rows(source.photos[0]) == [BOX]
    assert kinds(source.findings) == ["not read"]


def test_numbers_against_plain_arithmetic(tmp_path: Path) -> None:
    shares = [(0.123456, 0.654321, 0.111111, 0.222222), (0.5, 0.5, 1, 1), (0.05, 0.9, 0.2, 0.3)]
    label = "".join(f"0 {cx} {cy} {w} {h}\n" for cx, cy, w, h in shares)
    source = convert.read("yolo", make_yolo(tmp_path, label=label), "train")
    for (cx, cy, w, h), (_, box, _) in zip(shares, rows(source.photos[0]), strict=True):
        expected = ((cx - w / 2) * 64, (cy - h / 2) * 48, (cx + w / 2) * 64, (cy + h / 2) * 48)
        assert box == pytest.approx(expected, rel=1e-14, abs=1e-13)


def test_few_digits_are_written_where_they_are_enough(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "in", label="1 0.5 0.25 0.125 0.0625\n0 0.123456 0.654321 0.111112 0.222222\n")
    convert.convert(root, tmp_path / "out", "yolo", split=["train"])
    assert (tmp_path / "out/labels/train/a.txt").read_bytes() == (root / "labels/train/a.txt").read_bytes()


def test_the_folders_written_are_relative_to_the_file(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "in")
    convert.convert(root, tmp_path / "out", "yolo", split=["train"])
    document = safe_load((tmp_path / "out" / "data.yaml").read_text(encoding="utf-8"))
    assert "path" not in document  # Ultralytics would look from its working folder
    assert (tmp_path / "out" / document["train"]).is_dir()


def test_photos_in_another_folder(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "in")
    for place in ("train/a", "train/b", "val/c"):
        save_image(tmp_path / f"photos/{Path(place).name}.jpg")
    for photo in root.rglob("*.jpg"):
        photo.unlink()
    found = convert.read("yolo", root, "train", images=tmp_path / "photos")
    assert by_name(found.photos) == {"a.jpg": [BOX], "b.jpg": []}
    with pytest.raises(convert.UserError, match="image-folder"):
        convert.convert(root, tmp_path / "out", "coco", split=["train"])


@pytest.mark.parametrize(
    ("yaml", "label", "reason"),
    [
        (YAML, "2 0.5 0.5 0.1 0.1", "a.txt: line 1: class '2', but there are 0 to 1"),
        (YAML, "\n-1 0.5 0.5 0.1 0.1", "a.txt: line 2: class '-1'"),
        (YAML, "can 0.5 0.5 0.1 0.1", "class 'can'"),
        (YAML, "0.5 0.5 0.5 0.1 0.1", "class '0.5'"),
        (YAML, "inf 0.5 0.5 0.1 0.1", "class 'inf'"),
        (YAML, "0 0.5 0.5 0.1", "4 words"),
        (YAML, "0 0.5 0.5 0.1 0.1 0.1 0.1 0.1", "8 words"),
        (YAML, "0 0.5 0.5 0.1 nan", "'nan' is not a share"),
        (YAML, "0 0.5 0.5 0,1 0.1", "'0,1' is not a share"),
        (YAML, "0 0.5 0.5 1e999 0.1", "'1e999' is not a share"),
        (YAML, "0 0.5 0.5 1e166666666666666667 0.1", "'1e166666666666666667' is not a share"),
        ("train: images/train\n", LINE, "no data.yaml with the class names"),
        ("train: images/train\nnames: []\n", LINE, "lists no class names"),
        ("train: images/train\nnames: [a, '']\n", LINE, "lists no class names, or an empty one"),
        ("train: images/train\nnames: {1: a}\n", LINE, "must be 0 to 0"),
        ("train: images/train\nnames: {a: b}\n", LINE, "must be numbers"),
        ("train: images/train\nnames: [a\n", LINE, "not YAML"),
        ("train: images/other\nnames: [a, b]\n", LINE, "no folder or list 'images/other'"),
        ("train: ../../../etc\nnames: [a, b]\n", LINE, "no folder or list"),
        ("names: " + "[" * 5000, LINE, "nested too deep"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_refused(tmp_path: Path, yaml: str, label: str, reason: str) -> None:
    make_yolo(tmp_path, yaml, label)
    if "names" in reason and "names" not in yaml:
        assert reason in refusal("yolo", tmp_path)
        return
    assert reason in refusal("yolo", tmp_path, "train")
