"""Checkpoints in 8 bits, in every form that is read, and the forms that are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny import configs

PREFIX = "model.diffusion_model."
LAYER = "transformer_blocks.0.attn1.to_q"
WEIGHT = f"{LAYER}.weight"
FP8, INT8 = {"format": "float8_e4m3fn"}, {"format": "int8_tensorwise"}


def as_json(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def fp8(weight, scale, dtype=torch.float8_e4m3fn):
    return (weight / scale).to(dtype)


def int8(weight, scale):
    return (weight / scale).round().to(torch.int8)


def rotated(weight, group):
    """W R by the definition of ConvRot: regular Hadamard matrices, whose rows sum to the same."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = four
    while matrix.shape[0] < group:
        matrix = torch.kron(matrix, four)
    matrix = matrix / group**0.5
    assert torch.allclose(matrix @ matrix.T, torch.eye(group), atol=1e-6)
    return torch.cat([part @ matrix.T for part in weight.split(group, dim=1)], dim=1)


@pytest.fixture
def stored(tiny_family, tmp_path):
    """A function: the tiny checkpoint with other tensors for one linear, {ending: tensor} -> its path."""
    tensors, metadata = load_file(tiny_family.ltx23), dict(open_checkpoint(tiny_family.ltx23).metadata)

    def write(parts, extra=None, **more_metadata):
        changed = {f"{PREFIX}{LAYER}.{ending}": value.contiguous().clone() for ending, value in parts.items()}
        save_file(tensors | changed | (extra or {}), tmp_path / "m.safetensors", metadata=metadata | more_metadata)
        return tmp_path / "m.safetensors"

    write.weight = tensors[f"{PREFIX}{WEIGHT}"]
    return write


def load(path, dtype=torch.float32):
    return load_transformer(open_checkpoint(path), mode="av", device="cpu", dtype=dtype).state_dict()[WEIGHT]


def forms(weight):
    whole, rows = weight.abs().max() / 448, weight.abs().amax(1, keepdim=True) / 448
    eight, wide = weight.abs().amax(1, keepdim=True) / 127, weight.abs().max() / 57344
    marker = {f"{PREFIX}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    e4m3, turned = fp8(weight, whole), rotated(weight, 64)
    turned_scale = turned.abs().amax(1, keepdim=True) / 127
    convrot = INT8 | {"convrot": True, "convrot_groupsize": 64, "per_row": True}
    layers = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {PREFIX + LAYER: convrot}})}
    bare_layers = {"_quantization_metadata": json.dumps({"layers": {LAYER: convrot}})}
    codes = {"weight": int8(turned, turned_scale), "weight_scale": turned_scale}
    tensor_receipt, row_receipt = "fp8 e4m3, one scale a tensor, 1 linears", "fp8 e4m3, one scale a row, 1 linears"
    rotated_receipt = "int8 ConvRot (groups of 64), one scale a row, 1 linears"
    return {
        "weight_scale": ({"weight": e4m3, "weight_scale": whole}, {}, {}, tensor_receipt),
        "comfy_quant": ({"weight": e4m3, "weight_scale": whole, "comfy_quant": as_json(FP8)}, {}, {}, tensor_receipt),
        "scale_weight": ({"weight": e4m3, "scale_weight": whole[None], "scale_input": torch.ones(())}, marker, {}, tensor_receipt),
        "rows": ({"weight": fp8(weight, rows), "weight_scale": rows, "input_scale": torch.ones(1)}, {}, {}, row_receipt),
        "rows without an axis": ({"weight": fp8(weight, rows), "weight_scale": rows[:, 0]}, {}, {}, row_receipt),
        "e5m2": ({"weight": fp8(weight, wide, torch.float8_e5m2), "weight_scale": wide}, {}, {}, "fp8 e5m2, one scale a tensor"),
        "plain": ({"weight": weight.to(torch.float8_e4m3fn)}, {}, {}, "fp8 e4m3, no scales, 1 linears"),
        "int8 rows": ({"weight": int8(weight, eight), "weight_scale": eight}, {}, {}, "int8, one scale a row, 1 linears"),
        "int8 declared": (
            {"weight": int8(weight, eight), "weight_scale": eight, "comfy_quant": as_json(INT8 | {"convrot": False})},
            {}, {}, "int8, one scale a row, 1 linears",
        ),
        "ConvRot": (codes | {"comfy_quant": as_json(convrot)}, {}, {}, rotated_receipt),
        "ConvRot in the header": (codes, {}, layers, rotated_receipt),
        "ConvRot in the header without prefix": (codes, {}, bare_layers, rotated_receipt),
    }  # fmt: skip


