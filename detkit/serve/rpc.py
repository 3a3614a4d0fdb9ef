"""The Open Inference Protocol over gRPC.

Its messages are described here and made when the module is loaded, in a pool of their own: generated code is bound to a
version of protobuf and to the one pool of a process, where a client's (tritonclient, kserve) may lie already.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from detkit.serve import v2
from detkit.serve.gate import authorised
from detkit.serve.models import Repository
from detkit.serve.observe import Metrics, log
from detkit.serve.settings import Problem, Settings

_SERVICE = "inference.GRPCInferenceService"
# Each message's fields: name, number, type; * marks repeated ones. Fields that are not used here (parameters) are left
# out: protobuf skips them.
_MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live 1 bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready 1 bool",
    "ModelReadyRequest": "name 1 string, version 2 string",
    "ModelReadyResponse": "ready 1 bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name 1 string, version 2 string, extensions 3 *string",
    "ModelMetadataRequest": "name 1 string, version 2 string",
    "TensorMetadata": "name 1 string, datatype 2 string, shape 3 *int64",
    "ModelMetadataResponse": "name 1 string, versions 2 *string, platform 3 string, inputs 4 *TensorMetadata, "
    "outputs 5 *TensorMetadata",
    "RepositoryIndexRequest": "repository_name 1 string, ready 2 bool",
    "ModelIndex": "name 1 string, version 2 string, state 3 string, reason 4 string",
    "RepositoryIndexResponse": "models 1 *ModelIndex",
    "InferTensorContents": "uint_contents 4 *uint32",
    "InferInputTensor": "name 1 string, datatype 2 string, shape 3 *int64, contents 5 InferTensorContents",
    "InferRequestedOutputTensor": "name 1 string",
    "ModelInferRequest": "model_name 1 string, model_version 2 string, id 3 string, inputs 5 *InferInputTensor, "
    "outputs 6 *InferRequestedOutputTensor, raw_input_contents 7 *bytes",
    "InferOutputTensor": "name 1 string, datatype 2 string, shape 3 *int64",
    "ModelInferResponse": "model_name 1 string, model_version 2 string, id 3 string, outputs 5 *InferOutputTensor, "
    "raw_output_contents 6 *bytes",
}
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_OPEN = ("ServerLive", "ServerReady")  # asked without a token
Message = Any
Method = Callable[[Message], Awaitable[Message]]


def _messages() -> dict[str, type[Message]]:
    Field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="detkit/open_inference.proto", package="inference", syntax="proto3")
    for message, text in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for field in filter(None, text.split(", ")):
            name, number, kind = field.split()
            one = described.field.add(name=name, number=int(number))
            one.label = Field.LABEL_REPEATED if kind.startswith("*") else Field.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            if kind in _MESSAGES:
                one.type, one.type_name = Field.TYPE_MESSAGE, f".inference.{kind}"
            else:
                one.type = getattr(Field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}")) for name in _MESSAGES
    }


_CLASS = _messages()


class _Service:
    """The protocol's calls: a request's message -> the answer's."""

    def __init__(self, settings: Settings, models: Repository) -> None:
        self._settings, self._models = settings, models

    async def ServerLive(self, _: Message) -> Message:  # noqa: N802 - the protocol's names
        return _CLASS["ServerLiveResponse"](live=True)

    async def ServerReady(self, _: Message) -> Message:  # noqa: N802
        return _CLASS["ServerReadyResponse"](ready=True)

    async def ModelReady(self, request: Message) -> Message:  # noqa: N802
        self._models.find(request.name, request.version)
        return _CLASS["ModelReadyResponse"](ready=True)

    async def ServerMetadata(self, _: Message) -> Message:  # noqa: N802
        return _CLASS["ServerMetadataResponse"](**v2.server())

    async def ModelMetadata(self, request: Message) -> Message:  # noqa: N802
        entry = self._models.find(request.name, request.version)
        return _CLASS["ModelMetadataResponse"](**v2.metadata(entry, self._models.versions(entry.name)))

    async def RepositoryIndex(self, _: Message) -> Message:  # noqa: N802
        return _CLASS["RepositoryIndexResponse"](models=v2.index(list(self._models)))

    async def ModelInfer(self, request: Message) -> Message:  # noqa: N802
        entry = self._models.find(request.model_name, request.model_version)
        if len(request.inputs) != 1 or len(request.raw_input_contents) > 1:
            raise Problem(400, "one input is needed")
        given = request.inputs[0]
        tensor = v2.Tensor(given.name, given.datatype, list(given.shape))
        raw = request.raw_input_contents
        data = raw[0] if raw else np.asarray(given.contents.uint_contents, np.uint32)
        images = v2.images(entry, tensor, data, self._settings.max_photos)
        asked = v2.Asked(request.id, images, v2.chosen({one.name: True for one in request.outputs}, True))
        tensors = await v2.infer(entry, asked)
        return _CLASS["ModelInferResponse"](
            model_name=entry.name,
            model_version=entry.version,
            id=request.id,
            outputs=[{"name": n, "datatype": v2.DATATYPES[n], "shape": t.shape} for n, t in tensors.items()],
            raw_output_contents=[v2.raw(tensor) for tensor in tensors.values()],
        )


def _handler(name: str, method: Method, settings: Settings, metrics: Metrics) -> Any:
    async def call(request: Message, context: Any) -> Message:
        status = "OK"
        with metrics.seconds.labels("grpc", name).time():
            try:
                header = dict(context.invocation_metadata() or ()).get("authorization")
                if name not in _OPEN and not authorised(header, settings):
                    raise Problem(401, "a token is needed: authorization: Bearer TOKEN")
                return await method(request)
            except Problem as error:
                code = _CODES.get(error.status, grpc.StatusCode.INTERNAL)
                status = code.name
                if error.retry_after is not None:
                    context.set_trailing_metadata((("retry-after", str(error.retry_after)),))
                await context.abort(code, error.reason)
            except BaseException:
                status = "INTERNAL"
                raise
            finally:
                metrics.requests.labels("grpc", name, status).inc()

    return grpc.unary_unary_rpc_method_handler(
        call,
        request_deserializer=_CLASS[f"{name}Request"].FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )


async def start(settings: Settings, models: Repository, metrics: Metrics) -> Any:
    """Start the gRPC server -> a grpc.aio.Server. Raises RuntimeError where the port is taken."""
    service = _Service(settings, models)
    names = [name.removesuffix("Request") for name in _MESSAGES if name.endswith("Request")]
    handlers = {name: _handler(name, getattr(service, name), settings, metrics) for name in names}
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_bytes),
            ("grpc.so_reuseport", int(settings.workers > 1)),
        ],
        maximum_concurrent_rpcs=settings.queue,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    if settings.certificate and settings.key:
        pair = (settings.key.read_bytes(), settings.certificate.read_bytes())
        port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    else:
        port = server.add_insecure_port(address)
    await server.start()
    log(logging.INFO, "gRPC is served", host=settings.host, port=port)
    return server
