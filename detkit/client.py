"""Programs' side of a model server (``detkit serve``): photos in, detections out, trying again where it is busy."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from detkit.errors import UserError, need
from detkit.manifest import Manifest
from detkit.runtime.session import IMAGE, INPUT, OUTPUTS, Raw, detect_with
from detkit.types import Detections

Photo = str | Path | bytes
_LENGTH = "inference-header-content-length"
_DTYPES: dict[str, type[np.generic]] = {"boxes": np.float32, "scores": np.float32, "labels": np.int64}
_BUSY = (429, 503)
_LONGEST = 10.0  # seconds between tries, unless the server says more


class ServerError(UserError):
    """The server's answer is an error. `status`: the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Call(NamedTuple):
    """A request, and what makes the result of its answer."""

    method: str
    path: str
    result: Callable[[Any], Any]
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


def _files(photos: Sequence[Photo]) -> list[tuple[str, tuple[str, bytes]]]:
    """Raises UserError where a file can't be read."""
    files = []
    for number, photo in enumerate(photos, 1):
        try:
            content = photo if isinstance(photo, bytes) else Path(photo).read_bytes()
        except OSError as error:
            raise UserError(f"{photo!s}: can't be read ({error.strerror or error})") from None
        files.append(("photo", (f"{number}" if isinstance(photo, bytes) else Path(photo).name, content)))
    return files


def _detect(
    photos: Sequence[Photo],
    model: str | None,
    version: str | None,
    score: float | None,
    labels: Sequence[str] | None,
    kind: str,
    result: Callable[[Any], Any],
) -> _Call:
    wanted = {"model": model, "version": version, "score": score, "label": labels, "format": kind}
    params = {name: value for name, value in wanted.items() if value is not None}
    return _Call("POST", "/v1/detect", result, {"params": params, "files": _files(photos)})


def _path(model: str, version: str | None) -> str:
    return f"/models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")


def _manifest(model: str, version: str | None) -> _Call:
    return _Call("GET", f"/v1{_path(model, version)}", lambda answer: Manifest.from_json(answer.content, model))


def _infer(images: NDArray[np.uint8], model: str, version: str | None) -> _Call:
    content = np.ascontiguousarray(images).tobytes()
    tensor = {
        "name": INPUT if images.ndim == 4 else IMAGE, "datatype": "UINT8", "shape": list(images.shape),
        "parameters": {"binary_data_size": len(content)},
    }  # fmt: skip
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {_LENGTH: str(len(head)), "content-type": "application/octet-stream"}
    return _Call("POST", f"/v2{_path(model, version)}/infer", _raw, {"content": head + content, "headers": headers})


def _raw(answer: Any) -> Raw:
    length = int(answer.headers[_LENGTH])
    rest, tensors = memoryview(answer.content)[length:], {}
    for one in json.loads(answer.content[:length])["outputs"]:
        size = one["parameters"]["binary_data_size"]
        tensors[one["name"]] = np.frombuffer(rest[:size], _DTYPES[one["name"]]).reshape(one["shape"])
        rest = rest[size:]
    boxes, scores, labels = (tensors[name] for name in OUTPUTS)
    return Raw(boxes, scores, labels) if boxes.ndim == 3 else Raw(boxes[None], scores[None], labels[None])


class _Base:
    """What both clients have: where the server is, and when to try again."""

    def __init__(
        self, url: str, *, token: str | None = None, timeout: float = 60.0, retries: int = 5, verify: bool | str = True
    ) -> None:
        self.url, self._retries = url.rstrip("/"), retries
        token = token or os.environ.get("DETKIT_TOKEN")
        httpx = self._httpx = need("httpx2")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"{url}: a server's address begins with http:// or https://")
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "timeout": timeout,
            "headers": {"authorization": f"Bearer {token}"} if token else {},
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
        }
        if isinstance(verify, str):
            import ssl

            self._options["verify"] = ssl.create_default_context(cafile=verify)
        else:
            self._options["verify"] = verify

    def _wait(self, attempt: int, answer: Any) -> float | None:
        """Seconds until the next try, None where `answer` is to be taken as it is: a response, or an exception. Raises
        UserError for an exception with which there is no further try."""
        failed = isinstance(answer, Exception)
        if failed and (attempt >= self._retries or isinstance(answer, self._httpx.ReadTimeout)):
            raise UserError(f"{self.url}: no answer ({' '.join(str(answer).split()) or type(answer).__name__})")
        if not failed and (answer.status_code not in _BUSY or attempt >= self._retries):
            return None
        said = "" if failed else answer.headers.get("retry-after", "")
        backoff: float = min(_LONGEST, 0.25 * 2**attempt) * random.uniform(0.5, 1)
        return max(float(said) if said.isdecimal() else 0.0, backoff)

    def _result(self, call: _Call, answer: Any) -> Any:
        if answer.status_code >= 400:
            try:
                reason = answer.json()["error"]
            except (ValueError, KeyError, TypeError):
                reason = answer.reason_phrase
            raise ServerError(f"{self.url}: {reason} ({answer.status_code})", answer.status_code)
        return call.result(answer)


