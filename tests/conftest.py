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
