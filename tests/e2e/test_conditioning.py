"""Recipes from end to end: each trains on the tiny checkpoint, and a preview builds what training builds."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_train_network
from musubi_tuner.conditioning import recipe as rules
from musubi_tuner.conditioning.recipe import Recipe, load_recipe
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.draws import DrawRules
from musubi_tuner.dataset.items import Draw, Item, list_items
from musubi_tuner.flow.sigma import SigmaSettings
from musubi_tuner.generation.denoise import SampleInputs, generate
from musubi_tuner.generation.encode import ConditioningEncoders, encode_conditioning
from musubi_tuner.generation.sampling import make_plan
from musubi_tuner.ltxv2.transformer.modality import Modality
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.prompts.sample_prompts import load_prompts
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clips, write_stills
from musubi_tuner.training import preflight
from tests import engine_parts, preview_parts, training_parts

RECIPES = Path(__file__).resolve().parent.parent.parent / "conditioning_recipes"
READY = sorted(path.stem for path in RECIPES.glob("*.toml") if not path.stem.startswith("reference"))
TOML = """
[general]
resolution = [96, 64]

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [17]
keyframes = "every 8"

[[datasets]]
image_directory = "stills"
cache_directory = "stills cache"
"""
# Recipes of references need data of their own: test_references, test_reference_sound.
SIZE = "--w 96 --h 64 --f 17"


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory) -> training_parts.Data:
    """Clips with sound, and a still beside them."""
    folder = tmp_path_factory.mktemp("bedingt ü")
    write_clips(folder / "clips", count=2, frames=25)
    write_stills(folder / "stills", count=1)
    (folder / "dataset.toml").write_text(TOML, encoding="utf-8")
    made = training_parts.Data(folder, folder / "dataset.toml", tiny_family.ltx23, "av", tiny_family.gemma)
    training_parts.cache(made)
    return made


@pytest.fixture(scope="module")
def wrapper(tiny_family) -> OfficialLTXV2Wrapper:
    return preview_parts.load_wrapper(tiny_family.ltx23)


def train(data: training_parts.Data, output: Path, *extra: str) -> dict[str, torch.Tensor]:
    assert ltxv2_train_network.main(data.arguments("--output_dir", str(output), "--save_precision", "float32", *extra)) == 0
    return load_file(output / "ltxv2_lora.safetensors")


def test_there_is_a_recipe_for_each_intent():
    assert set(READY) >= {
        "text_to_video_sound", "image_to_video", "extend_video", "inpaint", "outpaint", "keyframes", "keyframes_in_place", "audio_to_video",
        "video_to_audio", "extend_sound",
    }  # fmt: skip


@pytest.mark.parametrize("name", READY)
def test_each_ready_recipe_trains_on_clips_and_stills(data, tmp_path, name):
    path = RECIPES / f"{name}.toml"
    recipe = load_recipe(path)
    assert name == "text_to_video_sound" or recipe.video or recipe.audio
    assert train(data, tmp_path, "--conditioning_config", str(path), "--max_train_steps", "3")
    rows = [row for row in training_parts.losses(tmp_path) if "grad_norm" in row]
    assert len(rows) == 3 and all(row["grad_norm"] >= 0 for row in rows)
    assert "ltxv2_conditioning" in open_checkpoint(tmp_path / "ltxv2_lora.safetensors").metadata


def test_a_resumed_run_with_a_recipe_is_the_run_it_would_have_been(data, tmp_path):
    path = tmp_path / "recipe.toml"
    text = "[[video]]\nrule='prefix'\nprobability=0.5\nlatent_frames=[1, 2]\n[[audio]]\nrule='clean'\nprobability=0.5\n"
    path.write_text(text, encoding="utf-8")
    flags = ["--conditioning_config", str(path), "--max_train_steps", "4", "--save_state", "--save_every_n_steps", "2"]
    whole = train(data, tmp_path / "whole", *flags)
    resumed = train(data, tmp_path / "again", *flags, "--resume", str(tmp_path / "whole" / "ltxv2_lora-step00000002-state"))
    assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[name]) for name, value in whole.items())
    plain = train(data, tmp_path / "plain", "--max_train_steps", "4")
    assert not all(torch.equal(value, plain[name]) for name, value in whole.items())


def test_a_recipe_that_is_edited_during_a_run_is_in_the_metadata_as_it_was_trained(data, tmp_path, monkeypatch):
    path = tmp_path / "recipe.toml"
    path.write_text("[[video]]\nrule = 'prefix'\nprobability = 0.25\n", encoding="utf-8")
    before = load_recipe(path).describe()
    check = preflight.check_inputs

    def check_and_edit(config: TrainingConfig) -> preflight.RunInputs:
        inputs = check(config)
        path.write_text("[[video]]\nrule = 'crop'\n", encoding="utf-8")
        return inputs

    monkeypatch.setattr(preflight, "check_inputs", check_and_edit)
    train(data, tmp_path, "--conditioning_config", str(path), "--max_train_steps", "1", "--save_every_n_steps", "1", "--save_state")
    assert json.loads(open_checkpoint(tmp_path / "ltxv2_lora.safetensors").metadata["ltxv2_conditioning"]) == before
    assert load_recipe(path).describe() != before


def draw_rules(recipe: Recipe, seed: int = 1) -> DrawRules:
    return DrawRules(
        seed=seed, purpose="train", sigma=SigmaSettings(kind="uniform"), independent_audio_timestep=True, video_loss_weight=1.0,
        audio_loss_weight=1.0, recipe=recipe,
    )  # fmt: skip


def clips_of(data: training_parts.Data) -> list[Item]:
    items = list_items(load_dataset_config(data.toml).datasets, "av", data.toml)
    return [item for item in items if item.clip.kind == "video"]


def test_an_item_is_given_the_same_in_any_batch_and_anew_in_each_epoch(data):
    recipe = Recipe(
        video=(rules.FirstFrame(probability=0.5), rules.Box(probability=0.5), rules.Clean(probability=0.3)),
        audio=(rules.SoundGap(probability=0.5), rules.Clean(probability=0.3)),
    )
    items, patterns = clips_of(data), set()
    for epoch in range(6):
        draws = [Draw(item, epoch, 0) for item in items]
        together = make_batch(draws, "av", draw_rules(recipe)).conditions
        for row, draw in enumerate(draws):
            alone = make_batch([draw], "av", draw_rules(recipe)).conditions
            assert torch.equal(alone.video.clean[0], together.video.clean[row])
            assert torch.equal(alone.audio.clean[0], together.audio.clean[row])
            patterns.add(tuple(together.video.clean[row].tolist()))
    assert len(patterns) > 4


@dataclass(frozen=True)
class Case:
    """A recipe, and the prompt flags that give the same."""

    recipe: Recipe
    flags: str
    exact: bool = True
    """Whether the values are the same too; else only their places."""


CASES = {
    "first frame": Case(Recipe(video=(rules.FirstFrame(),)), "--i {picture}"),
    "prefix": Case(Recipe(video=(rules.Prefix(latent_frames=(2, 2)),)), "--iv {clip} --vt 0.4-"),
    "suffix": Case(Recipe(video=(rules.Suffix(latent_frames=(1, 1)),)), "--iv {clip} --vt -0.37"),
    "last frame": Case(Recipe(video=(rules.KeyframesBeside(at=("last",)),)), "--ei {last}"),
    "keyframes": Case(Recipe(video=(rules.KeyframesBeside(at=("first", "interior")),)), "--k 0={picture};8={middle}"),
    "first frame and keyframe": Case(
        Recipe(video=(rules.FirstFrame(), rules.KeyframesBeside(at=("last",)))), "--i {picture} --k 16={last}"
    ),
    "keyframes in place": Case(Recipe(video=(rules.Keyframes(at=("first", "interior")),)), "--kp 0={picture};5={picture}", exact=False),
    "box": Case(Recipe(video=(rules.Box(size=(0.01, 0.01), duration=(0.3, 0.3)),)), "--iv {clip} --box {area} --vt {span}"),
    "crop": Case(Recipe(video=(rules.Crop(size=(0.3, 0.3)),)), "--iv {clip} --crop {area}", exact=False),
    "video to audio": Case(Recipe(video=(rules.Clean(),)), "--iv {clip}"),
    "audio to video": Case(Recipe(audio=(rules.Clean(),)), "--a {clip}"),
    "sound prefix": Case(Recipe(audio=(rules.SoundPrefix(seconds=(0.2, 0.2)),)), "--a {clip} --at 0.17-"),
    "sound suffix": Case(Recipe(audio=(rules.SoundSuffix(seconds=(0.2, 0.2)),)), "--a {clip} --at -0.48"),
    "several at once": Case(
        Recipe(video=(rules.FirstFrame(),), audio=(rules.Clean(),)), "--i {picture} --a {clip}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_preview_builds_the_inputs_that_training_builds(data, wrapper, tiny_family, tmp_path, name):
    """Spied on the real transformer's inputs, at noise level 1 and with the same noise."""
    case, item = CASES[name], clips_of(data)[0]
    batch = make_batch([Draw(item, 0, 0)], "av", draw_rules(case.recipe))
    clip = data.folder / "clips" / item.clip.source
    pictures = {name: write_frame(clip, tmp_path, frame).as_posix() for name, frame in (("picture", 0), ("middle", 8), ("last", 16))}
    flags = case.flags.format(clip=clip.as_posix(), area=area_of(batch), span=span_of(batch), **pictures)
    (tmp_path / "prompts.txt").write_text(f"a disc {SIZE} --fr {item.clip.fps} {flags}\n", encoding="utf-8")
    prompt = load_prompts(tmp_path / "prompts.txt")[0]
    plan = make_plan(preview_parts.options(), prompt, mode="av", version="2.3", num_layers=wrapper.config.num_layers)
    checkpoint = open_checkpoint(tiny_family.ltx23)
    conditioning = encode_conditioning(
        prompt, plan.streams, ConditioningEncoders(checkpoint, checkpoint, torch.device("cpu"), still_crf=None)
    )
    context = preview_parts.context(wrapper)
    seen = spy(
        wrapper,
        lambda: generate(wrapper, SampleInputs(prompt=prompt, plan=plan, positive=context, negative=context, conditioning=conditioning)),
    )
    noise = {"video_noise": seen[0].latent, "audio_noise": seen[1].latent}
    at_one = replace(batch, text=context.text, text_mask=None, video_sigma=torch.ones(1), audio_sigma=torch.ones(1), **noise)
    trained = spy(wrapper, lambda: training_parts.item_losses(wrapper, at_one))
    for ours, theirs in zip(seen, trained, strict=True):
        assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.sigma, theirs.sigma)
        assert torch.equal(ours.positions, theirs.positions)
        assert (ours.keyframe_marker is None) == (theirs.keyframe_marker is None)
        assert ours.keyframe_marker is None or torch.equal(ours.keyframe_marker, theirs.keyframe_marker)
        assert ours.latent.shape == theirs.latent.shape
        if case.exact:
            assert torch.allclose(ours.latent, theirs.latent, rtol=2**-7, atol=2e-2), "within the cache's bfloat16"
    assert any(bool((one.timesteps == 0).any()) for one in seen)


