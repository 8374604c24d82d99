"""The commands of docs/how-to/generate.md, each as it stands there but for its size, on toy files of the same names."""

import shutil
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from musubi_tuner import ltxv2_generate_video
from musubi_tuner.generation.recipe import recipe_path
from musubi_tuner.media.audio import Waveform
from musubi_tuner.media.write import write_video, write_wav
from tests.unit.test_docs import commands

PAGE, SCRIPT = "generate.md", "ltxv2_generate_video.py"
COMMANDS = [words[words.index(SCRIPT) + 1 :] for page, words in commands() if page == PAGE and SCRIPT in words]
PIPELINES = {"one_stage", "two_stage", "distilled", "ic_lora", "keyframes"}
SMALL = {"--width": "128", "--height": "64", "--frame_count": "49", "--window_frames": "33"}
"""In place of what the page gives."""
FRAMES, FPS = 25, 8
"""Of the others: three seconds."""


@pytest.fixture(scope="module")
def project(tiny_family, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("of the page")
    for name, file in (
        ("ltx-2.3-22b-dev", tiny_family.ltx23),
        ("ltx-2.3-22b-distilled", tiny_family.ltx23),
        ("ltx-2.3-spatial-upscaler-x2-1.0", tiny_family.upsampler),
        ("ltx-2.3-22b-distilled-lora-384", tiny_family.distilled_lora),
        ("ic_lora", tiny_family.distilled_lora),
        ("output/my_lora", tiny_family.distilled_lora),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(file, folder / f"{name}.safetensors")
    shutil.copytree(tiny_family.gemma, folder / "gemma-3-12b-it-qat-q4_0-unquantized")
    for name, color in (("door.png", (200, 40, 90)), ("street.png", (40, 90, 200)), ("start.png", (90, 200, 40))):
        Image.new("RGB", (128, 64), color).save(folder / name)
    sound = Waveform(samples=torch.sin(torch.arange(16000 * 4) / 9).expand(2, -1) * 0.3, rate=16000)
    frames = torch.arange(FRAMES)[:, None, None, None].expand(FRAMES, 64, 128, 3).to(torch.uint8) * 8
    for name in ("dog.mp4", "edges.mp4"):
        write_video(folder / name, frames, FPS, sound)
    write_wav(folder / "bark.wav", sound)
    return folder


def small(words: list[str], folder: Path) -> list[str]:
    found = [({"--output_dir": str(folder)} | SMALL).get(before, word) for before, word in zip(["", *words[:-1]], words, strict=True)]
    found = [word.replace(";120=", f";{FRAMES - 1}=") for word in found]
    own = {"--sample_width": "128", "--sample_height": "64", "--sample_frames": str(FRAMES)}
    given = {{"--width": "--sample_width", "--height": "--sample_height", "--frame_count": "--sample_frames"}.get(word) for word in words}
    rest = [part for flag, value in own.items() if flag not in given for part in (flag, value)]
    rest += [] if "--output_dir" in words else ["--output_dir", str(folder)]
    return [*found, *rest, "--sample_fps", str(FPS), "--sample_steps", "2", "--device", "cpu"]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[4:])[:70])
def test_a_command_of_the_page_makes_what_plays(project, tmp_path, monkeypatch, words):
    monkeypatch.chdir(project)
    assert ltxv2_generate_video.main(small(words, tmp_path)) == 0
    (made,) = [path for path in tmp_path.glob("clip_*") if path.suffix in (".mp4", ".wav")]
    with av.open(str(made)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) > 0
    if made.suffix == ".wav":
        assert recipe_path(made).is_file()
    else:
        with av.open(str(made)) as container:
            assert len(list(container.decode(video=0))) == (int(SMALL["--frame_count"]) if "--frame_count" in words else FRAMES)


def test_the_page_has_a_command_of_every_pipeline():
    """`hq` and `distilled_one_stage` are named in the words above the commands that they differ from by one word."""
    named = {words[words.index("--pipeline") + 1] if "--pipeline" in words else "one_stage" for words in COMMANDS}
    assert named == PIPELINES and len(COMMANDS) >= 10
