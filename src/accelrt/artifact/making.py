"""Find an artifact in the cache or make it there; without a cache, make it in a folder of its own."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.cache import Cache, Entry
from accelrt.artifact.manifest import VERIFICATION, Manifest
from accelrt.artifact.store import add_records, finish
from accelrt.errors import ArtifactError

logger = logging.getLogger("accelrt")

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, how many of it are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class Check:
    """What an artifact must pass before anyone sees it.

    ``key`` names the check for the cache; ``run`` raises, or returns what is kept in the artifact as JSON.
    """

    key: str
    run: Callable[[Artifact], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Made:
    """A finished artifact: its folder, the manifest that was written there, and the identity that this gives."""

    folder: Path
    manifest: Manifest
    identity: str


Make: TypeAlias = Callable[[Path], Made]
"""Makes an artifact in an empty folder, or in a folder inside that one; what else is there then goes."""


def found_or_made(make: Make, key: Callable[[], str], *, cache: bool) -> Artifact:
    """Return what the cache holds under a key, made once by whichever process comes first.

    A cache that cannot be used is told in the log and done without.

    Args:
        make: Makes it.
        key: Returns what it is found again by; not called without the cache.
        cache: Use the cache.

    Raises:
        ArtifactError: It cannot be written anywhere.
        Exception: What ``make`` raises.
    """
    if not cache:
        return _made_apart(make)
    store, name = Cache(), key()
    if (entry := store.find_compiled(name)) is not None:
        return Artifact(entry)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(store.lock(name))
            # Whoever held the lock before may have made the same.
            if (entry := store.find_compiled(name)) is not None:
                return Artifact(entry)
            work = store.work_folder()
            stack.callback(store.discard, work)  # of what is left in it once the artifact was taken out
            made = make(work)
            return Artifact(store.adopt(made.folder, made.manifest, made.identity, name))
        except OSError as error:
            logger.warning("The cache at %s cannot be used (%s); compiling without it.", store.folder, error)
    return _made_apart(make)


def _made_apart(make: Make) -> Artifact:
    work = Path(tempfile.mkdtemp(prefix="accelrt-"))
    folders = {work}
    entry: Entry | None = None
    try:
        made, home = make(work), work
        if made.folder != work:
            folders.add(home := Path(tempfile.mkdtemp(prefix="accelrt-")))
            made.folder.rename(home)  # which is empty, and so gives way
        entry = Entry(home, made.manifest, temporary=True)
        folders.remove(home)
    except OSError as error:
        raise ArtifactError(
            f"The compiled model cannot be written to {work}: {error}",
            hint="Is the disk full? TMPDIR names another.",
        ) from error
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    return Artifact(entry)


def checked(folder: Path, manifest: Manifest, check: Check | None) -> Made:
    """Hold an artifact, whole but for its manifest, against what it must pass; finish it with what that found.

    Raises:
        VerificationError: It does not pass.
    """
    if check is not None:
        found = check.run(Artifact(Entry(folder, manifest, unfinished=True)))
        manifest = add_records(folder, manifest, {VERIFICATION: found})
    return Made(folder, manifest, finish(folder, manifest))
