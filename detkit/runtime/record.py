"""What was found in a folder of photos, as JSON lines that a kill can't spoil, and what is made of them at the end.

A line is a photo: what formats.detections_dict gives, or, where it could not be read, its name and why.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from detkit.errors import UserError
from detkit.files import atomic_file

LINES, COUNTS = "detections.jsonl", "counts.csv"
FILES = {"jsonl": LINES, "coco": "detections.json", "csv": "detections.csv"}


class Record:
    """The JSON lines in a folder, gone on with after the last whole line. done: the photos that are in it. errors: why
    some of them could not be read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LINES
        self.done: set[str] = set()
        self.errors: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)  # a line is one call of the system: whole, or none of it
            self._file.seek(0)
            whole = 0
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                tree = json.loads(line)
                self.done.add(tree["image"])
                if "error" in tree:
                    self.errors.append(tree["error"])
                whole += len(line)
            self._file.truncate(whole)
            self._file.seek(whole)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: can't be gone on with ({error})") from None

    def add(self, tree: dict[str, Any]) -> None:
        """Write a photo's line: all of it, or none."""
        line, start = json.dumps(tree, ensure_ascii=False).encode() + b"\n", self._file.tell()
        try:
            while line:  # a disk that is nearly full takes a part without an error
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(start)
            raise UserError(f"{self.path}: can't be written ({error.strerror or error})") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The photos of a record, those left out that could not be read."""
    with (folder / LINES).open(encoding="utf-8") as file:
        for line in file:
            tree: dict[str, Any] = json.loads(line)
            if "error" not in tree:
                yield tree


@contextmanager
def _table(path: Path) -> Iterator[Any]:
    """A CSV file to write rows into."""
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        yield csv.writer(text, lineterminator="\n")
        text.flush()
        text.detach()


def write(folder: Path, kind: str, classes: Sequence[str]) -> Path:
    """What a record says in another format: `csv`, a row an object, or `coco`, its images, categories and annotations
    with scores. Returns the file; of `jsonl` the record itself."""
    path = folder / FILES[kind]
    if kind == "csv":
        with _table(path) as rows:
            rows.writerow(("image", "label", "score", "x1", "y1", "x2", "y2"))
            for tree in lines(folder):
                for one in tree["detections"]:
                    rows.writerow((tree["image"], one["label"], one["score"], *one["box"]))
    elif kind == "coco":
        _coco(folder, path, classes)
    return path


def _coco(folder: Path, path: Path, classes: Sequence[str]) -> None:
    """Written photo by photo: a folder may hold a million."""
    ids = {name: number for number, name in enumerate(classes, 1)}
    with atomic_file(path) as file:
        categories = json.dumps([{"id": number, "name": name} for name, number in ids.items()], ensure_ascii=False)
        file.write(f'{{"categories": {categories},\n"images": ['.encode())
        for number, tree in enumerate(lines(folder), 1):
            image = {"id": number, "file_name": tree["image"], "width": tree["width"], "height": tree["height"]}
            file.write((",\n" * (number > 1) + json.dumps(image, ensure_ascii=False)).encode())
        file.write(b'],\n"annotations": [')
        count = 0
        for number, tree in enumerate(lines(folder), 1):
            for one in tree["detections"]:
                count += 1
                x1, y1, x2, y2 = one["box"]
                w, h = round(x2 - x1, 2), round(y2 - y1, 2)
                found = {"id": count, "image_id": number, "category_id": ids[one["label"]], "bbox": [x1, y1, w, h]}
                found |= {"area": round(w * h, 2), "iscrowd": 0, "score": one["score"]}
                file.write((",\n" * (count > 1) + json.dumps(found)).encode())
        file.write(b"]}\n")


def counts(folder: Path, classes: Sequence[str]) -> Path:
    """A table of how many products of each class each photo shows."""
    path = folder / COUNTS
    with _table(path) as rows:
        rows.writerow(("image", *classes, "total"))
        for tree in lines(folder):
            found = Counter(one["label"] for one in tree["detections"])
            rows.writerow((tree["image"], *(found[name] for name in classes), found.total()))
    return path
