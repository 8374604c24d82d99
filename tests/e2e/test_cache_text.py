"""The text caching program, on real tokenizers and encoders through the tiny checkpoints."""

import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_cache_text_encoder_outputs
from musubi_tuner.cache import store
from musubi_tuner.cache.names import prompt_path, text_name
from musubi_tuner.ltxv2.text.pipeline import FeatureStage
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_stills
from tests.training_parts import read_tensors

REPOSITORY = Path(__file__).resolve().parents[2]
CAPTIONS = {"walk ü.v2": "A dog walks.", "rain": "Rain taps on the roof.", "again": "A dog walks.", "long": "A drum keeps the beat. " * 9}
TOML = """
[general]
resolution = [96, 64]

[[datasets]]
image_directory = "pictures"
cache_directory = "cache"

[[validation_datasets]]
image_directory = "held out"
cache_directory = "held out cache"
"""


def write_sources(folder: Path, captions: dict[str, str]) -> None:
    write_stills(folder / "one", count=1)
    (still,) = (folder / "one").glob("*.png")
    (folder / "pictures").mkdir()
    for stem, caption in captions.items():
        shutil.copy(still, folder / "pictures" / f"{stem}.png")
        (folder / "pictures" / f"{stem}.txt").write_text(f"{caption}\n", encoding="utf-8")


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Pictures with captions, two of them equal, and a held-out one."""
    folder = tmp_path / "data set"
    write_sources(folder, CAPTIONS)
    (folder / "held out").mkdir()
    shutil.copy(folder / "pictures" / "rain.png", folder / "held out" / "other.png")
    (folder / "held out" / "other.txt").write_text("A bell rings.", encoding="utf-8")
    (folder / "dataset.toml").write_text(TOML, encoding="utf-8")
    return folder


def cache(folder: Path, family, *flags: str, model: Path | None = None, encoder: Path | None = None) -> int:
    arguments = ["--dataset_config", str(folder / "dataset.toml"), "--ltxv2_model", str(model or family.ltx23)]
    return ltxv2_cache_text_encoder_outputs.main([*arguments, "--text_encoder", str(encoder or family.gemma), "--device", "cpu", *flags])


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def text_of(folder: Path, stem: str) -> torch.Tensor:
    return read_tensors(folder / "cache" / text_name(stem))["text_bfloat16"]


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Prompts that went through the encoder."""
    prompts: list[str] = []
    real = FeatureStage.encode
    monkeypatch.setattr(FeatureStage, "encode", lambda self, texts: prompts.extend(texts) or real(self, texts))
    return prompts


def test_files_have_the_contracts_names_keys_and_metadata(dataset, tiny_family, encoded):
    (dataset / "prompts.txt").write_text("A cat sings. --n blurry\nA dog walks. --w 64 --h 64\n", encoding="utf-8")
    assert cache(dataset, tiny_family, "--ltx_mode", "av", "--sample_prompts", str(dataset / "prompts.txt"), "--batch_size", "2") == 0
    folder = dataset / "cache"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(f"{stem}_ltxv2_te.safetensors" for stem in CAPTIONS)
    assert (dataset / "held out cache" / "other_ltxv2_te.safetensors").is_file()
    prompts = {"A cat sings.", "blurry", "A dog walks.", ""}
    assert set((folder / "ltxv2_prompts").iterdir()) == {prompt_path(folder, prompt) for prompt in prompts}
    tensors = load_file(folder / text_name("rain"))
    assert {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()} == {
        "text_bfloat16": ((1024, 128 + 64), torch.bfloat16),
        "text_mask": ((1024,), torch.bool),
    }
    assert bool(tensors["text_mask"].all())
    metadata = store.read_metadata(folder / text_name("rain"))
    assert metadata["caption"] == "Rain taps on the roof." and metadata["source"] == "rain.png" and metadata["kind"] == "text"
    assert (metadata["widths"], metadata["stage"], metadata["backend"]) == ("128+64", "context", "gemma")
    assert json.loads(metadata["encoding"])["max_length"] == 1024
    assert torch.equal(text_of(dataset, "walk ü.v2"), text_of(dataset, "again"))
    assert sorted(encoded) == sorted({*CAPTIONS.values(), "A bell rings.", *prompts} - {CAPTIONS["long"]} | {CAPTIONS["long"].strip()})


