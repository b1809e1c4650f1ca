"""Metrics and the status page of a real server process; the page in a real browser, where there is one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from accelrt.testing.models import mlp, small_cnn

pytest.importorskip("fastapi", reason="needs the extra serve")
parser = pytest.importorskip("prometheus_client.parser", reason="needs the extra serve")

KEY = "a-key-of-enough-letters"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    onnx.save(mlp(), folder / "mlp.onnx")
    onnx.save(small_cnn(), folder / "cnn.onnx")
    (folder / "broken.onnx").write_bytes(b"nonsense")
    return folder


class Server:
    def __init__(self, repository: Path, cache: Path, **environment: str) -> None:
        command = [sys.executable, "-m", "accelrt", "serve", str(repository)]
        command += ["--http-port", "0", "--metrics-port", "0", "--grpc-port", "-1"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "ACCELRT_CACHE_DIR": str(cache), **environment},
        )
        assert self.process.stdout is not None
        said = dict(line.strip().split(": ", 1) for line in (self.process.stdout.readline() for _ in range(2)))
        self.http, self.metrics = said["http"], said["metrics"]

    def get(self, url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        request = urllib.request.Request(url, headers={name.replace("_", "-"): text for name, text in headers.items()})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def infer(self, model: str, shape: list[int], name: str = "x") -> int:
        count = 1
        for size in shape:
            count *= size
        tensor = {"name": name, "datatype": "FP32", "shape": shape, "data": [0.5] * count}
        request = urllib.request.Request(
            f"{self.http}/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode()
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def samples(self) -> dict[tuple[str, str, str], float]:
        """Metrics by name, model and what else tells samples apart."""
        _, _, text = self.get(f"{self.metrics}/metrics")
        found = {}
        for family in parser.text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                labels = dict(sample.labels)
                model = labels.pop("model", "")
                labels.pop("version", None)
                found[sample.name, model, "".join(labels.values())] = sample.value
        return found

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(repository, tmp_path_factory.mktemp("cache"))
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def guarded(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(repository, tmp_path_factory.mktemp("cache"), ACCELRT_API_KEYS=KEY)
    yield running
    running.stop()


def test_metrics_count_what_was_asked(server: Server) -> None:
    before = server.samples()
    for rows in (1, 3, 1):
        assert server.infer("mlp", [rows, 16]) == 200
    assert server.infer("mlp", [1, 5]) == 400
    after = server.samples()

    def grown(name: str, rest: str = "") -> float:
        key = (f"accelrt_inference_{name}_total", "mlp", rest)
        return after[key] - before[key]

    assert grown("request_success") == 3
    assert grown("count") == 5
    assert grown("exec_count") == 3
    assert grown("request_failure", "REJECTED") == 0
    assert 0 < grown("compute_infer_duration_us") <= grown("request_duration_us")
    assert after["accelrt_model_ready", "mlp", ""] == 1
    assert after["accelrt_model_ready", "broken", ""] == 0
    assert after["accelrt_model_resident_bytes", "mlp", ""] > 0
    assert after["process_resident_memory_bytes", "", ""] > 1e6
    assert 0 < after["accelrt_request_latency_seconds", "mlp", "0.5"] < 10


def test_metrics_are_at_one_place(server: Server) -> None:
    assert server.get(f"{server.metrics}/etc/passwd")[0] == 404


def test_metrics_and_state_want_the_key_and_the_page_does_not(guarded: Server) -> None:
    assert guarded.get(f"{guarded.metrics}/metrics")[0] == 401
    assert guarded.get(f"{guarded.metrics}/metrics", X_API_Key=KEY)[0] == 200
    assert guarded.get(f"{guarded.http}/ui/state")[0] == 401
    status, _, body = guarded.get(f"{guarded.http}/ui/state", X_API_Key=KEY)
    assert status == 200
    assert {one["name"] for one in json.loads(body)["models"]} == {"mlp", "cnn", "broken"}
    for path in ("/ui", "/ui/page.css", "/ui/page.js"):
        assert guarded.get(guarded.http + path)[0] == 200


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    for path, kind in (("/ui", "text/html"), ("/ui/page.css", "text/css"), ("/ui/page.js", "text/javascript")):
        status, headers, body = server.get(server.http + path)
        assert status == 200
        assert headers["content-type"].startswith(kind)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert b"https://" not in body
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")  # the name of SVG, never asked for


def _browser() -> Any:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = _browser()
    yield driver
    driver.quit()


def _wait(browser: Any, condition: Any) -> Any:
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 20).until(condition)


def test_the_page_shows_every_model(server: Server, browser: Any) -> None:
    for _ in range(5):
        assert server.infer("mlp", [1, 16]) == 200
    browser.get(f"{server.http}/ui")
    rows = _wait(browser, lambda b: b.find_elements("css selector", "tr[data-model]"))
    text = {row.get_attribute("data-model"): row.text for row in rows}
    assert set(text) == {"broken/1", "cnn/1", "mlp/1"}
    assert "READY" in text["mlp/1"]
    assert "cpu/onnxruntime: 5" in text["mlp/1"]
    assert "UNAVAILABLE" in text["broken/1"]
    assert "not an ONNX model" in text["broken/1"]
    assert "Not ready" in browser.find_element("id", "server").text  # one model of three is broken
    assert "2 of 3" in browser.find_element("id", "totals").text
    bars = browser.find_elements("css selector", "tr[data-model='mlp/1'] svg.bar rect")
    assert [bar.get_attribute("width") for bar in bars] == ["100"]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_follows_the_load_and_finds_models(server: Server, browser: Any) -> None:
    browser.get(f"{server.http}/ui")
    _wait(browser, lambda b: b.find_elements("css selector", "tr[data-model='cnn/1']"))

    def busy(b: Any) -> bool:
        server.infer("cnn", [1, 1, 28, 28])
        server.infer("mlp", [1, 16])
        rate = b.execute_script(
            "return document.querySelector(\"tr[data-model='mlp/1'] td.number span\")?.textContent ?? ''"
        )
        return bool(rate) and float(rate) > 0

    _wait(browser, busy)
    browser.find_element("id", "find").send_keys("mlp")
    _wait(browser, lambda b: len(b.find_elements("css selector", "tr[data-model]")) == 1)
    browser.find_element("id", "find").send_keys("nothing")
    _wait(browser, lambda b: b.find_element("id", "empty").is_displayed())


def test_the_page_asks_for_the_key(guarded: Server, browser: Any) -> None:
    browser.get(f"{guarded.http}/ui")
    form = browser.find_element("id", "key")
    _wait(browser, lambda b: form.is_displayed())
    field = form.find_element("name", "key")
    field.send_keys("not-the-key-of-the-server\n")
    _wait(browser, lambda b: "does not know" in b.find_element("id", "server").text)
    field.clear()
    field.send_keys(KEY + "\n")
    _wait(browser, lambda b: b.find_elements("css selector", "tr[data-model='mlp/1']"))
    assert not form.is_displayed()


def test_the_page_says_that_the_server_is_gone(repository: Path, tmp_path: Path, browser: Any) -> None:
    short = Server(repository, tmp_path)
    browser.get(f"{short.http}/ui")
    _wait(browser, lambda b: b.find_elements("css selector", "tr[data-model]"))
    short.stop()
    _wait(browser, lambda b: "does not answer" in b.find_element("id", "server").text)
