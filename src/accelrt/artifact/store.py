"""The disk format: build the folder of an artifact, pack it into one ``.accel`` file, unpack it without trusting it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from accelrt.artifact.manifest import (
    MANIFEST,
    MAX_BYTES,
    MAX_FILES,
    PLACEMENT,
    SOURCE,
    FileRecord,
    Manifest,
    SegmentRecord,
    is_file_name,
)
from accelrt.errors import ArtifactError, CompileError, CorruptArtifact
from accelrt.graph.node import WEIGHTS_FILE

if TYPE_CHECKING:
    from accelrt.backend import Program

_CHUNK = 1 << 20
# A fixed time stamp, so that equal artifacts are equal files; the earliest that zip can say.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def merge_program(index: int, program: Program, folder: Path, weights: Any) -> dict[str, str]:
    """Move a program's files into an artifact's folder, its weights among the shared ones.

    Returns:
        For each name that the engine gave, the name of the file in the folder.

    Raises:
        CompileError: The engine gave a name that is none for a file.
        CorruptArtifact: An ONNX file of the program is none, or refers to weights that are not there.
    """
    stored: dict[str, str] = {}
    for name, path in program.files.items():
        stored[name] = f"{index}.{name}"
        if not is_file_name(stored[name]):
            raise CompileError(f"The engine named a file of its program {name!r}; plain file names only can be stored.")
        if path.suffix == ".onnx":
            _merge_onnx(path, folder / stored[name], weights)
        else:
            shutil.move(path, folder / stored[name])
    return stored


def _merge_onnx(source: Path, target: Path, weights: Any) -> None:
    import mmap

    import onnx
    from google.protobuf.message import DecodeError

    from accelrt.graph.weights import is_external, point_at

    try:
        proto = onnx.load(source, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise CorruptArtifact(f"The program {source.name!r} is not ONNX: {error}") from error
    external = [tensor for tensor in proto.graph.initializer if is_external(tensor)]
    if external:
        with (
            (source.parent / WEIGHTS_FILE).open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data,
        ):
            for tensor in external:
                offset, length = _place(tensor, len(data))
                view = memoryview(data)[offset : offset + length]
                try:
                    extent = weights.add(view)
                finally:
                    view.release()
                point_at(tensor, extent)
    target.write_bytes(proto.SerializeToString())


def _place(tensor: Any, available: int) -> tuple[int, int]:
    place = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset, length = int(place.get("offset", 0)), int(place["length"])
    except (KeyError, ValueError) as error:
        raise CorruptArtifact(f"The weight {tensor.name!r} does not say where it is: {error!r}.") from error
    if place.get("location") != WEIGHTS_FILE or offset < 0 or length < 0 or offset + length > available:
        raise CorruptArtifact(f"The weight {tensor.name!r} lies outside {WEIGHTS_FILE!r}.")
    return offset, length


def describe_files(folder: Path) -> dict[str, FileRecord]:
    """Return hash and size of every file of a finished folder, but the manifest."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    return {name: describe_file(folder / name) for name in names}


def describe_file(path: Path) -> FileRecord:
    """Return hash and size of a file."""
    return FileRecord(hash_file(path), path.stat().st_size)


def finish(folder: Path, manifest: Manifest) -> str:
    """Write the manifest and return the identity of the artifact."""
    data = manifest.dump()
    (folder / MANIFEST).write_bytes(data)
    return identity_of(data)


def identity_of(manifest: bytes) -> str:
    """Return the identity of an artifact: the SHA-256 of its manifest, which holds all other hashes."""
    return hashlib.sha256(manifest).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, manifest: Manifest, identity: str) -> None:
    """Check every byte of an unpacked artifact.

    Raises:
        CorruptArtifact: A file is missing, or is not what its hash says.
    """
    if identity_of((folder / MANIFEST).read_bytes()) != identity:
        raise CorruptArtifact(f"The manifest in {folder} was altered.")
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise CorruptArtifact(f"The file {name!r} is missing from {folder}.")
        if path.stat().st_size != record.size or hash_file(path) != record.sha256:
            raise CorruptArtifact(f"The file {name!r} in {folder} was altered.")


