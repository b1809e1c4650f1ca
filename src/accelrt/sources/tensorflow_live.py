"""Live TensorFlow objects as one function of flat, named tensors, and a SavedModel of it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelrt.errors import SourceError
from accelrt.sources.request import SourceRequest
from accelrt.sources.tensorflow_inputs import described, examples, mapped
from accelrt.sources.torch_names import names_of

SERVING = "serving_default"


@dataclass(frozen=True, slots=True)
class Traced:
    """A concrete function of flat tensors; ``inputs`` and ``outputs`` name them in order."""

    function: Any
    inputs: list[str]
    outputs: list[str]
    batch: bool = False


@dataclass(frozen=True, slots=True)
class _Slot:
    index: int


def trace(model: Any, request: SourceRequest, source: str) -> Traced:
    """Trace a Keras model, a function or a module.

    Raises:
        SourceError: It cannot be traced, or its inputs are not known.
    """
    import keras
    import tensorflow as tf

    asked = request.options.signature
    if isinstance(model, keras.Model):
        if keras.config.backend() != "tensorflow":
            raise SourceError(
                f"{source} runs on Keras's {keras.config.backend()} backend; this needs its TensorFlow backend.",
                hint="Save it to a .keras file and pass that, or set KERAS_BACKEND=tensorflow.",
            )
        _refuse_signature(asked, source)
        return _trace_keras(model, request, source)
    if isinstance(model, tf.types.experimental.ConcreteFunction):
        _refuse_signature(asked, source)
        return _trace_concrete(model)
    if isinstance(model, tf.types.experimental.PolymorphicFunction):
        _refuse_signature(asked, source)
        return _trace_function(model, request, source)
    signatures = getattr(model, "signatures", None) or {}
    if signatures and (asked is not None or request.example_inputs is None):
        return trace_signature(signatures, asked, source)
    return _trace_function(_method(model, asked, source), request, source)


def trace_signature(signatures: Mapping[str, Any], asked: str | None, source: str) -> Traced:
    """Trace one signature of a SavedModel: the one asked for, else ``serving_default``, else the only one."""
    signature = signatures[choose_signature(signatures, asked, source)]
    specs = dict(sorted(signature.structured_input_signature[1].items()))

    def call(tensors: Any) -> dict[str, Any]:
        return dict(sorted(signature(**dict(zip(specs, tensors, strict=True))).items()))

    return _flat(call, list(specs), [*specs.values()])


def choose_signature(signatures: Mapping[str, Any], asked: str | None, source: str) -> str:
    """Return the name of the signature asked for, else ``serving_default``, else the only one.

    Raises:
        SourceError: There is no such signature.
    """
    known = sorted(signatures)
    if not known:
        raise SourceError(
            f"{source} has no signatures.", hint="Save it with tf.saved_model.save(module, path, signatures=...)."
        )
    choice = asked or (SERVING if SERVING in known else known[0] if len(known) == 1 else None)
    if choice not in known:
        what = f"no signature {choice!r}" if choice else f"several signatures and no {SERVING}"
        raise SourceError(
            f"{source} has {what}; there are {', '.join(known)}.",
            hint=f"Choose one: options={{'signature': {known[0]!r}}}.",
        )
    return choice


def export(model: Any, request: SourceRequest, source: str, path: Path) -> Traced:
    """Write a live object to a SavedModel with one signature, and return what it was traced to.

    The signature itself has names that sort in order, since TensorFlow sorts them and not every name may be one.
    """
    import tensorflow as tf

    with _quiet():
        try:
            traced = trace(model, request, source)
            save(traced, path, model if isinstance(model, tf.__internal__.tracking.AutoTrackable) else None)
        except SourceError:
            raise
        except Exception as error:
            hint = None
            if "untracked" in str(error):
                hint = "Make the function a method of a tf.Module that holds what it uses, and pass the module."
            raise SourceError(f"{source} cannot be traced: {described(error)}", hint=hint) from error
    return traced


def save(traced: Traced, path: Path, model: Any = None) -> None:
    """Write what was traced to a SavedModel whose one signature has the arguments and results of `port_keys`."""
    import tensorflow as tf

    holder = tf.Module()
    holder.kept = list(traced.function.graph.variables)
    arguments, results = port_keys(traced)
    specs = [tf.TensorSpec(t.shape, t.dtype, name) for name, t in zip(arguments, _inputs(traced), strict=True)]

    def serve(*tensors: Any) -> dict[str, Any]:
        return dict(zip(results, traced.function(*tensors), strict=True))

    serving = tf.function(serve, input_signature=specs, autograph=False)
    try:
        tf.saved_model.save(holder, str(path), signatures={SERVING: serving})
    except AssertionError:
        # It uses tables, which only the model itself can save; it takes longer, with all its functions.
        if model is None:
            raise
        holder.model = model
        tf.saved_model.save(holder, str(path), signatures={SERVING: serving})


def port_keys(traced: Traced) -> tuple[list[str], list[str]]:
    """Return what `save` calls arguments and results: names that sort in order, since TensorFlow sorts them."""
    return [_safe("input", i) for i in range(len(traced.inputs))], [
        _safe("output", i) for i in range(len(traced.outputs))
    ]


def describe(traced: Traced) -> dict[str, Any]:
    """Describe what `save` wrote, in JSON's terms.

    Returns:
        ``signature``, the name of one; ``inputs`` and ``outputs``: for each its name, the signature's ``key`` for it,
        ``dtype`` and ``shape`` (None for any); ``batch``: whether the first dimension of each is known to be the batch;
        ``weight_bytes``: what its variables hold.
    """
    keys = port_keys(traced)
    sides = (traced.inputs, _inputs(traced)), (traced.outputs, traced.function.outputs)
    inputs, outputs = (
        [port_of(name, key, tensor) for name, key, tensor in zip(names, own, tensors, strict=True)]
        for own, (names, tensors) in zip(keys, sides, strict=True)
    )
    return {
        "signature": SERVING,
        "inputs": inputs,
        "outputs": outputs,
        "batch": traced.batch,
        "weight_bytes": bytes_of(traced.function),
    }


def port_of(name: str, key: str, spec: Any) -> dict[str, Any]:
    """Describe one input or output."""
    shape = None if spec.shape.rank is None else spec.shape.as_list()
    return {"name": name, "key": key, "dtype": spec.dtype.name, "shape": shape}


def bytes_of(function: Any) -> int:
    """Count the bytes of the variables of a concrete function."""
    kept = (variable for variable in function.graph.variables if variable.dtype.size)
    return sum(variable.shape.num_elements() * variable.dtype.size for variable in kept)


def _safe(side: str, index: int) -> str:
    return f"{side}_{index:05d}"


def _inputs(traced: Traced) -> list[Any]:
    return list(traced.function.inputs[: len(traced.inputs)])


def _refuse_signature(asked: str | None, source: str) -> None:
    if asked is not None:
        raise SourceError(f"{source} has no signatures; the option `signature` was {asked!r}.")


def _trace_keras(model: Any, request: SourceRequest, source: str) -> Traced:
    import keras
    import tensorflow as tf

    inputs = getattr(model, "inputs", None)
    if not inputs:
        args, kwargs = examples(model.call, request, source)
        return _trace_call(lambda *a, **k: model(*a, training=False, **k), model.call, args, kwargs)
    if any(getattr(tensor, "sparse", False) or getattr(tensor, "ragged", False) for tensor in inputs):
        raise SourceError(f"{source} takes sparse or ragged tensors, which ONNX does not have.")
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in inputs]
    names = [tensor.name for tensor in inputs]
    # A name that nobody chose holds a counter, and differs from run to run.
    names = [
        ("input" if len(names) == 1 else f"input_{i}")
        if re.fullmatch(r"(keras_tensor|input_layer)(_\d+)?", name)
        else name
        for i, name in enumerate(names)
    ]
    functional = isinstance(model, keras.models.Model) and hasattr(model, "output_names")
    if functional:
        structure = model.input
        traced = _flat(lambda t: model(keras.tree.pack_sequence_as(structure, t), training=False), names, specs)
        if "output" in traced.outputs or all(re.fullmatch(r"output_\d+", name) for name in traced.outputs):
            own = list(model.output_names)
            if len({*own}) == len(own) == len(traced.outputs):
                return Traced(traced.function, names, own, batch=True)
    else:
        traced = _flat(lambda t: model(t[0] if len(t) == 1 else t, training=False), names, specs)
    return Traced(traced.function, names, traced.outputs, batch=True)


def _method(model: Any, asked: str | None, source: str) -> Any:
    """Return the function of a module that was asked for, else its ``__call__``, else the only one it has."""
    import tensorflow as tf

    kind = tf.types.experimental.PolymorphicFunction
    found = [name for name in dir(type(model)) if not name.startswith("__")] + list(vars(model))
    functions = [name for name in dict.fromkeys(found) if isinstance(inspect.getattr_static(model, name, None), kind)]
    if asked is not None and asked in functions:
        return getattr(model, asked)
    if asked is None and callable(model):
        call = model.__call__
        return call if isinstance(call, kind) else tf.function(call)
    if asked is None and len(functions) == 1:
        return getattr(model, functions[0])
    what = f"no tf.function {asked!r}" if asked else "no __call__"
    raise SourceError(
        f"{source} has {what}; its functions are: {', '.join(functions) or 'none'}.",
        hint="Choose one: options={'signature': name}." if functions else "Decorate a method with @tf.function.",
    )


def _trace_function(function: Any, request: SourceRequest, source: str) -> Traced:
    if request.example_inputs is None and getattr(function, "input_signature", None) is not None:
        return _trace_concrete(function.get_concrete_function())
    args, kwargs = examples(function.python_function, request, source)
    return _trace_concrete(function.get_concrete_function(*args, **kwargs))


def _trace_concrete(concrete: Any) -> Traced:
    args, kwargs = concrete.structured_input_signature
    parameters = [name for name in concrete.function_type.parameters if name not in kwargs and name != "self"]
    names = [*parameters[: len(args)], *(f"input_{i}" for i in range(len(parameters), len(args)))]
    return _trace_slots(concrete, dict(zip(names, args, strict=True)), kwargs)


def _trace_call(call: Callable[..., Any], named_after: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    parameters = [name for name in inspect.signature(named_after).parameters if name != "self"]
    names = [*parameters[: len(args)], *(f"input_{i}" for i in range(len(parameters), len(args)))]
    return _trace_slots(call, dict(zip(names, args, strict=True)), kwargs)


def _trace_slots(call: Callable[..., Any], args: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Traced:
    """Trace a call whose arguments are nests: every tensor in them becomes an input, the rest stays as it is."""
    import tensorflow as tf

    names: list[str] = []
    specs: list[Any] = []

    def take(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, tf.TensorSpec):
            return leaf
        names.append(name)
        specs.append(leaf)
        return _Slot(len(names) - 1)

    slots = [mapped(value, name, take) for name, value in args.items()]
    named = {name: mapped(value, name, take) for name, value in kwargs.items()}

    def body(tensors: Any) -> Any:
        def fill(_: str, leaf: Any) -> Any:
            return tensors[leaf.index] if isinstance(leaf, _Slot) else leaf

        return call(*(mapped(v, "", fill) for v in slots), **{k: mapped(v, "", fill) for k, v in named.items()})

    return _flat(body, names, specs)


def _flat(body: Callable[[Any], Any], names: list[str], specs: list[Any]) -> Traced:
    """Trace a body that takes a list of tensors and returns any nest of them."""
    import tensorflow as tf

    outputs: list[str] = []

    def serve(*tensors: Any) -> list[Any]:
        result = body(list(tensors))
        leaves: list[Any] = []
        mapped(result, "", lambda _, leaf: leaves.append(leaf) if leaf is not None else None)
        found = names_of(result, "")
        found = ["output" if not name else f"output{name}" if name.startswith("_") else name for name in found]
        outputs[:] = found if len({*found}) == len(found) else [f"output_{i}" for i in range(len(found))]
        if outputs == ["output_0"] and not isinstance(result, Mapping):
            outputs[:] = ["output"]
        return [tf.identity(tf.convert_to_tensor(leaf)) for leaf in leaves]

    signature = [tf.TensorSpec(spec.shape, spec.dtype, _safe("input", i)) for i, spec in enumerate(specs)]
    function = tf.function(serve, input_signature=signature, autograph=False).get_concrete_function()
    return Traced(function, names, list(outputs))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("tensorflow")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
