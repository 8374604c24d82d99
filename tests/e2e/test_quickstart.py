"""The quickstart's own commands, in the environment of the tests: everything but the install."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
from safetensors import safe_open

import quickstart
from musubi_tuner import ltxv2_cache_audio_latents, ltxv2_cache_latents, ltxv2_cache_text_encoder_outputs
from musubi_tuner.tiny.world.checkpoint import write_world_checkpoint
from musubi_tuner.tiny.world.lesson import Lesson, read_prompts, write_lesson
from musubi_tuner.tiny.world.subjects import CharacterSubject
from musubi_tuner.tiny.world.text import write_world_gemma
from tools import make_world

AAC_BLOCK = 1024
STEPS = 6
CACHING = {
    "ltxv2_cache_latents.py": ltxv2_cache_latents,
    "ltxv2_cache_audio_latents.py": ltxv2_cache_audio_latents,
    "ltxv2_cache_text_encoder_outputs.py": ltxv2_cache_text_encoder_outputs,
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory):
    """The quickstart, with fewer steps, of previews too."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("Schnell Start é")
    patch.setattr(quickstart, "OUTPUT", folder)
    patch.setattr(quickstart, "STEPS", STEPS)
    patch.setattr(quickstart, "PROMPTS", quickstart.PROMPTS.replace("--s 4", "--s 2"))
    quickstart.write_inputs()
    for title, command in quickstart.commands(Path(sys.executable)):
        run(title, command)
    yield folder
    patch.undo()


def run(title: str, command: list[object]) -> str:
    answer = subprocess.run(
        list(map(str, command)), cwd=quickstart.ROOT, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    assert answer.returncode == 0, f"{title}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout


def test_the_small_worlds_commands_train_and_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few clips and two steps, of training and of previews: that it goes through, not that it learns."""
    monkeypatch.setattr(quickstart, "OUTPUT", tmp_path)
    monkeypatch.setattr(quickstart, "WORLD_STEPS", 2)
    world = tmp_path / "world"
    (_, make), *others = quickstart.world_commands(Path(sys.executable))
    assert Path(str(make[1])).name == "make_world.py"
    write_world_checkpoint(world / "models" / "world.safetensors")
    write_world_gemma(world / "models" / "gemma3")
    write_lesson(world, Lesson(clips=2, reminders=2, character_prompts=1, base_prompts=1, steps=2))
    told = [run(title, command) for title, command in (*others, *quickstart.world_results(Path(sys.executable)))]
    assert len((world / "before_and_after.html").read_text(encoding="utf-8").split("<video")) == 1 + 4
    assert (world / "training" / "zorbo.safetensors").is_file()
    assert re.search(r"zorbo: its voice of two pitches +0\.00", told[-1])


def test_what_the_quickstart_makes_of_the_world(tmp_path: Path) -> None:
    assert make_world.main([str(tmp_path)]) == 0
    prompts = read_prompts(tmp_path / "prompts.txt")
    assert [type(one) is CharacterSubject for one in prompts] == [True] * 6 + [False] * 9
    assert len({one.voice for one in prompts[6:]}) == 9
    assert len(list((tmp_path / "character").glob("*.mp4"))) == 16
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"world.safetensors", "gemma3"}


def test_previews_play_with_sound_of_their_length(output: Path) -> None:
    previews = sorted((output / "training" / "sample").iterdir())
    assert [path.name for path in previews] == [f"quickstart_s{step:08d}_{row:02d}_{row + 1}.mp4" for step in (0, STEPS) for row in (0, 1)]
    for path in previews:
        with av.open(str(path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.width, video.height) == (192, 128)
            assert abs(float(video.duration * video.time_base) - float(audio.duration * audio.time_base)) <= 1 / 24
            frames, samples = 0, 0
            for frame in container.decode(video, audio):
                frames += isinstance(frame, av.VideoFrame)
                samples += frame.samples if isinstance(frame, av.AudioFrame) else 0
            assert frames == 25
            assert abs(samples - 25 / 24 * audio.codec_context.sample_rate) <= audio.codec_context.sample_rate / 24 + AAC_BLOCK


def test_training_changes_the_previews(output: Path) -> None:
    folder = output / "training" / "sample"
    assert (folder / "quickstart_s00000000_00_1.mp4").read_bytes() != (folder / f"quickstart_s{STEPS:08d}_00_1.mp4").read_bytes()


def test_losses_of_both_streams_are_written_and_drawn(output: Path) -> None:
    rows = [json.loads(line) for line in (output / "training" / "quickstart-loss.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [row for row in rows if "loss_video" in row]
    assert {row["step"] for row in trained} == set(range(1, STEPS + 1))
    assert all(math.isfinite(row["loss_video"]) and math.isfinite(row["loss_audio"]) for row in trained)
    held_out = [row["validation/loss_video"] for row in rows if "validation/loss_video" in row]
    assert len(held_out) > 2
    page = (output / "training" / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "validation/loss_video" in page


def test_the_lora_file_is_written(output: Path) -> None:
    with safe_open(output / "training" / "quickstart.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert names and all(name.startswith("diffusion_model.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def test_a_second_run_of_the_caching_commands_encodes_nothing(output: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in (output / "cache").rglob("*.safetensors")}
    assert files
    programs = dict(CACHING)
    for title, command in quickstart.commands(Path(sys.executable)):
        if title.startswith("caching"):
            _, script, *words = command
            assert programs.pop(script.name).main(list(map(str, words))) == 0
    assert not programs
    assert {path: path.stat().st_mtime_ns for path in (output / "cache").rglob("*.safetensors")} == files
