"""The previewer with the tiny checkpoint: real VAEs, vocoders and codecs, from the flags to files that play."""

import wave
from functools import partial
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from musubi_tuner import ltxv2_train_network
from musubi_tuner.cache.names import TEXT_MASK_KEY, prompt_path, text_key
from musubi_tuner.cache.store import write
from musubi_tuner.config.flags import parse
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.generation.contexts import TextSource
from musubi_tuner.generation.prepare import ModelFiles
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.placement.text import encode_prompts
from musubi_tuner.preview.previewer import Previewer, make_previewer
from musubi_tuner.prompts.sample_prompts import all_prompt_texts, load_prompts
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.preflight import text_recipe
from musubi_tuner.training.setup import sigma_settings
from tests import preview_parts as parts

AAC_BLOCK = 1024


def make_config(folder: Path, model: Path, mode: str, *extra: str) -> TrainingConfig:
    argv = ["--dataset_config", "unused.toml", "--ltx_mode", mode, "--ltxv2_model", str(model), "--device", "cpu"]
    argv += ["--ltxv2_timestep_format", "flowmatch_1_1000", "--sample_prompts", str(folder / "prompts.txt"), "--sample_at_first"]
    argv += ["--output_dir", str(folder / "aus gabe"), "--output_name", "lora", "--sample_steps", "2", *extra]
    return parse(TrainingConfig, argv, prog="test", description="")


def previewer_of(config: TrainingConfig, folder: Path, **texts: object) -> Previewer:
    """As the training program makes it."""
    return make_previewer(
        config.preview,
        ModelFiles.beside(open_checkpoint(config.model.ltxv2_model), config.model.vae, config.model.audio_vae),
        TextSource(cache_directory=folder / "cache", **texts),
        mode=config.ltx_mode,
        device=torch.device("cpu"),
        output_dir=config.saving.output_dir,
        output_name=config.saving.output_name,
        training_sigma=sigma_settings(config.losses),
    )


def cache_prompts(folder: Path, wrapper: OfficialLTXV2Wrapper) -> None:
    """Contexts of every text of the prompt file, through the cache's own store."""
    for number, text in enumerate(all_prompt_texts(load_prompts(folder / "prompts.txt"))):
        values = parts.context(wrapper, number).text[0]
        tensors = {text_key(values.dtype): values, TEXT_MASK_KEY: torch.ones(values.shape[0])}
        write(prompt_path(folder / "cache", text), tensors, {"kind": "text", "stage": "context", "caption": text})


def build(folder: Path, model: Path, mode: str, prompts: str, *extra: str) -> tuple[Previewer, OfficialLTXV2Wrapper]:
    (folder / "prompts.txt").write_text(prompts, encoding="utf-8")
    wrapper = parts.load_wrapper(model, mode=mode)
    cache_prompts(folder, wrapper)
    return previewer_of(make_config(folder, model, mode, *extra), folder), wrapper


