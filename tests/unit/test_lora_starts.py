"""LoRA files of other programs: every naming, scales wherever they are written, files that are not what they seem."""

import json

import pytest
import torch
from safetensors.torch import save_file

from musubi_tuner.networks.lora import DOWN, UP
from musubi_tuner.networks.reading import network_metadata, read_network
from musubi_tuner.runtime.errors import UserError

QUERY, OUT = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.audio_attn1.to_out.0"
LINEARS = {QUERY: (6, 8), OUT: (8, 6)}
CONNECTOR = "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q"


def halves(name):
    generator = torch.Generator().manual_seed(len(name))
    rows, columns = LINEARS.get(name, (6, 8))
    return torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)


def stored(form="diffusion_model.{}.lora_{}.weight", names=tuple(LINEARS), ends=("A", "B")):
    """A file's tensors; underscores for dots in `form`s of kohya."""
    tensors = {}
    for name in names:
        shown = name.replace(".", "_") if form.startswith("lora_") else name
        tensors |= {form.format(shown, end): half for end, half in zip(ends, halves(name), strict=True)}
    return tensors


def written(folder, tensors, name="a.safetensors", **metadata):
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata or None)
    return folder / name


def same(read, scale=1.0):
    assert read.adapters.keys() == LINEARS.keys()
    for name, adapter in read.adapters.items():
        down, up = halves(name)
        assert torch.allclose(adapter.tensors[DOWN], down) and torch.allclose(adapter.tensors[UP], up * scale)
        assert adapter.rank == 4 and adapter.scale == pytest.approx(scale)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.",
                                    "base_model.model.diffusion_model."])  # fmt: skip
@pytest.mark.parametrize(
    ("leaf", "ends"),
    [
        ("lora_{}.weight", "AB"), ("lora_{}.default.weight", "AB"), ("lora_{}.my_adapter.weight", "AB"), ("lora_{}.default", "AB"),
        ("lora.{}.weight", ("down", "up")), ("lora_{}.weight", ("down", "up")),
    ],
)  # fmt: skip
def test_every_prefix_with_every_leaf(tmp_path, prefix, leaf, ends):
    read = read_network(written(tmp_path, stored(f"{prefix}{{}}.{leaf}", ends=ends)), LINEARS)
    same(read)
    assert read.form.startswith(f"{prefix}*.lora")


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet_model_", "lora_transformer_"])
def test_flattened_names_with_an_alpha(tmp_path, prefix):
    tensors = stored(f"{prefix}{{}}.lora_{{}}.weight", ends=("down", "up"))
    tensors |= {f"{prefix}{name.replace('.', '_')}.alpha": torch.tensor(8) for name in LINEARS}  # a whole number, as kohya stores it
    read = read_network(written(tmp_path, tensors), LINEARS)
    same(read, 2.0)
    assert read.scale_from == "alpha tensors"


PEFT = {"r": 4, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (PEFT, 4.0),
        (PEFT | {"use_rslora": True}, 8.0),
        (PEFT | {"r": 2, "rank_pattern": {"to_q": 4, "to_out.0": 4}, "alpha_pattern": {r"blocks\.\d+.*": 1, "attn1.to_q": 2}}, None),
        (PEFT | {"lora_alpha": 4}, 1.0),
        (PEFT | {"lora_alpha": 4, "alpha_pattern": {rf"^{QUERY}": 8, r"^transformer_blocks\.0\.audio": 2, rf"^{OUT}$": 8}}, 2.0),
    ],
)
@pytest.mark.parametrize("place", ["header", "header of a pipeline", "folder", "file", "file of another name"])
def test_the_scale_of_peft_is_found_in_header_and_folder(tmp_path, config, scale, place):
    tensors = stored("base_model.model.{}.lora_{}.weight")
    if place.startswith("header"):
        prefix = "transformer." if "pipeline" in place else ""
        header = json.dumps({f"{prefix}{key}": value for key, value in config.items()})
        path = written(tmp_path, tensors, lora_adapter_metadata=header)
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}), encoding="utf-8")
        path = written(tmp_path, tensors, "my.safetensors" if "name" in place else "adapter_model.safetensors")
        written(tmp_path, stored(), "z_newer.safetensors")
    read = read_network(tmp_path if place == "folder" else path, LINEARS)
    if scale is None:
        assert [adapter.scale for adapter in read.adapters.values()] == [0.5, 4.0], "the first pattern that fits a name's end"
    else:
        same(read, scale)
        assert ("adapter" in read.scale_from) and f"scale {scale:g} (" in read.describe()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PEFT | {"r": 8}, "says rank 8 for .*tensors have rank 4"),
        (PEFT | {"lora_alpha": 0}, "lora_alpha = 0: must be a number above 0"),
        (PEFT | {"lora_alpha": "x"}, "lora_alpha = .x.: must be a number"),
        (PEFT | {"rank_pattern": [1]}, "rank_pattern = .*numbers by pattern"),
        (PEFT | {"alpha_pattern": {"(": 1}}, "alpha_pattern: .* is no regular expression"),
        (PEFT | {"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ([1], "must hold keys and values"),
    ],
)
def test_peft_configs_that_cannot_be_trusted_are_refused(tmp_path, config, message):
    with pytest.raises(UserError, match=f"a.safetensors, 'lora_adapter_metadata' in its header: {message}"):
        read_network(written(tmp_path, stored(), lora_adapter_metadata=json.dumps(config)), LINEARS)


def test_two_scales_that_differ_are_refused(tmp_path):
    tensors = stored() | {f"diffusion_model.{name}.alpha": torch.tensor(8.0) for name in LINEARS}
    with pytest.raises(UserError, match="gives a scale of 2, .* one of 4"):
        read_network(written(tmp_path, tensors, lora_adapter_metadata=json.dumps(PEFT)), LINEARS)


