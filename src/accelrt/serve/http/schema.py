"""What the OpenAPI document says of bodies that FastAPI does not parse itself."""

from __future__ import annotations

from typing import Any

from accelrt.protocol.datatypes import DTYPES

DESCRIPTION = (
    "The Open Inference Protocol V2 with the extensions that `GET /v2` lists. Errors are objects with the one member "
    "`error`."
)


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


_PARAMETERS = {
    "type": "object",
    "additionalProperties": {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}]},
}
_TENSOR = _object(
    {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"type": "string", "enum": list(DTYPES)},
        "parameters": _PARAMETERS,
        "data": {"type": "array", "items": {}, "description": "Flat, or nested as the shape is."},
    },
    ["name", "shape", "datatype"],
)
_WISH = _object({"name": {"type": "string"}, "parameters": _PARAMETERS}, ["name"])
_TENSORS = {"type": "array", "items": _TENSOR}
_REQUEST = _object(
    {
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "inputs": _TENSORS,
        "outputs": {"type": "array", "items": _WISH},
    },
    ["inputs"],
)
_ANSWER = _object(
    {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "outputs": _TENSORS,
    },
    ["model_name", "outputs"],
)
_RAW = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

INFERENCE: dict[str, Any] = {
    "parameters": [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "required": False,
            "description": "Bytes of JSON before raw tensors; 0 if the body is the raw data of the only input.",
            "schema": {"type": "integer", "minimum": 0},
        }
    ],
    "requestBody": {"required": True, "content": _json(_REQUEST) | _RAW},
    "responses": {"200": {"description": "The answer", "content": _json(_ANSWER) | _RAW}},
}

INDEX: dict[str, Any] = {"requestBody": {"content": _json(_object({"ready": {"type": "boolean"}}))}}

LOAD: dict[str, Any] = {
    "requestBody": {
        "content": _json(
            _object(
                {
                    "parameters": _object(
                        {"config": {"type": "string", "description": "JSON in place of the model's own configuration."}}
                    )
                    | {"additionalProperties": {"type": "string", "description": "file:VERSION/NAME, base64"}}
                }
            )
        )
    }
}

REGION: dict[str, Any] = {
    "requestBody": {
        "content": _json(
            _object(
                {
                    "key": {"type": "string", "description": "The file's name below the system's shared memory."},
                    "offset": {"type": "integer", "minimum": 0},
                    "byte_size": {"type": "integer", "minimum": 1},
                },
                ["key", "byte_size"],
            )
        )
    }
}

UNLOAD: dict[str, Any] = {
    "requestBody": {"content": _json(_object({"parameters": _object({"unload_dependents": {"type": "boolean"}})}))}
}
