"""PyTorch models that run whole on cpu/torch: because they do not convert, or because the engine was named."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import accelrt  # noqa: E402
from accelrt.data import digits_model  # noqa: E402
from accelrt.errors import (  # noqa: E402
    CompileError,
    ConversionError,
    ExecutionError,
    InputError,
    OptionError,
    SourceError,
)
from accelrt.sources import SourceOptions, SourceRequest, open_source, open_whole, whole_source  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
EAGER = {"torch.inductor": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ACCELRT_BACKEND", raising=False)
    monkeypatch.delenv("ACCELRT_TRUST", raising=False)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model falls to cpu/torch no option can reach the engine, and compiling would only take time."""
    monkeypatch.setattr(
        "accelrt_cpu.torch.isolation.call",
        lambda function, **_: {"refused": "not in this test"} if function.endswith(":package") else "2.13",
    )


class Singular(torch.nn.Module):
    """ONNX has no singular values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: float = 2.0) -> Any:
        hidden = self.inner(x) * scale
        return {"values": torch.linalg.svdvals(hidden), "moved": [hidden + shift, x.reshape(-1)]}


class Branch(torch.nn.Module):
    """Control flow that depends on data, which torch.export cannot capture and torch.jit.script can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            return x + x
        return -x


def halves(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole(model: Any, examples: Any, **options: Any) -> accelrt.Artifact:
    return accelrt.compile(model, "cpu/torch", example_inputs=examples, options={**EAGER, **options})


# Models that do not convert


@pytest.mark.usefixtures("eager")
def test_what_does_not_convert_runs_whole_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x, shift = Singular(), torch.randn(3, 4), torch.randn(4)
    with pytest.raises(ConversionError, match="_linalg_svd"):
        open_source(model, SourceRequest((x, shift)))
    with caplog.at_level(logging.WARNING, "accelrt"):
        artifact = accelrt.compile(model, example_inputs=(x, shift))
    (record,) = (record for record in caplog.records if record.name == "accelrt")
    assert record.levelno == logging.WARNING
    assert "ran whole on cpu/torch" in record.getMessage()
    assert "_linalg_svd" in record.getMessage()
    assert [port.name for port in artifact.signature.outputs] == ["values", "moved_0", "moved_1"]
    with accelrt.load(artifact) as session, torch.inference_mode():
        found, expected = session.predict(x, shift), model(x, shift)
        assert session.stats().engines == ("cpu/torch",)
    np.testing.assert_allclose(found["values"], expected["values"], rtol=1e-5)
    for index in (0, 1):
        np.testing.assert_allclose(found[f"moved_{index}"], expected["moved"][index], rtol=1e-5)


@pytest.mark.usefixtures("eager")
def test_explain_says_that_it_ran_whole_and_why(tmp_path: Path) -> None:
    artifact = accelrt.compile(Singular(), fallback="allow", example_inputs=(torch.randn(3, 4), torch.randn(4)))
    text = " ".join(artifact.explain().split())
    assert "the whole model in 1 segment" in text
    assert "runs whole on cpu/torch (operator by operator: not in this test), because it cannot be converted" in text
    assert "_linalg_svd" in text
    placement = artifact.placement
    assert placement.whole is not None
    assert placement.whole.format == "torch.export"
    assert placement.primary == "cpu/torch"
    assert placement.fallen_back == 0
    assert placement.segments[0].weight_bytes == (4 * 4 + 4) * 4
    assert type(placement).from_json(json.loads(json.dumps(placement.to_json()))) == placement


def test_the_policy_error_raises_what_the_exporter_said() -> None:
    with pytest.raises(ConversionError, match="_linalg_svd"):
        accelrt.compile(Singular(), fallback="error", example_inputs=(torch.randn(3, 4), torch.randn(4)))


def test_an_engine_of_onnx_named_by_the_target_keeps_the_model_from_running_whole() -> None:
    with pytest.raises(ConversionError, match="_linalg_svd"):
        accelrt.compile(Singular(), "cpu/onnxruntime", example_inputs=(torch.randn(3, 4), torch.randn(4)))


def test_the_policy_allow_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "accelrt"):
        artifact = accelrt.compile(Branch(), fallback="allow", example_inputs=(torch.ones(2),))
    assert not caplog.records
    assert artifact.placement.whole is not None
    assert artifact.placement.whole.format == "torchscript"


