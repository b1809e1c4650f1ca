"""Artifacts made to be wrong: each loads and predicts rightly, or is refused with an error of accelrt's.

Nothing is written outside the cache, nothing is left in its work folder, and the process lives. What might take the
process down, programs of an attacker who knows how to hash, is loaded by a child.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accelrt
from accelrt.artifact.artifact import open_artifact
from accelrt.artifact.manifest import MANIFEST, PLACEMENT, SCHEMA, SOURCE, Manifest
from accelrt.errors import AccelrtError, ArtifactVersionError, CorruptArtifact
from accelrt.partition.report import Placement
from accelrt.testing import models

PROGRAM = "0.model.onnx"
WEIGHTS = "weights.bin"
FEEDS = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)
FLIPS = 600


@dataclass(frozen=True)
class Good:
    """A real artifact: its bytes, its members, and what it computes."""

    data: bytes
    members: dict[str, bytes]
    outputs: np.ndarray[Any, Any]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads(self.members[MANIFEST])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELRT_CACHE_DIR", str(tmp_path_factory.mktemp("maker")))
        artifact = accelrt.compile(models.mlp(hidden=(48, 48)))
        path = artifact.save(tmp_path_factory.mktemp("good") / "good.accel")
        with accelrt.load(artifact) as session:
            outputs = session.predict(FEEDS)["y"]
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert set(members) == {MANIFEST, PLACEMENT, SOURCE, PROGRAM, WEIGHTS}
    assert len(members[WEIGHTS]) > 1000
    return Good(path.read_bytes(), members, outputs)


class Box:
    """A place for attacks, with a neighbour that must not be touched. Each attack has a new cache."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self._patch = root, patch
        for name in ("neighbour", "files", "scratch"):
            (root / name).mkdir()
        (root / "neighbour" / "precious.txt").write_text("mine")
        patch.chdir(root / "files")
        patch.setattr(tempfile, "tempdir", str(root / "scratch"))
        self._number = 0

    def new_cache(self) -> Path:
        self._number += 1
        cache = self.root / f"cache{self._number}"
        self._patch.setenv("ACCELRT_CACHE_DIR", str(cache))
        return cache

    def write(self, data: bytes) -> Path:
        path = self.root / "files" / "attack.accel"
        path.write_bytes(data)
        return path

    def attack(self, data: bytes, good: Good) -> AccelrtError | None:
        """Load and predict; return the error, None for a right answer; anything else fails the test."""
        cache = self.new_cache()
        path = self.write(data)
        try:
            with accelrt.load(path, fallback="allow") as session:
                outputs = session.predict(FEEDS)
            np.testing.assert_allclose(outputs["y"], good.outputs, rtol=1e-5, atol=1e-6)
            error = None
        except AccelrtError as raised:
            error = raised
        self.check(cache)
        return error

    def check(self, cache: Path) -> None:
        """Nothing outside the cache, nothing unfinished inside."""
        assert {p.name for p in self.root.iterdir()} <= {"neighbour", "files", "scratch", cache.name}
        assert [p.name for p in (self.root / "neighbour").iterdir()] == ["precious.txt"]
        assert (self.root / "neighbour" / "precious.txt").read_text() == "mine"
        assert {p.name for p in (self.root / "files").iterdir()} <= {"attack.accel"}
        assert list((self.root / "scratch").iterdir()) == []
        if cache.is_dir():
            assert {p.name for p in cache.iterdir()} <= {"artifacts", "compiled", "locks", "work"}
            assert not (cache / "work").exists() or list((cache / "work").iterdir()) == []
            for entry in (cache / "artifacts").iterdir() if (cache / "artifacts").exists() else ():
                assert entry.is_dir()
                assert len(entry.name) == 64
                assert all(p.is_file() and not p.is_symlink() for p in entry.iterdir())
            shutil.rmtree(cache)


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(tmp_path, monkeypatch)


# ---------------------------------------------------------------- the zip file