def spy(wrapper: OfficialLTXV2Wrapper, run) -> tuple[Modality, Modality]:
    with engine_parts.watched(wrapper.transformer) as seen:
        run()
    return seen[0].video, seen[0].audio


def write_frame(clip: Path, folder: Path, number: int) -> Path:
    from musubi_tuner.media.probe import probe_video
    from musubi_tuner.media.video import read_frames
    from musubi_tuner.media.write import write_image

    info = probe_video(clip)
    path = folder / f"frame {number}.png"
    write_image(path, read_frames(info, [number], info.width, info.height)[0])
    return path


def area_of(batch: Batch) -> str:
    """The one cell that is drawn in space, as the prompt flag's pixels; the whole frame where none is."""
    if batch.conditions.video.clean is None or bool(batch.conditions.video.clean.all()):
        return ""
    clean = batch.conditions.video.clean.reshape(3, 2, 3)
    odd = clean.any(0) if clean.float().mean() < 0.5 else ~clean.all(0)
    row, column = odd.nonzero()[0].tolist()
    return f"{column * 32},{row * 32},32,32"


def span_of(batch: Batch) -> str:
    if batch.conditions.video.clean is None or bool(batch.conditions.video.clean.all()):
        return ""
    noisy = (~batch.conditions.video.clean.reshape(3, 6)).any(1).nonzero()[0].item()
    start, end = max(0, 8 * noisy - 7), 8 * noisy + 1
    return f"{(start + 0.5) / 24}-{(end - 0.5) / 24}"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--iv {clip} --a {clip}", ("nothing is left to be generated",)),
        ("--iv {clip} --f 97 --vt 3.5-", ("has 25 frames at 24 fps",)),
        ("--a {clip} --f 97", ("--a", "4.01 s are needed")),
        ("--iv {clip} --vt 0-", ("--vt leaves nothing",)),
        ("--a {clip} --at 0-", ("--at leaves nothing",)),
        ("--f 1 --a {clip}", ("--a is given, but this sample has no sound",)),
    ],
)
def test_files_that_do_not_fit_are_named_before_training(data, wrapper, tiny_family, tmp_path, flags, parts):
    clip = data.folder / "clips" / clips_of(data)[0].clip.source
    size = SIZE.replace(" --f 17", "") if "--f " in flags else SIZE
    (tmp_path / "prompts.txt").write_text(f"a disc {size} {flags.format(clip=clip.as_posix())}\n", encoding="utf-8")
    prompt = load_prompts(tmp_path / "prompts.txt")[0]
    plan = make_plan(preview_parts.options(), prompt, mode="av", version="2.3", num_layers=2)
    checkpoint = open_checkpoint(tiny_family.ltx23)
    with pytest.raises(UserError) as caught:
        encode_conditioning(prompt, plan.streams, ConditioningEncoders(checkpoint, checkpoint, torch.device("cpu"), still_crf=None))
    for part in ("prompts.txt, line 1", *parts):
        assert part in str(caught.value)
