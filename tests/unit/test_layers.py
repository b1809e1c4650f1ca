"""The house rules: who may import whom, what importing costs, and that packaging says what the folders say."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import accelrt

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "accelrt"
BACKENDS = ROOT / "backends"

# From the ground up; a module may import from its own layer and from those below.
LAYERS = (
    ("errors", "data", "nature", "plain"),
    ("graph", "policy", "isolation"),
    # protocol: what both ends of a network connection mean by the same bytes, a server's front end and a backend.
    ("backend", "target", "cores", "protocol", "programs"),
    ("registry",),
    ("sources", "options", "partition", "precision", "inventory"),
    ("artifact",),
    ("runtime",),
    ("verification",),
    ("whole",),  # it verifies what it compiles, and `tune` takes what it finds as candidates
    ("tune",),
    ("api",),
    ("__init__",),
    ("testing", "scenarios", "plots", "cli", "serve", "advisor", "fleet", "compat", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# cores: a backend cuts its devices into groups by its vendor's variables, and the scheduler has to mean the same by them.
# programs: what several backends do alike with a program's files.
BACKENDS_MAY_IMPORT = {"backend", "cores", "errors", "graph", "isolation", "programs", "protocol"}
# Engines that are cpu/onnxruntime with something before it: what it computes is rounded, or a server computes it.
STAND_ON_THE_CPU = {"accelrt_neuron/emulator.py", "accelrt_eia/remote.py"}
HEAVY = (
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "openvino",
    "torch",
    "tensorflow",
    "rich",
    "typer",
    "matplotlib",
    "mlperf_loadgen",
    "fastapi",
    "msgspec",
    "grpc",
    "google.protobuf",
)


def _modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(dotted: str) -> str | None:
    """Return which part of accelrt a dotted name belongs to, None if to none."""
    parts = dotted.split(".")
    if parts[0] != "accelrt":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else None


def test_every_part_has_a_layer() -> None:
    parts = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir()} - {"__pycache__", "py"}
    assert parts - {"py.typed"} <= set(LEVEL), parts - set(LEVEL)


@pytest.mark.parametrize("path", _modules(SOURCE), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for dotted in _imports(path):
        room = _room(dotted)
        # The names of the front door are resolved when they are used, so it may name what lies above it.
        if room is not None and own != "__init__":
            assert LEVEL[room] <= LEVEL[own], f"{path.name} of layer {own} imports {dotted}"


@pytest.mark.parametrize("path", _modules(SOURCE), ids=lambda p: str(p.relative_to(SOURCE)))
def test_core_imports_no_backend(path: Path) -> None:
    packages = {folder.name for folder in BACKENDS.iterdir() if folder.is_dir()}
    assert not packages & {dotted.split(".")[0] for dotted in _imports(path)}


@pytest.mark.parametrize("path", _modules(BACKENDS), ids=lambda p: str(p.relative_to(BACKENDS)))
def test_backends_import_the_contract_only(path: Path) -> None:
    rooms = {room for dotted in _imports(path) if (room := _room(dotted)) is not None}
    assert rooms <= BACKENDS_MAY_IMPORT


@pytest.mark.parametrize("path", _modules(BACKENDS), ids=lambda p: str(p.relative_to(BACKENDS)))
def test_a_backend_imports_no_other_backend(path: Path) -> None:
    own = path.relative_to(BACKENDS).parts[0]
    packages = {folder.name for folder in BACKENDS.iterdir() if folder.is_dir()} - {own}
    found = {dotted for dotted in _imports(path) if dotted.partition(".")[0] in packages}
    if str(path.relative_to(BACKENDS)) in STAND_ON_THE_CPU:
        assert found
        found = {dotted for dotted in found if not dotted.startswith("accelrt_cpu.onnxruntime")}
    assert not found


def test_only_graph_knows_onnx_ir() -> None:
    users = {path for path in _modules(SOURCE) if any(name.split(".")[0] == "onnx_ir" for name in _imports(path))}
    allowed = {SOURCE / "sources" / name for name in ("tensorflow.py", "torch.py", "torch_names.py", "torch_files.py")}
    assert {path for path in users if path.parent.name != "graph"} <= allowed


def test_folders_are_packages_are_entry_points() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {folder.name for folder in BACKENDS.iterdir() if (folder / "__init__.py").exists()}
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    points = project["project"]["entry-points"]["accelrt.backends"].values()
    assert {f"backends/{name}" for name in folders} | {"src/accelrt"} == set(packages)
    assert {value.partition(":")[0] for value in points} == folders


def test_import_brings_in_nothing_heavy() -> None:
    code = f"import accelrt, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_loading_an_artifact_needs_no_graph_library(tmp_path: Path) -> None:
    from accelrt.data import digits_model

    path = accelrt.compile(digits_model()).save(tmp_path / "digits.accel")
    code = (
        "import accelrt, sys, numpy as np; s = accelrt.load(sys.argv[1]);"
        "s.predict(np.zeros((1, 1, 8, 8), np.float32));"
        "print([m for m in ('onnx', 'onnx_ir', 'torch', 'openvino', 'rich') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code, str(path)], text=True).strip() == "[]"


def test_public_names_are_there_and_listed() -> None:
    for name in accelrt.__all__:
        assert getattr(accelrt, name) is not None
    assert sorted(accelrt.__all__) == dir(accelrt)
    with pytest.raises(AttributeError, match="no attribute 'compiel'"):
        accelrt.compiel  # noqa: B018


def test_errors_are_the_tree_that_is_drawn() -> None:
    from accelrt import errors

    drawn = {word.strip("│├└─ ").split(" ")[0] for word in (errors.__doc__ or "").splitlines() if "──" in word}
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.AccelrtError) and value is not errors.AccelrtError
    }
    assert drawn == defined
