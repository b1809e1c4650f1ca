"""Operators of TensorFlow that tf2onnx leaves out and models have; importing this adds them to its table."""

from __future__ import annotations

from typing import Any

import numpy as np
from tf2onnx.handler import tf_op
from tf2onnx.utils import map_onnx_to_numpy_type


@tf_op("Erfc")
class Erfc:
    """1 - erf(x), of which Keras makes GELU. Far out its relative error grows, its absolute one does not."""

    @classmethod
    def version_9(cls, ctx: Any, node: Any, **_: Any) -> None:
        dtype, shape = ctx.get_dtype(node.output[0]), ctx.get_shape(node.output[0])
        one = ctx.make_const(f"{node.name}_one", np.array(1, map_onnx_to_numpy_type(dtype)))
        erf = ctx.make_node("Erf", [node.input[0]], dtypes=[dtype], shapes=[shape])
        outputs = node.output
        ctx.remove_node(node.name)
        ctx.make_node("Sub", [one.output[0], erf.output[0]], outputs=outputs, dtypes=[dtype], shapes=[shape])
