"""`auto` as it is: real engines in real child processes, and candidates made to be wrong, to crash, hang and hoard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accelrt
from accelrt.artifact.candidates import CandidateTable
from accelrt.data import digits_model
from accelrt.errors import AccelrtError, CorruptArtifact, InputError, NoCandidate, OptionError
from accelrt.testing.fake import FakeBackend
from accelrt.testing.models import mlp
from accelrt.tune.values import read_values, write_values
from accelrt.tune.workbench import available_bytes

IMAGE = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
QUICK: dict[str, Any] = {"trial_seconds": 1.5}


def auto(model: Any = None, **more: Any) -> accelrt.Artifact:
    options = {**QUICK, **more.pop("options", {})}
    model = digits_model() if model is None else model
    return accelrt.compile(model, "auto", options=options, **more)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One choice with everything in it, for the tests that only read it."""
    before = os.environ.get("ACCELRT_CACHE_DIR")
    os.environ["ACCELRT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    try:
        yield auto(example_inputs=[IMAGE], tolerance=2e-2, calibration=[IMAGE])
    finally:
        if before is None:
            del os.environ["ACCELRT_CACHE_DIR"]
        else:
            os.environ["ACCELRT_CACHE_DIR"] = before


def test_the_table_tells_everything(chosen: accelrt.Artifact) -> None:
    table = chosen.candidates
    assert table is not None
    assert table.chosen.setup.target == chosen.manifest.target
    assert table.chosen.error is not None
    assert table.chosen.error <= 2e-2
    measured = {(row.setup.target, row.setup.precision) for row in table.rows if row.measurement}
    assert {("cpu/onnxruntime", "fp32"), ("cpu/onnxruntime", "int8")} <= measured
    assert all(row.measured.n >= 3 and row.measured.memory_bytes > 20 << 20 for row in table.rows if row.measurement)
    reasons = {(row.setup.target, row.setup.precision): row.reason for row in table.rejected}
    assert "no CPU kernel" in reasons["cpu/onnxruntime", "bf16"]
    assert "right but slow" in reasons["cpu/reference", "fp32"]
    text = chosen.explain()
    assert "CHOSEN" in text
    assert "Verified against" in text


def test_the_choice_predicts_and_travels(chosen: accelrt.Artifact, tmp_path: Path) -> None:
    with accelrt.load(accelrt.compile(digits_model())) as session:
        wanted = session.predict(IMAGE)["scores"]
    path = chosen.save(tmp_path / "digits.accel")
    with accelrt.load(path) as session:
        found = session.predict(IMAGE)["scores"]
    assert np.linalg.norm(found - wanted) <= 2e-2 * np.linalg.norm(wanted)
    from accelrt.artifact.artifact import open_artifact

    assert open_artifact(path).candidates == chosen.candidates


def test_a_recorded_profile_replaces_measuring(chosen: accelrt.Artifact) -> None:
    again = auto(example_inputs=[IMAGE], tolerance=2e-2, calibration=[IMAGE], profile=chosen, cache=False)
    assert again.candidates is not None
    assert chosen.candidates is not None
    assert again.candidates.chosen.setup == chosen.candidates.chosen.setup
    figures = {str(row.setup): row.measurement for row in chosen.candidates.rows}
    assert {str(row.setup): row.measurement for row in again.candidates.rows} == figures
    assert again.candidates.machine == chosen.candidates.machine
    assert again.verification is not None
    assert again.verification.passed


def test_the_second_time_nothing_is_tried(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "model.onnx"
    path.write_bytes(digits_model().read_bytes())
    wishes: dict[str, Any] = {"precision": "fp32", "progress": lambda step, *_: said.append(step)}
    first = auto(path, **wishes)
    assert any(step.startswith("trying") for step in said)
    said.clear()
    assert auto(path, **wishes).folder == first.folder
    assert said == []  # not even the model was read
    assert auto(onnx.load(path), **wishes).folder == first.folder
    assert not any(step.startswith("trying") for step in said)
    # The same file with other contents is another model.
    model = onnx.load(path)
    model.graph.node[-1].name = "renamed"
    onnx.save(model, path)
    said.clear()
    assert auto(path, **wishes).folder != first.folder
    assert any(step.startswith("trying") for step in said)


def test_without_a_tolerance_nothing_is_rounded() -> None:
    table = auto().candidates
    assert table is not None
    assert table.chosen.setup.precision == "fp32"
    here = ("cpu/onnxruntime", "cpu/openvino")
    rounded = [row for row in table.rows if row.setup.target in here and row.setup.precision in ("bf16", "int8")]
    assert rounded
    assert all("tolerance is 0.001" in row.reason for row in rounded)


def test_throughput_shares_the_cores_and_tries_batches() -> None:
    artifact = auto(example_inputs=[IMAGE[:1]], objective="throughput", precision="fp32")
    table = artifact.candidates
    assert table is not None
    batches = {row.setup.batch for row in table.rows if row.measurement}
    assert {1, 4, 16} <= batches
    best = table.chosen
    assert artifact.manifest.options.get("workers", 1) == best.setup.workers
    per_call = max(row.measured.rows_per_s for row in table.rows if row.measurement and row.setup.batch == 1)
    assert best.measured.rows_per_s >= per_call * 0.9
    with accelrt.load(artifact) as session:
        assert [out["scores"].shape for out in session.map([IMAGE[:1]] * 10)] == [(1, 10)] * 10


def test_a_budget_that_nobody_meets() -> None:
    with pytest.raises(NoCandidate, match="exceeds the budget"):
        auto(precision="fp32", latency_budget=1e-9)


def test_what_a_user_fixes_is_not_varied() -> None:
    table = auto(options={"threads": 1, "openvino.streams": 1}, precision="fp32").candidates
    assert table is not None
    assert all("threads" not in row.setup.options for row in table.rows)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"objective": "speed"}, OptionError, "objective"),
        ({"percentile": 101}, OptionError, "percentile"),
        ({"tolerance": -1}, OptionError, "tolerance"),
        ({"tolerance": {"nothing": 0.1}}, OptionError, "no output"),
        ({"tolerance": 1e-2, "verify": accelrt.Verification(tolerance=1e-2)}, OptionError, "twice"),
        ({"verify": False}, OptionError, "verified candidate"),
        ({"options": {"thraeds": 1}}, OptionError, "threads"),
        ({"options": {"trial_timeout_s": 0}}, OptionError, "above 0"),
        ({"options": {"trial_memory_bytes": -1}}, OptionError, "above 0"),
        ({"example_inputs": [IMAGE[0]]}, InputError, "scores|image|rank|shape"),
        ({"profile": "figures"}, OptionError, "CandidateTable"),
        ({"calibration": [np.full((1, 1, 8, 8), np.nan, np.float32)]}, AccelrtError, "NaN"),
    ],
)  # fmt: skip
def test_wrong_wishes_fail_before_any_trial(wrong: dict[str, Any], error: type[Exception], says: str) -> None:
    def progress(step: str, done: int, total: int) -> None:
        assert not step.startswith("trying"), "work began"

    with pytest.raises(error, match=says):
        auto(progress=progress, **wrong)


