"""What a server is told, and what it tells a client that asks for too much."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
)

Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseModel):
    """Everything that `detkit serve` can be told. Times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = Field(
        min_length=1, description="PATH, NAME=PATH or NAME:VERSION=PATH; first: the default"
    )
    host: str = "127.0.0.1"
    port: Port = Field(8000, description="of HTTP; 0: any that is free")
    grpc_port: Port | None = Field(None, description="of gRPC; None: no gRPC")
    device: str = Field("auto", description="as Session has it")
    threads: NonNegativeInt = Field(0, description="of the network on the CPU; 0: one a core")
    workers: PositiveInt = Field(1, description="processes, each with its own copy of the models")
    max_batch: PositiveInt = Field(8, description="photos that go through the network at once; 1: no batching")
    max_delay: NonNegativeFloat = Field(0.005, description="longest wait for a batch to fill")
    queue: PositiveInt = Field(128, description="photos of a model accepted and not answered yet; more: 429")
    timeout: PositiveFloat = Field(30.0, description="for a request's body to arrive, and again for its answer")
    drain: PositiveInt = Field(30, description="for open requests to end after SIGTERM")
    max_bytes: PositiveInt = Field(32 << 20, description="of one request")
    max_memory: PositiveInt = Field(512 << 20, description="bytes of all requests held at a time; more: 429")
    max_pixels: PositiveInt = Field(50_000_000, description="of one photo")
    max_photos: PositiveInt = Field(32, description="of one request")
    max_connections: PositiveInt = 1024
    reload: NonNegativeFloat = Field(2.0, description="between looks at the models' files; 0: never looked at again")
    token: SecretStr | None = Field(None, description="what clients must send as `Authorization: Bearer ...`")
    certificate: Path | None = Field(None, description="TLS: the chain, PEM")
    key: Path | None = Field(None, description="TLS: its private key, PEM")
    log: Literal["json", "text"] = "json"


class Problem(Exception):  # noqa: N818 - an answer, not a fault of the server's
    """Why a request gets no result: an HTTP status, one line, and after how many seconds to try again, where that may
    help."""

    def __init__(self, status: int, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.retry_after = status, reason, retry_after
