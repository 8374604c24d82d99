"""Shared fixtures of the tests that run programs."""

import pytest
import torch

from musubi_tuner.media.write import write_video


@pytest.fixture(scope="session")
def texts(tiny_family, tmp_path_factory):
    """Texts of the prompts of tests that generate, cached once, so that no run has to load the encoder."""
    from musubi_tuner import ltxv2_cache_text_encoder_outputs as program

    folder = tmp_path_factory.mktemp("texts")
    (folder / "clips").mkdir()
    write_video(folder / "clips" / "a.mp4", torch.zeros(9, 64, 64, 3, dtype=torch.uint8), 24.0)
    (folder / "clips" / "a.txt").write_text("a dog", encoding="utf-8")
    (folder / "d.toml").write_text(
        '[general]\nresolution = [64, 64]\n[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\ntarget_frames = [9]\n',
        encoding="utf-8",
    )
    (folder / "prompts.txt").write_text("a dog\nrain\n", encoding="utf-8")
    flags = ["--dataset_config", str(folder / "d.toml"), "--ltxv2_model", str(tiny_family.ltx23), "--text_encoder", str(tiny_family.gemma)]
    assert program.main([*flags, "--ltx_mode", "av", "--sample_prompts", str(folder / "prompts.txt"), "--device", "cpu"]) == 0
    return folder / "cache"
