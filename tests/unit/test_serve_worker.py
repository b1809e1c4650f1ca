"""Models in processes of their own: frames, crashes, hangs, restarts; the server lives and answers for the others."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelrt.errors import ExecutionError, InputError, ModelUnavailable
from accelrt.registry import REGISTRY
from accelrt.serve.interface import InferRequest
from accelrt.serve.models import ModelService, ModelSettings, ServiceSettings, frames
from tests.unit.serve_cases import ask, line, put, request, run, settled

PLUGIN = """
import os, signal, time
from accelrt.testing.fake import FakeBackend

def distorts(kinds, outputs):
    first = float(next(iter(outputs.values())).flat[0])
    if first == 13:
        os.kill(os.getpid(), signal.SIGSEGV)
    if first == 14:
        time.sleep(3600)
    if first == 15:
        os._exit(7)
    return outputs

Crash = FakeBackend.configured("crash", distorts=distorts, parallelism=4)
"""


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a backend that crashes, hangs or exits for certain answers, as a plug-in; return a folder for models."""
    (tmp_path / "accelrt_crash.py").write_text(PLUGIN)
    info = tmp_path / "accelrt_crash-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: accelrt-crash\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[accelrt.backends]\ncrash = accelrt_crash:Crash\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import accelrt_crash  # type: ignore[import-not-found]

    monkeypatch.delitem(sys.modules, "accelrt_crash")
    root = tmp_path / "root"
    root.mkdir()
    with REGISTRY.override(accelrt_crash.Crash()) if hasattr(REGISTRY, "override") else _registered(accelrt_crash.Crash):
        yield root


def isolated(root: Path, **more: Any) -> ModelService:
    own = ModelSettings(isolation="process", **more)
    return ModelService(ServiceSettings((root,), defaults=own, load_wait_s=60.0, drain_s=10.0))
