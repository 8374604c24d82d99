"""Text caching by the real program on the tiny Gemma: files, skipping, killing, mistakes."""

import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_cache_text_encoder_outputs as program
from musubi_tuner.cache.names import prompt_path
from musubi_tuner.cache.store import read_metadata
from musubi_tuner.ltxv2.text.encoders import TextEncoder
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clips

REPOSITORY = Path(__file__).resolve().parents[2]
CAPTIONS = ["rain on a roof", "a dog barks in the quiet library", "rain on a roof", "glasses clink"]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "data set ü"
    paths = write_clips(place / "clips", count=len(CAPTIONS), frames=9)
    for path, caption in zip(paths, CAPTIONS, strict=True):
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    (place / "dataset.toml").write_text(
        '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\ntarget_frames = [9]\n', encoding="utf-8"
    )
    return place


def arguments(folder, family, *extra):
    return [
        "--dataset_config", str(folder / "dataset.toml"), "--ltx_mode", "av", "--ltxv2_model", str(family.ltx23),
        "--text_encoder", str(family.gemma), "--device", "cpu", "--batch_size", "1", *extra,
    ]  # fmt: skip


def run(folder, family, *extra):
    return program.main(arguments(folder, family, *extra))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted((folder / "cache").rglob("*")) if path.is_file()}


def test_files_have_the_contracts_keys_shapes_and_metadata(folder, tiny_family):
    assert run(folder, tiny_family) == 0
    path = sorted((folder / "cache").glob("*_ltxv2_te.safetensors"))[0]
    tensors = load_file(path)
    assert set(tensors) == {"text_bfloat16", "text_mask"}
    assert tensors["text_bfloat16"].shape == (1024, 128 + 64) and bool(tensors["text_mask"].all())
    metadata = read_metadata(path)
    assert (metadata["kind"], metadata["stage"], metadata["backend"], metadata["widths"]) == ("text", "context", "gemma", "128+64")
    assert metadata["caption"] == CAPTIONS[0] and metadata["source"].endswith(".mp4")
    assert json.loads(metadata["encoding"])["max_length"] == 1024
    assert prompt_path(folder / "cache", "").is_file(), "the empty prompt is always there"


def test_identical_captions_are_encoded_once(folder, tiny_family, monkeypatch):
    encoded = []
    original = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, prompts: encoded.extend(prompts) or original(self, prompts))
    run(folder, tiny_family)
    assert sorted(encoded) == sorted({*CAPTIONS, ""})


def test_a_second_run_loads_no_encoder_and_touches_nothing(folder, tiny_family, monkeypatch, caplog):
    run(folder, tiny_family)
    before = contents(folder)
    monkeypatch.setattr(program, "load_text_pipeline", lambda *a, **k: pytest.fail("the encoder was loaded"))
    with caplog.at_level(logging.INFO):
        assert run(folder, tiny_family) == 0
    assert contents(folder) == before
    assert "kept              5" in caplog.text


def test_what_changed_is_made_anew_with_the_reason(folder, tiny_family, caplog):
    run(folder, tiny_family)
    sorted((folder / "clips").glob("*.txt"))[0].write_text("something else", encoding="utf-8")
    with caplog.at_level(logging.INFO):
        run(folder, tiny_family)
    assert "the source file has changed" in caplog.text and "of these rebuilt  1" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(folder, tiny_family, "--max_length", "8")
    assert "of these rebuilt  5" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        program.main([*arguments(folder, tiny_family, "--max_length", "8"), "--ltxv2_model", str(tiny_family.ltx20)])
    assert "another model's text projection" in caplog.text


def test_sample_prompts_and_negatives_are_cached(folder, tiny_family):
    prompts = folder / "prompts.txt"
    prompts.write_text("I walk --n blurry --w 64 --h 64 --f 9\n# a comment\n", encoding="utf-8")
    run(folder, tiny_family, "--sample_prompts", str(prompts))
    for text in ("I walk", "blurry", ""):
        assert read_metadata(prompt_path(folder / "cache", text))["caption"] == text


def test_features_are_kept_for_valid_tokens_alone(folder, tiny_family):
    run(folder, tiny_family, "--text_cache_stage", "features")
    tensors = load_file(sorted((folder / "cache").glob("*_ltxv2_te.safetensors"))[0])
    assert tensors["text_bfloat16"].shape[0] == tensors["text_mask"].shape[0] < 40


@pytest.mark.parametrize("content", [None, "", "  \n"])
def test_missing_and_empty_captions_are_listed_before_anything_is_encoded(folder, tiny_family, content):
    path = sorted((folder / "clips").glob("*.txt"))[1]
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"1 of 4 sources.*{path.stem}.*'.txt' file"):
        run(folder, tiny_family)
    assert not (folder / "cache").exists()


def test_a_dry_run_encodes_nothing(folder, tiny_family, caplog):
    with caplog.at_level(logging.INFO):
        assert run(folder, tiny_family, "--dry_run") == 0
    assert "5 file(s) of 4 different text(s)" in caplog.text
    assert not (folder / "cache").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--text_encoder_backend", "t5"), "needs two"),
        (("--max_length", "2000"), "between 1 and 1024"),
        (("--gemma_load_in_8bit", "--gemma_load_in_4bit"), "exclude"),
        (("--text_encoder", "google/gemma-3-12b-it"), "hf download"),
    ],
)
def test_flags_that_do_not_fit_are_named(folder, tiny_family, extra, message):
    with pytest.raises(UserError, match=message):
        run(folder, tiny_family, *extra)


def test_a_killed_run_is_completed_by_the_next_one(folder, tiny_family):
    draw = random.Random()
    seed = draw.randrange(2**32)
    print("seed", seed)  # shown where the test fails
    draw.seed(seed)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"prompt number {i} --w 64 --h 64 --f 9" for i in range(40)), encoding="utf-8")
    extra = ("--sample_prompts", str(prompts))
    command = [sys.executable, "-m", "musubi_tuner.ltxv2_cache_text_encoder_outputs", *arguments(folder, tiny_family, *extra)]
    for _ in range(2):
        before, after = len(list((folder / "cache").rglob("*.safetensors"))), draw.randint(1, 12)
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < limit and len(list((folder / "cache").rglob("*.safetensors"))) < before + after:
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert len(contents(folder)) < 45, "it was killed before the end"
    run(folder, tiny_family, *extra)
    completed = contents(folder)
    assert len(completed) == 45 and all(name.endswith("_ltxv2_te.safetensors") for name in completed), "no temporary file survives"
    for path in (folder / "cache").rglob("*.safetensors"):
        path.unlink()
    run(folder, tiny_family, *extra)
    assert contents(folder) == completed


def test_batches_give_nearly_the_same_contexts_as_single_captions(folder, tiny_family):
    run(folder, tiny_family)
    single = {path.name: load_file(path) for path in (folder / "cache").glob("*_te.safetensors")}
    run(folder, tiny_family, "--no-skip_existing", "--batch_size", "4")
    for path in (folder / "cache").glob("*_te.safetensors"):
        left, right = single[path.name]["text_bfloat16"].float(), load_file(path)["text_bfloat16"].float()
        assert torch.allclose(left, right, rtol=2**-7, atol=1e-3)
