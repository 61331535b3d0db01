"""Every operator against its reference, under everything that torch may do with an operator."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from visionattn_kernels import OPS
from visionattn_kernels.op import NAMESPACE
from visionattn_kernels.testing import (
    CASES,
    RESIZED,
    SHARED,
    Case,
    check,
    error_budget,
    evaluate,
    relative_error,
    widened,
)

ALL = [pytest.param(case, id=f"{case.op} {case}") for cases in CASES.values() for case in cases]
FIRST = [pytest.param(cases[1], id=op) for op, cases in CASES.items()]


def call(case: Case):
    return OPS[case.op].call


def test_every_operator_has_cases():
    assert set(CASES) == set(RESIZED) == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ALL)
def test_results_and_gradients_stay_within_the_error_budget(case, dtype):
    check(case, call(case), dtype)


@pytest.mark.parametrize("case", ALL)
def test_the_decomposition_stays_within_the_error_budget(case):
    check(case, OPS[case.op].decomposition)


# Orders of the axes in memory: as a projection leaves them, as a convolution does, and last axis first.
LAYOUTS = {
    "heads inside": lambda x: x.movedim(1, -2).contiguous().movedim(-2, 1) if x.ndim > 3 else x,
    "channels outside": lambda x: x.movedim(-1, 2).contiguous().movedim(2, -1) if x.ndim > 3 else x,
    "reversed": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FIRST)
def test_any_strides_give_the_same_answer(case, layout):
    def relaid(**arguments):
        tensors = {n: LAYOUTS[layout](x) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        assert not tensors["value"].is_contiguous()
        return call(case)(**tensors)

    check(case, relaid)


@pytest.mark.parametrize("case", FIRST)
def test_an_expanded_gradient_is_as_good_as_a_contiguous_one(case):
    tensors = {n: x for n, x in case.tensors().items() if x.requires_grad}
    out = call(case)(**case.tensors() | tensors, **case.settings)
    one = out.new_ones(())
    expanded, contiguous = (
        torch.autograd.grad(out, list(tensors.values()), g, retain_graph=True)
        for g in (one.expand(out.shape), one.expand(out.shape).contiguous())
    )
    for name, got, want in zip(tensors, expanded, contiguous, strict=True):
        assert relative_error(got, want) <= 4 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("case", FIRST)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(case):
    tensors = case.tensors()
    shared = {n: x for n, x in tensors.items() if n in SHARED}
    empty = {n: x.detach()[:0].requires_grad_(x.requires_grad) for n, x in tensors.items() if n not in SHARED}
    out = call(case)(**shared, **empty, **case.settings)
    out.sum().backward()
    assert out.numel() == 0
    trainable = [x for x in [*shared.values(), *empty.values()] if x.requires_grad]
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in trainable)


@pytest.mark.parametrize("case", FIRST)
def test_gradcheck_passes_in_float64(case):
    tensors = case.tensors(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *xs: call(case)(**dict(zip(tensors, xs, strict=True)), **case.settings),
        tuple(tensors.values()),
        fast_mode=True,
    )


def with_square(case: Case, function):
    """The sum of squares of the result as a function of the trainable tensors, and these in float64."""
    tensors = case.tensors(torch.float64)
    trainable = {n: x for n, x in tensors.items() if x.requires_grad}
    return lambda given: function(**tensors | given, **case.settings).square().sum(), trainable


@pytest.mark.parametrize("case", FIRST)
def test_second_derivatives_are_those_of_the_reference(case):
    found = []
    for function in (call(case), OPS[case.op].reference):
        square, given = with_square(case, function)
        first = torch.autograd.grad(square(given), list(given.values()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(given.values())))
    for name, got, want in zip(given, *found, strict=True):
        assert relative_error(got, want) < 1e-12, name


def test_second_derivatives_of_one_tensor_as_several_arguments_are_those_of_the_reference():
    x = torch.randn(1, 2, 7, 7, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for function in (OPS["neighborhood_attention"].call, OPS["neighborhood_attention"].reference):
        (first,) = torch.autograd.grad(function(x, x, x, kernel_size=3).square().sum(), x, create_graph=True)
        found.append(torch.cat([first.detach(), *torch.autograd.grad(first.square().sum(), x)]))
    assert relative_error(*found) < 1e-12


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # which torch itself uses there
@pytest.mark.parametrize("case", FIRST)
def test_derivatives_in_forward_mode_are_those_of_the_reference(case):
    found = []
    for function in (call(case), OPS[case.op].reference):
        square, given = with_square(case, function)
        given = {n: x.detach() for n, x in given.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # torch's others have none
            found.append(torch.func.jvp(square, (given,), ({n: x.cos() for n, x in given.items()},))[1])
    assert relative_error(*found) < 1e-12


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of torch's own operators under vmap
@pytest.mark.parametrize("case", FIRST)
def test_gradients_of_torch_func_are_those_of_autograd(case):
    square, given = with_square(case, call(case))
    want = [
        torch.autograd.grad(square({n: factor * x for n, x in given.items()}), [*given.values()]) for factor in (1, 2)
    ]
    both = {n: torch.stack([x.detach(), 2 * x.detach()]) for n, x in given.items()}
    got = torch.func.vmap(torch.func.grad(square))(both)
    for name, *gradients in zip(given, *want, strict=True):
        for found, gradient, factor in zip(got[name], gradients, (1, 2), strict=True):
            assert relative_error(found * factor, gradient) < 1e-12, name


@pytest.mark.parametrize("case", FIRST)
def test_autocast_changes_nothing_in_what_is_exported(case, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    want = call(case)(**case.tensors(), **case.settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(case)(**case.tensors(), **case.settings), want)


@pytest.mark.parametrize("case", FIRST)
def test_autocast_changes_nothing_inside_an_operator(case):
    want = evaluate(call(case), case, case.tensors())
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(call(case), case, case.tensors())
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", FIRST)
def test_compiles_without_a_graph_break(case, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(call(case), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sized in [case, RESIZED[case.op]] if dynamic else [case]:
        check(sized, compiled)


class Call(torch.nn.Module):
    """What is exported of a case."""

    def __init__(self, case: Case):
        super().__init__()
        self.case = case

    def forward(self, tensors):
        return call(self.case)(**tensors, **self.case.settings)


WITHOUT_US = """
import sys
sys.modules["visionattn_kernels"] = sys.modules["visionattn"] = None
import torch
for name in sys.argv[2:]:
    inputs = torch.load(name + ".inputs.pt")
    program = eval(sys.argv[1], {"torch": torch, "path": name + ".pt2"})
    torch.save([program(tensors) for tensors in inputs], name + ".outputs.pt")