def test_modes_share_the_video_context_and_20_has_other_widths(dataset, tiny_family):
    assert cache(dataset, tiny_family, "--ltx_mode", "audio") == 0
    both = text_of(dataset, "rain")
    assert cache(dataset, tiny_family) == 0
    assert torch.equal(text_of(dataset, "rain"), both[:, :128])
    assert cache(dataset, tiny_family, "--ltxv2_audio_video", model=tiny_family.ltx20) == 0
    assert text_of(dataset, "rain").shape == (1024, 48 + 48)


def test_features_hold_real_tokens_alone(dataset, tiny_family):
    assert cache(dataset, tiny_family, "--ltx_mode", "av", "--text_cache_stage", "features") == 0
    tensors = load_file(dataset / "cache" / text_name("rain"))
    assert tensors["text_bfloat16"].shape[0] == tensors["text_mask"].shape[0] < 30
    assert store.read_metadata(dataset / "cache" / text_name("rain"))["stage"] == "features"


def test_t5_text_is_padded_and_masked(dataset, tiny_family):
    flags = ("--text_encoder_backend", "t5", "--max_length", "32", "--tokenizer", str(tiny_family.t5))
    assert cache(dataset, tiny_family, *flags, encoder=tiny_family.t5) == 0
    tensors = load_file(dataset / "cache" / text_name("rain"))
    text, mask = tensors["text_bfloat16"], tensors["text_mask"]
    assert text.shape == (32, 128) and 0 < int(mask.sum()) < 32
    assert not bool(text[~mask].any())
    with pytest.raises(UserError, match="t5 gives one stream"):
        cache(dataset, tiny_family, *flags, "--ltx_mode", "av", encoder=tiny_family.t5)
    with pytest.raises(UserError, match="128 wide.*48"):
        cache(dataset, tiny_family, *flags, encoder=tiny_family.t5, model=tiny_family.ltx20)


def test_a_second_run_loads_no_encoder_and_touches_nothing(dataset, tiny_family, encoded, caplog):
    cache(dataset, tiny_family)
    before, first = files(dataset), len(encoded)
    times = {path: path.stat().st_mtime_ns for path in dataset.rglob("*.safetensors")}
    caplog.set_level(logging.INFO)
    assert cache(dataset, tiny_family) == 0
    assert len(encoded) == first and files(dataset) == before
    assert times == {path: path.stat().st_mtime_ns for path in dataset.rglob("*.safetensors")}
    assert "Text caching: 0 encoded, 0 failed" in caplog.text
    assert cache(dataset, tiny_family, "--no-skip_existing", "--batch_size", "1") == 0
    assert len(encoded) == 2 * first


def test_batches_give_the_same_text_as_single_captions(dataset, tiny_family):
    cache(dataset, tiny_family, "--ltx_mode", "av", "--batch_size", "1")
    alone = {stem: text_of(dataset, stem) for stem in CAPTIONS}
    cache(dataset, tiny_family, "--ltx_mode", "av", "--batch_size", "8", "--no-skip_existing")
    for stem, text in alone.items():
        assert torch.allclose(text.float(), text_of(dataset, stem).float(), rtol=2**-7, atol=1e-6), "one step of bf16 at most"


def test_what_changed_is_rebuilt_and_listed_with_the_reason(dataset, tiny_family, encoded, caplog):
    cache(dataset, tiny_family)
    caplog.set_level(logging.INFO)
    encoded.clear()
    (dataset / "pictures" / "rain.txt").write_text("Hail now.", encoding="utf-8")
    (dataset / "cache" / text_name("again")).write_bytes(b"damaged")
    for suffix in (".png", ".txt"):
        (dataset / "pictures" / f"long{suffix}").unlink()
    assert cache(dataset, tiny_family) == 0
    assert sorted(encoded) == ["A dog walks.", "Hail now."]
    told = " ".join(caplog.text.split())
    assert "the caption has changed (caption: Rain taps on the roof., wanted Hail now.)" in told and "damaged or truncated" in told
    assert "1 file(s) belong to no caption and no sample prompt; they are left where they are" in caplog.text
    assert f"not trained on: {text_name('long')}" in caplog.text
    for flags, reason in (
        (("--max_length", "8"), "other settings"),
        (("--max_length", "8", "--ltx_mode", "av"), "it was cached with --ltx_mode video, and lacks"),
    ):
        caplog.clear()
        assert cache(dataset, tiny_family, *flags) == 0
        assert reason in caplog.text
    caplog.clear()
    assert cache(dataset, tiny_family, *flags, model=tiny_family.ltx20) == 0
    assert "another model's text projection" in caplog.text


