"""The job behind ``detkit predict``, whatever the detector: photos in; a table, annotated pictures and files out."""

from __future__ import annotations

import glob
import io
import itertools
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from detkit import formats, imaging
from detkit.console import bar
from detkit.errors import Interrupted, UserError
from detkit.files import atomic_write, next_folder
from detkit.manifest import Manifest
from detkit.runtime import decide, merge, render
from detkit.runtime.record import FILES, Record, counts, lines, write
from detkit.runtime.tiles import Flipped, Tiled, Tiling
from detkit.types import Detections

BATCH = 8  # photos that are detected in at a time where one thread detects
AHEAD = 4  # such batches that are being read or detected in
DETAILED = 5  # up to so many photos get a table each; more share one
ROWS = 25  # of one photo's table
MANY = 16  # photos from which each is a thread's, rather than each a matter of all threads
JOB = "job.json"
NAMES = "classes"  # of the file that says which classes YOLO's numbers are

_T = TypeVar("_T")

_FORMATS: dict[str, tuple[str, Callable[[Path, Detections, Sequence[str]], str]]] = {
    "json": (".json", formats.detections_json),
    "voc": (".xml", lambda photo, found, classes: formats.detections_voc(photo.name, found, classes)),
    "yolo": (".txt", lambda _photo, found, _classes: formats.detections_yolo(found)),
}
FORMATS = (*_FORMATS, *FILES)


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

    Raises UserError where one of the inputs names nothing, where a folder in it can't be read, and where a name is not
    UTF-8, which no format can hold.
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
            try:
                str(photo).encode()
            except UnicodeEncodeError:
                raise UserError(f"{os.fsencode(photo)!r}: a name that is not UTF-8; rename it") from None
            photos.setdefault(photo.resolve(), photo)
    return list(photos.values())


