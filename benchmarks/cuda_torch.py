"""`cuda/torch` against what can be had by hand on the same GPU: arrays in, arrays out, batch 1 and a larger one.

Claim: compiled ahead and recorded, it takes no longer than eager torch, torch recorded as a CUDA graph,
``torch.compile``, ``torch.compile(mode="reduce-overhead")`` and onnxruntime's CUDA provider; at batch 1 less than half
of eager torch's time. By hand, torch runs the same graph, lowered to a module, under autocast; onnxruntime runs in
float32.
``python benchmarks/cuda_torch.py resnet50|bert [BATCH] [PRECISION]``; each compiles for a minute or two.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from measure import interleave, report, rows

import accelrt
from accelrt.graph.load import load_graph
from accelrt.graph.lowering import lower
from accelrt.testing.models import bert_base, resnet50

SEQUENCE = 128
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SLACK = 1.03
"""Of a median, for noise."""


def main() -> None:
    """Measure one network and report."""
    words = [word for word in sys.argv[1:] if not word.startswith("-") and not word.endswith(".json")]
    name, batch = (words or ["resnet50"])[0], int((words[1:] or ["1"])[0])
    precision = (words[2:] or ["bf16"])[0]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in words]
    model = resnet50(batch=batch) if name == "resnet50" else bert_base(batch=batch, sequence=SEQUENCE)
    feeds = _feeds(name, batch)
    ours = "cuda/torch, auto"
    contestants = {ours: _ours(model, feeds, precision), **_by_hand(model, feeds, precision, name)}
    contestants |= _onnxruntime(model, feeds)
    truth = _first(accelrt.load(accelrt.compile(model, "cpu/onnxruntime")).predict(feeds).values())
    errors = {who: float(np.linalg.norm(run() - truth) / np.linalg.norm(truth)) for who, run in contestants.items()}
    table = rows(interleave(contestants, rounds=100, inner=5 if batch == 1 else 1, warmup=10), ours)
    claims = {
        f"no slower than {row.name}: {row.ratio:.2f} times ours": row.ratio * SLACK >= 1
        for row in table
        if row.name != ours
    }
    if batch == 1:
        eager = next(row for row in table if row.name == "torch, eager")
        claims[f"less than half of eager torch: {1 / eager.ratio:.2f}"] = eager.ratio > 2
    for who, error in errors.items():
        print(f"{who}: relative L2 error {error:.1e}")
    title = f"{name}, batch {batch}, {precision}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    report(title, table, claims, extra={"relative_l2": errors})


def _feeds(name: str, batch: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    if name == "resnet50":
        return {"image": generator.standard_normal((batch, 3, 224, 224), dtype=np.float32)}
    shape = (batch, SEQUENCE)
    ids, types = generator.integers(0, 30522, shape), generator.integers(0, 2, shape)
    return {"input_ids": ids, "attention_mask": np.ones(shape, np.int64), "token_type_ids": types}


def _first(values: Any) -> Any:
    return next(iter(values))


def _ours(model: onnx.ModelProto, feeds: dict[str, Any], precision: Any) -> Callable[[], Any]:
    artifact = accelrt.compile(model, "cuda/torch", precision=precision, fallback="error")
    session = accelrt.load(artifact, fallback="error")
    return lambda: _first(session.predict(feeds).values())


def _by_hand(model: onnx.ModelProto, feeds: dict[str, Any], precision: str, name: str) -> dict[str, Callable[[], Any]]:
    """Return what a user of torch would write: arrays to the GPU, the module under autocast, the first result back."""
    graph = load_graph(model)
    names = graph.signature.input_names
    module: Any = lower(graph, device="cuda").module
    if name == "resnet50" and precision != "fp32":
        for weight in module.buffers():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True

    def called(function: Any) -> Callable[[], Any]:
        def run() -> Any:
            given = [torch.from_numpy(feeds[name]).cuda(non_blocking=True) for name in names]
            with torch.no_grad(), torch.autocast("cuda", TYPES[precision], enabled=precision != "fp32"):
                return function(*given)[0].float().cpu().numpy()

        return run

    ways = {"torch, eager": called(module), "torch, eager in a CUDA graph": _recorded(module, feeds, names, precision)}
    # One of inductor's patterns takes the scale of BERT's attention for a number, and fails on the tensor that it is.
    options: dict[str, Any] = {} if name == "resnet50" else {"pattern_matcher": False}
    ways["torch.compile"] = called(torch.compile(module, options=dict(options)))
    overhead = {**options, "triton.cudagraphs": True}  # what mode="reduce-overhead" stands for
    ways["torch.compile, reduce-overhead"] = called(torch.compile(module, options=overhead))
    return ways


def _recorded(module: Any, feeds: dict[str, Any], names: Any, precision: str) -> Callable[[], Any]:
    static = [torch.from_numpy(feeds[name]).cuda() for name in names]
    cast = torch.autocast("cuda", TYPES[precision], enabled=precision != "fp32", cache_enabled=False)
    stream = torch.cuda.Stream()
    with torch.no_grad(), cast:
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = module(*static)

    def run() -> Any:
        for tensor, name in zip(static, names, strict=True):
            tensor.copy_(torch.from_numpy(feeds[name]))
        graph.replay()
        return results[0].float().cpu().numpy()

    return run


def _onnxruntime(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return onnxruntime's CUDA provider, if it is there."""
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        print("onnxruntime has no CUDA provider here: it takes no part")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        provider = ("CUDAExecutionProvider", {"use_tf32": "0"})
        session = ort.InferenceSession(str(path), providers=[provider, "CPUExecutionProvider"])
    return {"onnxruntime CUDA, float32": lambda: session.run(None, feeds)[0]}


if __name__ == "__main__":
    main()