@pytest.mark.parametrize(("style", "rate"), [("ltx20", 24000), ("ltx23", 48000)])
def test_av_previews_are_mp4_with_sound_of_their_length(tiny_family, tmp_path: Path, style: str, rate: int) -> None:
    lines = "a fox --w 64 --h 96 --f 9 --fr 16 --d 5\nan owl --w 96 --h 64 --f 1\n"
    previewer, wrapper = build(tmp_path, getattr(tiny_family, style), "av", lines)
    previewer(wrapper, 10, 1)
    folder = tmp_path / "aus gabe" / "sample"
    assert sorted(path.name for path in folder.iterdir()) == ["lora_s00000010_00_5.mp4", "lora_s00000010_01_10.png"]
    with av.open(str(folder / "lora_s00000010_00_5.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.width, video.height, video.average_rate) == (64, 96, 16)
        assert audio.codec_context.sample_rate == rate
        assert abs(float(video.duration * video.time_base) - float(audio.duration * audio.time_base)) <= 1 / 16
        frames, samples = 0, 0
        for frame in container.decode(video, audio):
            frames += isinstance(frame, av.VideoFrame)
            samples += frame.samples if isinstance(frame, av.AudioFrame) else 0
    assert frames == 9
    assert abs(samples - 9 / 16 * rate) <= rate / 16 + AAC_BLOCK
    with Image.open(folder / "lora_s00000010_01_10.png") as image:
        assert image.size == (96, 64)


def test_audio_previews_are_wav_of_the_asked_seconds(tiny_family, tmp_path: Path) -> None:
    previewer, wrapper = build(tmp_path, tiny_family.ltx23, "audio", "rain on a roof --f 25 --fr 24\n")
    previewer(wrapper, 0, 0)
    with wave.open(str(tmp_path / "aus gabe" / "sample" / "lora_s00000000_00_10.wav")) as file:
        assert file.getframerate() == 48000
        assert file.getnframes() == round(25 / 24 * 48000)
        assert any(file.readframes(4800))


def test_video_previews_have_no_sound_and_the_same_seed_gives_the_same_file(tiny_family, tmp_path: Path) -> None:
    previewer, wrapper = build(tmp_path, tiny_family.ltx23, "video", "a fox --w 64 --h 32 --f 9\n")
    for step in (0, 7):
        previewer(wrapper, step, 0)
    first, second = sorted((tmp_path / "aus gabe" / "sample").iterdir())
    assert first.read_bytes() == second.read_bytes()
    with av.open(str(first)) as container:
        assert not container.streams.audio and len(list(container.decode(video=0))) == 9


def test_a_first_image_is_the_first_frame(tiny_family, tmp_path: Path) -> None:
    Image.new("RGB", (150, 80), (200, 40, 90)).save(tmp_path / "start.png")
    previewer, wrapper = build(tmp_path, tiny_family.ltx23, "video", "a fox --w 64 --h 32 --f 9 --i start.png\n")
    conditioning = previewer.samples[0].conditioning
    assert conditioning.conditions.video.clean.tolist() == [[True, True, False, False]]
    assert bool(conditioning.video[:, :, 0].any()) and not bool(conditioning.video[:, :, 1:].any())
    previewer(wrapper, 0, 0)


def test_texts_that_are_not_cached_are_named_before_training(tiny_family, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox --n dark\n", encoding="utf-8")
    config = make_config(tmp_path, tiny_family.ltx23, "av")
    with pytest.raises(UserError) as caught:
        previewer_of(config, tmp_path)
    for part in ("2 text(s)", "'a fox': missing", "'dark': missing", "ltxv2_cache_text_encoder_outputs.py", "--text_encoder"):
        assert part in str(caught.value)


@pytest.mark.parametrize("mode", ["video", "av"])
def test_training_encodes_a_prompt_to_what_the_caching_program_writes(tiny_family, tmp_path: Path, mode: str) -> None:
    """With `--text_encoder` what is not cached is encoded, and equals what caching leaves within one step of bfloat16."""
    (tmp_path / "prompts.txt").write_text("a fox hums --w 64 --h 32 --f 9 --n dark\n", encoding="utf-8")
    checkpoint = open_checkpoint(tiny_family.ltx23)
    config = make_config(tmp_path, tiny_family.ltx23, mode, "--text_encoder", str(tiny_family.gemma))
    encode = partial(encode_prompts, text_recipe(config, checkpoint, torch.device("cpu")))
    encoded = previewer_of(config, tmp_path, encode=encode).samples[0]
    cache_with_the_program(tmp_path, tiny_family, mode)
    cached = previewer_of(make_config(tmp_path, tiny_family.ltx23, mode), tmp_path).samples[0]
    for ours, theirs in ((encoded.positive, cached.positive), (encoded.negative, cached.negative)):
        assert ours.text.dtype == theirs.text.dtype == torch.bfloat16 and ours.mask is None and theirs.mask is None
        assert torch.allclose(ours.text.float(), theirs.text.float(), rtol=2**-7, atol=1e-4)
    assert not torch.equal(cached.positive.text, cached.negative.text)


def cache_with_the_program(folder: Path, family, mode: str) -> None:
    """Text caching as a user runs it, on a dataset of one still."""
    from musubi_tuner import ltxv2_cache_text_encoder_outputs as program

    stills = folder / "stills"
    stills.mkdir()
    Image.new("RGB", (64, 32)).save(stills / "one.png")
    (stills / "one.txt").write_text("a gray still", encoding="utf-8")
    text = f"[[datasets]]\nimage_directory = '{stills}'\ncache_directory = '{folder / 'cache'}'\nresolution = [64, 32]\n"
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    argv = ["--dataset_config", str(folder / "dataset.toml"), "--ltxv2_model", str(family.ltx23), "--text_encoder", str(family.gemma)]
    argv += ["--ltx_mode", mode, "--sample_prompts", str(folder / "prompts.txt"), "--device", "cpu", "--batch_size", "1"]
    assert program.main(argv) == 0


def test_contexts_of_another_width_are_refused(tiny_family, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox --w 64 --h 32 --f 9\n", encoding="utf-8")
    config = make_config(tmp_path, tiny_family.ltx23, "av")
    for text in ("a fox", ""):
        write(
            prompt_path(tmp_path / "cache", text),
            {"text_float32": torch.zeros(4, 7), TEXT_MASK_KEY: torch.ones(4)},
            {"kind": "text", "stage": "context"},
        )
    with pytest.raises(UserError, match="7 wide, the model takes 192"):
        previewer_of(config, tmp_path)


def test_a_checkpoint_without_vae_is_refused_before_training(tiny_family, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox --w 64 --h 32 --f 9\n", encoding="utf-8")
    model = tiny_family.ltx25_transformer
    wrapper = parts.load_wrapper(model)
    cache_prompts(tmp_path, wrapper)
    with pytest.raises(UserError, match="--vae"):
        previewer_of(make_config(tmp_path, model, "av"), tmp_path)


def test_stale_contexts_are_refused(tiny_family, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox --w 64 --h 32 --f 9\n", encoding="utf-8")
    config = make_config(tmp_path, tiny_family.ltx23, "av")
    for text in ("a fox", ""):
        tensors = {"text_float32": torch.zeros(4, 192), TEXT_MASK_KEY: torch.ones(4)}
        write(prompt_path(tmp_path / "cache", text), tensors, {"kind": "video_latents"})
    with pytest.raises(UserError, match="it holds something else"):
        previewer_of(config, tmp_path)
    cache_prompts(tmp_path, parts.load_wrapper(tiny_family.ltx23))
    wanted = {"projection_fingerprint": "of this model"}
    with pytest.raises(UserError, match="another model's text projection"):
        previewer_of(config, tmp_path, expected=wanted)


def test_the_text_encoder_of_prompts_is_given_what_memory_a_run_may_take(tiny_family, tmp_path):
    flags = ["--dataset_config", str(tmp_path / "d.toml"), "--ltxv2_model", str(tiny_family.ltx23), "--output_dir", str(tmp_path)]
    flags += [
        "--ltxv2_timestep_format",
        "flowmatch_1_1000",
        "--text_encoder",
        str(tiny_family.gemma),
        "--vram_gb",
        "15.5",
        "--ram_gb",
        "24",
    ]
    recipe = text_recipe(ltxv2_train_network.parse_arguments(flags), open_checkpoint(tiny_family.ltx23), torch.device("cpu"))
    assert (recipe.options.vram_gb, recipe.options.ram_gb) == (15.5, 24)
