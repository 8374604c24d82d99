"""Encoder folders as people put them together: what is in them is used rightly, or refused in words before anything is encoded."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from musubi_tuner.ltxv2.text.encoders import encoder_fingerprint, encoder_options, load_encoder
from musubi_tuner.runtime.errors import UserError

PROMPTS = ["A dog barks.", "The rain taps on the roof while an old man waits quietly beside the neon sign."]
LARGEST = {torch.float8_e4m3fn: 448, torch.int8: 127}


def options(folder, backend="gemma", **changes):
    made = encoder_options(str(folder), tokenizer=None, backend=backend, device=torch.device("cpu"), max_length=16)
    return dataclasses.replace(made, **changes)


def states(folder, backend="gemma"):
    return load_encoder(options(folder, backend)).encode(PROMPTS).layers


@pytest.fixture
def folder(tiny_family, tmp_path):
    """The tiny Gemma, to be changed."""
    return shutil.copytree(tiny_family.gemma, tmp_path / "gemma")


def rewrite(folder, change, name="model.safetensors"):
    tensors = load((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, folder / name, metadata={"format": "pt"})


def whole_model_config(folder):
    """config.json as the hub has it for a model with a vision tower."""
    path = folder / "config.json"
    vision = {"hidden_size": 32, "image_size": 28, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": json.loads(path.read_text(encoding="utf-8")),
        "vision_config": vision | {"patch_size": 14, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    }
    path.write_text(json.dumps(config), encoding="utf-8")


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch):
    opened = Path.open

    def refuse(path, *arguments, **named):
        if path.name == "tokenizer.json":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"gemma.tokenizer\.json: cannot be read \(Permission denied\)"):
        encoder_fingerprint(options(folder))


def test_a_config_that_builds_no_encoder_is_named(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"head_dim": -2}), encoding="utf-8")
    with pytest.raises(UserError, match="gemma.*: no encoder can be built by its config.json"):
        load_encoder(options(folder))


def test_a_name_that_no_folder_can_have_is_refused_in_words():
    with pytest.raises(UserError, match="--text_encoder n{100}(: no encoder can be there .*Give its|.* or give the) folder"):
        load_encoder(options("n" * 5000))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda value: value | {"added_tokens": [{"id": True}]}),
        ("tokenizer.json", lambda value: value | {"model": value["model"] | {"vocab": {}}}),
        ("tokenizer_config.json", lambda value: value | {"bos_token": 5}),
    ],
)
def test_a_damaged_tokenizer_is_named(folder, name, change):
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(UserError, match="--text_encoder .*gemma: holds no tokenizer that transformers can read"):
        load_encoder(options(folder))


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", "language_model.", ""])
@pytest.mark.parametrize("whole", [True, False])
def test_names_of_every_layout_give_the_same_states(tiny_family, folder, prefix, whole):
    if whole:
        whole_model_config(folder)
    aside = {"vision_model.a.weight": torch.zeros(2), "multi_modal_projector.b": torch.zeros(2), "tokenizer_json": torch.zeros(5).byte()}
    rewrite(folder, lambda tensors: {prefix + key: value for key, value in tensors.items()} | aside, name="gemma_3_12B_it.safetensors")
    assert all(torch.equal(one, other) for one, other in zip(states(folder), states(tiny_family.gemma), strict=True))


def quantized(tensors, dtype, leaf, *, rows, part="layers"):
    found = dict(tensors)
    for name, value in tensors.items():
        if value.ndim == 2 and part in name:
            scale = (value.abs().amax(1, keepdim=True) if rows else value.abs().max()) / LARGEST[dtype]
            codes = value / scale
            found[name] = (codes if dtype.is_floating_point else codes.round()).to(dtype)
            found[name.removesuffix("weight") + leaf] = scale
    return found


@pytest.mark.parametrize(
    ("dtype", "leaf", "rows"),
    [
        (torch.float8_e4m3fn, "scale_weight", False),
        (torch.float8_e4m3fn, "weight_scale", True),
        (torch.int8, "weight_scale", True),
    ],
)
def test_quantized_encoders_are_scaled(tiny_family, folder, caplog, dtype, leaf, rows):
    rewrite(folder, lambda tensors: quantized(tensors, dtype, leaf, rows=rows))
    with caplog.at_level("INFO"):
        found, wanted = states(folder)[-1], states(tiny_family.gemma)[-1]
    assert 0 < float((found - wanted).norm()) < 0.1 * float(wanted.norm())
    assert f"one scale a {'row' if rows else 'tensor'}, 21 linears" in caplog.text
    with pytest.raises(UserError, match="stored as .*take a bf16 folder"):
        load_encoder(options(folder, load_in_8bit=True))


def test_t5_is_read_with_either_name_of_its_embedding(tiny_family, tmp_path):
    wanted = states(tiny_family.t5, "t5")[-1]
    names = ("shared.weight", "encoder.embed_tokens.weight")
    for place, (keep, drop) in enumerate((names, names[::-1])):
        folder = shutil.copytree(tiny_family.t5, tmp_path / str(place))
        embedding = load((folder / "model.safetensors").read_bytes())["shared.weight"]
        aside = {"decoder.a.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2), keep: embedding}
        rewrite(folder, lambda tensors, drop=drop, aside=aside: {k: v for k, v in tensors.items() if k != drop} | aside)
        encoder = load_encoder(options(folder, "t5"))
        assert torch.equal(encoder.encode(PROMPTS).layers[-1], wanted)
        assert encoder._model.shared.weight is encoder._model.encoder.embed_tokens.weight
    half = load_encoder(options(tiny_family.t5, "t5", dtype=torch.float16))._model.state_dict()
    assert {value.dtype for name, value in half.items() if name.endswith(".wo.weight")} == {torch.float32}, "as transformers holds them"
    assert {value.dtype for name, value in half.items() if not name.endswith(".wo.weight")} == {torch.float16}


def drop_half(folder):
    rewrite(folder, lambda tensors: dict(sorted(tensors.items())[::2]))


def spoil(folder):
    def change(tensors):
        tensors["layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
        return tensors

    rewrite(folder, change)


def with_index(folder):
    rewrite(folder, dict, name="model-00001-of-00002.safetensors")
    names = {"embed_tokens.weight": "model-00001-of-00002.safetensors", "norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def with_two(folder):
    shutil.move(folder / "model.safetensors", folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def with_config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def with_weights(content):
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def with_tensor(name):
    return lambda folder: rewrite(folder, lambda tensors: tensors | {name: torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_half, r"do not fit Gemma3TextModel: missing \d+ tensor\(s\): 'layers.0.*Download the whole encoder again"),
        (with_tensor("layers.9.mlp.up_proj.weight"), "unexpected 1 tensor.*'layers.9.mlp.up_proj.weight'"),
        (with_tensor("layers.0.self_attn.q_proj.weight_scale_2"), "NVFP4 weights.*q_proj"),
        (with_config(num_hidden_layers=9, layer_types=None), "missing .*'layers.3."),
        (with_config(hidden_size=64), "has the shape"),
        (spoil, "holds NaN or infinity in 1 tensor.*'layers.0.mlp.up_proj.weight'"),
        (with_index, "names 2 files, of which 1 are not in its folder, first model-00002-of-00002.safetensors"),
        (with_two, "a.safetensors, b.safetensors: which of them is the encoder"),
        (with_weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"), "git-lfs pointer.*git lfs pull"),
        (with_weights(b"GGUF" + bytes(99)), "GGUF file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: rewrite(folder, lambda tensors: {"a": torch.zeros(2)}), "none of its 1 tensors has a name of the encoder's"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json: not valid JSON: nested too deeply"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: is no JSON object"),
        (with_config(hidden_size="wide"), "config.json cannot be read"),
        (with_config(quantization_config={"quant_method": "gptq", "bits": 4}), "prequantized by 'gptq', which is not read"),
        (with_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "prequantized by bitsandbytes, and they"),
    ],
)
def test_folders_that_lack_something_are_refused_in_words(folder, capfd, change, message):
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        states(folder)
    assert str(folder) in str(error.value)
    assert "Loading weights" not in capfd.readouterr().err


def test_prequantized_folders_need_bitsandbytes(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(folder)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        states(folder)


@pytest.mark.parametrize("change", [drop_half, with_tensor("layers.9.mlp.up_proj.weight")])
def test_what_bitsandbytes_quantizes_is_as_strict_and_as_quiet(folder, capfd, change):
    change(folder)
    with pytest.raises(UserError, match="its tensors do not fit Gemma3TextModel: (missing|unexpected) .*'layers"):
        load_encoder(options(folder, load_in_8bit=True))
    assert "Loading weights" not in capfd.readouterr().err
