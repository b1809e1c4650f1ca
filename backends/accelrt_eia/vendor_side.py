# ruff: noqa: UP006, UP035, B905 - written for the vendor's Python, which is 3.6
"""The end of the wire where the vendor's Python is: a script that drives ``EIPredictor`` and PyTorch's EI builds.

Amazon's packages were built for Python 3.6 and 3.7, accelrt needs 3.11. So this file is run as a script by another
interpreter, imports numpy and the standard library alone, and uses nothing that Python 3.6 lacks; a test holds that.

A request is the length of a header as decimal digits and a newline, the header as JSON, and the arrays' bytes one after
the other; so is an answer. The header lists the arrays as name, dtype and shape. Numbers of the two pipes are the
arguments; standard output is the vendor's, whose client prints which accelerators it found.
"""

import importlib
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np

PREDICTORS = (
    "ei_for_tf.python.predictor.ei_predictor",  # a package of its own, for TensorFlow 2.0 and late builds of 1.15
    "tensorflow.contrib.ei.python.predictor.ei_predictor",  # in the vendor's TensorFlow 1.12 to 1.15
)
MANY = 1 << 31
"""Bytes of a header that nobody sends."""


def read(stream: Any) -> Tuple[Dict[str, Any], List[Any]] | None:
    """Read a message; None where the other side has closed the pipe."""
    length = stream.readline()
    if not length:
        return None
    if not length.strip().isdigit() or int(length) > MANY:
        raise ValueError("malformed message")
    header = json.loads(_exactly(stream, int(length)).decode("utf-8"))
    arrays = []
    for _, dtype, shape in header["arrays"]:
        kind = np.dtype(dtype)
        count = 1
        for size in shape:
            count *= int(size)
        data = bytearray(_exactly(stream, count * kind.itemsize))
        arrays.append(np.frombuffer(data, kind).reshape(shape))
    return header, arrays


def _exactly(stream: Any, count: int) -> bytes:
    data: bytes = stream.read(count)
    if len(data) != count:
        raise EOFError("the other side has gone")
    return data


def write(stream: Any, header: Dict[str, Any], arrays: Dict[str, Any]) -> None:
    """Write a message."""
    # numpy's own `ascontiguousarray` would make a scalar a vector.
    plain = [(name, np.require(array, requirements="C")) for name, array in arrays.items()]
    header = dict(header, arrays=[[name, array.dtype.str, list(array.shape)] for name, array in plain])
    text = json.dumps(header).encode("utf-8")
    stream.write(b"%d\n%s" % (len(text), text))
    for _, array in plain:
        stream.write(array.tobytes())
    stream.flush()


def serve(stream_in: Any, stream_out: Any) -> None:
    """Answer requests until the other side closes the pipe: ``facts``, ``try``, ``open`` and ``run``."""
    opened: List[Callable[[Dict[str, Any]], Dict[str, Any]]] = []
    while True:
        message = read(stream_in)
        if message is None:
            return
        header, arrays = message
        inputs = {entry[0]: array for entry, array in zip(header["arrays"], arrays)}
        try:
            answer: Dict[str, Any] = {}
            results: Dict[str, Any] = {}
            if header["call"] == "facts":
                answer = FACTS[header["kind"]]()
            elif header["call"] == "try":
                TRIALS[header["kind"]](header["ordinal"])
            elif header["call"] == "open":
                opened[:] = [OPENERS[header["kind"]](header)]
            else:
                results = opened[0](inputs)
            sys.stdout.flush()
            write(stream_out, answer, results)
        except Exception as error:  # noqa: BLE001 - whatever foreign code raises goes back to who asked
            sys.stdout.flush()
            write(stream_out, {"error": [type(error).__name__, str(error)]}, {})


# TensorFlow


def predictor_class() -> Any:
    """Return the vendor's ``EIPredictor``, from the first package that has it."""
    problems = []
    for name in PREDICTORS:
        try:
            return importlib.import_module(name).EIPredictor
        except (ImportError, AttributeError) as error:
            problems.append(f"{name}: {error}")
    raise ImportError("; ".join(problems))


def _parameters(function: Any) -> List[str]:
    return list(inspect.signature(function).parameters)


def predictor_facts() -> Dict[str, Any]:
    """Return versions and what the constructor takes."""
    import tensorflow as tf

    found = predictor_class()
    return {
        "versions": {"tensorflow": str(tf.__version__), "python": f"{sys.version_info[0]}.{sys.version_info[1]}"},
        "api": found.__module__,
        "parameters": _parameters(found.__init__)[1:],
    }


def make_predictor(ordinal: int, use_ei: bool, **arguments: Any) -> Any:
    """Construct an ``EIPredictor`` on the accelerator of this number.

    Builds before there could be several accelerators have no ``accelerator_id``. There, what the process may see is
    narrowed to the one, before the client looks for accelerators for the first time.
    """
    found = predictor_class()
    known = _parameters(found.__init__)
    if "accelerator_id" in known and use_ei:
        arguments["accelerator_id"] = ordinal
    elif use_ei:
        visible = os.environ.get("EI_VISIBLE_DEVICES")
        os.environ["EI_VISIBLE_DEVICES"] = str(ordinal) if visible is None else visible.split(",")[ordinal]
    return found(use_ei=use_ei, **arguments)


