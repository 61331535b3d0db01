"""Every operator against its reference, under everything that torch may do with an operator."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from visionattn_kernels import OPS
from visionattn_kernels.op import NAMESPACE
from visionattn_kernels.testing import CASES, Case, check, evaluate, relative_error

ALL = [pytest.param(case, id=f"{case.op} {case}") for cases in CASES.values() for case in cases]
FIRST = [pytest.param(cases[1], id=op) for op, cases in CASES.items()]


def call(case: Case):
    return OPS[case.op].call


def test_every_operator_has_cases():
    assert set(CASES) == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ALL)
def test_results_and_gradients_stay_within_the_error_budget(case, dtype):
    check(case, call(case), dtype)


@pytest.mark.parametrize("case", FIRST)
def test_any_strides_give_the_same_answer(case):
    tensors = case.tensors()
    want = evaluate(call(case), case, tensors)
    strided = {
        n: x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for n, x in tensors.items()
    }
    assert not any(x.is_contiguous() for x in strided.values())
    got = evaluate(call(case), case, strided)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("case", FIRST)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(case):
    tensors = case.tensors()
    empty = {n: x.detach()[:0].requires_grad_() if n != "bias" else x for n, x in tensors.items()}
    out = call(case)(**empty, **case.settings)
    out.sum().backward()
    assert out.numel() == 0
    assert not tensors["bias"].grad.any()


@pytest.mark.parametrize("case", FIRST)
def test_gradcheck_passes_in_float64(case):
    small = {
        n: x.detach()[..., :2].requires_grad_() if x.ndim == 5 else x for n, x in case.tensors(torch.float64).items()
    }
    assert torch.autograd.gradcheck(
        lambda *xs: call(case)(**dict(zip(small, xs, strict=True)), **case.settings),
        tuple(small.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", FIRST)
def test_compiles_without_a_graph_break(case, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(call(case), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    want, got = (evaluate(f, case, case.tensors()) for f in (call(case), compiled))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("case", FIRST)
def test_exports(case):
    class Module(torch.nn.Module):
        def forward(self, tensors):
            return call(case)(**tensors, **case.settings)

    tensors = {n: x.detach() for n, x in case.tensors().items()}
    program = torch.export.export(Module(), (tensors,))
    assert relative_error(program.module()(tensors), Module()(tensors)) < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("case", FIRST)
def test_fake_tensors_have_shape_and_strides_of_the_result(case, device):
    tensors = case.tensors()
    real = call(case)(**tensors, **case.settings)
    with FakeTensorMode():
        fake = call(case)(**{n: torch.empty(x.shape, device=device) for n, x in tensors.items()}, **case.settings)
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
    torch.library.opcheck(forward, tree_map_only(torch.Tensor, lambda x: x.detach().requires_grad_(), inputs))
    torch.library.opcheck(backward, tree_map_only(torch.Tensor, torch.Tensor.detach, saved))
