"""What is found in a repository, and what in it is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from accelrt.errors import ModelNotFound, RequestError, RequestTooLarge
from accelrt.serve.models.repository import Repository, check_name, is_version
from accelrt.serve.models.uploads import Uploads


def touch(path: Path, data: bytes = b"model") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_all_layouts_side_by_side(tmp_path: Path) -> None:
    touch(tmp_path / "flat.onnx")
    touch(tmp_path / "flat.accelrt.json", b'{"pinned": true}')
    touch(tmp_path / "packed.accel")
    touch(tmp_path / "saved" / "saved_model.pb")
    touch(tmp_path / "triton" / "1" / "model.onnx")
    touch(tmp_path / "triton" / "12" / "model.onnx")
    touch(tmp_path / "triton" / "2" / "other.onnx")
    touch(tmp_path / "triton" / "config.pbtxt", b"version_policy { all { } }")
    touch(tmp_path / "serving" / "3" / "saved_model.pb")
    touch(tmp_path / "odd" / "1" / "net.onnx")
    touch(tmp_path / "odd" / "1" / "net.onnx.data")
    touch(tmp_path / "odd" / "accelrt.json", b'{"replicas": 2}')
    touch(tmp_path / ".hidden" / "1" / "model.onnx")
    touch(tmp_path / "readme.txt")
    found = Repository([tmp_path]).scan()
    assert set(found) == {"flat", "packed", "saved", "triton", "serving", "odd"}
    assert {name: model.problem for name, model in found.items() if model.problem} == {}
    assert found["flat"].versions == {"1": tmp_path / "flat.onnx"} and found["flat"].settings.pinned
    assert list(found["triton"].versions) == ["1", "2", "12"]
    assert found["triton"].versions["2"].name == "other.onnx"
    assert found["saved"].versions == {"1": tmp_path / "saved"}
    assert found["serving"].versions == {"3": tmp_path / "serving" / "3"}
    assert found["odd"].versions["1"].name == "net.onnx" and found["odd"].settings.replicas == 2


def test_one_model_is_a_repository(tmp_path: Path) -> None:
    touch(tmp_path / "net.onnx")
    touch(tmp_path / "saved" / "saved_model.pb")
    assert set(Repository([tmp_path / "net.onnx"]).scan()) == {"net"}
    assert set(Repository([tmp_path / "saved"]).scan()) == {"saved"}
    assert Repository([tmp_path / "net.onnx"]).look("net").versions["1"] == tmp_path / "net.onnx"
    with pytest.raises(ModelNotFound):
        Repository([tmp_path / "gone"]).scan()


def test_what_is_wrong_is_listed_with_its_reason(tmp_path: Path) -> None:
    root = tmp_path / "root"
    secret = touch(tmp_path / "secret.onnx")
    touch(root / "fine.onnx")
    (root / "escapes.onnx").symlink_to(secret)
    touch(root / "deep" / "1" / "model.onnx")
    (root / "deep" / "1" / "weights.bin").symlink_to(secret)
    (root / "folder").symlink_to(tmp_path)
    (root / "alias.onnx").symlink_to(root / "fine.onnx")
    touch(root / "twice.onnx")
    touch(root / "twice" / "1" / "model.onnx")
    touch(root / "empty" / "notes.txt")
    touch(root / "several" / "1" / "a.onnx")
    touch(root / "several" / "1" / "b.onnx")
    touch(root / "misnamed" / "1" / "model.onnx")
    touch(root / "misnamed" / "config.pbtxt", b'name: "other"')
    touch(root / "broken" / "1" / "model.onnx")
    touch(root / "broken" / "config.pbtxt", b"name: ")
    touch(root / "binary" / "1" / "model.onnx")
    touch(root / "binary" / "config.pbtxt", b"\xff\xfe")
    touch(root / "unset" / "1" / "model.onnx")
    touch(root / "unset" / "accelrt.json", b'{"speed": "high"}')
    touch(root / "none" / "1" / "model.onnx")
    touch(root / "none" / "config.pbtxt", b"version_policy { specific { versions: 7 } }")
    touch(root / "ünïcode.onnx")
    touch(root / "with space.onnx")
    touch(root / "a\u202eb.onnx")
    touch(root / "pipe" / "1" / "readme")
    os.mkfifo(root / "pipe" / "1" / "model.onnx")
    found = Repository([root]).scan()
    problems = {name: model.problem for name, model in found.items() if model.problem is not None}
    assert set(found) - set(problems) == {"fine", "alias"}
    for name, words in {
        "escapes": "leads out",
        "deep": "leads out",
        "folder": "leads out",
        "twice": "of one name",
        "empty": "neither a version",
        "several": "several models",
        "misnamed": "'other'",
        "broken": "ends where",
        "binary": "not text",
        "unset": "'speed'",
        "none": "chooses none",
        "pipe": "neither a file",
        "ünïcode": "ASCII",
        "with space": "ASCII",
        "a\u202eb": "ASCII",
    }.items():
        assert words in str(problems[name]), (name, problems[name])


def test_two_repositories_with_one_name(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "x.onnx")
    touch(tmp_path / "b" / "x.onnx")
    repository = Repository([tmp_path / "a", tmp_path / "b"])
    assert "two models" in str(repository.scan()["x"].problem)
    assert "two models" in str(repository.look("x").problem)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\0b", "-x", "é", "x" * 300, "a b", ".git"]
)
def test_hostile_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        check_name(name)
    with pytest.raises(ModelNotFound):
        Repository([tmp_path]).look(name)


def test_versions_are_whole_numbers_from_one() -> None:
    assert [text for text in ("1", "42", "0", "01", "-1", "1.0", "١", "", "9" * 30) if is_version(text)] == ["1", "42"]


def test_equal_uploads_are_kept_once_and_go_with_the_last(tmp_path: Path) -> None:
    uploads = Uploads(1000)
    one = uploads.keep({"file:1/model.onnx": b"same", "file:2/model.onnx": b"same", "file:2/data/w.bin": b"more"})
    two = uploads.keep({"file:1/model.onnx": b"same"})
    assert one.versions == ("1", "2") and (one.folder / "2/data/w.bin").read_bytes() == b"more"
    content = one.folder.parent / "content"
    assert len(list(content.iterdir())) == 2
    assert (one.folder / "1/model.onnx").stat().st_ino == (two.folder / "1/model.onnx").stat().st_ino
    assert one.folder.parent.stat().st_mode & 0o077 == 0
    gone = one.folder
    del one
    assert not gone.exists() and len(list(content.iterdir())) == 1
    assert (two.folder / "1/model.onnx").read_bytes() == b"same"
    uploads.close()
    assert not content.exists()


@pytest.mark.parametrize(
    "key",
    [
        "file:1/../../x",
        "file:0/x",
        "file:../x",
        "file:1/",
        "file:1",
        "x",
        "file:1//x",
        "file:1/.x",
        "file:1/a/b/c/d/e",
        "file:1/a\0",
    ],
)
def test_hostile_uploads(key: str) -> None:
    with pytest.raises(RequestError):
        Uploads(1000).keep({key: b""})


def test_uploads_that_are_too_large() -> None:
    with pytest.raises(RequestTooLarge):
        Uploads(10).keep({"file:1/model.onnx": b"x" * 11})
    with pytest.raises(RequestTooLarge):
        Uploads(10).keep({f"file:{number}/m": b"" for number in range(1, 2000)})
