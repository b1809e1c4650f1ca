"""Several programs as one traced module: a kernel of the user's says which of them a call is for."""

# No `from __future__ import annotations`: torch.jit.script reads the annotations themselves.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, List, Optional  # noqa: UP035 - TorchScript's own words

import torch
import torch.utils._pytree as pytree


@dataclass(frozen=True, slots=True)
class BucketModelConfig:
    """How calls find their bucket; the arguments after the first are passed by name.

    Attributes:
        bucket_kernel: Returns a scripted function, which takes the list of inputs and returns the inputs as the bucket
            wants them and a tensor with its index.
        shared_state_buffer: State that all buckets share; refused where there is any.
        shared_state_buffer_preprocessor: Likewise.
        func_kwargs: Arguments for the function that makes the models: one dictionary, or one for each bucket.
    """

    bucket_kernel: Callable[..., Any]
    shared_state_buffer: Optional[Sequence[torch.Tensor]] = None  # noqa: UP045
    shared_state_buffer_preprocessor: Optional[Callable[..., Any]] = None  # noqa: UP045
    func_kwargs: Any = None

    def __init__(
        self,
        bucket_kernel: Callable[..., Any],
        *_: Any,
        shared_state_buffer: Any = None,
        shared_state_buffer_preprocessor: Any = None,
        func_kwargs: Any = None,
    ) -> None:
        if _:
            raise TypeError("Arguments of BucketModelConfig after the first are passed by name.")
        if not callable(bucket_kernel):
            raise TypeError(f"bucket_kernel returns a scripted function; it is a {type(bucket_kernel).__name__}")
        for name, value in (
            ("bucket_kernel", bucket_kernel),
            ("shared_state_buffer", shared_state_buffer),
            ("shared_state_buffer_preprocessor", shared_state_buffer_preprocessor),
            ("func_kwargs", func_kwargs),
        ):
            object.__setattr__(self, name, value)

    def kernel(self) -> Any:
        """Return the scripted function.

        Raises:
            TypeError: It is none.
        """
        found = self.bucket_kernel()
        if not isinstance(found, torch.jit.ScriptFunction):
            raise TypeError(f"bucket_kernel returns what torch.jit.script made, not a {type(found).__name__}")
        return found

    def arguments(self, buckets: int) -> list[Mapping[str, Any]]:
        """Return the arguments with which the model of each bucket is made.

        Raises:
            ValueError: There are more or fewer of them than buckets.
        """
        if self.func_kwargs is None or isinstance(self.func_kwargs, Mapping):
            return [self.func_kwargs or {}] * buckets
        found = list(self.func_kwargs)
        if len(found) != buckets:
            raise ValueError(f"func_kwargs is a list of {len(found)}, and there are {buckets} buckets")
        return found


class Buckets(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Programs, and the kernel that chooses among them."""

    def __init__(self, programs: Sequence[Any], kernel: Any) -> None:
        super().__init__()
        self.programs = torch.nn.ModuleList(programs)
        self.kernel = kernel

    def forward(self, inputs: List[torch.Tensor]) -> List[torch.Tensor]:  # noqa: UP006
        fitted, index = self.kernel(inputs)
        chosen = int(index)
        found: List[torch.Tensor] = []  # noqa: UP006
        known = False
        for number, program in enumerate(self.programs):
            if number == chosen:
                found = program(fitted)
                known = True
        if not known:
            raise RuntimeError("The bucket kernel chose a bucket that is not there")
        return found


class Packed(torch.nn.Module):  # type: ignore[misc]
    """Buckets with the inputs and outputs of the function that they were made of."""

    def __init__(self, buckets: Any, results: Any) -> None:
        super().__init__()
        self.buckets = buckets
        self._results = results

    def forward(self, *args: Any) -> Any:
        return pytree.tree_unflatten(self.buckets(pytree.tree_leaves(args)), self._results)
