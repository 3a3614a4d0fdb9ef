"""The job behind ``detkit predict``, whatever the detector: photos in; a table, annotated pictures and files out."""

from __future__ import annotations

import glob
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from detkit import formats, imaging
from detkit.console import bar
from detkit.errors import UserError
from detkit.files import atomic_write, next_folder
from detkit.manifest import Manifest
from detkit.runtime import decide, render
from detkit.types import Detections

BATCH = 8  # photos held in memory at a time
DETAILED = 5  # up to so many photos get a table each; more share one
ROWS = 25  # of one photo's table

_FORMATS: dict[str, tuple[str, Callable[[Path, Detections, Sequence[str]], str]]] = {
    "json": (".json", formats.detections_json),
    "voc": (".xml", lambda photo, found, classes: formats.detections_voc(photo.name, found, classes)),
}


class Detector(Protocol):
    """What finds: a Session, or its counterpart under torch."""

    @property
    def manifest(self) -> Manifest:
        """How the detector was made; it decides which detections are shown."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a label is an index into them."""

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of each image, uint8 [h, w, 3] RGB of any size, in its own pixels, best first."""


def expand(inputs: Sequence[str | Path]) -> list[Path]:
    """The photos that files, folders (with all inside them) and glob patterns name: each once, in the order given, a
    folder's or a pattern's sorted by path. A file named outright counts whatever its suffix; hidden files don't.

    Raises UserError where one of the inputs names nothing.
    """
    photos: dict[Path, Path] = {}
    for given in inputs:
        path = Path(given)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = _inside(path)
        else:  # a quoted pattern, or any on Windows, where the shell doesn't expand them
            matches = [Path(match) for match in sorted(glob.glob(str(given), recursive=True))]  # noqa: PTH207
            found = [photo for match in matches for photo in (_inside(match) if match.is_dir() else [match])]
            found = [photo for photo in found if photo.suffix.lower() in imaging.IMAGE_SUFFIXES]
        if not found:
            kinds = ", ".join(imaging.IMAGE_SUFFIXES)
            raise UserError(f"{given}: no {'photos in this folder' if path.is_dir() else 'such photo'} ({kinds})")
        for photo in found:
            photos.setdefault(photo.resolve(), photo)
    return list(photos.values())


def _inside(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in imaging.IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def predict(
    detector: Detector,
    inputs: Sequence[str | Path],
    out: Path | None = None,
    *,
    format: str = "json",  # noqa: A002 - the option's name
    score: float | None = None,
    progress: bool = True,
    console: Console | None = None,
) -> int:
    """Detect in all photos of `inputs` (see `expand`), say what was found, and write OUT/<stem>.jpg (.png for a PNG)
    and OUT/<stem>.json (.xml with format 'voc') for each. Returns how many photos could not be read.

    out: a folder that is new or empty; default predictions/<n>. score: the lowest that is shown and written; default:
    as the manifest decides. progress: a bar where there is more than a handful of photos. Photos that share a stem get
    <stem>-2 and so on. Raises UserError on bad options and where nothing can be written; an unreadable photo is told
    at the end.
    """
    if format not in _FORMATS:
        raise UserError(f"format '{format}': one of {', '.join(_FORMATS)}")
    console = console or Console()
    photos = expand(inputs)
    folder = _claim(out)
    report = _Report(console, detector.classes, several=len(photos) > DETAILED)
    names = dict(zip(photos, unique_stems(photos), strict=True))
    display = bar(console)
    display.disable = not (progress and report.several and console.is_terminal)
    with display:
        task = display.add_task("predicting", total=len(photos))
        for done, batch in _batches(photos, report.failures):
            for (photo, image), found in zip(batch, detector.detect([image for _, image in batch]), strict=True):
                kept = decide.shown(found, detector.manifest, score)
                written = _write(folder / names[photo], photo, image, kept, detector.classes, format)
                report.add(photo, kept, written)
            display.update(task, completed=done)
    report.close(folder, len(photos))
    return len(report.failures)


def unique_stems(photos: Sequence[Path]) -> list[str]:
    """A name for each photo's results: its stem, with -2, -3, ... where an earlier photo has it (in any case)."""
    taken: set[str] = set()
    names = []
    for photo in photos:
        name, number = photo.stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{photo.stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _claim(out: Path | None) -> Path:
    if out is None:
        return next_folder("predictions/")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty, and nothing is overwritten; give --out a new folder")
    return out


def _batches(photos: Sequence[Path], failures: list[str]) -> Iterator[tuple[int, list[tuple[Path, NDArray[np.uint8]]]]]:
    """The photos that can be read, a few at a time, and how many have been tried; the reasons of the others go to
    `failures`."""
    for start in range(0, len(photos), BATCH):
        batch = []
        for photo in photos[start : start + BATCH]:
            try:
                batch.append((photo, imaging.decode(photo)))
            except UserError as error:
                failures.append(str(error))
        yield min(start + BATCH, len(photos)), batch


def _write(
    target: Path, photo: Path, image: NDArray[np.uint8], found: Detections, classes: Sequence[str], kind: str
) -> Path:
    """Write the picture and the file; returns the picture's path."""
    suffix, text = _FORMATS[kind]
    # Not with_suffix: a stem may have a dot of its own.
    picture = target.with_name(target.name + (".png" if photo.suffix.lower() == ".png" else ".jpg"))
    content = io.BytesIO()
    drawn = Image.fromarray(render.draw(image, found, classes))
    drawn.save(content, "PNG" if picture.suffix == ".png" else "JPEG", quality=92)
    atomic_write(picture, content.getvalue())
    atomic_write(target.with_name(target.name + suffix), text(photo, found, classes))
    return picture


class _Report:
    """What the user reads: a table a photo, or one over all of them where there are several."""

    def __init__(self, console: Console, classes: Sequence[str], *, several: bool) -> None:
        self.several = several
        self.failures: list[str] = []
        self._console, self._classes = console, classes
        self._objects: Counter[int] = Counter()
        self._photos: Counter[int] = Counter()

    def add(self, photo: Path, found: Detections, picture: Path) -> None:
        """Take in what was found in one photo."""
        labels = found.labels.tolist()
        self._objects.update(labels)
        self._photos.update(set(labels))
        if not self.several:
            height, width = found.hw
            self._line(f"{photo} ({width} x {height})", "bold")  # as a title it would be broken to the table's width
            self._console.print(self._table(found))
            self._line(f"picture: {picture}\n")

    def close(self, folder: Path, photos: int) -> None:
        """Sum up, and name the photos that could not be read."""
        if self.several:
            self._console.print(self._summary())
        read = photos - len(self.failures)
        found = self._objects.total()
        if read:
            self._line(f"{found} object{'s' * (found != 1)} in {read} photo{'s' * (read != 1)}; results in {folder}")
        if self.failures:
            self._line(f"{len(self.failures)} of {photos} photos could not be read:", "red")
            for reason in self.failures:
                self._line(f"  {reason}", "red")

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)  # Text: a path may hold what looks like markup

    def _table(self, found: Detections) -> Table:
        table = Table()
        table.add_column("class")
        for name in ("score", "x1", "y1", "x2", "y2"):
            table.add_column(name, justify="right")
        for box, score, label in list(zip(found.boxes, found.scores, found.labels, strict=True))[:ROWS]:
            table.add_row(Text(self._classes[label]), f"{score:.2f}", *(f"{v:.0f}" for v in box))
        if not len(found):
            table.add_row(Text("nothing found", "dim"))
        if len(found) > ROWS:
            table.caption = f"and {len(found) - ROWS} more"
        return table

    def _summary(self) -> Table:
        table = Table(title="found", title_justify="left")
        table.add_column("class")
        table.add_column("objects", justify="right")
        table.add_column("photos", justify="right")
        for label, count in sorted(self._objects.items(), key=lambda item: (-item[1], item[0])):
            table.add_row(Text(self._classes[label]), str(count), str(self._photos[label]))
        return table
