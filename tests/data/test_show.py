from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from detkit import config
from detkit.cli import main
from detkit.config import Augment, Data
from detkit.data import cache, show
from detkit.data.labels import DataSet
from detkit.errors import UserError
from detkit.runtime import render
from tests.data.photos import BOX, CAN, make_voc, save_image, save_xml

BIG = ("box", (40.0, 30.0, 160.0, 120.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey photos of 200x150 with one box each, but p3, which shows a can as well."""
    root = make_voc(tmp_path_factory.mktemp("show") / "data", train=8, val=1, hw=(150, 200))
    for index in range(9):
        Image.new("RGB", (200, 150), "#808080").save(root / "JPEGImages" / f"p{index}.jpg", quality=95)
        save_xml(root / "Annotations" / f"p{index}.xml", [BIG, *([CAN] if index == 3 else [])], (150, 200))
    return root


@pytest.fixture
def dataset(root: Path) -> DataSet:
    return cache.load(Data(root=root), "train")


def has(picture: NDArray[np.uint8], label: int) -> NDArray[np.bool_]:
    """bool [H, W]: the pixels that have the class's colour."""
    return np.abs(picture.astype(int) - render.colour(label)).max(2) <= 8


def test_boxes_are_drawn_where_they_are(dataset: DataSet) -> None:
    (picture,) = show.photos(dataset, [0], 400)
    assert picture.shape == (300, 400, 3)
    marked = has(picture, dataset.classes.index("box"))
    for y in (60, 239):  # the upper and the lower edge of 80 60 320 240; the tag sits on the left of one of them
        assert marked[y, 200:320].all()
    for x in (80, 319):
        assert marked[70:230, x].all()
    assert not marked[80:220, 100:300].any()
    assert not marked[:30].any()
    assert not marked[:, 330:].any()


def test_a_tag_has_the_name_and_no_score(dataset: DataSet) -> None:
    record = dataset[0]
    one = show.tile(np.full((150, 200, 3), 128, np.uint8), record.boxes, record.labels, ("box", "can"), 400)
    other = show.tile(np.full((150, 200, 3), 128, np.uint8), record.boxes, record.labels, ("box 99", "can"), 400)
    assert (has(other, 0).sum()) > has(one, 0).sum()


def test_photos_are_drawn_at_random_by_the_seed(dataset: DataSet) -> None:
    first = show.choose(dataset, 4, None, 0)
    assert first == show.choose(dataset, 4, None, 0)
    assert any(first != show.choose(dataset, 4, None, seed) for seed in range(1, 5))
    assert len(set(first)) == 4
    assert show.choose(dataset, 99, None, 0) == list(range(8))
    assert show.choose(dataset, 99, "can", 0) == [3]


def test_unknown_and_unseen_classes_are_refused(dataset: DataSet) -> None:
    with pytest.raises(UserError, match="did you mean 'can'"):
        show.choose(dataset, 1, "cann", 0)
    unseen = cache.load(Data(root=Path(dataset.root), classes=("box", "can", "jar")), "train")
    with pytest.raises(UserError, match="no photo"):
        show.choose(unseen, 1, "jar", 0)


def test_every_probability_of_the_settings_can_be_looked_at_alone() -> None:
    known = show.probabilities()
    assert {"flip", "crop", "expand", "colour", "mosaic"} <= set(known)
    assert not {"expand_max", "close_epochs"} & set(known)
    alone = show.only(Augment(expand_max=3), "mosaic")
    assert alone == Augment(**dict.fromkeys(known, 0) | {"mosaic": 1}, expand_max=3)
    with pytest.raises(UserError, match="did you mean 'mosaic'"):
        show.only(Augment(), "mosiac")


def test_samples_are_changed_by_one_thing_alone(dataset: DataSet) -> None:
    settings = config.load("ssd_mobilenet")
    label = dataset.classes.index("box")
    (plain,) = show.samples(dataset, [0], 224, config.load("ssd_mobilenet", [f"augment.{n}=0" for n in
                            show.probabilities()]), 0)  # fmt: skip
    (flipped,) = show.samples(dataset, [0], 224, settings, 0, "flip")
    (larger,) = show.samples(dataset, [0], 224, settings, 0, "expand")
    # The left edge of 40..160 of 200 pixels is at 45 of 224, and mirrored the right one is at 179.
    assert has(plain, label)[100, 43:48].any()
    assert has(flipped, label)[100, 177:182].any()
    assert not has(flipped, label)[100, 182:].any()
    assert np.ptp(np.flatnonzero(has(larger, label)[:, :].any(0))) < np.ptp(np.flatnonzero(has(plain, label).any(0)))


def test_a_photo_without_objects_is_shown(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_xml(tmp_path / "a.xml", [])
    save_image(tmp_path / "b.jpg")
    save_xml(tmp_path / "b.xml", [CAN, BOX])
    found = cache.load(Data(root=tmp_path), "all")
    assert [picture.shape for picture in show.photos(found, [0, 1], 320)] == [(240, 320, 3)] * 2


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_command_line(root: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"sheet.{suffix}"
    with pytest.raises(SystemExit) as stop:
        main(["data", "show", str(root), "--out", str(out), "--count", "5", "--columns", "3"])
    assert stop.value.code == 0
    assert "5 of 8 photos" in capsys.readouterr().out
    sheet = Image.open(out)
    assert (sheet.format, sheet.width) == ({"jpg": "JPEG", "png": "PNG"}[suffix], show.WIDTH)
    assert 2 * 450 < sheet.height < 2 * 500


@pytest.mark.parametrize(("arguments", "said"), [(["--out", "a.gif"], "a.gif"), (["--only", "flip"], "--config")])
def test_mistakes_are_one_line(
    root: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["data", "show", str(root), *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