def test_wishes_need_auto() -> None:
    with pytest.raises(OptionError, match="'tolerance' belongs to the target 'auto'"):
        accelrt.compile(digits_model(), "cpu", tolerance=1e-2)


def test_the_variable_can_say_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELRT_BACKEND", "auto")
    with accelrt.load(mlp(), options=QUICK) as session:
        assert session.stats().calls == 0


def test_a_class_that_no_child_can_import_is_a_row() -> None:
    hidden = FakeBackend.configured("hidden")
    accelrt.register(hidden)
    try:
        table = auto(precision="fp32", cache=False).candidates
    finally:
        from accelrt.registry import REGISTRY

        REGISTRY.unregister("hidden")
    assert table is not None
    (row,) = [row for row in table.rows if row.setup.target == "hidden/fake"]
    assert "no child process can import it" in row.reason
    assert row.nature == "stand-in"


@pytest.mark.torch
def test_engines_that_take_whole_sources_are_candidates() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    wishes: dict[str, Any] = {"example_inputs": (rows,), "tolerance": 2e-2}
    artifact = auto(model, options={"torch.inductor": False}, **wishes)
    assert artifact.candidates is not None
    found = {(row.setup.target, row.setup.precision): row for row in artifact.candidates.rows}
    whole = found["cpu/torch", "fp32"]
    assert whole.measurement is not None
    assert whole.error is not None
    assert whole.error < 1e-5
    assert "not in fp16" in found["cpu/torch", "fp16"].reason
    assert "saved_model" in found["cpu/tensorflow", "fp32"].reason
    faster = _faster(artifact.candidates, "cpu/torch")
    chosen = auto(model, options={"torch.inductor": False}, profile=faster, **wishes)
    assert chosen.manifest.target == "cpu/torch"
    assert chosen.placement.whole is not None
    with accelrt.load(chosen) as session:
        (output,) = session.predict(rows).values()
    np.testing.assert_allclose(output, model(rows).detach(), rtol=1e-5, atol=1e-6)


