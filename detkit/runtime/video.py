"""Videos and cameras: each product of a moving picture followed from frame to frame, and counted once.

PyAV reads and writes; which detection is which product is ByteTrack's to say (Zhang 2022; edgefirst-tracker).
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from detkit import formats
from detkit.console import bar
from detkit.errors import Interrupted, UserError, need
from detkit.files import atomic_write
from detkit.runtime import decide, render
from detkit.runtime.predict import Detector, free, say_full
from detkit.types import Detections

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv")
BATCH = 8  # frames of a file that the network is given at a time; a camera's come one by one
FRAMES = 3  # in which a product must be seen to be counted: what is found once is more often no product
LINGER = 1.0  # seconds for which a product that is not seen is remembered
UNSURE = 0.5  # share of the lowest score that counts, down to which a product that is known already is followed
REACH = 0.1  # IoU of a product with where it is expected

_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}
_CODECS = ("libx264", "libopenh264", "mpeg4")  # the first that this PyAV has


def is_video(name: str) -> bool:
    """Whether `name` means a video or a camera: by its suffix, as a URL with a scheme, or as camera:NUMBER."""
    return "://" in name or name.startswith("camera:") or Path(name).suffix.lower() in SUFFIXES


class Frame(NamedTuple):
    """image: uint8 [h, w, 3] RGB, turned as it is to be seen. time: seconds from the start. pts, base: the same, as the
    file has it."""

    image: NDArray[np.uint8]
    time: float
    pts: int
    base: Fraction


class Reader:
    """The frames of a video file, a URL or a camera. count: how many there are, 0 where that is not known.

    Raises UserError where it can't be opened or read, or shows nothing.
    """

    def __init__(self, name: str) -> None:
        self.name, self._av = name, need("av")
        source, kind = name, None
        self.live = name.startswith("camera:")
        if self.live:
            if sys.platform not in _CAMERAS:
                raise UserError(f"{name}: cameras are read on Linux, macOS and Windows; give a URL or a file")
            kind, pattern = _CAMERAS[sys.platform]
            source = pattern.format(name.removeprefix("camera:"))
        try:
            self._file = self._av.open(source, format=kind)
            self._stream = self._file.streams.video[0]
        except (self._av.error.FFmpegError, OSError) as error:
            raise UserError(f"{name}: can't be opened as a video ({_reason(error)})") from None
        except IndexError:
            raise UserError(f"{name}: has no picture, only sound or text") from None
        self._stream.thread_type = "AUTO"
        self.count: int = self._stream.frames
        self.rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 30)

    def __iter__(self) -> Iterator[Frame]:
        start = last = None
        try:
            for number, frame in enumerate(self._file.decode(self._stream)):
                base = frame.time_base or 1 / self.rate
                pts = frame.pts if frame.pts is not None else round(number / self.rate / base)
                start = pts if start is None else start
                if last is not None and pts <= last:
                    continue  # a broken clock: a frame of the past
                last = pts
                image = frame.to_ndarray(format="rgb24")
                turns = round(frame.rotation / 90) % 4
                image = np.ascontiguousarray(np.rot90(image, turns))
                yield Frame(image, float((pts - start) * base), pts - start, base)
        except (self._av.error.FFmpegError, OSError) as error:
            raise UserError(f"{self.name}: can't be read on ({_reason(error)})") from None

    def close(self) -> None:
        """Let the file or the camera go."""
        self._file.close()


class Writer:
    """An H.264 video in an MP4 file, which gets its name when it is whole."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path, self._rate, self._av = path, rate, need("av")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._part = path.with_name(f".{path.name}.part")
        self._file: Any = None
        self._stream: Any = None

    def add(self, frame: Frame, image: NDArray[np.uint8]) -> None:
        """Another frame, at the time of `frame`: uint8 [h, w, 3] RGB."""
        height, width = image.shape[:2]
        if self._file is None:
            codec = next(name for name in _CODECS if name in self._av.codecs_available)
            self._file = self._av.open(str(self._part), "w", format="mp4")
            self._stream = self._file.add_stream(codec, rate=self._rate)
            self._stream.height, self._stream.width = height + height % 2, width + width % 2  # its colours need even
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = frame.base
            if codec != "mpeg4":
                self._stream.options = {"crf": "20", "preset": "veryfast"}
        if (height + height % 2, width + width % 2) != (self._stream.height, self._stream.width):
            raise UserError(f"{self.path}: a video can't change its size in mid-film; leave it out with --no-pictures")
        padded = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
        picture.pts, picture.time_base = frame.pts, frame.base
        self._file.mux(self._stream.encode(picture))

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.mux(self._stream.encode(None))
            self._file.close()
            self._part.replace(self.path)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


