"""Shared memory with a server on the same machine: one region, cut into slots that calls take in turn.

A slot holds the tensors of one call, inputs first. The region's file is unlinked as soon as the server has opened it,
so that nothing is left behind whoever dies first; the memory is given back when both have let go.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from accelrt.errors import AccelrtError
from accelrt.protocol.client import Endpoint

FOLDER = Path("/dev/shm")
SLOTS = 8
"""More than the calls that are under way at a time; who finds none free sends a message."""

LARGEST_REGION = 512 << 20
_PAGE = 4096
_ALIGNMENT = 64
_REGISTER_TIMEOUT_S = 5.0


def aligned(size: int) -> int:
    """Return a size rounded up so that what follows it is aligned for any instruction."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Region:
    """A registered region of `SLOTS` slots of equal size."""

    def __init__(self, endpoint: Endpoint, slot_bytes: int, within_s: float) -> None:
        self.name = f"accelrt-{os.getpid()}-{uuid.uuid4().hex[:16]}"
        self.slot_bytes = slot_bytes
        self.epoch = endpoint.epoch
        self._endpoint = endpoint
        self.free = list(range(SLOTS))
        path = FOLDER / self.name
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # The lock goes with this process, by which an accelrt server knows that the region is not used any more.
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Taken in full now: writing to memory that is not there any more would kill this process.
            os.posix_fallocate(self._descriptor, 0, slot_bytes * SLOTS)
            self.memory = memoryview(mmap.mmap(self._descriptor, slot_bytes * SLOTS))
            endpoint.ask(
                "SystemSharedMemoryRegister",
                within_s,
                name=self.name,
                key=f"/{self.name}",
                offset=0,
                byte_size=slot_bytes * SLOTS,
            )
        except BaseException:
            os.close(self._descriptor)
            raise
        finally:
            path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Tell the server that the region is not used any more."""
        os.close(self._descriptor)
        with contextlib.suppress(AccelrtError):
            self._endpoint.ask("SystemSharedMemoryUnregister", _REGISTER_TIMEOUT_S, name=self.name)


class Slots:
    """The region of one executable: made when first needed, again when a call needs more or the server is another.

    Once the server has refused it, or the machine has no room for it, there is none any more.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._region: Region | None = None
        self._making = False
        self.refused = ""

    @contextlib.contextmanager
    def take(self, size: int, within_s: float) -> Iterator[tuple[Region, int] | None]:
        """Give a region and the offset of a slot of at least ``size`` bytes; None where a message is to be sent.

        Making a region may take ``within_s``.
        """
        self._prepare(size, min(within_s, _REGISTER_TIMEOUT_S))
        with self._lock:
            region = self._region
            fits = region is not None and region.slot_bytes >= size and region.epoch == self._endpoint.epoch
            slot = region.free.pop() if region is not None and fits and region.free else None
        if region is None or slot is None:
            yield None
            return
        try:
            yield region, slot * region.slot_bytes
        finally:
            with self._lock:
                region.free.append(slot)
                idle = region is not self._region and len(region.free) == SLOTS
            if idle:
                region.forget()

    def lost(self, region: Region) -> None:
        """Make no more use of a region that the server does not know."""
        with self._lock:
            if self._region is region:
                self._region = None

    def close(self) -> None:
        """Forget the region; no call is under way any more."""
        with self._lock:
            region, self._region, self.refused = self._region, None, self.refused or "closed"
        if region is not None:
            region.forget()

    def _prepare(self, size: int, within_s: float) -> None:
        """Make a region of slots of at least ``size`` bytes, if there is none; calls meanwhile send messages."""
        with self._lock:
            old = self._region
            if old is not None and old.slot_bytes >= size and old.epoch == self._endpoint.epoch:
                return
            if self.refused or self._making or size * SLOTS > LARGEST_REGION:
                return
            self._making = True
        made: Region | None = None
        refused = ""
        try:
            made = Region(self._endpoint, -(-size // _PAGE) * _PAGE, within_s)
        except OSError as error:
            refused = f"this machine: {error.strerror}"
        except AccelrtError as error:
            # One that cannot be reached has not refused anything.
            refused = "" if self._endpoint.failing_s() else f"the server: {error.message}"
        finally:
            with self._lock:
                self._making = False
                self.refused = self.refused or refused
                idle = made is not None and old is not None and len(old.free) == SLOTS
                self._region = made or self._region
        if idle and old is not None:
            old.forget()
