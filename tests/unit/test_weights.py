"""Reading checkpoints, and telling versions apart."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE, find_vae
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.text.connectors import load_connectors
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.load import load_transformer, read_config
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError


def load(path, mode="av", **extra):
    return load_transformer(open_checkpoint(path), mode=mode, device="cpu", dtype=torch.float32, **extra)


def rewritten(path, target, change, *, metadata=None):
    tensors = load_file(path)
    save_file(change(tensors), target, metadata=metadata)
    return target


def config_metadata(path):
    return dict(open_checkpoint(path).metadata)


def test_versions_are_detected_from_tensors(tiny_family):
    paths = {"2.0": tiny_family.ltx20, "2.3": tiny_family.ltx23, "2.5": tiny_family.ltx25_transformer}
    assert {version: detect_version(open_checkpoint(path)) for version, path in paths.items()} == {version: version for version in paths}


@pytest.mark.parametrize("mode", ["video", "av", "audio"])
def test_modes_load_their_subset_frozen(tiny_family, mode):
    model = load(tiny_family.ltx23, mode)
    whole = load(tiny_family.ltx23)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(p.is_meta for p in model.parameters())
    assert set(model.state_dict()) <= set(whole.state_dict())
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    assert any("audio" in name for name in model.state_dict()) == (mode != "video")


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_other_prefixes_load(tiny_family, tmp_path, prefix):
    old = "model.diffusion_model."

    def change(tensors):
        return {name.replace(old, prefix, 1): value for name, value in tensors.items() if name.startswith(old) and "connector" not in name}

    path = rewritten(tiny_family.ltx23, tmp_path / "m.safetensors", change, metadata=config_metadata(tiny_family.ltx23))
    assert torch.equal(load(path).patchify_proj.weight, load(tiny_family.ltx23).patchify_proj.weight)


def test_split_pack_folder_loads(tiny_family, tmp_path):
    tensors = load_file(tiny_family.ltx23)
    metadata = config_metadata(tiny_family.ltx23)
    config = json.loads(metadata["config"])
    parts = {
        "diffusion_models/t": ("model.diffusion_model.", "transformer"),
        "vae/v": ("vae.", "vae"),
        "vae/a": ("audio_vae.", "audio_vae"),
    }
    for name, (prefix, section) in parts.items():
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        part = {key: value for key, value in tensors.items() if key.startswith(prefix)}
        save_file(part, path, metadata={"config": json.dumps({section: config[section]}), "model_version": "2.3"})
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.config) == {"transformer", "vae", "audio_vae"}
    assert torch.equal(load(tmp_path).patchify_proj.weight, tensors["model.diffusion_model.patchify_proj.weight"])


@pytest.mark.parametrize("version", ["ltx20", "ltx23", "ltx25_transformer"])
def test_config_is_found_without_metadata(tiny_family, tmp_path, version):
    source = getattr(tiny_family, version)
    path = rewritten(source, tmp_path / "m.safetensors", lambda tensors: tensors)
    bare, full = read_config(open_checkpoint(path)), read_config(open_checkpoint(source))
    if version == "ltx20":  # without gates nothing tells the number of heads; released models have 32
        assert (bare.num_attention_heads, full.num_attention_heads) == (32, 4)
        assert (bare.video_dim, bare.audio_dim, bare.caption_channels) == (full.video_dim, full.audio_dim, full.caption_channels)
    else:
        ignored = {"caption_channels"}
        differing = {name for name in TransformerConfig.__dataclass_fields__ if getattr(bare, name) != getattr(full, name)}
        assert differing <= ignored


def test_prequantized_fp8_loads(tiny_family, tmp_path):
    name = "model.diffusion_model.transformer_blocks.0.attn1.to_q"

    def change(tensors):
        weight = tensors[f"{name}.weight"]
        scale = weight.abs().max() / 448
        quantized = (weight / scale).to(torch.float8_e4m3fn)
        return tensors | {f"{name}.weight": quantized, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(1.0)}

    path = rewritten(tiny_family.ltx23, tmp_path / "m.safetensors", change, metadata=config_metadata(tiny_family.ltx23))
    ours, original = load(path).transformer_blocks[0].attn1.to_q.weight, load(tiny_family.ltx23).transformer_blocks[0].attn1.to_q.weight
    assert ours.dtype == torch.float32
    assert 0 < float((ours - original).abs().max()) < 0.07 * float(original.abs().max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if not n.endswith("attn1.to_q.bias")}, "missing .* 'transformer_blocks.0.attn1.to_q.bias'"),
        (lambda t: t | {"model.diffusion_model.transformer_blocks.0.foreign.weight": torch.zeros(1)}, "unexpected .*foreign"),
        (lambda t: t | {"model.diffusion_model.patchify_proj.bias": torch.zeros(3)}, r"patchify_proj.bias' has the shape \(3,\)"),
        (lambda t: {n: v for n, v in t.items() if "audio" not in n}, "LTX-Video 0.9|needs the audio stream"),
        (lambda t: {n: v for n, v in t.items() if n.startswith("vae.")}, "holds no LTX-2 transformer"),
    ],
)
def test_checkpoints_that_do_not_fit_are_named(tiny_family, tmp_path, change, message):
    path = rewritten(tiny_family.ltx23, tmp_path / "m.safetensors", change, metadata=config_metadata(tiny_family.ltx23))
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "m.safetensors" in str(error.value)


def test_damaged_files_are_named(tiny_family, tmp_path):
    data = tiny_family.ltx25_transformer.read_bytes()
    cases = {
        "cut.safetensors": (data[: len(data) // 2], "truncated"),
        "short.safetensors": (b"1234", "truncated"),
        "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 46000000000\n", "git lfs pull"),
        "model.ckpt": (data, "not a .safetensors file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            open_checkpoint(tmp_path / name)
        assert name in str(error.value)
    for path in ("https://example.org/m.safetensors", Path("https://example.org/m.safetensors")):
        with pytest.raises(UserError, match="a URL"):
            open_checkpoint(path)
    with pytest.raises(UserError, match="no such file or folder"):
        open_checkpoint(tmp_path / "none.safetensors")


def test_constants_of_the_architecture_are_checked():
    with pytest.raises(UserError, match="qk_norm"):
        TransformerConfig.from_checkpoint_config({"qk_norm": "layer_norm"})


def test_fingerprint_tells_weights_apart_and_not_files(tiny_family, tmp_path):
    first = open_checkpoint(tiny_family.ltx23)
    names = first.with_prefix("vae.")
    bare = {name.removeprefix("vae."): value for name, value in load_file(tiny_family.ltx23).items() if name.startswith("vae.")}
    save_file(bare, tmp_path / "vae.safetensors")
    alone = open_checkpoint(tmp_path / "vae.safetensors")
    assert first.fingerprint(names) == alone.fingerprint(alone.with_prefix(""))
    key = max(bare, key=lambda name: bare[name].numel())
    bare[key] = bare[key] + 1e-3
    save_file(bare, tmp_path / "other.safetensors")
    other = open_checkpoint(tmp_path / "other.safetensors")
    assert other.fingerprint(other.with_prefix("")) != alone.fingerprint(alone.with_prefix(""))


REAL = {
    "2.0": ({}, 3510, 18_876_174_592, 13_041_520_768),
    "2.3": ({}, 4186, 18_988_838_144, 13_124_316_288),
    "2.5": ({"ff_bias": False, "use_keyframes_abs_pos_embedding": True}, 4091, 18_987_859_200, None),
}


@pytest.mark.parametrize("version", REAL)
def test_real_sizes_have_the_released_counts(version):
    """docs/explanation/model.md, "configuration"."""
    extra, tensors, parameters, video_only = REAL[version]
    values = dict(extra, av_ca_timestep_scale_multiplier=1000.0, frequencies_precision="float64")
    if version != "2.0":
        values |= {"apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True}
    config = TransformerConfig(**values)
    with torch.device("meta"):
        model, video = LTXModel(config), LTXModel(config, ("video",))
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert set(video.state_dict()) < set(model.state_dict())
    if video_only:
        assert sum(p.numel() for p in video.parameters()) == video_only


def with_section(source, target, **changes):
    metadata = config_metadata(source)
    config = json.loads(metadata["config"])
    for section, values in changes.items():
        config[section] = config[section] | values if isinstance(values, dict) else values
    save_file(load_file(source), target, metadata=metadata | {"config": json.dumps(config)})
    return open_checkpoint(target)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_head_dim", None),
        ("attention_head_dim", "64"),
        ("num_layers", 1.5),
        ("num_layers", True),
        ("num_layers", -1),
        ("num_layers", 10**9),
        ("positional_embedding_theta", "x"),
        ("positional_embedding_max_pos", [20, 2048]),
        ("positional_embedding_max_pos", 20),
        ("rope_type", None),
        ("apply_gated_attention", "yes"),
        ("qk_norm", ["rms_norm"]),
    ],
)
def test_values_of_the_config_that_no_model_can_have_are_named(tiny_family, tmp_path, key, value):
    checkpoint = with_section(tiny_family.ltx23, tmp_path / "m.safetensors", transformer={key: value})
    with pytest.raises(UserError, match=rf"m.safetensors: checkpoint config: transformer.{key} is ") as error:
        read_config(checkpoint)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("section", "values", "read"),
    [
        ("vae", {"encoder_blocks": 3}, lambda c: VideoVAE.load(c, device="cpu", dtype=torch.float32)),
        ("vae", {"encoder_blocks": [["res_x", {}]]}, lambda c: VideoVAE.load(c, device="cpu", dtype=torch.float32)),
        ("audio_vae", {"model": None}, lambda c: AudioVAE.load(c, device="cpu")),
        ("vocoder", {"bwe": 1}, lambda c: Vocoder.load(c, device="cpu")),
        ("transformer", {"connector_num_layers": "two"}, lambda c: load_connectors(c, device="cpu", dtype=torch.float32)),
    ],
)
def test_sections_that_nothing_can_be_built_from_are_named(tiny_family, tmp_path, section, values, read):
    checkpoint = with_section(tiny_family.ltx23, tmp_path / "m.safetensors", **{section: values})
    with pytest.raises(UserError, match=f"m.safetensors: nothing can be built from the section '{section}' .*release's own file"):
        read(checkpoint)


def test_a_vae_alone_without_config_is_told_so(tiny_family, tmp_path):
    bare = {name.removeprefix("vae."): value for name, value in load_file(tiny_family.ltx23).items() if name.startswith("vae.")}
    save_file(bare, tmp_path / "vae.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="vae.safetensors: it has no 'config' metadata, and so no 'vae' section"):
        find_vae(open_checkpoint(tmp_path / "vae.safetensors"))
    save_file(bare, tmp_path / "vae.safetensors", metadata={"config": '{"vocoder": {}}'})
    with pytest.raises(UserError, match="holds no video VAE"):
        find_vae(open_checkpoint(tmp_path / "vae.safetensors"))
