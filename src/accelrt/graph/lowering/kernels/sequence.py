"""Sequences, which are lists, and optionals, which are a value or None."""

from __future__ import annotations

from typing import Any

import torch

from accelrt.graph.lowering.dtypes import Tensor


def sequence_construct(*xs: Any) -> list[Any]:
    return list(xs)


def sequence_empty(**_: Any) -> list[Any]:
    return []


def sequence_insert(items: list[Any], item: Any, position: Any = None) -> list[Any]:
    place = len(items) if position is None else int(position)
    if not -len(items) <= place <= len(items):
        raise IndexError(f"SequenceInsert at {place} of {len(items)}")
    return [*items[:place], item, *items[place:]] if place != len(items) else [*items, item]


def sequence_erase(items: list[Any], position: Any = None) -> list[Any]:
    place = (len(items) - 1 if position is None else int(position)) % len(items)
    return items[:place] + items[place + 1 :]


def sequence_at(items: list[Any], position: Any) -> Any:
    return items[int(position)]


def sequence_length(items: list[Any], *, device: Any) -> Tensor:
    return torch.tensor(len(items), dtype=torch.int64, device=device)


def split_to_sequence(x: Tensor, split: Any = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    if split is None:
        parts = torch.split(x, 1, axis)
        return list(parts) if keepdims else [part.squeeze(axis) for part in parts]
    return list(torch.split(x, list(split) if isinstance(split, list) else split, axis))


def concat_from_sequence(items: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    return torch.stack(items, axis) if new_axis else torch.cat(items, axis)


def optional(x: Any = None, **_: Any) -> Any:
    return x


def optional_get_element(x: Any) -> Any:
    if x is None:
        raise ValueError("OptionalGetElement of an empty optional")
    return x


def optional_has_element(x: Any = None, *, device: Any) -> Tensor:
    return torch.tensor(x is not None, device=device)
