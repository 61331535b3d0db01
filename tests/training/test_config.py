import math
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.models import get_pretrained_cfg
from zoo import PUBLISHED

from visionattn.registry import published
from visionattn.training.config import Config, ScheduleConfig, flatten, load_config, to_yaml
from visionattn.training.loop import train
from visionattn.training.model import build_model
from visionattn.training.optimisation import build_loss, build_optimizer, build_schedule

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("lr=1", "optimizer.lr"),
        ("optimiser.lr=1", "optimizer"),
        ("data.batchsize=1", "data.batch_size"),
        ("epochs=3", "schedule.epochs"),
        ("schedule.nam=step", "schedule.name"),
        ("ema=0.9", "ema_decay"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(configure, override, nearest):
    with pytest.raises(ValueError, match=f"unknown key .* nearest known key is '{nearest}'"):
        configure(override)


def test_an_unknown_key_in_the_file_is_an_error_too(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("modle: {name: test_nat}\n")
    with pytest.raises(ValueError, match="'modle'; the nearest known key is 'model'"):
        load_config(file)


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(configure):
    config = configure("optimizer.lr=0.5", "optimizer.lr=3e-4", "model.kwargs.dims=[8,16,24,32]")
    assert config.optimizer.lr == 3e-4
    assert config.data.batch_size == 8
    assert config.optimizer.name == "adamw"
    assert config.model.kwargs == {"layer_scale": 1.0, "dims": [8, 16, 24, 32]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=fast", "optimizer.lr: .*'fast'"),
        ("data.input_size=56", "data.input_size"),
        ("optimizer=adamw", "optimizer=adamw: optimizer is 'adamw', wanted its keys: name, lr, weight_decay, ..."),
        ("augment.transforms=[HorizontalFlip]", r"augment.transforms=\[HorizontalFlip\]: Cannot assign str"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0, wanted at least 0"),
        ("optimizer.clip_grad=0", "optimizer.clip_grad is 0.0, wanted above 0"),
        ("augment.mixup=-0.1", "augment.mixup is -0.1, wanted at least 0"),
        ("augment.erasing=2", "augment.erasing is 2.0, wanted between 0 and 1"),
        ("data.std=[1,0,1]", r"data.std is \[1.0, 0.0, 1.0\], wanted 1 or 3 numbers above 0"),
        ("data.std=[]", r"data.std is \[\], wanted 1 or 3 numbers above 0"),
        ("data.mean=[0.5,0.5]", r"data.mean is \[0.5, 0.5\], wanted 1 or 3 numbers"),
        ("data.mean=[0.5,.nan,0.5]", r"data.mean is \[0.5, nan, 0.5\], wanted 1 or 3 numbers"),
        ("data.crop_pct=inf", "data.crop_pct is inf, wanted above 0, at most 1"),
        ("data.crop_pct=50", "data.crop_pct is 50.0, wanted above 0, at most 1"),
        ("data.input_size=[3,56", r"override 'data.input_size=\[3,56' cannot be read: did not find expected ','"),
        ("augment.transforms=[{Resize: {}", r"override 'augment.transforms=\[{Resize: {}' cannot be read"),
        ("data.root=a${b", r"override 'data.root=a\${b' cannot be read: no viable alternative"),
        ("data.root=a${b}", r"data.root: Interpolation key 'b' not found"),
        ("[data=3", r"override '\[data=3' cannot be read"),
        ("seed=-1", "seed is -1, wanted at least 0"),
        ("keep_last=-1", "keep_last is -1, wanted at least 0"),
        ("schedule.epochs", "'schedule.epochs' is not of the form key=value"),
        ("schedule.epochs=0", "schedule.epochs is 0, wanted at least 1"),
        ("threads=0", "threads is 0, wanted at least 1"),
        ("checkpoint_every=0", "checkpoint_every is 0, wanted at least 1"),
        ("ema_decay=0", "ema_decay is 0.0, wanted between 0 and 1"),
        ("data.val_fraction=1.5", "data.val_fraction is 1.5, wanted between 0 and 1"),
        ("data.limit=0", "data.limit is 0, wanted at least 1"),
        ("data.input_size=[3,56]", r"data.input_size is \[3, 56\], wanted \[channels"),
        ("resume=perhaps", "resume is 'perhaps', wanted true, false or auto"),
        ("precision=int8", "precision is 'int8', wanted auto, fp32, bf16 or fp16"),
    ],
)
def test_a_wrong_value_is_an_error_that_shows_it(configure, override, message):
    with pytest.raises(ValueError, match=message):
        configure(override)


@pytest.mark.parametrize("text", ["007", "1e3", "0x10", "12:30", "on", "null", "a #b", "a: b", "[1]", "'a'", "a=b"])
def test_the_text_of_a_path_is_kept_and_written_as_it_is(configure, tmp_path, text):
    config = configure(f"output={text}", *([] if text == "null" else [f"data.root={text}"]))
    assert config.output == text
    assert text == "null" or config.data.root == text
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "written.yaml").output == text


@pytest.mark.parametrize("value", ["", "null"])
def test_a_path_that_may_be_none_is_unset_by_null_or_nothing(configure, value):
    assert configure(f"data.root={value}").data.root is None


def test_a_tilde_in_front_of_a_path_is_the_home_folder(configure, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = configure("output=~/run", "data.root=~", "model.weights=~/a.pth", "distill.weights=/b/~/c.pth")
    assert (config.output, config.data.root) == ("/home/somebody/run", "/home/somebody")
    assert (config.model.weights, config.distill.weights) == ("/home/somebody/a.pth", "/b/~/c.pth")


def test_a_key_without_a_default_that_is_not_set_is_an_error(tmp_path):
    file = tmp_path / "bare.yaml"
    file.write_text("model: {name: test_nat}\nschedule: {epochs: 1}\n")
    with pytest.raises(ValueError, match=r"output is not set; give it in .*bare\.yaml or as output=VALUE"):
        load_config(file)


def test_mixing_wants_an_even_batch(configure):
    with pytest.raises(ValueError, match=r"data\.batch_size is 7, wanted .* even where batches are mixed"):
        configure("augment.mixup=0.8", "data.batch_size=7")


@pytest.mark.parametrize(
    "content",
    [None, b"model: [unclosed", b"model: \xff", b"- model", b"model:", b"model: nat_mini", b"3", b"output: ${b"],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, content):
    file = tmp_path / "broken.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.yaml") as error:
        load_config(file)
    assert "\n" not in str(error.value)
    assert "None" not in str(error.value) or content == b"model:"


def test_a_written_configuration_reads_back_equal(configure, tmp_path):
    config = configure("optimizer.kwargs.betas=[0.9,0.95]", "ema_decay=0.99")
    file = tmp_path / "written.yaml"
    file.write_text(to_yaml(config))
    assert flatten(load_config(file)) == flatten(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_builds_its_model_and_optimizer(path, pictures):
    config = load_config(path, [f"data.root={pictures}", "model.pretrained=false"])
    config.model.kwargs["device"] = "meta"
    model = build_model(config.model, num_classes=10, input_size=config.data.input_size)
    optimizer = build_optimizer(model, config.optimizer)
    _, epochs = build_schedule(optimizer, config.schedule, updates_per_epoch=3)
    assert epochs == config.schedule.epochs + config.schedule.cooldown_epochs
    assert build_loss(config).label_smoothing == config.label_smoothing
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_has_a_header_whose_command_names_it(path):
    header = path.read_text().partition("\nmodel:")[0]
    assert all(line.startswith("#") or not line for line in header.splitlines())
    assert f"tools/train.py configs/train/{path.name}" in header
    assert all(word in header for word in ("command:", "cost"))
    assert "expected" in header or "result:" in header


def test_the_expected_accuracy_of_every_recipe_is_the_one_in_the_registry():
    compared = 0
    for path in CONFIGS:
        expected = re.search(r"^# expected: ([0-9.]+) %", path.read_text(), re.M)
        name = path.stem.removesuffix("_in22k_ft_in1k")
        known = timm.list_models(f"{name}.*", pretrained=False, include_tags=True)
        tag = "in22k_ft_in1k" if name != path.stem else "in1k"
        entry = get_pretrained_cfg(f"{name}.{tag}" if f"{name}.{tag}" in known else name)
        if expected and entry and any(note.startswith("top1") for note in entry.notes or ()):
            assert published(entry)["top1"] == float(expected.group(1)), path
            compared += 1
    assert compared >= 30


def test_the_models_without_a_recipe_are_those_that_the_page_names():
    page = (CONFIGS[0].parent / "README.md").read_text()
    patterns = re.findall(r"`([a-z0-9_*]+)`", page.partition("## Recipes that are not here")[2].partition("\n## ")[0])
    without = set(PUBLISHED) - {path.stem.removesuffix("_in22k_ft_in1k") for path in CONFIGS}
    assert without == {name for name in PUBLISHED if any(fnmatch(name, pattern) for pattern in patterns)}
    assert all(any(fnmatch(name, pattern) for name in without) for pattern in patterns)


def test_a_polynomial_schedule_is_a_straight_line():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, _ = build_schedule(optimizer, ScheduleConfig(name="poly", epochs=4), updates_per_epoch=1)
    rates = []
    for update in range(1, 4):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.75, 0.5, 0.25])


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly", "wsd", "rsqrt"])
def test_every_schedule_but_the_constant_falls_to_its_end(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = ScheduleConfig(name=name, epochs=20, warmup_epochs=2, cooldown_epochs=1, min_lr=0.01)
    schedule, epochs = build_schedule(optimizer, config, updates_per_epoch=3)
    rates = []
    for update in range(1, 3 * epochs):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert epochs == 21
    assert max(rates) > 0.9  # a straight line has lost 2 of 20 epochs by the end of the warm-up
    assert rates[-1] == pytest.approx(0.01)


def _distinct() -> list[Path]:
    """One of the shipped configurations for each way to augment and to optimise; models differ beyond that."""
    seen = {}
    for path in CONFIGS:
        tree = yaml.safe_load(path.read_text())
        keys = ("augment", "optimizer", "schedule", "label_smoothing", "ema_decay", "baselines")
        seen.setdefault(str([tree.get(key) for key in keys]), path)
    return list(seen.values())


def shortened(path: Path, root: Path, batch: int, tmp_path: Path) -> Config:
    """A shipped configuration for an epoch of a small model on the pictures in `root`."""
    small = ("data.reader=folder", f"data.root={root}", "data.val_fraction=null")
    quick = ("data.input_size=[3,32,32]", "data.mean=null", "data.std=null", f"data.batch_size={batch}")
    brief = ("optimizer.accumulate=1", "schedule.epochs=1", "schedule.warmup_epochs=0", "schedule.cooldown_epochs=0")
    plain = ("precision=fp32", "device=cpu", "data.workers=0", f"output={tmp_path / 'run'}")
    config = load_config(path, (*quick, *brief, *plain, "model.pretrained=false", *small, "model.name=test_nat"))
    config.model.kwargs = {"drop_path_rate": config.model.kwargs.get("drop_path_rate", 0.0)}
    config.model.weights = None
    return config


@pytest.mark.parametrize("path", _distinct(), ids=lambda path: path.stem)
def test_every_distinct_configuration_trains_an_epoch_on_a_small_model_and_set(path, pictures, tmp_path):
    run = train(shortened(path, pictures, 8, tmp_path))
    assert run.updates == 24 // 8
    assert (run.folder.best / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("path", _distinct(), ids=lambda path: path.stem)
def test_every_distinct_configuration_trains_an_epoch_of_1000_classes(path, imagenet, tmp_path):
    config = shortened(path, imagenet, 128, tmp_path)
    config.baselines = False  # of pictures that are noise
    run = train(config)
    assert (run.bare_model.num_classes, run.updates) == (1000, 2000 // 128)
    assert run.history[0]["val_loss"] == pytest.approx(math.log(1000), rel=0.2)
    assert "n00000999" in (run.folder.best / "config.json").read_text()
    assert (run.folder.path / "report.html").stat().st_size > 10_000
