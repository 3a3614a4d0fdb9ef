import errno
import io
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from detkit import imaging
from detkit.errors import Interrupted, UserError
from detkit.manifest import Manifest
from detkit.runtime.predict import JOB, Job, Output, expand, predict, read_job, unique_stems
from detkit.runtime.record import Record
from detkit.types import Detections
from tests.test_manifest import manifest


class Fake:
    """Finds two things in every photo: a sure one and, below the manifest's 0.4, an unsure one."""

    def __init__(self, **changes: object) -> None:
        self.manifest: Manifest = manifest(**changes)
        self.batches: list[int] = []

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        self.batches.append(len(images))
        boxes = np.array([[2.4, 3, 20.6, 18], [0, 0, 9, 9]], np.float32)
        return [
            Detections(boxes, np.array([0.9, 0.3], np.float32), np.array([1, 0]), image.shape[:2]) for image in images
        ]


def photo(path: Path, hw: tuple[int, int] = (24, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (hw[1], hw[0]), "gray").save(path)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_expand_takes_files_folders_and_globs_each_photo_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["b.jpg", "a.PNG", "deep/er/c.jpeg", ".hidden.jpg", "odd[1].jpg", "raw.dat", "._b.jpg"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    monkeypatch.chdir(tmp_path)

    def names_of(*inputs: str) -> list[str]:
        return [path.as_posix() for path in expand(inputs)]

    assert names_of("in") == ["in/a.PNG", "in/b.jpg", "in/deep/er/c.jpeg", "in/odd[1].jpg"]
    assert names_of("in/b.jpg", "in", str(tmp_path / "in/b.jpg"))[:2] == ["in/b.jpg", "in/a.PNG"]
    assert names_of("in/*.jpg") == ["in/b.jpg", "in/odd[1].jpg"]
    assert names_of("in/**/*.jp*g") == ["in/b.jpg", "in/deep/er/c.jpeg", "in/odd[1].jpg"]
    assert names_of("i?") == names_of("in")
    assert names_of("in/odd[1].jpg", "in/raw.dat") == ["in/odd[1].jpg", "in/raw.dat"]


@pytest.mark.parametrize("given", ["none.jpg", "*.tiff", "empty"])
def test_expand_refuses_what_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    photo(tmp_path / "a.jpg")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\.webp") as error:
        expand(["a.jpg", given])
    assert str(error.value).startswith(given)


def test_a_folder_that_can_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "closed" / "b.jpg")
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"closed: can't be looked into \(Permission denied\)"):
        expand([tmp_path])


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes")
def test_a_name_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg").rename(tmp_path / os.fsdecode(b"a\xff.jpg"))
    with pytest.raises(UserError, match=r"a\\xff.jpg': a name that is not UTF-8; rename it"):
        expand([tmp_path])


def test_stems_are_made_unique_in_any_case() -> None:
    photos = [Path(name) for name in ("x/a.jpg", "y/A.jpg", "a-2.png", "a.png", "b.c.jpg")]
    assert unique_stems(photos) == ["a", "A-2", "a-2-2", "a-3", "b.c"]
    assert unique_stems([Path("Classes.jpg")]) == ["Classes-2"]  # beside YOLO's classes.txt


def test_pictures_and_json(tmp_path: Path) -> None:
    photos = [photo(tmp_path / "a.b.jpg"), photo(tmp_path / "c.png", (200, 100)), photo(tmp_path / "x" / "c.webp")]
    out, console = tmp_path / "out", quiet()
    assert predict(Fake(), photos, out, console=console) == 0
    assert names_in(out) == ["a.b.jpg", "a.b.json", "c-2.jpg", "c-2.json", "c.json", "c.png"]
    with Image.open(out / "c.png") as picture:
        assert (picture.size, picture.format) == ((100, 200), "PNG")
        assert len(picture.getcolors() or []) > 2
    result = json.loads((out / "a.b.json").read_text(encoding="utf-8"))
    assert (result["height"], result["width"]) == (24, 32)
    assert result["detections"] == [{"label": "żur", "score": 0.9, "box": [2.4, 3, 20.6, 18]}]
    text = said(console)
    assert "a.b.jpg (32 x 24)" in text
    assert "żur" in text
    assert "0.90" in text
    assert f"3 objects in 3 photos; results in {out}" in text


def test_score_overrides_the_manifest(tmp_path: Path) -> None:
    source = photo(tmp_path / "a.jpg")
    for score, count in ((0.0, 2), (0.95, 0)):
        out = tmp_path / str(score)
        assert predict(Fake(), [source], out, score=score, console=quiet()) == 0
        assert len(json.loads((out / "a.json").read_text())["detections"]) == count


