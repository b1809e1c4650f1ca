"""What a client is told of a call that failed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from accelrt.errors import AccelrtError, ModelUnavailable
from accelrt.protocol.faults import code_of

_LOG = logging.getLogger(__name__)
_LONGEST_DETAILS = 2000
"""Characters of an error's message: it travels in a header, and clients limit those to 8 KiB."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Name of gRPC's status, message, name of accelrt's class (None if it is none), and when to ask again."""

    code: str
    details: str
    kind: str | None = None
    retry_after_s: float | None = None


def failure_of(error: Exception) -> Failure:
    """Return what to tell of an error; one that is not accelrt's own is logged, and the client learns its class only.

    The error lets go of the frames that it came through: what keeps it (gRPC keeps that of an aborted call until the
    next full collection) would keep the model that they hold, and unloading would wait for it.
    """
    if isinstance(error, AccelrtError):
        after = error.retry_after_s if isinstance(error, ModelUnavailable) else None
        details = " ".join(str(error).split())[:_LONGEST_DETAILS]
        found = Failure(code_of(error), details, type(error).__name__, after)
    else:
        _LOG.error("A call failed", exc_info=error)
        found = Failure("INTERNAL", f"The server failed with {type(error).__name__}; its log says more.")
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += [one.__cause__, one.__context__]
    error.__context__ = error.__cause__ = None
    return found
