"""An Inf2 script: trace, save, load, serve batches on every core. Only its import line is accelrt's.

ACCELRT_BACKEND=neuron/emulator python examples/neuron/inf2_resnet.py
"""

import tempfile
from pathlib import Path

import torch

from accelrt.compat.neuron import torch_neuronx


class Block(torch.nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.second = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 7, stride=2, padding=3),
    torch.nn.ReLU(),
    Block(16),
    Block(16),
    torch.nn.AdaptiveAvgPool2d(1),
    torch.nn.Flatten(),
    torch.nn.Linear(16, 10),
).eval()
example = torch.rand(2, 3, 32, 32)

neuron = torch_neuronx.trace(
    model, example, compiler_args=["--auto-cast", "matmult", "--auto-cast-type", "bf16", "--optlevel", "2"]
)
neuron = torch_neuronx.dynamic_batch(neuron)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "resnet.pt"
    torch.jit.save(neuron, path)
    print("saved", path.name)
    with torch_neuronx.neuron_cores_context(start_nc=0, nc_count=1):
        restored = torch.jit.load(path)

with torch.no_grad():
    expected = model(example)
    error = (restored(example) - expected).norm() / expected.norm()
print("one core agrees with PyTorch:", bool(error < 2e-2))

served = torch_neuronx.DataParallel(restored)
batch = torch.rand(13, 3, 32, 32)
with torch.no_grad():
    scores, exact = served(batch), model(batch)
print("batch of", scores.shape[0], "on cores", served.device_ids)
print("the batch agrees with PyTorch:", bool((scores - exact).norm() / exact.norm() < 2e-2))
