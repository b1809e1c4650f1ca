"""Train the small network that travels with accelrt, and write it beside the images it has never seen.

    python examples/train_digits.py [folder]

Needs torch, onnxscript and scikit-learn (``pip install accelrt[test]``) and less than a minute of two CPU
cores. Writes ``digits.onnx``, ``digits.npz`` and ``digits.json`` into ``folder``, by default
``src/accelrt/data``. One machine with one set of versions repeats itself; another may differ in the last
digit, so the measured accuracy is written too.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import sklearn
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

SEED = 0
EPOCHS = 60
BATCH = 64
HELD_OUT = 0.25
FOLDER = Path(__file__).resolve().parents[1] / "src" / "accelrt" / "data"


class Digits(nn.Module):
    """Three convolutions and a linear layer: float32 [batch, 1, 8, 8] in 0..1 to scores [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *self.convolution(1, 32),
            *self.convolution(32, 32),
            nn.MaxPool2d(2),
            *self.convolution(32, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 2 * 2, 10),
        )

    @staticmethod
    def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.layers(image)
        return scores


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Move each image by -1, 0 or 1 pixels along each axis, at random, with zeros coming in."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, count, 1))
    rows = (torch.arange(height) + down)[:, :, None]
    columns = (torch.arange(width) + right)[:, None, :]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


def train(images: np.ndarray, labels: np.ndarray) -> Digits:
    """Train for a fixed number of epochs; nothing is chosen by looking at the held-out images."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    model = Digits().train()
    steps = EPOCHS * -(-len(x) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for index in torch.randperm(len(x)).split(BATCH):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(shifted(x[index])), y[index], label_smoothing=0.05)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(index)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1:3d}  training loss {total / len(x):.4f}")
    return model.eval()


def fold(model: Digits) -> nn.Sequential:
    """Return the network without what only training needs: each normalisation goes into its convolution."""
    layers: list[nn.Module] = []
    for layer in model.layers:
        if isinstance(layer, nn.BatchNorm2d):
            layers.append(nn.utils.fusion.fuse_conv_bn_eval(layers.pop(), layer))
        elif not isinstance(layer, nn.Dropout):
            layers.append(layer)
    return nn.Sequential(*layers).eval()


def export(model: nn.Module) -> onnx.ModelProto:
    """Return the network as ONNX with a free batch axis, weights inside and no traces of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.onnx"
        torch.onnx.export(
            model,
            (torch.zeros(2, 1, 8, 8),),
            path,
            input_names=["image"],
            output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=18,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        exported = onnx.load(path)
    # The exporter notes the source line of every node; file paths of this machine say nothing to a user.
    for part in (
        exported,
        exported.graph,
        *exported.graph.node,
        *exported.graph.input,
        *exported.graph.value_info,
    ):
        del part.metadata_props[:]
    exported.graph.name = "digits"
    onnx.checker.check_model(exported, full_check=True)
    return exported


def scaled(images: np.ndarray) -> np.ndarray:
    """Return images 0..16, uint8 [n, 8, 8], as the network takes them."""
    return images[:, None].astype(np.float32) / 16


def right(model: onnx.ModelProto, images: np.ndarray, labels: np.ndarray) -> int:
    """Count the images that the exported network, not the trained one, gets right."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"image": scaled(images)})
    return int((scores.argmax(axis=1) == labels).sum())


def main(folder: Path = FOLDER) -> None:
    """Train, export, measure, write."""
    digits = load_digits()
    train_images, images, train_labels, labels = train_test_split(
        digits.images.astype(np.uint8),
        digits.target.astype(np.int64),
        test_size=HELD_OUT,
        stratify=digits.target,
        random_state=SEED,
    )
    model = fold(train(scaled(train_images), train_labels))
    exported = export(model)
    correct = right(exported, images, labels)
    facts = {
        "accuracy": correct / len(labels),
        "correct": correct,
        "held_out": len(labels),
        "trained_on": len(train_labels),
        "seed": SEED,
        "epochs": EPOCHS,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "scikit-learn": sklearn.__version__,
            "numpy": np.__version__,
        },
        "source": (
            "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning "
            "Repository, 1998, https://doi.org/10.24432/C50P49, as scikit-learn's load_digits ships it"
        ),
        "licence": "CC BY 4.0",
    }

    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(exported, folder / "digits.onnx")
    np.savez_compressed(folder / "digits.npz", images=images, labels=labels.astype(np.uint8))
    (folder / "digits.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"{correct} of {len(labels)} held-out images right: {correct / len(labels):.2%}; written to {folder}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
