"""A dataset without sound, one of which half is without, and one whose sound does not decode, from the clips to the LoRA."""

import logging

import pytest
from safetensors.torch import load_file

from musubi_tuner import ltxv2_cache_audio_latents, ltxv2_cache_latents, ltxv2_cache_text_encoder_outputs, ltxv2_train_network
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import break_audio, disc_frames, disc_heights, write_clip, write_clips
from tests import training_parts as parts


def write_silent(folder, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write_clip(folder / f"silent_{number}.mp4", disc_frames(disc_heights(25, 24, number), 96, 64, "red", "dark"), fps=24)
        (folder / f"silent_{number}.txt").write_text("a disc without a sound", encoding="utf-8")


def data_of(folder, family) -> parts.Data:
    toml = folder / "dataset.toml"
    toml.write_text(parts.TOML.format(batch_size=1).split("[[validation_datasets]]")[0], encoding="utf-8")
    return parts.Data(folder, toml, family.ltx23, "av", family.gemma)


def train(data, output, caplog, *extra: str):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert ltxv2_train_network.main(data.arguments("--output_dir", str(output), "--max_train_steps", "4", *extra)) == 0
    return load_file(output / "ltxv2_lora.safetensors"), parts.losses(output)


def test_without_sound_the_audio_side_learns_nothing_and_that_is_said(tiny_family, tmp_path, caplog):
    write_silent(tmp_path / "clips", 2)
    data = data_of(tmp_path, tiny_family)
    parts.cache(data)
    lora, rows = train(data, tmp_path / "out", caplog)
    assert "WARNING: --ltx_mode av, and none of the 2 items has sound" in caplog.text
    assert all(row["audio_supervised"] == 0 and "loss_audio" not in row for row in rows)
    learned = {name.removesuffix(".lora_B.weight") for name, value in lora.items() if name.endswith("lora_B.weight") and value.any()}
    assert learned and not any(".audio_" in name or "video_to_audio" in name for name in learned)
    with pytest.raises(UserError, match="0 of .* items that should have sound had it"):
        train(data, tmp_path / "strict", caplog, "--audio_supervision_mode", "error", "--audio_supervision_warmup_steps", "2")


def test_half_without_each_item_keeps_its_own_supervision(tiny_family, tmp_path, caplog):
    write_clips(tmp_path / "clips", count=2, frames=25)
    write_silent(tmp_path / "clips", 2)
    data = data_of(tmp_path, tiny_family)
    parts.cache(data)
    lora, rows = train(data, tmp_path / "out", caplog)
    assert "has sound" not in caplog.text
    assert sorted(row["audio_supervised"] for row in rows) == [0, 0, 1, 1]
    assert all(("loss_audio" in row) == bool(row["audio_supervised"]) for row in rows)
    assert any(".audio_attn" in name and name.endswith("lora_B.weight") and bool(value.any()) for name, value in lora.items())


def test_sound_that_does_not_decode_stops_before_the_run(tiny_family, tmp_path, caplog):
    write_clips(tmp_path / "clips", count=2, frames=25)
    break_audio(tmp_path / "clips" / "clip_001.mp4")
    data = data_of(tmp_path, tiny_family)
    common = ["--dataset_config", str(data.toml), "--ltx_mode", "av", "--device", "cpu"]
    assert ltxv2_cache_latents.main([*common, "--vae", str(data.model)]) == 0
    text = ["--ltxv2_model", str(data.model), "--text_encoder", str(data.encoder)]
    assert ltxv2_cache_text_encoder_outputs.main([*common, *text]) == 0
    with caplog.at_level(logging.INFO):
        assert ltxv2_cache_audio_latents.main([*common, "--vae", str(data.model)]) == 1
    assert "clip_001.mp4: its audio stream does not decode" in caplog.text
    with pytest.raises(UserError, match="(?s)clip_001.*ltxv2_cache_audio_latents.py"):
        train(data, tmp_path / "out", caplog)
    assert not (tmp_path / "out" / "ltxv2_lora.safetensors").exists()
