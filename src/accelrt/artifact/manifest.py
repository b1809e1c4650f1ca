"""The manifest of an artifact: small, read on every load, and checked field by field because it may be hostile."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Any

from accelrt import plain
from accelrt.errors import ArtifactVersionError, CorruptArtifact
from accelrt.graph.types import Signature

FORMAT = "accelrt"
SCHEMA = 2
"""The newest schema. What schema 1 can say is written as schema 1, so that older readers still read it."""
MANIFEST = "manifest.json"
PLACEMENT = "placement.json"
VERIFICATION = "verification.json"
CANDIDATES = "candidates.json"
SOURCE = "source.onnx"
MAX_BYTES = 64 << 20
MAX_FILES = 10_000
MAX_BATCH = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the artifact: its SHA-256 and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """A compiled segment: the engine, what the program depends on, and where its files are.

    ``batch`` is the batch size that it was specialised to, None for any; ``stage`` the stage of the pipeline that it
    belongs to, None in a model that is no pipeline.
    """

    backend: str
    engine: str
    precision: str
    signature: Signature
    files: Mapping[str, str]
    fingerprint: Mapping[str, str]
    options: Mapping[str, Any]
    batch: int | None = None
    stage: int | None = None

    @property
    def name(self) -> str:
        """Backend and engine: ``cpu/onnxruntime``."""
        return f"{self.backend}/{self.engine}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact holds. ``files`` lists every file but the manifest itself."""

    accelrt: str
    target: str
    signature: Signature
    segments: tuple[SegmentRecord, ...]
    files: Mapping[str, FileRecord]
    options: Mapping[str, Any]
    source_format: str

    @property
    def has_source(self) -> bool:
        """Whether the source graph is in the artifact, so that it can be compiled again."""
        return SOURCE in self.files

    @property
    def whole_format(self) -> str | None:
        """The form in which the model is in the artifact whole, None if it was cut into segments."""
        found = self.options.get("whole")
        return found if isinstance(found, str) else None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes that the model is specialised to, ascending; empty if it takes what its signature says."""
        return tuple(dict.fromkeys(segment.batch for segment in self.segments if segment.batch is not None))

    @property
    def stages(self) -> int:
        """Stages of the pipeline that the model is, 0 if it is none."""
        return max((segment.stage + 1 for segment in self.segments if segment.stage is not None), default=0)

    def dump(self) -> bytes:
        """Return the manifest as canonical JSON: equal manifests are equal bytes."""
        data = {
            "format": FORMAT,
            "schema": SCHEMA if self.batch_sizes else 1,
            "accelrt": self.accelrt,
            "target": self.target,
            "source_format": self.source_format,
            "options": dict(self.options),
            "signature": self.signature.to_json(),
            "segments": [
                {
                    "backend": segment.backend,
                    "engine": segment.engine,
                    "precision": segment.precision,
                    "signature": segment.signature.to_json(),
                    "files": dict(segment.files),
                    "fingerprint": dict(segment.fingerprint),
                    "options": dict(segment.options),
                    **({} if segment.batch is None else {"batch": segment.batch}),
                    **({} if segment.stage is None else {"stage": segment.stage}),
                }
                for segment in self.segments
            ],
            "files": {name: asdict(record) for name, record in self.files.items()},
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest and check it.

        Raises:
            CorruptArtifact: Not a manifest, or one that contradicts itself.
            ArtifactVersionError: Its schema is newer than this accelrt.
        """
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CorruptArtifact(f"The manifest is not JSON: {error}.") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CorruptArtifact("The manifest is not one of accelrt's.")
        schema = document.get("schema")
        if type(schema) is not int or schema < 1:
            raise CorruptArtifact(f"The manifest's schema is {schema!r}, which is no version.")
        if schema > SCHEMA:
            raise ArtifactVersionError(
                f"The artifact has schema {schema}; this accelrt reads up to {SCHEMA}.",
                hint="Upgrade accelrt, or compile the model again.",
            )
        try:
            manifest = _manifest(document, schema)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptArtifact(f"The manifest is malformed: {type(error).__name__}: {error}.") from error
        _check(manifest)
        return manifest


