"""The worker process of one model: loads it, and answers calls through a socket, many at a time, until that closes."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.cache import Entry
from accelrt.artifact.manifest import MANIFEST, Manifest
from accelrt.graph.types import Value
from accelrt.serve.models import frames
from accelrt.serve.models.config import ModelConfig
from accelrt.serve.models.loading import Predictor, open_predictor, resident_bytes
from accelrt.serve.models.settings import settings_from

_MOST_THREADS = 64


def serve(connection: socket.socket) -> None:
    """Answer until the other side is gone."""
    asked = frames.receive(connection)
    if asked is None:
        return
    sending = threading.Lock()
    try:
        predictor, described = _load(asked[0])
    except Exception as error:  # noqa: BLE001 - told to who asked, who decides
        frames.send(connection, {"error": frames.error_to_json(error)})
        return
    frames.send(connection, described)
    with ThreadPoolExecutor(_MOST_THREADS, "accelrt-worker") as pool:
        while (frame := frames.receive(connection)) is not None:
            head, values = frame
            pool.submit(_answer, connection, sending, predictor, head["id"], values)
        # Nobody waits for what is being computed any more.
        os._exit(0)


def _load(asked: Mapping[str, Any]) -> tuple[Predictor, dict[str, Any]]:
    folder = Path(asked["folder"])
    entry = Entry(folder, Manifest.parse((folder / MANIFEST).read_bytes()))
    artifact = Artifact(entry, trusted=bool(asked["trusted"]))
    replicas = asked["replicas"]
    config = None if replicas is None else ModelConfig(replicas=replicas)
    predictor, facts = open_predictor(artifact, settings_from(asked["settings"]), config)
    return predictor, {
        "signature": facts.signature.to_json(),
        "capacity": predictor.capacity,
        "platform": facts.platform,
        "engines": facts.engines,
        "devices": facts.devices,
        "placement": dict(facts.placement),
        "resident_bytes": resident_bytes(),
    }


def _answer(
    connection: socket.socket, sending: threading.Lock, predictor: Predictor, number: int, values: Mapping[str, Value]
) -> None:
    try:
        outputs = predictor.predict(values)
    except Exception as error:  # noqa: BLE001 - told to who asked
        with sending, contextlib.suppress(OSError):
            frames.send(connection, {"id": number, "error": frames.error_to_json(error)})
        return
    with sending, contextlib.suppress(OSError):
        frames.send(connection, {"id": number}, outputs)


def main(descriptor: int) -> None:
    """Serve on a socket that was inherited."""
    with contextlib.suppress(OSError):  # if memory runs out, the kernel should take this process and not the server
        Path("/proc/self/oom_score_adj").write_text("800")
    with socket.socket(fileno=descriptor) as connection, contextlib.suppress(OSError, frames.BrokenFrame):
        serve(connection)
    # Threads of a runtime that hang must not keep the process.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
