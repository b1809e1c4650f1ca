"""``tensorflow.neuron`` on whatever ``ACCELRT_BACKEND`` says: ``trace`` (TensorFlow 2), ``saved_model`` (1).

    import accelrt.compat.neuron.tensorflow_neuron as tfn

What comes out are programs of accelrt's, not SavedModels: `load_model` and ``predictor.from_saved_model`` here open
them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from accelrt.artifact.artifact import open_artifact
from accelrt.compat.neuron import compiling, residents
from accelrt.compat.neuron.analysis import analysed
from accelrt.compat.neuron.calling import call, check_dynamic
from accelrt.compat.neuron.flags import Flags, neuron_cc_flags
from accelrt.compat.neuron.residents import Placement

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact

__all__ = [
    "AwsMulticoreNeuronModel",
    "AwsNeuronModel",
    "analyze_model",
    "auto_multicore",
    "load_model",
    "predictor",
    "saved_model",
    "trace",
]

FLAGS = "NEURON_CC_FLAGS"
_PROGRAM, _FACTS = "model.accel", "neuron.json"
_SERVING = "serving_default"
NO_GROUP = -1
_LEAST = 0.3
"""The share of operators up to which the vendor warns that a conversion was none."""


class AwsNeuronModel:
    """A traced function: called as it was traced, with tensors of the same sizes.

    Attributes:
        on_neuron_ratio: The share of operators on the engine that was asked for, 0 to 1.
    """

    def __init__(self, artifact: Artifact, facts: Mapping[str, Any]) -> None:
        self._artifact, self._facts = artifact, dict(facts)
        self._number = residents.settle(artifact)
        residents.leave_with(self, self._number)
        if self._facts.get("cores") is not None:
            residents.wish(self._number, Placement(0, self._facts["cores"]))
        elif (group := self._facts.get("group", NO_GROUP)) != NO_GROUP:
            residents.wish_group(self._number, group)
        self.on_neuron_ratio: float = facts["ratio"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute; arguments as the traced function's.

        Raises:
            TypeError: Other arguments than those of the trace.
            RuntimeError: Shapes that do not fit, or a program that fails.
        """
        given: Any = kwargs or (list(args) if len(args) != 1 else args[0])
        if isinstance(given, Mapping):
            names = self._facts["names"]
            if names is None or set(given) != set(names):
                raise TypeError(f"The model takes {names or 'positional arguments'}, not {sorted(given)}.")
            flat = [given[name] for name in names]
        else:
            flat = tf.nest.flatten(given)
        arrays = [tf.convert_to_tensor(one).numpy() for one in flat]
        with compiling.vendors_errors():
            found = call(self._number, arrays, dynamic=self._facts["dynamic"])
        return _rebuilt(self._facts["results"], iter(map(tf.constant, found)))

    def save(self, filepath: str | os.PathLike[str]) -> None:
        """Write a folder that `load_model` opens."""
        _write(Path(filepath), self._artifact, self._facts)


class AwsMulticoreNeuronModel(AwsNeuronModel):
    """What `auto_multicore` returns: a traced function on several cores, which take calls in turn."""


def auto_multicore(model: AwsNeuronModel, example_inputs: Any, num_cores: int = 1) -> AwsMulticoreNeuronModel:
    """Return a traced function as one that is loaded on the first cores, a copy on each.

    Args:
        model: What `trace` returned or `load_model` opened; it stays as it is.
        example_inputs: Has no effect: shapes are those of the trace.
        num_cores: How many cores, counted from the first that the process may use.

    Raises:
        ValueError: ``model`` was not traced, or a number of cores that cannot be.
    """
    if not isinstance(model, AwsNeuronModel):
        raise ValueError("Invalid model is not AwsNeuronModel")
    if isinstance(num_cores, bool) or not isinstance(num_cores, int) or num_cores < 1:
        raise ValueError(f"num_cores must be a number of cores, not {num_cores!r}")
    facts = {name: value for name, value in model._facts.items() if name != "group"}
    return AwsMulticoreNeuronModel(model._artifact, {**facts, "cores": num_cores})


