"""A stand-in for TensorFlow 2.10 as far as tensorflow-neuron's users see it. A SavedModel is a folder with model.json."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

__version__ = "2.10.1"


class Tensor:
    def __init__(self, value):
        self._value = np.asarray(value)
        self.shape, self.dtype = self._value.shape, self._value.dtype

    def numpy(self):
        return self._value


def constant(value, dtype=None, shape=None, name="Const"):
    return Tensor(np.asarray(value, dtype))


class _Errors(SimpleNamespace):
    class OpError(Exception):
        def __init__(self, node_def, op, message, error_code=None):
            super().__init__(message)
            self.message = message

    class ResourceExhaustedError(OpError):
        pass

    class InvalidArgumentError(OpError):
        pass

    class InternalError(OpError):
        pass

    class UnavailableError(OpError):
        pass


errors = _Errors()


class _Loaded:
    def __init__(self, folder):
        self.facts = json.loads((Path(folder) / "model.json").read_text())
        self.signatures = {"serving_default": self._serve}

    def _serve(self, **feeds):
        if set(feeds) != {self.facts["input"]}:
            raise TypeError(f"Signature specifies 1 argument, {self.facts['input']!r}; got {sorted(feeds)}")
        (value,) = feeds.values()
        if not isinstance(value, Tensor):
            raise TypeError(f"expected a Tensor, not {type(value).__name__}")
        result = value.numpy() @ np.asarray(self.facts["w"], np.float32) + np.asarray(self.facts["b"], np.float32)
        return {self.facts["output"]: Tensor(result)}


class saved_model:  # noqa: N801 - a module of TensorFlow's
    @staticmethod
    def load(export_dir, tags=None, options=None):
        return _Loaded(export_dir)


def _load_model(filepath, custom_objects=None, compile=True, options=None):
    from tensorflow.neuron import loaded_on_device

    model = _Loaded(filepath)
    return loaded_on_device(model) if "neuron" in model.facts else model


keras = SimpleNamespace(models=SimpleNamespace(load_model=_load_model))