def test_voc_xml_is_whole_pixels_and_names_the_photo(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predict(Fake(), [photo(tmp_path / "a.jpg")], out, Output("voc"), console=quiet()) == 0
    root = ET.parse(out / "a.xml").getroot()
    assert root.findtext("filename") == "a.jpg"
    assert (root.findtext("size/width"), root.findtext("size/height")) == ("32", "24")
    (item,) = root.findall("object")
    assert item.findtext("name") == "żur"
    assert [item.findtext(f"bndbox/{tag}") for tag in ("xmin", "ymin", "xmax", "ymax")] == ["2", "3", "21", "18"]


def test_unreadable_photos_are_told_and_the_rest_is_done(tmp_path: Path) -> None:
    good, cut, junk = photo(tmp_path / "good.jpg", (99, 99)), tmp_path / "[cut].jpg", tmp_path / "junk.png"
    cut.write_bytes(good.read_bytes()[:-200])
    junk.write_bytes(b"junk")
    console, detector = quiet(), Fake()
    assert predict(detector, [cut, junk, good], tmp_path / "out", console=console) == 2
    text = said(console)
    assert "1 object in 1 photo;" in text
    assert "2 of 3 photos could not be read:" in text
    assert str(cut) in text
    assert str(junk) in text
    assert names_in(tmp_path / "out") == ["good.jpg", "good.json"]
    assert predict(detector, [junk], tmp_path / "none", console=quiet()) == 1


def test_many_photos_share_a_table_and_go_in_small_batches(tmp_path: Path) -> None:
    for index in range(19):
        photo(tmp_path / "in" / f"{index}.jpg")
    console, detector = quiet(), Fake()
    assert predict(detector, [str(tmp_path / "in")], tmp_path / "out", score=0.2, console=console) == 0
    assert sorted(detector.batches) == [3, 8, 8]
    rows = [line.replace("│", " ").split() for line in said(console).splitlines()]
    assert ["milk", "19", "19"] in rows
    assert ["żur", "19", "19"] in rows
    assert len(rows) < 15


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: one reads")
@pytest.mark.parametrize("pictures", [False, True])
def test_where_one_thread_detects_several_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: bool) -> None:
    """As a GPU needs it: two photos are being read at a time, or the first waits for the second in vain."""
    together = threading.Barrier(2, timeout=10)

    def read(path: Path) -> NDArray[np.uint8]:
        together.wait()
        return decode(path)

    decode = imaging.decode
    monkeypatch.setattr(imaging, "decode", read)
    for index in range(16):
        photo(tmp_path / "in" / f"{index}.jpg")
    output = Output("jsonl", pictures)
    assert predict(Fake(), [str(tmp_path / "in")], tmp_path / "out", output, console=quiet()) == 0
    assert len(recorded(tmp_path / "out")) == 16


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photo(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    for number in ("1", "2"):
        assert predict(Fake(), ["a.jpg"], console=quiet()) == 0
        assert names_in(tmp_path / "predictions" / number) == ["a.jpg", "a.json"]
    with pytest.raises(UserError, match="is not empty, and nothing is overwritten"):
        predict(Fake(), [source], tmp_path / "predictions" / "1", console=quiet())
    with pytest.raises(UserError, match="is a file"):
        predict(Fake(), [source], source, console=quiet())
    (tmp_path / "empty").mkdir()
    assert predict(Fake(), [source], tmp_path / "empty", console=quiet()) == 0


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of json, voc, yolo, jsonl, coco, csv"):
        predict(Fake(), [photo(tmp_path / "a.jpg")], tmp_path / "out", Output("pdf"))


# Many photos, one record


def folder_of(tmp_path: Path, count: int) -> Path:
    for index in range(count):
        photo(tmp_path / "in" / f"{index:02d}.jpg", (20 + index, 30))
    (tmp_path / "in" / "05.jpg").write_bytes(b"junk")
    return tmp_path / "in"


def recorded(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "detections.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_record_has_each_photo_once_and_in_order(tmp_path: Path, jobs: int) -> None:
    source, out, console = folder_of(tmp_path, 20), tmp_path / "out", quiet()
    assert predict(Fake(), [source], out, Output("jsonl", counts=True), jobs=jobs, console=console) == 1
    rows = recorded(out)
    assert [row["image"] for row in rows] == [str(source / f"{index:02d}.jpg") for index in range(20)]
    assert [row["image"] for row in rows if "error" in row] == [str(source / "05.jpg")]
    assert rows[7]["height"] == 27
    assert rows[7]["detections"] == [{"label": "żur", "score": 0.9, "box": [2.4, 3, 20.6, 18]}]
    assert names_in(out) == ["counts.csv", "detections.jsonl"]
    counted = (out / "counts.csv").read_text(encoding="utf-8").splitlines()
    assert counted[0] == "image,milk,żur,牛奶,total"
    assert counted[1:] == [f"{source / f'{index:02d}.jpg'},0,1,0,1" for index in range(20) if index != 5]


def test_coco_and_csv_say_what_the_record_says(tmp_path: Path) -> None:
    source = folder_of(tmp_path, 7)
    for kind in ("coco", "csv"):
        assert predict(Fake(), [source], tmp_path / kind, Output(kind), score=0.2, console=quiet()) == 1
    coco = json.loads((tmp_path / "coco" / "detections.json").read_text(encoding="utf-8"))
    assert [image["file_name"] for image in coco["images"]] == [
        str(source / f"{index:02d}.jpg") for index in range(7) if index != 5
    ]
    assert coco["categories"] == [{"id": 1, "name": "milk"}, {"id": 2, "name": "żur"}, {"id": 3, "name": "牛奶"}]
    assert [one["id"] for one in coco["annotations"]] == list(range(1, 13))
    assert coco["annotations"][0] == {
        "id": 1, "image_id": 1, "category_id": 2, "bbox": [2.4, 3, 18.2, 15], "area": 273.0, "iscrowd": 0, "score": 0.9
    }  # fmt: skip
    lines = (tmp_path / "csv" / "detections.csv").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["image,label,score,x1,y1,x2,y2", f"{source / '00.jpg'},żur,0.9,2.4,3.0,20.6,18.0"]
    assert len(lines) == 13


def test_yolo_is_shares_of_the_photo(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predict(Fake(), [photo(tmp_path / "a.jpg")], out, Output("yolo", pictures=False), console=quiet()) == 0
    assert names_in(out) == ["a.txt", "classes.txt"]
    assert (out / "classes.txt").read_text(encoding="utf-8") == "milk\nżur\n牛奶\n"
    assert (out / "a.txt").read_text() == "1 0.359375 0.437500 0.568750 0.625000 0.9000\n"


def test_a_job_that_was_ended_is_gone_on_with_each_photo_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = folder_of(tmp_path, 30), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    asked = Job(photos=(str(source),), folder=str(tmp_path), model="m.onnx", format="jsonl")

    class Ended(Fake):
        def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().detect(images)

    with pytest.raises(Interrupted, match=r"detkit predict --resume"):
        predict(Ended(), asked.photos, out, asked.output, asked=asked, console=quiet())
    done = recorded(out)
    assert [row["image"] for row in done] == [str(source / f"{index:02d}.jpg") for index in range(len(done))]
    assert 0 < len(done) < 30
    assert read_job(out) == asked
    with (out / "detections.jsonl").open("ab") as file:
        file.write(b'{"image": "half a li')  # as a kill, or a full disk, leaves it
    detector, console = Fake(), quiet()
    assert predict(detector, asked.photos, out, asked.output, asked=asked, console=console) == 1
    assert [row["image"] for row in recorded(out)] == [str(source / f"{index:02d}.jpg") for index in range(30)]
    assert sum(detector.batches) < 30
    assert f"{len(done)} of 30 photos are done" in said(console)
    assert "1 of 30 photos could not be read:" in said(console)
    assert "29 objects in 29 photos" in said(console)  # of the whole job
    assert said(console).count("05.jpg") == 1


def test_what_can_not_be_gone_on_with_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nothing to go on with"):
        read_job(tmp_path)
    out = tmp_path / "out"
    asked = Job(photos=(str(folder_of(tmp_path, 6)),), folder=str(tmp_path), model="m.onnx", format="jsonl")
    monkeypatch.chdir(tmp_path)
    predict(Fake(), asked.photos, out, asked.output, asked=asked, console=quiet())
    other = asked.model_copy(update={"score": 0.1})
    with pytest.raises(UserError, match="is not empty, and nothing is overwritten"):
        predict(Fake(), other.photos, out, other.output, asked=other, console=quiet())
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(UserError, match="was begun in"):
        read_job(out)
    monkeypatch.chdir(tmp_path)
    (out / "detections.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="can't be gone on with"):
        predict(Fake(), asked.photos, out, asked.output, asked=asked, console=quiet())
    (out / JOB).write_text("{}")
    with pytest.raises(UserError, match="can't be read"):
        read_job(out)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A disk with room for a part of a line takes that part, and says so at the next."""
    with Record(tmp_path) as record:
        record.add({"image": "a.jpg"})
        real = record._file

        class Full:
            def write(self, line: bytes) -> int:
                if len(line) < 5:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real.write(line[:5])

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        record._file = Full()  # type: ignore[assignment]
        with pytest.raises(UserError, match="can't be written \\(No space left on device\\)"):
            record.add({"image": "b.jpg"})
    with Record(tmp_path) as record:
        assert record.done == {"a.jpg"}
        record.add({"image": "c.jpg"})
    assert [row["image"] for row in recorded(tmp_path)] == ["a.jpg", "c.jpg"]


def test_a_full_list_is_said(tmp_path: Path) -> None:
    source, console = photo(tmp_path / "a.jpg"), quiet()
    rule = Fake().manifest.nms
    predict(Fake(nms=rule.model_copy(update={"keep": 2})), [source], tmp_path / "1", score=0.1, console=console)
    assert "1 times the network's list, of 2, was full" in said(console)
    console = quiet()
    predict(Fake(nms=rule.model_copy(update={"keep": 2})), [source], tmp_path / "2", score=0.5, console=console)
    assert "was full" not in said(console)


def test_products_are_counted_in_a_table(tmp_path: Path) -> None:
    photos, console = [photo(tmp_path / "a.jpg"), photo(tmp_path / "b.jpg")], quiet()
    predict(Fake(), photos, tmp_path / "out", Output("json", counts=True), console=console)
    rows = [line.replace("│", " ").split() for line in said(console).splitlines()]
    assert ["żur", "1", "1"] in rows
    assert ["total", "1", "1"] in rows
