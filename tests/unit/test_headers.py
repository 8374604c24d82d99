"""Headers of safetensors files that lie: each is told by the file, and by the tensor or the key."""

import json

import pytest
import torch
from safetensors.torch import save_file

from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.headers import read_header

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def written(path, header, data=bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_true_header_is_read_as_safetensors_wrote_it(tmp_path):
    tensors = {"one": torch.zeros(2, 3), "none": torch.empty(0, 3, dtype=torch.int8), "single": torch.tensor(1.0, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"a": "b"})
    header = read_header(tmp_path / "m.safetensors")
    assert header.metadata == {"a": "b"}
    assert {name: (one.dtype, one.shape) for name, one in header.tensors.items()} == {
        "one": ("F32", (2, 3)),
        "none": ("I8", (0, 3)),
        "single": ("BF16", ()),
    }
    assert sum(one.end - one.start for one in header.tensors.values()) == 26


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"null", "header is null, not an object"),
        (b"[1]", "header is a list, not an object"),
        (b"\xff\xff", "not UTF-8"),
        (b'{"a": ', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON: .*4300 digits"),
        (b'{"t": {}, "t": {}}', "the key 't' appears twice"),
        ({"t": 3}, "tensor 't' is described by a number"),
        ({"t": None}, "tensor 't' is described by null"),
        ({"t": {k: v for k, v in GOOD.items() if k != "dtype"}}, "tensor 't' has no 'dtype'"),
        ({"t": {k: v for k, v in GOOD.items() if k != "shape"}}, "tensor 't' has no 'shape'"),
        ({"t": {k: v for k, v in GOOD.items() if k != "data_offsets"}}, "tensor 't' has no 'data_offsets'"),
        ({"t": GOOD | {"dtype": "F31"}}, "tensor 't' has the dtype 'F31'"),
        ({"t": GOOD | {"dtype": ["F32"]}}, "tensor 't' has the dtype"),
        ({"t": GOOD | {"dtype": "F64"}}, r"tensor 't' has 24 bytes, but F64 of the shape \[2, 3\] takes 48"),
        ({"t": GOOD | {"shape": None}}, "tensor 't' has the shape None"),
        ({"t": GOOD | {"shape": [-2, -3]}}, "tensor 't' has the shape"),
        ({"t": GOOD | {"shape": [2.0, 3]}}, "tensor 't' has the shape"),
        ({"t": GOOD | {"shape": [2, 4]}}, "tensor 't' has 24 bytes"),
        ({"t": GOOD | {"data_offsets": [24, 0]}}, "tensor 't' has the data_offsets"),
        ({"t": GOOD | {"data_offsets": [0]}}, "tensor 't' has the data_offsets"),
        ({"t": GOOD | {"data_offsets": [None, 24]}}, "tensor 't' has the data_offsets"),
        ({"t": GOOD | {"data_offsets": [0, 24.0]}}, "tensor 't' has the data_offsets"),
        ({"t": GOOD | {"data_offsets": [-24, 0]}}, "tensor 't' has the data_offsets"),
        ({"t": GOOD | {"data_offsets": [24, 48]}}, "truncated: tensor 't' ends at byte"),
        ({"t": GOOD, "u": GOOD}, "'t' and 'u' lie on the same bytes"),
        ({"__metadata__": [1], "t": GOOD}, "'__metadata__' .* is a list"),
        ({"__metadata__": {"format": 1}, "t": GOOD}, "metadata 'format' is a number"),
        ({"__metadata__": {"config": None}, "t": GOOD}, "metadata 'config' is null"),
        ({"__metadata__": {"config": "[1]"}, "t": GOOD}, "'config' metadata is no JSON object"),
        ({"__metadata__": {"config": "{"}, "t": GOOD}, "'config' metadata: not valid JSON"),
        ({"__metadata__": {"config": "[" * 100_000}, "t": GOOD}, "'config' metadata: .*nested too deeply"),
        ({"__metadata__": {"config": '{"vae": {"a": 1, "a": 2}}'}, "t": GOOD}, "the key 'a' appears twice"),
        ({"__metadata__": {"config": '{"transformer": [1]}'}, "t": GOOD}, "section 'transformer' that is no JSON object"),
        ({"t": {"dtype": "F4", "shape": [48], "data_offsets": [0, 24]}}, "tensor 't' has the dtype F4, which training does not read"),
    ],
)
def test_whatever_is_wrong_is_named(tmp_path, header, message):
    path = written(tmp_path / "m.safetensors", header)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 600


def test_other_formats_are_told_by_what_they_are(tmp_path, tiny_family):
    for name in ("x.gguf", "x.safetensors"):
        (tmp_path / name).write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
        with pytest.raises(UserError, match="GGUF file, quantized for inference.*bf16 or fp8"):
            open_checkpoint(tmp_path / name)
    for name in ("y.sft", "Y.SAFETENSORS"):
        (tmp_path / name).write_bytes(tiny_family.ltx25_transformer.read_bytes())
        assert open_checkpoint(tmp_path / name).names() == open_checkpoint(tiny_family.ltx25_transformer).names()


def test_a_shard_that_an_index_names_is_not_passed_over(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "m-00001-of-00002.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match="names 2 files, of which 1 are not in its folder, first m-00002-of-00002.safetensors"):
        open_checkpoint(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "m-00002-of-00002.safetensors")
    assert set(open_checkpoint(tmp_path).names()) == {"a", "b"}
    for content in ("[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(UserError, match="weight_map"):
            open_checkpoint(tmp_path)
