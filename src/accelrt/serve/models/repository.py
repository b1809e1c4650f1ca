"""What models lie in a repository: names, versions, files and configurations. Looks, and loads nothing.

Four layouts are read, side by side in one folder::

    classifier.accel                     an artifact or a model: one version, 1
    classifier/saved_model.pb            a SavedModel: one version, 1
    classifier/1/model.onnx              Triton's layout: a folder for each version
    classifier/config.pbtxt              Triton's configuration, in any folder of a model
    classifier/accelrt.json              accelrt's own settings; of a file, beside it: classifier.accelrt.json

A repository may also be one model: a file, or a SavedModel folder. A name, a link that leads out of the repository and
whatever else is refused is listed with its reason, so that it shows in the index instead of vanishing.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelrt.errors import AccelrtError, ModelNotFound, RequestError
from accelrt.serve.models.config import ModelConfig, from_text
from accelrt.serve.models.settings import SETTINGS_FILE, ModelSettings, read_settings

CONFIG_FILE = "config.pbtxt"
SUFFIXES = (".accel", ".onnx", ".pt2", ".pt", ".pth", ".keras", ".h5", ".pb")
"""Endings by which a file in a repository is taken for a model; what it is, its content decides."""
DEFAULT_FILES = (
    "model.accel",
    "model.onnx",
    "model.savedmodel",
    "model.pt2",
    "model.pt",
    "model.keras",
    "model.graphdef",
)
"""What a version's folder holds by custom, in order of preference."""
SAVED_MODEL = "saved_model.pb"
MAX_CONFIG_BYTES = 1 << 20
MAX_MODELS = 100_000

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)

Stamp = tuple[tuple[str, int, int, int], ...]
"""Path, size, time of change and inode of every file of a model: equal stamps are equal files."""


@dataclass(frozen=True, slots=True)
class RepositoryModel:
    """One model as it lies in the repository.

    Attributes:
        versions: The file or folder of each version that the policy chooses.
        present: Every version that is there.
        stamp: Tells whether anything of it changed.
        problem: Why it cannot be loaded, None if nothing is known against it.
    """

    name: str
    versions: Mapping[str, Path] = field(default_factory=dict)
    present: tuple[str, ...] = ()
    config: ModelConfig | None = None
    settings: ModelSettings = field(default_factory=ModelSettings)
    stamp: Stamp = ()
    problem: str | None = None


def check_name(name: str) -> str:
    """Return a model's name if it can be one.

    Raises:
        ModelNotFound: It cannot: names are ASCII letters, digits, ``.``, ``_`` and ``-``, and begin with no dot.
    """
    if not _NAME.fullmatch(name):
        raise ModelNotFound(
            f"{name[:80]!r} is no name of a model.",
            hint="Names are of letters, digits, '.', '_' and '-', and do not begin with '.' or '-'.",
        )
    return name


def is_version(text: str) -> bool:
    """Tell whether a folder's name is that of a version: a whole number from 1 up, without leading zeros."""
    return _VERSION.fullmatch(text) is not None