def test_control_flow_that_depends_on_data_goes_both_ways() -> None:
    with accelrt.load(accelrt.compile(Branch(), fallback="allow", example_inputs=(torch.ones(2),))) as session:
        for sign in (1, -1):
            x = np.full(2, sign, np.float32)
            np.testing.assert_array_equal(session.predict(x)["output"], x + x if sign > 0 else -x)


def test_what_nothing_captures_is_an_error_that_lists_each_attempt() -> None:
    class Opaque(torch.nn.Module):
        def forward(self, x: Any, **more: Any) -> Any:
            return torch.from_numpy(x.numpy() * 2) if x.sum() > 0 else x.tolist()[0]

    with pytest.raises(ConversionError) as caught:
        accelrt.compile(Opaque(), example_inputs=(torch.ones(2),))
    for attempt in ("torch.export, strict=False", "strict=True", "torch.jit.script", "torch.jit.trace"):
        assert attempt in caught.value.message


def test_a_trace_that_bakes_in_a_branch_is_not_believed() -> None:
    class Unscriptable(torch.nn.Module):
        def forward(self, x: Any, *rest: Any) -> Any:  # TorchScript has no variable arguments
            return x + x if x.sum() > 0 else -x

    with pytest.raises(SourceError, match=r"torch\.jit\.trace: TracerWarning"):
        whole(Unscriptable(), (torch.ones(2),))


def test_missing_examples_are_still_what_is_missing() -> None:
    for target in (None, "cpu/torch"):
        with pytest.raises(SourceError, match="no example_inputs were given"):
            accelrt.compile(Singular(), target)


