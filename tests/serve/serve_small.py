"""A whole server over a small service, as a process of its own: ``python -m tests.serve.serve_small SETTINGS``.

Settings are JSON for `ServerSettings`; ``wait_s`` is how long the model "slow" takes, ``load_s`` how long loading does, and
``fails`` says that loading fails.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelrt.serve.interface import IndexEntry
from accelrt.serve.logs import logging_to_stderr
from accelrt.serve.run import serve
from accelrt.serve.settings import ServerSettings
from tests.serve.served_models import SmallService, identity


class SlowlyLoaded(SmallService):
    """Not ready before `start` is through."""

    def __init__(self, load_s: float, wait_s: float, fails: bool) -> None:
        super().__init__({"fp32": identity("FP32"), "slow": identity("FP32")})
        self.models["slow"].wait_s = wait_s
        self._load_s, self._fails = load_s, fails
        self.hidden = set(self.models)

    def index(self, *, ready: bool = False) -> Sequence[IndexEntry]:
        if self._fails:
            return [IndexEntry("slow", "1", "UNAVAILABLE", "It is empty.")]
        return super().index(ready=ready)

    async def start(self) -> None:
        await asyncio.sleep(self._load_s)
        if not self._fails:
            self.hidden.clear()

    async def drain(self, timeout_s: float) -> None:
        super().close()
        print("closed", flush=True)


def main() -> None:
    given: dict[str, Any] = json.loads(sys.argv[1])
    service = {name: given.pop(name, default) for name, default in (("load_s", 0.0), ("wait_s", 0.5), ("fails", False))}
    settings = ServerSettings(Path(), **{"http_port": 0, "grpc_port": None, "metrics_port": None, **given})
    with logging_to_stderr("json"):
        serve(
            settings,
            lambda ports: print("ports", json.dumps(dict(ports)), flush=True),
            lambda _: SlowlyLoaded(**service),
        )


if __name__ == "__main__":
    main()
