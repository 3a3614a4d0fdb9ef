"""Metrics for Prometheus, and logs of one line an event. Neither holds anything of a photo, its name included."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

LOG = logging.getLogger("detkit.serve")
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # the folder in which several processes keep one set of figures
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The server's figures."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"detkit_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"detkit_{name}", text, labels, registry=registry, multiprocess_mode="livesum")

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"detkit_{name}", text, labels, registry=registry, buckets=buckets)

        self.requests = counter("requests", "Requests answered", "protocol", "route", "status")
        self.seconds = histogram("request_seconds", "From head to answer", _SECONDS, "protocol", "route")
        self.open = gauge("requests_open", "Requests in work")
        self.held = gauge("request_bytes_held", "Bytes of requests in work")
        self.batch = histogram("batch_photos", "Photos in a batch", (1, 2, 4, 8, 16, 32, 64), "model", "version")
        self.network = histogram("network_seconds", "The network, a batch", _SECONDS, "model", "version")
        self.waiting = gauge("photos_held", "Photos accepted and not answered yet", "model", "version")
        self.found = counter("objects", "Objects found", "model", "version", "label")
        self.loads = counter("model_loads", "Model files loaded, or refused", "model", "version", "result")

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        if SHARED not in os.environ:
            return generate_latest(self._registry)
        _forget_the_dead(Path(os.environ[SHARED]))
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _forget_the_dead(folder: Path) -> None:
    """Remove what processes that were killed had in work."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rsplit("_", 1)[1])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            with contextlib.suppress(FileNotFoundError):  # another process has done it
                file.unlink()
        except OSError:  # it lives, and isn't ours
            continue


class _Formatter(logging.Formatter):
    def __init__(self, style: Literal["json", "text"]) -> None:
        super().__init__()
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self._json:
            return json.dumps(fields, ensure_ascii=False, default=str)
        head = " ".join(str(fields.pop(name)) for name in ("time", "level", "message"))
        trace = fields.pop("traceback", "")
        rest = " ".join(f"{name}={value}" for name, value in fields.items())
        return "\n".join(part for part in (f"{head} {rest}".rstrip(), trace) if part)


def log(level: int, message: str, **fields: object) -> None:
    """One event."""
    LOG.log(level, message, extra={"fields": fields})


def set_up(style: Literal["json", "text"]) -> None:
    """Send detkit's and uvicorn's events to stderr, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(style))
    for name in ("detkit.serve", "uvicorn", "grpc"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def plain(fields: Mapping[str, object]) -> dict[str, object]:
    """Those that have a value."""
    return {name: value for name, value in fields.items() if value is not None}
