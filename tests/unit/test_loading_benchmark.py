"""The benchmark of loading at toy width: it loads what its file holds, and its table is whole. No times are asserted."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import loading, loading_case
from musubi_tuner.memory.quantized import QuantizedLinear


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("loading") / "synthetic.safetensors"
    assert loading_case.write_checkpoint(path, toy=True, blocks=2) == path.stat().st_size
    return path


def case(checkpoint, weight_format, streamed):
    return loading_case.Case(checkpoint=checkpoint, weight_format=weight_format, streamed=streamed, cold=False, device="cpu")


@pytest.mark.parametrize("streamed", [0, 1, 2])
def test_the_model_holds_the_weights_of_the_file(checkpoint, streamed):
    stored = load_file(checkpoint)
    model, streamer = loading_case.load(case(checkpoint, "bf16", streamed))
    assert (streamer is None) == (streamed == 0)
    found = model.state_dict()  # streamed blocks show what their slots hold: two slots, two blocks
    assert {loading_case.PREFIX + name for name in found} == set(stored)
    for name, value in found.items():
        assert torch.equal(value, stored[loading_case.PREFIX + name]), name


def test_low_bit_weights_are_those_of_the_file(checkpoint):
    model, streamer = loading_case.load(case(checkpoint, "fp8", 1))
    stored = load_file(checkpoint)
    low = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert streamer is not None and len(low) > 40
    for name, module in low.items():
        weight = stored[f"{loading_case.PREFIX}{name}.weight"].float()
        assert float((module.dequantized_weight() - weight).norm() / weight.norm()) < 0.04, name


def test_the_stand_in_for_a_card_takes_every_weight(checkpoint):
    model, _ = loading_case.load(case(checkpoint, loading_case.STAND_IN, 0))
    assert not any(value.numel() for value in model.state_dict().values())


def test_the_table_has_a_row_for_each_reading(tmp_path, capsys):
    argv = ["--sizes", "toy", "--device", "cpu", "--cache", "warm", "--streamed", "1", "--weight_format", "nf4"]
    assert loading.main([*argv, "--folder", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    (table,) = (tmp_path / "out").glob("*-loading.md")
    assert "| nf4 | 1 | warm |" in table.read_text(encoding="utf-8")
    assert table.with_suffix(".json").is_file() and not list(tmp_path.glob("tmp*"))


def test_seconds_are_extrapolated_by_size():
    sizes = {"file_bytes": 10, "storage_bytes": 0, "host_bytes": 0, "own_bytes": 0, "device_bytes": 0}
    one = loading_case.Reading(weight_format="bf16", streamed=0, cache="warm", seconds=2.0, **sizes)
    assert loading.extrapolate(one, 240) == 48.0
    assert 37.9e9 < loading.whole_bytes() < 38.1e9