class Client(_Base):
    """A client that waits for its answers; several threads may share it.

    url: the server's. token: what it asks for; default: the environment's DETKIT_TOKEN. timeout: seconds for each step
    of a request. retries: further tries where the server is busy (429, 503), can't be reached or goes away. verify:
    for https, a file of certificates to trust in the place of the system's; or False.

    Everything raises UserError, one line, where there is no answer, and its kind ServerError where that is an error.
    """

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._http = self._httpx.Client(**self._options)

    def detect(
        self,
        *photos: Photo,
        model: str | None = None,
        version: str | None = None,
        score: float | None = None,
        labels: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """What was found in each photo, a path or a file's content: image, height, width, and detections, each with
        label, score and box (x1 y1 x2 y2, pixels of the photo), best first.

        model, version: default: the server's first. score: the lowest; default: the model's. labels: only these.
        """
        found: list[dict[str, Any]] = self._do(_detect(photos, model, version, score, labels, "json", _photos))
        return found

    def picture(self, photo: Photo, *, model: str | None = None, score: float | None = None) -> bytes:
        """The photo with the boxes drawn, a JPEG."""
        content: bytes = self._do(_detect([photo], model, None, score, None, "picture", _content))
        return content

    def voc(self, photo: Photo, *, model: str | None = None, score: float | None = None) -> str:
        """What was found as Pascal-VOC XML."""
        text: str = self._do(_detect([photo], model, None, score, None, "voc", _text))
        return text

    def models(self) -> list[dict[str, Any]]:
        """What the server has: name, version, classes and so on of each model, the default first."""
        models: list[dict[str, Any]] = self._do(_Call("GET", "/v1/models", _json))
        return models

    def manifest(self, model: str, version: str | None = None) -> Manifest:
        """How a model was made."""
        manifest: Manifest = self._do(_manifest(model, version))
        return manifest

    def infer(self, images: NDArray[np.uint8], model: str, version: str | None = None) -> Raw:
        """The network alone, as `Session.run`."""
        raw: Raw = self._do(_infer(images, model, version))
        return raw

    def _do(self, call: _Call) -> Any:
        for attempt in itertools.count():
            try:
                answer = self._http.request(call.method, call.path, **call.options)
            except self._httpx.TransportError as error:
                answer = error
            wait = self._wait(attempt, answer)
            if wait is None:
                return self._result(call, answer)
            time.sleep(wait)
        raise AssertionError

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Base):
    """`Client` for asyncio: the same, awaited."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._http = self._httpx.AsyncClient(**self._options)

    async def detect(
        self,
        *photos: Photo,
        model: str | None = None,
        version: str | None = None,
        score: float | None = None,
        labels: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """See `Client.detect`."""
        found: list[dict[str, Any]] = await self._do(_detect(photos, model, version, score, labels, "json", _photos))
        return found

    async def picture(self, photo: Photo, *, model: str | None = None, score: float | None = None) -> bytes:
        """See `Client.picture`."""
        content: bytes = await self._do(_detect([photo], model, None, score, None, "picture", _content))
        return content

    async def voc(self, photo: Photo, *, model: str | None = None, score: float | None = None) -> str:
        """See `Client.voc`."""
        text: str = await self._do(_detect([photo], model, None, score, None, "voc", _text))
        return text

    async def models(self) -> list[dict[str, Any]]:
        """See `Client.models`."""
        models: list[dict[str, Any]] = await self._do(_Call("GET", "/v1/models", _json))
        return models

    async def manifest(self, model: str, version: str | None = None) -> Manifest:
        """See `Client.manifest`."""
        manifest: Manifest = await self._do(_manifest(model, version))
        return manifest

    async def infer(self, images: NDArray[np.uint8], model: str, version: str | None = None) -> Raw:
        """See `Client.infer`."""
        raw: Raw = await self._do(_infer(images, model, version))
        return raw

    async def _do(self, call: _Call) -> Any:
        for attempt in itertools.count():
            try:
                answer = await self._http.request(call.method, call.path, **call.options)
            except self._httpx.TransportError as error:
                answer = error
            wait = self._wait(attempt, answer)
            if wait is None:
                return self._result(call, answer)
            await asyncio.sleep(wait)
        raise AssertionError

    async def aclose(self) -> None:
        """End its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _json(answer: Any) -> Any:
    return answer.json()


def _photos(answer: Any) -> Any:
    return answer.json()["photos"]


def _content(answer: Any) -> bytes:
    return bytes(answer.content)


def _text(answer: Any) -> str:
    return str(answer.text)


class Remote:
    """A served model in the place of a Session, for ``detkit predict --url``: photos are put onto the canvas here, and
    only the network runs on the server. So the results are those of a Session, to the bit, and little is sent."""

    def __init__(self, client: Client, model: str | None = None) -> None:
        self._client = client
        self._model = model or client.models()[0]["name"]
        self.manifest = client.manifest(self._model)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a label is an index into them."""
        return self.manifest.classes

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """As `Session.detect`. Raises UserError where the server takes whole photos, not canvases."""
        if self.manifest.input == "image":
            raise UserError(f"{self._client.url}: model {self._model} takes whole photos; serve its canvas file")
        return detect_with(lambda batch: self._client.infer(batch, self._model), self.manifest, images)
