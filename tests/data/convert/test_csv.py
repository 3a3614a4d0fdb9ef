import csv
from pathlib import Path

import pytest

from detkit.data import convert
from detkit.types import CROWD, DIFFICULT, TRUNCATED
from tests.data.convert.sets import by_name, kinds, make, put, refusal, rows
from tests.data.photos import save_image

COLUMNS = (
    "image", "width", "height", "label", "xmin", "ymin", "xmax", "ymax", "difficult", "truncated", "occluded", "crowd",
    "split",
)  # fmt: skip
CAN = ("can", (1.5, 2.0, 9.0, 8.25), 0)


def read(root: Path, content: object, name: str = "annotations.csv") -> convert.Source:
    save_image(root / "images/a.jpg")
    save_image(root / "images/b.jpg")
    put(root / name, content)
    return convert.read("csv", root, None)


@pytest.mark.parametrize(
    "content",
    [
        "image,label,xmin,ymin,xmax,ymax\na.jpg,can,1.5,2,9,8.25\nb.jpg,,,,,\n",
        "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,64,48,can,1.5,2,9,8.25\nb.jpg,64,48,,,,,\n",
        "a.jpg,1.5,2,9,8.25,can\nb.jpg,,,,,\n",
        "a.jpg,64,48,can,1.5,2,9,8.25\nb.jpg,64,48,,,,,\n",
        "image;label;xmin;ymin;xmax;ymax\na.jpg;can;1,5;2,0;9;8,25\nb.jpg;;;;;\n",
        'image,label,xmin,ymin,xmax,ymax\na.jpg,can,"1,5",2,9,"8,25"\nb.jpg,,,,,\n',
        "a.jpg;1,5;2,0;9,0;8,25;can\nb.jpg;;;;;\n",
        "image\tlabel\txmin\tymin\txmax\tymax\na.jpg\tcan\t1,5\t2\t9\t8,25\nb.jpg\t\t\t\t\t\n",
        "ymax,xmax,Class,X1,YMIN,Path\r\n8.25,9,can,1.5,2,C:\\photos\\a.jpg\r\n,,,,,b.jpg\r\n",
        "\n\nimage, label, xmin, ymin, xmax, ymax,,\n\na.jpg, can , 1.5, 2, 9, 8.25,,\n b.jpg,,,,,,,\n\n",
        "\ufeffimage,label,xmin,ymin,xmax,ymax\na.jpg,can,1.5,2,9,8.25\nb.jpg\n",
    ],
)  # fmt: skip
def test_layouts(tmp_path: Path, content: str) -> None:
    source = read(tmp_path, content)
    assert by_name(source.photos) == {"a.jpg": [CAN], "b.jpg": []}
    assert source.classes == ("can",)
    assert source.findings == []
    assert convert.sniff(tmp_path) == "csv"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    source = read(tmp_path, "image,label,xmin,ymin,xmax,ymax\r\na.jpg,Käse,1,2,3,4\r\n".encode(encoding))
    assert source.classes == ("Käse",)


def test_quoted_line_ends_and_lines(tmp_path: Path) -> None:
    content = 'image,label,xmin,ymin,xmax,ymax\na.jpg,"two\nlines",1,2,3,4\na.jpg,can,1,2,3,4\n'
    (photo, _) = read(tmp_path, content).photos
    assert photo.annotation is not None
    assert photo.annotation.names == ("two\nlines", "can")
    assert photo.annotation.lines.tolist() == [2, 4]


def test_flags_sizes_and_other_columns(tmp_path: Path) -> None:
    content = (
        "image,width,height,label,xmin,ymin,xmax,ymax,difficult,truncated,iscrowd,colour\n"
        "a.jpg,64,48,can,1,2,3,4,1,False,TRUE,red\na.jpg,64,48,can,1,2,3,4,0,yes,perhaps,red\n"
    )
    source = read(tmp_path, content)
    photo = source.photos[0]
    assert [flags for _, _, flags in rows(photo)] == [DIFFICULT | CROWD, TRUNCATED]
    assert photo.annotation is not None
    assert photo.annotation.hw == (48, 64)
    assert kinds(source.findings) == ["odd value", "not read"]
    assert source.findings[0].line == 3


