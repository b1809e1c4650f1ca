"""Whole servers as processes: how they start, what they log, and how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from accelrt.serve.models import ModelService
from accelrt.serve.models.settings import ModelSettings
from tests.serve.serve_client import Raw, ask, post

ROOT = Path(__file__).parents[2]
BODY = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2.5]}]}'
INFER = "/v2/models/fp32/infer"


@contextmanager
def process(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "backends"), str(ROOT), *filter(None, given)])
    made = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    try:
        yield made
    finally:
        if made.poll() is None:
            made.kill()
        made.communicate()


def small(**settings: Any) -> Any:
    return process("tests.serve.serve_small", json.dumps(settings))


def ports_of(made: subprocess.Popen[str]) -> dict[str, int]:
    assert made.stdout is not None
    line = made.stdout.readline()
    assert line.startswith("ports "), (line, made.stderr and made.stderr.read())
    return json.loads(line[6:])  # type: ignore[no-any-return]


def end(made: subprocess.Popen[str]) -> tuple[int, str, list[dict[str, Any]]]:
    out, err = made.communicate(timeout=60)
    return made.returncode, out, [json.loads(line) for line in err.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_be_answered(number: signal.Signals) -> None:
    with small(wait_s=1.0, log_requests=True) as made:
        port = ports_of(made)["http"]
        assert ask(port, post(INFER, BODY, "X-Request-Id: first")).status == 200
        with Raw(port) as busy:
            busy.send(post("/v2/models/slow/infer", BODY))
            time.sleep(0.3)
            made.send_signal(number)
            answer = busy.answer()
            assert answer.status == 200 and answer.json["outputs"][0]["data"] == [1.0, 2.5]
            assert busy.ends()
        code, out, logs = end(made)
    assert code == 0 and out.splitlines() == ["closed"]
    requests = [line for line in logs if line["logger"] == "accelrt.serve.requests"]
    assert [line["status"] for line in requests] == [200, 200] and requests[0]["request_id"] == "first"
    assert requests[0]["target"] == INFER and requests[0]["bytes_in"] == len(BODY) and requests[1]["ms"] > 500
    assert [line["message"] for line in logs if line["logger"] == "accelrt.serve"] == ["stopping", "stopped"]


def test_a_second_signal_ends_it() -> None:
    with small(wait_s=60.0) as made:
        port = ports_of(made)["http"]
        with Raw(port) as busy:
            busy.send(post("/v2/models/slow/infer", BODY))
            time.sleep(0.3)
            made.terminate()
            time.sleep(0.3)
            assert made.poll() is None
            made.terminate()
            assert made.wait(10) == 128 + signal.SIGTERM
            assert busy.ends()


def test_what_takes_too_long_is_given_up() -> None:
    with small(wait_s=60.0, drain_s=0.5) as made:
        port = ports_of(made)["http"]
        with Raw(port) as busy:
            busy.send(post("/v2/models/slow/infer", BODY))
            time.sleep(0.3)
            made.terminate()
            assert busy.ends()
        assert end(made)[0] == 0


def test_it_lives_before_it_is_ready() -> None:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    with small(load_s=2.0, http_port=port) as made:
        deadline = time.monotonic() + 30
        seen = None
        while seen is None and time.monotonic() < deadline:
            try:
                seen = ask(port, b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            except OSError:
                time.sleep(0.05)
        assert seen is not None and seen.status == 200 and seen.json == {"live": True, "ready": False}
        assert ask(port, post(INFER, BODY)).status == 503
        assert ports_of(made) == {"http": port}
        assert ask(port, b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n").status == 200
        made.terminate()
        assert end(made)[0] == 0


def test_it_can_be_ended_while_it_loads() -> None:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    with small(load_s=60.0, http_port=port) as made:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                Raw(port).close()
                break
            except OSError:
                time.sleep(0.05)
        made.terminate()
        code, out, _ = end(made)
        assert code == 0 and "ports" not in out and "closed" in out


def test_a_model_that_cannot_be_loaded_ends_it_if_asked() -> None:
    with small(fails=True, exit_on_error=True) as made:
        out, err = made.communicate(timeout=60)
        assert made.returncode == 1 and "could not be loaded: slow" in err and out == "closed\n"
    with small(fails=True) as made:
        port = ports_of(made)["http"]
        assert ask(port, b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n").status == 400
        made.terminate()
        code, _, logs = end(made)
    assert code == 0
    assert [(line["model"], line["reason"]) for line in logs if line["level"] == "error"] == [("slow", "It is empty.")]


def test_wrong_usage_of_the_command(tmp_path: Path) -> None:
    for arguments, code, text in (
        (["."], None, None),
        ([], 2, "REPOSITORY"),
        ([".", "--model-control-mode", "sometimes"], 2, "explicit"),
        ([".", "--tls-cert", "a.pem"], 2, "key"),
        ([".", "--log-format", "xml"], 2, "json"),
        ([".", "--host", "0.0.0.0"], 3, "this machine only"),
        ([".", "--api-keys", str(tmp_path / "nothing")], 3, "cannot be read"),
    ):
        if code is None:
            continue
        with process("accelrt", "serve", *arguments, NO_COLOR="1", COLUMNS="200") as made:
            _, err = made.communicate(timeout=60)
            assert made.returncode == code and str(text) in err, (arguments, err)


def test_the_word_that_sagemaker_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from accelrt.cli import app
    from accelrt.serve import run
    from accelrt.serve.settings import ServerSettings

    asked: list[ServerSettings] = []
    monkeypatch.setattr(run, "serve", lambda settings, announce: asked.append(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "9090")
    for arguments in (["--sagemaker"], ["--sagemaker", "serve"], ["--sagemaker", "models", "--grpc-port", "0"]):
        assert CliRunner().invoke(app, ["serve", *arguments]).exit_code == 0
    assert [one.repository for one in asked] == [Path("/opt/ml/model"), Path("/opt/ml/model"), Path("models")]
    assert [(one.host, one.http_port, one.grpc_port) for one in asked] == [
        ("0.0.0.0", 9090, None),
        ("0.0.0.0", 9090, None),
        ("0.0.0.0", 9090, 0),
    ]


def test_defaults_for_models_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from accelrt.cli import app
    from accelrt.serve import run
    from accelrt.serve.settings import ServerSettings

    asked: list[ServerSettings] = []
    monkeypatch.setattr(run, "serve", lambda settings, announce: asked.append(settings))
    arguments = ["--isolation", "process", "--max-batch-size", "16", "--max-queue-delay-us", "250", "--max-queue", "9"]
    arguments += ["--latency-target-ms", "12.5", "--precision", "bf16", "--load-threads", "3", "--no-shared-memory"]
    assert CliRunner().invoke(app, ["serve", str(tmp_path), *arguments]).exit_code == 0
    assert CliRunner().invoke(app, ["serve", str(tmp_path)]).exit_code == 0
    for wrong, code in (
        ("--isolation=often", 2),
        ("--precision=fp3", 3),
        ("--max-queue=0", 2),
        ("--load-threads=0", 2),
    ):
        assert CliRunner().invoke(app, ["serve", str(tmp_path), wrong]).exit_code == code
    assert len(asked) == 2
    service = run._model_service(asked[0])
    assert isinstance(service, ModelService)
    defaults = service.settings.defaults
    assert (defaults.isolation, defaults.max_batch_size, defaults.max_queue_delay_us) == ("process", 16, 250)
    assert (defaults.max_queue, defaults.latency_target_ms, defaults.precision) == (9, 12.5, "bf16")
    assert service.settings.load_threads == 3 and not asked[0].shared_memory
    unsaid = run._model_service(asked[1])
    assert isinstance(unsaid, ModelService) and unsaid.settings.defaults == ModelSettings()
    assert asked[1].shared_memory


def test_the_command_serves_a_model() -> None:
    pytest.importorskip("accelrt.serve.models.service")
    from accelrt.data import digits_model

    with process(
        "accelrt",
        "serve",
        str(digits_model()),  # has a digits.json of another kind beside it
        "--http-port",
        "0",
        "--grpc-port",
        "-1",
        "--metrics-port",
        "-1",
    ) as made:
        assert made.stdout is not None
        line = made.stdout.readline().strip()
        assert line.startswith("http: http://127.0.0.1:"), made.stderr and made.stderr.read()
        port = int(line.rpartition(":")[2])
        index = ask(port, post("/v2/repository/index", b"{}")).json
        assert [entry["state"] for entry in index] == ["READY"]
        body = {"inputs": [{"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.0] * 64}]}
        answer = ask(port, post(f"/v2/models/{index[0]['name']}/infer", json.dumps(body).encode()))
        assert answer.status == 200 and answer.json["outputs"][0]["shape"] == [1, 10]
        made.terminate()
        assert made.wait(60) == 0
