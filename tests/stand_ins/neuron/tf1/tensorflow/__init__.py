"""A stand-in for TensorFlow 1.15 as far as tensorflow-neuron's users see it. A SavedModel is a folder with model.json."""

from __future__ import annotations

from types import SimpleNamespace

from tensorflow import contrib as contrib

__version__ = "1.15.5"


class _OpError(Exception):
    pass


class _ResourceExhaustedError(_OpError):
    pass


errors = SimpleNamespace(OpError=_OpError, ResourceExhaustedError=_ResourceExhaustedError)
