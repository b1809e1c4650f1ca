"""What runs in the child process for `cpu/tensorflow`: a probe, and a trial whether a SavedModel can be opened."""

from __future__ import annotations

import os
from pathlib import Path

from accelrt.errors import CompileError


def probe() -> str:
    """Return TensorFlow's version, after it has computed something."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    with tf.device("/cpu:0"):
        if float(tf.reduce_sum(tf.ones(2))) != 2:
            raise CompileError("TensorFlow cannot add one and one")
    return str(tf.__version__)


def try_out(*, model: str) -> None:
    """Open a SavedModel as the engine will.

    Raises:
        CompileError: It cannot be opened.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from accelrt_cpu.tensorflow_runtime import open_saved_model

    open_saved_model(Path(model)).close()