def test_torchscript_that_returns_what_its_exporter_cannot(tmp_path: Path) -> None:
    class Named(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            if bool(x.sum() > 0):
                return {"low": x, "high": x + y}
            return {"low": x - y, "high": y}

    torch.jit.script(Named()).save(str(tmp_path / "named.pt"))
    with accelrt.load(
        tmp_path / "named.pt", fallback="allow", example_inputs=(torch.ones(2), torch.ones(2))
    ) as session:
        assert session.stats().engines == ("cpu/torch",)
        assert session.signature.output_names == ("low", "high")
        for x in (np.ones(2, np.float32), -np.ones(2, np.float32)):
            y = np.full(2, 3, np.float32)
            found = session.predict({"y": y, "x": x})
            np.testing.assert_array_equal(found["low"], x if x[0] > 0 else x - y)
            np.testing.assert_array_equal(found["high"], x + y if x[0] > 0 else y)


# The engine by name


def test_a_plain_compile_writes_nothing_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a model that converts was captured whole")

    monkeypatch.setattr("accelrt.sources.torch_whole.write", fail)
    artifact = accelrt.compile(torch.nn.Linear(4, 2), example_inputs=(torch.randn(1, 4),))
    assert artifact.placement.whole is None
    assert "whole" not in artifact.placement.to_json()


def test_named_it_does_not_try_to_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("it was converted")

    monkeypatch.setattr("accelrt.sources.torch.to_onnx", fail)
    artifact = whole(torch.nn.Linear(4, 2), (torch.randn(1, 4),))
    assert artifact.placement.whole is not None
    assert artifact.placement.whole.reason == "it was asked for by name."


def test_names_and_dimensions_are_those_of_the_converted_graph() -> None:
    class Named(torch.nn.Module):
        def forward(self, left: Any, right: Any = None, factor: int = 3) -> Any:
            return {"sum": left["a"] + left["b"], "left": right * factor, "pair": (left["a"], right)}

    examples = ({"a": torch.randn(2, 3), "b": torch.randn(2, 3)}, torch.randn(2, 5))
    for model, inputs, options in (
        (Named(), examples, {}),
        (Named(), {"right": examples[1], "left": examples[0]}, {}),
        (torch.nn.Linear(3, 2), (torch.randn(4, 3),), {"dynamic_shapes": {"input": {0: torch.export.Dim("rows")}}}),
        (torch.nn.Linear(3, 2), torch.randn(4, 3), {"dynamic_shapes": ({0: "rows"},)}),
    ):
        request = SourceRequest(inputs, options=SourceOptions(**options))
        converted = open_source(model, request).graph.signature
        assert whole(model, inputs, **options).signature == converted


def test_asked_for_names_are_given() -> None:
    x = torch.randn(1, 4)
    artifact = accelrt.compile(
        torch.nn.Linear(4, 2), "cpu/torch", example_inputs=(x,), input_names=["in"], output_names=["out"], options=EAGER
    )
    with accelrt.load(artifact) as session:
        assert list(session.predict({"in": x})) == ["out"]
    with pytest.raises(SourceError, match="2 input names"):
        accelrt.compile(torch.nn.Linear(4, 2), "cpu/torch", example_inputs=(x,), input_names=["a", "b"], options=EAGER)


def test_open_dimensions_stay_open_and_fixed_ones_are_checked() -> None:
    model = Singular()
    artifact = whole(model, (torch.randn(3, 4), torch.randn(4)), dynamic_shapes={"x": {0: "rows"}, "shift": None})
    assert str(artifact.signature.inputs[0]) == "x: float32[rows, 4]"
    with accelrt.load(artifact) as session, torch.inference_mode():
        for rows in (2, 9):
            x, shift = torch.from_numpy(halves(rows, 4, seed=rows)), torch.ones(4)
            np.testing.assert_allclose(session.predict(x, shift)["values"], model(x, shift)["values"], rtol=1e-4)
        with pytest.raises(InputError):
            session.predict(halves(2, 5), halves(4))


def test_a_dimension_that_the_model_fixes_is_an_error() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.reshape(2, 4)

    with pytest.raises(SourceError, match=r"dimensions that are to stay open.*constant (?:value )?\(?8"):
        whole(Fixed(), (torch.ones(8),), dynamic_shapes={"x": {0: "n"}})
    with pytest.raises(ConversionError, match="Nor can it run whole"):
        accelrt.compile(Fixed(), example_inputs=(torch.ones(8),), options={"dynamic_shapes": {"x": {0: "n"}}})


def test_files_and_programs_are_taken_as_they_are(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    module = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout(0.9))
    with torch.inference_mode():
        expected = module.eval()(x)
    program = torch.export.export(module, (x,))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.jit.script(module.train()).save(str(tmp_path / "script.pt"))
    for source, format_ in (
        (program, "torch.export"),
        (tmp_path / "program.pt2", "torch.export"),
        (tmp_path / "script.pt", "torchscript"),
        (torch.jit.script(module), "torchscript"),
    ):
        artifact = whole(source, (x,) if format_ == "torchscript" else None)
        assert artifact.placement.whole is not None
        assert artifact.placement.whole.format == format_
        with accelrt.load(artifact) as session:
            np.testing.assert_allclose(session.predict(x)["output"], expected, rtol=1e-6)
    assert module.training, "the module was left as it was"


def test_the_cache_knows_a_file_again(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(4, 2), (torch.randn(1, 4),)), tmp_path / "m.pt2")
    first, second = (whole(tmp_path / "m.pt2", None) for _ in range(2))
    assert first.folder == second.folder


@pytest.mark.parametrize("source", ["path", "bytes"])
def test_onnx_is_refused(source: str) -> None:
    model = digits_model() if source == "path" else Path(digits_model()).read_bytes()
    with pytest.raises(SourceError, match=r"takes sources whole, as torch\.export, torchscript; this one is onnx"):
        accelrt.compile(model, "cpu/torch")


