"""A model server in a thread of the test's own process, on the loopback, with models that a test can foretell."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import uvicorn
from PIL import Image

from detkit.serve import run
from detkit.serve.app import create
from detkit.serve.gate import Gate
from detkit.serve.models import Repository
from detkit.serve.observe import Metrics
from detkit.serve.settings import Settings
from tests.runtime.conftest import image_model, onnx_model
from tests.test_manifest import manifest

CLASSES = ("milk", "żur", "牛奶")


class Server(NamedTuple):
    url: str
    grpc: str
    models: Repository
    settings: Settings


def save(path: Path, *, image: bool = False, **changes: object) -> Path:
    """A model file, put into its place as a whole."""
    found = manifest(**({"input": "image"} if image else {}), **changes)
    new = path.with_suffix(".new")
    onnx.save(image_model(found) if image else onnx_model(found, found.size), new)
    new.replace(path)
    return path


def photo(red: int = 255, size: tuple[int, int] = (96, 64), kind: str = "PNG") -> bytes:
    """A photo of one colour, width and height as `size`; the tiny models' scores grow with its red."""
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, kind)
    return file.getvalue()


def pixels(red: int = 255, size: tuple[int, int] = (96, 64)) -> np.ndarray:
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[..., 0] = red
    return image


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """What happens in the server's thread, or process, a moment after the answer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def serving(*models: object, grpc: bool = False, **options: object) -> Iterator[Server]:
    settings = Settings(
        models=tuple(map(str, models)),
        device="cpu",
        threads=1,
        port=0,
        grpc_port=free_port() if grpc else None,
        **options,
    )
    metrics = Metrics()
    repository = Repository(settings, metrics)
    repository.load()
    app: Gate = create(settings, repository, metrics)
    config = run._config(settings, app, factory=False)
    with run._listening(config) as listener:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            port = listener.getsockname()[1]
            yield Server(f"http://127.0.0.1:{port}", f"127.0.0.1:{settings.grpc_port}", repository, settings)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start a server with these models; all end with the test."""
    with ExitStack() as stack:
        yield lambda *models, **options: stack.enter_context(serving(*models, **options))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of a module that leave it as it is: canvas model `shelf` (two versions), image model
    `whole`."""
    folder = tmp_path_factory.mktemp("models")
    first = save(folder / "1.onnx")
    second = save(folder / "2.onnx", score=0.8, resize="stretch")
    whole = save(folder / "whole.onnx", image=True)
    with serving(first, second, f"whole={whole}", grpc=True, max_pixels=10_000, max_photos=4, max_bytes=1 << 20) as one:
        yield one