class Tracked(NamedTuple):
    """What is seen in one frame, best first, and the number of each thing."""

    found: Detections
    numbers: NDArray[np.int64]


class Tracks:
    """Which detection is which product, frame by frame; classes apart. limits: of each class, the score from which a
    thing that is not known yet counts."""

    def __init__(self, limits: Sequence[float]) -> None:
        self._limits = np.array(limits, np.float32)
        self._make: Callable[[float], Any] = lambda limit: need("edgefirst.tracker").ByteTrack(
            high_conf=limit, iou=REACH, update=1.0, lifespan_ns=int(LINGER * 1e9)
        )
        self._trackers: dict[int, Any] = {}
        self._numbers: dict[str, int] = {}
        self._seen: Counter[tuple[int, int]] = Counter()  # frames by label and number

    def update(self, found: Detections, time: float) -> Tracked:
        """The detections of the next frame, at `time` seconds, that are of some thing."""
        enough = found.scores >= UNSURE * self._limits[found.labels]
        found = Detections(found.boxes[enough], found.scores[enough], found.labels[enough], found.hw)
        numbers = np.zeros(len(found), np.int64)
        for label in np.unique(found.labels).tolist():
            if label not in self._trackers:
                self._trackers[label] = self._make(float(self._limits[label]))
        for label, tracker in self._trackers.items():
            rows = np.flatnonzero(found.labels == label)
            boxes = np.ascontiguousarray(found.boxes[rows] / max(found.hw))
            known = tracker.update(boxes, found.scores[rows], np.zeros(len(rows), np.uintp), int(time * 1e9))
            for row, track in zip(rows.tolist(), known, strict=True):
                if track is not None:
                    numbers[row] = self._numbers.setdefault(track.uuid, len(self._numbers) + 1)
                    self._seen[label, int(numbers[row])] += 1
        kept = numbers > 0
        return Tracked(Detections(found.boxes[kept], found.scores[kept], found.labels[kept], found.hw), numbers[kept])

    def counts(self, frames: int) -> Counter[int]:
        """How many different things of each class there were, in so many frames."""
        least = min(FRAMES, frames)
        return Counter(label for (label, _), seen in self._seen.items() if seen >= least)


