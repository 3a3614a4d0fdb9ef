import os
from pathlib import Path

import pytest

from detkit.errors import UserError
from detkit.files import atomic_write, next_folder, require_writable


def test_writes_bytes_and_text_and_makes_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    atomic_write(target, "żur\n")
    assert target.read_bytes() == "żur\n".encode()
    atomic_write(target, b"new")
    assert target.read_bytes() == b"new"
    assert [path.name for path in target.parent.iterdir()] == ["b.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"x: can't be written \(No space left on device\)"):
        atomic_write(target, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


def test_whether_a_file_can_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    for path in (tmp_path / "a" / "b" / "x", tmp_path / "f"):
        require_writable(path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "f"]
    assert (tmp_path / "f").read_bytes() == b"old"
    for path in (tmp_path / "a", tmp_path / "f" / "x"):
        with pytest.raises(UserError, match=rf"{path.name}: can't be written \("):
            require_writable(path)


def test_next_folder_counts_on_from_the_highest(tmp_path: Path) -> None:
    for name in ("run-2", "run-10", "run-x-30", "other-40"):
        (tmp_path / name).mkdir()
    assert next_folder(tmp_path / "run-").name == "run-11"
    assert next_folder(f"{tmp_path}/new/").relative_to(tmp_path) == Path("new/1")


def test_next_folder_under_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(UserError, match="can't make a folder here"):
        next_folder(tmp_path / "f" / "run-")