def packed(
    members: Iterable[tuple[str, bytes]], *, method: int = zipfile.ZIP_STORED, kind: int = stat.S_IFREG
) -> bytes:
    """A zip file; names are written as they are."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members:
            entry = zipfile.ZipInfo("x", (1980, 1, 1, 0, 0, 0))
            entry.filename = name
            entry.compress_type = method
            entry.external_attr = (kind | 0o644) << 16
            archive.writestr(entry, data)
    return stream.getvalue()


def sealed(members: dict[str, bytes], manifest: dict[str, Any] | None = None) -> bytes:
    """An artifact in which every hash and size is right: what an attacker writes who knows the format."""
    manifest = copy.deepcopy(json.loads(members[MANIFEST]) if manifest is None else manifest)
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in members.items()
        if name != MANIFEST
    }
    return with_manifest(members, json.dumps(manifest).encode())


def with_manifest(members: dict[str, bytes], manifest: bytes) -> bytes:
    return packed({MANIFEST: manifest, **{k: v for k, v in members.items() if k != MANIFEST}}.items())


def central(data: bytes) -> list[int]:
    """Offsets of the entries of the central directory."""
    offset = struct.unpack("<L", data[-6:-2])[0]
    found = []
    while data[offset : offset + 4] == b"PK\x01\x02":
        found.append(offset)
        name, extra, comment = struct.unpack("<HHH", data[offset + 28 : offset + 34])
        offset += 46 + name + extra + comment
    return found


def patched(data: bytes, place: int, form: str, value: int) -> bytes:
    edited = bytearray(data)
    struct.pack_into(form, edited, place, value)
    return bytes(edited)


def test_the_good_one_loads(good: Good, box: Box) -> None:
    assert box.attack(good.data, good) is None
    assert box.attack(sealed(good.members), good) is None
    assert len(central(good.data)) == len(good.members)


def test_truncated_at_every_kind_of_place(good: Good, box: Box) -> None:
    places = {0, 1, 4, 29, 30, 31, len(good.data) - 1, len(good.data) - 22, len(good.data) - 21}
    places |= set(range(0, len(good.data), len(good.data) // 80))
    places |= {place + shift for place in central(good.data) for shift in (-1, 0, 1, 46)}
    with zipfile.ZipFile(io.BytesIO(good.data)) as archive:
        for member in archive.infolist():
            places |= {member.header_offset + shift for shift in (0, 1, 30, 31, 60, 60 + member.file_size)}
    for place in sorted(place for place in places if 0 <= place < len(good.data)):
        assert isinstance(box.attack(good.data[:place], good), CorruptArtifact), f"cut at {place}"


def test_what_is_before_or_behind_does_no_harm(good: Good, box: Box) -> None:
    for junk in (b"\0", b"junk" * 100, b"PK\x05\x06" + bytes(18), b"PK\x03\x04" * 5, good.data):
        box.attack(junk + good.data, good)
        box.attack(good.data + junk, good)
    for middle in range(100, len(good.data), len(good.data) // 25):
        error = box.attack(good.data[:middle] + b"\0\0\0" + good.data[middle:], good)
        assert isinstance(error, CorruptArtifact)


@pytest.mark.parametrize("part", range(6))
def test_bits_flipped_anywhere(part: int, good: Good, box: Box) -> None:
    rng = random.Random(part)
    harmless = 0
    for _ in range(FLIPS // 6):
        place = rng.randrange(len(good.data))
        data = bytearray(good.data)
        data[place] ^= 1 << rng.randrange(8)
        harmless += box.attack(bytes(data), good) is None
    assert harmless < FLIPS // 6 // 4, "flips that change nothing should be rare"


def test_every_bit_of_the_zip_directory_flipped(good: Good, box: Box) -> None:
    start = central(good.data)[0]
    for place in range(start, len(good.data)):
        data = bytearray(good.data)
        data[place] ^= 1 << (place % 8)
        box.attack(bytes(data), good)


def test_every_byte_counts(good: Good, box: Box) -> None:
    """One byte changed in a member with the zip's own checksum mended: the SHA-256 must notice."""
    for name, content in good.members.items():
        if name == MANIFEST:
            continue
        for place in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[place] ^= 1
            data = packed({**good.members, name: bytes(changed)}.items())
            assert isinstance(box.attack(data, good), CorruptArtifact), name


def _names(good: Good, change: Callable[[str], str | None]) -> list[tuple[str, bytes]]:
    return [(new, data) for name, data in good.members.items() if (new := change(name)) is not None]


