"""Our loaders of the frozen parts against ltx-core 1.0.0, from one official-format file with the tiny weights. float32, CPU."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch

from musubi_tuner.ltxv2.autoencoders import audio_vae, video_vae, vocoder
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE, audio_vae_fingerprint, log_mel, mel_filters
from musubi_tuner.ltxv2.autoencoders.tiling import AxisTiles, overlaps, ramp
from musubi_tuner.ltxv2.autoencoders.video_vae import TileSizes, VideoVAE, video_vae_fingerprint
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.text.connectors import load_connectors
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.media.audio import resample
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny import configs
from musubi_tuner.tiny.checkpoint import vae_tensors

STYLES = ("ltx20", "ltx23")


@pytest.fixture(scope="module", autouse=True)
def torchaudio_stand_in():
    """ltx-core's audio module imports torchaudio; nothing of it is called here."""
    import diffusers  # noqa: F401 - its probing must come before the stand-in

    module = types.ModuleType("torchaudio")
    module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", module)


@pytest.fixture(scope="module", params=STYLES)
def checkpoint(request, tiny_family):
    return open_checkpoint(getattr(tiny_family, request.param))


def tensors(checkpoint, prefix: str) -> dict[str, torch.Tensor]:
    return {name: checkpoint.tensor(full) for name, full in checkpoint.with_prefix(prefix).items()}


def filled(module: torch.nn.Module, values: dict[str, torch.Tensor], prefix: str = "") -> torch.nn.Module:
    """Load strictly; statistics that ltx-core holds besides mean and std keep their values."""
    wanted = {
        name: values[prefix + name] if prefix + name in values else values.get(name, old) for name, old in module.state_dict().items()
    }
    module.load_state_dict(wanted, strict=True)
    return module.eval()


def pixels(frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1


@torch.no_grad()
def test_video_vae_equals_ltx_core(checkpoint):
    from ltx_core.model.video_vae.model_configurator import VideoDecoderConfigurator, VideoEncoderConfigurator

    config, values = {"vae": checkpoint.config["vae"]}, tensors(checkpoint, "vae.")
    encoder = filled(VideoEncoderConfigurator.from_config(config), values, "encoder.")
    decoder = filled(VideoDecoderConfigurator.from_config(config), values, "decoder.")
    ours = VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32)
    frames = pixels(17, 64, 96)
    latents = ours.encode(frames)
    assert latents.shape == (1, 128, 3, 2, 3)
    assert float((latents - encoder(frames)).abs().max()) < 1e-4
    in_parts = VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32, parts=("encoder",), tiles=TileSizes(frames=8))
    assert float((in_parts.encode(frames) - encoder(frames)).abs().max()) < 1e-4
    decoded = ours.decode(latents)
    assert decoded.shape == frames.shape
    assert float((decoded - decoder(latents)).abs().max()) < 1e-4


@torch.no_grad()
def test_a_decoder_conditioned_on_a_timestep_equals_ltx_core(checkpoint, tmp_path):
    """Its noise is added before the clip is cut into tiles."""
    from ltx_core.model.video_vae.model_configurator import VideoDecoderConfigurator
    from safetensors.torch import save_file

    version = checkpoint.model_version[:3]
    values = vae_tensors(version, timestep_conditioning=True)
    section = checkpoint.config["vae"] | {"timestep_conditioning": True}
    save_file(values, tmp_path / "vae.safetensors", metadata={"config": json.dumps({"vae": section})})
    decoder = filled(
        VideoDecoderConfigurator.from_config({"vae": section}), {name[4:]: value for name, value in values.items()}, "decoder."
    )
    ours = VideoVAE.load(open_checkpoint(tmp_path / "vae.safetensors"), device="cpu", dtype=torch.float32)
    latents = torch.randn(2, 128, 3, 2, 3, generator=torch.Generator().manual_seed(4))
    found, wanted = ours.decode(latents), decoder(latents, generator=generator_for(0, "decoder noise"))
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert torch.equal(found, ours.decode(latents))
    assert float((found - decoder(latents, timestep=torch.full((2,), 0.5), generator=generator_for(0, "decoder noise"))).abs().max()) > 1e-3
    plain = decoder(latents, generator=generator_for(0, "another"))
    assert float((found - plain).abs().max()) > 1e-3
    with pytest.raises(UserError, match="block 0 has 'inject_noise'"):
        blocks = [["res_x", {"num_layers": 0, "inject_noise": True}], *section["decoder_blocks"][1:]]
        video_vae.diffusers_config(section | {"decoder_blocks": blocks})


