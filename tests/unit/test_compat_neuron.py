"""The vendor's interfaces on accelrt: scripts for Inf1 and Inf2 with their import line changed."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelrt.compat.neuron.flags import neuron_cc_flags, neuronx_flags

torch = pytest.importorskip("torch")

from accelrt.compat.neuron import (  # noqa: E402
    compiling,
    residents,
    torch_neuron,
    torch_neuronx,
)
from accelrt.compat.neuron.program import numbers_in, program_of  # noqa: E402
from accelrt.errors import CoresUnavailable  # noqa: E402

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def _emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two cores of an emulated inf2.xlarge, all free."""
    monkeypatch.setenv("ACCELRT_BACKEND", "neuron/emulator")
    monkeypatch.delenv("ACCELRT_NEURON_EMULATE", raising=False)
    monkeypatch.delenv("ACCELRT_TRUST", raising=False)
    monkeypatch.setattr(compiling, "_NOTED", set())
    yield
    gc.collect()  # programs leave their cores with their modules
    assert not residents._RESIDENTS


def mlp() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()


class Sorting(torch.nn.Module):  # type: ignore[misc]
    """The chip sorts nothing, by the vendor's lists."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return torch.sort(self.inner(x), dim=1)[0]


def x_of(rows: int = 4) -> Any:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))


def close(found: Any, expected: Any, atol: float = 0.05) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0.02)


# Signatures are the vendor's

VENDORS = {
    "trace": "(func, example_inputs, *_, input_output_aliases={}, compiler_workdir=None, compiler_args=None, "
    "partitioner_config=None, inline_weights_to_neff=True, cpu_backend=False)",
    "PartitionerConfig": "(*, trace_kwargs=None, model_support_percentage_threshold=0.5, min_subgraph_size=-1, "
    "max_subgraph_count=-1, ops_to_partition=None, analyze_parameters=None)",
    "dynamic_batch": "(neuron_script)",
    "lazy_load": "(trace, enable_lazy_load=True)",
    "async_load": "(trace, enable_async_load=True)",
    "DataParallel": "(model, device_ids=None, dim=0, set_dynamic_batching=True)",
    "set_neuron_cores": "(trace, start_nc=-1, nc_count=-1)",
    "set_multicore": "(trace)",
    "neuron_cores_context": "(start_nc=-1, nc_count=-1)",
    "multicore_context": "()",
    "move_trace_to_device": "(trace, device_id)",
    "replace_weights": "(neuron_model, weights)",
    "bucket_model_trace": "(func, example_inputs, bucket_config, compiler_workdir=None, compiler_args=None)",
    "BucketModelConfig": "(bucket_kernel, *_, shared_state_buffer=None, shared_state_buffer_preprocessor=None, "
    "func_kwargs=None)",
    "analyze": "(func, example_inputs, compiler_workdir=None, additional_ignored_ops=set(), max_workers=4, "
    "is_hf_transformers=False, cleanup=False)",
}


def _bare(function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(inspect.Signature(parameters))


@pytest.mark.parametrize("name", VENDORS)
def test_signatures_are_those_that_the_vendor_documents(name: str) -> None:
    assert _bare(getattr(torch_neuronx, name)) == VENDORS[name]


def test_the_inf1_signatures_are_those_that_the_vendor_documents() -> None:
    assert _bare(torch_neuron.DataParallel) == "(model, device_ids=None, dim=0)"
    for name in ("set_neuron_cores", "set_multicore", "neuron_cores_context", "multicore_context"):
        assert _bare(getattr(torch_neuron.experimental, name)) == VENDORS[name]
    found = inspect.signature(torch_neuron.trace).parameters
    defaults = {"minimum_segment_size": 2, "single_fusion_ratio_threshold": 0.6, "fallback": True,
                "dynamic_batch_size": False, "separate_weights": False, "compiler_args": None,
                "compiler_timeout": None, "compiler_workdir": None, "subgraph_builder_function": None,
                "optimizations": None}  # fmt: skip
    assert {name: found[name].default for name in defaults} == defaults
    assert torch.neuron is torch_neuron


def test_unknown_arguments_are_type_errors() -> None:
    for call in (
        lambda: torch_neuronx.trace(mlp(), x_of(), fallback=True),  # type: ignore[call-arg]
        lambda: torch_neuron.trace(mlp(), x_of(), fallbak=True),
        lambda: torch_neuronx.PartitionerConfig(minimum_subgraph_size=1),  # type: ignore[call-arg]
        lambda: torch_neuronx.trace(mlp(), 3),
        lambda: torch_neuronx.trace(mlp(), (3,)),
        lambda: torch_neuronx.trace(3, x_of()),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError):
            call()


def test_arguments_without_meaning_are_taken_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        torch_neuronx.trace(mlp(), x_of(), compiler_workdir="work", compiler_args="--verbose debug -O1")
    told = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert len(told) == 2
    assert "'compiler_workdir'" in told[0]
    assert "--verbose, debug, optlevel=1" in told[1]


# Tracing


def test_a_trace_is_torchscript_that_agrees_and_is_saved_and_loaded_by_torch(tmp_path: Path) -> None:
    module = mlp().train()
    traced = torch_neuronx.trace(module, x_of())
    assert isinstance(traced, torch.jit.ScriptModule)
    assert module.training, "the module was left in another mode"
    close(traced(x_of()), mlp()(x_of()))
    torch.jit.save(traced, tmp_path / "a.pt")
    traced.save(str(tmp_path / "b.pt"))
    for name in ("a.pt", "b.pt"):
        loaded = torch.jit.load(tmp_path / name)
        assert torch.equal(loaded(x_of()), traced(x_of()))


def test_a_saved_trace_runs_in_another_process_that_imports_the_module_first(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.save(torch_neuronx.trace(mlp(), x_of()), path)
    read = f"m = torch.jit.load({str(path)!r}); print(tuple(m(torch.zeros(4, 8)).shape))"
    first = "import torch; from accelrt.compat.neuron import torch_neuronx; "
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", first + read], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "(4, 3)", done.stderr
    bare = subprocess.run([sys.executable, "-c", "import torch; " + read], capture_output=True, text=True)
    assert "Unknown builtin op: accelrt::neuron_" in bare.stderr, bare.stderr


def test_what_comes_out_is_nested_as_the_modules_own() -> None:
    class Pair(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return x * 2, (x + 1, x - 1)

    first, (second, third) = torch_neuronx.trace(Pair(), x_of())(x_of())
    close((first, second, third), (x_of() * 2, x_of() + 1, x_of() - 1))
    inputs = (x_of(), torch.full((4, 1), 2.0))
    named = torch_neuronx.trace(lambda x, scale: {"a": x * scale, "b": x.sum(1)}, inputs)(*inputs)
    close(named, {"a": x_of() * 2, "b": x_of().sum(1)})
    with pytest.raises(RuntimeError, match="strict=False"):
        torch_neuron.trace(lambda x: {"a": x * 2}, x_of())
    close(torch_neuron.trace(lambda x: {"a": x * 2}, [x_of()], strict=False)(x_of()), {"a": x_of() * 2})


def test_types_pass_through(tmp_path: Path) -> None:
    class Typed(torch.nn.Module):  # type: ignore[misc]
        def forward(self, ids: Any, x: Any) -> Any:
            return ids + 1, (x.float() * 2).to(torch.bfloat16)

    ids, x = torch.arange(4), torch.randn(4).to(torch.bfloat16)
    found = torch_neuronx.trace(Typed(), (ids, x))(ids, x)
    assert [one.dtype for one in found] == [torch.int64, torch.bfloat16]
    close(found, (ids + 1, x * 2))


def test_what_only_a_trace_captures_is_traced() -> None:
    class Weighted(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return x * 2 if float(x.sum()) > -1e9 else x * 3  # torch.export does not get past this

    with pytest.warns(torch.jit.TracerWarning):
        traced = torch_neuronx.trace(Weighted(), x_of())
    close(traced(x_of()), x_of() * 2)


def test_shapes_are_those_of_the_trace() -> None:
    traced = torch_neuronx.trace(mlp(), x_of())
    with pytest.raises(RuntimeError, match="Incorrect tensor shape at input tensor #0: received 3 8, expected 4 8"):
        traced(x_of(3))


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 14))
def test_any_batch_is_the_same_as_its_rows(rows: int) -> None:
    traced = _dynamic()
    close(traced(x_of(rows)), mlp()(x_of(rows)))


_kept: list[Any] = []


def _dynamic() -> Any:
    if not _kept:
        _kept.append(torch_neuronx.dynamic_batch(torch_neuronx.trace(mlp(), x_of())))
    return _kept[0]


@pytest.fixture(autouse=True)
def _drop_kept(_emulator: None) -> Iterator[None]:
    yield
    _kept.clear()


def test_dynamic_batches_are_kept_in_files_and_refused_where_they_cannot_be(tmp_path: Path) -> None:
    traced = torch_neuron.trace(mlp(), x_of(), dynamic_batch_size=True)
    torch.jit.save(traced, tmp_path / "m.pt")
    close(torch.jit.load(tmp_path / "m.pt")(x_of(9)), mlp()(x_of(9)))
    with pytest.raises(ValueError, match="Dynamic batching"):
        torch_neuronx.dynamic_batch(torch_neuronx.trace(lambda x: x.sum(), x_of()))
    pair = torch_neuronx.dynamic_batch(torch_neuronx.trace(lambda x, y: x + y, (x_of(), x_of())))
    with pytest.raises(RuntimeError, match="Inconsistent batch sizes"):
        pair(x_of(3), x_of(5))


# What is not supported


def test_operators_that_the_chip_lacks() -> None:
    with pytest.raises(AttributeError, match=r"TopK|Sort"):
        torch_neuron.trace(Sorting().eval(), x_of(), fallback=False)
    for limits in ({"model_support_percentage_threshold": 1.0}, {"max_subgraph_count": 0}, {"min_subgraph_size": 9}):
        with pytest.raises(ValueError, match=next(iter(limits))):
            torch_neuronx.trace(Sorting().eval(), x_of(), partitioner_config=torch_neuronx.PartitionerConfig(**limits))
    with pytest.raises(RuntimeError, match="No operations were successfully partitioned"):
        torch_neuron.trace(lambda x: torch.sort(x, dim=1)[0], x_of())
    with pytest.raises(NotImplementedError):
        torch_neuronx.trace(mlp(), x_of(), input_output_aliases={0: 0})


def test_analyses_count_what_the_target_takes() -> None:
    found = torch_neuronx.analyze(Sorting().eval(), x_of())
    assert found["support_percentage"] != "100.00%"
    assert found["unsupported_operators"][0]["kind"].startswith("onnx::")
    assert found["unsupported_operators"][0]["opGraph"], "no reason"
    report = torch_neuron.analyze_model(Sorting().eval(), x_of())
    assert 0 < report["percent_supported"] < 100
    assert report["supported_count"] + len(found["unsupported_operators"]) == report["total_count"]
    assert torch_neuron.is_available()


# Cores


def devices(traced: Any) -> list[str]:
    (number,) = numbers_in(traced)
    session = residents.resident(number).session
    return [] if session is None else [name for one in session.stats().replicas for name in one.devices]


def test_a_trace_holds_no_core_until_it_is_called_and_a_loaded_one_does(tmp_path: Path) -> None:
    traced = torch_neuronx.trace(mlp(), x_of())
    assert devices(traced) == []
    torch.jit.save(traced, tmp_path / "m.pt")
    assert devices(torch.jit.load(tmp_path / "m.pt")) == ["neuron:0"]
    torch_neuronx.lazy_load(traced)
    torch.jit.save(traced, tmp_path / "lazy.pt")
    lazy = torch.jit.load(tmp_path / "lazy.pt")
    assert devices(lazy) == []
    lazy(x_of())
    assert devices(lazy) != []


@pytest.mark.parametrize("sdk", [torch_neuronx, torch_neuronx.experimental, torch_neuron.experimental])
def test_programs_are_placed_where_they_are_wanted(tmp_path: Path, sdk: Any) -> None:
    traced = torch_neuronx.trace(mlp(), x_of())
    torch.jit.save(traced, tmp_path / "m.pt")
    for context, wanted in (
        (sdk.neuron_cores_context(start_nc=1), ["neuron:1"]),
        (sdk.neuron_cores_context(start_nc=0, nc_count=2), ["neuron:0", "neuron:1"]),
        (sdk.multicore_context(), ["neuron:0", "neuron:1"]),
        (contextlib.nullcontext(), ["neuron:0"]),
    ):
        with context:
            assert devices(torch.jit.load(tmp_path / "m.pt")) == wanted
        gc.collect()
    sdk.set_neuron_cores(traced, start_nc=1, nc_count=1)
    assert devices(traced) == ["neuron:1"]
    sdk.set_multicore(traced)
    assert devices(traced) == ["neuron:0", "neuron:1"]
    close(traced(x_of()), mlp()(x_of()))
    sdk.set_neuron_cores(mlp())  # a module that was not traced: nothing happens
    with pytest.raises(ValueError, match="nc_count"):
        sdk.set_neuron_cores(traced, nc_count=0)
    with pytest.raises(RuntimeError, match=r"NeuronCore\(s\) not available - Requested:nc2-nc2 Available:2") as caught:
        sdk.set_neuron_cores(traced, start_nc=2)
    assert isinstance(caught.value.__cause__, CoresUnavailable)


def test_more_programs_than_cores_take_turns() -> None:
    traced = [torch_neuronx.trace(mlp(), x_of()) for _ in range(3)]
    expected = mlp()(x_of())
    for _ in range(2):
        for one in traced:
            close(one(x_of()), expected)
    assert [bool(devices(one)) for one in traced] == [False, True, True], "the longest unused one left its core"


def test_cores_of_a_session_are_not_taken(tmp_path: Path) -> None:
    import accelrt

    traced = torch_neuronx.trace(mlp(), x_of())
    artifact = residents.resident(numbers_in(traced)[0]).artifact
    with accelrt.load(artifact, devices="0-1"), pytest.raises(RuntimeError, match="Held: neuron:0 by session"):
        traced(x_of())
    close(traced(x_of()), mlp()(x_of()))


def test_data_parallel_splits_joins_and_places() -> None:
    traced = torch_neuronx.trace(mlp(), x_of())
    parallel = torch_neuronx.DataParallel(traced, device_ids=["nc:0", 1])
    assert parallel.num_workers == 4
    assert devices(traced) == ["neuron:0", "neuron:1"]
    for rows in (1, 4, 13):
        close(parallel(x_of(rows)), mlp()(x_of(rows)))
    parallel.split_size = 2
    close(parallel(x_of(7)), mlp()(x_of(7)))
    parallel.split_size = None
    parallel.disable_dynamic_batching()
    close(parallel(x_of(8)), mlp()(x_of(8)))
    with pytest.raises(RuntimeError, match="Incorrect tensor shape"):
        parallel(x_of(6))
    for ids, text in (([0, 0], "each once"), (["core"], "nc:0"), ([], "at least one")):
        with pytest.raises(ValueError, match=text):
            torch_neuronx.DataParallel(traced, device_ids=ids)
    with pytest.raises(ValueError, match="holds no program"):
        torch_neuronx.DataParallel(mlp())
    with pytest.raises(RuntimeError, match="Requested:nc5-nc5"):
        torch_neuron.DataParallel(traced, device_ids=[5])


# Other targets


def test_placement_and_casts_mean_nothing_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELRT_BACKEND", "cpu")
    traced = torch_neuronx.trace(mlp(), x_of(), compiler_args="--auto-cast matmult")
    torch_neuronx.set_neuron_cores(traced, 3, 1)
    close(traced(x_of()), mlp()(x_of()), 1e-5)
    close(torch_neuronx.DataParallel(traced)(x_of(9)), mlp()(x_of(9)), 1e-5)
    assert "auto_cast=matmult" in caplog.text
    assert "placement has no effect" in caplog.text


def test_programs_that_run_code_are_loaded_from_a_file_only_if_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELRT_BACKEND", "cpu/torch")
    traced = torch_neuronx.trace(mlp(), x_of())
    close(traced(x_of()), mlp()(x_of()), 1e-5)
    torch.jit.save(traced, tmp_path / "m.pt")
    with pytest.raises(RuntimeError, match="UntrustedProgram"):
        torch.jit.load(tmp_path / "m.pt")
    monkeypatch.setenv("ACCELRT_TRUST", "1")
    close(torch.jit.load(tmp_path / "m.pt")(x_of()), mlp()(x_of()), 1e-5)


def test_casts_are_the_precision_on_neuron() -> None:
    def precision(**arguments: Any) -> list[str]:
        (number,) = numbers_in(torch_neuronx.trace(mlp(), x_of(), **arguments))
        return [one.precision for one in residents.resident(number).artifact.placement.segments]

    assert precision() == ["fp32"], "neuronx-cc casts nothing by default since SDK 2.27"
    assert precision(compiler_args=["--auto-cast", "all"]) == ["bf16"]
    assert precision(compiler_args="--auto-cast=matmult --auto-cast-type=fp16") == ["fp16"]


def test_a_program_can_be_made_of_any_artifact() -> None:
    import accelrt

    script = program_of(accelrt.compile(mlp(), example_inputs=(x_of(),)))
    close(script([x_of()]), [mlp()(x_of())])


# Flags


@pytest.mark.parametrize(
    ("arguments", "precision", "options", "rest"),
    [
        (None, "fp32", {}, ()),
        ("--auto-cast none --auto-cast-type fp16", "fp32", {}, ()),
        (["--auto-cast", "all", "--auto-cast-type", "tf32"], "bf16", {"auto_cast_type": "tf32"}, ()),
        ("--target=trn1 -O1 -lnc 2", "fp32", {"target": "trn1", "optlevel": 1, "lnc": 2}, ()),
        ("--verbose debug --enable-x", "fp32", {}, ("--verbose", "debug", "--enable-x")),
    ],
)
def test_flags_of_neuronx_cc(arguments: Any, precision: str, options: Any, rest: Any) -> None:
    found = neuronx_flags(arguments)
    assert (found.precision, dict(found.options), found.rest) == (precision, options, rest)


@pytest.mark.parametrize(
    ("arguments", "precision", "options"),
    [
        (None, "bf16", {}),
        (["--fast-math", "none"], "bf16", {"auto_cast": "matmult"}),
        (["--fast-math", "fp32-cast-all-fp16"], "fp16", {}),
        (["--fast-math", "fp32-cast-matmult-fp16 no-fast-relayout"], "fp16", {"auto_cast": "matmult"}),
        (["--fast-math", "no-fast-relayout"], "bf16", {}),
        ("--fast-math none --fp32-cast all", "bf16", {}),
        (["--neuroncore-pipeline-cores", "4"], "bf16", {"pipeline_cores": 4}),
    ],
)
def test_flags_of_neuron_cc(arguments: Any, precision: str, options: Any) -> None:
    found = neuron_cc_flags(arguments)
    assert (found.precision, dict(found.options)) == (precision, options)


@pytest.mark.parametrize("text", ["all", "--auto-cast some", "--auto-cast", "-O fast", "--auto-cast all none"])
def test_flags_with_unknown_values_are_value_errors(text: str) -> None:
    with pytest.raises(ValueError):
        neuronx_flags(text)


def test_nothing_is_brought_in_before_it_is_used() -> None:
    code = "import accelrt.compat.neuron, sys; print([m for m in ('torch', 'tensorflow') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert importlib.import_module("accelrt.compat.neuron").__doc__


# Weights


def test_weights_outside_a_program_are_replaced_in_files_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Linear(8, 3)
    ).eval()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for one in second.parameters():
            one.add_(torch.randn_like(one))
        second[1].running_mean.add_(1.0)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    traced = torch_neuronx.trace(first, x, inline_weights_to_neff=False)
    close(traced(x), first(x))
    torch_neuronx.replace_weights(traced, second)
    close(traced(x), second(x))
    assert not torch.allclose(first(x), second(x), atol=0.2), "otherwise nothing is shown"
    torch.jit.save(traced, tmp_path / "second.pt")
    restored = torch.jit.load(tmp_path / "second.pt")
    close(restored(x), second(x))
    torch_neuronx.replace_weights(restored, first.state_dict())
    close(restored(x), first(x))
    torch_neuronx.replace_weights(restored, {"3.bias": first[3].bias + 100})
    close(restored(x), first(x) + 100, atol=0.5)
    with pytest.raises(ValueError, match=r"3\.bias is \(4,\), and was \(3,\)"):
        torch_neuronx.replace_weights(restored, {"3.bias": torch.ones(4)})
    with pytest.raises(TypeError, match="state_dict"):
        torch_neuronx.replace_weights(restored, 3)


def test_weights_inside_a_program_stay_and_a_warning_says_so() -> None:
    traced = torch_neuronx.trace(mlp(), x_of())
    with pytest.warns(UserWarning, match="inline_weights_to_neff=False"):
        torch_neuronx.replace_weights(traced, mlp().state_dict())


# Buckets


def _fit(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Fill a sentence up to 4 or 8 words."""
    length = tensors[0].shape[1]
    index, size = 0, 4
    if length > 4:
        index, size = 1, 8
    filled = [torch.nn.functional.pad(one, [0, size - length]) for one in tensors]
    return filled, torch.tensor([index])


