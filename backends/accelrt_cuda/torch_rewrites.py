"""Rewrites of a lowered graph that its compiler does not find by itself, or that eager torch needs.

Each works on a ``torch.fx.GraphModule`` of kernels as `accelrt.graph.lowering` writes it, in place, and gives the same
numbers up to the order of rounding. torch is imported with this module.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering import host
from accelrt.graph.lowering.kernels import cast, conv, elementwise, matmul, reduce, shape

_SOFTMAX_PER_AXIS = 13
"""The version of Softmax that works along one axis."""
_RANK = 4
"""Batch, heads, rows, columns: the form that torch's fused kernels take."""


def rewrite(module: Any, *, channels_last: bool) -> dict[str, int]:
    """Apply all rewrites; return how often each did something."""
    counts = {
        "constants": fold_weights(module),
        "attention": fuse_attention(module),
        "linear": fuse_bias(module),
        "joined": join_linears(module),
        "powers": unfold_powers(module),
        "sizes": fill_sizes(module),
        "channels_last": weights_to_channels_last(module) if channels_last else 0,
    }
    module.graph.eliminate_dead_code()
    _drop_unread_buffers(module)
    module.graph.lint()
    module.recompile()
    return counts


# Constants


_FOLDED: tuple[Callable[..., Any], ...] = (cast.cast, shape.transpose, shape.reshape, shape.squeeze, shape.unsqueeze)


def fold_weights(module: Any) -> int:
    """Compute casts and moves of weights once; lowering does that for small constants only."""
    done = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in _FOLDED or not node.args or not _is_buffer(node.args[0]):
            continue
        if any(isinstance(argument, torch.fx.Node) for argument in (*node.args[1:], *node.kwargs.values())):
            continue
        with torch.no_grad():
            value = node.target(_buffer(module, node.args[0]), *node.args[1:], **node.kwargs)
        _become_buffer(module, node, value.contiguous())
        done += 1
    return done


def _is_buffer(value: Any) -> bool:
    return isinstance(value, torch.fx.Node) and value.op == "get_attr"


def _buffer(module: Any, node: Any) -> Any:
    return getattr(module, node.target)


def _become_buffer(module: Any, node: Any, value: Any) -> None:
    name = _new_buffer(module, f"{node.name}_folded", value)
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    node.replace_all_uses_with(constant)
    module.graph.erase_node(node)


def _new_buffer(module: Any, name: str, value: Any) -> str:
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, value)
    return name


