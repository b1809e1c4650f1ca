"""What every test needs: a cache of its own, and no target from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("accelrt.testing.contract")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep tests out of the user's cache, and of each other's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(folder))
    monkeypatch.delenv("ACCELRT_BACKEND", raising=False)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as their `summary`: figures that are worth reading when all is well."""
    lines = [
        str(text)
        for report in terminalreporter.getreports("passed")
        for name, text in report.user_properties
        if name == "summary"
    ]
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