@pytest.mark.parametrize("form", forms(torch.ones(64, 64)))
def test_every_form_gives_the_weight_back_and_says_so(stored, caplog, form):
    weight = stored.weight
    parts, extra, metadata, receipt = forms(weight)[form]
    with caplog.at_level("INFO"):
        found = load(stored(parts, extra, **metadata))
    error = float((found - weight).norm() / weight.norm())
    assert 0 < error < (0.06 if "e5m2" in form else 0.03 if parts["weight"].dtype != torch.int8 else 0.01)
    assert receipt in caplog.text and "m.safetensors: stored as" in caplog.text
    half = load(stored(parts, extra, **metadata), dtype=torch.bfloat16)
    assert torch.equal(half, found.to(torch.bfloat16))


def test_row_scales_are_for_rows_where_a_weight_is_square(stored):
    size = configs.transformer_section("2.3")["attention_head_dim"] * configs.transformer_section("2.3")["num_attention_heads"]
    assert stored.weight.shape == (size, size)
    scale = torch.arange(1.0, size + 1)
    found = load(stored({"weight": torch.ones(size, size).to(torch.float8_e4m3fn), "weight_scale": scale}))
    assert torch.equal(found, scale[:, None].expand(size, size))


def test_plain_weights_are_as_they_were(stored, tiny_family, caplog):
    with caplog.at_level("INFO"):
        assert torch.equal(load(tiny_family.ltx23), stored.weight)
    assert "stored as" not in caplog.text


def refused(weight):
    rows = weight.abs().amax(1, keepdim=True) / 448
    codes, whole, eight = fp8(weight, rows), torch.ones(()), torch.ones(weight.shape[0], 1)
    packed = torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)
    numbers = int8(weight, eight)
    rotated_by = INT8 | {"convrot": True}

    def declared(values, **tensors):
        return {"weight": codes, "weight_scale": rows, **tensors, "comfy_quant": as_json(values)}

    return {
        "mxfp8": (declared({"format": "mxfp8"}), "format 'mxfp8'"),
        "mxfp8 by its scales": ({"weight": codes, "weight_scale": torch.zeros(weight.shape[0], 4, dtype=torch.uint8)}, "MXFP8 weights"),
        "nvfp4": (declared({"format": "nvfp4"}), "format 'nvfp4'"),
        "nvfp4 by its scales": ({"weight": packed, "weight_scale": codes, "weight_scale_2": whole}, "NVFP4 weights"),
        "blocks": ({"weight": codes, "scale_weight": torch.ones(weight.shape[0], 2, 1)}, r"scales of \(\d+, 2, 1\), in blocks"),
        "columns": ({"weight": codes, "weight_scale": torch.ones(1, weight.shape[1])}, "scales of"),
        "deepseek": ({"weight": codes, "weight_scale_inv": torch.ones(1, 1)}, "scale for each block"),
        "bnb 4": ({"weight": packed.view(-1, 1), "weight.quant_state.bitsandbytes__nf4": packed[0]}, "4 bits by bitsandbytes"),
        "bnb 8": ({"weight": numbers, "SCB": eight[:, 0]}, "8 bits by bitsandbytes"),
        "svdquant": ({"qweight": numbers, "wscales": eight}, "SVDQuant"),
        "awq": ({"qweight": numbers}, "packed into 4 bits"),
        "packed": ({"weight": packed, "weight_scale": rows}, "packed into 4 bits"),
        "unknown format": (declared({"format": "svdquant_w4a4"}), "format 'svdquant_w4a4'"),
        "no format": (declared({}), "format None"),
        "no object": (declared([1]), "is no JSON object"),
        "unknown key": (declared(FP8 | {"smooth": 1}), "declared with smooth = 1"),
        "convrot of fp8": (declared(FP8 | {"convrot": True}), "ConvRot of float8_e4m3fn"),
        "another dtype": (declared(INT8), "declared to be int8_tensorwise and stored as torch.float8_e4m3fn"),
        "no scale": ({"weight": codes, "comfy_quant": as_json(FP8)}, "without its scale"),
        "int8 without scale": ({"weight": numbers}, "int8 without its scale"),
        "two scales": ({"weight": codes, "weight_scale": rows, "scale_weight": rows}, "two scales"),
        "group": (declared(rotated_by | {"convrot_groupsize": 32}, weight=numbers), "groups of 32; a group is a power of 4"),
        "group too large": (declared(rotated_by | {"convrot_groupsize": 4096}, weight=numbers), "groups of 4096"),
    }


@pytest.mark.parametrize("form", refused(torch.ones(64, 64)))
def test_what_is_not_read_is_refused_by_its_name_with_a_remedy(stored, form):
    parts, message = refused(stored.weight)[form]
    path = stored(parts)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    assert LAYER in str(error.value) and "bf16" in str(error.value)


