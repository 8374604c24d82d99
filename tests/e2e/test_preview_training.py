"""Training with and without previews: the same losses, the same LoRA. The preview of a LoRA that does nothing is the base model's."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_cache_audio_latents, ltxv2_cache_latents, ltxv2_cache_text_encoder_outputs, ltxv2_train_network
from musubi_tuner.generation import decode
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.placement import text
from musubi_tuner.preview import previewer
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clips
from musubi_tuner.training import preflight, setup
from musubi_tuner.training.objective import FlowMatching

PROMPTS = "A red disc --w 64 --h 64 --f 9 --s 2\nA still of it --w 64 --h 64 --f 1 --s 2\n"
STEPS = 4


@pytest.fixture(scope="module")
def project(tiny_family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset, cached by the three programs."""
    folder = tmp_path_factory.mktemp("with previews")
    write_clips(folder / "clips", count=2, frames=9, width=64, height=64)
    text = "[general]\nresolution = [64, 64]\ntarget_frames = [9]\n[[datasets]]\nvideo_directory = 'clips'\ncache_directory = 'cache'\n"
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    model = str(tiny_family.ltx23)
    common = ["--dataset_config", str(folder / "dataset.toml"), "--ltx_mode", "av", "--device", "cpu"]
    assert ltxv2_cache_latents.main([*common, "--vae", model]) == 0
    assert ltxv2_cache_audio_latents.main([*common, "--audio_vae", model]) == 0
    encoder = ["--ltxv2_model", model, "--text_encoder", str(tiny_family.gemma)]
    assert ltxv2_cache_text_encoder_outputs.main([*common, *encoder, "--sample_prompts", str(folder / "prompts.txt")]) == 0
    return folder


def train(project: Path, model: Path, name: str, *extra: str) -> Path:
    argv = ["--dataset_config", str(project / "dataset.toml"), "--ltx_mode", "av", "--device", "cpu", "--ltxv2_model", str(model)]
    argv += ["--ltxv2_timestep_format", "flowmatch_1_1000", "--network_dim", "4", "--network_alpha", "4", "--mixed_precision", "no"]
    argv += ["--max_train_steps", str(STEPS), "--max_data_loader_n_workers", "0", "--learning_rate", "1e-2", "--save_precision", "float32"]
    argv += ["--output_dir", str(project / name), "--output_name", "lora", *extra]
    assert ltxv2_train_network.main(argv) == 0
    return project / name


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "lora-loss.jsonl").read_text(encoding="utf-8").splitlines()]


def test_previews_change_nothing_of_training(project: Path, tiny_family) -> None:
    previews = ["--sample_prompts", str(project / "prompts.txt"), "--sample_at_first", "--sample_every_n_steps", "1"]
    plain, watched = train(project, tiny_family.ltx23, "plain"), train(project, tiny_family.ltx23, "watched", *previews)
    assert losses(plain) == losses(watched)
    left, right = (load_file(folder / "lora.safetensors") for folder in (plain, watched))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    names = sorted(path.name for path in (watched / "sample").iterdir())
    assert names == [f"lora_s{step:08d}_{row:02d}_10.{suffix}" for step in range(STEPS + 1) for row, suffix in ((0, "mp4"), (1, "png"))]


def test_the_first_preview_is_that_of_the_base_model(project: Path, tiny_family) -> None:
    """A LoRA whose B is zero previews as the base model does; after training the same prompt looks different."""
    previews = ["--sample_prompts", str(project / "prompts.txt"), "--sample_at_first", "--sample_every_n_steps", str(STEPS)]
    one = train(project, tiny_family.ltx23, "rank 4", *previews) / "sample"
    other = train(project, tiny_family.ltx23, "rank 2", *previews, "--network_dim", "2", "--network_alpha", "2") / "sample"
    first, last = (f"lora_s{step:08d}_01_10.png" for step in (0, STEPS))
    assert (one / first).read_bytes() == (other / first).read_bytes()
    assert (one / last).read_bytes() != (one / first).read_bytes()


def test_prompts_alone_are_previewed_at_the_end(project: Path, tiny_family, caplog) -> None:
    caplog.set_level("INFO")
    folder = train(project, tiny_family.ltx23, "end", "--sample_prompts", str(project / "prompts.txt"), "--max_train_steps", "2")
    assert sorted(path.name for path in (folder / "sample").iterdir()) == ["lora_s00000002_00_10.mp4", "lora_s00000002_01_10.png"]
    assert "previews are made once, at the end of the run" in caplog.text


