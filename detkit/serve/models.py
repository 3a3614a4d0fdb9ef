"""The models that are served: loaded, looked up by name and version, and replaced when their files are."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detkit import geometry
from detkit.errors import UserError
from detkit.manifest import Manifest
from detkit.runtime import merge
from detkit.runtime.session import Canvas, Raw, Session, detections
from detkit.serve.batching import Batcher, Image, Row
from detkit.serve.observe import Metrics, log, plain
from detkit.serve.settings import Problem, Settings
from detkit.types import Detections

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What tells a file that was replaced from the one that was loaded.
_Stamp = tuple[int, int, int]


class Engine:
    """A Session, and the batches that requests share. Results equal those of `Session.detect`."""

    def __init__(
        self,
        session: Session,
        settings: Settings,
        decoders: ThreadPoolExecutor,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        self.session = session
        self._settings, self._decoders = settings, decoders
        most = settings.max_batch if session.kind == "canvas" else 1
        self.batcher = Batcher(self._run, most=most, delay=settings.max_delay, capacity=settings.queue, observe=observe)

    @property
    def manifest(self) -> Manifest:
        """How the model was made."""
        return self.session.manifest

    async def detect(self, photos: Sequence[tuple[str, bytes]]) -> list[Detections]:
        """Detections of each photo (its name and the file's content), in its own pixels, best first.

        Raises Problem: 422, naming the photo, where one can't be read; 429 where too many are waiting; 503 where it
        takes too long.
        """
        async with self._timely():
            return await self._detect(photos)

    async def _detect(self, photos: Sequence[tuple[str, bytes]]) -> list[Detections]:
        with self.batcher.room(len(photos)) as submit:
            if len(photos) == 1:
                return [await self._one(*photos[0], submit)]
            try:
                async with asyncio.TaskGroup() as group:  # which gives up the others where one fails
                    tasks = [group.create_task(self._one(name, content, submit)) for name, content in photos]
            except BaseExceptionGroup as errors:
                raise next((one for one in errors.exceptions if isinstance(one, Problem)), errors) from None
            return [task.result() for task in tasks]

    async def _one(self, name: str, content: bytes, submit: Callable[[Image], asyncio.Future[Row]]) -> Detections:
        try:
            plan, image = await asyncio.get_running_loop().run_in_executor(self._decoders, self._prepare, content)
        except UserError as error:
            raise Problem(422, f"{name}: {str(error).removeprefix('image: ')}") from None
        boxes, scores, labels = await submit(image)
        return merge.merge(detections(plan, boxes, scores, labels), self.session.nms, self.manifest.nms)

    def _prepare(self, content: bytes) -> tuple[geometry.ResizePlan, Image]:
        read = self.session.read(content, max_pixels=self._settings.max_pixels)
        if isinstance(read, Canvas):
            return read
        hw = (read.shape[0], read.shape[1])
        return geometry.ResizePlan(hw, hw, hw), read

    async def infer(self, images: Sequence[Image]) -> Raw:
        """What `Session.run` says of images that are as the network takes them. Raises Problem 429 and 503."""
        async with self._timely():
            with self.batcher.room(len(images)) as submit:
                rows = await asyncio.gather(*map(submit, images))
        boxes, scores, labels = zip(*rows, strict=True)
        return Raw(np.stack(boxes), np.stack(scores), np.stack(labels))

    @asynccontextmanager
    async def _timely(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._settings.timeout):
                yield
        except TimeoutError:
            reason = f"no answer within {self._settings.timeout:g} s; try again"
            raise Problem(503, reason, self.batcher.retry_after()) from None

    def _run(self, images: Sequence[Image]) -> Sequence[Row]:
        if self.session.kind == "image":
            return [(raw.boxes[0], raw.scores[0], raw.labels[0]) for raw in map(self.session.run, images)]
        return list(zip(*self.session.run(np.stack(images)), strict=True))


class Entry(NamedTuple):
    """A model as clients know it. `engine` is what runs now: a request takes it once, and keeps it to its end."""

    name: str
    version: str
    path: Path
    stamp: _Stamp
    engine: Engine


def place(text: str) -> tuple[str, str, Path]:
    """Name, version and path of PATH, NAME=PATH or NAME:VERSION=PATH; '' where not said. Raises UserError."""
    head, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return "", "", Path(text)
    name, colon, version = head.partition(":")
    if not _NAME.fullmatch(name) or (colon and not _NAME.fullmatch(version)):
        raise UserError(f"{text}: a model's name and version are letters, digits, '.', '_' and '-': NAME:VERSION=PATH")
    return name, version, Path(path)


def _stamp(path: Path) -> _Stamp:
    """Raises OSError."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


class Repository:
    """All models of a server."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._decoders = ThreadPoolExecutor(os.cpu_count(), "decode")
        self._entries: dict[str, dict[str, Entry]] = {}
        self._refused: dict[Path, _Stamp | None] = {}  # files that were looked at and are not better than what runs
        self._closing: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Entry]:
        return (entry for versions in self._entries.values() for entry in versions.values())

    def load(self) -> None:
        """Load all models. Raises UserError, one line, where one can't be had, or two have one name and version."""
        for text in self._settings.models:
            name, version, path = place(text)
            session, stamp = self._open(path)
            name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", session.manifest.name).strip("-._") or "model"
            versions = self._entries.setdefault(name, {})
            version = version or str(max((int(one) for one in versions if one.isdecimal()), default=0) + 1)
            if version in versions:
                raise UserError(f"{path}: model {name} has a version {version} already; say {name}:VERSION={path}")
            versions[version] = Entry(name, version, path, stamp, self._engine(session, name, version))
            self._loaded(name, version, path, "loaded")

    def find(self, name: str | None = None, version: str | None = None) -> Entry:
        """The model of that name, or the first; of that version, or the last that was named. Raises Problem 404."""
        versions = self._entries.get(name) if name else next(iter(self._entries.values()), None)
        if versions is None:
            raise Problem(404, f"no model '{(name or '')[:100]}'; there are: {', '.join(self._entries)}")
        entry = versions.get(version) if version else list(versions.values())[-1]
        if entry is None:
            name = next(iter(versions.values())).name
            raise Problem(
                404, f"model {name} has no version '{(version or '')[:100]}'; there are: {', '.join(versions)}"
            )
        return entry

    def versions(self, name: str) -> list[str]:
        """All versions of a model."""
        return list(self._entries[name])

    async def watch(self) -> None:
        """Look at the files from time to time, for ever: where one was replaced, it is loaded and takes the place of
        the old; where it can't be, the old one goes on."""
        while self._settings.reload:
            await asyncio.sleep(self._settings.reload)
            for entry in list(self):
                await self._renew(entry)

    async def _renew(self, entry: Entry) -> None:
        try:
            stamp = _stamp(entry.path)
        except OSError:  # it is being replaced, or gone
            return
        if stamp in (entry.stamp, self._refused.get(entry.path)):
            return
        try:
            session, stamp = await asyncio.get_running_loop().run_in_executor(None, self._open, entry.path)
        except UserError as error:
            self._refused[entry.path] = stamp
            self._loaded(entry.name, entry.version, entry.path, "refused", str(error))
            return
        engine = self._engine(session, entry.name, entry.version)
        self._entries[entry.name][entry.version] = entry._replace(stamp=stamp, engine=engine)
        self._loaded(entry.name, entry.version, entry.path, "loaded")
        closing = asyncio.create_task(entry.engine.batcher.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """End what runs, once nothing is asked of it any more."""
        await asyncio.gather(*(entry.engine.batcher.close() for entry in self), *self._closing)
        self._decoders.shutdown(wait=False)

    def _open(self, path: Path) -> tuple[Session, _Stamp]:
        """A session that has worked once, and the stamp of the file that it is of. Raises UserError."""
        for _ in range(3):
            try:
                before = _stamp(path)
                session = Session(path, self._settings.device, self._settings.threads)
                if _stamp(path) != before:
                    continue  # replaced in the meantime
            except OSError as error:
                raise UserError(f"{path}: can't be read ({error.strerror or error})") from None
            try:
                session.detect([np.zeros((*session.manifest.size, 3), np.uint8)])
            except Exception as error:
                raise UserError(f"{path}: does not run ({' '.join(str(error).split())[:200]})") from error
            return session, before
        raise UserError(f"{path}: changes while it is read; replace it by renaming")

    def _engine(self, session: Session, name: str, version: str) -> Engine:
        labels = {"model": name, "version": version}
        sizes, seconds = self._metrics.batch.labels(**labels), self._metrics.network.labels(**labels)

        def observe(photos: int, took: float) -> None:
            sizes.observe(photos)
            seconds.observe(took)

        return Engine(session, self._settings, self._decoders, observe)

    def _loaded(self, name: str, version: str, path: Path, result: str, reason: str | None = None) -> None:
        self._metrics.loads.labels(name, version, result).inc()
        level = logging.INFO if reason is None else logging.ERROR
        log(level, f"model {result}", **plain({"model": name, "version": version, "path": path, "reason": reason}))