@pytest.mark.parametrize("form", ["diffusion_model.{}.lora_{}.weight", "lora_unet_{}.lora_{}.weight"])
def test_adapters_of_the_connectors_are_left_out_by_name_or_read_alone(tmp_path, form):
    path = written(tmp_path, stored(form, (*LINEARS, CONNECTOR)))
    read = read_network(path, LINEARS)
    same(read)
    assert len(read.left_out) == 1 and read.left_out[0].startswith("video_embeddings_connector")
    assert list(read_network(path, {CONNECTOR: (6, 8)}, of_connectors=True).adapters) == [CONNECTOR]
    assert not read_network(written(tmp_path, stored(), name="without.safetensors"), {CONNECTOR: (6, 8)}, of_connectors=True).adapters


def test_a_scale_that_makes_infinity_is_named(tmp_path):
    tensors = stored() | {f"diffusion_model.{name}.alpha": torch.tensor(3e38) for name in LINEARS}
    tensors[f"diffusion_model.{QUERY}.lora_B.weight"] = torch.full((6, 4), 10.0)
    with pytest.raises(UserError, match=f"the scale of 'diffusion_model.{QUERY}', 7.5e\\+37, makes infinity of its values"):
        read_network(written(tmp_path, tensors), LINEARS)


@pytest.mark.parametrize("ending", ["lora_B.bias", "lora_A.weight_scale", "lora_A.scale_weight"])
def test_what_lies_beside_a_half_is_no_second_network(tmp_path, ending):
    tensors = stored() | {f"diffusion_model.{QUERY}.{ending}": torch.ones(())}
    with pytest.raises(UserError, match=f"the key 'diffusion_model.{QUERY}.{ending}' is of no form that is read here"):
        read_network(written(tmp_path, tensors), LINEARS)


def changed(key=f"diffusion_model.{QUERY}.lora_A.weight", value=None, **more):
    return stored() | ({} if value is None else {key: value}) | more


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no adapter; give a trained"),
        (stored(names=(CONNECTOR,)), "holds no adapter but those of the text connectors"),
        (stored("foo.bar.{}.lora_{}.weight"), r"The prefix 'foo.bar.' is not known; read are diffusion_model\."),
        (stored("lora_foo_{}.lora_{}.weight"), "The prefix 'lora_foo_' is not known"),
        (stored(names=(QUERY.replace("blocks.0", "blocks.9"),)), "It was made for another model"),
        (changed(value=torch.zeros(4, 5)),
         "made for another model: .* takes 5 values and gives 6 in the file, 8 and 6 in this"),
        (changed(value=torch.zeros(3, 8)), "do not have one rank"),
        (changed(value=torch.zeros(())), r"lora_A.weight has the shape \(\); it must be a matrix"),
        (changed(value=torch.zeros(8)), "it must be a matrix"),
        (changed(value=torch.zeros(0, 8)), "not empty"),
        (changed(value=torch.zeros(4, 8, 1, 1)), "it must be a matrix"),
        (changed(value=torch.zeros(4, 8, dtype=torch.int8)), "is of dtype int8"),
        (changed(value=torch.full((4, 8), float("nan"))), "holds NaN or infinity"),
        (stored() | {f"transformer.{QUERY}.lora_A.weight": torch.zeros(4, 8)}, "are for one tensor of one module"),
        (stored() | {f"{QUERY}.lora_A.other.weight": torch.zeros(4, 8)}, "are for one tensor of one module"),
        (stored() | {f"diffusion_model.{QUERY}.alpha": torch.zeros(2)}, "must be one number above 0"),
        (stored() | {f"diffusion_model.{QUERY}.alpha": torch.tensor(0.0)}, "must be one number above 0"),
        (stored() | {f"diffusion_model.{QUERY}.alpha": torch.tensor(float("inf"))}, "holds NaN or infinity"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_say_what_is_wrong(tmp_path, tensors, message):
    with pytest.raises(UserError, match=f"a.safetensors.*{message}"):
        read_network(written(tmp_path, tensors), LINEARS)


def test_an_av_lora_in_video_mode_is_told_the_mode(tmp_path):
    with pytest.raises(UserError, match="adapts 1 module.* of the audio side, which this --ltx_mode does not build. Give --ltx_mode av"):
        read_network(written(tmp_path, stored()), {QUERY: (6, 8)})


def test_an_av_lora_in_audio_mode_is_told_the_mode(tmp_path):
    cross = QUERY.replace("attn1", "audio_to_video_attn")
    halves = {f"{name}.lora_{half}.weight": torch.zeros(4, 4) for name in (cross, QUERY) for half in "AB"}
    with pytest.raises(UserError, match="adapts 2 module.* of the video side, which this --ltx_mode does not build. Give --ltx_mode av"):
        read_network(written(tmp_path, halves), {"transformer_blocks.0.audio_attn1.to_q": (6, 8)})


def test_a_damaged_file_is_called_one(tmp_path):
    path = written(tmp_path, stored())
    path.write_bytes(path.read_bytes()[:-10])
    for read in (lambda: read_network(path, LINEARS), lambda: network_metadata(path)):
        with pytest.raises(UserError, match="not a readable safetensors file"):
            read()


def test_a_file_that_may_not_be_read_is_not_said_to_be_missing(tmp_path, monkeypatch):
    path = written(tmp_path, stored())

    def refuse(self, *arguments, **named):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be read \(Permission denied\)\.$"):
        read_network(path, LINEARS)