NAMES = [
    "../escaped.txt", "../neighbour/precious.txt", "../../escaped", "/escaped", "/etc/cron.d/escaped", "..", ".",
    "a/../../escaped", "..\\escaped", "C:\\escaped", "C:escaped", "\\\\host\\share", "x/y", "x\0y", "a\nb", " ", "-x",
    ".stamp", ".hidden", "CON", "a" * 200, "a" * 65000, "é", "\u202egnp.exe", "~", "$HOME", "manifest.json/", "%2e%2e",
    "wei\u0261hts.bin", "Manifest.json", "\ufeffmanifest.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_names_that_point_elsewhere(name: str, good: Good, box: Box) -> None:
    for victim in (WEIGHTS, PLACEMENT, PROGRAM):
        renamed = [(name if old == victim else old, data) for old, data in good.members.items()]
        assert box.attack(packed(renamed), good) is not None
    assert box.attack(packed([*good.members.items(), (name, b"extra")]), good) is not None
    # And in the manifest, with all else in order.
    manifest = good.manifest
    manifest["files"][name] = manifest["files"].pop(WEIGHTS)
    members = [(name if old == WEIGHTS else old, data) for old, data in good.members.items() if old != MANIFEST]
    error = box.attack(packed([(MANIFEST, json.dumps(manifest).encode()), *members]), good)
    assert error is not None
    manifest = good.manifest
    manifest["segments"][0]["files"] = {name: PROGRAM}
    box.attack(sealed(good.members, manifest), good)  # under an odd name an engine does not find its program
    manifest["segments"][0]["files"] = {"model.onnx": name}
    assert isinstance(box.attack(sealed(good.members, manifest), good), CorruptArtifact)


def test_members_missing_doubled_and_added(good: Good, box: Box) -> None:
    for name, data in good.members.items():
        assert box.attack(packed((n, d) for n, d in good.members.items() if n != name), good) is not None
        with pytest.warns(UserWarning, match="Duplicate name"):
            twice = packed([*good.members.items(), (name, data)])
        assert box.attack(twice, good) is not None
        with pytest.warns(UserWarning, match="Duplicate name"):
            other = packed([(name, b"other"), *good.members.items()])
        assert box.attack(other, good) is not None
    assert box.attack(packed([*good.members.items(), ("extra.bin", b"")]), good) is not None
    assert box.attack(packed([]), good) is not None
    many = [(f"f{number}", b"") for number in range(10_050)]
    assert isinstance(box.attack(packed([*good.members.items(), *many]), good), CorruptArtifact)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused(method: int, good: Good, box: Box) -> None:
    assert isinstance(box.attack(packed(good.members.items(), method=method), good), CorruptArtifact)


def test_bombs(good: Good, box: Box) -> None:
    bomb = bytes(200 << 20)
    for name in (MANIFEST, WEIGHTS):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for member, content in good.members.items():
                if member != name:
                    archive.writestr(zipfile.ZipInfo(member), content)
            archive.writestr(zipfile.ZipInfo(name), bomb, zipfile.ZIP_DEFLATED)
        data = stream.getvalue()
        assert len(data) < 1 << 20
        assert isinstance(box.attack(data, good), CorruptArtifact)
        last = central(data)[-1]
        for claim in (1, len(good.members[name]), 1 << 20):
            lying = patched(data, last + 24, "<L", claim)
            assert isinstance(box.attack(lying, good), CorruptArtifact)
            stored = patched(patched(lying, last + 10, "<H", 0), last + 20, "<L", claim)
            assert isinstance(box.attack(stored, good), CorruptArtifact)


def test_sizes_and_offsets_that_lie(good: Good, box: Box) -> None:
    for entry in central(good.data):
        for field, form in (
            (20, "<L"),
            (24, "<L"),
            (42, "<L"),
            (16, "<L"),
            (28, "<H"),
            (30, "<H"),
            (32, "<H"),
            (10, "<H"),
        ):
            for value in (1, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF):
                lying = patched(good.data, entry + field, form, value & (0xFFFF if form == "<H" else 0xFFFFFFFF))
                error = box.attack(lying, good)
                assert error is not None or field not in (16, 20, 24)
        both = patched(patched(good.data, entry + 20, "<L", 0x7FFFFFFF), entry + 24, "<L", 0x7FFFFFFF)
        assert isinstance(box.attack(both, good), CorruptArtifact)
    for claimed in (-1, 1, 10**6, 1 << 40, 1 << 62, 1 << 70, 1.5, "12", None, True):
        manifest = good.manifest
        manifest["files"][WEIGHTS]["size"] = claimed
        data = with_manifest(good.members, json.dumps(manifest).encode())
        assert isinstance(box.attack(data, good), CorruptArtifact)


def test_members_that_overlap(good: Good, box: Box) -> None:
    entries = central(good.data)
    for left in entries:
        for right in entries:
            if left != right:
                offset = struct.unpack_from("<L", good.data, right + 42)[0]
                assert box.attack(patched(good.data, left + 42, "<L", offset), good) is not None


def test_members_that_are_no_files(good: Good, box: Box) -> None:
    for kind in (stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK):
        assert isinstance(box.attack(packed(good.members.items(), kind=kind), good), CorruptArtifact)
        link = io.BytesIO()
        with zipfile.ZipFile(link, "w") as archive:
            for name, content in good.members.items():
                entry = zipfile.ZipInfo(name)
                entry.external_attr = ((kind if name == WEIGHTS else stat.S_IFREG) | 0o777) << 16
                archive.writestr(entry, b"../neighbour/precious.txt" if name == WEIGHTS else content)
        assert isinstance(box.attack(link.getvalue(), good), CorruptArtifact)
    assert box.attack(packed([*good.members.items(), ("folder/", b"")]), good) is not None


def test_encrypted_and_odd_flags(good: Good, box: Box) -> None:
    for entry in central(good.data):
        for flags in (0x1, 0x41, 0x20, 0x2001, 0x8, 0xFFFF):
            header = struct.unpack_from("<L", good.data, entry + 42)[0]
            data = patched(good.data, entry + 8, "<H", flags)
            error = box.attack(data, good)
            assert error is not None or not flags & 0x2021
            box.attack(patched(data, header + 6, "<H", flags), good)


def test_not_an_artifact_at_all(good: Good, box: Box) -> None:
    for data in (
        b"",
        b"x",
        b"PK",
        b"PK\x03\x04",
        bytes(5000),
        random.Random(0).randbytes(5000),
        b"\x7fELF" + bytes(99),
    ):
        assert isinstance(box.attack(data, good), CorruptArtifact)
    box.new_cache()
    (box.root / "files" / "folder.accel").mkdir()
    with pytest.raises(AccelrtError):
        accelrt.load(box.root / "files" / "folder.accel")
    (box.root / "files" / "loop.accel").symlink_to("loop.accel")
    with pytest.raises(AccelrtError):
        accelrt.load(box.root / "files" / "loop.accel")
    with pytest.raises(AccelrtError):
        accelrt.load(box.root / "files" / "absent.accel")
    with pytest.raises(AccelrtError):
        accelrt.load("a\0b.accel")


# ---------------------------------------------------------------- the manifest


@pytest.mark.parametrize("schema", [SCHEMA + 1, SCHEMA + 2, 10**9, 10**400])
def test_newer_schemas_say_so(schema: int, good: Good, box: Box) -> None:
    error = box.attack(sealed(good.members, {**good.manifest, "schema": schema}), good)
    assert isinstance(error, ArtifactVersionError)
    assert "pgrade" in str(error)


@pytest.mark.parametrize("schema", [0, -1, 1.0, 1.5, "1", None, True, [], [1], {}, float("nan"), float("inf")])
def test_schemas_that_are_no_version(schema: Any, good: Good, box: Box) -> None:
    assert isinstance(box.attack(sealed(good.members, {**good.manifest, "schema": schema}), good), CorruptArtifact)


MANIFESTS = [
    b"", b"{}", b"[]", b"null", b"1", b'"x"', b"{", b"\xff\xfe", b"\0" * 100, b"[" * 100_000, b'{"a":' * 100_000,
    b'{"format":"accelrt"}', b'{"format":"other","schema":1}', b'{"format":"accelrt","schema":' + b"9" * 5000 + b"}",
    b'{"format":"accelrt","schema":1,"schema":1}', b" " * (65 << 20),
]  # fmt: skip


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: ascii(m[:30]))
def test_manifests_that_are_none(manifest: bytes, good: Good, box: Box) -> None:
    assert isinstance(box.attack(with_manifest(good.members, manifest), good), CorruptArtifact)


