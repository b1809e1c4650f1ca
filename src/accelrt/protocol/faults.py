"""How errors travel: the gRPC status of each, and back.

Status codes are those that Triton answers with; their names are gRPC's. The name of accelrt's own class travels beside
them in the trailing metadata, so that a client of ours raises what the server raised.
"""

from __future__ import annotations

from accelrt import errors
from accelrt.errors import AccelrtError

KIND = "accelrt-error"
"""Key of the trailing metadata that has the class's name."""

RETRY_AFTER = "retry-after-ms"
"""Key of the trailing metadata that says in how many milliseconds it is worth asking again."""

_CODES: tuple[tuple[type[AccelrtError], str], ...] = (
    (errors.RequestTooLarge, "RESOURCE_EXHAUSTED"),
    (errors.RequestError, "INVALID_ARGUMENT"),
    (errors.InputError, "INVALID_ARGUMENT"),
    (errors.ModelNotFound, "NOT_FOUND"),
    (errors.ModelUnavailable, "UNAVAILABLE"),
    (errors.NotAllowed, "PERMISSION_DENIED"),
    (errors.OutOfDeviceMemory, "RESOURCE_EXHAUSTED"),
    (errors.RequestTimeout, "DEADLINE_EXCEEDED"),
)
_KINDS: dict[str, type[AccelrtError]] = {
    "Overloaded": errors.Overloaded,
    **{kind.__name__: kind for kind, _ in _CODES},
}
_OF_CODES: dict[str, type[AccelrtError]] = {
    "RESOURCE_EXHAUSTED": errors.RequestTooLarge,
    "INVALID_ARGUMENT": errors.RequestError,
    "NOT_FOUND": errors.ModelNotFound,
    "UNAVAILABLE": errors.ModelUnavailable,
    "PERMISSION_DENIED": errors.NotAllowed,
    "UNAUTHENTICATED": errors.NotAllowed,
    "DEADLINE_EXCEEDED": errors.RequestTimeout,
}


def code_of(error: AccelrtError) -> str:
    """Return the name of the status for an error; the model's own faults are ``INTERNAL``."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), "INTERNAL")


def error_of(code: str, details: str, kind: str | None = None) -> AccelrtError:
    """Return the error that a status stands for: of the class that the server named, else the nearest to the code."""
    found = _KINDS.get(kind or "") or _OF_CODES.get(code, errors.ServingError)
    return found(details or f"The server answered {code}.")
