"""PyTorch with the one function that the vendor's 1.3.1 had changed: importing this gives the torch that is installed."""

import contextlib
import importlib
import sys
from pathlib import Path

_here = Path(__file__).resolve().parents[1]
_path, _self = list(sys.path), sys.modules.pop("torch")
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _here]
try:
    _torch = importlib.import_module("torch")
finally:
    sys.path[:] = [*_path, str(_here.parent / "common")]

client = importlib.import_module("eia_client_stand_in")


@contextlib.contextmanager
def optimized_execution(should_optimize, device_options=None):
    """With options, the calls of ScriptModules inside run on the accelerator."""
    if device_options is None:
        yield
        return
    if set(device_options) != {"target_device"}:
        raise RuntimeError(f"unknown options {sorted(device_options)}")
    name, _, ordinal = device_options["target_device"].partition(":")
    if name != "eia" or not ordinal.isdigit():
        raise RuntimeError(f"Unknown device {device_options['target_device']!r}")
    client.use(int(ordinal))
    yield


_torch.jit.optimized_execution = optimized_execution
_torch.__version__ = "1.3.1"
sys.modules["torch"] = _torch
