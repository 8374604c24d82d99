"""Sound from files of its own, and sound that is played beside the one that is learned."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_cache_audio_latents, ltxv2_train_network
from musubi_tuner.conditioning import recipe as rules
from musubi_tuner.conditioning.recipe import Recipe
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.items import Draw, Item, list_items, token_counts
from musubi_tuner.generation.denoise import SampleInputs, generate
from musubi_tuner.generation.encode import ConditioningEncoders, encode_conditioning
from musubi_tuner.generation.sampling import make_plan
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.prompts.sample_prompts import load_prompts
from musubi_tuner.publishing.card import CardFacts, card_text
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_audio_files, write_clips
from tests import preview_parts, training_parts
from tests.e2e.test_conditioning import RECIPES, draw_rules, spy

TOML = """
[general]
resolution = [96, 64]
target_frames = [17]

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
reference_audio_directory = "voices"
separate_audio_directory = "sounds"
"""


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory) -> training_parts.Data:
    folder = tmp_path_factory.mktemp("gehört ü")
    write_clips(folder / "clips", count=2, frames=25)
    for name, seconds in (("voices", 0.5), ("sounds", 1.5)):
        for number, path in enumerate(write_audio_files(folder / name, count=2, seconds=seconds)):
            path.rename(folder / name / f"clip_{number:03d}{path.suffix}")
    (folder / "dataset.toml").write_text(TOML, encoding="utf-8")
    made = training_parts.Data(folder, folder / "dataset.toml", tiny_family.ltx23, "av", tiny_family.gemma)
    training_parts.cache(made)
    return made


def items_of(data: training_parts.Data) -> list[Item]:
    return list(list_items(load_dataset_config(data.toml).datasets, data.mode, data.toml))


def cache_sound(toml: Path, model: Path) -> int:
    return ltxv2_cache_audio_latents.main(["--dataset_config", str(toml), "--ltx_mode", "av", "--vae", str(model), "--device", "cpu"])


def test_a_separate_file_takes_the_place_of_the_clips_own_sound(data, tmp_path):
    """The sidecar equals that of the sound alone, cut to the clip's seconds, and not that of the clip's own track."""
    item = items_of(data)[0]
    own = data.folder / "own.toml"
    text = '[[datasets]]\nvideo_directory="clips"\ncache_directory="own"\ntarget_frames=[17]\nresolution=[96, 64]\n'
    own.write_text(text, encoding="utf-8")
    alone = data.folder / "alone.toml"
    seconds = item.clip.end_seconds - item.clip.start_seconds
    alone.write_text(f'[[datasets]]\naudio_directory="sounds"\ncache_directory="alone"\ntarget_seconds={seconds}\n', encoding="utf-8")
    assert cache_sound(own, data.model) == cache_sound(alone, data.model) == 0
    of_clip, of_sound = (latents_in(next((data.folder / name).glob("clip_000*_ltxv2_audio.safetensors"))) for name in ("own", "alone"))
    cached = latents_in(item.paths["audio"])
    assert cached.shape == of_clip.shape == (8, 18, 16)
    assert torch.allclose(cached[:, :14], of_sound[:, :14], atol=2e-2), "the end differs: sounds alone are cut at 1 / 25 s"
    assert not torch.allclose(cached[:, :14], of_clip[:, :14], atol=0.1)


def latents_in(path: Path) -> torch.Tensor:
    return next(tensor.float() for key, tensor in load_file(path).items() if "latents" in key)


def test_reference_sounds_are_cached_from_their_own_beginning(data):
    item = items_of(data)[0]
    assert item.paths["reference_audio"].name == item.paths["audio"].name.replace("_audio", "_ref_audio")
    tensors = load_file(item.paths["reference_audio"])
    assert (
        set(tensors) == {"ref_audio_latents_13x1x1_bfloat16", "ref_audio_lengths_int32"} and int(tensors["ref_audio_lengths_int32"]) == 13
    )


@pytest.mark.parametrize("mode", ["av", "audio"])
def test_training_on_reference_sounds(data, tmp_path, mode):
    run = replace(data, mode=mode)
    if mode == "audio":
        (data.folder / "sounds.toml").write_text(
            '[[datasets]]\naudio_directory="sounds"\ncache_directory="sound cache"\nreference_audio_directory="voices"\n', encoding="utf-8"
        )
        for path in (data.folder / "sounds").glob("*.wav"):
            path.with_suffix(".txt").write_text("a tone", encoding="utf-8")
        run = replace(run, toml=data.folder / "sounds.toml")
        assert cache_sound(run.toml, data.model) == 0
        from musubi_tuner import ltxv2_cache_text_encoder_outputs as text

        flags = ["--dataset_config", str(run.toml), "--ltx_mode", "audio", "--device", "cpu", "--ltxv2_model", str(data.model)]
        assert text.main([*flags, "--text_encoder", str(data.encoder)]) == 0
    recipe = str(RECIPES / "reference_sound.toml")
    flags = run.arguments("--output_dir", str(tmp_path), "--max_train_steps", "2", "--conditioning_config", recipe)
    assert ltxv2_train_network.main(flags) == 0
    assert all(row["loss_audio"] > 0 for row in training_parts.losses(tmp_path) if "grad_norm" in row)
    card = card_text(tmp_path / "ltxv2_lora.safetensors", CardFacts())
    assert '--lora ltxv2_lora.safetensors --prompt "PROMPT --ra voice.wav"' in card and "LTX2Pipeline" not in card
    with pytest.raises(UserError, match="reference_audio_directory.*nothing shows them"):
        ltxv2_train_network.main(run.arguments("--output_dir", str(tmp_path / "b")))


def test_a_preview_plays_the_reference_as_training_does(data, tiny_family, tmp_path):
    wrapper = preview_parts.load_wrapper(tiny_family.ltx23)
    item = items_of(data)[0]
    batch = make_batch([Draw(item, 0, 0)], "av", draw_rules(Recipe(audio=(rules.Reference(),))))
    voice = data.folder / "voices" / "clip_000.wav"
    text = f"a disc --w 96 --h 64 --f 17 --fr {item.clip.fps} --ra {voice.as_posix()}\n"
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    prompt = load_prompts(tmp_path / "prompts.txt")[0]
    plan = make_plan(preview_parts.options(), prompt, mode="av", version="2.3", num_layers=wrapper.config.num_layers)
    checkpoint = open_checkpoint(tiny_family.ltx23)
    conditioning = encode_conditioning(
        prompt, plan.streams, ConditioningEncoders(checkpoint, checkpoint, torch.device("cpu"), still_crf=None)
    )
    context = preview_parts.context(wrapper)
    made = SampleInputs(prompt=prompt, plan=plan, positive=context, negative=context, conditioning=conditioning)
    seen = spy(wrapper, lambda: generate(wrapper, made))
    noise = {"video_noise": seen[0].latent, "audio_noise": seen[1].latent[:, :18]}
    at_one = replace(batch, text=context.text, text_mask=None, video_sigma=torch.ones(1), audio_sigma=torch.ones(1), **noise)
    trained = spy(wrapper, lambda: training_parts.item_losses(wrapper, at_one))
    for ours, theirs in zip(seen, trained, strict=True):
        assert torch.allclose(ours.latent, theirs.latent, rtol=2**-7, atol=2e-2)
        assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.positions, theirs.positions)
    assert seen[1].timesteps[0].tolist() == [1.0] * 18 + [0.0] * 13
    assert generate(wrapper, made).audio.shape == (1, 8, 18, 16)


def test_sounds_of_unequal_length_are_masked_in_a_batch(data):
    draws = [Draw(item, 0, 0) for item in items_of(data)]
    shorter = dict(load_file(draws[1].item.paths["reference_audio"]))
    short = data.folder / "short_ltxv2_ref_audio.safetensors"
    from musubi_tuner.cache.store import write

    latents = shorter["ref_audio_latents_13x1x1_bfloat16"][:, :7].contiguous()
    write(short, {"ref_audio_latents_7x1x1_bfloat16": latents, "ref_audio_lengths_int32": torch.tensor(7, dtype=torch.int32)}, {})
    draws[1] = replace(draws[1], item=replace(draws[1].item, paths={**draws[1].item.paths, "reference_audio": short}))
    reference = make_batch(draws, "av", draw_rules(Recipe(audio=(rules.Reference(),)))).conditions.audio.reference
    assert reference.latents.shape == (2, 8, 13, 16) and reference.lengths.tolist() == [13, 7]
    assert not reference.latents[1, :, 7:].any()


def test_by_jsonl_and_what_is_missing(data, tmp_path):
    lines = [{"video_path": f"clip_{n:03d}.mp4", "caption": "x", "audio_path": f"../sounds/clip_{n:03d}.wav"} for n in (0, 1)]
    jsonl = data.folder / "clips" / "list.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    toml = data.folder / "jsonl.toml"
    text = '[[datasets]]\nvideo_jsonl_file="clips/list.jsonl"\ncache_directory="by line"\ntarget_frames=[17]\nresolution=[96, 64]\n'
    toml.write_text(text, encoding="utf-8")
    assert cache_sound(toml, data.model) == 0
    name = items_of(data)[0].paths["audio"].name
    left, right = (load_file(data.folder / folder / name) for folder in ("cache", "by line"))
    assert all(torch.equal(left[key], right[key]) for key in left)
    del lines[1]["audio_path"]
    jsonl.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(UserError, match=r"1 of 2 sources have no sound file: clip_001.mp4.*separate_audio_directory.*audio_path"):
        cache_sound(toml, data.model)


def test_the_plan_counts_what_is_played_beside_the_sound(data):
    item = items_of(data)[0]
    without = {name: sidecar for name, sidecar in item.clip.sidecars.items() if name != "reference_audio"}
    assert without != item.clip.sidecars
    _, alone = token_counts(dataclasses.replace(item, clip=dataclasses.replace(item.clip, sidecars=without)), "av")
    assert token_counts(item, "av")[1] == 2 * alone == 36
    assert token_counts(item, "video")[1] == 0
