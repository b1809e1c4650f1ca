"""TensorFlow in this process: SavedModels resident on the CPU, and how arrays get into and out of them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from accelrt.backend import SAVED_MODEL_BINDING, Executable
from accelrt.errors import CompileError, OptionError
from accelrt.graph.types import Signature, TensorType, Value, numpy_dtype

_DEVICE = "/cpu:0"


class Opened:
    """A SavedModel unpacked into a folder of its own and loaded."""

    def __init__(self, folder: Path, model: Any, function: Any, binding: Mapping[str, Any]) -> None:
        self.folder, self.model, self.function, self.binding = folder, model, function, binding

    def close(self) -> None:
        """Forget the model and remove the folder."""
        self.model = self.function = None
        shutil.rmtree(self.folder, ignore_errors=True)


def open_saved_model(path: Path) -> Opened:
    """Unpack and load a SavedModel.

    Raises:
        CompileError: It cannot be opened, or is not called as the binding beside it says.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    folder = Path(tempfile.mkdtemp(prefix="accelrt-savedmodel-"))
    try:
        binding = _unpack(path, folder)
        with tf.device(_DEVICE):
            model = tf.saved_model.load(str(folder))
        function = model.signatures[binding["signature"]]
        takes = set(function.structured_input_signature[1])
        if takes != set(binding["inputs"]) or not set(binding["outputs"]) <= set(function.structured_outputs):
            raise CompileError(f"the signature {binding['signature']!r} takes {', '.join(sorted(takes))}")
        return Opened(folder, model, function, binding)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, CompileError) or not isinstance(error, Exception):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CompileError(f"the SavedModel cannot be opened: {type(error).__name__}: {' '.join(lines[:2])}") from error


def _unpack(path: Path, folder: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name:
                raise CompileError(f"the archive holds {name!r}, which lies outside its folder")
        archive.extractall(folder)
    binding: dict[str, Any] = json.loads((folder / SAVED_MODEL_BINDING).read_bytes())
    return binding


def set_threads(threads: int) -> None:
    """Say how many threads share one operator, which TensorFlow takes once a process, before it computes.

    Raises:
        OptionError: It has another number already.
    """
    import tensorflow as tf

    if threads in (0, tf.config.threading.get_intra_op_parallelism_threads()):
        return
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    except RuntimeError as error:
        has = tf.config.threading.get_intra_op_parallelism_threads() or "as many as there are cores"
        raise OptionError(
            f"TensorFlow takes its number of threads once a process, and has {has}; {threads} were asked for.",
            hint="Load this model before any other of TensorFlow's, or in a process of its own.",
        ) from error


class Resident(Executable):
    """A signature of a SavedModel."""

    def __init__(self, opened: Opened, signature: Signature) -> None:
        import tensorflow as tf

        self._tf, self._opened = tf, opened
        self._function = opened.function
        self._inputs = [
            (key, port.name, tf.as_dtype(_dtype(port.type)))
            for key, port in zip(opened.binding["inputs"], signature.inputs, strict=True)
        ]
        self._outputs = [
            (key, port.name, _dtype(port.type))
            for key, port in zip(opened.binding["outputs"], signature.outputs, strict=True)
        ]

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        function, tf = self._function, self._tf
        if function is None:
            raise RuntimeError("the executable was closed")
        with tf.device(_DEVICE):
            fed = {key: tf.constant(inputs[name], dtype) for key, name, dtype in self._inputs}
            results = function(**fed)
        return {name: _to_numpy(results[key], dtype) for key, name, dtype in self._outputs}

    def close(self) -> None:
        self._function = None
        self._opened.close()


def _dtype(type_: Any) -> str:
    if not isinstance(type_, TensorType):
        raise CompileError(f"a {type_} is no tensor")
    return type_.dtype


def _to_numpy(tensor: Any, dtype: str) -> Value:
    """Copy a tensor; text comes as bytes."""
    array = tensor.numpy()
    if dtype != "string":
        return np.asarray(array, numpy_dtype(dtype))
    texts = np.empty(tensor.shape, object)
    for index, item in enumerate(np.asarray(array, object).flat):
        texts.flat[index] = item.decode() if isinstance(item, bytes) else item
    return texts
