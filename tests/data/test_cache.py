import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit import imaging
from detkit.config import Data
from detkit.data import cache, convert, pixels, scan, voc
from detkit.data.labels import DataSet
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
    real = scan.scan

    def spy(data: Data, split: str, *rest: Any, **more: Any) -> DataSet:
        seen.append(split)
        return real(data, split, *rest, **more)

    monkeypatch.setattr(scan, "scan", spy)
    return seen


def same(one: DataSet, other: DataSet) -> bool:
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
    assert [finding.kind for finding in first.findings] == ["coordinates", "box partly outside"]
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
    assert same(after, scan.scan(data, "train"))
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
    monkeypatch.setattr(scan, "VERSION", scan.VERSION + 1)
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
    assert {path.parent for path in (tmp_path / "user").rglob("*.pickle")} == {tmp_path / "user" / "detkit"}
    shutil.rmtree(tmp_path / "user")
    (tmp_path / "user").write_text("and here too")
    assert len(cache.load(data, "train")) == 4


def test_many_may_build_it_at_once(data: Data) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cache.load(data, "train"), range(8)))
    assert all(same(found[0], other) for other in found)
    assert {path.suffix for path in (data.root / ".detkit-cache").iterdir()} == {".pickle"}


def test_user_errors_are_not_cached(data: Data) -> None:
    photo = data.root / "JPEGImages" / "p0.jpg"
    whole = photo.read_bytes()
    photo.write_bytes(whole[:-200])
    for _ in range(2):
        with pytest.raises(UserError, match=r"p0\.jpg"):
            cache.load(data, "train")
    photo.write_bytes(whole)
    assert len(cache.load(data, "train")) == 4


