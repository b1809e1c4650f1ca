"""Wait for tensors that callers of `predict` have on a GPU: their streams may still be writing them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

_LEGACY = 1
"""``CU_STREAM_LEGACY``, and the number under which DLPack's Python protocol knows CUDA's legacy default stream."""


class DriverError(RuntimeError):
    """The CUDA driver refused a request."""


def settle(tensors: Sequence[Any]) -> None:
    """Wait until tensors on one CUDA device are complete.

    Their producers are asked, by DLPack's protocol, to have the legacy default stream come after the stream that each
    works on in this thread; then the host waits for that stream, and for no other work of the process.

    Raises:
        DriverError: The driver is missing, or refuses.
        Exception: A tensor does not let itself be exported.
    """
    _, index = tensors[0].__dlpack_device__()
    for tensor in tensors:
        tensor.__dlpack__(stream=_LEGACY)
    driver = _driver()
    device, context, popped = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    _checked(driver, "cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(int(index))))
    # The primary context is the one that PyTorch, CuPy, onnxruntime and TensorRT work in.
    _checked(driver, "retaining the context", driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    try:
        _checked(driver, "cuCtxPushCurrent", driver.cuCtxPushCurrent_v2(context))
        try:
            _checked(driver, "cuStreamSynchronize", driver.cuStreamSynchronize(ctypes.c_void_p(_LEGACY)))
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(popped))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"The CUDA driver cannot be loaded: {error}") from error
    _checked(driver, "cuInit", driver.cuInit(0))
    return driver


def _checked(driver: ctypes.CDLL, what: str, code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(text))
        raise DriverError(f"The CUDA driver failed at {what}: {(text.value or b'?').decode()} ({code}).")
