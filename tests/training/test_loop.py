import csv
import json
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from training.generated import TINY

from visionattn.training.baselines import score_baselines
from visionattn.training.config import ModelConfig, load_config
from visionattn.training.folder import RunFolder
from visionattn.training.loop import evaluate, train, train_one_epoch
from visionattn.training.run import Run, mixed_precision


def read_summary(run: Run) -> list[dict[str, float]]:
    with (run.folder.path / "summary.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A finished run with averaged weights, for tests that only look at it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    overrides = ("schedule.epochs=8", "ema_decay=0.9", "examples=4", "baselines=true")
    return train(load_config(folder / "tiny.yaml", (f"data.root={pictures}", f"output={folder / 'run'}", *overrides)))


# What a run leaves behind


def test_a_run_learns_and_writes_a_row_an_epoch(trained):
    rows = read_summary(trained)
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[-1]["val_loss"] < 0.5 * rows[0]["val_loss"]
    assert rows[-1]["val_top1"] > 90
    assert rows[-1]["ema_top1"] > 90


def test_the_metrics_are_those_of_the_run_and_one_object_an_epoch(trained):
    lines = (trained.folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trained.history
    for row, rounded in zip(trained.history, read_summary(trained), strict=True):
        assert row == pytest.approx(rounded, rel=1e-5)


def test_the_folder_holds_what_was_asked_and_what_ran(trained):
    folder = trained.folder.path
    start = json.loads((folder / "environment.json").read_text())[0]
    assert start["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert start["command"]
    assert "best: " in (folder / "train.log").read_text()
    assert "schedule:" in (folder / "config.yaml").read_text()
    with Image.open(folder / "curves.png") as curves:
        assert curves.size == (1100, 450)
    assert sorted(path.name.partition("_")[0] for path in (folder / "examples").iterdir()) == [
        "blue",
        "blue",
        "green",
        "red",
    ]
    assert not list(folder.rglob("*.part"))


def test_the_best_model_loads_through_timm_alone(trained):
    best = timm.create_model(f"local-dir:{trained.folder.best}", pretrained=True).eval()
    config = resolve_data_config(model=best)
    assert best.num_classes == 3
    assert best.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert config["input_size"] == (3, 32, 32)
    assert tuple(config["mean"]) == tuple(trained.data_config["mean"])
    assert config["crop_pct"] == 1.0
    images = torch.stack([create_transform(**config)(trained.val.picture(i)[0]) for i in range(len(trained.val))])
    labels = torch.tensor([trained.val.picture(i)[1] for i in range(len(trained.val))])
    right = (best(images).argmax(1) == labels).double().mean().item()
    assert 100 * right == pytest.approx(max(row["ema_top1"] for row in read_summary(trained)), rel=1e-5)


@pytest.mark.parametrize(("folder", "prefix"), [("last", "val"), ("last_ema", "ema")])
def test_weights_and_their_average_load_through_timm_and_score_what_was_logged_of_each(trained, folder, prefix):
    model = timm.create_model(f"local-dir:{trained.folder.path / folder}", pretrained=True).eval()
    images, labels = zip(*(trained.val[position] for position in range(len(trained.val))), strict=True)
    labels, newest = torch.tensor(labels), trained.history[-1]
    with torch.no_grad():
        logits = model(torch.stack(images))
    assert newest[f"{prefix}_top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert newest[f"{prefix}_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert newest["val_loss"] != pytest.approx(newest["ema_loss"], rel=1e-3)


def test_the_card_of_the_best_model_says_what_was_measured_and_anybody_may_read_the_weights(trained):
    card = (trained.folder.best / "README.md").read_text()
    best = max(trained.history, key=lambda row: row["ema_top1"])
    assert "# test_nat on " in card
    assert "measured on 12 validation pictures" in card
    assert (
        f"averaged weights after epoch {best['epoch']} of 8, chosen by this figure | {best['ema_top1']:.2f} |" in card
    )
    assert "| 1-nearest-neighbour on the pixels | 100.00 |" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card
    modes = {(trained.folder.best / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1


def test_the_baselines_separate_coloured_pictures(trained):
    assert trained.baselines == {"1-nearest-neighbour": 100.0, "logistic regression": 100.0}
    assert score_baselines(trained.val, trained.val) == trained.baselines
    assert "baseline on the same split: 1-nearest-neighbour 100.0 %" in (trained.folder.path / "train.log").read_text()


def test_no_checkpoint_is_kept_beside_the_last_unless_asked(trained):
    assert not (trained.folder.path / "checkpoints").exists()


# The loop


def test_the_averaged_weights_follow_every_update(configure):
    run = Run(configure("ema_decay=0.9"))
    expected = {name: value.clone() for name, value in run.bare_model.state_dict().items()}
    reference = ModelEmaV3(run.bare_model, decay=0.9, use_warmup=True)

    def average(meter):
        decay = reference.get_decay(run.updates)
        for name, value in run.bare_model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value

    train_one_epoch(run, 0, on_update=average)
    assert run.updates == 3
    for name, value in run.ema.module.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
    assert any(not torch.equal(value, run.bare_model.state_dict()[name]) for name, value in expected.items())


def weights_after_an_epoch(config) -> tuple[torch.Tensor, torch.Tensor, int]:
    run = Run(config)
    before = torch.nn.utils.parameters_to_vector(run.bare_model.parameters()).detach().clone()
    train_one_epoch(run, 0)
    return before, torch.nn.utils.parameters_to_vector(run.bare_model.parameters()).detach(), run.updates


def test_accumulated_gradients_equal_those_of_the_larger_batch(configure):
    sgd = ("optimizer.name=sgd", "optimizer.weight_decay=0", "optimizer.lr=0.1", "schedule.name=constant")
    start, large, updates = weights_after_an_epoch(configure(*sgd, "data.batch_size=8"))
    _, small, updates_too = weights_after_an_epoch(configure(*sgd, "data.batch_size=4", "optimizer.accumulate=2"))
    assert updates == updates_too == 3
    # Sums of at most 8 pictures x 64 positions in another order: sqrt(512) * 2^-24 of the update, times ten for the
    # three updates that build on each other.
    assert (large - small).norm() < 10 * 512**0.5 * 2**-24 * (large - start).norm()


def test_clipping_bounds_the_step(configure):
    sgd = (
        "optimizer.name=momentum",
        "optimizer.weight_decay=0",
        "optimizer.kwargs.momentum=0",
        "schedule.name=constant",
    )
    one_update = ("data.batch_size=24", "optimizer.lr=1.0", "schedule.warmup_epochs=0")
    start, free, _ = weights_after_an_epoch(configure(*sgd, *one_update))
    _, clipped, _ = weights_after_an_epoch(configure(*sgd, *one_update, "optimizer.clip_grad=0.01"))
    assert (free - start).norm() > 0.02
    assert (clipped - start).norm() == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_is_stepped_once_an_update(configure):
    run = Run(configure("schedule.epochs=4", "schedule.warmup_epochs=2", "schedule.warmup_lr=0", "optimizer.lr=0.6"))
    rates = []
    row = train_one_epoch(run, 0, on_update=lambda meter: rates.append(run.optimizer.param_groups[0]["lr"]))
    # Three updates an epoch: the warm-up is 6 updates long.
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert row["lr"] == pytest.approx(0.2)  # of the third update, after which it is 0.3


def test_validation_counts_every_picture_once(configure):
    run = Run(configure("data.batch_size=5"))
    model = run.bare_model.eval()
    images, labels = zip(*(run.val[position] for position in range(len(run.val))), strict=True)
    with torch.no_grad():
        logits = model(torch.stack(images))
    found = evaluate(run, run.model)
    labels = torch.tensor(labels)
    assert found["val_top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert found["val_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)


def test_autocast_trains_in_bfloat16_and_keeps_float32_weights(configure):
    run = Run(configure("precision=bf16"))
    row = train_one_epoch(run, 0)
    assert row["train_loss"] < 2
    assert run.model(torch.zeros(1, 3, 32, 32)).dtype == torch.float32
    assert {value.dtype for value in run.bare_model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("override", "cuda", "has_bf16", "wanted"),
    [
        ("precision=auto", True, True, "bf16"),
        ("precision=auto", True, False, "no"),
        ("precision=auto", False, True, "no"),
        ("precision=fp32", True, True, "no"),
        ("precision=fp16", True, True, "fp16"),
    ],
)
def test_the_precision_is_bfloat16_where_the_device_has_it(configure, monkeypatch, override, cuda, has_bf16, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert mixed_precision(configure(override, "device=auto")) == wanted
    assert mixed_precision(configure("precision=auto", "device=cpu")) == "no"


def test_a_model_learns_a_few_pictures_by_heart(configure):
    run = train(
        configure("data.limit=9", "data.batch_size=9", "augment.transforms=[{Resize: {}}]", "schedule.epochs=20")
    )
    assert len(run.train) == 9
    assert {run.train.reader.samples[index][1] for index in run.train.indices} == {0, 1, 2}
    assert run.history[-1]["train_top1"] == 100
    assert run.history[-1]["train_loss"] < 0.1 * run.history[0]["train_loss"]


def test_a_batch_of_one_that_a_model_cannot_normalise_names_the_key(configure):
    with pytest.raises(ValueError, match=r"data.batch_size is 1: Expected more than 1 value .*; wanted at least 2"):
        train(replace(configure("data.batch_size=1"), model=ModelConfig("test_resnet")))


def test_a_loss_that_is_no_number_stops_before_it_is_saved(configure):
    with pytest.raises(ValueError, match=r"training loss is (nan|inf) in batch \d of epoch [12]"):
        train(configure("optimizer.lr=1e30"))
    assert not RunFolder(configure().output).last.exists()


# Nothing half-written


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=/no/such/folder", "data.root /no/such/folder is not a folder"),
        ("model.name=test_natt", "unknown model 'test_natt'; the nearest known model is 'test_nat'"),
        ("model.kwargs.windows=3", "model test_nat: .*unexpected keyword argument 'windows'"),
        ("model.kwargs.num_classes=3", "model.kwargs.num_classes follows from the data"),
        ("precision=fp16", "precision=fp16 wants an accelerator and there is only the CPU, wanted bf16 or fp32"),
        ("model.weights=/no/such/file.pth", "model.weights /no/such/file.pth is not a file"),
        ("optimizer.name=adamv", "optimizer adamv"),
        ("optimizer.kwargs.beta=1", "optimizer adamw with {'beta': 1}"),
        ("optimizer.name=adahessian", "optimizer.name is adahessian, wanted one that needs no second derivatives"),
        ("optimizer.name=fusedadamw", "optimizer fusedadamw with {}: .* required"),
        ("optimizer.name=bnbadam8bit", "optimizer bnbadam8bit with {}: .* required"),
        *(
            (f"schedule.name={name}", f"schedule.name is '{name}', wanted cosine, tanh, poly, wsd, rsqrt or constant")
            for name in ("cosinus", "none", "plateau", "multistep", "step")
        ),
        ("schedule.name=rsqrt", "schedule.name=rsqrt with 0 warmup_epochs: "),
        ("model.kwargs.features_only=true", "model.kwargs.features_only is true, wanted a model with a classifier"),
        ("data.batch_size=25", "fewer than data.batch_size"),
        ("data.mean=[0.5,0.5]", r"data.mean is \[0.5, 0.5\], wanted 1 or 3 numbers"),
        ("augment.transforms=[]", r"end at \(3, 40, 40\)|wanted \(3, 48, 48\)"),
    ],
)
def test_what_cannot_be_used_is_an_error_before_anything_is_written(configure, tmp_path, override, message):
    size = ("data.input_size=[3,48,48]",) if "transforms" in override else ()
    with pytest.raises(ValueError, match=message):
        train(configure(override, *size))
    assert not (tmp_path / "run").exists()


def test_training_starts_from_a_published_checkpoint_with_another_classifier(configure, tmp_path):
    torch.manual_seed(1)
    published = timm.create_model("test_nat", layer_scale=1.0)
    torch.save({"model": published.state_dict()}, tmp_path / "published.pth")
    run = Run(configure(f"model.weights={tmp_path / 'published.pth'}"))
    assert run.bare_model.num_classes == 3
    state = run.bare_model.state_dict()
    for name, value in published.state_dict().items():
        assert name.startswith("head.fc") or torch.equal(state[name], value), name


def test_weights_of_another_model_are_an_error_and_not_a_random_start(configure, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    whole = (tmp_path / "other.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[:1000])
    for name in ("other.pth", "truncated.pth"):
        with pytest.raises(ValueError, match=f"model test_nat with the weights .*{name}"):
            Run(configure(f"model.weights={tmp_path / name}"))


def test_setting_up_writes_nothing(configure, tmp_path):
    config = configure()
    Run(replace(config, baselines=True, examples=3))
    assert not (tmp_path / "run").exists()
