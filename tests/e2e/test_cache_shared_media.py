"""The real clips beside the repository, cached for av training at 832x480."""

import json
import logging
from pathlib import Path

import pytest

from musubi_tuner import ltxv2_cache_audio_latents, ltxv2_cache_latents
from musubi_tuner.cache import store
from musubi_tuner.config.dataset import load_dataset_config


def test_the_three_clips_are_cached_at_their_own_rates(
    tmp_path: Path, tiny_family, shared_media: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tmp_path / "dataset.toml"
    config.write_text(
        f"[[datasets]]\nvideo_directory = '{shared_media}'\ncache_directory = 'cache'\nresolution = [832, 480]\ntarget_frames = [9, 25]\n",
        encoding="utf-8",
    )
    flags = ["--dataset_config", str(config), "--vae", str(tiny_family.ltx23), "--device", "cpu"]
    assert ltxv2_cache_latents.main([*flags, "--ltx_mode", "av"]) == 0
    assert "Video latent caching: 6 encoded, 0 failed" in caplog.text
    assert ltxv2_cache_audio_latents.main(flags) == 0
    assert "Audio latent caching: 6 encoded, 0 failed" in caplog.text
    cache = load_dataset_config(config).datasets[0].cache_directory
    for path in sorted(cache.glob("*_ltxv2.safetensors")):
        frames = 9 if "-009_" in path.name else 25
        fps = 16.0 if path.name.startswith("crush") else 24.0
        metadata, tensors = store.read_header(path)
        assert {key: tensor.shape for key, tensor in tensors.items()} == {
            f"latents_{(frames + 7) // 8}x15x26_bfloat16": (128, (frames + 7) // 8, 15, 26)
        }
        assert json.loads(metadata["window"])["fps"] == fps
        sidecar = store.read(path.with_name(path.name.replace("_ltxv2.", "_ltxv2_audio.")))
        samples = round(frames / fps * 16000)
        assert int(sidecar["audio_lengths_int32"]) == (samples // 160) // 4 + 1