def kernel(*_: Any) -> Any:
    return torch.jit.script(_fit)


class Words(torch.nn.Module):  # type: ignore[misc]
    """Sums the vectors of the words that the mask shows, in the scale that the test asks for."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out, self.scale = torch.nn.Embedding(10, 6), torch.nn.Linear(6, 3), scale

    def forward(self, ids: Any, mask: Any) -> Any:
        total = (self.words(ids) * mask.unsqueeze(-1).to(torch.float32)).sum(1)
        return {"scores": self.out(total) * self.scale, "count": mask.sum(1)}


def sentence(length: int) -> tuple[Any, Any]:
    ids = torch.arange(length).unsqueeze(0) % 10
    return ids, torch.ones_like(ids)


def test_buckets_choose_the_program_of_each_call(tmp_path: Path) -> None:
    config = torch_neuronx.BucketModelConfig(kernel, func_kwargs=[{"scale": 1.0}, {"scale": 10.0}])
    examples = [sentence(4), sentence(8)]
    traced = torch_neuronx.bucket_model_trace(lambda scale: (Words(scale).eval(), {}), examples, config)
    torch.jit.save(traced, tmp_path / "buckets.pt")
    for module in (traced, torch.jit.load(tmp_path / "buckets.pt")):
        assert len(numbers_in(module)) == 2
        for length, scale in ((2, 1.0), (4, 1.0), (5, 10.0), (8, 10.0), (3, 1.0)):
            found, expected = module(*sentence(length)), Words(scale)(*sentence(length))
            close(found["scores"], expected["scores"], atol=0.2)
            assert found["count"].tolist() == [length]
    with pytest.raises(RuntimeError, match="Incorrect tensor shape"):
        traced(*(one.repeat(2, 1) for one in sentence(3)))


def test_what_buckets_refuse() -> None:
    made = (mlp(), {})
    one = [(x_of(),)]
    config = torch_neuronx.BucketModelConfig(kernel)
    for arguments, error in (
        ((lambda: made, [], config), ValueError),
        ((lambda: made, one, kernel), TypeError),
        ((lambda: mlp(), one, config), TypeError),
        ((lambda: (mlp(), {"state": 0}), one, config), NotImplementedError),
        (
            (lambda: made, one, torch_neuronx.BucketModelConfig(kernel, shared_state_buffer=[x_of()])),
            NotImplementedError,
        ),
        ((lambda: made, one, torch_neuronx.BucketModelConfig(lambda: _fit)), TypeError),
        ((lambda: made, one, torch_neuronx.BucketModelConfig(kernel, func_kwargs=[{}, {}])), ValueError),
    ):
        with pytest.raises(error):
            torch_neuronx.bucket_model_trace(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="by name"):
        torch_neuronx.BucketModelConfig(kernel, None)
    with pytest.raises(TypeError, match="scripted function"):
        torch_neuronx.BucketModelConfig(3)  # type: ignore[arg-type]


# Cores of TensorFlow's programs


@pytest.mark.tensorflow
def test_tensorflows_programs_go_where_they_are_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tf = pytest.importorskip("tensorflow")
    tfn = importlib.import_module("accelrt.compat.neuron.tensorflow_neuron")
    monkeypatch.setenv("ACCELRT_NEURON_EMULATE", "inf1.xlarge")
    weights = tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])

    def places(model: Any) -> list[tuple[str, ...]]:
        session = residents.resident(model._number).session
        return [] if session is None else [one.devices for one in session.stats().replicas]

    x = tf.ones([2, 3])
    model = tfn.trace(lambda x: x @ weights, x)
    several = tfn.auto_multicore(model, x, num_cores=2)
    assert isinstance(several, tfn.AwsMulticoreNeuronModel) and places(several) == []
    assert bool(tf.reduce_all(several(x) == x @ weights))
    assert places(several) == [("neuron:0",), ("neuron:1",)]
    several.save(tmp_path / "several")
    del several
    restored = tfn.load_model(tmp_path / "several")
    restored(x)
    assert isinstance(restored, tfn.AwsMulticoreNeuronModel) and len(places(restored)) == 2
    with pytest.raises(ValueError, match="Invalid model is not AwsNeuronModel"):
        tfn.auto_multicore(lambda x: x, x)
    with pytest.raises(ValueError, match="num_cores"):
        tfn.auto_multicore(model, x, num_cores=0)
    del restored

    model.save(tmp_path / "bound")
    monkeypatch.setenv("NEURONCORE_GROUP_SIZES", "1,2,1")
    with caplog.at_level("WARNING", logger="accelrt"):
        tfn.saved_model.inspect_core_binding(tmp_path / "bound")
        assert "does not bind" in caplog.text
        tfn.saved_model.set_core_binding(tmp_path / "bound", [2])
        tfn.saved_model.inspect_core_binding(tmp_path / "bound")
        assert "binds to NeuronCore Group index 2" in caplog.text
    bound = tfn.load_model(tmp_path / "bound")
    bound(x)
    assert places(bound) == [("neuron:3",)]
    tfn.saved_model.set_core_binding(tmp_path / "bound", [3])
    with pytest.raises(RuntimeError, match="NeuronCore Group 3"):
        tfn.load_model(tmp_path / "bound")(x)
    tfn.saved_model.set_core_binding(tmp_path / "bound", [-1])
    tfn.load_model(tmp_path / "bound")(x)
    with pytest.raises(ValueError, match="numbers of groups"):
        tfn.saved_model.set_core_binding(tmp_path / "bound", ["0"])
    with pytest.raises(ValueError, match="holds no program"):
        tfn.saved_model.set_core_binding(tmp_path, [0])
