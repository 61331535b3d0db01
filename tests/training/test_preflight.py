import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import train as tool
from torch import nn
from training.generated import TINY, write_pictures

from visionattn.training.config import ModelConfig
from visionattn.training.guard import NotANumberError, check_loss, first_bad
from visionattn.training.loop import evaluate, train, train_one_epoch
from visionattn.training.model import blocks
from visionattn.training.preflight import preflight
from visionattn.training.run import Run, compile_model


def tiny_model():
    torch.manual_seed(0)
    return timm.create_model("test_nat", num_classes=3, layer_scale=1.0)


# The guard


def test_the_guard_names_the_first_module_whose_output_is_no_number():
    model = tiny_model()
    culprit = "stages.1.blocks.0.mlp.fc1"
    model.get_submodule(culprit).register_forward_hook(lambda module, inputs, output: output * float("inf"))
    assert f"module {culprit} (Linear)" in first_bad(model, torch.randn(1, 3, 32, 32))


def test_the_guard_names_a_bad_weight_and_bad_pictures():
    model = tiny_model()
    assert "loss itself" in first_bad(model, torch.randn(1, 3, 32, 32))
    assert "pictures themselves" in first_bad(model, torch.full((1, 3, 32, 32), float("nan")))
    model.head.fc.weight.data[0, 0] = float("nan")
    assert "the weight head.fc.weight" in first_bad(model, torch.randn(1, 3, 32, 32))


def test_a_bad_loss_names_its_batch_and_a_good_one_passes():
    images = torch.randn(1, 3, 32, 32)
    check_loss(torch.tensor(1.0), tiny_model(), images, "batch 3 of epoch 2")
    with pytest.raises(NotANumberError, match="is inf in batch 3 of epoch 2, wanted a number"):
        check_loss(torch.tensor(float("inf")), tiny_model(), images, "batch 3 of epoch 2")


# Before the training


def test_the_preflight_tells_loss_counts_and_idle_parameters_and_writes_nothing(configure, tmp_path):
    run = Run(configure())
    run.bare_model.idle = torch.nn.Parameter(torch.zeros(3))
    before = {name: value.clone() for name, value in run.bare_model.state_dict().items()}
    found = preflight(run)
    assert found.without_gradient == ["idle"]
    assert (found.train_count, found.val_count, found.num_classes, found.class_counts) == (24, 12, 3, (8, 8))
    assert found.loss == pytest.approx(math.log(3), rel=0.5)
    assert found.images_per_second > 0
    assert found.memory > 0
    assert all(torch.equal(value, before[name]) for name, value in run.bare_model.state_dict().items())
    assert any("1 parameters get no gradient: idle" in line for line in found.lines())
    assert not (tmp_path / "run").exists()


