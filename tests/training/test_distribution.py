"""Two processes over gloo, on one host and on two, with copied and with shared weights, against one process with the
doubled batch."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from visionattn.training.run import Run

SCRIPT = str(Path(__file__).with_name("two_processes.py"))
# 24 pictures: 3 updates of 8. The 12 to validate are three batches of 4, which two processes pad with a fourth.
SAME = ("optimizer.name=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=0", "schedule.warmup_epochs=1")
SAME += ("ema_decay=0.9",)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(script: str, processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """Runs one of the scripts beside this file through torchrun."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    command = [sys.executable, *launcher, str(Path(__file__).with_name(script)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def found_by(processes: int, out: Path, *given: str) -> list[dict]:
    """What each process found in an epoch of `processes`, with its `weights`."""
    from training.generated import TINY

    out.mkdir()
    (out / "tiny.yaml").write_text(TINY)
    given = (f"output={out / 'run'}", f"data.batch_size={8 // processes}", *SAME, *given)
    done = launch("two_processes.py", processes, str(out), str(out / "tiny.yaml"), *given)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        json.loads((out / f"rank{rank}.json").read_text()) | {"weights": torch.load(out / f"rank{rank}.pt")}
        for rank in range(processes)
    ]


@pytest.fixture(scope="module")
def ranks(pictures, tmp_path_factory):
    """(what one process found, what each of two found), each with its `weights`."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two = (found_by(processes, folder / str(processes), f"data.root={pictures}") for processes in (1, 2))
    return one[0], two


def test_two_processes_train_as_one_with_the_doubled_batch(ranks):
    one, two = ranks
    # float32 sums of 24 losses in another order, after at most two updates that differ in their last bits.
    assert two[0]["row"]["train_loss"] == pytest.approx(one["row"]["train_loss"], rel=1e-5)
    assert (two[0]["weights"] - one["weights"]).norm() < 1e-5 * one["weights"].norm()
    assert torch.equal(two[0]["weights"], two[1]["weights"])


def test_two_processes_share_the_pictures_and_each_is_seen_once(ranks):
    one, two = ranks
    assert sorted(two[0]["seen"] + two[1]["seen"]) == sorted(one["seen"]) == list(range(24))


def test_two_processes_count_each_validation_picture_once(ranks):
    one, two = ranks
    for rank in two:
        for model in ("val", "ema"):
            assert rank["row"][f"{model}_top1"] == pytest.approx(one["row"][f"{model}_top1"], abs=1e-9)
            assert rank["row"][f"{model}_loss"] == pytest.approx(one["row"][f"{model}_loss"], rel=1e-5)
    assert one["row"]["val_loss"] != pytest.approx(one["row"]["ema_loss"], rel=1e-2)


def test_two_processes_read_a_stream_and_no_picture_of_it_is_seen_twice(shards, tmp_path):
    two = found_by(2, tmp_path / "out", "data.reader=wds", f"data.root={shards}")
    seen = two[0]["seen"] + two[1]["seen"]
    assert len(set(seen)) == len(seen)
    # The shortest three of the seven shards hold 15 pictures, which every process has in batches of 4.
    assert [len(rank["seen"]) for rank in two] == [12, 12]
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    assert two[0]["row"]["val_loss"] == two[1]["row"]["val_loss"]


def test_the_schedule_steps_once_an_update_whatever_the_processes(ranks):
    one, two = ranks
    assert len(one["rates"]) == 3
    assert two[0]["rates"] == two[1]["rates"] == one["rates"]


def test_two_processes_that_share_the_weights_train_as_one_with_the_doubled_batch(ranks, pictures, tmp_path):
    one = ranks[0]
    shared = found_by(2, tmp_path / "shared", f"data.root={pictures}", "fsdp=true", "optimizer.clip_grad=1000")
    for rank in shared:
        assert rank["row"]["train_loss"] == pytest.approx(one["row"]["train_loss"], rel=1e-5)
        for model in ("val", "ema"):
            assert rank["row"][f"{model}_loss"] == pytest.approx(one["row"][f"{model}_loss"], rel=1e-5)
    # Every weight is cut along its first axis, so that the halves differ where that is short, but neither is all.
    assert min(rank["held"] for rank in shared) > len(one["weights"]) / 4
    assert shared[0]["held"] + shared[1]["held"] == len(one["weights"]) == one["held"]
    assert (shared[0]["weights"] - one["weights"]).norm() < 1e-5 * one["weights"].norm()


def test_shared_weights_train_in_bfloat16_as_one_process_does(ranks, pictures, tmp_path):
    given = (f"data.root={pictures}", "precision=bf16")
    one, shared = found_by(1, tmp_path / "one", *given)[0], found_by(2, tmp_path / "shared", *given, "fsdp=true")
    apart = (shared[0]["weights"] - one["weights"]).norm()
    rounding = (one["weights"] - ranks[0]["weights"]).norm()
    # Sums over two halves of a batch are rounded apart: less than bfloat16 differs from float32, which it does.
    assert apart < rounding / 2
    assert rounding > 1e-4 * ranks[0]["weights"].norm()
    assert shared[0]["row"]["train_loss"] == pytest.approx(one["row"]["train_loss"], rel=1e-3)
    assert shared[0]["held"] + shared[1]["held"] == one["held"]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["blocks", "true"])
def test_shared_weights_train_compiled_as_one_process_does(ranks, pictures, tmp_path, compiled):
    shared = found_by(2, tmp_path / "out", f"data.root={pictures}", "fsdp=true", f"model.compile={compiled}")
    one = ranks[0]
    assert min(rank["graphs"] for rank in shared) > one["graphs"] == 0
    assert (shared[0]["weights"] - one["weights"]).norm() < 1e-5 * one["weights"].norm()
    assert shared[0]["row"]["val_loss"] == pytest.approx(one["row"]["val_loss"], rel=1e-5)
    assert shared[0]["held"] + shared[1]["held"] == one["held"]


@pytest.mark.slow
def test_shared_weights_are_saved_whole_and_resumed_bit_for_bit(pictures, tmp_path):
    from training.generated import TINY

    (tmp_path / "tiny.yaml").write_text(TINY)
    extra = ("ema_decay=0.9", "optimizer.accumulate=2", "optimizer.clip_grad=1.0", "attention_entropy=true")
    given = (f"data.root={pictures}", "data.batch_size=4", "fsdp=true", "checkpoint_every=1", *extra)

    def run(output: str, *more: str, stop: int = 0) -> dict:
        config = (str(tmp_path / "tiny.yaml"), *given, f"output={tmp_path / output}", *more)
        done = launch("stopped_training.py", 2, str(stop), *config)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(tmp_path / output / "last.pt", weights_only=True)

    whole, stopped = run("whole"), run("resumed", stop=3)
    assert (len(stopped["history"]), stopped["within"]["batches"]) == (1, 2)
    resumed = run("resumed", "resume=true")
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), (part, name)
    for name, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, resumed["optimizer"]["state"][name][key]) for key, value in state.items()), name
    assert [row["val_loss"] for row in whole["history"]] == [row["val_loss"] for row in resumed["history"]]
    best = timm.create_model(f"local-dir:{tmp_path / 'resumed' / 'best'}", pretrained=True)
    epoch = max(resumed["history"], key=lambda row: row["ema_top1"])["epoch"]
    assert epoch < 2 or all(torch.equal(value, resumed["ema"][name]) for name, value in best.state_dict().items())
    assert (tmp_path / "resumed" / "report.html").is_file()


@pytest.mark.parametrize(
    ("setting", "launcher", "message"),
    [
        ("fsdp=true", {}, "fsdp=true with one process, wanted several"),
        ("fsdp=false", {"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP is set, .* wanted fsdp=true"),
    ],
)
def test_weights_are_never_silently_copied_where_sharing_is_asked(configure, monkeypatch, setting, launcher, message):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Run(configure(setting))


@pytest.fixture
def hosts():
    """Two network namespaces, joined by a cable, as (name, interface); the first one's address is 10.99.0.1."""
    names = [f"host{number}_{os.getpid()}" for number in range(2)]
    setup = [["netns", "add", name] for name in names]
    setup.append(["link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "cable1", "netns", names[1]])
    for number, name in enumerate(names):
        setup.append(["-n", name, "addr", "add", f"10.99.0.{number + 1}/24", "dev", f"cable{number}"])
        setup += [["-n", name, "link", "set", device, "up"] for device in (f"cable{number}", "lo")]
    try:
        for command in setup:
            subprocess.run(["ip", *command], check=True, capture_output=True, text=True)
        yield [(name, f"cable{number}") for number, name in enumerate(names)]
    except FileNotFoundError:
        pytest.skip("no `ip` to make network namespaces; the tests above ran two processes over loopback")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are refused, only loopback was run: {error.stderr.strip()}")
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_accelerate_launches_one_training_on_two_hosts(ranks, hosts, pictures, tmp_path):
    from training.generated import TINY

    (tmp_path / "tiny.yaml").write_text(TINY)
    given = (f"data.root={pictures}", f"output={tmp_path / 'run'}", "data.batch_size=4", *SAME)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=2"]
    launcher += ["--num_processes=2", "--main_process_ip=10.99.0.1", "--main_process_port=29500"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no"]
    given = [SCRIPT, str(tmp_path), str(tmp_path / "tiny.yaml"), *given]
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *launcher, f"--machine_rank={number}", *given],
            env=os.environ | {"GLOO_SOCKET_IFNAME": interface},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, (name, interface) in enumerate(hosts)
    ]
    for process in started:
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 0, errors[-3000:]
    one = ranks[0]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["row"]["train_loss"] == pytest.approx(one["row"]["train_loss"], rel=1e-5)
    assert found[0]["row"]["val_loss"] == pytest.approx(one["row"]["val_loss"], rel=1e-5)
    assert sorted(found[0]["seen"] + found[1]["seen"]) == list(range(24))
    assert found[0]["rates"] == one["rates"]
