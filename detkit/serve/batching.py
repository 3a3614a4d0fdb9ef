"""Images of many requests through one network, a few at a time (dynamic micro-batching)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit.serve.settings import Problem

Image = NDArray[np.uint8]
Row = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
Run = Callable[[Sequence[Image]], Sequence[Row]]
_PACE = 0.2  # weight of the newest batch in the running mean of seconds an image


class _Waiting(NamedTuple):
    image: Image
    result: asyncio.Future[Row]


class Batcher:
    """Gathers images until there are `most` of them, or `delay` seconds have passed since the first, and runs them.

    It waits only while other images are on their way: a lone client is not delayed. run: images -> a row of each, in a
    thread of this batcher's own. capacity: images accepted and not released; above it `room` raises Problem 429.
    observe: told each batch's size and its seconds. To be used from one event loop.
    """

    def __init__(
        self, run: Run, *, most: int, delay: float, capacity: int, observe: Callable[[int, float], None] | None = None
    ) -> None:
        self._run, self._most, self._delay, self._capacity = run, most, delay, capacity
        self._observe = observe
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "network")
        self._worker: asyncio.Task[None] | None = None
        self._coming = 0  # images that were accepted and have not got to the queue
        self._pace = 0.0
        self.held = 0

    @contextlib.contextmanager
    def room(self, images: int) -> Iterator[Callable[[Image], asyncio.Future[Row]]]:
        """Room for so many images, and the function that sends one of them to the network. Raises Problem 429."""
        if images > self._capacity:
            raise Problem(413, f"{images} images; at most {self._capacity} fit into the queue")
        if self.held + images > self._capacity:
            raise Problem(429, f"{self.held} photos are waiting already; try again", self.retry_after())
        left = images
        self.held += images
        self._coming += images

        def submit(image: Image) -> asyncio.Future[Row]:
            nonlocal left
            left -= 1
            self._coming -= 1
            result: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
            self._queue.put_nowait(_Waiting(image, result))
            if self._worker is None:
                self._worker = asyncio.create_task(self._work(), name="batches")
            return result

        try:
            yield submit
        finally:
            self._coming -= left
            self.held -= images

    def retry_after(self) -> int:
        """In how many whole seconds the queue will be about empty."""
        return max(1, math.ceil(self.held * self._pace))

    async def close(self) -> None:
        """Wait until every image that was accepted has been released, and end the thread."""
        while self.held:
            await asyncio.sleep(0.01)
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        self._thread.shutdown(wait=False)

    async def _gather(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        until = asyncio.get_running_loop().time() + self._delay
        while len(batch) < self._most:
            if not self._queue.empty():
                batch.append(self._queue.get_nowait())
                continue
            if not self._coming:
                break
            try:
                async with asyncio.timeout_at(until):
                    batch.append(await self._queue.get())
            except TimeoutError:
                break
        return [one for one in batch if not one.result.done()]  # done: its request was given up

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._gather()
            if not batch:
                continue
            start = time.perf_counter()
            try:
                rows: Sequence[Any] = await loop.run_in_executor(self._thread, self._run, [one.image for one in batch])
            except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it, and others go on
                rows = [error] * len(batch)
            seconds = time.perf_counter() - start
            self._pace += (_PACE if self._pace else 1) * (seconds / len(batch) - self._pace)
            if self._observe:
                self._observe(len(batch), seconds)
            for one, row in zip(batch, rows, strict=True):
                if one.result.done():
                    continue
                if isinstance(row, Exception):
                    one.result.set_exception(row)
                else:
                    one.result.set_result(row)
