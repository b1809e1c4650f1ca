"""PyTorch sources: what is recognised, and that what is exported computes what eager torch computes."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

from accelrt.errors import SourceError  # noqa: E402
from accelrt.sources.request import SourceOptions, SourceRequest  # noqa: E402
from accelrt.sources.torch import recognises, recognises_file, to_onnx  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # torch would rather have TorchScript gone; models in it are there all the same.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def request(examples: Any = None, **options: Any) -> SourceRequest:
    return SourceRequest(example_inputs=examples, options=SourceOptions(**options))


def run(model: ir.Model, *inputs: Any) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    assert len(names) == len(inputs)
    feeds = {name: np.asarray(value) for name, value in zip(names, inputs, strict=True)}
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))


def same(found: np.ndarray, expected: Any) -> None:
    expected = expected.detach().numpy()
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def names(values: Any) -> list[str]:
    return [value.name for value in values]


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.conv(image)).relu().mean((2, 3))))


class Wrap(nn.Module):
    """Runs a function as a module with a weight."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Any, y: Any = None, flag: bool = True) -> Any:
        return self.function(self, x, y, flag)


class Branches(nn.Module):
    """Control flow that depends on data, which tracing would bake in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.linear(x) if bool(x.sum() > 0) else x - 1
        steps = torch.zeros([], dtype=torch.int64)
        while bool(x.abs().sum() < limit):
            x = x * 2
            steps = steps + 1
        return x, steps


class Defaults(nn.Module):
    def forward(self, x: torch.Tensor, times: int = 3, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is not None:
            x = x + bias
        return x * times


@pytest.fixture
def cnn() -> Any:
    torch.manual_seed(0)
    module = Cnn()
    with torch.no_grad():  # statistics that differ from the initial ones, so that a training-mode export would show
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2)
    return module.eval()


@pytest.fixture
def image() -> Any:
    return torch.randn(2, 3, 8, 8)


# What is recognised


def test_objects_of_torch_are_recognised(cnn: Any, image: Any) -> None:
    assert recognises(cnn)
    assert recognises(torch.export.export(cnn, (image,)))
    assert recognises(torch.jit.trace(cnn, image))
    assert recognises(torch.jit.script(_double))
    assert not any(recognises(other) for other in ("model.onnx", None, torch.zeros(1), cnn.forward, Cnn))


def test_nothing_is_recognised_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch, cnn: Any) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    assert not recognises(cnn)
    assert "torch" not in sys.modules


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_files_are_told_by_their_content(tmp_path: Path, cnn: Any, image: Any) -> None:
    """Every suffix here is misleading or absent."""
    path = tmp_path / "model.bin"
    torch.jit.trace(cnn, image).save(path)
    assert recognises_file(path) == "torchscript"
    torch.export.save(torch.export.export(cnn, (image,)), tmp_path / "p.pt2")
    (tmp_path / "p.pt2").replace(path)
    assert recognises_file(path) == "exported-program"
    for content in (cnn.state_dict(), cnn):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            assert recognises_file(path) == "pickle"
    path.write_bytes(pickle.dumps({"weights": [1.0]}))
    assert recognises_file(path) == "pickle"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.5")
        archive.writestr("serialized_exported_program.json", "{}")
    assert recognises_file(path) == "exported-program"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/data/aotinductor/model/a.so", "")
    assert recognises_file(path) == "aoti-package"


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02", b"\x80\x04\xff\xff", b"PK\x03\x04 no zip", b"\x08\x0a"])
def test_other_files_are_none_of_these(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert recognises_file(path) is None
    with pytest.raises(SourceError, match="not a PyTorch file"):
        to_onnx(path, request())


def test_other_zips_and_missing_files_are_none_of_these(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("word/document.xml", "")
    assert recognises_file(tmp_path / "model.pt") is None
    assert recognises_file(tmp_path / "absent.pt") is None
    assert recognises_file(tmp_path) is None


# Modules


def test_a_cnn_is_exported_in_eval_mode_and_left_in_training_mode(cnn: Any, image: Any) -> None:
    expected = cnn(image)
    cnn.train()
    cnn.norm.eval()  # as fine-tuning does: the flags differ from part to part
    model = to_onnx(cnn, request((image,)))
    assert (cnn.training, cnn.norm.training, cnn.drop.training) == (True, False, True)
    assert names(model.graph.inputs) == ["image"] and names(model.graph.outputs) == ["output"]
    same(run(model, image)["output"], expected)


def test_the_training_flags_come_back_after_a_failure(cnn: Any) -> None:
    cnn.train()
    with pytest.raises(SourceError):
        to_onnx(cnn, request((torch.randn(1, 7),)))
    assert all(module.training for module in cnn.modules())


class _Dlpack:
    """Speaks DLPack and nothing else."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.tensor.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize(
    "give",
    [
        lambda x: (x,),
        lambda x: [x],
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: {"image": x},
        lambda x: {"image": x.numpy()},
        lambda x: _Dlpack(x),
    ],
    ids=["tuple", "list", "tensor", "array", "mapping", "mapping-of-arrays", "dlpack"],
)
def test_examples_come_in_many_forms(cnn: Any, image: Any, give: Any) -> None:
    model = to_onnx(cnn, request(give(image)))
    same(run(model, image)["output"], cnn(image))


