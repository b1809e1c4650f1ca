"""A trained model and the images it has never seen, small enough to travel with the package.

The images are from the *Optical Recognition of Handwritten Digits* data set by E. Alpaydin and C. Kaynak (UCI
Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn ships it.
``examples/train_digits.py`` writes every file here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class DigitsFacts:
    """How the digits model was made and how well it does.

    ``accuracy`` is ``correct / held_out``, counted through onnxruntime on the CPU in float32 over the
    held-out images. They were drawn at random, so writers of the training images wrote them too: unseen
    writers will do worse.
    """

    accuracy: float
    correct: int
    held_out: int
    trained_on: int
    seed: int
    epochs: int
    parameters: int
    versions: Mapping[str, str]
    source: str
    licence: str


def digits_model() -> Path:
    """Return the path of the ONNX model.

    Its input ``image`` is float32 [batch, 1, 8, 8] in 0..1, its output ``scores`` float32 [batch, 10], not
    normalised.
    """
    return _path("digits.onnx")


def held_out_digits() -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the images kept from training, float32 [n, 1, 8, 8] in 0..1, and their labels, int64 [n]."""
    with np.load(_path("digits.npz"), allow_pickle=False) as arrays:
        images = arrays["images"].astype(np.float32)[:, None] / np.float32(16)
        return images, arrays["labels"].astype(np.int64)


def digits_facts() -> DigitsFacts:
    """Return what ``examples/train_digits.py`` measured when it wrote the model."""
    return DigitsFacts(**json.loads(_path("digits.json").read_text(encoding="utf-8")))


def _path(name: str) -> Path:
    return Path(str(files(__name__) / name))
