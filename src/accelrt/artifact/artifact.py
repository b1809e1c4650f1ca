"""What compiling yields: programs, placement and source graph, in one folder of the cache, savable as one file."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from accelrt.artifact.cache import Cache, Entry
from accelrt.artifact.manifest import CANDIDATES, PLACEMENT, SOURCE, VERIFICATION, Manifest
from accelrt.artifact.store import PackedArtifact, pack, without_source
from accelrt.errors import AccelrtError, ArtifactError, CorruptArtifact
from accelrt.graph.types import Signature

if TYPE_CHECKING:
    from accelrt.artifact.candidates import CandidateTable
    from accelrt.graph.model import Graph
    from accelrt.partition.report import Placement
    from accelrt.precision.report import VerificationReport

logger = logging.getLogger("accelrt")


class Artifact:
    """A compiled model. Made by `accelrt.compile` or `accelrt.load`, not by hand.

    ``trusted`` says whether programs in it that run code when they are loaded may do so: those that were compiled
    here may, those from a file only if the user said so.
    """

    def __init__(self, entry: Entry, *, trusted: bool = True) -> None:
        self._entry = entry
        self.trusted = trusted

    @property
    def manifest(self) -> Manifest:
        """What the artifact holds: signature, segments with engines and fingerprints, files with hashes."""
        return self._entry.manifest

    @property
    def signature(self) -> Signature:
        """Inputs and outputs of the model."""
        return self.manifest.signature

    @property
    def folder(self) -> Path:
        """Where the artifact lies unpacked. Its files must not be changed."""
        return self._entry.folder

    @cached_property
    def placement(self) -> Placement:
        """Which segment runs where, and why each refused node was refused.

        Raises:
            CorruptArtifact: The record of it is malformed.
        """
        from accelrt.partition.report import Placement

        try:
            return Placement.from_json(json.loads((self.folder / PLACEMENT).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptArtifact(f"The placement of the artifact is malformed: {error}.") from error

    @cached_property
    def verification(self) -> VerificationReport | None:
        """How far the outputs were from the reference when the model was compiled; None if that was not asked for.

        Raises:
            CorruptArtifact: The record of it is malformed.
        """
        if VERIFICATION not in self.manifest.files:
            return None
        from accelrt.precision.report import VerificationReport

        try:
            return VerificationReport.from_json(json.loads((self.folder / VERIFICATION).read_bytes()))
        except (AccelrtError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptArtifact(f"The verification of the artifact is malformed: {error}.") from error

    @cached_property
    def candidates(self) -> CandidateTable | None:
        """What ``auto`` tried, measured and chose; None if the target was named.

        Raises:
            CorruptArtifact: The record of it is malformed.
        """
        if CANDIDATES not in self.manifest.files:
            return None
        from accelrt.artifact.candidates import CandidateTable

        try:
            return CandidateTable.from_json(json.loads((self.folder / CANDIDATES).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptArtifact(f"The candidates table of the artifact is malformed: {error}.") from error

    def explain(self) -> str:
        """Return as text every segment with its engine, every refusal with its reason, verification and candidates."""
        parts = [self.placement, self.verification, self.candidates]
        return "\n".join(part.text() for part in parts if part is not None)

    def source_graph(self) -> Graph:
        """Return the graph that was compiled.

        Raises:
            ArtifactError: The artifact was saved without it.
        """
        if self.manifest.whole_format is not None:
            raise ArtifactError(
                f"The model runs whole, as {self.manifest.whole_format}; the artifact holds no graph of it.",
                hint="Compile the original model for an engine that takes ONNX, if it converts.",
            )
        if not self.manifest.has_source:
            raise ArtifactError(
                "The artifact was saved with sources=False, so it cannot be compiled again.",
                hint="Load it with the engines it was compiled for, or compile the original model.",
            )
        from accelrt.graph.load import load_graph

        return load_graph(self.folder / SOURCE)

    def save(self, path: str | os.PathLike[str], *, sources: bool = True) -> Path:
        """Write the artifact into one file, atomically; by custom it ends in ``.accel``.

        Args:
            path: Where to; an existing file is replaced.
            sources: Keep the source graph, so that other machines and newer engines can compile the model again and
                a segment that fails can run elsewhere. Without it the file holds the programs alone.

        Raises:
            ArtifactError: The file cannot be written.
        """
        target = Path(path)
        if sources or not self.manifest.has_source:
            pack(self.folder, self.manifest, target)
            return target
        with tempfile.TemporaryDirectory(prefix="accelrt-") as bare:
            manifest, _ = without_source(self.folder, self.manifest, Path(bare))
            pack(Path(bare), manifest, target)
        return target

    def __repr__(self) -> str:
        engines = ", ".join(segment.name for segment in self.manifest.segments)
        return f"<Artifact {self.signature} on {engines or 'nothing'}>"


def is_artifact(path: Path) -> bool:
    """Tell by a file's content whether it means to be an artifact: a zip whose first member is the manifest."""
    try:
        if not path.is_file():  # a pipe would keep us waiting
            return False
        with path.open("rb") as file:
            start = file.read(64)
    except (OSError, ValueError):  # a NUL in a path is a ValueError
        return False
    return path.suffix == ".accel" or (start.startswith(b"PK\x03\x04") and start[30:].startswith(b"manifest.json"))


def is_trusting() -> bool:
    """Tell whether ``ACCELRT_TRUST`` says that the programs in every file may run code."""
    return os.environ.get("ACCELRT_TRUST", "").strip() not in ("", "0")


def open_artifact(path: Path, *, trust: bool = False) -> Artifact:
    """Open an ``.accel`` file: from the cache if an equal one was verified before, else unpacked and verified now.

    Args:
        path: The file.
        trust: Programs that run code when they are loaded may do so, as `is_trusting` may say of every file.

    Raises:
        CorruptArtifact, ArtifactVersionError, ArtifactError: The file cannot be used.
    """
    trusted = trust or is_trusting()
    with PackedArtifact(path) as packed:
        cache = Cache()
        if (entry := cache.find(packed.identity)) is not None:
            return Artifact(entry, trusted=trusted)
        work: Path | None = None
        try:
            work = cache.work_folder()
            packed.unpack(work)
            return Artifact(cache.adopt(work, packed.manifest, packed.identity), trusted=trusted)
        except OSError as error:
            # A cache that cannot be written costs time, not function.
            logger.warning("The cache at %s cannot be used (%s); unpacking elsewhere.", cache.folder, error)
        finally:
            if work is not None:
                cache.discard(work)  # of no effect once it has been adopted
        return Artifact(_unpack_apart(packed), trusted=trusted)


def _unpack_apart(packed: PackedArtifact) -> Entry:
    folder = Path(tempfile.mkdtemp(prefix="accelrt-"))
    try:
        packed.unpack(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ArtifactError(f"{packed.path} cannot be unpacked: {error}", hint="Is the disk full?") from error
        raise
    return Entry(folder, packed.manifest, temporary=True)