def _faster(table: CandidateTable, target: str) -> CandidateTable:
    """Return a table in which a target in fp32 was measured a thousand times as fast."""
    from dataclasses import replace

    return replace(
        table,
        rows=tuple(
            replace(row, measurement=replace(row.measured, median_s=row.measured.median_s / 1000, final=True))
            if row.measurement and (row.setup.target, row.setup.precision) == (target, "fp32")
            else row
            for row in table.rows
        ),
    )


@pytest.mark.torch
def test_what_cannot_be_verified_is_not_chosen() -> None:
    torch = pytest.importorskip("torch")

    class Singular(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return torch.linalg.svdvals(x)

    with pytest.raises(AccelrtError, match="ONNX"):
        auto(Singular().eval(), example_inputs=(torch.eye(3),))


PLUGIN = """
import os, signal, time
import numpy as np
from accelrt.testing.fake import FakeBackend

def wrong(kinds, outputs):
    return {name: value * np.float32(1.03) for name, value in outputs.items()}

def nan(kinds, outputs):
    outputs = {name: value.copy() for name, value in outputs.items()}
    for value in outputs.values():
        value[-1] = np.nan
    return outputs

def crash(kinds, outputs):
    os.kill(os.getpid(), signal.SIGSEGV)

def crash_compiling(kinds):
    os.kill(os.getpid(), signal.SIGSEGV)

def hang(kinds, outputs):
    time.sleep(3600)

def hoard(kinds, outputs):
    kept = []
    while True:
        kept.append(np.ones(4 << 20))

def leave(kinds, outputs):
    os._exit(7)

Wrong = FakeBackend.configured("wrong", distorts=wrong)
Nan = FakeBackend.configured("nan", distorts=nan)
Crash = FakeBackend.configured("crash", distorts=crash)
CrashCompiling = FakeBackend.configured("crash-compiling", fails_to_compile=crash_compiling)
Hang = FakeBackend.configured("hang", distorts=hang)
Hoard = FakeBackend.configured("hoard", distorts=hoard)
Leave = FakeBackend.configured("leave", distorts=leave)
Right = FakeBackend.configured("right")
"""
POINTS = """[accelrt.backends]
wrong = accelrt_bad:Wrong
nan = accelrt_bad:Nan
crash = accelrt_bad:Crash
crash-compiling = accelrt_bad:CrashCompiling
hang = accelrt_bad:Hang
hoard = accelrt_bad:Hoard
leave = accelrt_bad:Leave
right = accelrt_bad:Right
"""
SCRIPT = """
import json, sys, numpy as np, accelrt
from accelrt.data import digits_model
rows = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)
artifact = accelrt.compile(
    digits_model(), "auto", example_inputs=[rows], precision="fp32", tolerance=2e-2,
    options={"trial_seconds": 1.0, "trial_timeout_s": 15.0, "trial_memory_bytes": 900 << 20},
)
with accelrt.load(artifact) as session:
    session.predict(rows)
print(json.dumps(artifact.candidates.to_json()))
"""


def test_wrong_and_dangerous_candidates_lose_and_the_host_lives(tmp_path: Path) -> None:
    """Installed as a plug-in is: its own distribution, found by its entry points in this process and in its children."""
    (tmp_path / "accelrt_bad.py").write_text(PLUGIN)
    info = tmp_path / "accelrt_bad-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: accelrt-bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    table = CandidateTable.from_json(json.loads(done.stdout))
    rows = {row.setup.target: row for row in reversed(table.rows)}
    assert table.chosen.setup.target.startswith(("cpu/", "right/"))
    assert "relative" in rows["wrong/fake"].reason
    assert rows["wrong/fake"].error == pytest.approx(0.03, rel=0.01)
    assert "NaN" in rows["nan/fake"].reason
    assert "SIGSEGV" in rows["crash/fake"].reason
    assert "SIGSEGV" in rows["crash-compiling/fake"].reason
    assert "stopped after 15 s" in rows["hang/fake"].reason
    assert "its limit is 900 MiB" in rows["hoard/fake"].reason
    assert "code 7" in rows["leave/fake"].reason
    assert rows["right/fake"].measurement is not None
    assert {row.nature for row in table.rows if row.setup.target.startswith("cpu/")} == {"real"}
    assert {row.nature for row in table.rows if row.setup.target.endswith("/fake")} == {"stand-in"}
    bad = ("wrong", "nan", "crash", "crash-compiling", "hang", "hoard", "leave")
    assert all(rows[f"{name}/fake"].measurement is None for name in bad)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("rows"),
        lambda t: t.update(objective="speed"),
        lambda t: t.update(rows=[{}]),
        lambda t: t.update(machine=["a"]),
        lambda t: t["rows"][0].update(status="won"),
        lambda t: t["rows"][0]["setup"].update(workers="many"),
        lambda t: t["rows"][0]["measurement"].update(median_s="fast"),
        lambda t: t["rows"][0]["measurement"].update(more=1),
        lambda t: t["rows"][0]["measurement"].update(stable=1),
    ],
)
def test_a_damaged_table_is_told(chosen: accelrt.Artifact, damage: Any) -> None:
    assert chosen.candidates is not None
    data = chosen.candidates.to_json()
    damage(data)
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        CandidateTable.from_json(data)