def test_deep_values_in_the_manifest(good: Good, box: Box) -> None:
    for depth in (100, 800, 980, 1000, 5000, 200_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            deep = opening * depth + ("1" if closing == "}" else "") + closing * depth
            for field in ("options", "signature", "segments", "accelrt"):
                text = json.dumps({**good.manifest, field: "DEEP"}).replace('"DEEP"', deep)
                assert box.attack(with_manifest(good.members, text.encode()), good) is not None or field == "options"
    nested: Any = {"tensor": "float32", "shape": None}
    for _ in range(50):
        nested = {"sequence": nested}
    manifest = good.manifest
    manifest["signature"]["inputs"][0]["type"] = nested
    assert isinstance(box.attack(sealed(good.members, manifest), good), CorruptArtifact)


def test_segments_that_do_not_fit_together(good: Good, box: Box) -> None:
    def broken(edit: Callable[[dict[str, Any]], None]) -> AccelrtError | None:
        manifest = good.manifest
        edit(manifest)
        return box.attack(sealed(good.members, manifest), good)

    def segment(m: dict[str, Any]) -> dict[str, Any]:
        return m["segments"][0]

    port = {"name": "z", "type": {"tensor": "float32", "shape": None}}
    assert isinstance(broken(lambda m: m["segments"].clear()), CorruptArtifact)
    assert isinstance(broken(lambda m: segment(m)["signature"]["inputs"].append(port)), CorruptArtifact)
    assert isinstance(broken(lambda m: segment(m)["signature"]["outputs"].clear()), CorruptArtifact)
    assert isinstance(broken(lambda m: m["signature"]["outputs"].append(port)), CorruptArtifact)
    assert isinstance(broken(lambda m: m["signature"]["inputs"].clear()), CorruptArtifact)

    # A cycle: the first segment reads what the second one yields.
    def cycle(m: dict[str, Any]) -> None:
        second = copy.deepcopy(segment(m))
        segment(m)["signature"]["inputs"].append(port)
        second["signature"]["outputs"].append(port)
        m["segments"].append(second)

    assert isinstance(broken(cycle), CorruptArtifact)


def json_values() -> st.SearchStrategy[Any]:
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6),
        st.sampled_from([2**31, 2**63, 2**64, -1, 10**30, "", "x", "..", "../x", "float32", "cpu", "model.onnx", "\ud800"]),
    )  # fmt: skip
    return st.recursive(
        scalars,
        lambda s: st.one_of(st.lists(s, max_size=3), st.dictionaries(st.text(max_size=5), s, max_size=3)),
        max_leaves=5,
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any, *, delete: bool = False) -> Any:
    if not path:
        return value
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if delete:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


@given(st.data())
@settings(max_examples=600, deadline=None, derandomize=True, database=None)
def test_any_field_of_the_manifest_changed(good: Good, data: st.DataObject) -> None:
    document = good.manifest
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(document))))
        document = replaced(document, path, data.draw(json_values()), delete=data.draw(st.integers(0, 4)) == 0)
    try:
        manifest = Manifest.parse(json.dumps(document).encode())
    except (CorruptArtifact, ArtifactVersionError):
        return
    assert Manifest.parse(manifest.dump()) == manifest
    hash(manifest.signature)


@given(st.data())
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_any_field_of_the_placement_changed(good: Good, data: st.DataObject) -> None:
    document = json.loads(good.members[PLACEMENT])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(document))))
        document = replaced(document, path, data.draw(json_values()), delete=data.draw(st.integers(0, 4)) == 0)
    try:
        placement = Placement.from_json(document)
    except (KeyError, TypeError, ValueError):
        return  # what `Artifact.placement` turns into CorruptArtifact
    assert placement.text()
    assert placement.fallen_back >= 0


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"3", b"{", b"[" * 100_000, b"\xff", b'{"target":1}'], ids=ascii
)
def test_placements_that_are_none(content: bytes, good: Good, box: Box) -> None:
    data = sealed({**good.members, PLACEMENT: content})
    cache = box.new_cache()
    artifact = open_artifact(box.write(data))
    with pytest.raises(CorruptArtifact):
        artifact.explain()
    with accelrt.load(artifact) as session:
        np.testing.assert_allclose(session.predict(FEEDS)["y"], good.outputs, rtol=1e-5, atol=1e-6)
    del artifact
    box.check(cache)


