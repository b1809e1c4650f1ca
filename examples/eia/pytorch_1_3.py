"""A script for PyTorch-EI 1.3.1, where the accelerator is an argument of `torch.jit.optimized_execution`.

`import torch` became the import below; the rest is as it was.

    ACCELRT_BACKEND=cpu/openvino python examples/eia/pytorch_1_3.py
"""

import tempfile
import time
from pathlib import Path

from accelrt.compat.eia import torch

torch.manual_seed(0)


def network():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    ).eval()


images = torch.randn(4, 3, 64, 64)
with tempfile.TemporaryDirectory() as folder:
    path = str(Path(folder) / "model.pt")
    torch.jit.save(torch.jit.trace(network(), images), path)

    model = torch.jit.load(path, map_location=torch.device("cpu"))
    with torch.no_grad():
        expected = model(images)
        with torch.jit.optimized_execution(True, {"target_device": "eia:0"}):
            for attempt in range(3):
                start = time.perf_counter()
                scores = model(images)
                print(f"call {attempt}: {time.perf_counter() - start:.4f} s, scores {tuple(scores.shape)}")
print("agrees with PyTorch:", torch.allclose(scores, expected, rtol=1e-3, atol=1e-4))
