"""``EIPredictor``: a signature of a SavedModel, or a frozen graph, called with a dictionary of arrays."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import accelrt
from accelrt import isolation
from accelrt.compat.eia import compiled
from accelrt.compat.eia.target import check_ordinal, load, note_once, target_of
from accelrt.errors import SourceError
from accelrt.graph.types import numpy_dtype

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact
    from accelrt.runtime.session import Session

logger = logging.getLogger("accelrt")

_CHILD = "accelrt.compat.eia.saved_models"
_TAGS = ("serve",)
_DEFAULT_KEY = "serving_default"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of the model's graph: ``shape`` has None where any size fits, and is None for any rank."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None


class EIPredictor:
    """Call it with arrays by alias, and it returns arrays by alias, as the vendor's does.

    The model is compiled and loaded at the first call, on what ``ACCELRT_BACKEND`` says. Threads may call one predictor
    at the same time.

    Args:
        model_dir: A SavedModel folder, or a frozen graph as a file.
        signature_def_key: Which signature; None for ``serving_default``.
        signature_def: A ``SignatureDef`` proto instead of a key.
        input_names: Tensors by aliases of one's own choosing, ``{"inputs": "image_tensor:0"}``, instead of a signature;
            a name without a number stands for the first output of that operation. A frozen graph needs them.
        output_names: Likewise for what is to be returned.
        tags: Those the SavedModel was saved with, as a list or with commas; None for ``serve``.
        graph: Has no effect: the model runs in no graph of TensorFlow's.
        config: Has no effect.
        use_ei: False computes on the CPU of this machine, whatever ``ACCELRT_BACKEND`` says.
        accelerator_id: The ordinal of an accelerator; on the backend ``eia`` the index of a device, elsewhere without
            effect.

    Raises:
        ValueError: Arguments that do not go together, an unknown signature, a frozen graph without names.
        KeyError: A tensor that the graph has not.
        FileNotFoundError: ``model_dir`` is neither folder nor file.
        RuntimeError: It holds no model that can be read.
        TypeError: An argument of the wrong kind.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        signature_def_key: str | None = None,
        signature_def: Any = None,
        input_names: Mapping[str, Any] | None = None,
        output_names: Mapping[str, Any] | None = None,
        tags: Sequence[str] | str | None = None,
        graph: Any = None,
        config: Any = None,
        use_ei: bool = True,
        accelerator_id: int = 0,
    ) -> None:
        self._session: Session | None = None
        self._lock = threading.Lock()
        _check_together(signature_def_key, signature_def, input_names, output_names)
        for name, value in (("graph", graph), ("config", config)):
            if value is not None:
                note_once(f"The argument {name!r} of EIPredictor has no effect on {target_of(use_ei)}.")
        self._ordinal = check_ordinal(accelerator_id, "accelerator_id") if use_ei else None
        self._target = target_of(use_ei)
        self._path = _path_of(model_dir)
        self._tags = _tags_of(tags)
        self._signature: str | None = None
        try:
            sides = self._find_sides(signature_def_key, signature_def, input_names, output_names)
        except SourceError as error:
            raise RuntimeError(str(error)) from error
        self._feeds = {alias: _tensor_of(said) for alias, said in sides["inputs"].items()}
        self._fetches = {alias: _tensor_of(said) for alias, said in sides["outputs"].items()}

    def _find_sides(
        self,
        key: str | None,
        definition: Any,
        input_names: Mapping[str, Any] | None,
        output_names: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Return inputs and outputs by alias, and note the signature if it is one that the SavedModel has."""
        if input_names is not None and output_names is not None:
            return self._look_up(_named(input_names), _named(output_names))
        if self._path.is_file():
            which = "input_names" if input_names is None else "output_names"
            raise ValueError(f"{which} must be provided for running inference on frozen graph")
        if input_names is not None or output_names is not None:
            raise ValueError("input_names and output_names must both be specified or both be unspecified.")
        known: dict[str, Any] = isolation.call(f"{_CHILD}:describe", path=str(self._path), tags=self._tags)
        if definition is None:
            if key is None:
                logger.info("Using DEFAULT_SERVING_SIGNATURE_DEF_KEY .....")
            self._signature = key or _DEFAULT_KEY
            if self._signature not in known:
                raise ValueError(
                    f'Got signature_def_key "{self._signature}". Available signatures are {sorted(known)}.'
                )
            return dict(known[self._signature])
        if not hasattr(definition, "SerializeToString"):
            raise TypeError(f"signature_def is a SignatureDef proto, not a {type(definition).__name__}")
        data = definition.SerializeToString(deterministic=True).hex()
        wanted: dict[str, Any] = isolation.call(f"{_CHILD}:read_signature", definition=data)
        self._signature = next((name for name, sides in known.items() if sides == wanted), None)
        if self._signature is not None:
            return wanted
        return self._look_up(
            *({alias: said["name"] for alias, said in wanted[side].items()} for side in ("inputs", "outputs"))
        )

    def _look_up(self, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = isolation.call(
            f"{_CHILD}:tensors", path=str(self._path), tags=self._tags, inputs=dict(inputs), outputs=dict(outputs)
        )
        if "missing" in found:
            raise KeyError(f"The name {found['missing']!r} refers to a Tensor which does not exist in {self._path}.")
        return found

    @property
    def feed_tensors(self) -> dict[str, Tensor]:
        """The inputs by alias."""
        return dict(self._feeds)

    @property
    def fetch_tensors(self) -> dict[str, Tensor]:
        """The outputs by alias."""
        return dict(self._fetches)

    def __repr__(self) -> str:
        return f"{type(self).__name__} with feed tensors {self._feeds} and fetch_tensors {self._fetches}"

    def __call__(self, model_feed_dict: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Compute: arrays, or what numpy makes arrays of, by alias in; arrays by alias out.

        Raises:
            ValueError: An alias that is not known, or missing, or a value that does not fit.
            AccelrtError: Whatever `accelrt.compile`, `accelrt.load` and `Session.predict` raise.
        """
        for alias in model_feed_dict:
            if alias not in self._feeds:
                raise ValueError(
                    f"Incorrect input name: {alias}. Does not match the input names specified in Predictor or "
                    f"signature def:  {self._feeds.keys()}"
                )
        values = [_fitting(alias, tensor, model_feed_dict) for alias, tensor in self._feeds.items()]
        session = self._session or self._load()
        found = session.predict({_port("input", index): value for index, value in enumerate(values)})
        return {alias: _to_vendors(found[_port("output", index)]) for index, alias in enumerate(self._fetches)}

    def _load(self) -> Session:
        with self._lock:
            if self._session is None:
                session = load(self._artifact(), self._ordinal)
                weakref.finalize(self, session.close).atexit = False
                self._session = session
            return self._session

    def _artifact(self) -> Artifact:
        names = tuple(
            tuple((alias, tensor.name) for alias, tensor in side.items()) for side in (self._feeds, self._fetches)
        )
        key = ("predictor", self._path, compiled.stamp(self._path), tuple(self._tags), self._signature, names)
        return compiled.once((*key, self._target), self._compiled)

    def _compiled(self) -> Artifact:
        by_signature = self._signature is not None and tuple(self._tags) == _TAGS
        inputs, outputs = (
            {_port(side, i): alias if by_signature else tensors[alias].name for i, alias in enumerate(tensors)}
            for side, tensors in (("input", self._feeds), ("output", self._fetches))
        )
        if by_signature:
            return accelrt.compile(
                self._path,
                self._target,
                input_names=inputs,
                output_names=outputs,
                options={"signature": self._signature},
            )
        if self._path.is_file():
            return accelrt.compile(self._path, self._target, input_names=inputs, output_names=outputs)
        with tempfile.TemporaryDirectory(prefix="accelrt-eia-") as folder:
            frozen = Path(folder) / "frozen.pb"
            isolation.call(
                f"{_CHILD}:freeze",
                path=str(self._path),
                tags=self._tags,
                outputs=sorted(set(outputs.values())),
                target=str(frozen),
            )
            return accelrt.compile(frozen, self._target, input_names=inputs, output_names=outputs)


def _check_together(key: Any, definition: Any, input_names: Any, output_names: Any) -> None:
    if definition is not None and key is not None:
        raise ValueError("You must specify at most one of signature_def_key and signature_def.")
    if input_names is not None and (key is not None or definition is not None):
        raise ValueError(
            "You must specify at most one of signature_def_key OR signature_def OR (input_names AND output_names)."
        )


def _path_of(model_dir: Any) -> Path:
    path = Path(model_dir) if isinstance(model_dir, str | os.PathLike) else None
    if path is None or not path.exists():
        raise FileNotFoundError(f"Must supply a valid saved model or frozen graph, not {model_dir!r}")
    return path.resolve()


def _tags_of(tags: Sequence[str] | str | None) -> list[str]:
    if tags is None:
        return list(_TAGS)
    return list(dict.fromkeys(tags.split(",") if isinstance(tags, str) else tags))


def _named(names: Mapping[str, Any]) -> dict[str, str]:
    """Return names of tensors by alias; tensors themselves are taken too, and operations stand for their first."""
    if not isinstance(names, Mapping):
        raise TypeError(f"input_names and output_names are dictionaries of aliases, not {type(names).__name__}")
    plain = {alias: str(getattr(value, "name", value)) for alias, value in names.items()}
    return {alias: name if ":" in name else f"{name}:0" for alias, name in plain.items()}


def _tensor_of(said: Mapping[str, Any]) -> Tensor:
    shape = said["shape"]
    return Tensor(said["name"], numpy_dtype(said["dtype"]), None if shape is None else tuple(shape))


def _port(side: str, index: int) -> str:
    """Return what the artifact calls an input or output; aliases need be no names, nor differ from each other's."""
    return f"{side}_{index:05d}"


def _fitting(alias: str, tensor: Tensor, feeds: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Return the value of an input, in its type, as TensorFlow would make it."""
    if alias not in feeds:
        raise ValueError(f"You must feed a value for the input {alias!r}, which is {tensor}.")
    value = feeds[alias]
    if tensor.dtype == object:
        array = np.asarray(value, object)
        array = np.vectorize(_text, otypes=[object])(array) if array.size else array
    else:
        array = np.asarray(value, tensor.dtype)
    fits = tensor.shape is None or (
        len(tensor.shape) == array.ndim
        and all(size in (None, given) for size, given in zip(tensor.shape, array.shape, strict=True))
    )
    if not fits:
        raise ValueError(
            f"Cannot feed value of shape {array.shape} for Tensor {tensor.name}, which has shape {tensor.shape}"
        )
    return np.require(array, requirements="C")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _to_vendors(array: Any) -> np.ndarray[Any, Any]:
    """Return an array as TensorFlow's sessions do: text as bytes."""
    if array.dtype != object:
        return np.asarray(array)
    encoded = np.empty(array.shape, object)
    for index in np.ndindex(array.shape):
        value = array[index]
        encoded[index] = value.encode() if isinstance(value, str) else value
    return encoded