def test_other_refusals_are_typed() -> None:
    linear, x = torch.nn.Linear(4, 2), (torch.randn(1, 4),)
    with pytest.raises(CompileError, match="fp32 or bf16, not in int8"):
        accelrt.compile(linear, "cpu/torch", example_inputs=x, precision="int8", calibration=[x], options=EAGER)
    with pytest.raises(CompileError, match="not in fp16"):
        accelrt.compile(linear, "cpu/torch", example_inputs=x, precision="fp16", options=EAGER)
    with pytest.raises(OptionError, match="opset"):
        whole(linear, x, opset=18)
    with pytest.raises(OptionError, match="min_segment"):
        accelrt.compile(linear, "cpu/torch", example_inputs=x, options={"min_segments": 2})
    with pytest.raises(OptionError, match="0 to 256"):
        whole(linear, x, threads=1000)


@pytest.mark.parametrize("how", [{"batch": (1, 8)}, {"cores": 2}, {"tune": True}])
def test_what_runs_whole_is_neither_divided_nor_tuned(how: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"names an engine of whole models.* takes no '{next(iter(how))}'"):
        accelrt.compile(torch.nn.Linear(4, 2), "cpu/torch", example_inputs=(torch.randn(1, 4),), options=EAGER, **how)
    examples = (torch.randn(3, 4), torch.randn(4))
    with pytest.raises(OptionError, match=f"_linalg_svd.* takes no '{next(iter(how))}'") as caught:
        accelrt.compile(Singular(), example_inputs=examples, **how)
    assert isinstance(caught.value.__cause__, ConversionError)
    with pytest.raises(ConversionError):  # nothing would run it whole
        accelrt.compile(Singular(), fallback="error", example_inputs=examples, **how)


def test_a_model_that_remembers_is_refused() -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Any) -> Any:
            self.count += 1
            return x + self.count

    with pytest.raises(SourceError, match="changes its buffer 'count'"):
        accelrt.compile(torch.export.export(Counter(), (torch.ones(1),)), "cpu/torch", options=EAGER)


# Values


def test_memory_is_neither_shared_nor_written_to() -> None:
    class Careless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0))

        def forward(self, x: Any) -> Any:
            view = x.t()
            x.add_(1)
            return {"view": view, "table": self.table, "cut": self.table[1:]}

    x = halves(2, 3)
    before = x.copy()
    x.flags.writeable = False
    for model in (Careless(), torch.jit.trace(Careless(), torch.ones(2, 3), strict=False)):
        with accelrt.load(whole(model, (torch.ones(2, 3),))) as session:
            first = session.predict(x)
            np.testing.assert_array_equal(x, before)
            np.testing.assert_allclose(first["view"], before.T + 1)
            assert first["view"].flags.c_contiguous
            first["table"][:] = -1
            first["cut"][:] = -1
            np.testing.assert_array_equal(session.predict(x)["table"], [0, 1, 2])


def test_types_without_a_counterpart_in_numpy_and_scalars_travel() -> None:
    import ml_dtypes

    class Mixed(torch.nn.Module):
        def forward(self, a: Any, b: Any, flag: Any) -> Any:
            return {"twice": a * 2, "next": b + 1, "none": None, "not": ~flag, "size": a.shape[0]}

    examples = (torch.ones(2, dtype=torch.bfloat16), torch.ones((), dtype=torch.int32), torch.tensor([True]))
    with accelrt.load(whole(Mixed(), examples)) as session:
        assert session.signature.output_names == ("twice", "next", "not")
        a = np.array([1.5, -2], ml_dtypes.bfloat16)
        a.flags.writeable = False
        found = session.predict(a, np.int32(4), np.array([False]))
    assert found["twice"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["twice"].astype(np.float32), [3, -4])
    assert found["next"].shape == ()
    assert found["next"] == 5
    assert found["not"].tolist() == [True]


def test_bf16_rounds_inside_and_keeps_the_types_outside() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()).eval(), halves(8, 64)
    with torch.inference_mode():
        exact = model(torch.from_numpy(x)).numpy()
        rounded = model.bfloat16()(torch.from_numpy(x).bfloat16()).float().numpy()
    model.float()
    for source in (model, torch.jit.script(model)):
        artifact = accelrt.compile(
            source, "cpu/torch", example_inputs=(torch.from_numpy(x),), precision="bf16", options=EAGER
        )
        assert artifact.placement.segments[0].precision == "bf16"
        with accelrt.load(artifact) as session:
            found = session.predict(x)["output"]
        assert found.dtype == np.float32
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 2e-2, "not computed in bfloat16"
        assert error < 3 * np.linalg.norm(rounded - exact) / np.linalg.norm(exact)


