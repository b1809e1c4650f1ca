"""The protocol's message classes, made at import from ``messages.binpb``, the compiled form of the ``.proto`` files.

They live in a descriptor pool of their own: other clients of the protocol register files and messages of the same
names in the process-wide pool, and two definitions of one name there are an error. Needs protobuf.

``inference.proto`` has the names and numbers; `message` gives a class, `METHODS` every method of the service.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the service: its path as HTTP/2 has it, the classes of its messages, and whether it streams."""

    name: str
    path: str
    request: type[Any]
    response: type[Any]
    streams: bool


def _load_pool() -> descriptor_pool.DescriptorPool:
    files = descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("messages.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:  # in the order of their imports
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _load_pool()


@cache
def message(name: str) -> type[Any]:
    """Return the class of a message of the package ``inference``, nested ones with dots: ``ModelInferRequest``.

    Raises:
        KeyError: There is no such message.
    """
    found: type[Any] = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))
    return found


def _methods() -> dict[str, Method]:
    service = _POOL.FindServiceByName(SERVICE)
    return {
        method.name: Method(
            method.name,
            f"/{SERVICE}/{method.name}",
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
            method.client_streaming,
        )
        for method in service.methods
    }


METHODS = _methods()
