"""A script for PyTorch-EI 1.5.1, where `torcheia.jit.attach_eia` binds a module to its accelerator.

`import torcheia` became the import below; the rest is as it was.

    ACCELRT_BACKEND=cpu/openvino python examples/eia/pytorch_1_5.py
"""

import tempfile
import time
from pathlib import Path

import torch

from accelrt.compat.eia import torcheia

torch.manual_seed(0)


class Tagger(torch.nn.Module):
    """Tags each word of a sentence: the same network whatever its length, which a script keeps."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(500, 24)
        self.hidden = torch.nn.Linear(24, 48)
        self.tags = torch.nn.Linear(48, 7)

    def forward(self, ids):
        scores = self.tags(torch.relu(self.hidden(self.words(ids))))
        return scores, scores.argmax(dim=-1)


sentences = [torch.randint(0, 500, (1, length)) for length in (6, 11)]
with tempfile.TemporaryDirectory() as folder:
    path = str(Path(folder) / "model.pt")
    torch.jit.save(torch.jit.script(Tagger().eval()), path)

    torch._C._jit_set_profiling_executor(False)
    plain = torch.jit.load(path, map_location="cpu").eval()
    model = torcheia.jit.attach_eia(plain, 0)
    with torch.no_grad(), torch.jit.optimized_execution(True):
        for ids in sentences:
            model.forward(ids)  # the first call with each length compiles
            start = time.perf_counter()
            scores, tags = model.forward(ids)
            took = time.perf_counter() - start
            same = torch.allclose(scores, plain(ids)[0], rtol=1e-3, atol=1e-4)
            print(f"{ids.shape[1]} words: {took:.4f} s, tags {tags[0].tolist()}, agrees with PyTorch: {same}")
