"""The control routes, and the inference route's description, as a FastAPI application.

It is whole: it answers inference too, so that it can be mounted in another application or run by another server. The
server of this package lets requests for inference past it.
"""

# No `from __future__ import annotations`: FastAPI reads the annotations of functions made inside a function.

import base64
import binascii
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import accelrt
from accelrt.errors import AccelrtError, ModelNotFound, RequestError
from accelrt.protocol.datatypes import shown
from accelrt.serve.extensions import extensions
from accelrt.serve.http import classic, documents, schema
from accelrt.serve.http.access import local_regions
from accelrt.serve.http.bodies import decompressed
from accelrt.serve.http.inference import Inference
from accelrt.serve.http.loose import parse
from accelrt.serve.http.replies import HttpError, Reply, failure, json_reply, reply_of
from accelrt.serve.http.status_page import status_page
from accelrt.serve.http.web import checked, response, whole_body
from accelrt.serve.interface import Service, is_ready
from accelrt.serve.settings import Limits, ServerSettings
from accelrt.serve.shared_memory import SharedMemoryRegistry

Name = Annotated[str, PathParameter(description="The model's name.")]
RegionName = Annotated[str, PathParameter(description="The name that a region was registered under.")]
Version = Annotated[str, PathParameter(description="One of the model's versions.")]

_NOT_HERE = (
    "/v2/logging",
    "/v2/trace/setting",
    "/v2/models/{name}/trace/setting",
    "/v2/models/{name}/generate",
    "/v2/models/{name}/generate_stream",
    "/v2/models/{name}/versions/{version}/generate",
    "/v2/models/{name}/versions/{version}/generate_stream",
    "/v2/cudasharedmemory/{rest:path}",
)


def control_app(
    service: Service, settings: ServerSettings, inference: Inference, *, draining: Callable[[], bool]
) -> FastAPI:
    """Return the application.

    Args:
        service: The models.
        settings: The server's; whether it speaks SageMaker's contract, and its limits.
        inference: Answers the inference route; its shared memory is what the routes of that are for.
        draining: Whether the server is about to stop, and therefore not ready.
    """
    # Its pages of documentation would load scripts from elsewhere; /openapi.json is what they show.
    app = FastAPI(
        title="accelrt", version=accelrt.__version__, docs_url=None, redoc_url=None, description=schema.DESCRIPTION
    )
    _errors(app)
    advertised = extensions(shared_memory=inference.regions.enabled)
    _health(app, service, draining, advertised)
    _models(app, service, draining)
    _inference(app, inference, settings.limits)
    _repository(app, service, settings.limits)
    _shared_memory(app, inference.regions, settings.limits)
    _others(app, advertised)
    classic.predictions(app, service, settings.limits)
    status_page(app, service, draining)
    if settings.sagemaker:
        classic.sagemaker(app, service, settings, inference, draining)
    return app


