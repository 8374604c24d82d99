"""Our loaders of the frozen parts against ltx-core 1.0.0, from one official-format file with the tiny weights. float32, CPU."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch

from musubi_tuner.ltxv2.frozen import video_vae
from musubi_tuner.ltxv2.frozen.audio_vae import AudioVAE, audio_vae_fingerprint
from musubi_tuner.ltxv2.frozen.mel import log_mel, mel_filters
from musubi_tuner.ltxv2.frozen.video_vae import TileSizes, VideoVAE, video_vae_fingerprint
from musubi_tuner.ltxv2.frozen.vocoder import Vocoder
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.media.resample import resample
from musubi_tuner.runtime.errors import UserError

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
    decoded = ours.decode(latents)
    assert decoded.shape == frames.shape
    assert float((decoded - decoder(latents)).abs().max()) < 1e-4


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


def test_tiles_agree_with_the_whole(checkpoint):
    """Random weights are the hard case: nothing dies out with distance, as it does in a trained VAE."""
    small = TileSizes(pixels=256, pixel_overlap=128, frames=64, frame_overlap=24)
    whole, tiled = (VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32, tiles=tiles) for tiles in (None, small))
    coarse = torch.rand(1, 3, 10, 6, 10, generator=torch.Generator().manual_seed(4)) * 2 - 1
    frames = torch.nn.functional.interpolate(coarse, size=(73, 192, 320), mode="trilinear")
    one, other = whole.encode(frames), tiled.encode(frames)
    assert 0 < float((one - other).abs().mean()) < 0.15 * float(one.std())
    one, other = whole.decode(one), tiled.decode(one)
    assert one.shape == other.shape == frames.shape
    assert 0 < float((one - other).abs().mean()) < 0.3 * float(one.std())


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


def test_only_the_vae_is_read_from_a_full_checkpoint(checkpoint, monkeypatch):
    from musubi_tuner.ltxv2 import weights

    read = []
    original = weights.Checkpoint.tensor
    monkeypatch.setattr(weights.Checkpoint, "tensor", lambda self, name: read.append(name) or original(self, name))
    VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32, parts=("encoder",))
    assert read and all(name.startswith(("vae.encoder.", "vae.per_channel_statistics.")) for name in read)


def test_diffusion_decoder_is_refused_with_the_remedy(checkpoint, tmp_path):
    from safetensors.torch import save_file

    config = {**checkpoint.config["vae"], "_class_name": "CausalDiffusionVAE"}
    path = tmp_path / "vae.safetensors"
    save_file(tensors(checkpoint, "vae."), path, metadata={"config": json.dumps({"vae": config})})
    with pytest.raises(UserError, match="ltx-2.5-video-vae-conv"):
        VideoVAE.load(open_checkpoint(path), device="cpu", dtype=torch.float32)


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