class Repository:
    """One or several folders of models, or single models.

    Args:
        roots: Folders or files. Two models of one name are both refused.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(Path(root) for root in roots)

    def scan(self) -> dict[str, RepositoryModel]:
        """Look at everything, by name.

        Raises:
            ModelNotFound: A folder or file of the repository itself is not there.
        """
        found: dict[str, RepositoryModel] = {}
        for root, name, paths in self._candidates():
            model = _read(root, name, paths)
            if name in found:
                model = RepositoryModel(name, stamp=model.stamp, problem="the repository holds two models of this name")
            found[name] = model
            if len(found) > MAX_MODELS:
                raise RequestError(f"The repository holds more than {MAX_MODELS} models.")
        return found

    def look(self, name: str) -> RepositoryModel:
        """Look at one model.

        Raises:
            ModelNotFound: It is not there.
        """
        check_name(name)
        found = [(root, paths) for root, each, paths in self._candidates() if each == name]
        if not found:
            raise ModelNotFound(f"No model {name!r} is in the repository.")
        if len(found) > 1:
            return RepositoryModel(name, problem="the repository holds two models of this name")
        return _read(found[0][0], name, found[0][1])

    def versions(self, model: RepositoryModel, config: ModelConfig) -> dict[str, Path]:
        """Return the files of the versions that another configuration than a model's own would serve.

        Raises:
            RequestError: It serves none of those that are there.
        """
        for path in model.versions.values():
            folder = next((each for each in (path, *path.parents[:1]) if is_version(each.name) and each.is_dir()), None)
            if folder is not None:
                chosen = choose_versions(config, model.present)
                return {each: model_file(folder.parent / each, config.default_model_filename) for each in chosen}
        choose_versions(config, model.present)
        return dict(model.versions)

    def _candidates(self) -> Iterator[tuple[Path, str, list[Path]]]:
        """Yield the folder that a model must not lead out of, its name, and its files or its folder."""
        for root in self._roots:
            try:
                mode = root.stat().st_mode
            except (OSError, ValueError) as error:
                raise ModelNotFound(f"There is no repository {str(root)[:200]!r}.") from error
            if not stat.S_ISDIR(mode) or (root / SAVED_MODEL).is_file():
                yield (
                    root.resolve().parent,
                    root.resolve().stem if not stat.S_ISDIR(mode) else root.resolve().name,
                    [root],
                )
                continue
            by_name: dict[str, list[Path]] = {}
            for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
                path = root / entry.name
                if entry.name.startswith("."):
                    continue
                if path.is_dir():
                    by_name.setdefault(entry.name, []).append(path)
                elif path.suffix.lower() in SUFFIXES:
                    by_name.setdefault(path.stem, []).append(path)
            for name, paths in by_name.items():
                yield root.resolve(), name, paths


def _read(root: Path, name: str, paths: Sequence[Path]) -> RepositoryModel:
    """Read one model; what is wrong with it is told in it."""
    if not _NAME.fullmatch(name):
        return RepositoryModel(name, problem="names are of ASCII letters, digits, '.', '_' and '-'")
    try:
        if len(paths) > 1:
            raise RequestError(f"there are {', '.join(path.name for path in paths)} of one name")
        path = paths[0]
        for each in _files(path):
            _inside(each, root)
        stamp = _stamp(path)
        if not path.is_dir():
            own = path.with_name(f"{path.stem}.{SETTINGS_FILE}")  # a plain .json may be anybody's
            settings = ModelSettings()
            if own.is_file():
                _inside(own, root)
                settings = read_settings(own)
                stamp += _stamp(own)
            return RepositoryModel(name, {"1": path}, ("1",), None, settings, stamp)
        return _read_folder(name, path, stamp)
    except AccelrtError as error:
        return RepositoryModel(name, stamp=_safe_stamp(paths), problem=str(error))
    except (OSError, ValueError) as error:
        return RepositoryModel(name, problem=f"it cannot be read: {error}")


def _read_folder(name: str, path: Path, stamp: Stamp) -> RepositoryModel:
    settings = read_settings(path / SETTINGS_FILE) if (path / SETTINGS_FILE).is_file() else ModelSettings()
    config = None
    if (path / CONFIG_FILE).is_file():
        with (path / CONFIG_FILE).open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise RequestError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
        try:
            config = from_text(text.decode())
        except UnicodeDecodeError as error:
            raise RequestError(f"{CONFIG_FILE} is not text: {error}") from error
        if config.name not in ("", name):
            raise RequestError(f"{CONFIG_FILE} says that it is for {config.name[:80]!r}")
    if (path / SAVED_MODEL).is_file():
        return RepositoryModel(name, {"1": path}, ("1",), config, settings, stamp)
    folders = {entry.name: path / entry.name for entry in os.scandir(path) if entry.is_dir() and is_version(entry.name)}
    if not folders:
        raise RequestError("the folder holds neither a version (a folder named 1, 2, ...) nor a saved_model.pb")
    present = tuple(sorted(folders, key=int))
    chosen = choose_versions(config, present)
    preferred = config.default_model_filename if config is not None else ""
    versions = {version: model_file(folders[version], preferred) for version in chosen}
    return RepositoryModel(name, versions, present, config, settings, stamp)


def choose_versions(config: ModelConfig | None, present: Sequence[str]) -> tuple[str, ...]:
    """Return the versions that a configuration's policy serves; without one the highest.

    Raises:
        RequestError: It serves none of those that are there.
    """
    chosen = (config or ModelConfig()).version_policy.choose(present)
    if not chosen:
        raise RequestError(f"the version policy chooses none of the versions {', '.join(present)}")
    return chosen


def model_file(folder: Path, preferred: str = "") -> Path:
    """Return the model in a version's folder: the named file, one of the usual names, or the only one.

    Raises:
        RequestError: There is none, or one cannot say which.
    """
    if preferred:
        if not (folder / preferred).exists():
            raise RequestError(f"version {folder.name} holds no {preferred!r}")
        return folder / preferred
    if (folder / SAVED_MODEL).is_file():
        return folder
    for name in DEFAULT_FILES:
        if (folder / name).exists():
            return folder / name
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()]
    if len(found) != 1:
        raise RequestError(
            f"version {folder.name} holds {'no model' if not found else 'several models: '}"
            f"{', '.join(path.name for path in found)}"
        )
    return found[0]


def _files(path: Path) -> Iterator[Path]:
    """Yield a path and all that lies below it, without following links of folders."""
    yield path
    if path.is_dir():
        for folder, folders, files in os.walk(path):
            for name in (*folders, *files):
                yield Path(folder) / name


def _inside(path: Path, root: Path) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise RequestError(f"{path.name!r} is a link that leads out of the repository")
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise RequestError(f"{path.name!r} is neither a file nor a folder")


def _stamp(path: Path) -> Stamp:
    rows = []
    for each in _files(path):
        found = each.stat()
        if stat.S_ISREG(found.st_mode):
            rows.append((str(each), found.st_size, found.st_mtime_ns, found.st_ino))
    return tuple(sorted(rows))


def _safe_stamp(paths: Sequence[Path]) -> Stamp:
    """Return the stamp of what was refused, so that a repair is noticed."""
    try:
        return tuple(row for path in paths for row in _stamp(path))
    except (OSError, ValueError):
        return ()