# --- only what changed is read again


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were parsed, or whose header was read."""
    seen: list[str] = []
    parse, check = voc.parse, imaging.check

    def spy_parse(root: Path, names: list[str], *rest: Any) -> Any:
        seen.extend(names)
        return parse(root, names, *rest)

    def spy_check(path: str) -> Any:
        seen.append(Path(path).name)
        return check(path)

    monkeypatch.setattr(voc, "parse", spy_parse)
    monkeypatch.setattr(imaging, "check", spy_check)
    return seen


def test_only_what_changed_is_read_again(data: Data, reads: list[str]) -> None:
    cache.load(data, "train")
    assert len(reads) == 6 + 4
    reads.clear()
    cache.load(data, "val")
    assert reads == ["p4.jpg", "p5.jpg"]
    for change, read in (
        (_edit_xml, ["Annotations/p1.xml"]),
        (_edit_one_coordinate, ["Annotations/p3.xml"]),
        (_replace_image, ["p0.jpg"]),
        (_remove_photo, []),
        (_add_classes, []),
    ):
        reads.clear()
        change(data.root)
        found = cache.load(data, "train")
        assert reads == read
        assert same(found, scan.scan(data, "train"))
    save_image(data.root / "JPEGImages" / "p9.jpg")
    save_xml(data.root / "Annotations" / "p9.xml", [("cup", (1, 2, 3, 4))])
    (data.root / "Annotations" / "p0.xml").unlink()
    (data.root / "JPEGImages" / "p0.jpg").unlink()
    (data.root / "ImageSets" / "Main" / "train.txt").write_text("p9\np3\np1\n")
    reads.clear()
    found = cache.load(data, "train")
    assert reads == ["Annotations/p9.xml", "p9.jpg"]
    assert same(found, scan.scan(data, "train"))


def test_what_has_a_new_time_but_the_same_content_is_not_parsed(data: Data, reads: list[str]) -> None:
    before = cache.load(data, "train")
    for path in (data.root / "Annotations").iterdir():
        path.write_bytes(path.read_bytes())
    reads.clear()
    assert same(cache.load(data, "train"), before)
    assert reads == []


def test_verify_finds_what_the_stat_hides(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.load(data, "train")
    assert cache.verify(data) == []
    listed = voc.listing(data)
    _edit_one_coordinate(data.root)
    _edit_xml(data.root)
    monkeypatch.setattr(voc, "listing", lambda _: listed)  # a file system that tells of no change
    assert same(cache.load(data, "train"), before)
    assert cache.verify(data) == ["Annotations/p1.xml", "Annotations/p3.xml"]
    assert same(cache.load(data, "train"), scan.scan(data, "train"))
    assert cache.verify(data) == []


def test_verify_sees_a_photo_of_another_size_and_forgets_what_it_cannot_compare(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.load(data, "train")
    listed = voc.listing(data)
    Image.new("RGB", (32, 24)).save(data.root / "JPEGImages" / "p0.jpg")
    monkeypatch.setattr(voc, "listing", lambda _: listed)
    assert cache.verify(data) == ["JPEGImages/p0.jpg"]
    assert cache.load(data, "train").hw[0].tolist() == [24, 32]
    monkeypatch.undo()
    other = Data(root=data.root.with_name("other"), format="labelme")
    convert.convert(data.root, other.root, "labelme")
    cache.load(other, "all")
    place = cache.paths(other, "all")[0]
    assert place.exists()
    assert cache.verify(other) == []
    assert not place.exists()


def test_the_decoded_photos_are_listed_and_cleared_as_well(data: Data) -> None:
    cache.load(data, "train")
    place = cache.pixels(data, "train", (24, 32), "stretch")[0]
    pixels.on_disk(pixels.Files(cache.load(data, "train"), False), (24, 32), "stretch", [place], 1, lambda *_: None)
    assert place in [entry.path for entry in cache.info(data)]
    assert place in cache.clear(data)
    assert cache.info(data) == []


def test_damaged_facts_are_not_used(data: Data) -> None:
    cache.load(data, "train")
    path = cache.facts_paths(data)[0]
    content = pickle.loads(path.read_bytes())
    _edit_xml(data.root)
    expected = scan.scan(data, "train")
    for damage in (
        {"hw": b""},
        {"ends": b"1234567"},
        {"digests": b""},
        {"images": (b"a", b"")},
        {"vocabulary": 3},
        None,
    ):
        path.write_bytes(b"junk" if damage is None else pickle.dumps(content | damage))
        cache.paths(data, "train")[0].unlink()
        assert same(cache.load(data, "train"), expected)
    path.write_bytes(pickle.dumps({"version": _Touch(data.root / "owned")}))
    cache.paths(data, "train")[0].unlink()
    with pytest.raises(UserError, match="delete it"):
        cache.load(data, "train")
    assert not (data.root / "owned").exists()


def test_info_and_clear(data: Data, tmp_path: Path) -> None:
    assert cache.info(data) == []
    cache.load(data, "train")
    cache.load(data, "val")
    other = Data(root=make_voc(tmp_path / "other"), cache=data.root / cache.FOLDER)
    cache.load(other, "train")
    entries = cache.info(data)
    assert {(entry.split, entry.photos, entry.objects) for entry in entries} == {
        ("", 6, 12), ("train", 4, 8), ("val", 2, 4)
    }  # fmt: skip
    assert all(entry.size == entry.path.stat().st_size for entry in entries)
    entries[0].path.write_bytes(b"junk")
    assert [entry.photos for entry in cache.info(data)].count(-1) == 1
    assert sorted(cache.clear(data)) == sorted(entry.path for entry in entries)
    assert cache.info(data) == []
    assert len(cache.info(other)) == 2  # another data set's


# --- many processes


def _load_and_sum(root: str) -> float:
    return float(cache.load(Data(root=Path(root)), "train").boxes.sum())


@pytest.mark.slow
def test_processes_that_build_at_once_all_succeed(data: Data) -> None:
    expected = float(scan.scan(data, "train").boxes.sum())
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        for _ in range(5):
            assert list(pool.map(_load_and_sum, [str(data.root)] * 6)) == [expected] * 6
            cache.clear(data)


_KILLED = """
import os, signal, sys
from pathlib import Path
from detkit import imaging
from detkit.config import Data
from detkit.data import cache
from detkit import files

fsync, count = os.fsync, 0
def die(number):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.ftruncate(number, os.fstat(number).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(number)
os.fsync = die
cache.load(Data(root=Path(sys.argv[1])), "train")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system can't kill a process")
@pytest.mark.parametrize("write", [1, 2])
def test_a_cache_whose_writer_was_killed_is_built_again(data: Data, scans: list[str], write: int) -> None:
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(data.root), str(write)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((data.root / cache.FOLDER).glob("*.pickle"))) == write - 1  # the half-written one is not in place
    found = cache.load(data, "train")
    assert scans == ["train"]
    assert same(found, scan.scan(data, "train"))