def _drop_unread_buffers(module: Any) -> None:
    """Let go of what nothing reads any more: the wide form of weights above all."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name in module._buffers if name not in read]:
        delattr(module, name)


# Attention


def attend(query: Any, key: Any, value: Any, mask: Any, scale: float, axis: int) -> Any:
    """Compute ``softmax(query @ key * scale + mask) @ value``, in one kernel where the shapes are those of attention.

    Args:
        query: [batch, heads, rows, width].
        key: [batch, heads, width, columns]: as the product takes it.
        value: [batch, heads, columns, other width].
        mask: None, or what is added to the scores, broadcast to them.
        scale: What the scores are multiplied by.
        axis: Of the softmax.
    """
    if _is_attention(query, key, value, mask, axis):
        if mask is not None:
            mask = mask.to(query.dtype)[(None,) * (_RANK - mask.dim())]
        return F.scaled_dot_product_attention(query, key.transpose(-2, -1), value, attn_mask=mask, scale=scale)
    scores = torch.matmul(query, key)
    scores = scores if scale == 1.0 else scores * scale
    scores = scores if mask is None else scores + mask
    return torch.matmul(torch.softmax(scores, axis), value)


def _is_attention(query: Any, key: Any, value: Any, mask: Any, axis: int) -> bool:
    if not (query.dim() == key.dim() == value.dim() == _RANK) or axis not in (-1, _RANK - 1):
        return False
    if not (query.dtype == key.dtype == value.dtype) or query.dtype == torch.float64:
        return False
    if query.shape[:2] != key.shape[:2] or key.shape[:2] != value.shape[:2]:
        return False
    if mask is None:
        return True
    whole = (*query.shape[:3], key.shape[3])
    if mask.dim() > _RANK or not mask.is_floating_point():
        return False
    pairs = zip(mask.shape, whole[_RANK - mask.dim() :], strict=True)
    return all((isinstance(own, int) and own == 1) or own == full for own, full in pairs)


def fuse_attention(module: Any) -> int:
    """Find scores, softmax and product in a row, which exporters write attention as, and make them one call."""
    done = 0
    for product in list(module.graph.nodes):
        if not _calls(product, matmul.matmul) or len(product.args) != 2:
            continue
        weights, value = product.args
        if (found := _scores(module, weights)) is None:
            continue
        query, key, mask, scale, axis = found
        with module.graph.inserting_before(product):
            fused = module.graph.call_function(attend, (query, key, value, mask, scale, axis))
        product.replace_all_uses_with(fused)
        module.graph.erase_node(product)
        done += 1
    module.graph.eliminate_dead_code()
    return done


def _scores(module: Any, weights: Any) -> tuple[Any, Any, Any, float, int] | None:
    """Take apart the first factor: query, key, mask, scale, axis; None if it is no softmax of scores."""
    if not _calls(weights, reduce.softmax) or len(weights.users) != 1 or len(weights.args) != 1:
        return None
    axis = weights.kwargs.get("axis")
    if weights.kwargs.get("version", 0) < _SOFTMAX_PER_AXIS:
        return None
    node = weights.args[0]
    mask = None
    if _calls(node, torch.add) and len(node.users) == 1 and len(node.args) == 2 and not node.kwargs:
        for scores, other in (node.args, node.args[::-1]):
            if isinstance(other, torch.fx.Node) and _scaled_product(module, scores) is not None:
                node, mask = scores, other
                break
        else:
            return None
    if (found := _scaled_product(module, node)) is None:
        return None
    query, key, scale = found
    return query, key, mask, scale, -1 if axis is None else axis


def _scaled_product(module: Any, node: Any) -> tuple[Any, Any, float] | None:
    """Return the factors of a product and the number that it is multiplied by; None if it is none."""
    scale = 1.0
    while isinstance(node, torch.fx.Node) and len(node.users) == 1:
        if _calls(node, matmul.matmul) and len(node.args) == 2:
            return (*node.args, scale)
        if _calls(node, elementwise.divide) and (number := _number(module, node.args[1])):
            scale, node = scale / number, node.args[0]
        elif _calls(node, torch.mul) and (number := _number(module, node.args[1])) is not None:
            scale, node = scale * number, node.args[0]
        elif _calls(node, torch.mul) and (number := _number(module, node.args[0])) is not None:
            scale, node = scale * number, node.args[1]
        else:
            return None
    return None


def _calls(node: Any, function: Callable[..., Any]) -> bool:
    return isinstance(node, torch.fx.Node) and node.op == "call_function" and node.target is function


def _number(module: Any, node: Any) -> float | None:
    """Return a constant of one element that broadcasts to anything, as a number."""
    if not _is_buffer(node):
        return None
    value = _buffer(module, node)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.dim() > 1 or not value.is_floating_point():
        return None
    return float(value)


# Linear layers


def linear(x: Any, weight: Any, bias: Any) -> Any:
    """Return ``x @ weight + bias``: one kernel of cuBLAS, which adds the bias on its way out.

    Args:
        x: [..., rows].
        weight: [rows, columns].
        bias: [columns].
    """
    return F.linear(x, weight.t(), bias)


def linear_parts(x: Any, weight: Any, bias: Any, sizes: list[int]) -> Any:
    """Return several linear layers of one input, computed as one, as a tuple; ``sizes`` are their columns."""
    return torch.split(linear(x, weight, bias), sizes, -1)


def fuse_bias(module: Any) -> int:
    """Make a product with a weight, and the bias added to it, one call."""
    done = 0
    for total in list(module.graph.nodes):
        if not _calls(total, torch.add) or len(total.args) != 2 or total.kwargs:
            continue
        for product, bias in (total.args, total.args[::-1]):
            if _is_layer(module, product, bias):
                with module.graph.inserting_before(total):
                    layer = module.graph.call_function(linear, (*product.args, bias))
                total.replace_all_uses_with(layer)
                module.graph.erase_node(total)
                module.graph.erase_node(product)
                done += 1
                break
    return done


def _is_layer(module: Any, product: Any, bias: Any) -> bool:
    if not _calls(product, matmul.matmul) or len(product.users) != 1 or not _is_buffer(bias):
        return False
    x, weight = product.args
    if not _is_buffer(weight) or not isinstance(x, torch.fx.Node):
        return False
    w, b = _buffer(module, weight), _buffer(module, bias)
    if not isinstance(w, torch.Tensor) or not isinstance(b, torch.Tensor) or not w.is_floating_point():
        return False
    return bool(w.dim() == 2 and b.dim() == 1 and b.shape[0] == w.shape[1] and b.dtype == w.dtype)


def join_linears(module: Any) -> int:
    """Compute linear layers of the same input, as query, key and value are, in one product."""
    groups: dict[Any, list[Any]] = {}
    for node in module.graph.nodes:
        if _calls(node, linear):
            weight = _buffer(module, node.args[1])
            groups.setdefault((node.args[0], weight.shape[0], weight.dtype), []).append(node)
    done = 0
    for (x, _, _), layers in groups.items():
        if len(layers) < 2:
            continue
        weights = [_buffer(module, layer.args[1]) for layer in layers]
        biases = [_buffer(module, layer.args[2]) for layer in layers]
        weight = _new_buffer(module, f"{layers[0].name}_weights", torch.cat(weights, 1))
        bias = _new_buffer(module, f"{layers[0].name}_biases", torch.cat(biases, 0))
        with module.graph.inserting_before(layers[0]):
            arguments = (x, module.graph.get_attr(weight), module.graph.get_attr(bias))
            parts = module.graph.call_function(linear_parts, (*arguments, [w.shape[1] for w in weights]))
            found = [module.graph.call_function(operator.getitem, (parts, index)) for index in range(len(layers))]
        for layer, part in zip(layers, found, strict=True):
            layer.replace_all_uses_with(part)
            module.graph.erase_node(layer)
        done += len(layers)
    return done


# Powers


def unfold_powers(module: Any) -> int:
    """Write squares and cubes as products: exact to the last digit or nearly, and many times as fast as a power."""
    done = 0
    for node in list(module.graph.nodes):
        if not _calls(node, elementwise.power) or len(node.args) != 2:
            continue
        base, exponent = node.args
        number = _number(module, exponent)
        if number not in (2.0, 3.0) or not isinstance(base, torch.fx.Node):
            continue
        with module.graph.inserting_before(node):
            result = module.graph.call_function(_powers[number], (base,), {"dtype": node.kwargs["dtype"]})
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
        done += 1
    return done


def square(x: Any, *, dtype: Any) -> Any:
    """Return ``x ** 2``."""
    return (x * x).to(dtype)


def cube(x: Any, *, dtype: Any) -> Any:
    """Return ``x ** 3``."""
    return (x * x * x).to(dtype)


_powers = {2.0: square, 3.0: cube}


# Sizes


def fill_sizes(module: Any) -> int:
    """Make tensors of sizes on the device, by filling: a copy from the host cannot be recorded in a CUDA graph."""
    done = 0
    for node in module.graph.nodes:
        if _calls(node, host.as_tensor):
            node.target = filled
            done += 1
    return done


def filled(x: Any, *, dtype: Any, device: Any) -> Any:
    """Return an integer, or a list of them, as a tensor."""
    if not isinstance(x, (list, tuple)):
        return torch.full((), x, dtype=dtype, device=device)
    if not x:
        return torch.empty((0,), dtype=dtype, device=device)
    return torch.stack([torch.full((), item, dtype=dtype, device=device) for item in x])


# Layout


def weights_to_channels_last(module: Any) -> int:
    """Lay out weights of two-dimensional convolutions with channels last; torch's kernels then follow by themselves."""
    done = 0
    for node in module.graph.nodes:
        if not _calls(node, conv.convolution) or not _is_buffer(node.args[1]):
            continue
        weight = _buffer(module, node.args[1])
        if weight.dim() == 4:
            setattr(module, node.args[1].target, weight.contiguous(memory_format=torch.channels_last))
            done += 1
    return done
