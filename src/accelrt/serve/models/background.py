"""Work that takes long, in threads of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def spawn(function: Callable[[], T]) -> Future[T]:
    """Run a function in a thread of its own, so that nobody waits for a place in a pool."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name="accelrt-serve-work", daemon=True).start()
    return future


async def in_thread(function: Callable[[], T]) -> T:
    return await asyncio.shield(asyncio.wrap_future(spawn(function)))