def test_bf16_is_refused_where_nothing_would_be_computed_in_it() -> None:
    for source in (torch.nn.ReLU(), torch.jit.script(torch.nn.ReLU())):
        with pytest.raises(CompileError, match="the model has none"):
            accelrt.compile(source, "cpu/torch", example_inputs=(torch.ones(2),), precision="bf16", options=EAGER)


def test_threads_are_set_for_the_call_and_set_back() -> None:
    before = torch.get_num_threads()
    wanted = 1 if before > 1 else 2
    asked: list[int] = []
    x = torch.randn(1, 4)
    with accelrt.load(whole(torch.nn.Linear(4, 2), (x,), threads=wanted)) as session:
        setter = torch.set_num_threads
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "set_num_threads", lambda n: (asked.append(n), setter(n))[1])
            session.predict(x)
    assert asked == [wanted, before]
    assert torch.get_num_threads() == before


def test_verify_holds_it_against_the_converted_model() -> None:
    x = (torch.randn(1, 4),)
    artifact = accelrt.compile(torch.nn.Linear(4, 2), "cpu/torch", example_inputs=x, verify=True, options=EAGER)
    assert artifact.verification is not None
    assert artifact.verification.passed
    for target in ("cpu/torch", "cpu"):
        with pytest.raises(OptionError, match="does not convert"):
            accelrt.compile(Singular(), target, example_inputs=(torch.randn(3, 4), torch.randn(4)), verify=True)


def test_a_failure_at_run_has_nowhere_to_go_and_says_so() -> None:
    class Solve(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.linalg.inv(x)

    with accelrt.load(whole(Solve(), (torch.eye(2),))) as session:
        with pytest.raises(ExecutionError, match=r"singular.*runs whole"):
            session.predict(np.zeros((2, 2), np.float32))
        np.testing.assert_array_equal(session.predict(np.eye(2, dtype=np.float32))["output"], np.eye(2))


# Written to a folder


def test_a_source_is_written_and_opened_again_by_plain_data(tmp_path: Path) -> None:
    source = whole_source(Branch(), SourceRequest((torch.ones(2),)))
    assert source is not None
    assert source.formats == ("torch.export", "torchscript")
    written = source.write(tmp_path)
    assert open_whole(tmp_path) == written
    assert json.loads((tmp_path / "whole.json").read_text())["path"] == "model.pt"
    with pytest.raises(SourceError, match="strict=True"):
        (tmp_path / "other").mkdir()
        source.write(tmp_path / "other", ["torch.export"])
    assert whole_source(digits_model(), SourceRequest()) is None
    assert whole_source(object(), SourceRequest()) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "pickle"}', '{"format": "torch.export", "signature": 1, "weight_bytes": 0}'],
)
def test_a_folder_without_a_source_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "whole.json").write_text(text)
    with pytest.raises(SourceError, match="no source that was written whole"):
        open_whole(tmp_path)