def test_int8_that_no_declaration_covers_is_refused_where_others_have_one(stored):
    scale = torch.ones(stored.weight.shape[0], 1)
    layers = {"layers": {"another.model.layer": INT8 | {"convrot": True}}}
    with pytest.raises(UserError, match="int8 without a declaration"):
        load(stored({"weight": int8(stored.weight, scale), "weight_scale": scale}, _quantization_metadata=json.dumps(layers)))
    for text in ("[", '{"layers": 1}', '{"layers": {"a": 1}}'):
        with pytest.raises(UserError, match="_quantization_metadata"):
            load(stored({}, _quantization_metadata=text))


def test_files_of_a_pack_each_declare_their_own_layers(tmp_path):
    """An int8 transformer and its int8 text encoder in one folder."""
    for file in ("a", "b"):
        tensors = {f"{file}.weight": torch.ones(4, 4, dtype=torch.int8), f"{file}.weight_scale": torch.ones(4, 1)}
        layers = {"_quantization_metadata": json.dumps({"layers": {file: INT8}})}
        save_file(tensors, tmp_path / f"{file}.safetensors", metadata=layers)
    for pack in (open_checkpoint(tmp_path), open_checkpoint(tmp_path / "a.safetensors")):
        read = read_quantization(pack, {name: name for name in pack.names()})
        assert read.receipt == f"int8, one scale a row, {len(pack.names()) // 2} linears"
    save_file({"c": torch.ones(1)}, tmp_path / "c.safetensors", metadata={"_quantization_metadata": "[]"})
    with pytest.raises(UserError, match="c.safetensors: its '_quantization_metadata' metadata has no 'layers'"):
        open_checkpoint(tmp_path)


def test_scales_of_the_stream_that_is_not_built_do_no_harm(tiny_family, tmp_path):
    name = f"{PREFIX}transformer_blocks.0.audio_attn1.to_q"
    tensors = load_file(tiny_family.ltx23)
    scale = tensors[f"{name}.weight"].abs().max() / 448
    parts = {f"{name}.weight": fp8(tensors[f"{name}.weight"], scale), f"{name}.weight_scale": scale, f"{name}.comfy_quant": as_json(FP8)}
    save_file(tensors | parts, tmp_path / "m.safetensors", metadata=dict(open_checkpoint(tiny_family.ltx23).metadata))
    model = load_transformer(open_checkpoint(tmp_path / "m.safetensors"), mode="video", device="cpu", dtype=torch.float32)
    assert not any("audio" in name for name in model.state_dict())


def test_leftovers_of_merging_are_left_aside_with_one_warning(stored, caplog):
    path = stored({}, {f"{PREFIX}zsnr": torch.zeros(1), f"{PREFIX}model_ema.decay": torch.zeros(())})
    assert torch.equal(load(path), stored.weight)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "'zsnr'" in record.message and "'model_ema.decay'" in record.message
    with pytest.raises(UserError, match="unexpected 1 tensor.*'foreign'"):
        load(stored({}, {f"{PREFIX}foreign": torch.zeros(2)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_the_checkpoints_fault(stored, value, dtype):
    weight = stored.weight.to(dtype)
    weight[3, 5] = value
    path = stored({"weight": weight})
    with pytest.raises(UserError, match=f"holds NaN or infinity in 1 tensor.*{PREFIX}{LAYER}.weight") as error:
        load(path)
    assert str(path) in str(error.value)


def test_a_scale_that_is_not_finite_is_found_too(stored):
    with pytest.raises(UserError, match="holds NaN or infinity"):
        load(stored({"weight": stored.weight.to(torch.float8_e4m3fn), "weight_scale": torch.tensor(float("nan"))}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_scale_that_is_lost_negative_or_zero_is_refused(stored, dtype):
    most = torch.finfo(dtype).max
    whole, rows = stored.weight.abs().max() / most, stored.weight.abs().amax(1, keepdim=True) / most
    codes = fp8(stored.weight, whole, dtype)
    other = f"{PREFIX}transformer_blocks.0.attn1.to_k"
    others = {f"{other}.weight": fp8(stored.weight, whole, dtype), f"{other}.weight_scale": whole}
    with pytest.raises(UserError, match=f"{WEIGHT}' is fp8 .* with numbers up to {most:g} and without a scale, which others have"):
        load(stored({"weight": codes}, others))
    load(stored({"weight": stored.weight.to(dtype)}, others))  # a plain cast beside scaled ones
    with pytest.raises(UserError, match="attn1.to_q.weight_scale': is -.*and a scale is above 0"):
        load(stored({"weight": codes, "weight_scale": -whole}))
    rows[3] = 0
    with pytest.raises(UserError, match="attn1.to_q.weight_scale': is 0 for numbers that are not"):
        load(stored({"weight": codes, "weight_scale": rows}))
    codes = codes.float()
    codes[3] = 0
    assert not load(stored({"weight": codes.to(dtype), "weight_scale": rows}))[3].any()
