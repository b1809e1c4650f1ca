"""Waiting for callers' tensors on a GPU: what is asked of their library and of the driver, held by stand-ins of both."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from accelrt_cuda import caller_tensors


class Driver:
    """The functions of ``libcuda`` that are called, with their signatures; each one is recorded, and may fail."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails = fails

    def _done(self, name: str, argument: Any = None) -> int:
        self.calls.append((name, argument))
        return 700 if name == self.fails else 0

    def cuDeviceGet(self, device: Any, ordinal: ctypes.c_int) -> int:  # noqa: N802 - the names are the driver's
        device._obj.value = ordinal.value + 10
        return self._done("cuDeviceGet", ordinal.value)

    def cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> int:  # noqa: N802 - the names are the driver's
        context._obj.value = 0xC0DE
        return self._done("cuDevicePrimaryCtxRetain", device.value)

    def cuDevicePrimaryCtxRelease_v2(self, device: ctypes.c_int) -> int:  # noqa: N802 - the names are the driver's
        return self._done("cuDevicePrimaryCtxRelease_v2", device.value)

    def cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> int:  # noqa: N802 - the names are the driver's
        return self._done("cuCtxPushCurrent_v2", context.value)

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802 - the names are the driver's
        context._obj.value = 0xC0DE
        return self._done("cuCtxPopCurrent_v2")

    def cuStreamSynchronize(self, stream: ctypes.c_void_p) -> int:  # noqa: N802 - the names are the driver's
        return self._done("cuStreamSynchronize", stream.value)

    def cuGetErrorName(self, code: int, text: Any) -> int:  # noqa: N802 - the names are the driver's
        text._obj.value = b"CUDA_ERROR_ILLEGAL_ADDRESS"
        return 0


class Tensor:
    """A tensor that remembers for which streams it was exported."""

    def __init__(self, driver: Driver, index: int) -> None:
        self._driver, self._index = driver, index

    def __dlpack__(self, *, stream: Any = None) -> object:
        self._driver.calls.append(("__dlpack__", stream))
        return object()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._index


def test_the_legacy_stream_comes_after_all_producers_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(caller_tensors, "_driver", lambda: driver)
    caller_tensors.settle([Tensor(driver, 1), Tensor(driver, 1)])
    assert driver.calls == [
        ("__dlpack__", 1),
        ("__dlpack__", 1),
        ("cuDeviceGet", 1),
        ("cuDevicePrimaryCtxRetain", 11),
        ("cuCtxPushCurrent_v2", 0xC0DE),
        ("cuStreamSynchronize", 1),
        ("cuCtxPopCurrent_v2", None),
        ("cuDevicePrimaryCtxRelease_v2", 11),
    ]


@pytest.mark.parametrize(
    ("fails", "left"),
    [
        ("cuDeviceGet", []),
        ("cuDevicePrimaryCtxRetain", []),
        ("cuCtxPushCurrent_v2", ["cuDevicePrimaryCtxRelease_v2"]),
        ("cuStreamSynchronize", ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]),
    ],
)
def test_a_failure_is_told_and_leaves_the_context_as_it_was(
    monkeypatch: pytest.MonkeyPatch, fails: str, left: list[str]
) -> None:
    driver = Driver(fails)
    monkeypatch.setattr(caller_tensors, "_driver", lambda: driver)
    with pytest.raises(caller_tensors.DriverError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
        caller_tensors.settle([Tensor(driver, 0)])
    names = [name for name, _ in driver.calls]
    assert names[names.index(fails) + 1 :] == left


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    caller_tensors._driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(caller_tensors.DriverError, match="libcuda"):
        caller_tensors.settle([Tensor(Driver(), 0)])
    caller_tensors._driver.cache_clear()