def test_a_module_wrapped_by_torch_compile_is_exported(cnn: Any, image: Any) -> None:
    same(run(to_onnx(torch.compile(cnn), request((image,))), image)["output"], cnn(image))


def test_weights_are_shared_with_the_module_not_copied(cnn: Any, image: Any) -> None:
    weight = to_onnx(cnn, request((image,))).graph.initializers["head.weight"].const_value
    assert weight.numpy().ctypes.data == cnn.head.weight.data_ptr()


def test_several_inputs_and_outputs() -> None:
    module = Wrap(lambda self, x, y, flag: (x + y * self.weight, x - y, (x * y).sum()))
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    model = to_onnx(module, request((x, y)))
    assert names(model.graph.inputs) == ["x", "y"]
    found = run(model, x, y)
    assert list(found) == ["output_0", "output_1", "output_2"]
    for array, expected in zip(found.values(), module(x, y), strict=True):
        same(array, expected)


def test_inputs_by_name_come_in_the_order_of_the_parameters() -> None:
    module = Wrap(lambda self, x, y, flag: x - y if flag else x)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    model = to_onnx(module, request({"flag": True, "y": y, "x": x}))
    assert names(model.graph.inputs) == ["x", "y"]
    same(run(model, x, y)["output"], x - y)


def test_one_tensor_given_for_two_inputs_is_two_inputs() -> None:
    module = Wrap(lambda self, x, y, flag: x - 2 * y)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    model = to_onnx(module, request((x, x)))
    same(run(model, x, y)["output"], x - 2 * y)


def test_integer_and_bool_inputs_keep_their_types() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.table(ids) * mask[..., None]

    module = Embed()
    ids, mask = np.array([[1, 2, 9]]), np.array([[True, False, True]])
    model = to_onnx(module, request((ids, mask)))
    assert [value.dtype for value in model.graph.inputs] == [ir.DataType.INT64, ir.DataType.BOOL]
    same(run(model, ids, mask)["output"], module(torch.tensor(ids), torch.tensor(mask)))


class Pair(NamedTuple):
    mean: Any
    spread: Any


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda self, x, y, flag: {"feat": x + 1, "pooled": x.sum(0)}, ["feat", "pooled"]),
        (lambda self, x, y, flag: {"a": [x + 1, x + 2], "b": {"c": x}}, ["a_0", "a_1", "b_c"]),
        (lambda self, x, y, flag: {"x": x * 2, "z": x}, ["x_output", "z"]),
        (lambda self, x, y, flag: (x * 2, None), ["output"]),
        (lambda self, x, y, flag: {"a": x * 2, "b": None, "c": x}, ["a", "c"]),
        (lambda self, x, y, flag: [x * 2], ["output"]),
        (lambda self, x, y, flag: (x, x + 1, x), ["output_0", "output_1", "output_2"]),
        (lambda self, x, y, flag: (lambda z: (z, z))(x + 1), ["output_0", "output_1"]),
        (lambda self, x, y, flag: (self.weight, x * self.weight), ["output_0", "output_1"]),
        (lambda self, x, y, flag: (x + 1, (x + 2, {"k": x + 3})), ["output_0", "output_1_0", "output_1_1_k"]),
    ],
)
def test_outputs_are_named_after_what_the_module_returns(function: Any, expected: list[str]) -> None:
    module, x = Wrap(function), torch.randn(2, 4)
    model = to_onnx(module, request((x,)))
    assert names(model.graph.inputs) == ["x"]
    found = run(model, x)
    assert list(found) == expected
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(module(x)) if leaf is not None]
    for array, leaf in zip(found.values(), leaves, strict=True):
        same(array, leaf)


def test_a_nested_last_input_is_not_taken_for_keyword_arguments() -> None:
    module = Wrap(lambda self, x, y, flag: x + y["q"] * y["z"])
    x, q, z = (torch.randn(2, 4) for _ in range(3))
    model = to_onnx(module, request((x, {"q": q, "z": z})))
    same(run(model, x, q, z)["output"], x + q * z)


