"""LoRAs that clips are made with: of another release, of streams that a mode does not build, of another model."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner.generation import stages
from musubi_tuner.networks.targets import stream_of
from musubi_tuner.runtime.errors import UserError
from tests.e2e.test_generate import run, second_stage


@pytest.mark.parametrize("mode", ["video", "audio"])
def test_modules_of_streams_that_a_mode_does_not_build_are_left_out_with_a_line(tiny_family, texts, tmp_path, caplog, monkeypatch, mode):
    """As if the file had none of them; a file that has nothing else is refused."""
    flags = ("--prompt", "a dog", "--ltx_mode", mode)
    tensors = load_file(tiny_family.distilled_lora)
    own = {name: value for name, value in tensors.items() if stream_of(name) == mode}
    for name, some in (("own", own), ("other", {name: value for name, value in tensors.items() if stream_of(name) not in (mode, "cross")})):
        save_file(some, tmp_path / f"{name}.safetensors")
    made = []
    real = stages.generate
    monkeypatch.setattr(stages, "generate", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    for lora in (tiny_family.distilled_lora, tmp_path / "own.safetensors"):
        with caplog.at_level(logging.INFO):
            run(tiny_family, texts, tmp_path / lora.stem, *flags, "--lora", str(lora))
    assert torch.equal(*(getattr(one, mode) for one in made))
    assert caplog.text.count(f"are of streams that --ltx_mode {mode} does not build, and are left out") == 1
    with pytest.raises(UserError, match=f"other.safetensors: changes the {'sound' if mode == 'video' else 'pictures'} alone"):
        run(tiny_family, texts, tmp_path / "alone", *flags, "--lora", str(tmp_path / "other.safetensors"))


def test_both_stages_of_video_mode_take_a_distilled_lora_of_both_streams(tiny_family, texts, tmp_path):
    run(tiny_family, texts, tmp_path, "--prompt", "a dog", "--ltx_mode", "video", "--pipeline", "two_stage", *second_stage(tiny_family))


def foreign(path: Path) -> str:
    module = "diffusion_model.transformer_blocks.40.attn1.to_q.lora_"
    save_file({f"{module}A.weight": torch.ones(1, 8), f"{module}B.weight": torch.ones(8, 1)}, path)
    return str(path)


def test_a_lora_of_the_second_stage_is_looked_at_before_the_first(tiny_family, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "load_for_sampling", lambda *a, **k: pytest.fail("the model was loaded"))
    flags = ("--pipeline", "two_stage", *second_stage(tiny_family)[:2], "--distilled_lora", foreign(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match=r"other.safetensors: adapts 1 module\(s\) that this model lacks"):
        run(tiny_family, texts, tmp_path / "out", "--prompt", "a dog", *flags)


@pytest.mark.parametrize("flags", [(), ("--merge_loras",)])
def test_a_lora_of_another_release_is_refused(tiny_family, texts, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(stages, "load_for_sampling", lambda *a, **k: pytest.fail("the model was loaded"))
    save_file(load_file(tiny_family.distilled_lora), tmp_path / "old.safetensors", {"ss_base_model_version": "ltx-2.0"})
    with pytest.raises(UserError, match=r"old.safetensors: was trained on ltx-2.0, and --ltxv2_model is ltx-2.3"):
        run(tiny_family, texts, tmp_path / "out", "--prompt", "a dog", "--lora", str(tmp_path / "old.safetensors"), *flags)
