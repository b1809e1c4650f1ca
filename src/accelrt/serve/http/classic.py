"""Two older ways to ask a model: ``/predictions`` as fleets of small models are asked, and SageMaker's contract."""

# No `from __future__ import annotations`: FastAPI reads the annotations of functions made inside a function.

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import orjson
from fastapi import FastAPI, Request, Response

from accelrt.errors import ModelNotFound, RequestError
from accelrt.graph.types import Value
from accelrt.protocol.datatypes import shown
from accelrt.serve.http import loose
from accelrt.serve.http.bodies import decompressed
from accelrt.serve.http.inference import Inference
from accelrt.serve.http.replies import Reply, json_reply
from accelrt.serve.http.web import checked, response, whole_body
from accelrt.serve.http.wire import HEADER_LENGTH
from accelrt.serve.interface import InferRequest, InferResponse, ServedModel, Service, TensorMetadata
from accelrt.serve.settings import Limits, ServerSettings

_SEQUENCE = re.compile(r"seq_(\d{1,3})")
_DIGITS = re.compile(r"(\d+)")
_TRITON = re.compile(r"application/vnd\.sagemaker-triton\.binary\+json;\s*json-header-size=(\d{1,18})", re.IGNORECASE)


async def ask(model: ServedModel, inputs: dict[str, Value]) -> InferResponse:
    """Return a model's answer, at once where it gives one at once."""
    request = InferRequest(inputs, arrived_ns=time.monotonic_ns())
    return model.infer_now(request) or await model.infer(request)


def predictions(app: FastAPI, service: Service, limits: Limits) -> None:
    """Add ``GET /`` and ``/predictions/{model_id}``."""

    async def found(model_id: str) -> ServedModel | Response:
        try:
            return service.find(checked(model_id)) or await service.model(checked(model_id))
        except ModelNotFound:
            names = sorted({entry.name for entry in service.index(ready=True)}, key=_natural)
            hint = f" Try a model name up to {names[-1]}" if names else ""
            return response(json_reply({"detail": f"Model {model_id[:80]} does not exist.{hint}"}, 404))

    @app.get("/", tags=["predictions"], summary="Whether the server answers")
    async def health() -> Response:
        return response(json_reply({"Status": "Healthy"}))

    @app.get("/predictions/{model_id}", tags=["predictions"], summary="Ask a model with a query")
    async def get(request: Request, model_id: str) -> Response:
        model = await found(model_id)
        if isinstance(model, Response):
            return model
        inputs = _inputs_of_query(request.query_params.multi_items(), model.metadata.inputs, limits)
        return _detail(await ask(model, inputs))

    @app.post("/predictions/{model_id}", tags=["predictions"], summary="Ask a model with a body")
    async def post(request: Request, model_id: str) -> Response:
        model = await found(model_id)
        if isinstance(model, Response):
            return model
        body = await _plain_body(request, limits)
        inputs = loose.body_inputs(request.headers.get("content-type", ""), body, model.metadata.inputs, limits)
        return _detail(await ask(model, inputs))


def _natural(name: str) -> list[tuple[int, str]]:
    """Order model2 before model10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(name)]


def _detail(answer: InferResponse) -> Response:
    return response(loose.write(answer, "application/json", "detail"))


def _inputs_of_query(
    items: Sequence[tuple[str, str]], ports: Sequence[TensorMetadata], limits: Limits
) -> dict[str, Value]:
    """Return inputs from a query: by name, or ``seq_N`` for the one of that number; JSON, or plain text for BYTES."""
    given: dict[str, Value] = {}
    known = {port.name: port for port in ports}
    for key, value in items:
        number = _SEQUENCE.fullmatch(key)
        port = known.get(key)
        if port is None and number is not None and int(number[1]) < len(ports):
            port = ports[int(number[1])]
        if port is None:
            raise RequestError(f"The model has no input {shown(key)}; it has {', '.join(known)}.")
        if port.name in given:
            raise RequestError(f"The input {shown(port.name)} is there twice.")
        if port.datatype == "BYTES":
            text: Any = value
            for _ in port.shape:
                text = [text]
            given[port.name] = loose.tensor(port, orjson.dumps(text))
        else:
            given.update(loose.inputs_of_json({port.name: loose.parse(value.encode(), limits)}, ports))
    return given


def sagemaker(
    app: FastAPI, service: Service, settings: ServerSettings, inference: Inference, draining: Callable[[], bool]
) -> None:
    """Add ``/ping`` and ``/invocations``: what SageMaker asks of a container."""
    limits = settings.limits

    @app.get("/ping", tags=["sagemaker"], summary="Whether the container is ready")
    async def ping() -> Response:
        ready = not draining() and service.live() and service.ready()
        return Response(status_code=200 if ready else 503)

    @app.post("/invocations", tags=["sagemaker"], summary="Ask the model")
    async def invocations(request: Request) -> Response:
        name = settings.default_model or _only_model(service)
        kind = request.headers.get("content-type", "")
        body = await _plain_body(request, limits)
        tensors_after = _TRITON.match(kind)
        if tensors_after is not None or _is_protocol(kind, body):
            headers = {} if tensors_after is None else {HEADER_LENGTH.encode(): tensors_after[1].encode()}
            return response(await _protocol(inference, name, headers, body))
        model = service.find(name) or await service.model(name)
        inputs = loose.body_inputs(kind, body, model.metadata.inputs, limits)
        return response(loose.write(await ask(model, inputs), request.headers.get("accept", ""), "predictions"))


async def _protocol(inference: Inference, name: str, headers: dict[bytes, bytes], body: bytes) -> Reply:
    answer = inference.answer(name, "", headers, body, time.monotonic_ns())
    reply = answer if isinstance(answer, Reply) else await answer
    # SageMaker hands on no headers of a container's own, so the length of the JSON is part of the content type.
    if reply.headers and HEADER_LENGTH in reply.headers:
        length = reply.headers[HEADER_LENGTH]
        reply.content_type = f"application/vnd.sagemaker-triton.binary+json;json-header-size={length}"
    return reply


class _Named(msgspec.Struct):
    datatype: str


class _OfProtocol(msgspec.Struct):
    inputs: list[_Named]


_PROTOCOL = msgspec.json.Decoder(_OfProtocol)


def _is_protocol(kind: str, body: bytes) -> bool:
    """Tell whether JSON is a request of the Open Inference Protocol, whose inputs have datatypes."""
    if kind.partition(";")[0].strip().lower() not in loose.JSON_KINDS or b'"datatype"' not in body:
        return False
    try:
        return bool(_PROTOCOL.decode(body).inputs)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _only_model(service: Service) -> str:
    names = sorted({entry.name for entry in service.index()})
    if len(names) != 1:
        raise RequestError(f"The server has {len(names)} models, and none is said to be that of /invocations.")
    return names[0]


async def _plain_body(request: Request, limits: Limits) -> bytes:
    body = await whole_body(request, limits)
    return decompressed(body, request.headers.get("content-encoding", ""), limits.body_bytes)