"""


def export(op: str) -> tuple[torch.export.ExportedProgram, list[dict[str, torch.Tensor]]]:
    """The program of an operator for any size, and inputs of two sizes."""
    case = CASES[op][1]
    inputs = [{n: x.detach() for n, x in sized.tensors().items()} for sized in (case, RESIZED[op])]
    sizes = {
        n: {axis: Dim.DYNAMIC for axis in range(x.ndim) if x.shape[axis] != inputs[1][n].shape[axis]}
        for n, x in inputs[0].items()
    }
    return torch.export.export(Call(case), (inputs[0],), dynamic_shapes=(sizes,)), inputs


def run_without_us(folder: Path, load: str, ops: list[str]) -> dict[str, list[torch.Tensor]]:
    """Outputs of the programs in `folder`, loaded by `load` in a process where our packages do not import."""
    command = [sys.executable, "-W", "error", "-c", WITHOUT_US, load, *ops]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return {op: torch.load(folder / f"{op}.outputs.pt") for op in ops}


def assert_within_budget(op: str, outputs: list[torch.Tensor]) -> None:
    for sized, out in zip((CASES[op][1], RESIZED[op]), outputs, strict=True):
        tensors = sized.tensors()
        want = evaluate(OPS[op].reference, sized, widened(tensors))
        assert relative_error(out, want["out"]) <= error_budget(sized, tensors, want, OPS[op].reference)["out"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Outputs of every operator's exported program."""
    folder = tmp_path_factory.mktemp("exported")
    for op in CASES:
        program, inputs = export(op)
        torch.export.save(program, folder / f"{op}.pt2")
        torch.save(inputs, folder / f"{op}.inputs.pt")
    return run_without_us(folder, "torch.export.load(path).module()", list(CASES))


@pytest.mark.parametrize("op", CASES)
def test_an_exported_program_runs_without_our_packages_at_any_size(op, exported):
    assert_within_budget(op, exported[op])


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_a_program_compiled_ahead_of_time_runs_without_our_packages_at_any_size(op, tmp_path):
    program, inputs = export(op)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / f"{op}.pt2"))
    torch.save(inputs, tmp_path / f"{op}.inputs.pt")
    assert_within_budget(op, run_without_us(tmp_path, "torch._inductor.aoti_load_package(path)", [op])[op])


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("case", FIRST)
def test_fake_tensors_have_shape_and_strides_of_the_result(case, device):
    tensors = case.tensors()
    real = call(case)(**tensors, **case.settings)
    with FakeTensorMode():
        fakes = {n: torch.empty(x.shape, dtype=x.dtype, device=device) for n, x in tensors.items()}
        fake = call(case)(**fakes, **case.settings)
    assert (fake.shape, fake.stride(), fake.device.type) == (real.shape, real.stride(), device)


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of ours, so that forward and backward are checked with the arguments they get."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


# opcheck itself reads the gradient of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("case", FIRST)
def test_opcheck_passes(case):
    with Recorder() as recorder:
        evaluate(call(case), case, case.tensors())
    assert [str(func) for func, *_ in recorder.calls] == [
        f"{NAMESPACE}.{case.op}.default",
        f"{NAMESPACE}.{case.op}_backward.default",
    ]
    (forward, inputs, _), (backward, saved, _) = recorder.calls
    torch.library.opcheck(
        forward, tree_map_only(torch.Tensor, lambda x: x.detach().requires_grad_(x.is_floating_point()), inputs)
    )
    torch.library.opcheck(backward, tree_map_only(torch.Tensor, torch.Tensor.detach, saved))
