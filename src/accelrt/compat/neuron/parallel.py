"""``DataParallel``: a batch is split, and its parts run on several cores at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.utils._pytree as pytree

from accelrt.compat.neuron import residents
from accelrt.compat.neuron.calling import check_dynamic
from accelrt.compat.neuron.compiling import vendors_errors
from accelrt.compat.neuron.program import numbers_in, programs_in, signature_of
from accelrt.compat.neuron.residents import Placement


class DataParallel(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A traced module on several cores.

    Args:
        model: What tracing returned, or ``torch.jit.load``; it is moved to these cores.
        device_ids: Cores as numbers or as ``nc:0``, counted among those that the process may use; None for all.
        dim: Along which dimension inputs are split and outputs joined.
        set_dynamic_batching: Let parts have any size; for ``dim`` 0 only.

    Attributes:
        num_workers: Parts that are under way at a time; twice the cores.
        split_size: Size of a part; None for an equal share for each core.

    Raises:
        ValueError: A core that cannot be, or a module that was not traced here.
        RuntimeError: The cores are not there, or not to be had.
    """

    def __init__(
        self, model: Any, device_ids: Sequence[int | str] | None = None, dim: int = 0, set_dynamic_batching: bool = True
    ) -> None:
        super().__init__()
        self._numbers = numbers_in(model)
        if not self._numbers:
            raise ValueError("DataParallel takes a module that was traced, and this one holds no program.")
        cores = tuple(range(residents.count_of(self._numbers[0]))) if device_ids is None else _ids(device_ids)
        for number in self._numbers:
            with vendors_errors():
                residents.put(number, Placement(cores=cores))
        self.module = model
        self.dim = dim
        self.device_ids = list(cores)
        self.num_workers = 2 * len(cores)
        self.split_size: int | None = None
        if set_dynamic_batching and dim == 0:
            for number in self._numbers:
                check_dynamic(signature_of(number))
            self._set_dynamic(True)

    def disable_dynamic_batching(self) -> None:
        """Have each part of the size that was compiled for; others are errors."""
        self._set_dynamic(False)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Split the inputs, run the parts, and join what they return.

        Raises:
            RuntimeError: Inputs of different sizes, or parts that do not fit the program.
        """
        rows = {tensor.shape[self.dim] for tensor in inputs}
        if len(rows) != 1:
            raise RuntimeError(f"Inconsistent batch sizes found on inputs: {sorted(rows)}")
        size = self.split_size or max(1, rows.pop() // len(self.device_ids))
        parts = list(zip(*(tensor.split(size, self.dim) for tensor in inputs), strict=True))
        with ThreadPoolExecutor(max_workers=max(1, min(self.num_workers, len(parts)))) as pool:
            results = list(pool.map(self._call, parts))
        leaves, nest = zip(*(pytree.tree_flatten(result) for result in results), strict=True)
        return pytree.tree_unflatten([torch.cat(pieces, self.dim) for pieces in zip(*leaves, strict=True)], nest[0])

    def _call(self, part: tuple[torch.Tensor, ...]) -> Any:
        with torch.no_grad():  # a mode of each thread
            return self.module(*part)

    def _set_dynamic(self, dynamic: bool) -> None:
        for program in programs_in(self.module):
            program.dynamic = dynamic


def _ids(given: Sequence[int | str]) -> tuple[int, ...]:
    found = []
    for one in given:
        match = re.fullmatch(r"(?:nc:)?(\d{1,6})", str(one), re.ASCII)
        if match is None:
            raise ValueError(f"device_ids holds {one!r}; it takes numbers of cores, or 'nc:0'.")
        found.append(int(match[1]))
    if not found or len(set(found)) != len(found):
        raise ValueError(f"device_ids must name at least one core and each once, not {list(given)}.")
    return tuple(found)
