"""The job behind ``detkit serve``: one process, or several with one that starts them anew."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h11
import uvicorn
from pydantic import SecretStr
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.supervisors import Multiprocess

from detkit import manifest
from detkit.errors import UserError
from detkit.files import decoded
from detkit.serve.app import create
from detkit.serve.gate import Gate
from detkit.serve.models import Repository, place
from detkit.serve.observe import SHARED, Metrics, log, set_up
from detkit.serve.settings import Settings

HEAD_SECONDS = 10.0  # for a request's head to arrive, and for the rest of a body that is not wanted any more

GOODBYE_SECONDS = 2.0  # for a TLS client to end its side too when the server ends, where asyncio would give it 30

BACKLOG = 2048  # connections that wait to be accepted; uvicorn's own number

WORKER_SECONDS = 60  # without a sign of life from a worker, imports at its start included, before it is replaced


class Protocol(H11Protocol):
    """uvicorn's HTTP, which would wait for ever for a client that sends a byte from time to time."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Some bytes of it have come."""
        super().data_received(data)
        # For a head, or for the end of a body that has been answered before it was all there.
        waiting = self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE
        if not waiting:
            self._stop()
        elif self._head is None and self.timeout_keep_alive_task is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._stop()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server ends: so does this now, or after the answer that is in work."""
        if not self.transport.is_closing():
            super().shutdown()
        if self.transport.is_closing():
            self.loop.call_later(GOODBYE_SECONDS, self._leave)

    def _leave(self) -> None:
        if self.transport.get_write_buffer_size():  # an answer that its client is slow to take
            self.loop.call_later(GOODBYE_SECONDS, self._leave)
        else:
            self.transport.abort()

    def _await_head(self) -> None:
        self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


def token(file: Path | None) -> SecretStr | None:
    """The token that clients must send: a file's first line, or the environment's DETKIT_TOKEN. Raises UserError."""
    if file is None:
        found = os.environ.get("DETKIT_TOKEN", "")
        return SecretStr(found) if found else None
    try:
        found = decoded(file.read_bytes()).partition("\n")[0].strip()
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error})") from None
    if not found:
        raise UserError(f"{file}: is empty; it should hold the token")
    return SecretStr(found)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; open requests are answered first. Raises UserError where it can't begin."""
    set_up(settings.log)
    _check_tls(settings.certificate, settings.key)
    if settings.grpc_port:
        _bound(settings.host, settings.grpc_port).close()  # gRPC itself would tell it with a traceback
    if settings.workers > 1:
        _several(settings)
    else:
        _one(settings)


def _check_tls(certificate: Path | None, key: Path | None) -> None:
    """Raise UserError unless there is neither, or both and they belong together."""
    for file in (certificate, key):
        if file is not None and not file.is_file():
            raise UserError(f"{file}: no such file")
    if (certificate is None) != (key is None):
        raise UserError("--tls-cert and --tls-key: TLS needs both")
    if certificate and key:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except OSError as error:  # ssl's own among them
            reason = " ".join(str(error.strerror or error).split())
            raise UserError(
                f"{certificate}, {key}: not a certificate and its private key, without password, in PEM ({reason})"
            ) from None


def _config(settings: Settings, app: Any, *, factory: bool) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        factory=factory,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        ws="none",
        workers=settings.workers,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=settings.drain,
        timeout_worker_healthcheck=WORKER_SECONDS,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
    )


def _one(settings: Settings) -> None:
    metrics = Metrics()
    models = Repository(settings, metrics)
    models.load()
    config = _config(settings, create(settings, models, metrics), factory=False)
    with _listening(config) as listener, _quietly():
        uvicorn.Server(config).run(sockets=[listener])


def _several(settings: Settings) -> None:
    for text in settings.models:
        path = place(text)[2]
        try:
            manifest.read(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror or error})") from None
    with tempfile.TemporaryDirectory(prefix="detkit-metrics-") as shared:
        os.environ[SHARED] = shared
        config = _config(settings, functools.partial(_worker, settings), factory=True)
        with _listening(config) as listener:
            several = Multiprocess(config, sockets=[listener])
            several.run()
            if any(one.exitcode == STARTUP_FAILURE for one in several.processes):
                raise UserError("a worker could not start; the lines above say why")


def _worker(settings: Settings) -> Gate:
    """The app of one of several processes."""
    set_up(settings.log)
    return create(settings)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named outright, or asyncio would not turn Nagle's algorithm off, which costs 40 ms an answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":  # elsewhere it would let two servers have one port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(f"{host}:{port}: can't be listened to ({error.strerror or error})") from None
    return listener


@contextlib.contextmanager
def _listening(config: uvicorn.Config) -> Iterator[socket.socket]:
    """The socket, listening: who connects while the app starts waits. uvicorn would end the process where it can't
    be had, and listen only after the log has said that it serves."""
    with _bound(config.host, config.port) as listener:
        listener.set_inheritable(True)
        scheme = "https" if config.is_ssl else "http"
        host = f"[{config.host}]" if listener.family == socket.AF_INET6 else config.host
        log(logging.INFO, "serving", url=f"{scheme}://{host}:{listener.getsockname()[1]}")
        yield listener


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """After its shutdown uvicorn raises the signal again, which would end the process as if it had failed."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
