"""The program that generates clips: every pipeline on the tiny checkpoint, from flags to files that play."""

import json
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_generate_video
from musubi_tuner.generation import clips, decode, stages
from musubi_tuner.generation.jobs import parse_lora
from musubi_tuner.generation.recipe import KEY, read_recipe
from musubi_tuner.generation.unfinished import FOLDER
from musubi_tuner.media.audio import Waveform
from musubi_tuner.media.write import write_video
from musubi_tuner.memory.attention import SCORE_BYTES
from musubi_tuner.networks.stack import Strength
from musubi_tuner.placement import sampling
from musubi_tuner.runtime.errors import TemporaryFailure, UserError

SIZE = ("--sample_width", "128", "--sample_height", "64", "--sample_frames", "9", "--sample_steps", "2")


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A picture and a clip with sound."""
    Image.new("RGB", (128, 64), (200, 40, 90)).save(tmp_path / "start.png")
    frames = torch.arange(17)[:, None, None, None].expand(17, 64, 128, 3).to(torch.uint8) * 12
    sound = Waveform(samples=torch.sin(torch.arange(16000 * 2) / 9).expand(2, -1) * 0.3, rate=16000)
    write_video(tmp_path / "clip.mp4", frames, 24.0, sound)
    return tmp_path


def run(family, texts: Path, folder: Path, *flags: str) -> list[Path]:
    base = ["--ltxv2_model", str(family.ltx23), "--text_cache", str(texts), "--output_dir", str(folder), "--device", "cpu", *SIZE]
    assert ltxv2_generate_video.main([*base, *flags]) == 0
    return sorted(path for path in folder.iterdir() if path.suffix in (".mp4", ".png", ".wav"))


def second_stage(family) -> tuple[str, ...]:
    return ("--spatial_upsampler_path", str(family.upsampler), "--distilled_lora", str(family.distilled_lora))


@pytest.mark.parametrize("pipeline", ["one_stage", "two_stage", "hq", "distilled", "distilled_one_stage"])
def test_pipelines_from_text_play_with_sound(tiny_family, texts, tmp_path, pipeline):
    (path,) = run(tiny_family, texts, tmp_path / "aus gabe", "--prompt", "a dog", "--pipeline", pipeline, *second_stage(tiny_family))
    with av.open(str(path)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (128, 64)
        assert len(list(container.decode(video=0))) == 9
    with av.open(str(path)) as container:
        assert abs(sum(frame.samples for frame in container.decode(audio=0)) / 48000 - 9 / 24) < 0.1
    assert not (tmp_path / "aus gabe" / FOLDER).exists()
    assert read_recipe(path).facts["pipeline"] == pipeline


def test_pipelines_that_are_shown_files(tiny_family, texts, media, tmp_path):
    two = second_stage(tiny_family)
    reference = ("--prompt", "a dog", "--pipeline", "ic_lora", "--reference_video", str(media / "clip.mp4"))
    keyframes = ("--prompt", f"a dog --k 0={media / 'start.png'};8={media / 'start.png'}", "--pipeline", "keyframes")
    paths = [*run(tiny_family, texts, tmp_path / "ic", *reference, *two), *run(tiny_family, texts, tmp_path / "key", *keyframes, *two)]
    assert all(path.suffix == ".mp4" for path in paths) and len(paths) == 2
    with pytest.raises(UserError, match="ic_lora shows a reference"):
        run(tiny_family, texts, tmp_path / "no", "--prompt", "a dog", "--pipeline", "ic_lora", *two)


def test_sound_that_pictures_are_made_to_is_passed_on(tiny_family, texts, media, tmp_path, monkeypatch):
    """As its file has it, not through the audio VAE."""
    written = {}
    monkeypatch.setattr(clips, "write_sample", lambda stem, prompt, frames, sound, recipe: written.update(sound=sound) or stem)
    base = ["--ltxv2_model", str(tiny_family.ltx23), "--text_cache", str(texts), "--output_dir", str(tmp_path), "--device", "cpu", *SIZE]
    ltxv2_generate_video.main([*base, "--prompt", "a dog", "--audio", str(media / "clip.mp4")])
    assert written["sound"].rate == 16000 and written["sound"].samples.abs().max() > 0.2


def test_the_same_command_keeps_a_clip_and_another_writes_beside_it(tiny_family, texts, tmp_path):
    (first,) = run(tiny_family, texts, tmp_path, "--prompt", "a dog")
    before = first.read_bytes()
    assert run(tiny_family, texts, tmp_path, "--prompt", "a dog") == [first] and first.read_bytes() == before
    both = run(tiny_family, texts, tmp_path, "--prompt", "a dog", "--video_cfg_scale", "0")
    assert [path.name for path in both] == ["clip_00_10-2.mp4", "clip_00_10.mp4"] and first.read_bytes() == before
    again = run(tiny_family, texts, tmp_path / "elsewhere", "--prompt", "a dog")
    assert again[0].read_bytes() == before, "the same seed gives the same bytes"


def test_a_run_that_was_stopped_goes_on_where_it_was(tiny_family, texts, tmp_path, monkeypatch, caplog):
    prompts = ("--prompt", "a dog", "rain", "--pipeline", "two_stage", *second_stage(tiny_family))
    whole = run(tiny_family, texts, tmp_path / "whole", *prompts)
    real, calls = stages.generate, []

    def stopped_at_the_fourth(*arguments, **named):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments[1].prompt.prompt)
        return real(*arguments, **named)

    monkeypatch.setattr(stages, "generate", stopped_at_the_fourth)
    caplog.set_level("INFO")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_family, texts, tmp_path / "stopped", *prompts)
    assert f"kept in {tmp_path / 'stopped' / FOLDER}: the same command goes on" in caplog.text
    monkeypatch.setattr(stages, "generate", lambda *arguments, **named: calls.append("again") or real(*arguments, **named))
    resumed = run(tiny_family, texts, tmp_path / "stopped", *prompts)
    assert "sampling, stage 2 of 2: 1 of 2 clips are sampled already" in caplog.text
    assert calls[3:] == ["again"], "what was sampled is not sampled again"
    assert [path.read_bytes() for path in resumed] == [path.read_bytes() for path in whole]


def test_strength_zero_is_the_base_and_streams_have_strengths_of_their_own(tiny_family, texts, tmp_path):
    lora = str(tiny_family.distilled_lora)

    def latents(name: str, *flags: str) -> dict[str, torch.Tensor]:
        kept = {}
        with pytest.MonkeyPatch.context() as patch:
            real = stages.generate
            patch.setattr(stages, "generate", lambda *a, **k: kept.setdefault("latents", real(*a, **k)))
            run(tiny_family, texts, tmp_path / name, "--prompt", "a dog", *flags)
        return {stream: getattr(kept["latents"], stream) for stream in ("video", "audio")}

    base, off = latents("base"), latents("off", "--lora", f"{lora}:0")
    on, half = latents("on", "--lora", lora), latents("half", "--lora_weight", lora, "--lora_multiplier", "0.5")
    assert all(torch.equal(base[name], off[name]) for name in base)
    assert not torch.allclose(base["video"], on["video"], atol=1e-3) and not torch.allclose(half["video"], on["video"], atol=1e-3)
    twice = latents("twice", "--lora", f"{lora}:0.25", "--lora", f"{lora}:0.25")
    assert torch.allclose(twice["video"], half["video"], atol=1e-4)
    picture_alone = latents("picture", "--lora", f"{lora}:1:1:0", "--modality_scale", "1")
    assert not torch.allclose(picture_alone["video"], base["video"], atol=1e-3)


def test_a_lora_beside_the_model_is_the_merged_one(tiny_family, texts, tmp_path):
    """Of every type that adds to a linear; against `networks.merging` in the weights."""
    from musubi_tuner.generation.denoise import generate
    from musubi_tuner.networks.merging import merge_weight
    from musubi_tuner.networks.reading import read_network
    from musubi_tuner.networks.stack import NetworkStack
    from musubi_tuner.networks.targets import linear_shapes
    from tests import preview_parts as parts

    tensors = load_file(tiny_family.distilled_lora)
    with_length = {}
    for name in [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]:
        out = tensors[f"{name}.lora_B.weight"].shape[0]
        with_length[f"{name}.lora_magnitude_vector"] = torch.rand(out, generator=torch.Generator().manual_seed(1)) + 0.5
    save_file(tensors | with_length, tmp_path / "dora.safetensors")
    for path in (tiny_family.distilled_lora, tmp_path / "dora.safetensors"):
        beside, merged = parts.load_wrapper(tiny_family.ltx23), parts.load_wrapper(tiny_family.ltx23)
        file = read_network(path, linear_shapes(merged.transformer))
        for name, adapter in file.adapters.items():
            linear = merged.transformer.get_submodule(name)
            linear.weight.data = merge_weight(linear.weight, adapter, 0.7)
        NetworkStack(beside.transformer, torch.float32).use([(path, Strength(0.7, 0.7))])
        ours, theirs = generate(beside, parts.sample(beside)), generate(merged, parts.sample(merged))
        assert torch.allclose(ours.video, theirs.video, atol=2e-4) and torch.allclose(ours.audio, theirs.audio, atol=2e-4)


def test_a_lora_is_parsed_from_the_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b:0.5"):
        Path(name).touch()
    monkeypatch.setattr("musubi_tuner.generation.jobs.newest_file", lambda path: path)
    assert parse_lora("a.safetensors:0.8").strength == Strength(0.8, 0.8)
    assert parse_lora("a.safetensors:2:1:0.5").strength == Strength(2.0, 1.0)
    assert parse_lora("b:0.5").path == Path("b:0.5") and parse_lora("b:0.5:-1").strength == Strength(-1.0, -1.0)
    with pytest.raises(UserError, match="2 numbers"):
        parse_lora("a.safetensors:1:2")
    assert parse_lora("a.safetensors:5e-1").strength == Strength(0.5, 0.5)
    for behind in ("abc", "nan", "1:abc", "0.8:"):
        with pytest.raises(UserError, match=f"behind the colon, '{behind}', is no strength"):
            parse_lora(f"a.safetensors:{behind}")
    for behind in ("1e30", "-101", "1e999"):
        with pytest.raises(UserError, match="between -100 and 100"):
            parse_lora(f"a.safetensors:{behind}")
    with pytest.raises(UserError, match=r"C:\\x.safetensors: not found"):
        parse_lora(r"C:\x.safetensors:0.8")


def test_stills_and_sound_alone_carry_their_recipe(tiny_family, texts, tmp_path):
    (still,) = run(tiny_family, texts, tmp_path / "still", "--prompt", "a dog --f 1")
    (sound,) = run(tiny_family, texts, tmp_path / "sound", "--prompt", "rain", "--ltx_mode", "audio")
    assert still.suffix == ".png" and read_recipe(still).facts["prompt"]["prompt"] == "a dog"
    assert sound.suffix == ".wav" and json.loads(sound.with_name(f"{sound.name}.json").read_text())[KEY] == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--prompt", "a dog", "--pipeline", "two_stage"), "needs --spatial_upsampler_path"),
        (("--prompt", "a dog --w 96", "--pipeline", "distilled", "--spatial_upsampler_path", "UP"), "multiples of 64"),
        (("--prompt", "a dog", "--pipeline", "two_stage", "--spatial_upsampler_path", "UP"), "give --distilled_lora"),
        (("--prompt", "a dog", "--pipeline", "distilled", "--spatial_upsampler_path", "MODEL"), "no latent upsampler"),
        (("--prompt", "a cat"), "--text_encoder"),
        ((), "--prompt TEXT, --sample_prompts FILE or --recreate"),
    ],
)
def test_what_is_lacking_is_said_before_the_model_is_loaded(tiny_family, texts, tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr(stages, "load_for_sampling", lambda *a, **k: pytest.fail("the model was loaded"))
    known = {"UP": str(tiny_family.upsampler), "MODEL": str(tiny_family.ltx23)}
    with pytest.raises(UserError, match=says):
        run(tiny_family, texts, tmp_path, *(known.get(flag, flag) for flag in flags))


def test_statistics_name_stage_step_and_tensor(tiny_family, texts, tmp_path):
    flags = ("--prompt", "a dog", "--pipeline", "two_stage", "--debug_sampling", *second_stage(tiny_family))
    (clip,) = run(tiny_family, texts, tmp_path, *flags)
    lines = [json.loads(line) for line in (tmp_path / f"{clip.stem}_sampling.jsonl").read_text(encoding="utf-8").splitlines()]
    guided = [line for line in lines if line["tensor"] == "guided prediction" and line["stream"] == "audio"]
    assert [(line["stage"], line["step"]) for line in guided] == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    assert {line["tensor"] for line in lines if line["stage"] == 1} == {
        "velocity, prompt pass", "velocity, negative pass", "velocity, perturbed pass", "velocity, isolated pass", "guided prediction",
    }  # fmt: skip
    assert all(line["min"] <= line["mean"] <= line["max"] for line in lines)


def test_nan_is_told_with_stage_and_step(tiny_family, texts, tmp_path, monkeypatch):
    from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper

    real, calls = OfficialLTXV2Wrapper.forward, []

    def broken(self, *arguments):
        velocity = real(self, *arguments)
        calls.append(1)
        return velocity._replace(audio=velocity.audio * float("nan")) if len(calls) > 10 else velocity

    monkeypatch.setattr(OfficialLTXV2Wrapper, "forward", broken)
    with pytest.raises(UserError, match="NaN or infinity in the audio velocity of the perturbed pass, step 3 of 4"):
        run(tiny_family, texts, tmp_path, "--prompt", "a dog", "--sample_steps", "4")


def test_a_long_clip_is_made_in_windows(tiny_family, texts, tmp_path):
    flags = ("--prompt", "a dog --f 97", "--window_frames", "33", "--window_overlap", "9", "--sample_width", "64")
    (clip,) = run(tiny_family, texts, tmp_path, *flags)
    with av.open(str(clip)) as container:
        assert len(list(container.decode(video=0))) == 97
    with av.open(str(clip)) as container:
        assert abs(sum(frame.samples for frame in container.decode(audio=0)) / 48000 - 97 / 24) < 0.1
    assert read_recipe(clip).facts["windows"] == [33, 9]
    for wrong, says in (("16", "8n"), ("9", "17 or more")):
        with pytest.raises(UserError, match=says):
            run(tiny_family, texts, tmp_path, "--prompt", "a dog", "--window_frames", wrong)
    for wrong, nearest in (("1", 9), ("33", 25), ("97", 25)):
        with pytest.raises(
            UserError, match=f"must be from 9 to 25, 8 less than --window_frames 33; the nearest that is allowed is {nearest}"
        ):
            run(tiny_family, texts, tmp_path, "--prompt", "a dog", "--window_frames", "33", "--window_overlap", wrong)


def test_enhanced_prompts_are_written_once_and_both_are_kept(tiny_family, texts, tmp_path, monkeypatch):
    from musubi_tuner.ltxv2.text import enhancing

    calls, real = [], enhancing.enhance
    monkeypatch.setattr(enhancing, "enhance", lambda *arguments: calls.append(arguments) or real(*arguments))
    flags = ("--prompt", "a dog", "--enhance_prompt", "default", "--text_encoder", str(tiny_family.gemma))
    (clip,) = run(tiny_family, texts, tmp_path, *flags)
    facts = read_recipe(clip).facts
    assert facts["written"] == "a dog" and facts["prompt"]["prompt"] not in ("a dog", "")
    assert run(tiny_family, texts, tmp_path, *flags) == [clip] and len(calls) == 1, (
        "the same command makes the same clip, and writes nothing anew"
    )
    assert len(run(tiny_family, texts, tmp_path, *flags, "--prompt_enhancement_seed", "11")) == 2
    with pytest.raises(UserError, match="give --text_encoder"):
        run(tiny_family, texts, tmp_path, "--prompt", "a dog", "--enhance_prompt", "default")


def test_a_card_that_cannot_decode_loses_nothing_that_was_sampled(tiny_family, texts, tmp_path, monkeypatch):
    def no_room(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises(TemporaryFailure, match="Nothing that was sampled is lost: it lies in .*unfinished"):
        patch.setattr(decode, "to_frames", no_room)
        run(tiny_family, texts, tmp_path / "out", "--prompt", "a dog")
    monkeypatch.setattr(stages, "generate", no_room)
    assert len(run(tiny_family, texts, tmp_path / "out", "--prompt", "a dog")) == 1, "from what was kept"


def test_scores_of_attention_are_planned_for_where_its_kernel_keeps_them(tiny_family, texts, tmp_path, monkeypatch):
    planned, place = [], sampling.place_to_sample
    monkeypatch.setattr(sampling, "place_to_sample", lambda request, machine: planned.append(request.work) or place(request, machine))
    for mode in ("auto", "math"):
        run(tiny_family, texts, tmp_path / mode, "--prompt", "a dog", "--vram_gb", "4", "--attn_mode", mode, "--no-compile")
    assert [work.scores_bytes for work in planned] == [0, SCORE_BYTES]


def test_a_run_that_is_stopped_before_anything_is_sampled_says_so(tiny_family, texts, tmp_path, monkeypatch, caplog):
    def stopped(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "generate", stopped)
    caplog.set_level("INFO")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_family, texts, tmp_path, "--prompt", "a dog")
    assert "is begun again by the same command" in caplog.text and "kept in" not in caplog.text