@pytest.mark.parametrize("shapes", [{"image": {0: "batch"}}, ({0: torch.export.Dim("batch", min=1)},), [{0: "batch"}]])
def test_dimensions_asked_to_stay_open_do(cnn: Any, image: Any, shapes: Any) -> None:
    model = to_onnx(cnn, request((image,), dynamic_shapes=shapes))
    assert str(model.graph.inputs[0].shape[0]) == str(model.graph.outputs[0].shape[0]) == "batch"
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        same(run(model, x)["output"], cnn(x))


@pytest.mark.parametrize("dim", ["batch", torch.export.Dim("batch")])
def test_a_dimension_that_cannot_stay_open_is_refused(dim: Any) -> None:
    module = Wrap(lambda self, x, y, flag: x.reshape(2, 2, 2))
    with pytest.raises(SourceError, match=r"static|fixes it to 2"):
        to_onnx(module, request((torch.randn(2, 4),), dynamic_shapes={"x": {0: dim}}))


def test_the_opset_asked_for_is_the_opset_written(cnn: Any, image: Any) -> None:
    for opset in (18, 21):
        model = to_onnx(cnn, request((image,), opset=opset))
        assert model.opset_imports[""] == opset
        same(run(model, image)["output"], cnn(image))


def test_control_flow_on_data_is_refused_with_the_way_out(capfd: pytest.CaptureFixture[str]) -> None:
    module = Wrap(lambda self, x, y, flag: x + 1 if x.sum() > 0 else x - 1)
    with pytest.raises(SourceError, match="data-dependent") as caught:
        to_onnx(module, request((torch.randn(2, 4),)))
    assert "torch.jit.script" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert capfd.readouterr() == ("", "")


