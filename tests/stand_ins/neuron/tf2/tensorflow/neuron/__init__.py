"""A stand-in for tensorflow-neuron 2.10: signatures as in the vendor's published python/_trace.py."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import tensorflow as tf


class AwsNeuronModel:
    def __init__(self, facts, ratio):
        self._facts = facts
        self.on_neuron_ratio = ratio

    def save(self, filepath, overwrite=True, include_optimizer=True, save_format=None):
        folder = Path(filepath)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "variables").mkdir(exist_ok=True)
        (folder / "variables" / "variables.data").write_bytes(b"weights")
        (folder / "model.json").write_text(json.dumps(self._facts))


def _flags():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--workdir")
    parser.add_argument("--verbose")
    parser.add_argument("--dynamic-batch-size", action="store_true")
    parser.add_argument("--fp32-cast", choices=["all", "matmult", "matmult-fp16", "matmult-bf16", "all-fp16"])
    parser.add_argument("--neuroncore-pipeline-cores", type=int, default=1)
    parser.add_argument("--extract-weights")
    flags, others = parser.parse_known_args(shlex.split(os.environ.get("NEURON_CC_FLAGS", "")))
    if others:
        raise RuntimeError(f"neuron-cc: unrecognized arguments: {others}")
    return {**vars(flags), "fp32_cast": flags.fp32_cast or "matmult-fp16"}


def trace(func, example_inputs, subgraph_builder_function=None):
    flags = _flags()
    if flags["workdir"]:
        (Path(flags["workdir"]) / "graph_def.neuron-cc.log").write_text("Compiler status PASS")
    if os.environ.get("STAND_IN_COMPILER") == "fail":
        (Path(flags["workdir"]) / "graph_def.neuron-cc.log").write_text("ERROR: out of registers")
        raise RuntimeError("neuron-cc failed")
    if isinstance(example_inputs, dict):
        func(**example_inputs)
    elif isinstance(example_inputs, tuple):
        func(*example_inputs)
    else:
        func(example_inputs)
    facts = {**func.__self__.facts, "neuron": flags}
    return AwsNeuronModel(facts, float(os.environ.get("STAND_IN_RATIO", "1.0")))


def analyze_model(func, example_inputs):
    return {"percent_supported": 100.0}


def auto_multicore(model, example_inputs, num_cores=1):
    if not isinstance(model, AwsNeuronModel):
        raise ValueError("Invalid model is not AwsNeuronModel")
    return model


def loaded_on_device(model):
    if status := os.environ.get("STAND_IN_LOAD_STATUS"):
        kind = tf.errors.ResourceExhaustedError if status in ("4", "9", "11") else tf.errors.InvalidArgumentError
        raise kind(None, None, f"Nrt::Load failed on NeuronCores 0-0: nrt_load status={status}, error message=failure")
    return model


saved_model = SimpleNamespace(compile=lambda model_dir, new_model_dir, tags=None, model_feed_dict=None: None)
