"""Data of the official trainer: trees saved with torch.save from our own caches come back as these caches, and are trained on."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from musubi_tuner import ltxv2_import_precomputed, ltxv2_train_network
from musubi_tuner.cache.names import strip_key
from musubi_tuner.cache.record import RECORD_NAME
from musubi_tuner.conditioning.recipe import Recipe
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.items import Draw, Item, list_items
from musubi_tuner.ltxv2.geometry import patchify_video
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clips, write_stills
from tests import training_parts
from tests.e2e.test_conditioning import RECIPES, draw_rules

TOML = """
[general]
resolution = [64, 64]

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [17]

[[datasets]]
image_directory = "stills"
cache_directory = "cache"
"""
PADDED = 48
FEATURES = ("--text_cache_stage", "features")


@dataclass(frozen=True)
class Native:
    """The same media, cached by our own programs with contexts and with features."""

    contexts: training_parts.Data
    features: training_parts.Data


@pytest.fixture(scope="module")
def native(tiny_family, tmp_path_factory) -> Native:
    return make_native(tmp_path_factory.mktemp("eigene ü"), tiny_family.ltx23, tiny_family.gemma)


def make_native(folder: Path, model: Path, gemma: Path) -> Native:
    write_clips(folder / "contexts" / "clips", count=2, frames=25, width=64, height=64)
    write_stills(folder / "contexts" / "stills", count=1, width=64, height=64)
    made = []
    for name, stage in (("contexts", "context"), ("features", "features")):
        place = folder / name
        if not place.is_dir():
            shutil.copytree(folder / "contexts", place)
        (place / "dataset.toml").write_text(TOML, encoding="utf-8")
        data = training_parts.Data(place, place / "dataset.toml", model, "av", gemma)
        training_parts.cache(data, text=("--text_encoder", str(gemma), "--text_cache_stage", stage))
        made.append(data)
    return Native(*made)


def items_of(data: training_parts.Data) -> dict[str, Item]:
    return {item.clip.stem: item for item in _items(data)}


def _items(data: training_parts.Data) -> list[Item]:
    return list(list_items(load_dataset_config(data.toml).datasets, data.mode, data.toml))


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {strip_key(key): value for key, value in load_file(path).items()}


def save(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def padded_left(features: Tensor) -> Tensor:
    """What the official trainer keeps: all tokens of its tokenizer, the padding first and of any value."""
    return torch.cat([torch.full((PADDED - features.shape[0], features.shape[1]), 7.0, dtype=features.dtype), features])


def write_tree(native: Native, root: Path, *, older: bool = False, widths: tuple[int, int] = (0, 0)) -> None:
    """A tree in the present form, or in the older one: tokens, `prompt_embeds`, and `condition_X` for `latent_X`."""
    for number, (stem, item) in enumerate(sorted(items_of(native.features).items())):
        name = f"latent_{number}.pt" if older else f"videos/{stem}.pt"
        latents = tensors_of(item.paths["latents"])["latents"]
        _, frames, height, width = latents.shape
        fps = 1.0 if item.clip.kind == "image" else item.clip.fps
        shown = patchify_video(latents[None])[0].contiguous() if older else latents
        save(root / "latents" / name, {"latents": shown, "num_frames": frames, "height": height, "width": width, "fps": fps})
        text = tensors_of(item.paths["text"])["text"]
        mask = torch.cat([torch.zeros(PADDED - len(text)), torch.ones(len(text))]).long()
        split = widths[0] or text.shape[1] // 2
        streams = {"video_prompt_embeds": padded_left(text[:, :split]), "audio_prompt_embeds": padded_left(text[:, split:])}
        value = {"prompt_embeds": padded_left(text[:, :split])} if older else streams
        save(root / "conditions" / name.replace("latent_", "condition_"), value | {"prompt_attention_mask": mask})
        if "audio" in item.paths:
            sound = tensors_of(item.paths["audio"])["audio_latents"]
            seconds = item.clip.end_seconds - item.clip.start_seconds
            entries = {"num_time_steps": sound.shape[1], "frequency_bins": 16, "duration": seconds}
            save(root / "audio_latents" / name, {"latents": sound} | entries)


def take_over(tree: Path, output: Path, data: training_parts.Data, *extra: str, mode: str = "av") -> training_parts.Data:
    argv = ["--precomputed_directory", str(tree), "--output_dir", str(output), "--ltxv2_model", str(data.model), "--ltx_mode", mode]
    assert ltxv2_import_precomputed.main([*argv, "--device", "cpu", *extra]) == 0
    return replace(data, folder=output, toml=output / "dataset.toml", mode=mode)


def widths_of(native: Native) -> tuple[int, int]:
    from musubi_tuner.ltxv2.text.pipeline import text_widths
    from musubi_tuner.ltxv2.transformer.load import read_config
    from musubi_tuner.ltxv2.weights import open_checkpoint

    return text_widths(read_config(open_checkpoint(native.contexts.model)), "av")


def test_a_tree_comes_back_as_the_caches_it_was_made_of(native, tmp_path) -> None:
    write_tree(native, tmp_path / "data" / ".precomputed", widths=widths_of(native))
    ours = items_of(native.contexts)
    taken = items_of(take_over(tmp_path / "data", tmp_path / "with contexts", native.contexts))
    assert taken.keys() == ours.keys() == {"clip_000", "clip_001", "still_000"}
    captions = [tensors_of(item.paths["text"])["text"].float() for item in ours.values()]
    difference = min((captions[0] - other).abs().mean() for other in captions[1:])
    for stem, item in taken.items():
        other = ours[stem]
        assert item.paths["latents"].name == other.paths["latents"].name
        assert load_file(item.paths["latents"]).keys() == load_file(other.paths["latents"]).keys()
        assert torch.equal(tensors_of(item.paths["latents"])["latents"], tensors_of(other.paths["latents"])["latents"])
        same = ("kind", "fps", "frames", "width", "height", "start_seconds", "end_seconds", "has_audio")
        assert [getattr(item.clip, name) for name in same] == [getattr(other.clip, name) for name in same]
        texts = [tensors_of(one.paths["text"]) for one in (item, other)]
        assert texts[0]["text"].shape == texts[1]["text"].shape and torch.equal(texts[0]["text_mask"], texts[1]["text_mask"])
        error = (texts[0]["text"].float() - texts[1]["text"].float()).abs().mean()
        assert error < 0.05 * difference, "features were rounded to bfloat16 on their way"
        if "audio" in item.paths:
            sounds = [tensors_of(one.paths["audio"]) for one in (item, other)]
            assert all(torch.equal(sounds[0][key], sounds[1][key]) for key in ("audio_latents", "audio_lengths"))
    features = items_of(take_over(tmp_path / "data" / ".precomputed", tmp_path / "with features", native.features, *FEATURES))
    for stem, item in features.items():
        other = items_of(native.features)[stem]
        texts = [tensors_of(one.paths["text"])["text"] for one in (item, other)]
        assert torch.equal(*texts), "real tokens alone, as they were"


def test_imports_are_trained_on_with_and_without_the_connectors(native, tmp_path) -> None:
    """With previews and dropped captions, whose prompts the import encodes."""
    (tmp_path / "prompts.txt").write_text("a whale --w 64 --h 32 --f 9 --s 1 --l 1", encoding="utf-8")
    write_tree(native, tmp_path / "tree", widths=widths_of(native))
    for name, extra, flags in (("a", (), ()), ("b", FEATURES, ("--train_connectors",))):
        encoder = ("--text_encoder", str(native.contexts.encoder))
        prompts = ("--sample_prompts", str(tmp_path / "prompts.txt"))
        taken = take_over(tmp_path / "tree", tmp_path / name, native.contexts, *extra, *encoder, *prompts)
        assert len(list((taken.folder / "cache" / "ltxv2_prompts").iterdir())) == 2, "the prompt and the empty one"
        flags = (*flags, *(prompts if name == "a" else encoder), "--sample_at_first", "--caption_dropout_rate", "0.5")
        argv = taken.arguments("--output_dir", str(tmp_path / f"out {name}"), "--max_train_steps", "3", *flags)
        assert ltxv2_train_network.main(argv) == 0
        losses = training_parts.losses(tmp_path / f"out {name}")
        assert sum("loss_audio" in row for row in losses) >= 2
    with pytest.raises(UserError, match="another stage"):
        ltxv2_train_network.main(taken.arguments("--output_dir", str(tmp_path / "wrong")))


def test_the_older_form_gives_the_same_batch(tiny_family, tmp_path) -> None:
    """Tokens in rows, and one stream of features for both: those of 2.0, whose projection is one."""
    native = make_native(tmp_path / "media", tiny_family.ltx20, tiny_family.gemma)
    write_tree(native, tmp_path / "older", older=True)
    taken = take_over(tmp_path / "older", tmp_path / "taken", native.features, *FEATURES)
    pairs = list(zip(_items(taken), [items_of(native.features)[stem] for stem in sorted(items_of(native.features))], strict=True))
    assert [item.clip.stem for item, _ in pairs] == ["latent_0", "latent_1", "latent_2"]
    rules = replace(draw_rules(Recipe()), text_features=True)
    for item, other in pairs:
        mine, theirs = (make_batch([Draw(one, 0, 0)], "av", rules) for one in (item, other))
        for name in ("latents", "audio_latents", "audio_lengths", "text", "text_mask", "fps"):
            one, two = getattr(mine, name), getattr(theirs, name)
            assert one is two is None or torch.equal(one, two), name


def test_a_second_import_keeps_what_is_right_and_mends_what_is_not(native, tmp_path) -> None:
    write_tree(native, tmp_path / "tree", widths=widths_of(native))
    take_over(tmp_path / "tree", tmp_path / "taken", native.contexts)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "taken").rglob("*.*")}
    path = tmp_path / "taken" / "cache" / "clip_000_00000-017_0064x0064_ltxv2.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    damaged = path.stat().st_mtime_ns
    text = tmp_path / "tree" / "conditions" / "videos" / "clip_001.pt"
    value = torch.load(text, weights_only=True)
    torch.save(value | {"prompt_attention_mask": torch.ones(PADDED)}, text)
    take_over(tmp_path / "tree", tmp_path / "taken", native.contexts)
    changed = {path.name for path, when in times.items() if path.stat().st_mtime_ns != when} - {RECORD_NAME}
    assert path.stat().st_mtime_ns != damaged and changed == {path.name, "clip_001_ltxv2_te.safetensors"}
    (tmp_path / "taken" / "dataset.toml").write_text("batch_size = 4", encoding="utf-8")
    with pytest.raises(UserError, match="says something else"):
        take_over(tmp_path / "tree", tmp_path / "taken", native.contexts)


class Harmful:
    """Unpickled the ordinary way, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_files_that_would_run_code_are_refused_by_name(native, tmp_path) -> None:
    write_tree(native, tmp_path / "tree", widths=widths_of(native))
    path = tmp_path / "tree" / "latents" / "videos" / "clip_000.pt"
    value = torch.load(path, weights_only=True)
    torch.save(value | {"extra": Harmful(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match=r"clip_000\.pt: torch\.load\(weights_only=True\) does not read it"):
        take_over(tmp_path / "tree", tmp_path / "taken", native.contexts)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the file was harmful indeed"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"clip_000\.pt: torch\.load"):
        take_over(tmp_path / "tree", tmp_path / "taken", native.contexts)


def test_references_masks_and_items_that_lack_files(native, tmp_path, caplog) -> None:
    """References of half the size; masks say what is given, ours what counts; what lacks a file is left out and listed."""
    caplog.set_level("INFO")
    tree = tmp_path / "tree"
    write_tree(native, tree, widths=widths_of(native))
    shown = torch.randn(128, 3, 1, 1)
    mask = torch.zeros(3, 2, 2)
    mask[:, 0] = 1
    for stem in ("clip_000", "still_000"):
        frames = 3 if stem == "clip_000" else 1
        reference = {"latents": shown[:, :frames], "num_frames": frames, "height": 1, "width": 1, "fps": 24.0}
        save(tree / "reference_latents" / "videos" / f"{stem}.pt", reference)
        save(tree / "video_masks" / "videos" / f"{stem}.pt", {"mask": mask[:frames]})
    (tree / "audio_masks").mkdir()
    text = tree / "conditions" / "videos" / "clip_000.pt"
    torch.save(torch.load(text, weights_only=True) | {"audio_prompt_embeds": None}, text)
    taken = take_over(tree, tmp_path / "taken", native.contexts, mode="video")
    assert "clip_001  has no file in reference_latents, video_masks" in caplog.text and "Import: 2 items, 1 left out" in caplog.text
    assert "audio_masks is left aside" in caplog.text
    items = items_of(taken)
    assert load_dataset_config(taken.toml).reference_factors == (2, 1) and items.keys() == {"clip_000", "still_000"}
    assert torch.equal(tensors_of(items["clip_000"].paths["reference"])["ref_latents"], shown.bfloat16())
    assert tensors_of(items["clip_000"].paths["mask"])["video_mask"].tolist() == [[[0, 0], [1, 1]]] * 3
    texts = [tensors_of(items_of(one)["clip_000"].paths["text"])["text"] for one in (taken, native.contexts)]
    assert torch.allclose(texts[0].float(), texts[1][:, : texts[0].shape[1]].float(), rtol=2**-6, atol=0.05), "without features for sound"
    recipe = str(RECIPES / "reference_video.toml")
    argv = taken.arguments("--output_dir", str(tmp_path / "out"), "--max_train_steps", "2", "--conditioning_config", recipe)
    assert ltxv2_train_network.main(argv) == 0
    save(tree / "video_masks" / "videos" / "clip_000.pt", {"mask": torch.ones(3, 2, 2)})
    with pytest.raises(UserError, match=r"clip_000\.pt: marks all of the clip as conditioning"):
        take_over(tree, tmp_path / "taken", native.contexts, mode="video")


def test_sound_alone_and_clips_without_sound(native, tmp_path) -> None:
    tree = tmp_path / "tree"
    write_tree(native, tree, widths=widths_of(native))
    alone = take_over(tree, tmp_path / "alone", native.contexts, mode="audio")
    assert [item.clip.kind for item in _items(alone)] == ["audio", "audio"]
    argv = alone.arguments("--output_dir", str(tmp_path / "out"), "--max_train_steps", "2")
    assert ltxv2_train_network.main(argv) == 0
    (tree / "audio_latents" / "videos" / "clip_001.pt").unlink()
    items = items_of(take_over(tree, tmp_path / "half", native.contexts))
    assert int(tensors_of(items["clip_001"].paths["audio"])["audio_lengths"]) == 0
    assert not items["clip_001"].clip.has_audio and items["clip_000"].clip.has_audio
    shutil.rmtree(tree / "audio_latents")
    with pytest.raises(UserError, match="has no folder 'audio_latents'.*--ltx_mode video"):
        take_over(tree, tmp_path / "none", native.contexts)


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("conditions", {"video_prompt_embeds": torch.zeros(PADDED, 10)}, r"features of width 10 .*another model"),
        ("conditions", {"prompt_attention_mask": torch.zeros(PADDED)}, "has no real token"),
        ("conditions", {"prompt_attention_mask": torch.ones(3)}, r"found \(48, .*and \(3,\)"),
        ("conditions", {"audio_prompt_embeds": None}, "has no 'audio_prompt_embeds'"),
        ("latents", {"fps": None}, "tells no 'fps'.*--source_fps"),
        ("latents", {"latents": torch.zeros(16, 3, 2, 2)}, r"latents of shape \(16, 3, 2, 2\)"),
        ("latents", {"latents": torch.zeros(7, 128)}, "7 tokens are not num_frames x height x width = 3 x 2 x 2"),
        ("latents", {"latents": torch.full((128, 3, 2, 2), float("nan"))}, "NaN"),
        ("audio_latents", {"latents": torch.zeros(4, 128)}, r"latents of shape \(4, 128\)"),
        ("latents", {"latents": 3}, "a dict with a tensor 'latents' is expected"),
    ],
)
def test_files_of_another_form_are_named(native, tmp_path, folder, change, message) -> None:
    write_tree(native, tmp_path / "tree", widths=widths_of(native))
    path = tmp_path / "tree" / folder / "videos" / "clip_000.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(UserError, match=message) as raised:
        take_over(tmp_path / "tree", tmp_path / "taken", native.contexts)
    assert "clip_000" in str(raised.value)


def test_what_is_no_tree_is_said(native, tmp_path) -> None:
    with pytest.raises(UserError, match="prompts are not in the tree; give --text_encoder"):
        take_over(tmp_path, tmp_path / "taken", native.contexts, "--sample_prompts", "prompts.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither 'latents' nor 'audio_latents'"):
        take_over(tmp_path / "empty", tmp_path / "taken", native.contexts)
    write_tree(native, tmp_path / "tree", widths=widths_of(native))
    source = tmp_path / "tree" / "latents" / "videos" / "clip_000.pt"
    for name in ("x/y_z.pt", "x_y/z.pt"):
        for folder in ("latents", "conditions"):
            save(tmp_path / "tree" / folder / name, torch.load(source, weights_only=True))
    with pytest.raises(UserError, match="would have the same name, 'x_y_z'"):
        take_over(tmp_path / "tree", tmp_path / "taken", native.contexts)