# ---------------------------------------------------------------- everything hashed rightly, in a child

CHILD = """
import json, os, sys, tempfile
import numpy as np
import accelrt
from accelrt.errors import AccelrtError

folder, expected = sys.argv[1], np.load(sys.argv[2])
feeds = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)
for name in sorted(os.listdir(folder)):
    for policy in ("allow", "error"):
        os.environ["ACCELRT_CACHE_DIR"] = tempfile.mkdtemp(dir=sys.argv[3])
        try:
            with accelrt.load(os.path.join(folder, name), fallback=policy) as session:
                outputs = session.predict(feeds)
            if list(outputs) != ["y"]:
                result = "other"  # a manifest may say that the model has no outputs
            else:
                right = np.shape(outputs["y"]) == expected.shape
                right = right and np.allclose(outputs["y"], expected, rtol=1e-5, atol=1e-6)
                result = "right" if right else "wrong"
            detail = ""
        except AccelrtError as error:
            result = "typed"
            detail = f"{type(error).__name__}: {error}"
        except BaseException as error:
            result = "untyped"
            detail = f"{type(error).__name__}: {error}"
        print(json.dumps([name, policy, result, detail]), flush=True)
        if os.path.isdir(os.path.join(os.environ["ACCELRT_CACHE_DIR"], "work")):
            left = os.listdir(os.path.join(os.environ["ACCELRT_CACHE_DIR"], "work"))
            assert not left, (name, policy, left)
"""


@dataclass
class Batch:
    """Attacks to load in a child that may die; what it says of each, under ``allow`` and under ``error``."""

    root: Path
    good: Good

    def run(self, attacks: dict[str, bytes]) -> dict[tuple[str, str], tuple[str, str]]:
        for name in ("attacks", "caches", "home", "tmp"):
            (self.root / name).mkdir()
        (self.root / "escaped.bin").write_bytes(np.arange(4096, dtype=np.float32).tobytes())
        np.save(self.root / "expected.npy", self.good.outputs)
        for name, data in attacks.items():
            (self.root / "attacks" / name).with_suffix(".accel").write_bytes(data)
        before = set(self.root.iterdir())
        environment = {**os.environ, "HOME": str(self.root / "home"), "TMPDIR": str(self.root / "tmp")}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, "attacks", "expected.npy", str(self.root / "caches")],
            cwd=self.root, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        last = lines[-1] if lines else "nothing"
        assert done.returncode == 0, f"died with {done.returncode} after {last}: {done.stderr[-2000:]}"
        assert set(self.root.iterdir()) == before, "something was written outside"
        # onnxruntime keeps an identity of its own in ~/.cache/Microsoft.
        assert [p for p in (self.root / "home").rglob("*") if p.is_file() and "Microsoft" not in p.parts] == []
        assert {p.name for p in (self.root / "tmp").iterdir()} <= {".ses"}  # of onnxruntime as well
        results = {(name.removesuffix(".accel"), policy): (kind, detail) for name, policy, kind, detail in lines}
        assert len(results) == 2 * len(attacks)
        assert {key: value for key, value in results.items() if value[0] == "untyped"} == {}
        return results


@pytest.fixture
def batch(tmp_path: Path, good: Good) -> Batch:
    return Batch(tmp_path, good)


def wrong(results: dict[tuple[str, str], tuple[str, str]]) -> list[tuple[str, str]]:
    return [key for key, value in results.items() if value[0] == "wrong"]


def edited(good: Good, edit: Callable[[dict[str, Any]], object]) -> bytes:
    manifest = good.manifest
    edit(manifest)
    return sealed(good.members, manifest)


def test_manifests_changed_at_random(good: Good, batch: Batch) -> None:
    """As above, but whatever passes the manifest's checks is loaded and run."""
    rng = random.Random(1)
    values: list[Any] = [
        None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, "", "x", "..", "cpu", "reference", "openvino",
        "float32", "int64", "string", [], {}, [1], {"a": 1}, "\ud800", "y", "model.onnx", "source.onnx", "weights.bin",
        "cpu:7", "auto",
        {"tensor": "float32", "shape": None}, {"sequence": {"tensor": "float32", "shape": []}}, 9999, [2], "fp16",
    ]  # fmt: skip
    attacks = {}
    while len(attacks) < 260:
        document = good.manifest
        for _ in range(rng.choice([1, 1, 2])):
            path = rng.choice([p for p in places(document) if p and p[0] not in ("files", "format", "schema")])
            document = replaced(document, path, rng.choice(values), delete=rng.random() < 0.1)
        data = with_manifest(good.members, json.dumps(document).encode())
        try:
            Manifest.parse(json.dumps(document).encode())
        except AccelrtError:
            if rng.random() < 0.9:  # a few of these are enough; the others are more fun
                continue
        attacks[f"{len(attacks):04}"] = data
    assert wrong(batch.run(attacks)) == []