def test_an_artifact_that_asks_for_too_much(chosen: accelrt.Artifact) -> None:
    from dataclasses import replace

    from accelrt.artifact.artifact import Artifact
    from accelrt.artifact.cache import Entry

    for asked in (0, -1, "2", 1 << 20, True):
        manifest = replace(chosen.manifest, options={**chosen.manifest.options, "workers": asked})
        with pytest.raises(CorruptArtifact, match="workers"):
            accelrt.load(Artifact(Entry(chosen.folder, manifest, unfinished=True)))


leaves = st.one_of(
    st.none(),
    st.tuples(
        st.sampled_from(
            ["float32", "float16", "int64", "bool", "uint8", "complex64", "bfloat16", "float8_e4m3fn", "int4"]
        ),
        st.lists(st.integers(0, 4), max_size=3),
    ).map(lambda kind: _array(*kind)),
    st.lists(st.text(max_size=5), max_size=4).map(lambda texts: np.array(texts, object)),
)


def _array(dtype: str, shape: list[int]) -> Any:
    from accelrt.graph.types import numpy_dtype

    return np.random.default_rng(0).integers(0, 2, shape).astype(numpy_dtype(dtype))


@settings(deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=5), st.one_of(leaves, st.lists(leaves, max_size=3)), max_size=4), max_size=4
    )
)
def test_values_reach_a_child_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, calls: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("values") / "calls"
    write_values(path, calls)
    _equal(read_values(path), calls)


def _equal(found: Any, wanted: Any) -> None:
    if isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            _equal(one, other)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            _equal(found[name], wanted[name])
    else:
        assert found is wanted


def test_free_memory_is_a_plausible_number() -> None:
    assert 1 << 30 <= available_bytes() < 1 << 50