@torch.no_grad()
def test_audio_vae_equals_ltx_core(checkpoint):
    from ltx_core.model.audio_vae.model_configurator import AudioDecoderConfigurator, AudioEncoderConfigurator

    config, values = {"audio_vae": checkpoint.config["audio_vae"]}, tensors(checkpoint, "audio_vae.")
    encoder = filled(AudioEncoderConfigurator.from_config(config), values, "encoder.")
    decoder = filled(AudioDecoderConfigurator.from_config(config), values, "decoder.")
    ours = AudioVAE.load(checkpoint, device="cpu")
    sound = torch.randn(1, 2, 16000, generator=torch.Generator().manual_seed(2)) * 0.1
    latents = ours.encode(sound)
    assert latents.shape == (1, 8, 26, 16)
    assert float((latents - encoder(log_mel(sound))).abs().max()) < 1e-4
    mel = ours.decode(latents)
    assert mel.shape == (1, 2, 101, 64)
    assert float((mel - decoder(latents)).abs().max()) < 1e-4


@torch.no_grad()
def test_vocoder_equals_ltx_core(checkpoint):
    from ltx_core.model.audio_vae.model_configurator import VocoderConfigurator

    reference = filled(VocoderConfigurator.from_config({"vocoder": checkpoint.config["vocoder"]}), tensors(checkpoint, "vocoder."))
    ours = Vocoder.load(checkpoint, device="cpu")
    mel = torch.randn(1, 2, 9, 64, generator=torch.Generator().manual_seed(3))
    waveform = ours(mel)
    assert waveform.shape[2] == round(9 * 0.01 * ours.sampling_rate)
    assert float((waveform - reference(mel)).abs().max()) < 1e-4
    if checkpoint.config["vocoder"].get("bwe"):
        peaks = []
        hook = reference.vocoder.register_forward_hook(lambda module, inputs, output: peaks.append(float(output.abs().max())))
        loud = mel * 60
        assert float((ours(loud) - reference(loud)).abs().max()) < 1e-4
        hook.remove()
        assert peaks[0] >= 1, "loud enough that the first stage is clamped"


def test_mel_filters_equal_transformers():
    from transformers.audio_utils import mel_filter_bank

    expected = torch.from_numpy(mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")).float()
    assert float((mel_filters() - expected).abs().max()) < 1e-7
    assert log_mel(torch.zeros(1, 2, 16000)).shape == (1, 2, 101, 64)


def test_resampler_keeps_tones_and_drops_what_does_not_fit():
    time = torch.arange(48000) / 48000
    low, high = torch.sin(2 * torch.pi * 440 * time), torch.sin(2 * torch.pi * 12000 * time)
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
    assert float((resample(low[None], 48000, 16000)[0, 200:-200] - expected[200:-200]).abs().max()) < 5e-3
    assert float(resample(high[None], 48000, 16000)[0, 200:-200].abs().max()) < 5e-3
    assert resample(torch.zeros(2, 44100), 44100, 16000).shape == (2, 16000)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean() / other.std())


