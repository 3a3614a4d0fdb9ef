import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.cli import main
from detkit.config import Data
from detkit.data import cache, similar, split
from detkit.data.split import Division
from detkit.errors import UserError
from tests.data.photos import BOX, CAN, make_voc, save_image, save_xml

SHARES = {"train": 0.7, "val": 0.2, "test": 0.1}


def copies(root: Path) -> None:
    """p0 to p7 once more each: encoded anew, slightly smaller, or lighter."""
    for index in range(8):
        image = Image.open(root / "JPEGImages" / f"p{index}.jpg")
        changed = [image, image.resize((240, 180)), image.point(lambda level: min(255, level + 5))][index % 3]
        changed.save(root / "JPEGImages" / f"copy{index}.jpg", quality=60)
        save_xml(root / "Annotations" / f"copy{index}.xml", [CAN, BOX], changed.size[::-1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 photos without split files, of which 8 are near-duplicates of others; 30 of them show a jar as well."""
    root = make_voc(tmp_path_factory.mktemp("split") / "data", train=52, val=0, hw=(192, 256))
    shutil.rmtree(root / "ImageSets")
    copies(root)
    for index in range(10, 40):
        save_xml(root / "Annotations" / f"p{index}.xml", [CAN, ("jar", (1.0, 1.0, 9.0, 9.0)), BOX], (192, 256))
    return root


def where(division: Division) -> dict[str, str]:
    return {photo: name for name, photos in zip(division.splits, division.lists, strict=True) for photo in photos}


def test_near_duplicates_are_never_apart_and_every_photo_is_used_once(root: Path) -> None:
    for seed in range(5):
        division = split.divide(cache.load(Data(root=root), "all"), SHARES, seed, workers=1)
        places = where(division)
        assert all(places[f"p{index}"] == places[f"copy{index}"] for index in range(8))
        assert sorted(photo for photos in division.lists for photo in photos) == sorted(
            path.stem for path in (root / "JPEGImages").iterdir()
        )
        assert (division.groups, division.grouped) == (8, 16)


def test_classes_come_in_their_shares(root: Path) -> None:
    division = split.divide(cache.load(Data(root=root), "all"), SHARES, workers=1)
    assert division.classes == ("box", "can", "jar")
    assert division.objects.sum(0).tolist() == [60, 60, 30]
    wanted = division.objects.sum(0) * np.array(list(SHARES.values()))[:, None]
    assert np.abs(division.objects - wanted).max() <= 2
    assert [len(photos) for photos in division.lists] == division.objects[:, 0].tolist()


def test_the_seed_decides_and_neither_file_order_nor_processes_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = split.divide(cache.load(Data(root=root), "all"), SHARES, workers=1)
    assert split.divide(cache.load(Data(root=root), "all"), SHARES, seed=1, workers=1).lists != first.lists
    monkeypatch.setattr(similar, "_FEW", 1)
    assert split.divide(cache.load(Data(root=root), "all"), SHARES, workers=2).lists == first.lists
    load = cache.load

    def backwards(data: Data, name: str) -> cache.DataSet:
        found = load(data, name)
        names = [found.name(index).encode() for index in reversed(range(len(found)))]
        records = [found[index] for index in reversed(range(len(found)))]
        return cache.DataSet(
            root=found.root,
            classes=found.classes,
            paths=np.frombuffer(b"".join(names), np.uint8),
            path_ends=np.cumsum([len(name) for name in names]),
            hw=found.hw[::-1],
            boxes=np.concatenate([record.boxes for record in records]),
            labels=np.concatenate([record.labels for record in records]).astype(np.int32),
            flags=np.concatenate([record.flags for record in records]),
            box_ends=np.cumsum([len(record.labels) for record in records]),
            findings=(),
        )

    monkeypatch.setattr(cache, "load", backwards)
    assert split.divide(cache.load(Data(root=root), "all"), SHARES, workers=1).lists == first.lists


def test_many_classes_of_any_frequency() -> None:
    """Stratified at random, as many photos would hold a class in only one split by chance; here shares are kept."""
    rng = np.random.default_rng(0)
    frequency = 1 / np.arange(1, 41)
    units = 2000
    counts = rng.poisson(frequency, (units, 40))
    unit, classes = np.nonzero(counts)
    flat = split._Units(
        np.ones(units, np.int64), classes, counts[unit, classes], np.cumsum(np.bincount(unit, minlength=units))
    )
    placed = split.stratify(flat, [0.7, 0.2, 0.1], np.random.default_rng(1))
    objects = np.stack([counts[placed == s].sum(0) for s in range(3)])
    wanted = counts.sum(0) * np.array([0.7, 0.2, 0.1])[:, None]
    assert np.abs(objects - wanted).max() <= 12
    by_chance = np.stack([counts[rng.choice(3, units, p=[0.7, 0.2, 0.1]) == s].sum(0) for s in range(3)])
    assert np.abs(objects - wanted).sum() < 0.3 * np.abs(by_chance - wanted).sum()
    assert np.abs(np.bincount(placed) / units - [0.7, 0.2, 0.1]).max() < 0.02


def test_what_was_written_is_read(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    data = Data(root=tmp_path / "data")
    division = split.divide(cache.load(data, "all"), SHARES, workers=1)
    split.write(division, tmp_path / "data" / "ImageSets" / "Main")
    for row, (name, photos) in enumerate(zip(division.splits, division.lists, strict=True)):
        found = cache.load(data, name)
        assert [Path(found.name(index)).stem for index in range(len(found))] == list(photos)
        assert np.bincount(found.labels, minlength=3).tolist() == division.objects[row].tolist()


def test_the_command_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root, tmp_path / "data")
    main_folder = tmp_path / "data" / "ImageSets" / "Main"
    command = ["data", "split", str(tmp_path / "data"), "--val", "0.3", "--test", "0"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "8 groups" in shown
    assert "jar" in shown
    assert sorted(path.name for path in main_folder.iterdir()) == ["train.txt", "val.txt"]
    before = {path.name: path.read_bytes() for path in main_folder.iterdir()}
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "name another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in main_folder.iterdir()} == before
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path / "lists")])
    assert (tmp_path / "lists" / "train.txt").read_bytes() == before["train.txt"]


def test_shares_that_leave_nothing_to_train_on_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", "split", str(root), "--val", "0.6", "--test", "0.4"])
    assert stop.value.code == 2
    assert "--val" in capsys.readouterr().err


def test_too_few_photos_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_xml(tmp_path / "a.xml", [CAN])
    with pytest.raises(UserError, match="leave none for 'val'"):
        split.divide(cache.load(Data(root=tmp_path), "all"), {"train": 0.8, "val": 0.2}, workers=1)
