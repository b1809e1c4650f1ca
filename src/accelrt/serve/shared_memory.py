"""System shared memory: regions that clients on this machine name, from which tensors are read and to which they go.

Whoever may register a region chooses what the server reads and writes, so that a key is a plain name below
``/dev/shm`` and nothing else, links are not followed, and front ends let only clients of this machine in.

A file that is made shorter under a mapping kills the process that touches it. So files are mapped only where nobody but
the server's own user and root can do that, who could kill it anyway; their tensors are used where they lie. Others are
copied by system calls, which takes some 0.1 ms longer for 602 kB.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelrt.errors import ModelNotFound, NotAllowed, RequestError, RequestTooLarge

FOLDER = Path("/dev/shm")

OWN_PREFIX = "accelrt-"
"""How the names of files of accelrt's own clients begin: they unlink a file once it is registered, and hold a shared
lock on it for as long as they live."""

_KEY = re.compile(r"/?([A-Za-z0-9_][A-Za-z0-9_.\-]{0,253})", re.ASCII)
_MOST_OF_A_NAME = 256
_MOST_OFFSET = 1 << 62


@dataclass(frozen=True, slots=True)
class Region:
    """A registered region: ``byte_size`` bytes from ``offset`` of the file that ``key`` names."""

    name: str
    key: str
    offset: int
    byte_size: int


class SharedMemoryRegistry:
    """The regions of one server. Thread-safe; one for all front ends.

    Args:
        enabled: Whether anything may be registered at all.
        prefix: What names of files have to begin with.
        most: Regions at a time.
        largest: Bytes that one tensor may take.
        folder: Where the files are.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        prefix: str = "",
        most: int = 1024,
        largest: int = 1 << 30,
        folder: Path = FOLDER,
    ) -> None:
        self._enabled, self._prefix, self._most, self._largest, self._folder = enabled, prefix, most, largest, folder
        self._regions: dict[str, tuple[Region, _File]] = {}
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        """Whether anything may be registered."""
        return self._enabled

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region.

        Raises:
            NotAllowed: Shared memory is switched off, or the key is not one that may be named.
            RequestError: There is no such file, it is too short, or the name is taken.
        """
        if not self._enabled:
            raise NotAllowed("Shared memory is switched off on this server.")
        if not name or len(name) > _MOST_OF_A_NAME:
            raise RequestError(f"A region needs a name of 1 to {_MOST_OF_A_NAME} characters.")
        matched = _KEY.fullmatch(key)
        if matched is None or not matched[1].startswith(self._prefix):
            raise NotAllowed(
                f"The key {key[:80]!r} cannot be registered.",
                hint=f"A key is '/' and a name without further slashes{self._prefix and ' that begins with '}"
                f"{self._prefix}.",
            )
        if not 0 <= offset <= _MOST_OFFSET or not 0 < byte_size <= _MOST_OFFSET:
            raise RequestError(f"A region of {byte_size} bytes at offset {offset} is not possible.")
        self._forget_abandoned()
        file = _File(self._folder, matched[1], key)
        try:
            if offset + byte_size > file.size():
                raise RequestError(
                    f"Region {name!r} ends at byte {offset + byte_size} of {key!r}, which has {file.size()}."
                )
            with self._lock:
                if name in self._regions:
                    raise RequestError(f"Region {name!r} is registered already.", hint="Unregister it first.")
                if len(self._regions) >= self._most:
                    raise RequestTooLarge(f"There are {self._most} regions already, and no more are taken.")
                self._regions[name] = (Region(name, key, offset, byte_size), file)
        except BaseException:
            file.release()
            raise

    def unregister(self, name: str = "") -> None:
        """Forget a region, or all of them; a request that uses one keeps it until it is answered.

        A name that is not known is no error: the region is not registered, which is what was asked for.
        """
        with self._lock:
            names = [name] if name else list(self._regions)
            gone = [self._regions.pop(found) for found in names if found in self._regions]
        for _, file in gone:
            file.release()

    def status(self, name: str = "") -> Mapping[str, Region]:
        """Return one region by name, or all.

        Raises:
            ModelNotFound: There is no region of this name.
        """
        with self._lock:
            regions = {known: region for known, (region, _) in self._regions.items()}
        if name and name not in regions:
            raise ModelNotFound(f"There is no shared memory region {name!r}.", hint="Register it first.")
        return {name: regions[name]} if name else regions

    def read(self, name: str, offset: int, byte_size: int) -> memoryview:
        """Return bytes of a region, to be read only: a view of the region's memory, or a copy.

        Whoever registered the region leaves them as they are until the request is answered.

        Raises:
            RequestError: There is no such region, or it has no such bytes (any more).
            RequestTooLarge: More bytes than one tensor may take.
        """
        start, file = self._hold(name, offset, byte_size)
        try:
            # The size is checked before memory is taken for it; the read tells whether it still was so.
            if start + byte_size > file.size():
                raise RequestError(f"The file of region {name!r} was made shorter after it was registered.")
            if file.mapping is not None and start + byte_size <= len(file.mapping):
                return file.mapping[start : start + byte_size].toreadonly()
            buffer, done = memoryview(bytearray(byte_size)), 0
            while done < byte_size:
                got = os.preadv(file.descriptor, [buffer[done:]], start + done)
                if got == 0:
                    raise RequestError(f"The file of region {name!r} was made shorter after it was registered.")
                done += got
            return buffer
        finally:
            file.release()

    def write(self, name: str, offset: int, room: int, data: bytes | memoryview) -> None:
        """Put bytes into a region.

        Raises:
            RequestError: There is no such region, or no such room in it.
        """
        if len(data) > room:
            raise RequestError(f"An output of {len(data)} bytes does not fit the {room} bytes given in {name!r}.")
        start, file = self._hold(name, offset, room)
        try:
            if file.mapping is not None and start + room <= min(len(file.mapping), file.size()):
                file.mapping[start : start + len(data)] = data
                return
            view, done = memoryview(data), 0
            while done < len(view):
                done += os.pwrite(file.descriptor, view[done:], start + done)
        except OSError as error:
            raise RequestError(f"Region {name!r} cannot be written: {error.strerror}.") from error
        finally:
            file.release()

    def _forget_abandoned(self) -> None:
        """Let go of regions of accelrt's own clients that have died: their file has no name and no lock any more."""
        with self._lock:
            gone = [
                name
                for name, (region, file) in self._regions.items()
                if region.key.lstrip("/").startswith(OWN_PREFIX) and file.abandoned()
            ]
        for name in gone:
            self.unregister(name)

    def _hold(self, name: str, offset: int, byte_size: int) -> tuple[int, _File]:
        if byte_size > self._largest:
            raise RequestTooLarge(f"A tensor of {byte_size} bytes is larger than this server takes: {self._largest}.")
        with self._lock:
            region, file = self._regions.get(name, (None, None))
            if region is None or file is None:
                raise RequestError(f"There is no shared memory region {name[:80]!r}.", hint="Register it first.")
            if offset < 0 or byte_size < 0 or offset + byte_size > region.byte_size:
                raise RequestError(
                    f"{byte_size} bytes at {offset} are not within region {name!r} of {region.byte_size} bytes."
                )
            file.hold()
        return region.offset + offset, file


class _File:
    """An open file, closed when the last who holds it lets go."""

    def __init__(self, folder: Path, name: str, key: str) -> None:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self.descriptor = os.open(folder / name, flags)
        except OSError as error:
            raise RequestError(f"Shared memory {key!r} cannot be opened: {error.strerror}.") from error
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            os.close(self.descriptor)
            raise NotAllowed(f"Shared memory {key!r} is not a plain file.")
        self._holders, self._lock = 1, threading.Lock()
        self.mapping = self._map()

    def _map(self) -> memoryview | None:
        found = os.fstat(self.descriptor)
        others_may_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if found.st_uid not in (os.geteuid(), 0) or others_may_write or found.st_size == 0:
            return None
        try:
            return memoryview(mmap.mmap(self.descriptor, found.st_size))
        except (OSError, ValueError):  # no room for it in this process
            return None

    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def abandoned(self) -> bool:
        if os.fstat(self.descriptor).st_nlink:
            return False
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False  # its client holds the lock
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        return True

    def hold(self) -> None:
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last:
            self.mapping = None  # unmapped when its last view is gone
            os.close(self.descriptor)
