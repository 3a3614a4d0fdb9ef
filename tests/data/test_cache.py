import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detkit.config import Data
from detkit.data import cache, voc
from detkit.errors import UserError
from tests.data.photos import CAN, make_voc, save_image, save_xml


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return Data(root=make_voc(tmp_path / "set"))


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were scanned, so that a test can tell a hit from a miss."""
    seen: list[str] = []
    scan = voc.scan

    def spy(data: Data, split: str, *rest: Any) -> voc.DataSet:
        seen.append(split)
        return scan(data, split, *rest)

    monkeypatch.setattr(voc, "scan", spy)
    return seen


def same(one: voc.DataSet, other: voc.DataSet) -> bool:
    assert (one.root, one.classes, one.findings, len(one)) == (other.root, other.classes, other.findings, len(other))
    for index in range(len(one)):
        a, b = one[index], other[index]
        assert (a.path, a.hw, a.labels.dtype) == (b.path, b.hw, b.labels.dtype)
        assert a.boxes.tolist() == b.boxes.tolist()
        assert a.labels.tolist() == b.labels.tolist()
        assert a.flags.tolist() == b.flags.tolist()
    return True


def test_the_second_load_reads_no_xml_and_gives_the_same(data: Data, scans: list[str]) -> None:
    save_xml(data.root / "Annotations" / "p1.xml", [("can", (-4, 0, 10, 10)), CAN], flags=[1, 3])
    save_xml(data.root / "Annotations" / "p2.xml", [])
    first = cache.load(data, "train")
    second = cache.load(data, "train")
    assert scans == ["train"]
    assert same(first, second)
    assert len(first.findings) == 1
    assert cache.paths(data, "train")[0].is_file()
    assert len(cache.load(data, "val")) == 2
    assert scans == ["train", "val"]


def test_the_data_set_may_be_moved(data: Data, scans: list[str], tmp_path: Path) -> None:
    elsewhere = data.model_copy(update={"cache": tmp_path / "cache"})
    cache.load(elsewhere, "train")
    assert not (data.root / ".detkit-cache").exists()
    cache.load(elsewhere, "train")
    assert scans == ["train"]
    data.root.rename(tmp_path / "moved")
    moved = elsewhere.model_copy(update={"root": tmp_path / "moved"})
    assert Path(cache.load(moved, "train")[0].path).is_file()


def _edit_xml(root: Path) -> None:
    path = root / "Annotations" / "p1.xml"
    path.write_text(path.read_text().replace(">can<", ">cup<", 1))


def _edit_one_coordinate(root: Path) -> None:
    path = root / "Annotations" / "p3.xml"
    path.write_text(path.read_text().replace("<xmax>20<", "<xmax>21<", 1))


def _replace_image(root: Path) -> None:
    save_image(root / "JPEGImages" / "p0.jpg", seed=99)


def _remove_photo(root: Path) -> None:
    (root / "ImageSets" / "Main" / "train.txt").write_text("p1\np2\np3\n")


def _add_classes(root: Path) -> None:
    (root / "classes.txt").write_text("can\nbox\ncup\n")


@pytest.mark.parametrize("change", [_edit_xml, _edit_one_coordinate, _replace_image, _remove_photo, _add_classes])
def test_every_change_is_seen(data: Data, scans: list[str], change: Any) -> None:
    before = cache.load(data, "train")
    change(data.root)
    after = cache.load(data, "train")
    assert scans == ["train", "train"]
    assert same(after, voc.scan(data, "train"))
    assert change is _replace_image or not (
        before.classes == after.classes and len(before) == len(after) and (before.boxes == after.boxes).all()
    )


@pytest.mark.parametrize(
    "setting", [{"convention": "devkit"}, {"unlabelled": "skip"}, {"classes": ("can", "box")}, {"val_share": 0.5}]
)
def test_other_settings_have_another_cache(data: Data, scans: list[str], setting: dict[str, Any]) -> None:
    cache.load(data, "train")
    cache.load(data.model_copy(update=setting), "train")
    cache.load(data, "train")
    assert scans == ["train", "train"]


def test_a_new_parser_makes_old_caches_stale(data: Data, scans: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cache.load(data, "train")
    monkeypatch.setattr(voc, "PARSER", voc.PARSER + 1)
    cache.load(data, "train")
    assert scans == ["train", "train"]


def test_a_damaged_cache_is_rebuilt(data: Data, scans: list[str]) -> None:
    expected = cache.load(data, "train")
    path = cache.paths(data, "train")[0]
    whole = path.read_bytes()
    harm = np.random.default_rng(0)
    damaged = [b"", b"junk", pickle.dumps([1, 2]), pickle.dumps({}), whole[:-1], whole[: len(whole) // 2], whole[5:]]
    for _ in range(30):
        content = bytearray(whole)
        content[harm.integers(3, 60)] ^= int(harm.integers(1, 256))  # the opcodes and the key are here
        damaged.append(bytes(content))
    for content in damaged:
        path.write_bytes(content)
        assert same(cache.load(data, "train"), expected)
    assert len(scans) > 25  # not all harm changes what is read


def test_columns_that_disagree_are_not_used(data: Data, scans: list[str]) -> None:
    expected = cache.load(data, "train")
    path = cache.paths(data, "train")[0]
    content = pickle.loads(path.read_bytes())
    for column in ("paths", "path_ends", "hw", "boxes", "labels", "flags", "box_ends"):
        path.write_bytes(pickle.dumps(content | {column: content[column][:-32]}))
        assert same(cache.load(data, "train"), expected)
    assert len(scans) == 8


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_does_nothing(data: Data, tmp_path: Path) -> None:
    cache.load(data, "train")
    path = cache.paths(data, "train")[0]
    for protocol in (0, 2, 5):
        path.write_bytes(pickle.dumps({"key": _Touch(tmp_path / "owned")}, protocol))
        with pytest.raises(UserError, match="delete it") as caught:
            cache.load(data, "train")
        assert str(path) in str(caught.value)
        assert "mkdir" in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_a_folder_that_cant_be_written_falls_back_to_the_users(data: Data, scans: list[str], tmp_path: Path) -> None:
    (data.root / ".detkit-cache").write_text("a file where the folder should be, which stops even root")
    cache.load(data, "train")
    cache.load(data, "train")
    assert scans == ["train"]
    assert [path.parent for path in (tmp_path / "user").rglob("*.pickle")] == [tmp_path / "user" / "detkit"]
    shutil.rmtree(tmp_path / "user")
    (tmp_path / "user").write_text("and here too")
    assert len(cache.load(data, "train")) == 4


def test_many_may_build_it_at_once(data: Data) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cache.load(data, "train"), range(8)))
    assert all(same(found[0], other) for other in found)
    assert [path.suffix for path in (data.root / ".detkit-cache").iterdir()] == [".pickle"]


def test_user_errors_are_not_cached(data: Data) -> None:
    photo = data.root / "JPEGImages" / "p0.jpg"
    whole = photo.read_bytes()
    photo.write_bytes(whole[:-200])
    for _ in range(2):
        with pytest.raises(UserError, match=r"p0\.jpg"):
            cache.load(data, "train")
    photo.write_bytes(whole)
    assert len(cache.load(data, "train")) == 4
