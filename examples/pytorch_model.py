"""Compile two PyTorch models, compare them with eager PyTorch, and time both.

The models are ResNet-50 and BERT-base in shape, with random weights, so nothing is downloaded::

    pip install accelrt[torch] transformers
    python examples/pytorch_model.py            # the backend of ACCELRT_BACKEND, else the best one here
    python examples/pytorch_model.py cpu
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

import accelrt


def main(backend: str | None) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 224, 224)
    compare("ResNet-50", ResNetForImageClassification(ResNetConfig()), {"pixel_values": image}, backend)

    ids = torch.randint(0, 30_000, (1, 128))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    compare("BERT-base", BertModel(BertConfig()), text, backend)


def compare(name: str, module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], backend: str | None) -> None:
    """Compile a module, run it both ways on the same inputs, and print error and latency."""
    module.eval()
    artifact = accelrt.compile(module, example_inputs=inputs, backend=backend)
    print(f"== {name}")
    print(artifact.explain())
    with accelrt.load(artifact) as session, torch.inference_mode():
        found = session.predict(inputs)
        expected = module(**inputs)
        for key, array in found.items():
            error = np.abs(array - expected[key].numpy()).max()
            print(f"{key}: shape {array.shape}, maximum error {error:.2e}")
        print(f"eager PyTorch: {latency(lambda: module(**inputs))}")
        print(f"accelrt:       {latency(lambda: session.predict(inputs))}")


def latency(run: Callable[[], object], runs: int = 20) -> str:
    """Time some runs after three to warm up."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    p50, p90, p99 = np.percentile(np.array(seconds) * 1e3, [50, 90, 99])
    return f"n={runs}  p50 {p50:.1f} ms  p90 {p90:.1f} ms  p99 {p99:.1f} ms"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
