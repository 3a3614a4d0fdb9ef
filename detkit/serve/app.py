"""The HTTP server's routes: photos in, detections out; health and metrics; the Open Inference Protocol; the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from detkit import __version__, formats, imaging
from detkit.manifest import Manifest
from detkit.runtime import decide, render
from detkit.runtime.predict import unique_stems
from detkit.serve import openapi, rpc, v2
from detkit.serve.gate import Gate, problem
from detkit.serve.models import Entry, Repository
from detkit.serve.observe import Metrics
from detkit.serve.settings import Problem, Settings
from detkit.types import Detections

PAGE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline'; img-src blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Photos = Sequence[tuple[str, bytes]]


def create(settings: Settings, repository: Repository | None = None, metrics: Metrics | None = None) -> Gate:
    """The server as an ASGI app. repository: models that are loaded already; else they are when the app starts up."""
    metrics = metrics or Metrics()
    models = repository or Repository(settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if repository is None:
            models.load()
        watching = asyncio.create_task(models.watch())
        server = await rpc.start(settings, models, metrics) if settings.grpc_port is not None else None
        app.state.ready = True
        yield
        app.state.ready = False
        if server is not None:
            await server.stop(settings.drain)
        watching.cancel()
        await models.close()

    app = FastAPI(
        title="detkit",
        version=__version__,
        summary="Finds products in photos.",
        lifespan=lifespan,
        docs_url=None,  # its page is fetched from elsewhere
        redoc_url=None,
        responses={"default": {"model": openapi.Error, "description": "Why there is no answer."}},
    )
    app.state.ready = False
    _errors(app)
    _base(app, models, metrics)
    _photos(app, models, settings, metrics)
    _protocol(app, models, settings)
    return Gate(app, settings, metrics)


def _errors(app: FastAPI) -> None:
    """Whatever goes wrong is said as {"error": ...}."""

    def respond(error: Problem) -> Response:
        status, headers, body = problem(error)
        return Response(body, status, {name.decode(): value.decode() for name, value in headers})

    def told(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        request.scope["log"]["reason"] = error.reason
        return respond(error)

    def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return respond(Problem(error.status_code, str(error.detail)))

    def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return respond(Problem(422, f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg']}"))

    for kind, handler in ((Problem, told), (HTTPException, refused), (RequestValidationError, invalid)):
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(ClientDisconnect, lambda *_: respond(Problem(400, "the client went away")))
    app.add_exception_handler(Exception, lambda *_: respond(Problem(500, "the server failed; its log says why")))


def _base(app: FastAPI, models: Repository, metrics: Metrics) -> None:
    page = PAGE.read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = {"Content-Security-Policy": _POLICY.format(script=digest)}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=policy)

    @app.get("/health/live", tags=["health"], summary="The process answers", responses=openapi.example({"live": True}))
    @app.get("/v2/health/live", tags=["v2"], summary="The process answers", responses=openapi.example({"live": True}))
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get(
        "/health/ready",
        tags=["health"],
        summary="Models are loaded, and it is not shutting down",
        responses=openapi.READY,
    )
    @app.get(
        "/v2/health/ready",
        tags=["v2"],
        summary="Models are loaded, and it is not shutting down",
        responses=openapi.READY,
    )
    async def ready() -> Response:
        return JSONResponse({"ready": app.state.ready}, 200 if app.state.ready else 503)

    @app.get(
        "/metrics",
        tags=["health"],
        summary="Figures for Prometheus",
        response_class=Response,
        responses=openapi.METRICS,
    )
    async def figures() -> Response:
        for entry in models:
            metrics.waiting.labels(entry.name, entry.version).set(entry.engine.batcher.held)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _photos(app: FastAPI, models: Repository, settings: Settings, metrics: Metrics) -> None:
    @app.get("/v1/models", tags=["v1"], summary="What is served; the first is the default")
    async def listed() -> list[openapi.ModelInfo]:
        return [_info(entry) for entry in models]

    @app.get("/v1/models/{name}", tags=["v1"], summary="How a model was made: its manifest")
    @app.get("/v1/models/{name}/versions/{version}", tags=["v1"], summary="How a model was made: its manifest")
    async def described(name: str, version: str | None = None) -> Manifest:
        return models.find(name, version).engine.manifest

    @app.post(
        "/v1/detect",
        tags=["v1"],
        summary="Find the products in photos",
        responses=openapi.DETECT,
        openapi_extra=openapi.BODY,
    )
    async def detect(
        request: Request,
        model: Annotated[str | None, Query(description="default: the first")] = None,
        version: Annotated[str | None, Query(description="default: the last that was named")] = None,
        score: Annotated[
            float | None, Query(ge=0, le=1, description="lowest score; default: the model's thresholds")
        ] = None,
        label: Annotated[list[str] | None, Query(description="only these classes")] = None,
        format: Annotated[  # noqa: A002 - the parameter's name
            Literal["json", "picture", "voc"], Query(description="picture: the photo with boxes drawn, JPEG")
        ] = "json",
    ) -> Response:
        entry = models.find(model, version)
        chosen = _labels(entry, label)
        photos = await _received(request, settings)
        found = await entry.engine.detect(photos)
        shown = [_only(decide.shown(one, entry.engine.manifest, score), chosen) for one in found]
        _count(metrics, entry, shown)
        request.scope["log"] |= {
            "model": entry.name, "version": entry.version, "photos": len(photos), "objects": sum(map(len, shown))
        }  # fmt: skip
        return await _answer(entry, photos, shown, format, settings.max_pixels)


async def _answer(entry: Entry, photos: Photos, found: Sequence[Detections], kind: str, most: int) -> Response:
    """The answer as JSON; or as a file a photo, which several come in a ZIP of. most: pixels of a photo."""
    classes = entry.engine.session.classes
    pairs = [(name, content, one) for (name, content), one in zip(photos, found, strict=True)]
    if kind == "json":
        told = [formats.detections_dict(name, one, classes) for name, _, one in pairs]
        return JSONResponse({"model": entry.name, "version": entry.version, "photos": told})
    if kind == "voc":
        suffix, media = ".xml", "application/xml"
        files = [formats.detections_voc(name, one, classes).encode() for name, _, one in pairs]
    else:
        suffix, media = ".jpg", "image/jpeg"
        files = [await asyncio.to_thread(_picture, content, one, classes, most) for _, content, one in pairs]
    if len(files) == 1:
        return Response(files[0], media_type=media)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for stem, content in zip(unique_stems([Path(name) for name, *_ in pairs]), files, strict=True):
            archive.writestr(stem + suffix, content)
    return Response(packed.getvalue(), media_type="application/zip")


def _count(metrics: Metrics, entry: Entry, found: Sequence[Detections]) -> None:
    labels = Counter(label for one in found for label in one.labels.tolist())
    for label, number in labels.items():
        metrics.found.labels(entry.name, entry.version, entry.engine.session.classes[label]).inc(number)


def _info(entry: Entry) -> openapi.ModelInfo:
    made = entry.engine.manifest
    return openapi.ModelInfo(
        name=entry.name, version=entry.version, classes=list(made.classes), score=made.score,
        thresholds=list(decide.thresholds(made)), size=made.size, device=entry.engine.session.device,
    )  # fmt: skip


def _picture(content: bytes, found: Detections, classes: Sequence[str], most: int) -> bytes:
    # Decoded again: while photos wait for the network, only their files are kept.
    image = imaging.decode(content, max_pixels=most)
    picture = io.BytesIO()
    Image.fromarray(render.draw(image, found, classes)).save(picture, "JPEG", quality=92)
    return picture.getvalue()


def _labels(entry: Entry, names: Sequence[str] | None) -> list[int] | None:
    classes = entry.engine.manifest.classes
    for name in names or ():
        if name not in classes:
            raise Problem(422, f"label: '{name[:100]}' is no class of {entry.name}")
    return None if names is None else [classes.index(name) for name in names]


def _only(found: Detections, labels: Sequence[int] | None) -> Detections:
    if labels is None:
        return found
    keep = [label in labels for label in found.labels.tolist()]
    return Detections(found.boxes[keep], found.scores[keep], found.labels[keep], found.hw)


async def _received(request: Request, settings: Settings) -> Photos:
    """The photos of a request, with their names. Raises Problem."""
    if not request.headers.get("content-type", "").startswith("multipart/"):
        content = await request.body()
        if not content:
            raise Problem(422, "no photo: send the file as the body, or files as multipart/form-data")
        return [("photo", content)]
    parser = MultiPartParser(request.headers, request.stream(), max_files=settings.max_photos, max_fields=16)
    parser.spool_max_size = settings.max_bytes  # nothing is written to disk
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, LookupError) as error:  # the latter: no boundary, no such charset
        too_many = isinstance(error, MultiPartException) and "Too many" in error.message
        reason = f"at most {settings.max_photos} photos a request" if too_many else "the multipart form is damaged"
        raise Problem(413 if too_many else 422, reason) from None
    files = [file for _, file in form.multi_items() if isinstance(file, UploadFile)]
    if not files:
        raise Problem(422, "no photo in the form: add a file")
    return [(_name(file.filename or ""), await file.read()) for file in files]


def _name(given: str) -> str:
    """A file's name without folders and what XML or a ZIP can't hold."""
    name = given.replace("\\", "/").rsplit("/", 1)[-1].replace("%22", '"')  # as browsers write it
    return "".join(c for c in name if c.isprintable())[:200].strip(". ") or "photo"


def _protocol(app: FastAPI, models: Repository, settings: Settings) -> None:
    def served() -> None:
        if not app.state.ready:
            raise Problem(503, "starting or shutting down", 1)

    @app.get("/v2", tags=["v2"], summary="Metadata of the server", responses=openapi.SERVER)
    async def server() -> dict[str, Any]:
        return v2.server()

    @app.post("/v2/repository/index", tags=["v2"], summary="All models", responses=openapi.INDEX)
    async def index() -> list[dict[str, str]]:
        return v2.index(list(models))

    @app.get("/v2/models/{name}", tags=["v2"], summary="Metadata of a model", responses=openapi.METADATA)
    @app.get(
        "/v2/models/{name}/versions/{version}", tags=["v2"], summary="Metadata of a model", responses=openapi.METADATA
    )
    async def metadata(name: str, version: str | None = None) -> dict[str, Any]:
        return v2.metadata(models.find(name, version), models.versions(name))

    @app.get("/v2/models/{name}/ready", tags=["v2"], summary="Whether a model answers", responses=openapi.MODEL_READY)
    @app.get(
        "/v2/models/{name}/versions/{version}/ready",
        tags=["v2"],
        summary="Whether a model answers",
        responses=openapi.MODEL_READY,
    )
    async def ready(name: str, version: str | None = None) -> dict[str, Any]:
        served()
        entry = models.find(name, version)
        return {"name": entry.name, "ready": True}

    told: dict[str, Any] = {"responses": openapi.INFER, "openapi_extra": openapi.INFER_BODY}

    @app.post("/v2/models/{name}/infer", tags=["v2"], summary="The network alone: tensors in, tensors out", **told)
    @app.post("/v2/models/{name}/versions/{version}/infer", tags=["v2"], summary="The network alone", **told)
    async def infer(
        request: Request,
        name: str,
        version: str | None = None,
        length: Annotated[str | None, Header(alias=v2.LENGTH_HEADER, description="of the JSON before tensors")] = None,
    ) -> Response:
        entry = models.find(name, version)
        asked = await asyncio.to_thread(v2.parse, entry, await request.body(), length, settings.max_photos)
        tensors = await v2.infer(entry, asked)
        body, size = v2.answer(entry, asked, tensors)
        request.scope["log"] |= {"model": entry.name, "version": entry.version, "photos": len(asked.images)}
        if size is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={v2.LENGTH_HEADER: str(size)})