def test_options_of_wrong_types_and_sizes(good: Good, batch: Batch) -> None:
    attacks = {}
    values = [None, "x", "4", 1.5, True, [], {}, -1, 0, 2**31, 2**63, 10**30, float("nan")]
    for option in ("threads", "inter_threads", "spinning", "no_such_option", ""):
        for number, value in enumerate(values):
            if option == "spinning" and value is False:
                continue
            attacks[f"{option or 'empty'}-{number}"] = edited(
                good, lambda m, o=option, v=value: m["segments"][0]["options"].update({o: v})
            )
    for number, value in enumerate([None, [], "x", {"min_segment_nodes": "x"}, {"min_segment_nodes": 0}, {"x": 1}]):

        def stale(m: dict[str, Any], value: Any = value) -> None:
            m["segments"][0]["fingerprint"]["onnxruntime"] = "0.0"
            m["options"]["partition"] = value

        attacks[f"partition-{number}"] = edited(good, stale)
    assert wrong(batch.run(attacks)) == []


def test_unknown_engines_and_other_fingerprints(good: Good, batch: Batch) -> None:
    """Compiled again from the source under `allow`, refused under `error`."""

    def segment(m: dict[str, Any]) -> dict[str, Any]:
        return m["segments"][0]

    attacks = {
        "no-backend": edited(good, lambda m: segment(m).update(backend="nosuch")),
        "no-engine": edited(good, lambda m: segment(m).update(engine="nosuch")),
        "fingerprint": edited(good, lambda m: segment(m)["fingerprint"].update(onnxruntime="0.0.1")),
        "fingerprint-more": edited(good, lambda m: segment(m)["fingerprint"].update(more="1")),
        "fingerprint-none": edited(good, lambda m: segment(m)["fingerprint"].clear()),
    }
    target_too = edited(good, lambda m: (m.update(target="nosuch"), segment(m).update(backend="nosuch")))
    results = batch.run({**attacks, "target-too": target_too})
    for name in (*attacks, "target-too"):
        assert results[name, "allow"][0] == "right", results[name, "allow"]
        assert results[name, "error"][0] == "typed"


def external(name: str, dims: list[int], **place: object) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=dims)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


PLACES: dict[str, dict[str, object]] = {
    "parent": {"location": "../../../../escaped.bin", "offset": 0},
    "sibling": {"location": "../escaped.bin"},
    "passwd": {"location": "../../../../../../../../../../etc/passwd"},
    "absolute": {"location": "/etc/passwd", "offset": 0},
    "device": {"location": "/dev/zero"},
    "random": {"location": "/dev/urandom"},
    "proc": {"location": "/proc/self/mem"},
    "folder": {"location": "."},
    "dotdot": {"location": ".."},
    "backslash": {"location": "..\\escaped.bin"},
    "nul": {"location": "weights.bin\0/../x"},
    "empty": {"location": ""},
    "none": {},
    "manifest": {"location": "manifest.json", "offset": 1 << 20},
    "beyond": {"location": "weights.bin", "offset": 1 << 30},
    "far": {"location": "weights.bin", "offset": 2**63 - 1},
    "farther": {"location": "weights.bin", "offset": 2**64},
    "negative": {"location": "weights.bin", "offset": -4},
    "least": {"location": "weights.bin", "offset": -(2**63)},
    "words": {"location": "weights.bin", "offset": "zero"},
    "short": {"location": "weights.bin", "offset": 0, "length": 4},
    "long": {"location": "weights.bin", "offset": 0, "length": 1 << 40},
    "minus": {"location": "weights.bin", "offset": 0, "length": -1},
    "memory": {"location": "*/_ORT_MEM_ADDR_/*", "offset": 4096, "length": 3072},
}