def trace(
    func: Callable[..., Any], example_inputs: Any, subgraph_builder_function: Callable[[Any], bool] | None = None
) -> AwsNeuronModel:
    """Compile a function, a ``keras.Model`` or a signature for its example inputs' shapes.

    Args:
        func: What to compile.
        example_inputs: A tensor or a list for ``func(x)``, a tuple for ``func(*x)``, a dictionary for ``func(**x)``.
        subgraph_builder_function: Has no effect.

    The flags are in ``NEURON_CC_FLAGS``, as with the vendor.

    Raises:
        TypeError: An example is no tensor.
        ValueError: A flag has a value that is not known.
        RuntimeError: It cannot be compiled.
    """
    compiling.note_ignored({"subgraph_builder_function": subgraph_builder_function})
    flags, dynamic = _flags()
    artifact, results = _compiled(func, example_inputs, flags)
    if dynamic:
        check_dynamic(artifact.signature)
    facts = {
        "ratio": compiling.share_on_target(artifact),
        "names": list(example_inputs) if isinstance(example_inputs, Mapping) else None,
        "results": results,
        "dynamic": dynamic,
    }
    return AwsNeuronModel(artifact, facts)


def analyze_model(func: Callable[..., Any], example_inputs: Any) -> dict[str, Any]:
    """Return which operators of a function the target takes, by their names in ONNX; arguments as of `trace`."""
    found = analysed(_compiled(func, example_inputs, _flags()[0], fallback="allow")[0])
    return {
        "percent_supported": 100.0 * found.share,
        "supported_count": sum(found.supported.values()),
        "total_count": sum(found.counts.values()),
        "supported_operators": set(found.supported),
        "unsupported_operators": sorted({one.kind for one in found.refused}),
        "operators": sorted(found.counts),
        "operator_count": dict(sorted(found.counts.items())),
    }


def load_model(filepath: str | os.PathLike[str]) -> AwsNeuronModel:
    """Open what `AwsNeuronModel.save` wrote; stands for ``tf.keras.models.load_model``.

    Raises:
        ValueError: The folder holds no such program.
        AccelrtError: The program is damaged.
    """
    artifact, facts = _read(Path(filepath))
    return (AwsNeuronModel if facts.get("cores") is None else AwsMulticoreNeuronModel)(artifact, facts)


_COMPILE_ARGUMENTS = frozenset(
    "protected_op_names supported_op_types no_fuse_ops force_fuse_ops grappler max_num_compilers "  # noqa: SIM905
    "compiler_recovery compiler_verbose amp_pass".split()
)


