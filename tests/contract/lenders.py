"""A real `accelrt serve --accelerator` in a process of its own, for tests of what is lent."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelrt.errors import AccelrtError
from accelrt.protocol.address import parse_address
from accelrt.protocol.client import ClientSettings, Endpoint
from accelrt.protocol.leases import SLICE, SliceState, describe_slice

ROOT = Path(__file__).parents[2]


class LenderProcess:
    """The server; ``url`` is where it listens, and stays the same when it is started again."""

    def __init__(self, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._arguments, self._environment = arguments, environment
        self.process: subprocess.Popen[str] | None = None
        self._clients: list[Endpoint] = []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        self.start()

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def start(self) -> None:
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "backends")])
        environment = {**os.environ, "PYTHONPATH": paths, **self._environment}
        environment.pop("ACCELRT_EIA_ACCELERATORS", None)
        environment.pop("ACCELRT_BACKEND", None)
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "accelrt", "serve", *self._arguments,
                "--grpc-port", str(self.port), "--metrics-port", "-1", "--log-format", "text",
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("grpc: "), (line, self.process.wait(), self.log)

    @property
    def log(self) -> str:
        """What the server has logged."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def client(self, *, token: str | None = None, key: str | None = None) -> Endpoint:
        """Return a client with a token of its own, unless one is given."""
        settings = ClientSettings(api_key=key)
        made = Endpoint(parse_address(self.url), settings, token=secrets.token_urlsafe(32) if token is None else token)
        self._clients.append(made)
        return made

    def forget_clients(self) -> None:
        """Give back what clients made by `client` have borrowed."""
        while self._clients:
            with contextlib.suppress(AccelrtError):
                self._clients.pop().ask("RepositoryModelUnload", 30, model_name=SLICE)


@contextlib.contextmanager
def lender(*arguments: str, **environment: str) -> Iterator[LenderProcess]:
    made = LenderProcess(arguments, environment)
    try:
        yield made
    finally:
        made.kill()


def state_of(endpoint: Endpoint) -> SliceState:
    """Return what the server says of this client's slice."""
    told = endpoint.ask("ModelConfig", 10, name=SLICE).config.parameters
    found = describe_slice({key: value.string_value for key, value in told.items()})
    assert found is not None
    return found


def upload(endpoint: Endpoint, name: str, model: bytes | None, **config: Any) -> None:
    """Load a program, or try to."""
    import json

    parameters: dict[str, Any] = {}
    if model is not None:
        parameters["file:1/model.onnx"] = {"bytes_param": model}
    if config:
        parameters["config"] = {"string_param": json.dumps(config)}
    endpoint.ask("RepositoryModelLoad", 60, model_name=name, parameters=parameters)