def pointing(content: bytes, place: dict[str, object]) -> bytes:
    """A program or source whose every external weight lies where an attacker wants it."""
    proto = onnx.ModelProto.FromString(content)
    for index, tensor in enumerate(list(proto.graph.initializer)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            proto.graph.initializer[index].CopyFrom(external(tensor.name, list(tensor.dims), **place))
    return proto.SerializeToString()


def hiding(place: dict[str, object]) -> bytes:
    """A model that returns what lies elsewhere, through the tensor of a Constant node."""
    tensor = external("c", [2, 4], **{**place, "length": 32})
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Constant", [], ["c"], value=tensor),
            onnx.helper.make_node("ReduceSum", ["x"], ["s"], keepdims=1),
            onnx.helper.make_node("Mul", ["s", "zero"], ["nothing"]),
            onnx.helper.make_node("Add", ["c", "nothing"], ["y"]),
        ],
        "hiding",
        [onnx.helper.make_tensor_value_info("x", 1, ["batch", 16])],
        [onnx.helper.make_tensor_value_info("y", 1, ["batch", 4])],
        [onnx.numpy_helper.from_array(np.zeros((1, 1), np.float32), "zero")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def stale(good: Good) -> dict[str, Any]:
    manifest = good.manifest
    manifest["segments"][0]["fingerprint"]["onnxruntime"] = "0.0"
    return manifest


def reading(good: Good, engine: str) -> dict[str, Any]:
    """A manifest that hands the program to another engine, with its present fingerprint."""
    from accelrt.registry import REGISTRY, find_engine

    manifest = good.manifest
    found = find_engine(REGISTRY.backend("cpu"), engine)
    manifest["segments"][0].update(engine=engine, fingerprint=dict(found.fingerprint()), options={})
    return manifest


def test_weights_that_lie_outside(good: Good, batch: Batch) -> None:
    attacks = {}
    for name, place in PLACES.items():
        program = {**good.members, PROGRAM: pointing(good.members[PROGRAM], place)}
        source = {**good.members, SOURCE: pointing(good.members[SOURCE], place)}
        both = {**program, SOURCE: source[SOURCE]}
        hidden = {**good.members, PROGRAM: hiding(place), SOURCE: hiding(place)}
        attacks[f"{name}-program"] = sealed(program)
        attacks[f"{name}-source"] = sealed(source, stale(good))
        attacks[f"{name}-both"] = sealed(both)
        attacks[f"{name}-hidden"] = sealed(hidden)
        attacks[f"{name}-hidden-source"] = sealed(hidden, stale(good))
        attacks[f"{name}-reference"] = sealed(both, reading(good, "reference"))
        attacks[f"{name}-hidden-reference"] = sealed(hidden, reading(good, "reference"))
    results = batch.run(attacks)
    for (name, policy), (kind, detail) in results.items():
        if name.startswith(("short-hidden", "long-hidden", "minus-hidden")):
            continue  # `hiding` sets the length, so these stay inside the weights: another model, not an attack
        if name.startswith("nul-"):
            continue  # onnxruntime reads up to the NUL, which is the file of the weights
        if name.endswith("-program"):
            assert kind == ("right" if policy == "allow" else "typed"), (name, policy, kind, detail)
        else:
            assert kind == "typed", (name, policy, kind, detail)


def test_programs_that_are_garbage(good: Good, batch: Batch) -> None:
    rng = random.Random(2)
    attacks = {}
    program = good.members[PROGRAM]
    contents = {
        "empty": b"", "zero": bytes(1000), "random": rng.randbytes(3000), "text": b"this is a model", "zip": good.data,
        "source": good.members[SOURCE], "json": good.members[MANIFEST], "half": program[: len(program) // 2],
        "twice": program * 2, "no-graph": onnx.ModelProto(ir_version=8).SerializeToString(),
        "nothing": onnx.ModelProto(ir_version=8, graph=onnx.GraphProto()).SerializeToString(),
    }  # fmt: skip
    for name, content in contents.items():
        attacks[f"program-{name}"] = sealed({**good.members, PROGRAM: content})
        attacks[f"source-{name}"] = sealed({**good.members, SOURCE: content}, stale(good))
        attacks[f"both-{name}"] = sealed({**good.members, PROGRAM: content, SOURCE: content})
        attacks[f"reference-{name}"] = sealed({**good.members, PROGRAM: content}, reading(good, "reference"))
        attacks[f"weights-{name}"] = sealed({**good.members, WEIGHTS: content})
    results = batch.run(attacks)
    for name in contents:
        if name not in ("twice", "source"):
            assert results[f"program-{name}", "error"][0] == "typed", name
        assert results[f"program-{name}", "allow"][0] in ("right", "typed"), name
        assert results[f"both-{name}", "allow"][0] in ("right", "typed"), name


@pytest.mark.parametrize("victim", [PROGRAM, SOURCE])
def test_programs_with_flipped_bits(victim: str, good: Good, batch: Batch) -> None:
    """A flipped bit with a right hash may be another model: any answer will do, but a crash will not."""
    rng = random.Random(3)
    attacks = {}
    for number in range(150):
        content = bytearray(good.members[victim])
        for _ in range(rng.choice([1, 1, 3])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        manifest = stale(good) if victim == SOURCE else None
        attacks[f"{number:04}"] = sealed({**good.members, victim: bytes(content)}, manifest)
    batch.run(attacks)


def test_saving_what_is_hostile_without_its_source(good: Good, box: Box) -> None:
    """`save(sources=False)` reads the programs itself."""
    for content in (b"garbage", *(pointing(good.members[PROGRAM], place) for place in PLACES.values())):
        box.new_cache()
        artifact = open_artifact(box.write(sealed({**good.members, PROGRAM: content})))
        target = box.root / "files" / "out.accel"
        try:
            artifact.save(target, sources=False)
        except AccelrtError:
            assert not target.exists()
        else:  # the pieces named are inside the weights, if not those that the program needs
            with pytest.raises(AccelrtError):
                accelrt.load(target)
            target.unlink()
        assert [p.name for p in target.parent.iterdir()] == ["attack.accel"]


# ---------------------------------------------------------------- the cache


@pytest.fixture
def saved(good: Good, box: Box) -> Path:
    """An artifact that is in the cache, and its only entry there."""
    box.new_cache()
    return box.write(good.data)


def predict(path: Path | onnx.ModelProto) -> Any:
    with accelrt.load(path) as session:
        return session.predict(FEEDS)["y"]


def entry_of(box: Box) -> Path:
    (entry,) = (Path(os.environ["ACCELRT_CACHE_DIR"]) / "artifacts").iterdir()
    return entry


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _flip_quietly(path: Path) -> None:
    """Same size, same time of change: what a restored backup or a forger leaves."""
    before = path.stat()
    _flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))


def _link(path: Path) -> None:
    elsewhere = path.parent.parent.parent.parent / "neighbour" / "precious.txt"
    path.unlink()
    path.symlink_to(elsewhere)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": _truncate, "flipped": _flip, "quietly": _flip_quietly, "replaced": _replace, "link": _link,
    "folder": _folder, "deleted": lambda path: path.unlink(), "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"), "garbage": lambda p: p.write_bytes(b"\xff\0[["),
}  # fmt: skip


