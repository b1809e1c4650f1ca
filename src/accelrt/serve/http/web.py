"""What the routes of FastAPI share: bodies in, replies out, names that are no paths."""

from __future__ import annotations

from fastapi import Request, Response

from accelrt.errors import ModelNotFound, RequestTooLarge
from accelrt.protocol.datatypes import shown
from accelrt.serve.http.replies import Reply
from accelrt.serve.settings import Limits


def response(reply: Reply) -> Response:
    """Return a reply as Starlette's kind."""
    return Response(
        b"".join((reply.body, *reply.parts)), reply.status, reply.headers, media_type=reply.content_type or None
    )


def could_be_name(text: str) -> bool:
    """Tell whether a text may be the name of a model or of a version, which it is not if it could be a path."""
    return bool(text) and not text.startswith(".") and not any(c in "/\\" or not c.isprintable() for c in text)


def checked(name: str) -> str:
    """Return a model's name, unless it could be a path.

    Raises:
        ModelNotFound: No model has such a name.
    """
    if not could_be_name(name):
        raise ModelNotFound(f"There is no model {shown(name)}.")
    return name


async def whole_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request that another server may have brought.

    Raises:
        RequestTooLarge: It passes the limit.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.body_bytes:
            raise RequestTooLarge(f"The body is larger than {limits.body_bytes} bytes.")
    return bytes(body)
