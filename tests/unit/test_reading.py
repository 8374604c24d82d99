"""Tensors read ahead from real files: what comes, in which order, how much of it at once, and what is said when a file fails."""

import threading
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from musubi_tuner.ltxv2 import reading
from musubi_tuner.ltxv2.filling import fill
from musubi_tuner.ltxv2.reading import ReadAhead
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError

COUNT = 24
ROOM = 40_192
"""Of one weight, 40,000 bytes, in the ring."""


@pytest.fixture
def pack(tmp_path):
    """A folder of two files, each with half of the weights."""
    tensors = {f"{i}.weight": torch.randn(100, 100, generator=torch.Generator().manual_seed(i)) for i in range(COUNT)}
    for half in (0, 1):
        save_file({f"{i}.weight": tensors[f"{i}.weight"] for i in range(half, COUNT, 2)}, tmp_path / f"{half}.safetensors")
    return tmp_path


def empty_model():
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(COUNT)))


def filled(folder, place):
    model = empty_model()
    fill(model, {name: name for name in model.state_dict()}, open_checkpoint(folder), device="cpu", dtype=torch.float32, place=place)
    return model


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_every_kind_of_tensor_comes_as_safetensors_gives_it(tmp_path):
    random = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool, torch.int64)
    tensors = {str(dtype): random.to(dtype) for dtype in dtypes} | {"one": torch.tensor(1.5), "none": torch.empty(0, 3)}
    path = tmp_path / "kinds.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    wanted, checkpoint = load_file(path), open_checkpoint(path)
    with checkpoint.tensors(wanted) as found:
        for name, tensor in zip(wanted, found, strict=True):
            for one in (tensor, checkpoint.tensor(name)):
                assert (one.dtype, one.shape) == (wanted[name].dtype, wanted[name].shape)
                assert torch.equal(one.reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8))


def test_weights_are_placed_in_order_and_equal_the_files(pack):
    order = []
    model = filled(pack, lambda name, tensor: order.append(name) or tensor)
    assert order == list(model.state_dict())
    stored = load_file(pack / "0.safetensors") | load_file(pack / "1.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert len({value.untyped_storage().data_ptr() for value in model.state_dict().values()}) == COUNT


@pytest.mark.parametrize(("rooms", "ahead"), [(1, 0), (2, 1), (3.5, 2), (7, 6), (COUNT + 5, COUNT - 1)])
def test_others_are_read_meanwhile_within_one_ring_and_none_is_spoiled(pack, monkeypatch, rooms, ahead):
    """As many as there is room for beside the one in use, which stays as it is for as long as it is."""
    begun, storages, whole = [], {}, reading._read_into

    def watched(data, name, entry):
        begun.append(name)
        storages[data.untyped_storage().data_ptr()] = data.untyped_storage().nbytes()
        whole(data, name, entry)

    monkeypatch.setattr(reading, "_read_into", watched)
    checkpoint, stored = open_checkpoint(pack), load_file(pack / "0.safetensors") | load_file(pack / "1.safetensors")
    most = int(rooms * ROOM)
    with ReadAhead([(f"{i}.weight", checkpoint.entries[f"{i}.weight"]) for i in range(COUNT)], most_bytes=most) as tensors:
        for number, tensor in enumerate(tensors):
            wanted = min(number + 1 + ahead, COUNT)
            for _ in range(500):
                if len(begun) == wanted:
                    break
                time.sleep(0.002)
            time.sleep(0.002)
            assert len(begun) == wanted
            assert torch.equal(tensor, stored[f"{number}.weight"])
    assert number == COUNT - 1
    ((_, size),) = storages.items()
    assert size <= most


def test_tensors_larger_than_the_ring_have_memory_of_their_own_one_at_a_time(tmp_path, monkeypatch):
    lengths = [10, 5000, 3, 6000, 7000, 200, 100, 300, 5000]
    values = {str(i): torch.arange(length) + i for i, length in enumerate(lengths)}
    save_file(values, tmp_path / "m.safetensors")
    checkpoint, whole, alive, most_alive = open_checkpoint(tmp_path / "m.safetensors"), reading._read_into, set(), [0]

    def watched(data, name, entry):
        if entry.size > 4096:
            alive.add(name)
            weakref.finalize(data, alive.discard, name)
            most_alive[0] = max(most_alive[0], len(alive))
        whole(data, name, entry)

    def check(name, tensor):
        time.sleep(0.005)
        assert torch.equal(tensor, values[name])
        assert (tensors.own(tensor) is tensor) == (tensor.nbytes > 4096)

    monkeypatch.setattr(reading, "_read_into", watched)
    with ReadAhead([(name, checkpoint.entries[name]) for name in values], most_bytes=4096) as tensors:
        for name in values:
            check(name, next(tensors))
    assert most_alive[0] == 1


def test_a_file_that_was_cut_meanwhile_is_named_when_its_turn_comes(pack):
    checkpoint, model, placed = open_checkpoint(pack), empty_model(), []
    file = pack / "1.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(checkpoint.entries["5.weight"].end - 8)
    sources = {name: name for name in model.state_dict()}
    with pytest.raises(UserError, match="'5.weight' lacks its last 8 bytes") as error:
        fill(model, sources, checkpoint, device="cpu", dtype=torch.float32, place=lambda name, tensor: placed.append(name) or tensor)
    assert str(file) in str(error.value) and placed == [f"{i}.weight" for i in range(5)]
    assert not reading_threads()


def test_a_file_that_is_gone_is_named(pack):
    checkpoint = open_checkpoint(pack)
    (pack / "0.safetensors").unlink()
    with pytest.raises(UserError, match="0.weight' could not be read") as error:
        checkpoint.tensor("0.weight")
    assert str(pack / "0.safetensors") in str(error.value)
    assert checkpoint.tensor("1.weight").shape == (100, 100)


def test_reading_ends_with_the_error_of_whom_it_is_for(pack):
    def fail(name, tensor):
        if name == "3.weight":
            raise ValueError("no place")
        return tensor

    with pytest.raises(ValueError, match="no place"):
        filled(pack, fail)
    assert not reading_threads()


def test_others_can_change_a_file_once_it_is_read(pack):
    """Weights are no view of the file."""
    model = filled(pack, None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for path in sorted(pack.iterdir()):
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_to_read_starts_nothing():
    with ReadAhead([]) as tensors:
        assert list(tensors) == [] and not reading_threads()