def test_tiles_agree_with_the_whole(checkpoint):
    """Random weights are the hard case: nothing dies out with distance, as it does in a trained VAE."""
    coarse = torch.rand(1, 3, 10, 2, 10, generator=torch.Generator().manual_seed(4)) * 2 - 1
    frames = torch.nn.functional.interpolate(coarse, size=(73, 64, 320), mode="trilinear")

    def load(tiles: TileSizes) -> VideoVAE:
        return VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32, tiles=tiles)

    latents = load(TileSizes()).encode(frames)

    def coded(tiles: TileSizes) -> tuple[torch.Tensor, torch.Tensor]:
        vae = load(tiles)
        return vae.encode(frames), vae.decode(latents)

    whole = (latents, load(TileSizes()).decode(latents))
    usual = coded(TileSizes(pixels=256, frames=48))
    wide = coded(TileSizes(pixels=288, pixel_overlap=192, frames=64, frame_overlap=48))
    for one, usually, widely in zip(whole, usual, wide, strict=True):
        assert one.shape == usually.shape == widely.shape
        assert 0 < relative(usually, one) < 0.2
        assert relative(widely, one) < min(0.1, 0.7 * relative(usually, one))
    for frames_at_once in (8, 24, 48):
        in_time = load(TileSizes(frames=frames_at_once, frame_overlap=0)).encode(frames)
        assert float((in_time - latents).abs().max()) < 1e-4, "the encoder is causal: parts are the whole"


def test_tiles_cover_every_size_evenly():
    for size, overlap in ((24, 4), (10, 3), (8, 4)):
        tiles = AxisTiles(size, overlap)
        assert tiles.places(size) == [(0, size)]
        for length in range(size + 1, 120):
            places = tiles.places(length)
            assert places[0][0] == 0 and places[-1][1] == length
            total = torch.zeros(length)
            for place, (start, end) in enumerate(places):
                before, after = overlaps(places, place)
                assert end - start <= size and (place == 0 or before >= overlap) and (place + 1 == len(places) or after >= overlap)
                total[start:end] += ramp(end - start, before, after)
            assert float(total.min()) > 0.2


def test_component_files_and_fingerprints(checkpoint, tmp_path):
    """A file with the VAE alone, bare or with its prefix, is the same VAE."""
    from safetensors.torch import save_file

    config = {"config": json.dumps({"vae": checkpoint.config["vae"]})}
    bare = tensors(checkpoint, "vae.")
    for name, prefix in (("bare", ""), ("prefixed", "vae.")):
        path = tmp_path / f"{name}.safetensors"
        save_file({prefix + key: value for key, value in bare.items()}, path, metadata=config)
        alone = open_checkpoint(path)
        assert video_vae_fingerprint(alone) == video_vae_fingerprint(checkpoint)
        VideoVAE.load(alone, device="cpu", dtype=torch.float32)
        with pytest.raises(UserError, match="audio"):
            audio_vae_fingerprint(alone)


def test_a_file_without_the_component_says_which_flag_to_give(tiny_family, checkpoint, tmp_path):
    from safetensors.torch import save_file

    transformer = open_checkpoint(tiny_family.ltx25_transformer)
    with pytest.raises(UserError, match="holds no video VAE.*--vae"):
        VideoVAE.load(transformer, device="cpu", dtype=torch.float32)
    with pytest.raises(UserError, match="holds no vocoder.*--audio_vae"):
        Vocoder.load(transformer, device="cpu")
    save_file(tensors(checkpoint, ""), tmp_path / "stripped.safetensors")
    with pytest.raises(UserError, match="no 'audio_vae' section.*unmodified release file"):
        AudioVAE.load(open_checkpoint(tmp_path / "stripped.safetensors"), device="cpu")


