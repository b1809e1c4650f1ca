"""An Inf1 script: two models in one process, each in its group of NeuronCores. Only its import line is accelrt's.

ACCELRT_NEURON_EMULATE=inf1.xlarge ACCELRT_BACKEND=neuron/emulator python examples/neuron/inf1_groups.py
"""

import os
import tempfile
from pathlib import Path

os.environ["NEURONCORE_GROUP_SIZES"] = "1,1"  # before the first program is loaded

import torch

import accelrt.compat.neuron.torch_neuron  # noqa: F401 - torch.neuron is there from here on


def classifier(classes: int) -> torch.nn.Module:
    """Return a small convolutional network in eval mode."""
    torch.manual_seed(classes)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 7 * 7, classes),
    ).eval()


models = {"animals": classifier(10), "flowers": classifier(20)}
image = torch.rand(1, 3, 32, 32)
report = torch.neuron.analyze_model(models["animals"], example_inputs=[image])
print(f"{report['percent_supported']:.0f}% of {report['total_count']} operators are supported")

with tempfile.TemporaryDirectory() as folder:
    for name, model in models.items():
        traced = torch.neuron.trace(model, example_inputs=[image], compiler_args=["--fast-math", "none"])
        traced.save(str(Path(folder) / f"{name}.pt"))
        del traced
    # Groups are taken in the order of loading.
    loaded = {name: torch.jit.load(str(Path(folder) / f"{name}.pt")) for name in models}

with torch.no_grad():
    for name, model in models.items():
        expected = model(image)
        found = loaded[name](image)
        close = (found - expected).norm() / expected.norm() < 2e-2
        print(f"{name}: {found.shape[1]} classes, agrees with PyTorch: {bool(close)}")

dynamic = torch.neuron.trace(models["animals"], image, dynamic_batch_size=True)
with torch.no_grad():
    print("any batch:", tuple(dynamic(torch.rand(5, 3, 32, 32)).shape))
