"""What training finds in caches before it loads a model: texts of other sources, captions that changed, everything stale at once."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from musubi_tuner.cache import store
from musubi_tuner.cache.audit import NOTE
from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.index import DatasetIndex, write_index
from musubi_tuner.cache.names import text_name, video_latent_name
from musubi_tuner.cache.sidecars import KINDS, SILENT
from musubi_tuner.cache.store import file_fingerprint, text_fingerprint
from musubi_tuner.config.dataset import DatasetSpec, load_dataset_config
from musubi_tuner.curation.packing.contents import gather
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.items import Draw, Item, list_items, token_counts
from musubi_tuner.dataset.verify import Wanted, verify_caches
from musubi_tuner.runtime.errors import UserError
from tests.unit.test_dataset_batches import RULES

PROGRAMS = ("ltxv2_cache_latents.py", "ltxv2_cache_audio_latents.py", "ltxv2_cache_text_encoder_outputs.py")
CAPTIONS = {"a": "a red disc", "b": "a blue disc", "c": "a green disc"}
WANTED = Wanted(latents={}, audio={}, text={"widths": "8+4"}, arguments={program: "--dataset_config d.toml" for program in PROGRAMS})


def make_items(folder: Path, captions: dict[str, str] | None = None, **text_metadata: str) -> list[Item]:
    """Media (of some bytes), captions, and cache files as the caching programs leave them."""
    media, cache = folder / "media", folder / "cache"
    media.mkdir(parents=True)
    spec = DatasetSpec(label="datasets[0]", kind="video", directory=media, jsonl_file=None, cache_directory=cache, target_frames=(9,))
    items = []
    for stem, caption in (captions or CAPTIONS).items():
        source = media / f"{stem}.mp4"
        source.write_bytes(stem.encode())
        source.with_suffix(".txt").write_text(caption, encoding="utf-8")
        latents = video_latent_name(stem, 0, 9, 96, 64)
        names = {"latents": latents, "audio": KINDS["audio"].name_beside(latents), "text": text_name(stem)}
        clip = Clip(
            key=f"{source.name}:00000-009", kind="video", source=source.name, stem=stem, source_fingerprint=file_fingerprint(source),
            start_seconds=0.0, end_seconds=9 / 24, fps=24.0, frames=9, width=96, height=64, original_width=96, original_height=64,
            has_audio=True, sidecars={kind: Sidecar(file=name) for kind, name in names.items()},
        )  # fmt: skip
        paths = {kind: cache / name for kind, name in names.items()}
        store.write(paths["latents"], KINDS["latents"].pack(torch.zeros(128, 2, 2, 3).bfloat16()), KINDS["latents"].expected(clip))
        store.write(paths["audio"], KINDS["audio"].pack(torch.zeros(8, 9, 16).bfloat16()), KINDS["audio"].expected(clip))
        text = {"kind": "text", "source": source.name, "caption": caption, "source_fingerprint": text_fingerprint(caption), "widths": "8+4"}
        store.write(paths["text"], KINDS["text"].pack(torch.zeros(5, 12), torch.ones(5).bool()), text | text_metadata)
        items.append(Item(key=f"datasets[0]/{clip.key}", spec=spec, clip=clip, paths=paths, has_sound=True))
    return items


def refusal(items: list[Item], wanted: Wanted = WANTED) -> str:
    with pytest.raises(UserError) as error:
        verify_caches(items, wanted)
    return str(error.value)


def test_right_caches_pass_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = make_items(tmp_path)
    verify_caches(items, WANTED)
    caplog.set_level(logging.INFO)
    verify_caches(items, replace(WANTED, text={"widths": "8"}))
    shutil.rmtree(tmp_path / "media")
    verify_caches(items, WANTED)
    assert not caplog.text


@pytest.mark.parametrize("media", ["there", "captions alone", "gone"])
def test_texts_that_were_swapped_are_refused_by_name(tmp_path: Path, media: str) -> None:
    items = make_items(tmp_path)
    if media == "gone":
        shutil.rmtree(tmp_path / "media")
    for path in (tmp_path / "media").glob("*.mp4") if media == "captions alone" else ():
        path.unlink()
    first, second = items[0].paths["text"], items[1].paths["text"]
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    text = refusal(items)
    assert "a_ltxv2_te.safetensors: it is the text of 'b.mp4', not of 'a.mp4'" in text and "not of 'b.mp4'" in text
    assert "has changed" not in text and "2 cache file(s)" in text
    shutil.copy(first, second)
    assert "1 cache file(s)" in refusal(items), "now the second one has its own again"


@pytest.mark.parametrize("media", ["there", "gone"])
def test_captions_that_were_edited_are_refused_and_lost_ones_named(tmp_path: Path, media: str, caplog: pytest.LogCaptureFixture) -> None:
    items = make_items(tmp_path)
    captions = {stem: tmp_path / "media" / f"{stem}.txt" for stem in CAPTIONS}
    if media == "gone":
        for path in (tmp_path / "media").glob("*.mp4"):
            path.unlink()
    captions["b"].write_text(" \n", encoding="utf-8")
    captions["c"].unlink()
    verify_caches(items, WANTED)
    assert "b.mp4: its caption is empty now; the cached one is 'a blue disc'" in caplog.text
    assert "c.mp4: its caption is gone; the cached one is 'a green disc'" in caplog.text and "a.mp4" not in caplog.text
    captions["b"].write_bytes(b"\xff\xfe")
    caplog.clear()
    verify_caches(items, WANTED)
    assert "b.txt: not UTF-8 text" in caplog.text
    captions["a"].write_text("a disc", encoding="utf-8")
    text = refusal(items)
    assert "a_ltxv2_te.safetensors: the caption has changed since it was cached ('a red disc' then, 'a disc' now)" in text
    assert "1 cache file(s)" in text and "ltxv2_cache_text_encoder_outputs.py" in text


def test_what_is_shown_of_long_captions_is_where_they_differ(tmp_path: Path) -> None:
    items = make_items(tmp_path, {"a": "disc " * 20 + "that is red"})
    (tmp_path / "media" / "a.txt").write_text("disc " * 20 + "that is blue", encoding="utf-8")
    assert "('...disc disc disc disc that is red' then, '...disc disc disc disc that is blue' now)" in refusal(items)


def test_captions_of_a_jsonl_are_compared_without_the_media(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = make_items(tmp_path)
    listing = tmp_path / "media" / "list.jsonl"
    listing.write_text('{"video_path": "a.mp4", "caption": "other"}\n{"video_path": "b.mp4"}\n', encoding="utf-8")
    items = [replace(item, spec=replace(item.spec, directory=None, jsonl_file=listing)) for item in items[:2]]
    for path in (tmp_path / "media").glob("*.mp4"):
        path.unlink()
    assert "('a red disc' then, 'other' now)" in refusal(items)
    assert "b.mp4: its caption is gone" in caplog.text


def test_a_damaged_text_is_damaged_and_not_of_another_caption(tmp_path: Path) -> None:
    items = make_items(tmp_path)
    items[0].paths["text"].write_bytes(b"x")
    text = refusal(items)
    assert "damaged or truncated" in text and "1 cache file(s)" in text


def test_all_files_of_a_replaced_clip_are_listed_with_all_commands(tmp_path: Path) -> None:
    items = make_items(tmp_path)
    (tmp_path / "media" / "a.mp4").write_bytes(b"another clip")
    (tmp_path / "media" / "a.txt").write_text("another caption", encoding="utf-8")
    text = refusal(items)
    assert text.count("its source 'a.mp4' has changed") == 2 and "the caption has changed" in text and "3 cache file(s)" in text
    assert all(f"python {program} --dataset_config d.toml" in text for program in PROGRAMS)


def test_silence_that_another_dataset_file_took_the_other_way_is_refused(tmp_path: Path) -> None:
    items = make_items(tmp_path)
    path = items[1].paths["audio"]
    store.write(path, store.read(path), store.read_metadata(path) | {NOTE: SILENT})
    verify_caches(items, WANTED)
    asking = [replace(item, spec=replace(item.spec, supervise_silence=True)) for item in items]
    said = refusal(asking)
    assert f"{path.name}: it was noted as {SILENT}" in said and said.startswith("1 cache file(s)") and PROGRAMS[1] in said


def test_texts_of_before_are_read_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = make_items(tmp_path)
    texts = torch.randn(len(items), 5, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.tensor([True, True, True, False, False])
    for item, text in zip(items, texts, strict=True):
        path = item.paths["text"]
        save_file({"t5_bfloat16": text, "t5_mask": mask}, path, metadata=store.read_metadata(path))
        sound = load(item.paths["audio"].read_bytes())
        renamed = {"audio_latents_9x16x8_bfloat16": sound["audio_latents_9x1x1_bfloat16"], "audio_lengths_int32": torch.tensor(9)}
        store.write(item.paths["audio"], renamed, store.read_metadata(item.paths["audio"]))
    verify_caches(items, WANTED)
    batches = [make_batch([Draw(item, 0, 0)], "av", RULES) for item in items]
    assert all(
        torch.equal(batch.text[0], text) and torch.equal(batch.text_mask[0], mask) for batch, text in zip(batches, texts, strict=True)
    )
    assert all(batch.audio_latents is not None for batch in batches)
    assert caplog.text.count("older keys") == 1


def test_another_length_of_captions_is_refused_where_it_cuts_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = replace(WANTED, text={"max_length": "256"})
    verify_caches(make_items(tmp_path / "short", max_length="1024", tokens="200"), wanted)
    assert not caplog.text
    items = make_items(tmp_path / "cut", max_length="1024", tokens="300")
    assert "its caption, cached with --max_length 1024, has 300 tokens there; --max_length 256 cuts it elsewhere" in refusal(items, wanted)
    verify_caches(make_items(tmp_path / "older", {"a": "word" + " word" * 80}, max_length="1024"), wanted)
    assert "1 caption(s) were cached without a note of their length" in caplog.text and "a_ltxv2_te.safetensors" in caplog.text


def test_texts_of_both_streams_serve_the_video_beside_its_own(tmp_path: Path) -> None:
    items = make_items(tmp_path)
    store.write(items[0].paths["text"], KINDS["text"].pack(torch.zeros(5, 8), torch.ones(5).bool()), {"kind": "text", "widths": "8"})
    verify_caches(items, replace(WANTED, text={"widths": "8"}))
    assert make_batch([Draw(item, 0, 0) for item in items[:2]], "video", RULES).text.shape == (2, 5, 8)
    assert "it was cached with --ltx_mode video, and lacks the text of the sound" in refusal(items)


def test_a_track_that_was_cached_as_silent_is_no_sound_of_its_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = make_items(tmp_path)
    toml = tmp_path / "dataset.toml"
    toml.write_text('[[datasets]]\nvideo_directory = "media"\ncache_directory = "cache"\ntarget_frames = [9]\n', encoding="utf-8")
    config = load_dataset_config(toml)
    write_index(config.datasets[0], DatasetIndex(settings=config.datasets[0].settings(), clips=tuple(item.clip for item in items)))

    def listed(mode: str) -> dict[str, bool]:
        return {item.clip.stem: item.has_sound for item in list_items(config.datasets, mode, toml)}

    kind, silent, gone = KINDS["audio"], items[1], items[2].paths["audio"]
    store.write(silent.paths["audio"], kind.pack(torch.zeros(8, 0, 16).bfloat16()), kind.expected(silent.clip))
    gone.rename(tmp_path / "aside")
    assert listed("av") == {"a": True, "b": False, "c": True}, "where nothing is cached the source tells"
    assert token_counts(list_items(config.datasets, "av", toml)[1], "av")[1] == 0
    assert listed("audio") == {"a": True, "c": True}, "what is missing is refused later, and not left out"
    assert "1 of 3 clips are left out of --ltx_mode audio: stills and clips without sound" in caplog.text
    (tmp_path / "aside").rename(gone)
    packed = {content.path for content in gather(config, "audio").files}
    assert f"datasets_0/cache/{silent.paths['audio'].name}" in packed, "which alone tells that the clip is silent"
    another = kind.expected(silent.clip) | {"source_fingerprint": "0"}
    store.write(silent.paths["audio"], kind.pack(torch.zeros(8, 0, 16).bfloat16()), another)
    assert listed("audio") == {"a": True, "b": True, "c": True}, "a file of another clip tells nothing of this one"