def pack(folder: Path, manifest: Manifest, target: Path) -> None:
    """Write an artifact's folder into one file: under a temporary name, then renamed.

    Raises:
        ArtifactError: The file cannot be written.
    """
    temporary = target.with_name(f".{target.name[:128]}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name in (MANIFEST, *sorted(manifest.files)):
                    entry = zipfile.ZipInfo(name, _EPOCH)
                    entry.external_attr = (stat.S_IFREG | 0o644) << 16
                    entry.file_size = (folder / name).stat().st_size
                    with (folder / name).open("rb") as source, archive.open(entry, "w") as sink:
                        shutil.copyfileobj(source, sink, _CHUNK)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise ArtifactError(f"The artifact cannot be written to {target}: {error}") from error
        raise


class PackedArtifact:
    """An ``.accel`` file, open for reading. Nothing in it is believed before it is checked.

    Raises:
        CorruptArtifact: Not an artifact, truncated, altered or hostile.
        ArtifactVersionError: Written by a newer accelrt.
        ArtifactError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("rb")
        except (OSError, ValueError) as error:
            raise ArtifactError(f"The artifact cannot be opened: {error}") from error
        try:
            with _hostile(path):
                self._archive = zipfile.ZipFile(self._file)
                self._check_members()
                self.manifest_bytes = self._read_manifest()
                self.manifest = Manifest.parse(self.manifest_bytes)
                self._check_listing()
        except BaseException:
            self._file.close()
            raise
        self.identity = identity_of(self.manifest_bytes)

    def __enter__(self) -> PackedArtifact:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def unpack(self, folder: Path) -> None:
        """Write all files into an empty folder, checking hash and size as they are written.

        Raises:
            CorruptArtifact: A file is not what the manifest says.
            OSError: ``folder`` cannot be written.
        """
        (folder / MANIFEST).write_bytes(self.manifest_bytes)
        for name, record in self.manifest.files.items():
            digest = hashlib.sha256()
            with (folder / name).open("xb") as sink:
                for chunk in self._chunks(name):
                    digest.update(chunk)
                    sink.write(chunk)
            if digest.hexdigest() != record.sha256:
                raise CorruptArtifact(f"The file {name!r} in {self.path} is not what the manifest says.")

    def _chunks(self, name: str) -> Iterator[bytes]:
        with _hostile(self.path), self._archive.open(name) as source:
            while chunk := source.read(_CHUNK):
                yield chunk

    def _check_members(self) -> None:
        members = self._archive.infolist()
        if len(members) > MAX_FILES + 1:
            raise CorruptArtifact(f"{self.path} has {len(members)} members; {MAX_FILES} is the most.")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise CorruptArtifact(f"{self.path} holds the compressed member {member.filename!r}.")
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.flag_bits & 0x1 or kind not in (0, stat.S_IFREG) or member.is_dir():
                raise CorruptArtifact(f"{self.path} holds {member.filename!r}, which is no plain file.")
        # Members that are stored cannot be larger together than the file, unless they overlap or lie.
        if sum(member.file_size for member in members) > self.path.stat().st_size:
            raise CorruptArtifact(f"The members of {self.path} claim more bytes than the file has.")

    def _read_manifest(self) -> bytes:
        try:
            member = self._archive.getinfo(MANIFEST)
        except KeyError:
            raise CorruptArtifact(f"{self.path} is a zip file without {MANIFEST}: not an artifact.") from None
        if member.file_size > MAX_BYTES:
            raise CorruptArtifact(
                f"The manifest of {self.path} claims {member.file_size} bytes; {MAX_BYTES} is the most."
            )
        return self._archive.read(member)

    def _check_listing(self) -> None:
        names = [member.filename for member in self._archive.infolist()]
        listed = {MANIFEST, *self.manifest.files}
        if len(set(names)) != len(names) or set(names) != listed:
            odd = sorted(set(names) ^ listed) or ["a duplicate"]
            raise CorruptArtifact(f"The members of {self.path} are not those its manifest lists: {odd[0]!r}.")
        for name, record in self.manifest.files.items():
            if self._archive.getinfo(name).file_size != record.size:
                raise CorruptArtifact(f"The file {name!r} in {self.path} has not the size the manifest says.")


class _hostile:  # noqa: N801 - reads as a statement
    """Turn whatever zipfile raises on a malformed file into `CorruptArtifact`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            raise ArtifactError(f"{self.path} cannot be read: {error}") from error
        # What Python's zipfile has been seen to raise on files made to be wrong.
        known = (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, ValueError, KeyError, IndexError, OSError,
                 NotImplementedError, RuntimeError, OverflowError, MemoryError, zlib.error)  # fmt: skip
        if isinstance(error, known) or type(error).__name__ == "error":
            raise CorruptArtifact(
                f"{self.path} is not a whole artifact: {error}",
                hint="Copy it again, or compile the model again.",
            ) from error


def write_placement(folder: Path, placement: Mapping[str, Any]) -> None:
    """Write the placement, which is kept apart from the manifest because loading has no need of it."""
    (folder / PLACEMENT).write_bytes(json.dumps(placement, separators=(",", ":")).encode())


def add_records(folder: Path, manifest: Manifest, records: Mapping[str, Mapping[str, Any]]) -> Manifest:
    """Write what is known of an artifact into its folder, JSON by file name; return a manifest that lists it.

    The manifest is still to be written, by `finish`.
    """
    files = dict(manifest.files)
    for name, record in records.items():
        (folder / name).write_bytes(json.dumps(record, separators=(",", ":")).encode())
        files[name] = describe_file(folder / name)
    return replace(manifest, files=files)


def without_source(folder: Path, manifest: Manifest, target: Path) -> tuple[Manifest, str]:
    """Copy an artifact's folder without its source graph and the weights that only that one uses.

    Returns:
        The new manifest and identity.
    """
    from accelrt.graph.weights import WeightFile

    weights = WeightFile(target / WEIGHTS_FILE)
    try:
        for name in manifest.files:
            if name.endswith(".onnx") and name != SOURCE:
                _merge_onnx(folder / name, target / name, weights)
            elif name not in (SOURCE, WEIGHTS_FILE):
                shutil.copyfile(folder / name, target / name)
        weights.close()
        manifest = replace(manifest, files=describe_files(target))
        return manifest, finish(target, manifest)
    except OSError as error:
        raise ArtifactError(f"The artifact cannot be copied without its source: {error}") from error


def program_files(folder: Path, segment: SegmentRecord) -> dict[str, Path]:
    """Return where the files of a segment's program are."""
    return {name: folder / stored for name, stored in segment.files.items()}
