"""What a function of TensorFlow is traced with: shapes and types, taken from the example inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from accelrt.errors import SourceError
from accelrt.sources.request import SourceRequest

_EXAMPLE = (
    "Pass what the model takes, e.g. accelrt.compile(model, example_inputs=(np.zeros((1, 224, 224, 3), 'float32'),)), "
    "or its shapes and types: example_inputs=(tf.TensorSpec([None, 224, 224, 3], tf.float32),)."
)


def described(error: Exception) -> str:
    """Return what an error of TensorFlow says, without its pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What the user's own code did wrong comes last, after the way there.
    message = lines[-1] if lines and lines[0] == "in user code:" else " ".join(lines[:3])
    kind = type(error).__name__
    return f"{kind}: {message.removeprefix(f'{kind}: ')[:500].rstrip('.')}."


def mapped(value: Any, name: str, visit: Callable[[str, Any], Any]) -> Any:
    """Return a nest with each leaf replaced by ``visit(path, leaf)``, paths joined by underscores."""
    if isinstance(value, Mapping):
        return {key: mapped(item, f"{name}_{key}" if name else str(key), visit) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
        return type(value)(*(mapped(item, f"{name}_{key}" if name else key, visit) for key, item in items))
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, f"{name}_{i}", visit) for i, item in enumerate(value))
    return visit(name, value)


def examples(function: Any, request: SourceRequest, source: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example inputs as shapes and types, as the function is to be called with.

    Raises:
        SourceError: There are none.
    """
    given: Any = request.example_inputs
    parameters = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in ("self", "training", "mask")
    ]
    if given is None:
        raise SourceError(
            f"{source} carries no shapes or types of its inputs ({', '.join(parameters)}), and "
            "no example_inputs were given.",
            hint=_EXAMPLE,
        )
    if isinstance(given, Mapping) and {*given} <= {*parameters}:
        return (), {name: mapped(given[name], "", _spec) for name in parameters if name in given}
    if not isinstance(given, list | tuple):
        given = (given,)
    return tuple(mapped(value, "", _spec) for value in given), {}


def _spec(_: str, value: Any) -> Any:
    """Return the shape and type of an example; Python's own numbers and texts stay constants, as TensorFlow has it."""
    import numpy as np
    import tensorflow as tf

    if value is None or isinstance(value, tf.TensorSpec | bool | int | float | str | bytes):
        return value
    if isinstance(value, tf.Tensor | tf.Variable):
        return tf.TensorSpec(value.shape, value.dtype)
    array = np.asarray(value)
    return tf.TensorSpec(array.shape, tf.string if array.dtype.kind in "USO" else tf.as_dtype(array.dtype))