def test_the_tool_tries_one_batch_and_writes_nothing(tmp_path, capsys):
    write_pictures(tmp_path / "pictures", per_class=8)
    (tmp_path / "tiny.yaml").write_text(TINY)
    data = (f"data.root={tmp_path / 'pictures'}", "data.val_fraction=0.25")
    assert tool.main([str(tmp_path / "tiny.yaml"), "--dry-run", *data, f"output={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "18 pictures to train, 6 to validate, 3 classes of 6 to 6 pictures" in out
    assert "of a guess 1.099" in out
    assert not (tmp_path / "run").exists()


# Ways to compute the same


def weights_of(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.bare_model.parameters()])


@pytest.mark.parametrize("option", ["grad_checkpointing", "channels_last"])
def test_an_epoch_ends_at_the_same_weights_with_and_without(configure, option):
    ends = []
    for value in ("false", "true"):
        run = Run(configure(f"model.{option}={value}", "optimizer.name=sgd", "optimizer.lr=0.1"))
        start = weights_of(run)
        train_one_epoch(run, 0)
        ends.append(weights_of(run) - start)
    # As for accumulation: sums of at most 512 terms in another order, three updates that build on each other.
    assert (ends[0] - ends[1]).norm() < 10 * 512**0.5 * 2**-24 * ends[0].norm()


# torch looks for the gradient of what goes into a compiled block, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_a_compiled_model_ends_an_epoch_at_the_same_weights_and_evaluates(configure, monkeypatch):
    compiled, ends = [], []
    compile_ = nn.Module.compile
    # Traced and differentiated as by default, but not compiled to C++, which takes minutes.
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self) or compile_(self, backend="aot_eager"))
    for value in ("false", "true", "blocks"):
        run = Run(configure(f"model.compile={value}", "optimizer.name=sgd", "optimizer.lr=0.1", "ema_decay=0.9"))
        start = weights_of(run)
        train_one_epoch(run, 0)
        ends.append((weights_of(run) - start, evaluate(run, run.model)["val_loss"]))
    assert type(compiled[0]) is type(run.bare_model)
    assert compiled[1:] == blocks(run.bare_model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for update, loss in ends[1:]:
        # As above.
        assert (ends[0][0] - update).norm() < 10 * 512**0.5 * 2**-24 * ends[0][0].norm()
        assert loss == pytest.approx(ends[0][1], rel=1e-4)


def test_a_model_without_blocks_is_not_compiled_by_them():
    with pytest.raises(ValueError, match=r"model\.compile=blocks, but test_resnet has no blocks, wanted true"):
        compile_model(timm.create_model("test_resnet"), ModelConfig(name="test_resnet", compile="blocks"))


# A batch that fits


def limit_memory(monkeypatch, pictures: int) -> list[int]:
    """Makes larger batches of training run out of memory; the list of the batches that were tried."""
    model, tried = type(tiny_model()), []
    forward = model.forward

    def limited(self, images):
        if self.training:
            tried.append(len(images))
            if len(images) > pictures:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, images)

    monkeypatch.setattr(model, "forward", limited)
    return tried


def test_a_batch_is_halved_until_it_fits_and_updates_see_as_many_pictures(configure, monkeypatch):
    sgd = ("optimizer.name=sgd", "optimizer.weight_decay=0", "schedule.epochs=1", "ema_decay=0.9")
    wanted = train(configure(*sgd, "output=" + configure().output + "_whole"))
    tried = limit_memory(monkeypatch, 2)
    with pytest.raises(torch.OutOfMemoryError):
        train(configure(*sgd))
    tried.clear()
    run = train(configure(*sgd, "data.find_batch_size=true", "report=false"))
    assert tried[:3] == [8, 4, 2]
    assert set(tried[2:]) == {2}
    assert (run.config.data.batch_size, run.config.optimizer.accumulate, run.updates) == (2, 4, wanted.updates)
    # As for accumulation in test_loop.py.
    start = weights_of(Run(configure("output=" + configure().output + "_start")))
    assert (weights_of(run) - weights_of(wanted)).norm() < 10 * 512**0.5 * 2**-24 * (start - weights_of(wanted)).norm()
    tried.clear()
    resumed = train(configure(*sgd, "data.find_batch_size=true", "report=false", "resume=true"))
    assert resumed.config == replace(run.config, resume=True)
    assert not tried


@pytest.mark.parametrize(("size", "override"), [(9, "seed=0"), (2, "augment.mixup=0.8")])
def test_a_batch_that_cannot_be_halved_is_an_error(configure, monkeypatch, size, override):
    limit_memory(monkeypatch, 1)
    with pytest.raises(ValueError, match=f"a batch of {size} does not fit into memory and cannot be halved"):
        Run(configure(f"data.batch_size={size}", "data.find_batch_size=true", override))


# Killed


@pytest.mark.slow
def test_a_run_that_is_killed_at_50_random_instants_ends_as_if_it_had_not_been(configure, tmp_path):
    overrides = ("schedule.epochs=3", "checkpoint_every=1", "ema_decay=0.9", "augment.mixup=0.8", "report=false")
    overrides += ("keep_last=1", "keep_best=1")
    given = [str(tmp_path), "50", str(tmp_path / "tiny.yaml"), f"data.root={configure().data.root}", *overrides]
    script = str(Path(__file__).with_name("killed_trainings.py"))
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["failed"] == 0, done.stderr[-3000:]
    assert (found["kills"], found["lost"], found["different"], found["leftover"]) == (50, 0, 0, [])
    # Kills that met a checkpoint in the writing, and runs that came to their end between them.
    assert found["half_written"] > 0
    assert found["finished"] > 1