def _errors(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        return response(reply_of(error))

    async def handle_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reason = {
            404: f"There is no route {shown(request.url.path)}.",
            405: f"{request.method} is not for this route.",
        }.get(error.status_code, str(error.detail))
        return response(failure(error.status_code, reason, error.headers))

    async def handle_invalid(request: Request, error: Exception) -> Response:
        return response(failure(400, "The request does not fit the route; see /openapi.json."))

    app.add_exception_handler(AccelrtError, handle)
    app.add_exception_handler(HttpError, handle)
    app.add_exception_handler(HTTPException, handle_http)
    app.add_exception_handler(RequestValidationError, handle_invalid)


def _health(app: FastAPI, service: Service, draining: Callable[[], bool], advertised: Sequence[str]) -> None:
    def states() -> dict[str, bool]:
        live = service.live()
        return {"live": live, "ready": live and not draining() and service.ready()}

    @app.get("/v2/health/live", tags=["health"], summary="Whether the server answers")
    async def live() -> Response:
        now = states()
        return response(json_reply(now, 200 if now["live"] else 400))

    @app.get("/v2/health/ready", tags=["health"], summary="Whether all models are ready")
    async def ready() -> Response:
        now = states()
        return response(json_reply(now, 200 if now["ready"] else 400))

    @app.get("/v2", tags=["health"], summary="The server and its extensions")
    async def server() -> Response:
        return response(json_reply(documents.server_metadata(advertised)))


def _models(app: FastAPI, service: Service, draining: Callable[[], bool]) -> None:
    async def metadata(name: str, version: str = "") -> Response:
        model = await service.model(checked(name), version)
        return response(json_reply(documents.model_metadata(model.metadata)))

    async def config(name: str, version: str = "") -> Response:
        model = await service.model(checked(name), version)
        return response(json_reply(dict(model.config)))

    async def ready(name: str, version: str = "") -> Response:
        found = is_ready(service, checked(name), version)
        if not found and not any(
            entry.name == name and (not version or entry.version == version) for entry in service.index()
        ):
            raise ModelNotFound(f"There is no model {_full(name, version)}.")
        now = found and not draining()
        return response(json_reply({"name": name, "ready": now}, 200 if now else 400))

    async def statistics(name: str = "", version: str = "") -> Response:
        return response(json_reply(documents.statistics(service.statistics(name and checked(name), version))))

    @app.get("/v2/models/stats", tags=["models"], summary="Statistics of all models")
    async def all_statistics() -> Response:
        return await statistics()

    def routes(suffix: str, answer: Callable[..., Awaitable[Response]], summary: str) -> None:
        @app.get(f"/v2/models/{{name}}{suffix}", tags=["models"], summary=summary)
        async def highest(name: Name) -> Response:
            return await answer(name)

        @app.get(f"/v2/models/{{name}}/versions/{{version}}{suffix}", tags=["models"], summary=f"{summary}: a version")
        async def one(name: Name, version: Version) -> Response:
            return await answer(name, version)

    routes("", metadata, "Inputs and outputs of a model")
    routes("/ready", ready, "Whether a model is ready")
    routes("/config", config, "The configuration of a model")
    routes("/stats", statistics, "Statistics of a model")


def _inference(app: FastAPI, inference: Inference, limits: Limits) -> None:
    async def answer(request: Request, name: str, version: str) -> Response:
        body = await whole_body(request, limits)
        headers = {key.lower(): value for key, value in request.headers.raw}
        reply = inference.answer(checked(name), version, headers, body, time.monotonic_ns(), _peer(request))
        return response(reply if isinstance(reply, Reply) else await reply)

    @app.post("/v2/models/{name}/infer", tags=["inference"], summary="Ask a model", openapi_extra=schema.INFERENCE)
    async def infer(request: Request, name: Name) -> Response:
        return await answer(request, name, "")

    @app.post(
        "/v2/models/{name}/versions/{version}/infer",
        tags=["inference"],
        summary="Ask a version of a model",
        openapi_extra=schema.INFERENCE,
    )
    async def infer_version(request: Request, name: Name, version: Version) -> Response:
        return await answer(request, name, version)


def _repository(app: FastAPI, service: Service, limits: Limits) -> None:
    @app.post("/v2/repository/index", tags=["repository"], summary="All models", openapi_extra=schema.INDEX)
    async def index(request: Request) -> Response:
        ready = (await document(request, limits)).get("ready", False)
        if not isinstance(ready, bool):
            raise RequestError('"ready" must be true or false.')
        return response(json_reply(documents.index(service.index(ready=ready))))

    @app.post(
        "/v2/repository/models/{name}/load",
        tags=["repository"],
        summary="Load a model, or load it again",
        openapi_extra=schema.LOAD,
    )
    async def load(request: Request, name: Name) -> Response:
        given = parameters(await document(request, limits))
        await service.load(checked(name), {key: _loadable(key, value) for key, value in given.items()})
        return response(json_reply({}))

    @app.post(
        "/v2/repository/models/{name}/unload",
        tags=["repository"],
        summary="Unload a model",
        openapi_extra=schema.UNLOAD,
    )
    async def unload(request: Request, name: Name) -> Response:
        dependents = parameters(await document(request, limits)).get("unload_dependents", False)
        if not isinstance(dependents, bool):
            raise RequestError("The parameter unload_dependents must be true or false.")
        await service.unload(checked(name), dependents=dependents)
        return response(json_reply({}))


def _shared_memory(app: FastAPI, regions: SharedMemoryRegistry, limits: Limits) -> None:
    """Routes of the extension ``system_shared_memory``."""

    def reached(request: Request) -> SharedMemoryRegistry:
        return local_regions(regions, _peer(request))

    async def status(request: Request, region: str = "") -> Response:
        return response(json_reply(documents.regions(reached(request).status(region).values())))

    async def unregister(request: Request, region: str = "") -> Response:
        reached(request).unregister(region)
        return response(json_reply({}))

    @app.get("/v2/systemsharedmemory/status", tags=["shared memory"], summary="All regions")
    async def all_regions(request: Request) -> Response:
        return await status(request)

    @app.get("/v2/systemsharedmemory/region/{region}/status", tags=["shared memory"], summary="A region")
    async def one_region(request: Request, region: RegionName) -> Response:
        return await status(request, region)

    @app.post(
        "/v2/systemsharedmemory/region/{region}/register",
        tags=["shared memory"],
        summary="Register a region",
        openapi_extra=schema.REGION,
    )
    async def register(request: Request, region: RegionName) -> Response:
        open_ = reached(request)
        given = await document(request, limits)
        key, offset, size = given.get("key"), given.get("offset", 0), given.get("byte_size")
        if not isinstance(key, str) or type(offset) is not int or type(size) is not int:
            raise RequestError('A region needs a "key", a "byte_size" and, if it is not 0, an "offset".')
        open_.register(region, key, offset, size)
        return response(json_reply({}))

    @app.post("/v2/systemsharedmemory/unregister", tags=["shared memory"], summary="Unregister all regions")
    async def unregister_all(request: Request) -> Response:
        return await unregister(request)

    @app.post(
        "/v2/systemsharedmemory/region/{region}/unregister", tags=["shared memory"], summary="Unregister a region"
    )
    async def unregister_one(request: Request, region: RegionName) -> Response:
        return await unregister(request, region)


def _peer(request: Request) -> str:
    client = request.client
    return "" if client is None else f"{client.host}:{client.port}"


def _others(app: FastAPI, advertised: Sequence[str]) -> None:
    async def refuse(request: Request) -> Response:
        raise HttpError(501, f"This is of an extension that the server does not have; it has {', '.join(advertised)}.")

    for path in _NOT_HERE:
        app.add_api_route(path, refuse, methods=["GET", "POST"], include_in_schema=False)


def _full(name: str, version: str) -> str:
    return f"{shown(name)}, version {shown(version)}" if version else shown(name)


async def document(request: Request, limits: Limits) -> dict[str, Any]:
    """Return the JSON object of a body, an empty one for none.

    Raises:
        RequestError: The body is something else.
    """
    body = await whole_body(request, limits)
    body = decompressed(body, request.headers.get("content-encoding", ""), limits.body_bytes)
    if not body.strip():
        return {}
    found = parse(body, limits)
    if not isinstance(found, dict):
        raise RequestError("The body must be a JSON object.")
    return found


def parameters(found: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a document.

    Raises:
        RequestError: They are no object of text, numbers, true and false.
    """
    given = found.get("parameters") or {}
    if not isinstance(given, dict) or not all(isinstance(value, str | int | float | bool) for value in given.values()):
        raise RequestError('"parameters" must be an object of text, numbers, true and false.')
    return given


def _loadable(key: str, value: Any) -> str | bytes | int | bool:
    if isinstance(value, float):
        raise RequestError(f"The parameter {shown(key)} must be text, a whole number, true or false.")
    if not key.startswith("file:"):
        return value  # type: ignore[no-any-return]
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise RequestError(f"The parameter {shown(key)} must be the file's bytes in base64.") from None