def test_splits_by_column(tmp_path: Path) -> None:
    content = "image,label,xmin,ymin,xmax,ymax,split\na.jpg,can,1.5,2,9,8.25,train\nb.jpg,,,,,,val\n"
    read(tmp_path, content)
    assert convert.splits("csv", tmp_path) == ("train", "val")
    assert by_name(convert.read("csv", tmp_path, "train").photos) == {"a.jpg": [CAN]}
    assert by_name(convert.read("csv", tmp_path, "val").photos) == {"b.jpg": []}
    assert "there are: train, val" in refusal("csv", tmp_path, "test")


@pytest.mark.parametrize("names", [("train.csv", "val.csv"), ("train_labels.csv", "val_labels.csv"),
                                   ("train/_annotations.csv", "val/_annotations.csv")])  # fmt: skip
def test_splits_by_file(tmp_path: Path, names: tuple[str, str]) -> None:
    read(tmp_path, "a.jpg,1.5,2,9,8.25,can\n", names[0])
    put(tmp_path / names[1], "b.jpg,,,,,\n")
    put(tmp_path / "classes.csv", "can,0\n")
    assert convert.splits("csv", tmp_path) == ("train", "val")
    assert by_name(convert.read("csv", tmp_path, "val").photos) == {"b.jpg": []}
    assert by_name(convert.read("csv", tmp_path, names[0]).photos) == {"a.jpg": [CAN]}
    assert by_name(convert.read("csv", tmp_path, None).photos) == {"a.jpg": [CAN], "b.jpg": []}


def test_what_is_written(tmp_path: Path) -> None:
    photos = make(
        tmp_path / "in", {"a.png": [("can", (1.5, 2.0, 9.0, 8.25), 1), ("a,b", (0.0, 0.0, 1.0, 1.0), 8)], "b.png": []}
    )
    convert.write("csv", {"train": photos}, ("can", "a,b"), tmp_path / "in", tmp_path / "out")
    with (tmp_path / "out/annotations.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.reader(file))
    assert written[0] == list(COLUMNS)
    assert [",".join(row) for row in written[1:]] == [
        "images/a.png,64,48,can,1.5,2,9,8.25,1,0,0,0,train",
        "images/a.png,64,48,a,b,0,0,1,1,0,0,0,1,train",
        "images/b.png,64,48,,,,,,,,,,train",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "an empty file"),
        ("\n\n", "an empty file"),
        ("a.jpg,1,2\n", "line 1: 3 columns without a header"),
        ("image,label,xmin,ymin,xmax\n", "line 1: the header has no column ymax"),
        ("image,label,xmin,ymin,xmax,ymax\na.jpg,,1,2,3,4\n", "line 2: the row has no label"),
        ("image,label,xmin,ymin,xmax,ymax\n,can,1,2,3,4\n", "line 2: the row names no image"),
        ("image,label,xmin,ymin,xmax,ymax\na.jpg,can,1,2,3\n", "line 2: '1 2 3 ' are not four numbers"),
        ("image,label,xmin,ymin,xmax,ymax\na.jpg,can,1,2,3,nan\n", "are not four numbers"),
        ("image,label,xmin,ymin,xmax,ymax\na.jpg,can,1,2,3,1e99\n", "are not four numbers"),
        ('image,label,xmin,ymin,xmax,ymax\na.jpg,can,1,2,3,"1.234,5"\n', "are not four numbers"),
        ("image,label,xmin,ymin,xmax,ymax\n\na.jpg,can,a,b,c,d\n", "line 3: 'a b c d' are not"),
        ("image,label,xmin,ymin,xmax,ymax\na.jpg," + "x" * 200_000 + ",1,2,3,4\n", "not CSV"),
    ],
)
def test_what_cannot_be_known_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = put(tmp_path / "annotations.csv", content)
    message = refusal("csv", tmp_path)
    assert message.startswith(f"{path}: ")
    assert reason in message
