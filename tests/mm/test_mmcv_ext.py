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


def test_matching_groups_what_the_best_suppress():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [20, 20, 30, 31], [0, 0, 4, 4]])
    dets = torch.cat([boxes, torch.tensor([[0.5], [0.9], [0.3], [0.4], [0.1]])], 1)
    assert [group.tolist() for group in ops.nms_match(dets, 0.5)] == [[1, 0], [3, 2], [4]]
    # The third pair overlaps by 10/11; the threshold itself suppresses.
    assert [group.tolist() for group in ops.nms_match(dets, 100 / 110)] == [[1], [0], [3, 2], [4]]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("mode", [0, 1], ids=["over the union", "over the first"])
def test_overlaps_are_shared_pixels_over_pixels(mode, offset):
    corners = torch.randint(8, (9, 2, 2), generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], 1)
    painted = torch.zeros(9, 12, 12, dtype=torch.bool)
    for canvas, (x0, y0, x1, y1) in zip(painted, boxes.tolist(), strict=True):
        canvas[y0 : y1 + offset, x0 : x1 + offset] = True
    first, second = painted[:5], painted[5:]
    base = first[:, None] | second[None] if mode == 0 else first[:, None].expand(5, 4, 12, 12)
    wanted = (first[:, None] & second[None]).sum((2, 3)) / base.sum((2, 3))
    got = torch.empty(5, 4)
    mmcv_ext.bbox_overlaps(boxes[:5].float(), boxes[5:].float(), got, mode, False, offset)
    torch.testing.assert_close(got, wanted)
    pairs = torch.empty(4)
    mmcv_ext.bbox_overlaps(boxes[:4].float(), boxes[5:].float(), pairs, mode, True, offset)
    torch.testing.assert_close(pairs, wanted.diagonal())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_roi_pool_takes_the_maxima_of_its_cells(memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 12).contiguous(memory_format=memory_format).requires_grad_()
    # 6 by 8 pixels and 4 by 4, both ends counted, in cells of the same size.
    rois = torch.tensor([[0.0, 1, 2, 8, 7], [1, 4, 0, 7, 3]])
    got = ops.roi_pool(x, rois, (2, 4))
    wanted = torch.cat([F.max_pool2d(x[:1, :, 2:8, 1:9], (3, 2)), F.max_pool2d(x[1:, :, 0:4, 4:8], (2, 1))])
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    probe = torch.randn_like(got)
    grads = [torch.autograd.grad((y * probe).sum(), x)[0] for y in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def bilinear(image: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A map (H, W, D) at one place in pixels whose centres are whole numbers; nothing lies outside it."""
    sample = 0
    for row in (y.floor(), y.floor() + 1):
        for column in (x.floor(), x.floor() + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                sample = sample + (1 - (y - row).abs()) * (1 - (x - column).abs()) * image[int(row), int(column)]
    return sample


def test_deformable_attention_weighs_samples_of_several_maps():
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    torch.manual_seed(0)
    heads, points, sizes = 2, 3, [(4, 5), (2, 3)]
    value = torch.randn(1, 26, heads, 4, dtype=torch.float64, requires_grad=True)
    # Some places lie outside of the maps.
    places = (torch.rand(1, 5, heads, 2, points, 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand(1, 5, heads, 2, points, dtype=torch.float64, requires_grad=True)
    shapes, starts = torch.tensor(sizes), torch.tensor([0, 20])
    got = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, places, weights, 64)
    wanted = torch.zeros(5, heads, 4, dtype=torch.float64)
    for head in range(heads):
        for level, ((height, width), start) in enumerate(zip(sizes, (0, 20), strict=True)):
            image = value[0, start : start + height * width, head].view(height, width, 4)
            for query in range(5):
                for point in range(points):
                    x, y = places[0, query, head, level, point] * torch.tensor([width, height]) - 0.5
                    sample = weights[0, query, head, level, point] * bilinear(image, x, y)
                    wanted = wanted.index_put((torch.tensor(query), torch.tensor(head)), sample, accumulate=True)
    wanted = wanted.view(1, 5, heads * 4)
    torch.testing.assert_close(got, wanted)
    probe, leaves = torch.randn_like(got), (value, places, weights)
    for pair in zip(*(torch.autograd.grad((y * probe).sum(), leaves) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(*pair)


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


def roi_align(x: torch.Tensor) -> torch.Tensor:
    return ops.roi_align(x, torch.tensor([[0.0, 1, 1, 7, 6]]).to(x), (3, 4), 1.0, 2, "avg", True)


def roi_pool(x: torch.Tensor) -> torch.Tensor:
    return ops.roi_pool(x, torch.tensor([[0.0, 1, 1, 7, 6]]).to(x), (3, 4))


def deformable(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return ops.DeformConv2dPack(4, 5, 3, padding=1)(x)


def modulated(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return ops.ModulatedDeformConv2dPack(4, 5, 3, padding=1)(x)


@pytest.mark.parametrize("operator", [roi_align, roi_pool, deformable, modulated])
def test_operators_run_under_autocast_to_bfloat16(operator):
    torch.manual_seed(1)
    x = torch.randn(1, 4, 9, 11).bfloat16().float().requires_grad_()
    wanted = operator(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = operator(x.bfloat16())
    probe = torch.randn_like(wanted).bfloat16().float()
    grads = [torch.autograd.grad((y.float() * probe).sum(), x)[0] for y in (got, wanted)]
    # Eight bits of a number, in a few sums of its like.
    for one, other in ((got.float(), wanted), grads):
        assert (one - other).norm() <= 2**-6 * other.norm()


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


@pytest.mark.parametrize("name", ["carafe_forward", "psamask_forward", "masked_im2col_forward", "box_iou_rotated"])
def test_what_is_missing_says_its_name(name):
    with pytest.raises(NotImplementedError, match=name):
        getattr(mmcv_ext._Extension(), name)()


def test_the_maximum_of_roi_align_is_missing_by_its_name():
    with pytest.raises(NotImplementedError, match=r"roi_align.*max"):
        ops.roi_align(torch.randn(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 3, 3]]), (2, 2), 1.0, 2, "max", True)


def test_a_compiled_extension_is_left_in_place(tmp_path, monkeypatch):
    import sys

    import mmcv

    (tmp_path / "_ext.py").write_text("nms = 'compiled'\n")
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    monkeypatch.setattr(mmcv, "_ext", None, raising=False)
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    assert mmcv_ext.install() == "compiled"
    assert sys.modules["mmcv._ext"].nms == "compiled"