def predict(
    detector: Detector,
    name: str,
    out: Path | None = None,
    *,
    score: float | None = None,
    pictures: bool = True,
    console: Console | None = None,
) -> Counter[int]:
    """Detect in all frames of a video or camera (see `is_video`), follow the products, and write OUT/<stem>.jsonl (a
    line a frame), OUT/<stem>.mp4 with the boxes (if `pictures`) and OUT/counts.csv. Returns how many different
    products of each class there were.

    out, score: as predict.predict has them. Raises UserError where the video can't be read, and Interrupted at Ctrl-C:
    what was written until then is whole, and the only way in which a camera ends.
    """
    console = console or Console()
    manifest, classes = detector.manifest, len(detector.classes)
    tracks = Tracks(decide.thresholds(manifest) if score is None else (score,) * classes)
    frames = full = 0
    with ExitStack() as stack:
        reader = stack.enter_context(closing(Reader(name)))
        folder = free(out)
        folder.mkdir(parents=True, exist_ok=True)
        stem = Path(name).stem if "://" not in name and not reader.live else "video"
        lines = stack.enter_context((folder / f"{stem}.jsonl").open("wb", buffering=0))
        writer = stack.enter_context(closing(Writer(folder / f"{stem}.mp4", reader.rate))) if pictures else None
        work = stack.enter_context(ThreadPoolExecutor(2))
        display = stack.enter_context(bar(console))
        task = display.add_task("predicting", total=reader.count or None)
        drawn: Future[None] | None = None
        try:
            for batch, found in _ahead(detector, reader, work):
                full += sum(decide.fills(decide.shown(one, manifest, score), manifest) for one in found)
                tracked = [
                    tracks.update(decide.scored(one, manifest), frame.time)
                    for frame, one in zip(batch, found, strict=True)
                ]
                for frame, one in zip(batch, tracked, strict=True):
                    lines.write(_line(name, frames, frame, one, detector.classes))
                    frames += 1
                if drawn:
                    drawn.result()
                drawn = work.submit(_draw, writer, batch, tracked, detector.classes) if writer else None
                display.update(task, advance=len(batch))
        except KeyboardInterrupt:
            stopped = True
        else:
            stopped = False
        if drawn:
            drawn.result()
    if not frames and not stopped:
        raise UserError(f"{name}: shows no frame")
    counts = tracks.counts(frames)
    atomic_write(folder / "counts.csv", _csv(counts, detector.classes))
    console.print(_table(counts, detector.classes))
    text = f"{counts.total()} different objects in {frames} frames; results in {folder}"
    console.print(Text(text), soft_wrap=True)
    say_full(console, detector, full)
    if stopped:
        raise Interrupted(f"stopped after {frames} frames; what was found is in {folder}", signal.SIGINT)
    return counts


def _ahead(
    detector: Detector, reader: Reader, work: ThreadPoolExecutor
) -> Iterator[tuple[list[Frame], list[Detections]]]:
    """Frames and what is in them, the next ones read meanwhile."""
    frames, size = iter(reader), 1 if reader.live else BATCH

    def read() -> list[Frame]:
        return list(itertools.islice(frames, size))

    coming = work.submit(read)
    while batch := coming.result():
        coming = work.submit(read)
        yield batch, detector.detect([frame.image for frame in batch])


def _draw(writer: Writer, batch: Sequence[Frame], tracked: Sequence[Tracked], classes: Sequence[str]) -> None:
    for frame, one in zip(batch, tracked, strict=True):
        picture = render.draw(frame.image, one.found, classes, scores=False, tracks=one.numbers.tolist())
        writer.add(frame, picture)


def _line(name: str, number: int, frame: Frame, tracked: Tracked, classes: Sequence[str]) -> bytes:
    """A frame in the record: as a photo's, with its number and time, and the number of each product."""
    tree: dict[str, Any] = formats.detections_dict(name, tracked.found, classes)
    head = {"image": tree.pop("image"), "frame": number, "time": round(frame.time, 3)}
    for one, track in zip(tree["detections"], tracked.numbers.tolist(), strict=True):
        one["track"] = track
    return json.dumps(head | tree, ensure_ascii=False).encode() + b"\n"


def _rows(counts: Counter[int], classes: Sequence[str]) -> list[tuple[str, int]]:
    rows = [(classes[label], count) for label, count in sorted(counts.items())]
    return [*rows, ("total", counts.total())]


def _csv(counts: Counter[int], classes: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("label", "count"), *_rows(counts, classes)])
    return text.getvalue()


def _table(counts: Counter[int], classes: Sequence[str]) -> Table:
    table = Table("product", title="different products", title_justify="left")
    table.add_column("count", justify="right")
    for name, count in _rows(counts, classes):
        if name == "total":
            table.add_section()
        table.add_row(Text(name), str(count))
    return table