def try_predictor(ordinal: int) -> None:
    """Run a graph of one addition, so that the client says which accelerators it finds, or dies of finding none."""
    import tensorflow as tf

    v1 = getattr(tf.compat, "v1", tf)
    graph = v1.Graph()
    with graph.as_default():
        v1.add(v1.placeholder("float32", [1], name="x"), 1.0, name="y")
    handle, path = tempfile.mkstemp(suffix=".pb")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(graph.as_graph_def().SerializeToString())
        predictor = make_predictor(ordinal, True, model_dir=path, input_names={"x": "x:0"}, output_names={"y": "y:0"})
        predictor({"x": np.ones([1], np.float32)})
    finally:
        Path(path).unlink()


def open_predictor(header: Dict[str, Any]) -> Callable[[Dict[str, Any]], Dict[str, Any]]:
    """Construct a predictor of a SavedModel folder; the first call puts the model on the accelerator."""
    predictor = make_predictor(
        header["ordinal"], header["use_ei"], model_dir=header["path"], signature_def_key=header["signature"]
    )

    def run(inputs: Dict[str, Any]) -> Dict[str, Any]:
        return {name: np.asarray(value) for name, value in predictor(inputs).items()}

    return run


# PyTorch


def torch_api() -> str:
    """Return which of the two interfaces is here: ``torcheia`` (1.5.1), ``optimized_execution`` (1.3.1).

    Raises:
        ImportError: Neither: it is PyTorch without Elastic Inference.
    """
    import torch

    try:
        torcheia: Any = importlib.import_module("torcheia")
    except ImportError:
        torcheia = None
    if torcheia is not None and hasattr(torcheia, "jit") and hasattr(torcheia.jit, "attach_eia"):
        return "torcheia"
    if len(_parameters(torch.jit.optimized_execution)) > 1:
        return "optimized_execution"
    raise ImportError(f"torch {torch.__version__} is PyTorch without Elastic Inference, and there is no torcheia")


def torch_facts() -> Dict[str, Any]:
    """Return versions and which interface is here."""
    import torch

    versions = {"torch": str(torch.__version__), "python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    return {"versions": versions, "api": torch_api()}


def attached(module: Any, ordinal: int) -> Callable[..., Any]:
    """Return TorchScript as a function that computes on the accelerator of this number."""
    import torch

    if torch_api() == "torcheia":
        torch._C._jit_set_profiling_executor(False)
        bound = importlib.import_module("torcheia").jit.attach_eia(module, ordinal)

        def run_attached(*tensors: Any) -> Any:
            with torch.no_grad(), torch.jit.optimized_execution(True):
                return bound(*tensors)

        return run_attached

    def run_targeted(*tensors: Any) -> Any:
        with torch.no_grad(), torch.jit.optimized_execution(True, {"target_device": f"eia:{ordinal}"}):
            return module(*tensors)

    return run_targeted


def try_torch(ordinal: int) -> None:
    """Run one addition, so that the client says which accelerators it finds, or dies of finding none."""
    import torch

    def add_one(x: Any) -> Any:
        return x + 1

    class One(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return add_one(x)

    attached(torch.jit.trace(One().eval(), torch.ones(1)), ordinal)(torch.ones(1))


def open_torch(header: Dict[str, Any]) -> Callable[[Dict[str, Any]], Dict[str, Any]]:
    """Load TorchScript and bind it to its accelerator; results are named in the order of the signature."""
    import torch

    run_module = attached(torch.jit.load(header["path"], map_location=torch.device("cpu")).eval(), header["ordinal"])
    names, results = list(header["inputs"]), list(header["outputs"])

    def run(inputs: Dict[str, Any]) -> Dict[str, Any]:
        found = _tensors(run_module(*[torch.from_numpy(inputs[name]) for name in names]))
        if len(found) != len(results):
            raise RuntimeError(f"the program returned {len(found)} tensors, not {len(results)}")
        return {name: value.detach().cpu().numpy() for name, value in zip(results, found)}

    return run


def _tensors(value: Any) -> List[Any]:
    """Return the tensors of a nest, in its order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [one for member in value for one in _tensors(member)]
    return [] if value is None else [value]


FACTS = {"predictor": predictor_facts, "torcheia": torch_facts}
TRIALS = {"predictor": try_predictor, "torcheia": try_torch}
OPENERS = {"predictor": open_predictor, "torcheia": open_torch}


if __name__ == "__main__":
    # Python has put the folder of this script first, where a module has the name of one of the vendor's packages.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    with os.fdopen(int(sys.argv[1]), "rb") as requests, os.fdopen(int(sys.argv[2]), "wb") as answers:
        serve(requests, answers)
