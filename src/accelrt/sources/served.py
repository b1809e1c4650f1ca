"""A model that a server of the Open Inference Protocol holds: ``grpc://host:8001/resnet50``.

It is a source that is had whole, in the one form that there is of it: where it is. The engine that takes this form
predicts there; nothing else can.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelrt.backend import WHOLE_FILES
from accelrt.errors import AccelrtError, BackendUnavailable, SourceError
from accelrt.graph.types import Port, Signature, TensorType
from accelrt.protocol.address import is_address, parse_address

if TYPE_CHECKING:
    from accelrt.sources.request import SourceRequest
    from accelrt.sources.whole import WholeModel

FORMAT = "open-inference"
TARGET = "eia/served"
"""The engine that takes `FORMAT`."""

_TIMEOUT_S = 10.0


def recognises(model: object) -> bool:
    """Tell whether a model is named by its address on a server."""
    return is_address(model)


def write(model: str, request: SourceRequest, folder: Path, accepted: Collection[str]) -> WholeModel:
    """Write down where a model is, after asking the server for its signature.

    Raises:
        OptionError: It is no address.
        BackendUnavailable: gRPC is not installed.
        SourceError: The server is not there, has no such model, or one with types that are not known; or names are
            asked for that are not the model's own.
    """
    from accelrt.sources.whole import WholeModel

    if FORMAT not in accepted:
        raise SourceError(f"{model[:200]} is had as {FORMAT} only, not as {', '.join(accepted)}.")
    if request.input_names is not None or request.output_names is not None:
        raise SourceError(
            "A model that a server holds has names of its own; input_names and output_names are not for it."
        )
    address = parse_address(model)
    if not address.model:
        raise SourceError(f"{address} names no model.", hint=f"Write {address.endpoint}/<model>.")
    try:
        from accelrt.protocol.client import ClientSettings, Endpoint

        endpoint = Endpoint(address, ClientSettings.of_environment(os.environ))
        try:
            told = endpoint.ask("ModelMetadata", _TIMEOUT_S, name=address.model, version=address.version)
        finally:
            endpoint.close()
    except ImportError as error:
        raise BackendUnavailable(
            f"{address} is reached with a package that is missing: {error}.", hint="pip install 'accelrt[eia]'"
        ) from error
    except AccelrtError as error:
        raise SourceError(f"{address} cannot be used: {error.message}", hint=error.hint) from error
    signature = Signature(_ports(told.inputs), _ports(told.outputs))
    path = folder / WHOLE_FILES[FORMAT]
    path.write_text(json.dumps({"address": str(address)}))
    return WholeModel(FORMAT, path, signature)


def _ports(tensors: Any) -> tuple[Port, ...]:
    from accelrt.protocol.datatypes import DTYPES

    ports = []
    for tensor in tensors:
        if tensor.datatype not in DTYPES:
            raise SourceError(f"The server's tensor {tensor.name!r} is of {tensor.datatype!r}, which is not known.")
        shape = tuple(None if size < 0 else size for size in tensor.shape)
        ports.append(Port(tensor.name, TensorType(DTYPES[tensor.datatype], shape)))
    return tuple(ports)
