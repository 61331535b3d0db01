"""A file of weights loads whole or is refused by name, and nothing in it is executed."""

import argparse
import io
import pickle
import random
import zipfile
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save_file

from visionattn.weights import read_weights


class Exploit:
    """Creates a file when it is unpickled by Python."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model("test_nat").state_dict()


def save(path, checkpoint, container: str) -> None:
    if container == "safetensors":
        save_file(checkpoint, path)
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=container == "zip")


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_every_container_gives_the_tensors_that_were_saved(container, tmp_path):
    want = weights() | {"half": torch.ones(3, dtype=torch.bfloat16)}
    save(tmp_path / "file", want, container)
    got = read_weights(tmp_path / "file")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], x) and got[name].dtype == x.dtype for name, x in want.items())


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_views_and_shared_storages_are_those_of_torch(container, tmp_path):
    base = torch.arange(24.0)
    save(tmp_path / "file", {"rows": base.view(4, 6)[1:3], "turned": base.view(4, 6).t(), "scalar": base[5]}, container)
    got, want = read_weights(tmp_path / "file"), torch.load(tmp_path / "file", weights_only=True)
    assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_objects_of_the_training_script_stay_inert(container, tmp_path):
    trap = tmp_path / "trap"
    checkpoint = {
        "args": argparse.Namespace(lr=0.1),
        "exploit": Exploit(trap),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4, 4)}}, "groups": [{1, 2}, frozenset([3]), b"x", 2**70]},
        "model": OrderedDict(a=torch.zeros(3)),
        "model_ema": OrderedDict(a=torch.nn.Parameter(torch.ones(3))),
    }
    save(tmp_path / "file", checkpoint, container)
    assert torch.equal(read_weights(tmp_path / "file")["a"], torch.ones(3))
    assert not trap.exists()


def test_a_web_page_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "page.pth").write_text("<!doctype html><title>share</title>")
    with pytest.raises(ValueError, match=r"page\.pth: not a checkpoint .* a web page"):
        read_weights(tmp_path / "page.pth")
    with pytest.raises(ValueError, match=r"none\.pth: there is no such checkpoint"):
        read_weights(tmp_path / "none.pth")


def rewrite(path, change) -> None:
    """Replace the records of a zip file by what `change` makes of (name, data, compression)."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info), zipfile.ZIP_STORED) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data, compression in map(change, records):
            archive.writestr(name, data, compression)


def test_a_tensor_that_states_more_than_its_data_is_named(tmp_path):
    save(tmp_path / "file", {"few": torch.zeros(4)}, "zip")
    rewrite(tmp_path / "file", lambda record: (record[0], record[1][: 8 if "/data/" in record[0] else None], record[2]))
    with pytest.raises(ValueError, match=r"file: tensor 'few' of size \(4,\) reaches beyond its 2 elements"):
        read_weights(tmp_path / "file")


def test_a_compressed_record_is_refused_before_it_is_unpacked(tmp_path):
    save(tmp_path / "file", {"bomb": torch.zeros(1 << 20)}, "zip")
    rewrite(tmp_path / "file", lambda record: (record[0], record[1], zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="is compressed"):
        read_weights(tmp_path / "file")


def test_a_tensor_expanded_beyond_its_storage_is_refused(tmp_path):
    save(tmp_path / "file", {"huge": torch.zeros(1).expand(1 << 40)}, "zip")
    with pytest.raises(ValueError, match=r"'huge' .* reaches beyond its 1 elements"):
        read_weights(tmp_path / "file")


def test_a_pickle_cannot_allocate(tmp_path):
    class Allocation:
        def __reduce__(self):
            return bytearray, (10**13,)

    save(tmp_path / "file", {"x": torch.zeros(2), "greedy": Allocation()}, "zip")
    assert list(read_weights(tmp_path / "file")) == ["x"]


def test_a_wrapper_that_holds_itself_ends(tmp_path):
    endless = {}
    endless["model"] = endless
    save(tmp_path / "file", endless, "zip")
    with pytest.raises(ValueError, match="holds no named tensors"):
        read_weights(tmp_path / "file")


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_a_thousand_damaged_files_execute_nothing_and_are_named(container, tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "damaged"
    checkpoint = {f"blocks.{i}.weight": torch.full((3, i + 1), float(i)) for i in range(6)}
    if container != "safetensors":
        checkpoint = {"model": checkpoint, "args": Exploit(trap)}
    save(path, checkpoint, container)
    sound, dice = path.read_bytes(), random.Random(0)
    refused = []
    for _ in range(334):
        damaged = bytearray(sound)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged[: dice.randrange(len(damaged))] if dice.random() < 0.3 else damaged)
        try:
            read_weights(path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(message.startswith(f"{path}: ") for message in refused)
    assert not trap.exists()


def test_a_bare_pickle_is_refused(tmp_path):
    stream = io.BytesIO()
    pickle.dump({"model": Exploit(tmp_path / "trap")}, stream, protocol=2)
    (tmp_path / "file").write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match="not of PyTorch"):
        read_weights(tmp_path / "file")
    assert not (tmp_path / "trap").exists()
