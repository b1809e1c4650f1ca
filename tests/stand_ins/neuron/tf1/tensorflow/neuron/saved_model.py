"""A stand-in for the vendor's published python/saved_model.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

_GRAPH_UTIL = {
    "dynamic_batch_size", "protected_op_names", "supported_op_types", "no_fuse_ops", "force_fuse_ops",
    "minimum_segment_size", "grappler", "max_num_compilers", "compiler_args", "compiler_timeout", "compiler_recovery",
    "compiler_verbose", "amp_pass",
}  # fmt: skip


def convert_to_inference_model(
    model_dir,
    new_model_dir,
    batch_size=1,
    model_shape_feed_dict=None,
    model_feed_dict=None,
    tags=None,
    signature_def_key=None,
    strip_default_attrs=False,
    config_proto=None,
    constant_size_to_exclude=1024,
    convert_constants_to_variables=False,
    compiler_workdir=None,
    **kwargs,
):
    if unknown := set(kwargs) - _GRAPH_UTIL:
        raise TypeError(f"inference_graph_from_session() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    if Path(new_model_dir).exists():
        raise AssertionError(
            f"Export directory already exists. Please specify a different export directory: {new_model_dir}"
        )
    facts = json.loads((Path(model_dir) / "model.json").read_text())
    for name in model_shape_feed_dict or {}:
        if name != facts["input"]:
            raise ValueError(f"Incorrect input name: {name}")
    (Path(compiler_workdir) / "graph_def.neuron-cc.log").write_text("Compiler status PASS")
    shutil.copytree(model_dir, new_model_dir)
    facts["neuron"] = {
        "args": kwargs.get("compiler_args"),
        "shapes": model_shape_feed_dict,
        "dynamic": kwargs.get("dynamic_batch_size", False),
    }
    (Path(new_model_dir) / "model.json").write_text(json.dumps(facts))
    return {"OnNeuronRatio": float(os.environ.get("STAND_IN_RATIO", "1.0"))}


compile = convert_to_inference_model