def test_a_split_pack_gives_the_same_audio_parts(checkpoint, tmp_path):
    from safetensors.torch import save_file

    for name, prefixes in (("video", ("vae.",)), ("sound", ("audio_vae.", "vocoder."))):
        values = {key: value for key, value in tensors(checkpoint, "").items() if key.startswith(prefixes)}
        config = {prefix[:-1]: checkpoint.config[prefix[:-1]] for prefix in prefixes}
        (tmp_path / "vae").mkdir(exist_ok=True)
        save_file(values, tmp_path / "vae" / f"{name}.safetensors", metadata={"config": json.dumps(config)})
    pack = open_checkpoint(tmp_path)
    assert audio_vae_fingerprint(pack) == audio_vae_fingerprint(checkpoint)
    assert video_vae_fingerprint(pack) == video_vae_fingerprint(checkpoint)
    assert Vocoder.load(pack, device="cpu").sampling_rate == Vocoder.load(checkpoint, device="cpu").sampling_rate


def test_diffusion_vae_encodes_and_a_decoder_that_cannot_be_built_is_refused_with_the_remedy(checkpoint, tmp_path):
    """Its config is nested, and its encoder and statistics are those of the file with the plain decoder."""
    from safetensors.torch import save_file

    section = dict(checkpoint.config["vae"])
    nested = {key: section.pop(key) for key in ("encoder_blocks", "spatial_padding_mode") if key in section}
    del section["decoder_blocks"]
    section |= {"_class_name": "CausalDiffusionVAE", "encoder": nested, "decoder": {"depth": 4}, "model_output_type": "x0"}
    path = tmp_path / "vae.safetensors"
    save_file(tensors(checkpoint, "vae."), path, metadata={"config": json.dumps({"vae": section})})
    diffusion = open_checkpoint(path)
    with pytest.raises(UserError, match="ltx-2.5-video-vae-conv"):
        VideoVAE.load(diffusion, device="cpu", dtype=torch.float32)
    assert video_vae_fingerprint(diffusion) == video_vae_fingerprint(checkpoint)
    ours, plain = (VideoVAE.load(one, device="cpu", dtype=torch.float32, parts=("encoder",)) for one in (diffusion, checkpoint))
    assert torch.equal(ours.encode(pixels(9, 64, 64)), plain.encode(pixels(9, 64, 64)))


def test_unknown_blocks_and_recipes_are_refused_by_name(checkpoint):
    section = checkpoint.config["vae"]
    with pytest.raises(UserError, match="'attn_x'"):
        video_vae.diffusers_config(section | {"encoder_blocks": [["attn_x", {}], *section["encoder_blocks"]]})
    with pytest.raises(UserError, match="vae.norm_layer is 'group_norm'"):
        video_vae.diffusers_config(section | {"norm_layer": "group_norm"})
    sound = json.loads(json.dumps(checkpoint.config["audio_vae"]))
    sound["preprocessing"]["stft"]["hop_length"] = 256
    with pytest.raises(UserError, match="hop_length is 256"):
        audio_vae.diffusers_config(sound)


def res(layers: int) -> list:
    return ["res_x", {"num_layers": layers}]


def step(kind: str, multiplier: int, **more: object) -> list:
    return [f"compress_{kind}", {"multiplier": multiplier, **more}]


REAL = {
    "2.0": {
        "encoder_blocks": [
            res(4), step("space_res", 2), res(6), step("time_res", 2), res(6), step("all_res", 2), res(2), step("all_res", 2), res(2),
        ],
        "decoder_blocks": [res(5), *(x for _ in range(3) for x in (step("all", 2, residual=True), res(5)))],
    },
    "2.3": {
        "spatial_padding_mode": "zeros",
        "encoder_blocks": [
            res(4), step("space_res", 2), res(6), step("time_res", 2), res(4), step("all_res", 2), res(2), step("all_res", 1), res(2),
        ],
        "decoder_blocks": [res(4), step("space", 2), res(6), step("time", 2), res(4), step("all", 1), res(2), step("all", 2), res(2)],
    },
}  # fmt: skip