@pytest.mark.parametrize("name", [MANIFEST, PLACEMENT, SOURCE, PROGRAM, WEIGHTS, ".stamp"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_entries_are_healed(damage: str, name: str, saved: Path, good: Good, box: Box) -> None:
    np.testing.assert_array_equal(predict(saved), good.outputs)
    entry = entry_of(box)
    DAMAGES[damage](entry / name)
    for _ in range(2):
        np.testing.assert_array_equal(predict(saved), good.outputs)
    assert entry_of(box) == entry
    for member, content in good.members.items():
        assert (entry / member).read_bytes() == content
        assert not (entry / member).is_symlink()
    box.check(Path(os.environ["ACCELRT_CACHE_DIR"]))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [MANIFEST, PROGRAM, WEIGHTS, ".stamp"])
def test_damaged_results_of_a_compile_are_healed(damage: str, name: str, good: Good, box: Box) -> None:
    box.new_cache()
    model = models.mlp(hidden=(48, 48))
    np.testing.assert_array_equal(predict(model), good.outputs)
    DAMAGES[damage](entry_of(box) / name)
    for _ in range(2):
        np.testing.assert_array_equal(predict(model), good.outputs)
    box.check(Path(os.environ["ACCELRT_CACHE_DIR"]))


STAMPS = [
    b"",
    b"{",
    b"[]",
    b"{}",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"manifest.json": []}',
    b'{"manifest.json": 1}',
]


@pytest.mark.parametrize("stamp", STAMPS, ids=lambda s: ascii(s[:20]))
def test_garbage_for_a_stamp(stamp: bytes, saved: Path, good: Good, box: Box) -> None:
    predict(saved)
    (entry_of(box) / ".stamp").write_bytes(stamp)
    np.testing.assert_array_equal(predict(saved), good.outputs)
    assert json.loads((entry_of(box) / ".stamp").read_bytes())


def test_an_altered_manifest_under_a_stamp_that_fits(saved: Path, good: Good, box: Box) -> None:
    """Manifest and stamp altered together: still noticed where what is loaded is checked again."""
    predict(saved)
    entry = entry_of(box)
    (entry / ".stamp").write_bytes(b"{}")
    manifest = good.manifest
    manifest["signature"]["outputs"][0]["name"] = "z"
    (entry / MANIFEST).write_text(json.dumps(manifest))
    np.testing.assert_array_equal(predict(saved), good.outputs)


@pytest.mark.parametrize(
    "record", [b"", b"\xff\xfe", b"../../neighbour", b"..", b".", b"/", b"a\0b", b"0" * 64, b"\n" * 64, b"x" * 100_000],
    ids=lambda r: ascii(r[:16]),
)  # fmt: skip
def test_records_of_compiles_that_point_elsewhere(record: bytes, good: Good, box: Box) -> None:
    cache = box.new_cache()
    model = models.mlp(hidden=(48, 48))
    predict(model)
    (key,) = (cache / "compiled").iterdir()
    key.write_bytes(record)
    np.testing.assert_array_equal(predict(model), good.outputs)
    assert len(key.read_bytes()) == 64
    box.check(cache)


@pytest.mark.parametrize("blocked", ["", "artifacts", "work", "compiled", "locks"])
@pytest.mark.parametrize("start", ["model", "file"])
def test_a_cache_that_cannot_be_written_costs_no_function(
    blocked: str, start: str, good: Good, box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where a folder should be, which stops even root."""
    caplog.set_level("CRITICAL", "accelrt")  # a record that is kept holds frames, and those what is to be freed
    cache = box.new_cache()
    obstacle = cache / blocked if blocked else cache
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("in the way")
    for _ in range(2):
        what: Any = box.write(good.data) if start == "file" else models.mlp(hidden=(48, 48))
        np.testing.assert_array_equal(predict(what), good.outputs)
    assert obstacle.read_text() == "in the way"
    gc.collect()
    assert list((box.root / "scratch").iterdir()) == [], "temporary folders go when the session goes"
    assert not (cache / "work").is_dir() or list((cache / "work").iterdir()) == []


def test_leftovers_of_the_dead_are_swept(saved: Path, box: Box) -> None:
    cache = Path(os.environ["ACCELRT_CACHE_DIR"])
    (cache / "work" / "old").mkdir(parents=True)
    (cache / "work" / "new").mkdir()
    (cache / "work" / "stray").write_text("x")
    os.utime(cache / "work" / "old", (0, 0))
    os.utime(cache / "work" / "stray", (0, 0))
    predict(saved)
    assert [p.name for p in (cache / "work").iterdir() if p.is_dir()] == ["new"]


def test_strangers_in_the_cache_are_no_matter(
    saved: Path, good: Good, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(os.environ["ACCELRT_CACHE_DIR"])
    (cache / "artifacts").mkdir(parents=True)
    (cache / "artifacts" / "file").write_text("x")
    (cache / "artifacts" / "folder" / "inner").mkdir(parents=True)
    (cache / "artifacts" / "dangling").symlink_to("nowhere")
    monkeypatch.setenv("ACCELRT_CACHE_SIZE", "1")
    np.testing.assert_array_equal(predict(saved), good.outputs)