def _compile(
    model_dir: str | os.PathLike[str],
    new_model_dir: str | os.PathLike[str],
    batch_size: int = 1,
    model_shape_feed_dict: Mapping[str, Sequence[int]] | None = None,
    model_feed_dict: Mapping[str, Any] | None = None,
    tags: Sequence[str] | None = None,
    signature_def_key: str | None = None,
    strip_default_attrs: bool = False,
    config_proto: Any = None,
    constant_size_to_exclude: int = 1024,
    convert_constants_to_variables: bool = False,
    compiler_workdir: str | None = None,
    dynamic_batch_size: bool = False,
    minimum_segment_size: int | None = None,
    compiler_args: Sequence[str] | None = None,
    compiler_timeout: int | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Compile a signature of a SavedModel; ``predictor.from_saved_model`` opens what is written.

    Args:
        model_dir: The SavedModel.
        new_model_dir: A folder that is not there yet.
        batch_size: For inputs whose first dimension alone is open.
        model_shape_feed_dict: Shapes by the signature's names.
        model_feed_dict: Arrays by the signature's names, for their shapes.
        tags: None for those the SavedModel was saved with.
        signature_def_key: None for ``serving_default``, else the first.
        strip_default_attrs: Has no effect.
        config_proto: Has no effect.
        constant_size_to_exclude: Has no effect.
        convert_constants_to_variables: Has no effect.
        compiler_workdir: Has no effect; accelrt cleans up after compilers.
        dynamic_batch_size: Take any batch, in parts of the size that was compiled for.
        minimum_segment_size: Parts of fewer operators run on the CPU.
        compiler_args: Flags of neuron-cc.
        compiler_timeout: Seconds until the compiler is stopped, where there is one.
        kwargs: Further arguments that the vendor has; they have no effect.

    Returns:
        ``{"OnNeuronRatio": share}``, 0 to 1.

    Raises:
        AssertionError: ``new_model_dir`` is there.
        TypeError: An argument that the vendor does not have.
        ValueError: A shape is not known, a signature not there.
        RuntimeError: It cannot be compiled.
    """
    if unknown := sorted(set(kwargs) - _COMPILE_ARGUMENTS):
        raise TypeError(f"compile() got an unexpected keyword argument {unknown[0]!r}")
    target = Path(new_model_dir)
    if target.exists():
        raise AssertionError(f"Export directory already exists. Please specify a different export directory: {target}")
    compiling.note_ignored({**kwargs, "config_proto": config_proto, "compiler_workdir": compiler_workdir})
    function, names = _signature(Path(model_dir), tags, signature_def_key)
    feeds = {
        name: tf.zeros(_sizes(name, spec.shape, batch_size, model_shape_feed_dict, model_feed_dict), spec.dtype)
        for name, spec in names.items()
    }
    options: dict[str, Any] = {}
    if minimum_segment_size is not None:
        options |= {"min_segment_nodes": minimum_segment_size, "minimum_segment_size": minimum_segment_size}
    if compiler_timeout is not None:
        options["timeout_s"] = float(compiler_timeout)
    artifact, results = _compiled(function, feeds, neuron_cc_flags(compiler_args), options=options)
    if dynamic_batch_size:
        check_dynamic(artifact.signature)
    ratio = compiling.share_on_target(artifact)
    if ratio <= _LEAST:
        compiling.note_once(f"Converted {model_dir}: {ratio:.0%} of its operators are on the device.")
    facts = {"ratio": ratio, "names": list(feeds), "results": results, "dynamic": dynamic_batch_size}
    _write(target, artifact, facts)
    return {"OnNeuronRatio": ratio}


def _set_core_binding(model_dir: str | os.PathLike[str], index_list: Sequence[int]) -> None:
    """Bind what ``saved_model.compile`` wrote to groups of cores, as NEURONCORE_GROUP_SIZES cuts them.

    Args:
        model_dir: What was written.
        index_list: A group for each of its programs, counted from 0; negative for none. A folder holds one program
            here, so that further indices have no effect.

    Raises:
        ValueError: The folder holds no such program, or an index is no number.
    """
    folder = Path(model_dir)
    _, facts = _read(folder)
    for index in index_list:
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(f"index_list holds numbers of groups, not {index!r}")
    if index_list:
        group = max(index_list[0], NO_GROUP)
        (folder / _FACTS).write_text(json.dumps({**facts, "group": group}))


def _inspect_core_binding(model_dir: str | os.PathLike[str]) -> None:
    """Log which group of cores a program is bound to, as a warning so that it is seen without settings.

    Raises:
        ValueError: The folder holds no such program.
    """
    _, facts = _read(Path(model_dir))
    group = facts.get("group", NO_GROUP)
    if group == NO_GROUP:
        compiling.logger.warning("subgraph %s does not bind to a NeuronCore Group", _PROGRAM)
    else:
        compiling.logger.warning("subgraph %s binds to NeuronCore Group index %d", _PROGRAM, group)


saved_model = SimpleNamespace(
    compile=_compile, set_core_binding=_set_core_binding, inspect_core_binding=_inspect_core_binding
)
"""As ``tensorflow.neuron.saved_model``."""


def _from_saved_model(export_dir: str | os.PathLike[str]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Open what ``saved_model.compile`` wrote; called with arrays by name it returns arrays by name."""
    model = load_model(export_dir)

    def predict(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value.numpy() for name, value in model(**feeds).items()}

    return predict


predictor = SimpleNamespace(from_saved_model=_from_saved_model)
"""As ``tf.contrib.predictor`` of TensorFlow 1."""


def _flags() -> tuple[Flags, bool]:
    """Return the flags of the environment, and whether they ask for any batch."""
    found = neuron_cc_flags(os.environ.get(FLAGS), default="matmult-fp16")
    options = dict(found.options)
    return Flags(found.precision, options, found.rest), bool(options.pop("dynamic_batch", False))


def _compiled(
    func: Callable[..., Any],
    example_inputs: Any,
    flags: Flags,
    *,
    fallback: str = "warn",
    options: Mapping[str, Any] | None = None,
) -> tuple[Artifact, Any]:
    """Compile a function; return what it returns as well, with its tensors replaced by None."""
    examples = tf.nest.flatten(
        [example_inputs[name] for name in example_inputs] if isinstance(example_inputs, Mapping) else example_inputs
    )
    for one in examples:
        if isinstance(one, tf.Variable) or getattr(one, "dtype", None) == tf.resource:
            raise TypeError("example inputs are tensors, and there is a variable")
    tensors = [tf.convert_to_tensor(one) for one in examples]
    results: list[Any] = []

    def flat(*given: Any) -> list[Any]:
        if isinstance(example_inputs, Mapping):
            found = func(**dict(zip(example_inputs, given, strict=True)))
        elif isinstance(example_inputs, tuple):
            found = func(*tf.nest.pack_sequence_as(example_inputs, list(given)))
        else:
            found = func(tf.nest.pack_sequence_as(example_inputs, list(given)))
        results[:] = [_shape_of(found)]
        return [tf.identity(one) for one in _leaves(found)]

    signature = [tf.TensorSpec(one.shape, one.dtype, name=f"input_{i}") for i, one in enumerate(tensors)]
    function = tf.function(flat, input_signature=signature)
    with compiling.vendors_errors():
        artifact = compiling.build([function], tuple(tensors), flags, fallback=fallback, options=options)
    if not results:
        function.get_concrete_function()
    return artifact, results[0]


def _shape_of(value: Any) -> Any:
    """Return a nest as JSON holds it: tensors are None, a tuple ``{"tuple": [...]}``, a mapping ``{"dict": {...}}``."""
    if isinstance(value, Mapping):
        return {"dict": {name: _shape_of(one) for name, one in value.items()}}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_shape_of(one) for one in value]}
    return None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for one in value.values() for leaf in _leaves(one)]
    if isinstance(value, list | tuple):
        return [leaf for one in value for leaf in _leaves(one)]
    return [value]


