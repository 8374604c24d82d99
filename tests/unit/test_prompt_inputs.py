"""Conditioning inputs of prompts, pictures, clips and sound: read, found and checked before training."""

import dataclasses
from pathlib import Path

import pytest

from musubi_tuner.generation.encode import _kept_video, generated_spans
from musubi_tuner.prompts.prompt import ConditioningInputs, Rectangle, Span
from musubi_tuner.prompts.sample_prompts import PromptDefaults, load_prompts, prompts_of_lines
from musubi_tuner.runtime.errors import UserError


def read(folder: Path, flags: str) -> ConditioningInputs:
    for name in ("a.png", "b c.png", "clip.mp4", "song.wav"):
        (folder / name).touch()
    (folder / "prompts.txt").write_text(f"a fox --w 128 --h 64 --f 25 {flags}\n", encoding="utf-8")
    return load_prompts(folder / "prompts.txt")[0].inputs


def test_every_flag(tmp_path):
    flags = "--i a.png --ei b c.png --k 8=a.png; 16=b c.png --kp 24=a.png --iv clip.mp4 --vt .5-1 --box 32,0,64,32"
    flags += " --a song.wav --at 1.5- --v clip.mp4"
    assert read(tmp_path, flags) == ConditioningInputs(
        image=tmp_path / "a.png",
        end_image=tmp_path / "b c.png",
        keyframes=((8, tmp_path / "a.png"), (16, tmp_path / "b c.png")),
        keyframes_in_place=((24, tmp_path / "a.png"),),
        video=tmp_path / "clip.mp4",
        video_span=Span(0.5, 1.0),
        box=Rectangle(32, 0, 64, 32),
        audio=tmp_path / "song.wav",
        audio_span=Span(1.5, float("inf")),
        reference=tmp_path / "clip.mp4",
    )
    assert read(tmp_path, "--iv clip.mp4 --vt -2 --crop 0,0,64,64").video_span == Span(0.0, 2.0)
    assert read(tmp_path, "") == ConditioningInputs()


def test_the_same_in_toml(tmp_path):
    (tmp_path / "clip.mp4").touch()
    text = "[prompt]\nwidth = 128\nheight = 64\nframe_count = 25\n[[prompt.subset]]\nprompt = 'a'\n"
    text += "input_video_path = 'clip.mp4'\ngenerate_seconds = '0.5-'\noutpaint_crop = '0,0,64,64'\n"
    (tmp_path / "prompts.toml").write_text(text, encoding="utf-8")
    inputs = load_prompts(tmp_path / "prompts.toml")[0].inputs
    assert inputs == ConditioningInputs(video=tmp_path / "clip.mp4", video_span=Span(0.5, float("inf")), crop=Rectangle(0, 0, 64, 64))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--v nowhere.mp4", r"--v 'nowhere.mp4': no such file"),
        ("--ra nowhere.wav", r"--ra 'nowhere.wav': no such file"),
        ("--ei nowhere.png", r"--ei 'nowhere.png': no such file"),
        ("--k a.png", r"must be FRAME=PICTURE"),
        ("--k 25=a.png", r"--k 25=...: the sample's frames are 0 to 24"),
        ("--kp 25=a.png", r"--kp 25=...: the sample's frames are 0 to 24"),
        ("--k 8=a.png;08=b c.png", r"two pictures of frame 8"),
        ("--ei a.png --k 24=b c.png", r"--ei and --k 24=... both give the last frame"),
        ("--vt 1-", r"give the clip by --iv"),
        ("--at 1-", r"give the sound by --a"),
        ("--kp 17=a.png;20=b c.png", r"--kp 17=... and --kp 20=... are two pictures of one latent frame \(frames 17 to 24 are one\)"),
        ("--i a.png --kp 0=b c.png", r"--i and --kp 0=... are two pictures of one latent frame \(frame 0 is one\)"),
        ("--iv clip.mp4 --vt now", r"must be START-END"),
        ("--iv clip.mp4 --vt 2-1", r"ends before it starts"),
        ("--iv clip.mp4 --box 0,0,40,32", r"multiples of 32"),
        ("--iv clip.mp4 --box 0,0,0,32", r"are not 0"),
        ("--iv clip.mp4 --box 1,2", r"LEFT,TOP,WIDTH,HEIGHT"),
        ("--iv clip.mp4 --box 96,0,64,32", r"not within 128x64"),
        ("--iv clip.mp4 --box 0,0,32,32 --crop 0,0,32,32", r"exclude each other"),
    ],
)
def test_mistakes_name_line_flag_and_remedy(tmp_path, flags, message):
    with pytest.raises(UserError, match=f"prompts.txt, line 1: .*{message}"):
        read(tmp_path, flags)


def test_a_strength_is_of_the_flag_that_it_is_written_behind(tmp_path):
    inputs = read(tmp_path, "--ei a.png --k 8=a.png;16=a.png@.25 --kp 8=b c.png@.5;24=b c.png@.75")
    assert dict(inputs.strengths) == {8: 0.5, 16: 0.25, 24: 0.75}, "as recipes have had it"
    assert dict(inputs.strengths_beside) == {8: 1.0, 24: 1.0}, "of --k 8 and --ei"
    same = read(tmp_path, "--k 8=a.png@.5 --kp 8=b c.png@.5")
    assert (same.strengths, same.strengths_beside) == (((8, 0.5),), ())


def test_spans_that_are_generated_are_told_in_whole_latent_frames():
    """`--vt 2-3` of 97 frames at 24: the latent frames [41, 49) to [65, 73) are touched."""
    inputs = ConditioningInputs(video=Path("a.mp4"), video_span=Span(2.0, 3.0), audio=Path("a.wav"), audio_span=Span(1.0, float("inf")))
    (prompt,) = prompts_of_lines(["a dog --f 97 --w 64 --h 64"], "--prompt", Path(), PromptDefaults())
    pictures, sound = generated_spans(dataclasses.replace(prompt, inputs=inputs))
    assert pictures.startswith("pictures from 1.71 to 3.04 s, frames 41 to 72 ") and sound.startswith("sound from 0.97 to ")
    kept = _kept_video(dataclasses.replace(prompt, inputs=inputs))[:, 0, 0]
    assert (~kept).nonzero().flatten().tolist() == [6, 7, 8, 9], "[41, 49), [49, 57), [57, 65), [65, 73)"
    assert generated_spans(prompt) == []


def test_what_is_around_a_crop_is_generated_in_all_seconds():
    """Of 3 x 2 x 2 cells, by latent frame: the clip fills the left ones."""
    inputs = ConditioningInputs(video=Path("a.mp4"), crop=Rectangle(0, 0, 32, 64))
    (prompt,) = prompts_of_lines(["a dog --f 17 --w 64 --h 64"], "--prompt", Path(), PromptDefaults())
    for span, kept in ((None, [1, 1, 1]), (Span(0.3, float("inf")), [1, 0, 0]), (Span(0.0, 0.3), [0, 0, 1])):
        cells = _kept_video(dataclasses.replace(prompt, inputs=dataclasses.replace(inputs, video_span=span)))
        assert not cells[:, :, 1].any() and cells[:, :, 0].int().tolist() == [[one, one] for one in kept]
