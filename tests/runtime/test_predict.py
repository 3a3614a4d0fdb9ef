import io
import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from detkit.errors import UserError
from detkit.manifest import Manifest
from detkit.runtime.predict import expand, predict, unique_stems
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


def test_stems_are_made_unique_in_any_case() -> None:
    photos = [Path(name) for name in ("x/a.jpg", "y/A.jpg", "a-2.png", "a.png", "b.c.jpg")]
    assert unique_stems(photos) == ["a", "A-2", "a-2-2", "a-3", "b.c"]


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
    assert predict(Fake(), [photo(tmp_path / "a.jpg")], out, format="voc", console=quiet()) == 0
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
    assert detector.batches == [8, 8, 3]
    rows = [line.replace("│", " ").split() for line in said(console).splitlines()]
    assert ["milk", "19", "19"] in rows
    assert ["żur", "19", "19"] in rows
    assert len(rows) < 15


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
    with pytest.raises(UserError, match="one of json, voc"):
        predict(Fake(), [photo(tmp_path / "a.jpg")], tmp_path / "out", format="pdf")
