"""A script for pairs of sentences, in the style of the vendor's BERT samples: a dictionary comes out.

ACCELRT_BACKEND=neuron/emulator python examples/neuron/bert_pairs.py
"""

import tempfile
from pathlib import Path

import torch

from accelrt.compat.neuron import torch_neuronx


class Encoder(torch.nn.Module):
    """Token, position and segment embeddings, two layers of attention, and two classes."""

    def __init__(self, words: int = 100, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(words, width)
        self.places = torch.nn.Parameter(torch.randn(1, length, width) * 0.02)
        self.segments = torch.nn.Embedding(2, width)
        self.query, self.key, self.value = (
            torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2)) for _ in range(3)
        )
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))
        self.classes = torch.nn.Linear(width, 2)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        x = self.words(input_ids) + self.places + self.segments(token_type_ids)
        hidden = (1.0 - attention_mask[:, None, :].float()) * -1e4
        for query, key, value, norm in zip(self.query, self.key, self.value, self.norms, strict=True):
            scores = query(x) @ key(x).transpose(1, 2) * x.shape[-1] ** -0.5
            x = norm(x + torch.softmax(scores + hidden, -1) @ value(x))
        return {"logits": self.classes(x[:, 0]), "hidden": x}


def encode(first: list[int], second: list[int], length: int = 16) -> tuple[torch.Tensor, ...]:
    """Return what a tokenizer returns for two sentences, padded to one length."""
    ids = [1, *first, 2, *second, 2]
    kinds = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    padding = [0] * (length - len(ids))
    rows = (ids + padding, [1] * len(ids) + padding, kinds + padding)
    return tuple(torch.tensor([row]) for row in rows)


torch.manual_seed(0)
model = Encoder().eval()
example = encode([10, 11, 12], [13, 14])

found = torch_neuronx.analyze(model, example)
print("supported:", found["support_percentage"], "left out:", [one["kind"] for one in found["unsupported_operators"]])

neuron = torch_neuronx.trace(model, example, compiler_args="--model-type=transformer --auto-cast all")
with tempfile.TemporaryDirectory() as folder:
    torch.jit.save(neuron, Path(folder) / "pairs.pt")
    neuron = torch.jit.load(Path(folder) / "pairs.pt")

for name, pair in {"near": ([10, 11, 12], [13, 14]), "far": ([40, 50], [60, 70, 80])}.items():
    inputs = encode(*pair)
    with torch.no_grad():
        ours, exact = neuron(*inputs), model(*inputs)
    close = (ours["hidden"] - exact["hidden"]).norm() / exact["hidden"].norm() < 3e-2
    same = ours["logits"].argmax() == exact["logits"].argmax()
    print(f"{name}: agrees with PyTorch: {bool(close)}, the same class: {bool(same)}")

try:
    neuron(*(torch.cat([one, one]) for one in example))
except RuntimeError as error:
    print("a batch of two:", next(line for line in str(error).splitlines() if "Incorrect tensor shape" in line))