def _inside(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be looked into ({error.strerror})")

    inside = (Path(top, name) for top, _, names in os.walk(folder, onerror=refuse) for name in names)
    return sorted(
        path
        for path in inside
        if path.suffix.lower() in imaging.IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


class Job(BaseModel):
    """What `detkit predict` was asked for, kept beside a record so that it can be gone on with. folder: where it was
    asked, which names of photos and of the model may depend on. url: of the server that has the model. sha256: of the
    model's checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    photos: tuple[str, ...]
    folder: str
    model: str
    url: str | None = None
    sha256: str = ""
    format: str = "json"
    pictures: bool | None = None
    counts: bool = False
    score: float | None = None
    nms: merge.Kind = "hard"
    tiles: Tiling | None = None
    flip: bool = False

    @property
    def output(self) -> Output:
        """What is written."""
        return Output(self.format, self.pictures, self.counts)

    def views(self, detector: Detector) -> Detector:
        """The detector, as it is to look at photos."""
        if self.flip:
            detector = Flipped(detector)
        if self.tiles is None:
            return detector
        manifest, score = detector.manifest, self.score
        return Tiled(detector, self.tiles, lambda found: decide.are_shown(found, manifest, score))


def read_job(out: Path) -> Job:
    """What was asked for in a folder of results. Raises UserError where it can't be gone on with from here."""
    path = out / JOB
    try:
        job = Job.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{out}: nothing to go on with: it has no {JOB} (only the formats {', '.join(FILES)}, or --count, keep one)"
        ) from None
    except (OSError, ValidationError) as error:
        raise UserError(f"{path}: can't be read ({str(error).splitlines()[0]})") from None
    if Path(job.folder) != Path.cwd():
        raise UserError(f"{out}: was begun in {job.folder}: go on from there, for names of photos may depend on it")
    return job


class Output(NamedTuple):
    """What is written. format: of `FORMATS`. pictures: whether each photo is written with its boxes drawn; None: with
    the formats of a file a photo. counts: whether products are counted, in a table and counts.csv."""

    format: str = "json"
    pictures: bool | None = None
    counts: bool = False

    @property
    def drawn(self) -> bool:
        """Whether pictures are written."""
        return self.format in _FORMATS if self.pictures is None else self.pictures

    @property
    def recorded(self) -> bool:
        """Whether there is a record of all photos together, with which a job that was ended can be gone on with."""
        return self.format not in _FORMATS or self.counts


def predict(
    detector: Detector,
    inputs: Sequence[str | Path],
    out: Path | None = None,
    output: Output | None = None,
    *,
    score: float | None = None,
    jobs: int = 1,
    asked: Job | None = None,
    console: Console | None = None,
) -> int:
    """Detect in all photos of `inputs` (see `expand`), say what was found, and write it. Returns how many photos could
    not be read.

    A format of a file a photo writes OUT/<stem>.json (.xml, .txt), and OUT/<stem>.jpg (.png for a PNG) with the boxes;
    photos that share a stem get <stem>-2 and so on; beside YOLO's files, classes.txt names the classes. One of a file
    for all writes record.FILES, photo by photo.
    out: a folder that is new or empty; default predictions/<n>. score: the lowest that is shown and written; default:
    as the manifest decides. jobs: how many threads may detect at a time; photos are read, and pictures drawn, beside.
    asked: is kept beside a record; where `out` has it already, its record is gone on with. Raises UserError on bad
    options and where nothing can be written; an unreadable photo is told at the end. Raises Interrupted at Ctrl-C where
    there is a record: what it holds is whole.
    """
    output = output or Output()
    if output.format not in FORMATS:
        raise UserError(f"format '{output.format}': one of {', '.join(FORMATS)}")
    console = console or Console()
    photos = expand(inputs)
    folder = _claim(out, asked if output.recorded else None)
    report = _Report(console, detector.classes, several=len(photos) > DETAILED)
    names = dict(zip(photos, unique_stems(photos), strict=True))
    with ExitStack() as stack:
        record = stack.enter_context(Record(folder)) if output.recorded else None
        left = [photo for photo in photos if record is None or str(photo) not in record.done]
        if record and len(left) < len(photos):
            report.failures += record.errors
            report.resume(lines(folder))
            console.print(f"{len(photos) - len(left)} of {len(photos)} photos are done", highlight=False)
        work = _Work(detector, jobs, score, output, folder, names)
        display = stack.enter_context(bar(console))
        display.disable = not (report.several and console.is_terminal)
        task = display.add_task("predicting", total=len(photos), completed=len(photos) - len(left))
        full = 0
        try:
            for done in stack.enter_context(closing(work.through(left))):
                for path, content in done.files:
                    atomic_write(path, content)
                if record:
                    record.add(done.tree(detector.classes))
                report.add(done)
                full += done.full
                display.update(task, advance=1)
        except KeyboardInterrupt:
            if record is None:
                raise
            raise Interrupted(f"stopped; go on with  detkit predict --resume {folder}", signal.SIGINT) from None
    report.close(folder, len(photos), _summed_up(folder, output, detector.classes))
    if output.counts and not report.several:
        console.print(_counted(folder, detector.classes))
    say_full(console, detector, full)
    return len(report.failures)


def say_full(console: Console, detector: Detector, times: int) -> None:
    """Say how often, if ever, the network's list of boxes was full: so many `times`, or as a tiled detector knows."""
    times = detector.full if isinstance(detector, Tiled) else times
    if times:
        console.print(
            f"{times} times the network's list, of {detector.manifest.nms.keep}, was full: objects may be missing. "
            "Look at (smaller) tiles (--tiles), or export from a config with a higher model.select.keep",
            style="yellow",
            highlight=False,
        )


def _summed_up(folder: Path, output: Output, classes: Sequence[str]) -> list[Path]:
    """Write what is for all photos together; returns the files."""
    files = [write(folder, output.format, classes)] if output.format not in _FORMATS else []
    if output.format == "yolo":  # its labels are numbers
        files.append(folder / f"{NAMES}.txt")
        atomic_write(files[-1], "".join(f"{name}\n" for name in classes))
    return [*files, counts(folder, classes)] if output.counts else files


class _Done(NamedTuple):
    """A photo, and what was found in it or why it could not be read; and what is to be written, all encoded."""

    photo: Path
    found: Detections | None
    error: str = ""
    files: tuple[tuple[Path, bytes | str], ...] = ()
    full: bool = False  # the network's list of boxes was full up to the lowest score that counts

    def tree(self, classes: Sequence[str]) -> dict[str, object]:
        """Its line in the record."""
        if self.found is None:
            return {"image": str(self.photo), "error": self.error}
        return formats.detections_dict(self.photo, self.found, classes)


class _Work:
    """Reading, detecting and drawing, in threads: Pillow, ONNX Runtime and torch let others run meanwhile."""

    def __init__(
        self, detector: Detector, jobs: int, score: float | None, output: Output, folder: Path, names: dict[Path, str]
    ) -> None:
        self.detector, self.jobs, self.score = detector, jobs, score
        self.output, self.folder, self.names = output, folder, names
        # What is not drawn is needed on the canvas only, where the detector is a Session; others take pixels.
        self._read = imaging.decode if output.drawn else getattr(detector, "read", imaging.decode)

    def through(self, photos: Sequence[Path]) -> Generator[_Done]:
        """The photos in their order; a few batches are in hand at a time, and in memory."""
        return self._each_alone(photos) if self.jobs > 1 else self._in_batches(photos)

    def _each_alone(self, photos: Sequence[Path]) -> Generator[_Done]:
        """Several threads detect: each takes a photo from its file to its line."""
        with _pool(self.jobs) as pool:
            yield from _ahead((pool.submit(self._done, photo) for photo in photos), 2 * self.jobs)

    def _in_batches(self, photos: Sequence[Path]) -> Generator[_Done]:
        """One thread detects, on a GPU say; as many as there are cores read and draw for it."""
        batches = (photos[start : start + BATCH] for start in range(0, len(photos), BATCH))
        with _pool(os.cpu_count()) as helpers, _pool(1) as detecting:

            def begun(batch: Sequence[Path]) -> Future[list[Future[_Done]]]:
                reading = [helpers.submit(self._readable, photo) for photo in batch]
                return detecting.submit(detected, batch, reading)

            def detected(batch: Sequence[Path], reading: Sequence[Future[Any]]) -> list[Future[_Done]]:
                images = [one.result() for one in reading]
                rows = zip(batch, images, self._found(images), strict=True)
                return [helpers.submit(self._finished, *row) for row in rows]

            for finishing in _ahead((begun(batch) for batch in batches), AHEAD):
                yield from (one.result() for one in finishing)

    def _done(self, photo: Path) -> _Done:
        image = self._readable(photo)
        return self._finished(photo, image, *self._found([image]))

    def _found(self, images: Sequence[Any]) -> list[Detections | None]:
        """What is in each image; None where it could not be read."""
        found = iter(self.detector.detect([image for image in images if not isinstance(image, str)]))
        return [None if isinstance(image, str) else next(found) for image in images]

    def _readable(self, photo: Path) -> Any:
        """What the detector takes of a photo, or why it could not be read."""
        try:
            return self._read(photo)
        except UserError as error:
            return str(error)

    def _finished(self, photo: Path, image: Any, found: Detections | None) -> _Done:
        if found is None:
            return _Done(photo, None, image)
        kept = decide.shown(found, self.detector.manifest, self.score)
        full = decide.fills(kept, self.detector.manifest)
        target, files = self.folder / self.names[photo], list[tuple[Path, bytes | str]]()
        if self.output.drawn:
            # Not with_suffix: a stem may have a dot of its own.
            picture = target.with_name(target.name + (".png" if photo.suffix.lower() == ".png" else ".jpg"))
            content = io.BytesIO()
            drawn = Image.fromarray(render.draw(image, kept, self.detector.classes))
            drawn.save(content, "PNG" if picture.suffix == ".png" else "JPEG", quality=92)
            files.append((picture, content.getvalue()))
        if self.output.format in _FORMATS:
            suffix, text = _FORMATS[self.output.format]
            files.append((target.with_name(target.name + suffix), text(photo, kept, self.detector.classes)))
        return _Done(photo, kept, files=tuple(files), full=full)


@contextmanager
def _pool(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads that, at the end of the block, finish what they have begun and leave the rest."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(futures: Iterator[Future[_T]], count: int) -> Iterator[_T]:
    """The results in their order, `count` of them begun before they are asked for."""
    waiting = deque(itertools.islice(futures, count))
    while waiting:
        done = waiting.popleft().result()
        waiting.extend(itertools.islice(futures, 1))
        yield done


def _counted(folder: Path, classes: Sequence[str]) -> Table:
    """How many products of each class the photos of a record show: a row a class, a column a photo."""
    photos = [(Path(tree["image"]).name, Counter(one["label"] for one in tree["detections"])) for tree in lines(folder)]
    table = Table("product", title="count", title_justify="left")
    for name, _ in photos:
        table.add_column(Text(name), justify="right")
    for each in classes:
        if any(found[each] for _, found in photos):
            table.add_row(Text(each), *(str(found[each]) for _, found in photos))
    table.add_section()
    table.add_row("total", *(str(found.total()) for _, found in photos))
    return table


def unique_stems(photos: Sequence[Path]) -> list[str]:
    """A name for each photo's results: its stem, with -2, -3, ... where an earlier photo has it (in any case), or it is
    `NAMES`."""
    taken = {NAMES}
    names = []
    for photo in photos:
        name, number = photo.stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{photo.stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _claim(out: Path | None, asked: Job | None) -> Path:
    """The folder for the results: new or empty, or that of the same job."""
    if out and asked and (out / JOB).is_file() and read_job(out) == asked:
        return out
    folder = free(out)
    if asked:
        atomic_write(folder / JOB, asked.model_dump_json(indent=1) + "\n")
    return folder


def free(out: Path | None) -> Path:
    """`out`, where it is new or empty; default: the next of predictions/. Raises UserError."""
    if out is None:
        return next_folder("predictions/")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty, and nothing is overwritten; give --out a new folder")
    return out


class _Report:
    """What the user reads: a table a photo, or one over all of them where there are several."""

    def __init__(self, console: Console, classes: Sequence[str], *, several: bool) -> None:
        self.several = several
        self.failures: list[str] = []
        self._read = 0
        self._console, self._classes = console, classes
        self._objects: Counter[int] = Counter()
        self._photos: Counter[int] = Counter()

    def add(self, done: _Done) -> None:
        """Take in what was found in one photo, or that it could not be read."""
        if done.found is None:
            self.failures.append(done.error)
            return
        self._count(done.found.labels.tolist())
        if not self.several:
            height, width = done.found.hw
            self._line(f"{done.photo} ({width} x {height})", "bold")  # a title would be broken to the table's width
            self._console.print(self._table(done.found))
            for path, _ in done.files[:1]:
                self._line(f"{'picture' if path.suffix in ('.jpg', '.png') else 'written'}: {path}\n")

    def resume(self, trees: Iterable[dict[str, Any]]) -> None:
        """Take in what an earlier part of the job found."""
        for tree in trees:
            self._count([self._classes.index(one["label"]) for one in tree["detections"]])

    def _count(self, labels: Sequence[int]) -> None:
        self._read += 1
        self._objects.update(labels)
        self._photos.update(set(labels))

    def close(self, folder: Path, photos: int, written: Sequence[Path]) -> None:
        """Sum up, and name the photos that could not be read."""
        if self.several:
            self._console.print(self._summary())
        found, read = self._objects.total(), self._read
        if read:
            self._line(f"{found} object{'s' * (found != 1)} in {read} photo{'s' * (read != 1)}; results in {folder}")
        for path in written:
            self._line(f"written: {path}")
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
