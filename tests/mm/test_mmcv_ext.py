"""mmcv's operators on torchvision's give what their definitions say, with gradients and any strides."""

import pytest
import torch
import torch.nn.functional as F

import visionattn.openmmlab  # noqa: F401  (provides the operators)
from visionattn import mmcv_ext

ops = pytest.importorskip("mmcv.ops", reason="mmcv is what is tested")


def test_suppression_keeps_the_best_of_what_overlaps():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    kept = ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)[1]
    assert kept.tolist() == [1, 2]


@pytest.mark.parametrize(("method", "lowered"), [("linear", 0.5 * (1 - 81 / 119)), ("naive", None)])
def test_soft_suppression_lowers_what_overlaps(method, lowered):
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    dets, kept = ops.soft_nms(boxes, torch.tensor([0.5, 0.9, 0.3]), 0.5, min_score=1e-3, method=method)
    scores = dict(zip(kept.tolist(), dets[:, 4].tolist(), strict=True))
    assert scores[1] == pytest.approx(0.9)
    assert scores.get(0) == (lowered and pytest.approx(lowered))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_roi_align_averages_bilinear_samples(memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 11).contiguous(memory_format=memory_format).requires_grad_()
    rois = torch.tensor([[0.0, 1, 1, 7, 6], [1, 2, 0.5, 9, 8]])
    got = ops.roi_align(x, rois, (3, 4), 1.0, 2, "avg", True)
    wanted = []
    for batch, x0, y0, x1, y1 in rois.tolist():
        ys = y0 - 0.5 + (y1 - y0) * (torch.arange(6) + 0.5) / 6
        xs = x0 - 0.5 + (x1 - x0) * (torch.arange(8) + 0.5) / 8
        grid = torch.stack([(2 * xs / 10 - 1).expand(6, 8), (2 * ys / 8 - 1)[:, None].expand(6, 8)], -1)[None]
        samples = F.grid_sample(x[int(batch)][None], grid, align_corners=True, padding_mode="border")
        wanted.append(F.avg_pool2d(samples, 2))
    wanted = torch.cat(wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(got)
    grads = [torch.autograd.grad((y * probe).sum(), x, retain_graph=True)[0] for y in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution_samples_where_it_is_told(modulated):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 6, 7, requires_grad=True), torch.randn(5, 4, 3, 3, requires_grad=True)
    offset = (torch.randn(2, 18, 6, 7) * 0.7).requires_grad_()
    mask = torch.rand(2, 9, 6, 7, requires_grad=True)
    if modulated:
        got = ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 1, 1)
    else:
        got = ops.deform_conv2d(x, offset, weight, 1, 1, 1, 1, 1)
    wanted = 0
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    for tap in range(9):
        y = rows + tap // 3 - 1 + offset[:, 2 * tap]
        z = columns + tap % 3 - 1 + offset[:, 2 * tap + 1]
        grid = torch.stack([2 * z / 6 - 1, 2 * y / 5 - 1], -1)
        samples = F.grid_sample(x, grid, align_corners=True)
        samples = samples * mask[:, tap, None] if modulated else samples
        wanted = wanted + torch.einsum("oc,bchw->bohw", weight[:, :, tap // 3, tap % 3], samples)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    probe, leaves = torch.randn_like(got), [x, weight, offset, *([mask] if modulated else [])]
    for pair in zip(*(torch.autograd.grad((y * probe).sum(), leaves) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)


def test_focal_loss_is_its_formula():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 2, 3, 3, 1])
    output, grad = torch.empty(6, 3), torch.empty(6, 3)
    mmcv_ext.sigmoid_focal_loss_forward(logits.detach(), target, torch.empty(0), output, 2.0, 0.25)
    mmcv_ext.sigmoid_focal_loss_backward(logits.detach(), target, torch.empty(0), grad, 2.0, 0.25)
    p = logits.sigmoid()
    positive = F.one_hot(target, 4)[:, :3].bool()
    wanted = torch.where(positive, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    torch.testing.assert_close(output, wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), logits)[0], rtol=1e-4, atol=1e-6)


def test_what_is_missing_says_its_name():
    with pytest.raises(NotImplementedError, match="carafe_forward"):
        mmcv_ext._Extension().carafe_forward()


def test_a_compiled_extension_is_left_in_place(tmp_path, monkeypatch):
    import sys

    import mmcv

    (tmp_path / "_ext.py").write_text("nms = 'compiled'\n")
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    monkeypatch.setattr(mmcv, "_ext", None, raising=False)
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    assert mmcv_ext.install() == "compiled"
    assert sys.modules["mmcv._ext"].nms == "compiled"