def _manifest(document: Mapping[str, Any], schema: int) -> Manifest:
    return Manifest(
        accelrt=plain.text(document["accelrt"]),
        target=plain.text(document["target"]),
        signature=Signature.from_json(document["signature"]),
        segments=tuple(_segment(item, schema) for item in plain.items(document["segments"])),
        files={
            _name(name): FileRecord(_match(_SHA256, record["sha256"]), _size(record["size"]))
            for name, record in plain.mapping(document["files"]).items()
        },
        options=plain.mapping(document["options"]),
        source_format=plain.text(document["source_format"]),
    )


def _segment(item: Mapping[str, Any], schema: int) -> SegmentRecord:
    return SegmentRecord(
        backend=plain.text(item["backend"]),
        engine=plain.text(item["engine"]),
        precision=plain.text(item["precision"]),
        signature=Signature.from_json(item["signature"]),
        files={_name(key): _name(value) for key, value in plain.mapping(item["files"]).items()},
        fingerprint={plain.text(key): plain.text(value) for key, value in plain.mapping(item["fingerprint"]).items()},
        options=plain.mapping(item["options"]),
        batch=_count(item["batch"], 1, MAX_BATCH) if schema >= 2 and "batch" in item else None,
        stage=_count(item["stage"], 0, MAX_FILES) if "stage" in item else None,
    )


def _check(manifest: Manifest) -> None:
    if len(manifest.files) > MAX_FILES:
        raise CorruptArtifact(f"The manifest lists {len(manifest.files)} files; {MAX_FILES} is the most.")
    if MANIFEST in manifest.files:
        raise CorruptArtifact("The manifest lists itself.")
    runs = [(batch, list(group)) for batch, group in groupby(enumerate(manifest.segments), lambda item: item[1].batch)]
    sizes = [batch or 0 for batch, _ in runs]
    if (0 in sizes and len(sizes) > 1) or sizes != sorted(set(sizes)):
        raise CorruptArtifact(f"Segments are not in order of their batch sizes: {sizes}.")
    for _, segments in runs or [(None, [])]:
        _check_run(manifest, segments)
    if len(counts := {segments[-1][1].stage for _, segments in runs}) > 1:
        raise CorruptArtifact(f"Batch sizes differ in their last stage: {counts}.")


def _check_run(manifest: Manifest, segments: Sequence[tuple[int, SegmentRecord]]) -> None:
    """Check the segments that one call runs, each with its index."""
    available = set(manifest.signature.input_names)
    stages = [segment.stage for _, segment in segments]
    steps = [-1 if stage is None else stage for stage in stages]
    jumps = any(later - earlier not in (0, 1) for earlier, later in pairwise(steps))
    if set(stages) != {None} and stages and (steps[0] != 0 or jumps):
        raise CorruptArtifact(f"Segments are not in order of their stages: {stages}.")
    for index, segment in segments:
        if missing := sorted(set(segment.files.values()) - set(manifest.files)):
            raise CorruptArtifact(f"Segment {index} needs the file {missing[0]!r}, which the manifest does not list.")
        if missing := sorted(set(segment.signature.input_names) - available):
            raise CorruptArtifact(f"Segment {index} reads {missing[0]!r}, which nothing before it produces.")
        available.update(segment.signature.output_names)
    if missing := sorted(set(manifest.signature.output_names) - available):
        raise CorruptArtifact(f"No segment produces the output {missing[0]!r}.")


def _count(value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is not a number from {least} to {most}")
    return value


def _match(pattern: re.Pattern[str], value: object) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{value!r} is not of the form {pattern.pattern}")
    return value


def is_file_name(name: str) -> bool:
    """Tell whether a file of an artifact may have this name."""
    return _NAME.fullmatch(name) is not None


def _name(value: object) -> str:
    """Accept plain file names only: no folder, no leading dot, so that nothing can point outside."""
    return _match(_NAME, value)


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{value!r} is not a size in bytes")
    return value