def test_a_prompt_that_is_not_cached_stops_before_training(project: Path, tiny_family) -> None:
    (project / "new.txt").write_text("Nobody cached this --w 64 --h 64 --f 9\n", encoding="utf-8")
    command = (
        r"\n  python ltxv2_cache_text_encoder_outputs\.py --dataset_config .* --text_encoder ENCODER_FOLDER --sample_prompts .*new\.txt.?\n"
    )
    with pytest.raises(UserError, match=rf"'Nobody cached this': missing\nRun:{command}"):
        train(project, tiny_family.ltx23, "stopped", "--sample_prompts", str(project / "new.txt"), "--sample_at_first")
    assert not (project / "stopped" / "lora-loss.jsonl").exists()


def test_prompts_that_were_not_cached_are_encoded_once_for_all_previews(project: Path, tiny_family, monkeypatch) -> None:
    prompts = project / "uncached.txt"
    prompts.write_text("Nobody cached this one --w 64 --h 64 --f 1 --s 1\n", encoding="utf-8")
    calls, encode = [], text.encode_prompts
    monkeypatch.setattr(text, "encode_prompts", lambda recipe, texts: calls.append(list(texts)) or encode(recipe, texts))
    flags = ["--sample_prompts", str(prompts), "--sample_at_first", "--sample_every_n_steps", "1", "--text_encoder", str(tiny_family.gemma)]
    made = train(project, tiny_family.ltx23, "uncached", *flags) / "sample"
    assert len(list(made.glob("*.png"))) == STEPS + 1
    assert len(calls) == 1, calls


def test_the_stages_of_a_run_come_in_order(project: Path, tiny_family, monkeypatch) -> None:
    """Config, caches, prompts, and the text encoder gone before the model comes; then, of each step, inputs, forward pass and loss."""
    order, encoders = [], []

    def spy(owner, name: str, stage: str) -> None:
        real = getattr(owner, name)

        def call(*arguments, **named):
            order.append(stage)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    def load_encoder(*arguments):
        encoder = real_load(*arguments)
        encoders.append(weakref.ref(encoder))
        return encoder

    def load_model(*arguments):
        gc.collect()
        order.append("model" if encoders and encoders[0]() is None else "model beside the encoder")
        return real_model(*arguments)

    real_load, real_model = text.load_encoder, setup.load_model
    spy(ltxv2_train_network, "parse_arguments", "config")
    spy(preflight, "verify_caches", "caches")
    spy(text, "encode_prompts", "prompts")
    monkeypatch.setattr(text, "load_encoder", load_encoder)
    monkeypatch.setattr(setup, "load_model", load_model)
    spy(FlowMatching, "noise", "inputs")
    spy(OfficialLTXV2Wrapper, "forward", "forward")
    spy(FlowMatching, "loss", "loss")
    (project / "order.txt").write_text("Nobody cached this either --w 64 --h 64 --f 1 --s 1\n", encoding="utf-8")
    flags = ["--sample_prompts", str(project / "order.txt"), "--sample_every_n_steps", "9", "--text_encoder", str(tiny_family.gemma)]
    train(project, tiny_family.ltx23, "in order", *flags, "--max_train_steps", "2")
    assert order == ["config", "caches", "prompts", "model", *["inputs", "forward", "loss"] * 2]


def test_a_card_without_room_costs_previews_and_never_the_run(project: Path, tiny_family, monkeypatch, caplog) -> None:
    previews = ["--sample_prompts", str(project / "prompts.txt"), "--sample_at_first", "--sample_every_n_steps", "2"]
    plain = train(project, tiny_family.ltx23, "roomy", *previews)
    sampling, decoding, calls = previewer.generate, decode.to_frames, []

    def cramped(real, refuse):
        def call(*arguments, **named):
            calls.append(real)
            if refuse(calls.count(real)):
                raise torch.OutOfMemoryError("no room")
            return real(*arguments, **named)

        return call

    monkeypatch.setattr(previewer, "generate", cramped(sampling, lambda count: count == 1))  # of the first moment, the step before training
    monkeypatch.setattr(decode, "to_frames", cramped(decoding, lambda count: count == 1))  # of the second one, step 2
    short = train(project, tiny_family.ltx23, "cramped", *previews)
    assert "step 0: no previews: the card ran out of memory, and training goes on" in caplog.text
    assert "step 2: the card has no room for the decoders; the previews are decoded on the CPU" in caplog.text
    assert losses(plain) == losses(short)
    made = {path.name: path.read_bytes() for path in (short / "sample").iterdir()}
    assert sorted(made) == sorted(path.name for path in (plain / "sample").iterdir() if "s00000000" not in path.name)
    assert all(data == (plain / "sample" / name).read_bytes() for name, data in made.items())