@pytest.mark.parametrize("version", REAL)
def test_real_size_names_and_shapes_equal_ltx_core(version):
    from diffusers import AutoencoderKLLTX2Video
    from ltx_core.model.video_vae.model_configurator import VideoDecoderConfigurator, VideoEncoderConfigurator

    section = {
        "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128, "patch_size": 4, "norm_layer": "pixel_norm",
        "latent_log_var": "uniform", "causal_decoder": False, "timestep_conditioning": False, "decoder_base_channels": 128, **REAL[version],
    }  # fmt: skip
    with torch.device("meta"):
        encoder = VideoEncoderConfigurator.from_config({"vae": section})
        decoder = VideoDecoderConfigurator.from_config({"vae": section})
        ours = AutoencoderKLLTX2Video(**video_vae.diffusers_config(section))
    official = {
        f"{part}.{name}": value
        for part, module in (("encoder", encoder), ("decoder", decoder))
        for name, value in module.state_dict().items()
    }
    blocks = len(section["encoder_blocks"])
    named = {video_vae.to_diffusers_name(name, blocks): tuple(value.shape) for name, value in official.items() if "per_channel" not in name}
    assert named == {name: tuple(value.shape) for name, value in ours.state_dict().items() if not name.startswith("latents_")}


def shapes(*modules: tuple[str, torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    return {
        prefix + name: tuple(value.shape)
        for prefix, module in modules
        for name, value in module.state_dict().items()
        if "per_channel" not in name and not name.startswith("latents_")
    }


def test_real_size_audio_vae_names_and_shapes_equal_ltx_core():
    from diffusers import AutoencoderKLLTX2Audio
    from ltx_core.model.audio_vae.model_configurator import AudioDecoderConfigurator, AudioEncoderConfigurator

    section = configs.audio_vae_section()
    section["model"]["params"]["ddconfig"] |= {"ch_mult": [1, 2, 4], "num_res_blocks": 2}
    with torch.device("meta"):
        encoder = AudioEncoderConfigurator.from_config({"audio_vae": section})
        decoder = AudioDecoderConfigurator.from_config({"audio_vae": section})
        ours = AutoencoderKLLTX2Audio(**audio_vae.diffusers_config(section))
    assert shapes(("", ours)) == shapes(("encoder.", encoder), ("decoder.", decoder))


@pytest.mark.parametrize("version", REAL)
def test_real_size_vocoder_names_and_shapes_equal_ltx_core(version):
    from diffusers.pipelines.ltx2 import LTX2Vocoder, LTX2VocoderWithBWE
    from ltx_core.model.audio_vae.model_configurator import VocoderConfigurator

    section = configs.vocoder_section(version)
    real = {"resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3}
    if version == "2.0":
        section |= real | {"upsample_initial_channel": 1024}
    else:
        section["vocoder"] |= real | {"upsample_initial_channel": 1536}
        section["bwe"] |= real | {"upsample_initial_channel": 512}
    with torch.device("meta"):
        reference = VocoderConfigurator.from_config({"vocoder": section})
        ours = (
            LTX2Vocoder(**vocoder.generator_config(section))
            if version == "2.0"
            else LTX2VocoderWithBWE(**vocoder.two_stage_config(section))
        )
    assert shapes(("", ours)) == {vocoder.to_diffusers_name(name): shape for name, shape in shapes(("", reference)).items()}


def test_every_frozen_part_is_frozen_and_in_eval_mode(checkpoint):
    """Else caching would keep graphs, and dropout or batch statistics would shape what is cached."""
    common = {"device": "cpu", "dtype": torch.float32}
    wrapped = (VideoVAE.load(checkpoint, **common), AudioVAE.load(checkpoint, device="cpu"), Vocoder.load(checkpoint, device="cpu"))
    modules = [value for one in wrapped for value in vars(one).values() if isinstance(value, torch.nn.Module)]
    modules.append(load_connectors(checkpoint, **common))
    assert len(modules) >= 4
    for module in modules:
        assert list(module.parameters()) and not any(parameter.requires_grad for parameter in module.parameters()), type(module)
        assert not any(part.training for part in module.modules()), type(module)
