"""``EIKerasModel``: a Keras model whose ``predict`` runs on the target."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import accelrt
from accelrt.compat.eia.target import load, target_of
from accelrt.graph.types import TensorType, numpy_dtype

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact
    from accelrt.runtime.session import Session

BATCH = 32
"""What Keras takes where nobody says how many rows go through at a time."""


class EIKerasModel:
    """A Keras model that predicts on what ``ACCELRT_BACKEND`` says, and does nothing else, as the vendor's.

    The model is compiled when it is wrapped, with the weights of that moment, and loaded at the first call.

    Args:
        model: A ``keras.Model``, or the path of a file that Keras loads.
        custom_objects: For a path: classes by name, as ``keras.models.load_model`` takes them.

    Raises:
        TypeError: It is neither.
        SourceError: It cannot be converted.
    """

    def __init__(self, model: Any, custom_objects: Mapping[str, Any] | None = None) -> None:
        import keras

        if isinstance(model, str | os.PathLike):
            model = keras.models.load_model(Path(model), custom_objects=custom_objects, compile=False)
        if not isinstance(model, keras.Model):
            raise TypeError(f"EIKerasModel takes a Keras model or the path of one, not {type(model).__name__}")
        self._keras, self._structure = keras, _structure(model)
        self._arguments = _argument_names(model)
        self._artifact: Artifact = accelrt.compile(model, target_of(True))
        self._session: Session | None = None
        self._lock = threading.Lock()

    def predict(self, x: Any, batch_size: int | None = None, verbose: Any = 0, steps: int | None = None) -> Any:
        """Compute the outputs for all rows, as Keras' own ``predict`` returns them.

        Args:
            x: An array; a list or a dictionary of arrays for several inputs. Python lists of numbers are arrays too.
            batch_size: Rows that go through at a time; None for 32.
            verbose: Has no effect: there is no progress bar.
            steps: Batches after which to stop; None for all rows.

        Returns:
            An array, or what the model's outputs are: a list, or a dictionary of arrays.

        Raises:
            ValueError: ``x`` does not fit the model, is empty, or a number is less than 1.
        """
        size = BATCH if batch_size is None else batch_size
        for name, value in (("batch_size", size), ("steps", 1 if steps is None else steps)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be a number from 1 on, not {value!r}")
        arrays = self._arrays(x)
        rows = {len(array) for array in arrays.values()}
        if len(rows) != 1:
            raise ValueError(f"Data cardinality is ambiguous: the inputs have {sorted(rows)} rows")
        count = rows.pop() if steps is None else min(rows.pop(), steps * size)
        if not count:
            raise ValueError("There are no rows to predict")
        session = self._session or self._load()
        parts = [
            session.predict({name: array[start : min(start + size, count)] for name, array in arrays.items()})
            for start in range(0, count, size)
        ]
        names = self._artifact.signature.output_names
        found = [np.concatenate([part[name] for part in parts]) if len(parts) > 1 else parts[0][name] for name in names]
        return self._packed(found)

    def _load(self) -> Session:
        with self._lock:
            if self._session is None:
                session = load(self._artifact, 0)
                weakref.finalize(self, session.close).atexit = False
                self._session = session
            return self._session

    def _arrays(self, x: Any) -> dict[str, np.ndarray[Any, Any]]:
        ports = self._artifact.signature.inputs
        if isinstance(x, Mapping):
            if set(x) != set(self._arguments):
                raise ValueError(f"The model takes {', '.join(self._arguments)}, not {', '.join(map(str, x))}")
            values: Sequence[Any] = [x[name] for name in self._arguments]
        elif isinstance(x, list | tuple) and (len(ports) > 1 or (len(x) == 1 and hasattr(x[0], "shape"))):
            values = x
        elif isinstance(x, list | tuple) or hasattr(x, "__array__"):
            values = [x]
        else:
            raise ValueError(f"predict takes arrays, a list or a dictionary of arrays, not {type(x).__name__}")
        if len(values) != len(ports):
            raise ValueError(f"The model takes {len(ports)} arrays, not {len(values)}")
        found = {}
        for port, value in zip(ports, values, strict=True):
            assert isinstance(port.type, TensorType)  # Keras has nothing else
            found[port.name] = np.require(np.asarray(value, numpy_dtype(port.type.dtype)), requirements="C")
            if found[port.name].ndim == 0:
                raise ValueError(f"{port.name!r} is a number, and predict takes rows")
        return found

    def _packed(self, found: list[Any]) -> Any:
        if self._structure is None:
            return found[0] if len(found) == 1 else found
        return self._keras.tree.pack_sequence_as(self._structure, found)


def _structure(model: Any) -> Any:
    """Return the nest of a functional model's outputs; None for one that has none until it is called."""
    return getattr(model, "output", None) if getattr(model, "inputs", None) else None


def _argument_names(model: Any) -> list[str]:
    return [str(tensor.name) for tensor in getattr(model, "inputs", None) or ()]