# AOTInductor


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One model compiled to machine code, because that takes a while."""
    from accelrt_cpu.torch_child import cpp_compiler

    if cpp_compiler() is None:
        pytest.skip("there is no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELRT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        shapes = {"x": {0: torch.export.Dim("rows", min=3, max=64)}, "shift": None}
        examples = (torch.randn(3, 4), torch.randn(4))
        artifact = accelrt.compile(
            Singular(),
            "cpu/torch",
            example_inputs=examples,
            options={"torch.inductor": True, "dynamic_shapes": shapes},
        )
        yield artifact


def test_compiled_code_computes_the_same(compiled: accelrt.Artifact) -> None:
    model = Singular()
    assert set(compiled.manifest.segments[0].files) == {"model.pt2", "compiled.pt2", "compiled.json"}
    assert "compiled by AOTInductor" in compiled.explain()
    with accelrt.load(compiled) as session, torch.inference_mode():
        for rows in (3, 7, 64):
            x, shift = torch.from_numpy(halves(rows, 4, seed=rows)), torch.ones(4)
            found, expected = session.predict(x, shift), model(x, shift)
            np.testing.assert_allclose(found["values"], expected["values"], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found["moved_0"], expected["moved"][0], rtol=1e-4, atol=1e-5)
            before = found["moved_1"].copy()
            x.zero_()
            np.testing.assert_array_equal(found["moved_1"], before)


def test_compiled_code_is_kept_from_sizes_that_it_does_not_check(compiled: accelrt.Artifact) -> None:
    with accelrt.load(compiled) as session:
        for rows in (2, 65):
            with pytest.raises(ExecutionError, match=f"is {rows}; the model takes 3 to 64"):
                session.predict(halves(rows, 4), halves(4))


def test_compiled_code_takes_calls_from_several_threads(compiled: accelrt.Artifact) -> None:
    calls = [(halves(3 + seed % 5, 4, seed=seed), halves(4, seed=seed)) for seed in range(16)]
    with accelrt.load(compiled) as session:
        expected = [session.predict(*call) for call in calls]
        for found, wanted in zip(session.map(calls), expected, strict=True):
            for name, value in wanted.items():
                np.testing.assert_array_equal(found[name], value)


@given(
    st.lists(st.integers(0, 9), min_size=3, max_size=3),
    st.integers(0, 9),
    st.one_of(st.none(), st.integers(0, 9)),
)
def test_sizes_are_taken_if_they_agree_and_are_within_their_limits(
    sizes: list[int], low: int, high: int | None
) -> None:
    from accelrt.graph.exported import Sizes
    from accelrt.graph.types import Port, Signature, TensorType

    type_ = TensorType("float32", (None, None))
    signature = Signature((Port("a", type_), Port("b", type_)), ())
    checked = Sizes(signature, {"shapes": [["n", "m"], [2, "n"]], "limits": {"n": [low, high]}})
    first, free, second = sizes
    inputs = {"a": np.empty((first, free)), "b": np.empty((2, second))}
    if first == second and first >= low and (high is None or first <= high):
        assert checked.problem(inputs) is None
    else:
        assert "the model takes" in (checked.problem(inputs) or "")


def test_compiled_code_is_loaded_in_a_process_that_never_saw_the_model(
    compiled: accelrt.Artifact, tmp_path: Path
) -> None:
    path = compiled.save(tmp_path / "model.accel")
    code = (
        "import accelrt, sys, numpy as np; s = accelrt.load(sys.argv[1], trust=True);"
        "print(s.predict(np.eye(4, dtype=np.float32), np.zeros(4, np.float32))['values'].shape, s.stats().engines)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(4,) ('cpu/torch',)"


def test_inductor_asked_for_and_not_to_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"torch.inductor": True}
    with pytest.raises(CompileError, match="this is torchscript in fp32"):
        accelrt.compile(torch.jit.script(Branch()), "cpu/torch", example_inputs=(torch.ones(2),), options=options)

    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: Any) -> Any:
            return x + 1, self.weight.reshape(2, 2)

    with pytest.raises(CompileError, match="returns a weight as it is"):
        accelrt.compile(Constant(), "cpu/torch", example_inputs=(torch.ones(2),), options=options)


def test_without_a_compiler_torch_runs_it_operator_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelrt_cpu import torch_child

    monkeypatch.setattr(torch_child, "_COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(
        "accelrt_cpu.torch.isolation.call",
        lambda function, timeout_s, **given: getattr(torch_child, function.rpartition(":")[2])(**given),
    )
    artifact = accelrt.compile(torch.nn.Linear(4, 2), "cpu/torch", example_inputs=(torch.ones(1, 4),))
    assert artifact.placement.whole is not None
    assert artifact.placement.whole.remark == "operator by operator: there is no C++ compiler"