def _rebuilt(shape: Any, values: Any) -> Any:
    match shape:
        case None:
            return next(values)
        case {"dict": members}:
            return {name: _rebuilt(one, values) for name, one in members.items()}
        case {"tuple": members}:
            return tuple(_rebuilt(one, values) for one in members)
        case {"list": members}:
            return [_rebuilt(one, values) for one in members]
    raise ValueError(f"The results are described as {shape!r}.")


def _signature(
    folder: Path, tags: Sequence[str] | None, key: str | None
) -> tuple[Callable[..., Any], Mapping[str, tf.TensorSpec]]:
    loaded = tf.saved_model.load(str(folder), tags=tags)
    known = list(loaded.signatures)
    chosen = key or (_SERVING if _SERVING in known else next(iter(known), None))
    if chosen not in known:
        raise ValueError(f"The SavedModel {folder} has no signature {chosen!r}; it has {', '.join(known) or 'none'}.")
    function = loaded.signatures[chosen]

    def call_it(**feeds: Any) -> Any:
        return function(**feeds)

    call_it.loaded = loaded  # type: ignore[attr-defined]  # a signature holds its model weakly
    return call_it, function.structured_input_signature[1]


def _sizes(
    name: str,
    shape: tf.TensorShape,
    batch_size: int,
    shapes: Mapping[str, Sequence[int]] | None,
    feeds: Mapping[str, Any] | None,
) -> list[int]:
    if shapes is not None and name in shapes:
        return list(shapes[name])
    if feeds is not None and name in feeds:
        return list(feeds[name].shape)
    if shape.rank is None:
        raise ValueError(f"input tensor {name} must have known rank")
    sizes: list[int] = shape.as_list()
    if sizes and sizes[0] is None:
        sizes[0] = batch_size
    if None in sizes:
        raise ValueError(f"batch_size is not sufficient to determine the shape of input tensor {name}")
    return sizes


def _write(folder: Path, artifact: Artifact, facts: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    artifact.save(folder / _PROGRAM)
    (folder / _FACTS).write_text(json.dumps(facts))


def _read(folder: Path) -> tuple[Artifact, Mapping[str, Any]]:
    try:
        facts = json.loads((folder / _FACTS).read_bytes())
        if {"ratio", "names", "results", "dynamic"} - set(facts):
            raise ValueError(f"{_FACTS} lacks what it must say")
        for name, least in (("cores", 1), ("group", NO_GROUP)):
            if (value := facts.get(name)) is not None and (type(value) is not int or value < least):
                raise ValueError(f"{_FACTS} says {name}={value!r}")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds no program that accelrt.compat.neuron saved: {error}") from error
    return open_artifact(folder / _PROGRAM), facts