def test_export_is_quiet_and_leaves_logging_as_it_was(
    cnn: Any, image: Any, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    level, script = logging.getLogger("torch").level, torch.jit.script(cnn)
    recwarn.clear()
    to_onnx(cnn, request((image,)))
    to_onnx(script, request((image,)))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert logging.getLogger("torch").level == level


# Names


def test_names_asked_for_are_given_and_do_not_clash_with_inner_ones(cnn: Any, image: Any) -> None:
    inner = next(iter(to_onnx(cnn, request((image,))).graph)).outputs[0].name
    wanted = SourceRequest((image,), input_names=["pixels"], output_names=[str(inner)])
    for module in (cnn, torch.jit.script(cnn)):
        model = to_onnx(module, wanted)
        assert names(model.graph.inputs) == ["pixels"] and names(model.graph.outputs) == [inner]
        same(run(model, image)[str(inner)], cnn(image))
    weight = replace(wanted, output_names=["head.weight"])
    same(run(to_onnx(cnn, weight), image)["head.weight"], cnn(image))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"input_names": ["a", "b"]},
            r"2 input names were given \(a, b\), and the model has 1 inputs \(image\)",
        ),
        ({"output_names": []}, r"0 output names were given \(\), and the model has 1 outputs \(output\)"),
        (
            {"input_names": ["a"], "output_names": ["a"]},
            "a is asked for as an input's name and as an output's",
        ),
    ],
)
def test_names_that_do_not_fit_are_refused(cnn: Any, image: Any, chosen: Mapping[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        to_onnx(cnn, SourceRequest((image,), **chosen))


# Exported programs


def test_an_exported_program_needs_no_examples_and_keeps_open_dimensions(tmp_path: Path, cnn: Any, image: Any) -> None:
    program = torch.export.export(cnn, (image,), dynamic_shapes={"image": {0: torch.export.Dim("batch", max=64)}})
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    for source in (program, path):
        model = to_onnx(source, request())
        symbol = model.graph.inputs[0].shape[0]
        assert isinstance(symbol, ir.SymbolicDim) and symbol.value == model.graph.outputs[0].shape[0].value
        assert names(model.graph.inputs) == ["image"] and names(model.graph.outputs) == ["output"]
        for batch in (1, 5):
            x = torch.randn(batch, 3, 8, 8)
            same(run(model, x)["output"], cnn(x))
    named = to_onnx(program, request(dynamic_shapes={"image": {0: "batch"}}))
    assert str(named.graph.inputs[0].shape[0]) == "batch"


def test_a_loaded_program_keeps_the_keys_of_its_outputs(tmp_path: Path) -> None:
    module, x = Wrap(lambda self, x, y, flag: {"feat": x + 1, "pooled": x.sum(0)}), torch.randn(2, 4)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "m.pt2")
    found = run(to_onnx(tmp_path / "m.pt2", request()), x)
    assert list(found) == ["feat", "pooled"]
    same(found["pooled"], x.sum(0))


def test_an_aotinductor_package_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/models/model.json", "{}")
        archive.writestr("m/data/aotinductor/model/a.so", "")
    with pytest.raises(SourceError, match="AOTInductor"):
        to_onnx(path, request())


def _alter(path: Path, member: str, change: Any) -> None:
    """Rewrite one member of a ``.pt2`` file with torch's own writer, as its reader wants records aligned."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in members.items():
        if not name.startswith(".data") and name != "byteorder":
            content = change(content) if name == member else content
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()


class _Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def _program_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),), dynamic_shapes=({0: torch.export.Dim("b")},))
    torch.export.save(program, path)
    return path


def test_no_pickle_inside_a_program_is_run(tmp_path: Path) -> None:
    path, mark = _program_file(tmp_path), tmp_path / "ran"
    torch.save((_Bomb(mark),), tmp_path / "bomb")
    bomb = (tmp_path / "bomb").read_bytes()
    _alter(path, "data/sample_inputs/model.pt", lambda _: bomb)
    with pytest.raises(SourceError, match="cannot be loaded"):
        to_onnx(path, request())
    assert not mark.exists()


@pytest.mark.parametrize("member", ["opaque_obj_0", "CUSTOM_obj_0"])
def test_pickled_objects_inside_a_program_are_refused(tmp_path: Path, member: str) -> None:
    path = _program_file(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"model/data/constants/{member}", b"")
    with pytest.raises(SourceError, match="pickled object"):
        to_onnx(path, request())


def test_no_expression_inside_a_program_is_evaluated(tmp_path: Path) -> None:
    path, mark = _program_file(tmp_path), tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"

    def change(content: bytes) -> bytes:
        text = content.decode()
        start = text.index('"expr_str": ') + len('"expr_str": ')
        return (text[:start] + json.dumps(code) + text[text.index('"', start + 1) + 1 :]).encode()

    _alter(path, "models/model.json", lambda content: content)
    to_onnx(path, request())  # rewritten as it was, the file is fine
    _alter(path, "models/model.json", change)
    with pytest.raises(SourceError, match="not plain arithmetic"):
        to_onnx(path, request())
    assert not mark.exists()


# TorchScript


def test_a_scripted_module_keeps_its_control_flow(tmp_path: Path) -> None:
    script = torch.jit.script(Branches())
    script.save(tmp_path / "branches.pt")
    examples = request((torch.ones(2, 4), torch.tensor(50.0)))
    up, down = torch.full((2, 4), 0.7), torch.full((2, 4), -0.7)
    assert (up.sum() > 0) != (down.sum() > 0)
    for source in (script, tmp_path / "branches.pt"):
        model = to_onnx(source, examples)
        assert names(model.graph.inputs) == ["x", "limit"]
        assert {"If", "Loop"} <= {node.op_type for node in model.graph}
        counts = set()
        for x in (up, down):
            for limit in (torch.tensor(1e-6), torch.tensor(50.0), torch.tensor(1e4)):
                found, (value, steps) = run(model, x, limit), script(x, limit)
                same(found["output_0"], value)
                same(found["output_1"], steps)
                counts.add(int(steps))
        assert len(counts) > 2


def test_a_traced_module_and_its_file(tmp_path: Path, cnn: Any, image: Any) -> None:
    traced = torch.jit.trace(cnn, image)
    traced.save(tmp_path / "cnn.pt")
    for source in (traced, tmp_path / "cnn.pt"):
        model = to_onnx(source, request((image,), dynamic_shapes={"image": {0: "batch"}}))
        assert names(model.graph.inputs) == ["image"] and names(model.graph.outputs) == ["output"]
        assert str(model.graph.inputs[0].shape[0]) == "batch"
        for batch in (1, 5):
            x = torch.randn(batch, 3, 8, 8)
            same(run(model, x)["output"], cnn(x))


def test_a_scripted_module_is_exported_in_eval_mode_and_left_in_training_mode(cnn: Any, image: Any) -> None:
    expected = cnn(image)
    script = torch.jit.script(cnn.train())
    same(run(to_onnx(script, request((image,))), image)["output"], expected)
    assert script.training and script.drop.training


def test_parameters_left_out_keep_their_defaults() -> None:
    script, x, bias = torch.jit.script(Defaults()), torch.randn(2, 4), torch.randn(4)
    model = to_onnx(script, request((x,)))
    assert names(model.graph.inputs) == ["x"]
    same(run(model, x)["output"], x * 3)
    model = to_onnx(script, request({"bias": bias, "x": x}))
    assert names(model.graph.inputs) == ["x", "bias"]
    same(run(model, x, bias)["output"], (x + bias) * 3)


def test_frozen_modules_and_script_functions(cnn: Any, image: Any) -> None:
    frozen = torch.jit.freeze(torch.jit.script(cnn))
    same(run(to_onnx(frozen, request((image,))), image)["output"], cnn(image))
    model = to_onnx(torch.jit.script(_double), request((image,)))
    assert names(model.graph.inputs) == ["x"]
    same(run(model, image)["output"], image * 2)


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        (None, {}, r"no example_inputs were given.*example_inputs=\("),
        ({"limit": torch.tensor(1.0)}, {}, "lack x"),
        ({"x": torch.ones(2, 4), "limt": 1.0}, {}, "takes x, limit, and the example inputs hold limt"),
        ((torch.ones(1),) * 3, {}, "takes x, limit, and the example inputs hold 3"),
        ((torch.ones(2, 4), torch.tensor(1.0)), {"opset": 23}, "opset 20 at most"),
        (
            (torch.ones(2, 4), torch.tensor(1.0)),
            {"dynamic_shapes": {"y": {0: "b"}}},
            "names y; the inputs .* are x, limit",
        ),
    ],
)
def test_what_does_not_fit_a_script_is_refused(examples: Any, options: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        to_onnx(torch.jit.script(Branches()), request(examples, **options))


def test_what_the_script_exporter_cannot_write_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    class Keyed(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"a": x + 1}

    with pytest.raises(SourceError, match="DictConstruct") as caught:
        to_onnx(torch.jit.script(Keyed()), request((torch.ones(2),)))
    assert "dictionaries" in str(caught.value)
    assert capfd.readouterr() == ("", "")


# What is refused


def test_missing_examples_are_asked_for_with_a_line_of_code(cnn: Any) -> None:
    with pytest.raises(SourceError, match=r"the Cnn .*\(image\).*no example_inputs.*example_inputs=\("):
        to_onnx(cnn, request())


class _Armed(nn.Module):
    """A module whose pickle runs code."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.bomb = _Bomb(mark)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_and_never_run(tmp_path: Path, zipped: bool, cnn: Any) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "ran"
    torch.save(cnn.state_dict(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SourceError, match="never loaded"):
        to_onnx(path, request())
    torch.save(_Armed(mark), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SourceError, match=r"never loaded.*torch\.jit\.script"):
        to_onnx(path, request())
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the proof is worth something only if the pickle is live
    assert mark.exists()


@pytest.mark.parametrize("package", ["torch", "onnxscript"])
def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, cnn: Any, image: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(cnn, (image,)), path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SourceError, match=rf"needs {package}.*pip install 'accelrt\[torch\]'"):
        to_onnx(path, request())


def test_a_damaged_file_is_an_error_of_ours(tmp_path: Path, cnn: Any, image: Any) -> None:
    path = tmp_path / "model.pt"
    torch.jit.trace(cnn, image).save(path)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("constants.pkl"))
        offset = archive.getinfo(name).header_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(SourceError, match="cannot be loaded"):
        to_onnx(path, request((image,)))


# Models people use


def test_bert_keeps_the_names_of_its_inputs_and_outputs() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37
    )
    module = transformers.BertModel(config).eval()
    ids = torch.randint(0, 99, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    axes = {0: "batch", 1: "sequence"}
    model = to_onnx(
        module,
        request(
            {"input_ids": ids, "attention_mask": mask},
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        ),
    )
    assert names(model.graph.inputs) == ["input_ids", "attention_mask"]
    for x, m in ((ids, mask), (torch.randint(0, 99, (1, 5)), torch.ones(1, 5, dtype=torch.int64))):
        found, expected = run(model, x, m), module(input_ids=x, attention_mask=m)
        assert list(found) == ["last_hidden_state", "pooler_output"]
        same(found["last_hidden_state"], expected.last_hidden_state)
        same(found["pooler_output"], expected.pooler_output)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("ResNetModel", ["last_hidden_state", "pooler_output"]), ("ResNetForImageClassification", ["logits"])],
)
def test_resnet(kind: str, expected: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    module = getattr(transformers, kind)(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    found = run(to_onnx(module, request((pixels,))), pixels)
    assert list(found) == expected
    for name, array in found.items():
        same(array, module(pixels)[name])