def test_renamed_models_rebuild_nothing(dataset, tiny_family, encoded, tmp_path):
    cache(dataset, tiny_family)
    encoded.clear()
    shutil.copy(tiny_family.ltx23, tmp_path / "renamed.safetensors")
    shutil.copytree(tiny_family.gemma, tmp_path / "other name")
    assert cache(dataset, tiny_family, model=tmp_path / "renamed.safetensors", encoder=tmp_path / "other name") == 0
    assert encoded == []


def test_missing_and_empty_captions_are_listed_before_anything_is_encoded(dataset, tiny_family, encoded):
    (dataset / "pictures" / "rain.txt").unlink()
    (dataset / "pictures" / "again.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(UserError, match="2 of 4 sources have a missing or empty caption: again.png, rain.png"):
        cache(dataset, tiny_family)
    assert encoded == [] and files(dataset) == {}


def test_two_captions_for_one_file_are_refused(dataset, tiny_family):
    entry = {"image_path": "pictures/rain.png", "caption": "Something else."}
    (dataset / "other.jsonl").write_text(json.dumps(entry), encoding="utf-8")
    more = '[[datasets]]\nimage_jsonl_file = "other.jsonl"\ncache_directory = "cache"\n'
    (dataset / "dataset.toml").write_text(TOML.replace("[[validation", more + "\n[[validation"), encoding="utf-8")
    with pytest.raises(UserError, match="would both be cached in this file, though they differ.*caption.*cache_directory of its own"):
        cache(dataset, tiny_family)


def test_a_dry_run_forecasts_and_writes_nothing(dataset, tiny_family, encoded, caplog):
    caplog.set_level(logging.INFO)
    assert cache(dataset, tiny_family, "--dry_run", "--ltx_mode", "av") == 0
    assert encoded == [] and not (dataset / "cache").exists()
    assert "6 file(s) would be encoded" in caplog.text and re.search(r"different texts +5\n", caplog.text)
    assert "about 1.5 MiB to be written" in caplog.text and "MiB free" in caplog.text


def test_texts_that_become_nan_fail_by_name_and_alone(dataset, tiny_family, tmp_path, caplog):
    """An encoder with one embedding that overflows: the captions that hold its token fail, the others are cached."""
    from transformers import AutoTokenizer

    broken = tmp_path / "gemma"
    shutil.copytree(tiny_family.gemma, broken)
    tokenizer = AutoTokenizer.from_pretrained(broken)
    elsewhere = {
        token for text in (*CAPTIONS.values(), "A bell rings.") if text != CAPTIONS["rain"] for token in tokenizer(text)["input_ids"]
    }
    own = next(token for token in tokenizer(CAPTIONS["rain"])["input_ids"] if token not in elsewhere)
    tensors = read_tensors(broken / "model.safetensors")
    key = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[key][own] = 3e38  # finite, or the file itself would be refused
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    caplog.set_level(logging.INFO)
    assert cache(dataset, tiny_family, encoder=broken) == 1
    assert "Text caching: 5 encoded, 1 failed" in caplog.text and "NaN or infinity" in caplog.text
    assert not (dataset / "cache" / text_name("rain")).exists() and (dataset / "cache" / text_name("again")).exists()


def test_chunks_reload_the_encoder_and_change_nothing(dataset, tiny_family, monkeypatch):
    from musubi_tuner.encoding import text

    cache(dataset, tiny_family, "--batch_size", "1")
    whole = files(dataset)
    shutil.rmtree(dataset / "cache")
    monkeypatch.setattr(text, "_CHUNK_BYTES", 10_000)
    loads = []
    real = text.load_feature_stage
    monkeypatch.setattr(text, "load_feature_stage", lambda *given, **named: loads.append(1) or real(*given, **named))
    cache(dataset, tiny_family, "--batch_size", "1")
    assert len(loads) > 1 and files(dataset) == whole


def test_a_batch_of_captions_without_room_is_told_with_a_smaller_one(dataset, tiny_family, monkeypatch):
    from musubi_tuner.encoding import text
    from musubi_tuner.runtime.errors import TemporaryFailure

    def fail(*given, **named):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(text.FeatureStage, "encode", fail)
    with pytest.raises(TemporaryFailure, match=r"\(no room\).*fewer texts run together: --batch_size 4"):
        cache(dataset, tiny_family, "--batch_size", "8")


def test_a_killed_run_is_completed_by_the_next_one(tmp_path, tiny_family):
    draw = random.Random()
    seed = draw.randrange(2**32)
    print("seed", seed)  # shown where the test fails
    draw.seed(seed)
    folder = tmp_path / "data set"
    write_sources(folder, {f"still {number:02d}": f"Picture {number} of many." for number in range(40)})
    (folder / "dataset.toml").write_text(TOML.split("[[validation")[0], encoding="utf-8")
    command = [
        sys.executable, "ltxv2_cache_text_encoder_outputs.py", "--dataset_config", str(folder / "dataset.toml"), "--device", "cpu",
        "--ltxv2_model", str(tiny_family.ltx23), "--text_encoder", str(tiny_family.gemma), "--batch_size", "1",
    ]  # fmt: skip
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit, wanted = time.monotonic() + 60, draw.randint(1, 20)
        texts = "*_te.safetensors"
        while process.poll() is None and time.monotonic() < limit and (made := len(list((folder / "cache").glob(texts)))) < wanted:
            time.sleep(0.001 if made > 0 else 0.02)  # it starts for seconds, and writes for less than one
        time.sleep(draw.uniform(0, 0.02))
    finally:
        process.kill()
        process.wait()
    left = files(folder)
    assert 0 < len(left) < 41
    (folder / "cache" / ".0123456789ab.1_ltxv2_te.safetensors.tmp").write_bytes(b"left over")
    (folder / "cache" / ".0123456789ab.1_ltxv2.safetensors.tmp").write_bytes(b"of another program")
    good = {path: path.stat().st_mtime_ns for path in folder.rglob("*_te.safetensors") if not path.name.startswith(".")}
    assert cache(folder, tiny_family, "--batch_size", "1") == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in good.items())
    assert [path.name for path in folder.rglob("*.tmp")] == [".0123456789ab.1_ltxv2.safetensors.tmp"]
    completed = files(folder)
    shutil.rmtree(folder / "cache")
    assert cache(folder, tiny_family, "--batch_size", "1") == 0
    assert files(folder) == completed and len(completed) == 41


