"""Replies: a status, headers and a body; and which error of accelrt is which status."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from accelrt.errors import (
    AccelrtError,
    InputError,
    ModelNotFound,
    ModelUnavailable,
    NotAllowed,
    RequestError,
    RequestTimeout,
    RequestTooLarge,
    SessionClosed,
)

logger = logging.getLogger("accelrt.serve.http")

JSON = "application/json"
BINARY = "application/octet-stream"

_STATUS: tuple[tuple[type[AccelrtError], int], ...] = (
    (RequestTooLarge, 413),
    (RequestError, 400),
    (InputError, 400),
    (ModelNotFound, 404),
    (ModelUnavailable, 503),
    (NotAllowed, 403),
    (RequestTimeout, 504),
    (SessionClosed, 503),
)
# Paths of this machine are nobody's business; those with one part only ("/v2") are mostly no paths.
_PATH = re.compile(r"(?<![\w/.:])(?:~|/[\w.@+~-]+)(?:/[\w.@+~-]+)+/?")
_LONGEST = 500

ID_HEADER = b"x-request-id"
_LONGEST_ID = 128


@dataclass(slots=True)
class Reply:
    """What is sent back.

    Attributes:
        status: Of HTTP.
        body: All of it, or what comes before ``parts``.
        content_type: Empty for none.
        headers: More of them; names in lower case.
        parts: Bytes that follow ``body``, sent without a copy.
        close: Whether the connection ends with this.
    """

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: Mapping[str, str] | None = None
    parts: tuple[bytes | memoryview, ...] = ()
    close: bool = False

    @property
    def length(self) -> int:
        """Bytes of the whole body."""
        return len(self.body) + sum(len(part) for part in self.parts)


class HttpError(Exception):
    """A reply that is an error of HTTP itself, rather than of accelrt: the wrong method, no such route, no key."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = headers


def json_reply(document: object, status: int = 200) -> Reply:
    """Return a reply whose body is JSON."""
    return Reply(status, orjson.dumps(document))


def failure(status: int, reason: str, headers: Mapping[str, str] | None = None, *, close: bool = False) -> Reply:
    """Return the protocol's error object."""
    return Reply(status, orjson.dumps({"error": reason}), headers=headers, close=close)


def status_of(error: BaseException) -> int:
    """Return the status for an error; 500 for whatever is not the client's fault nor a matter of waiting."""
    if isinstance(error, HttpError):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def reason_of(error: BaseException) -> str:
    """Return what a client is told of an error: never a path of this machine, never where in the code it was."""
    if isinstance(error, HttpError):
        return error.reason
    if not isinstance(error, AccelrtError):
        return "The server failed; its log says why."
    text = " ".join(str(error).split())
    if not isinstance(error, RequestError):
        text = _PATH.sub("(path)", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def clean_id(given: bytes | None) -> str:
    """Return a client's request id if it is harmless in headers and logs, else nothing."""
    text = (given or b"").decode("latin-1")
    if 0 < len(text) <= _LONGEST_ID and text.isascii() and all(c.isalnum() or c in "-_.:+/=" for c in text):
        return text
    return ""


def reply_of(error: BaseException, request_id: bytes | None = None) -> Reply:
    """Return the reply for an error, and log those that are the server's own, with the id that the client gave."""
    if isinstance(error, HttpError):
        return failure(error.status, error.reason, error.headers)
    status = status_of(error)
    if status == 500:
        expected = isinstance(error, AccelrtError)
        logger.error(
            "request failed: %s",
            error,
            exc_info=None if expected else error,
            extra={"request_id": clean_id(request_id)},
        )
    headers = None
    if isinstance(error, ModelUnavailable) and error.retry_after_s is not None:
        headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return failure(status, reason_of(error), headers)