def test_a_caption_that_cannot_be_read_fails_by_name_and_alone(dataset, tiny_family, encoded, caplog):
    (dataset / "pictures" / "rain.txt").write_bytes("Regen auf dem Dach für Stunden".encode("latin-1"))
    caplog.set_level(logging.INFO)
    assert cache(dataset, tiny_family, "--dry_run") == 1 and "rain.txt: not UTF-8 text" in caplog.text
    caplog.clear()
    assert cache(dataset, tiny_family) == 1
    assert "Text caching: 5 encoded, 1 failed" in caplog.text and "datasets[0]/rain.png" in caplog.text and "not UTF-8 text" in caplog.text
    assert CAPTIONS["rain"] not in encoded and not (dataset / "cache" / text_name("rain")).exists()


def test_a_file_whose_bits_turned_is_made_again(dataset, tiny_family, encoded, caplog):
    cache(dataset, tiny_family)
    path = dataset / "cache" / text_name("rain")
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000] + bytes([whole[-2000] ^ 1]) + whole[-1999:])
    encoded.clear()
    caplog.set_level(logging.INFO)
    assert cache(dataset, tiny_family, "--batch_size", "1") == 0
    assert encoded == [CAPTIONS["rain"]] and "not those that were written" in caplog.text
    assert store.read_metadata(path)["tokens"].isdecimal()


def test_texts_that_are_cut_are_named(dataset, tiny_family, caplog):
    assert cache(dataset, tiny_family) == 0
    assert "left out" not in caplog.text
    assert cache(dataset, tiny_family, "--max_length", "12") == 0
    assert "longer than the 12 tokens of --max_length, and the rest of them is left out: " in caplog.text
    told = caplog.text.split("left out: ")[1].splitlines()[0]
    assert "datasets[0]/long.png (" in told and "rain" not in told
