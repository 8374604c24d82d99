"""Each rule: which cells it gives, that they reach the model clean without loss or gradient, and that nothing else changes them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from musubi_tuner.conditioning import recipe as rules
from musubi_tuner.conditioning.apply import condition
from musubi_tuner.conditioning.conditions import Conditions, KeyframeLatents, Reference, StreamConditions
from musubi_tuner.conditioning.draw import ItemConditions, draw_conditions
from musubi_tuner.conditioning.recipe import ItemShape, Recipe, load_recipe, make_recipe
from musubi_tuner.conditioning.tokens import audio_stream, loss_weights, noised, video_stream
from musubi_tuner.config.conditioning import ConditioningOptions
from musubi_tuner.config.validation import options
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.objective import masked_mean, squared_error
from tests import engine_parts
from tests import preview_parts as parts

SHAPE = ItemShape(video=(5, 4, 6), audio_steps=40)
IN_PLACE = [[2, 3], [1, 4], [3], [3], [3, 4], [1, 2], [1, 3], [1, 2, 3]]
"""Latent frames that the in-place rule of earlier versions drew in `test_keyframes_in_place_keep_their_draws_and_their_name`."""


def drawn(recipe: Recipe, seed: int = 0, shape: ItemShape = SHAPE) -> ItemConditions:
    return draw_conditions(recipe, shape, lambda *names: generator_for(seed, *names))


def frames_of(cells: torch.Tensor) -> list[bool]:
    """Latent frames that are given as a whole; asserts that none is given in part."""
    flat = cells.flatten(1)
    assert torch.equal(flat.all(1), flat.any(1))
    return flat.all(1).tolist()


def runs(values: list[bool]) -> list[tuple[bool, int]]:
    found: list[tuple[bool, int]] = []
    for value in values:
        found = [*found[:-1], (value, found[-1][1] + 1)] if found and found[-1][0] == value else [*found, (value, 1)]
    return found


def test_first_frame_gives_the_first_latent_frame():
    assert frames_of(drawn(Recipe(video=(rules.FirstFrame(),))).video_clean) == [True, False, False, False, False]


@pytest.mark.parametrize("seed", range(8))
def test_prefix_and_suffix_are_as_long_as_asked_and_leave_one_frame(seed):
    beginning = runs(frames_of(drawn(Recipe(video=(rules.Prefix(latent_frames=(2, 3)),)), seed).video_clean))
    assert [value for value, _ in beginning] == [True, False] and beginning[0][1] in (2, 3)
    end = runs(frames_of(drawn(Recipe(video=(rules.Suffix(latent_frames=(9, 9)),)), seed).video_clean))
    assert end == [(False, 1), (True, 4)]


def test_both_lengths_of_a_range_are_drawn():
    recipe = Recipe(video=(rules.Prefix(latent_frames=(1, 3)),))
    assert {sum(frames_of(drawn(recipe, seed).video_clean)) for seed in range(30)} == {1, 2, 3}


@pytest.mark.parametrize(
    ("at", "count", "expected"),
    [(("first", "last"), 1, {0, 4}), (("last",), 1, {4}), (("interior",), 3, {1, 2, 3}), (("first", "interior", "last"), 1, None)],
)
def test_keyframes(at, count, expected):
    cells = drawn(Recipe(video=(rules.Keyframes(at=at, count=(count, count)),))).video_clean
    found = {place for place, given in enumerate(frames_of(cells)) if given}
    assert found == expected if expected is not None else (len(found) == 3 and {0, 4} < found)


def test_random_keyframes_lie_anywhere():
    recipe = Recipe(video=(rules.Keyframes(at=("random",), count=(2, 2)),))
    found = [tuple(place for place, given in enumerate(frames_of(drawn(recipe, seed).video_clean)) if given) for seed in range(60)]
    assert {len(places) for places in found} == {2}
    assert len(set(found)) >= 9, "of ten pairs of five frames"


WITH_KEYFRAMES = ItemShape(video=(5, 4, 6), audio_steps=40, keyframes=(0, 4, 8, 17, 32))


@pytest.mark.parametrize(
    ("at", "count", "expected"),
    [
        (("first", "last"), (1, 1), {(0, 32)}),
        (("interior",), (1, 1), {(4,), (8,), (17,)}),
        (("last", "interior"), (9, 9), {(4, 8, 17, 32)}),
        (("first", "random"), (1, 2), None),
    ],
)
def test_keyframes_beside_the_clip_are_drawn_from_those_that_are_cached(at, count, expected):
    rule = rules.KeyframesBeside(at=at, count=count)
    found = {drawn(Recipe(video=(rule,)), seed, WITH_KEYFRAMES).keyframes for seed in range(80)}
    assert expected is None or found == expected
    assert all(0 in frames and set(frames) <= {0, 4, 8, 17, 32} for frames in found) or expected is not None
    assert max(map(len, found)) == rule.most(WITH_KEYFRAMES.keyframes, 32)
    assert drawn(Recipe(video=(rule,)), 0, WITH_KEYFRAMES).video_clean is None, "the clip's own cells stay as they are"


def test_keyframes_beside_the_clip_are_shown_to_their_share_of_items_and_never_beside_a_given_video():
    rule = rules.KeyframesBeside(probability=0.5)
    found = [bool(drawn(Recipe(video=(rule,)), seed, WITH_KEYFRAMES).keyframes) for seed in range(400)]
    assert 0.44 < sum(found) / 400 < 0.56
    assert not drawn(Recipe(video=(rules.KeyframesBeside(), rules.Clean())), 0, WITH_KEYFRAMES).keyframes
    assert not drawn(Recipe(video=(rules.KeyframesBeside(),)), 0, SHAPE).keyframes, "none are cached"
    most = Recipe(video=(rules.KeyframesBeside(probability=0.1, at=("random",), count=(1, 3)), rules.FirstFrame(probability=0.1)))
    assert {len(drawn(most.with_most_keyframes(), seed, WITH_KEYFRAMES).keyframes) for seed in range(20)} == {3}
    assert most.with_most_keyframes().video[1] == most.video[1]


def test_what_a_rule_asks_for_and_the_cache_lacks():
    rule = rules.KeyframesBeside(at=("first", "last", "interior", "random"))
    assert rule.lacking((0, 8), 8) == ["interior"] and rule.lacking((), 8) == ["first", "last", "interior", "random"]
    assert rule.lacking((0, 3, 8), 8) == []


def test_keyframes_in_place_keep_their_draws_and_their_name(tmp_path: Path):
    """Of runs before there were keyframes beside the clip: resuming them, and what their metadata say."""
    path = tmp_path / "recipe.toml"
    settings = "at=['interior', 'random']\ncount=[1, 2]\n"
    path.write_text(f"[[video]]\nrule='keyframes_in_place'\n{settings}", encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.describe()["video"] == [{"rule": "Keyframes", "probability": 1.0, "at": ["interior", "random"], "count": [1, 2]}]
    found = [frames_of(drawn(recipe, seed).video_clean) for seed in range(len(IN_PLACE))]
    assert [[place for place, given in enumerate(one) if given] for one in found] == IN_PLACE
    path.write_text(f"[[video]]\nrule='keyframes'\n{settings}", encoding="utf-8")
    assert load_recipe(path).describe()["video"][0]["rule"] == "KeyframesBeside"


@pytest.mark.parametrize("seed", range(6))
def test_crop_gives_one_rectangle_of_every_frame(seed):
    cells = drawn(Recipe(video=(rules.Crop(size=(0.5, 0.5)),)), seed).video_clean
    assert all(torch.equal(frame, cells[0]) for frame in cells)
    rows, columns = cells[0].any(1), cells[0].any(0)
    assert (int(rows.sum()), int(columns.sum())) == (2, 3)
    assert torch.equal(cells[0], rows[:, None] & columns[None])


@pytest.mark.parametrize("seed", range(6))
def test_box_generates_one_rectangle_for_a_part_of_the_clip(seed):
    cells = ~drawn(Recipe(video=(rules.Box(size=(0.5, 0.5), duration=(0.4, 0.4)),)), seed).video_clean
    times, rows, columns = cells.any(2).any(1), cells.any(2).any(0), cells.any(1).any(0)
    assert (int(times.sum()), int(rows.sum()), int(columns.sum())) == (2, 2, 3)
    assert torch.equal(cells, times[:, None, None] & rows[None, :, None] & columns[None, None])
    assert len(runs(times.tolist())) <= 3


@pytest.mark.parametrize("seed", range(6))
def test_sound_rules(seed):
    before = drawn(Recipe(audio=(rules.SoundPrefix(seconds=(0.4, 0.4)),)), seed).audio_clean
    assert runs(before.tolist()) == [(True, 10), (False, 30)]
    behind = drawn(Recipe(audio=(rules.SoundSuffix(seconds=(0.4, 0.4)),)), seed).audio_clean
    assert runs(behind.tolist()) == [(False, 30), (True, 10)]
    gap = runs(drawn(Recipe(audio=(rules.SoundGap(seconds=(0.4, 0.4)),)), seed).audio_clean.tolist())
    assert (False, 10) in gap and sum(length for given, length in gap if given) == 30
    longest = drawn(Recipe(audio=(rules.SoundPrefix(seconds=(9.0, 9.0)),)), seed).audio_clean
    assert runs(longest.tolist()) == [(True, 39), (False, 1)]


def test_one_stream_is_given_and_never_both():
    recipe = Recipe(video=(rules.Clean(probability=0.5),), audio=(rules.Clean(probability=0.4),))
    seen = [(bool(one.video_clean.all()), bool(one.audio_clean.all())) for one in (drawn(recipe, seed) for seed in range(300))]
    assert (True, True) not in seen
    assert 0.4 < sum(video for video, _ in seen) / 300 < 0.6 and 0.3 < sum(audio for _, audio in seen) / 300 < 0.5
    silent = ItemShape(video=(5, 4, 6), audio_steps=0)
    assert not any(bool(drawn(recipe, seed, silent).video_clean.any()) for seed in range(20)), "nothing would be left to generate"


def test_a_rule_that_leaves_nothing_is_passed_over():
    still = ItemShape(video=(1, 4, 6), audio_steps=0)
    for rule in (rules.FirstFrame(), rules.Prefix(), rules.Suffix(), rules.Keyframes(), rules.Crop(size=(1.0, 1.0))):
        assert not drawn(Recipe(video=(rule,)), shape=still).video_clean.any()
    both = Recipe(video=(rules.Prefix(latent_frames=(4, 4)), rules.Suffix(latent_frames=(4, 4))))
    assert runs(frames_of(drawn(both).video_clean)) == [(True, 4), (False, 1)]


def test_a_rule_that_leaves_only_what_the_mask_gives_no_weight_is_passed_over():
    mask = torch.zeros(5, 4, 6)
    mask[:, 1, 2] = 0.2
    box, masked = rules.Box(size=(0.2, 0.3)), replace(SHAPE, mask=mask)
    found = [drawn(Recipe(video=(box,)), seed, masked).video_clean for seed in range(40)]
    assert all(bool((mask * ~cells).any()) for cells in found)
    assert 0 < sum(bool(cells.any()) for cells in found) < 40, "boxes that hold what is learned are kept, all others skipped"
    by_mask = Recipe(video=(box, rules.Mask(probability=0.5)))
    assert all(bool(drawn(by_mask, seed, masked).video_clean.any()) for seed in range(8)), "a mask that is a rule weighs no loss"


def test_probability_is_the_share_of_items_and_rules_are_drawn_apart():
    alone = Recipe(video=(rules.FirstFrame(probability=0.5),))
    joined = Recipe(video=(rules.Suffix(probability=0.5), rules.FirstFrame(probability=0.5)))
    first = [bool(drawn(alone, seed).video_clean[0].all()) for seed in range(400)]
    assert 0.44 < sum(first) / 400 < 0.56
    with_more = [bool(drawn(joined, seed).video_clean[0].all()) for seed in range(400)]
    assert sum(a != b for a, b in zip(first, with_more, strict=True)) < 60, "a further rule does not redraw the others"


def clean_cells(seed: int = 3) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    return Conditions(
        video=StreamConditions(clean=torch.rand(2, 24, generator=generator) < 0.5),
        audio=StreamConditions(clean=torch.rand(2, 12, generator=generator) < 0.5),
    )


def streams() -> dict:
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(2, 128, 3, 2, 4, generator=generator)
    audio = torch.randn(2, 8, 12, 16, generator=generator)
    return {"video": video_stream(video, torch.tensor([24.0, 16.0])), "audio": audio_stream(audio, None)}


def test_clean_tokens_reach_the_model_unchanged_at_level_zero_without_loss_or_gradient(tiny_family):
    """What the real transformer is given, and what its loss pulls at."""
    wrapper = parts.load_wrapper(tiny_family.ltx23)
    plain, given, conditions = streams(), condition(streams(), clean_cells()), clean_cells()
    sigma = torch.tensor([0.7, 0.2])
    inputs = {name: noised(stream, torch.randn(stream.clean.shape), sigma) for name, stream in given.items()}
    text = torch.randn(2, 16, wrapper.config.video_context_width + wrapper.config.audio_context_width)
    with engine_parts.watched(wrapper.transformer) as seen:
        velocity = wrapper(inputs["video"][0], inputs["audio"][0], text)
    for name, modality, predicted in zip(("video", "audio"), (seen[0].video, seen[0].audio), velocity, strict=True):
        clean = getattr(conditions, name).clean
        assert torch.equal(modality.latent[clean], plain[name].clean[clean])
        assert bool((modality.timesteps[clean] == 0).all()) and torch.equal(
            modality.timesteps[~clean], sigma[:, None].expand_as(clean)[~clean]
        )
        assert torch.equal(modality.positions, plain[name].positions)
        assert torch.equal(modality.sigma, sigma), "the stream is still noisy"
        held = predicted.detach().requires_grad_()
        weight = loss_weights(given[name])
        masked_mean(squared_error(held, inputs[name][1]), weight).sum().backward()
        assert not held.grad[clean].any() and bool(held.grad[~clean].any(-1).all())
        error = (held.detach()[0] - inputs[name][1][0]).pow(2)[~clean[0]].mean()
        assert torch.allclose(masked_mean(squared_error(held, inputs[name][1]), weight)[0], error, atol=1e-5)


def test_a_stream_that_is_wholly_given_has_noise_level_zero_itself():
    everything = Conditions(audio=StreamConditions(clean=torch.tensor([[True] * 12, [False] * 12])))
    stream = condition(streams(), everything)["audio"]
    modality, target = noised(stream, torch.randn(2, 12, 128), torch.tensor([0.7, 0.2]))
    assert modality.sigma.tolist() == pytest.approx([0.0, 0.2])
    assert masked_mean(squared_error(torch.randn_like(target), target), loss_weights(stream))[0] == 0


def test_weights_of_a_stream_and_of_its_conditions_multiply():
    weight = torch.rand(2, 24)
    stream = condition(streams(), Conditions(video=StreamConditions(weight=weight, clean=clean_cells().video.clean)))["video"]
    assert torch.equal(loss_weights(stream), weight * ~clean_cells().video.clean)


def test_the_keyframe_marker_stays_on_the_first_frame_of_the_target():
    reference = Reference(latents=torch.randn(2, 128, 3, 1, 2), fps=torch.tensor([24.0, 16.0]), spatial_factor=2)
    for conditions in (clean_cells(), Conditions(video=StreamConditions(reference=reference))):
        marker = condition(streams(), conditions)["video"].keyframe_marker
        assert marker[:, :8].all() and not marker[:, 8:].any()


def test_a_reference_is_behind_the_target_clean_at_its_own_positions():
    latents = torch.randn(2, 128, 3, 1, 2)
    reference = Reference(latents=latents, fps=torch.tensor([24.0, 16.0]), spatial_factor=2, chosen=torch.tensor([True, False]))
    stream = condition(streams(), Conditions(video=StreamConditions(reference=reference)))["video"]
    modality, target = noised(stream, torch.randn(2, 24, 128), torch.tensor([0.7, 0.2]))
    assert modality.latent.shape == target.shape == (2, 30, 128)
    assert torch.equal(modality.latent[:, 24:], geometry.patchify_video(latents))
    assert not modality.timesteps[:, 24:].any() and not loss_weights(stream)[:, 24:].any()
    assert loss_weights(stream)[:, :24].all()
    assert modality.token_mask[0].all() and modality.token_mask[1].tolist() == [True] * 24 + [False] * 6
    for cell, (frame, row, column) in enumerate((f, 0, c) for f in range(3) for c in range(2)):
        start, end = max(0, 8 * frame - 7), 8 * frame + 1
        expected = [[start / 16, end / 16], [row * 64, row * 64 + 64], [column * 64, column * 64 + 64]]
        assert torch.allclose(modality.positions[1, :, 24 + cell], torch.tensor(expected))


def test_keyframes_are_behind_the_clip_clean_at_the_time_of_their_frames():
    latents = torch.randn(2, 128, 2, 2, 4)
    frames, real = torch.tensor([[0, 12], [7, 0]]), torch.tensor([[True, True], [True, False]])
    keyframes = KeyframeLatents(latents=latents, frames=frames, fps=torch.tensor([24.0, 16.0]), real=real)
    stream = condition(streams(), Conditions(video=StreamConditions(keyframes=keyframes)))["video"]
    modality, target = noised(stream, torch.randn(2, 24, 128), torch.tensor([0.7, 0.2]))
    assert modality.latent.shape == target.shape == (2, 24 + 16, 128)
    assert torch.equal(modality.latent[:, 24:], geometry.patchify_video(latents))
    assert not modality.timesteps[:, 24:].any() and not loss_weights(stream)[:, 24:].any() and loss_weights(stream)[:, :24].all()
    assert modality.token_mask.tolist() == [[True] * 40, [True] * 32 + [False] * 8]
    assert modality.keyframe_marker[:, :8].all() and not modality.keyframe_marker[:, 8:].any()
    assert torch.equal(modality.positions[:, 1:, 24:32], modality.positions[:, 1:, :8]), "the places of the clip's own cells"
    for item, place, start, end in ((0, 24, 0, 1 / 24), (0, 39, 12 / 24, 13 / 24), (1, 24, 7 / 16, 8 / 16)):
        assert modality.positions[item, 0, place].tolist() == pytest.approx([start, end])
    everyone = condition(streams(), Conditions(video=StreamConditions(keyframes=replace(keyframes, real=None))))["video"]
    assert everyone.token_mask is None


def test_reference_positions_cover_the_targets_span():
    """A reference of half the size covers the same pixels; one of a third of the frames the same seconds."""
    fps = torch.tensor([24.0])
    target = geometry.video_positions(3, 4, 4, fps)
    small = geometry.reference_positions(3, 2, 2, fps, spatial_factor=2, temporal_factor=1)
    assert torch.equal(small.amax(dim=(2, 3)), target.amax(dim=(2, 3)))
    slow = geometry.reference_positions(2, 4, 4, fps, spatial_factor=1, temporal_factor=3)[0, 0]
    assert torch.allclose(slow[0] * 24, torch.tensor([0.0, 1.0])), "the first frames are the same"
    assert torch.allclose(slow[-1] * 24, torch.tensor([1.0, 25.0])), "frames 1 to 8 of it are frames 1 to 24"
    same = geometry.reference_positions(3, 4, 4, fps, spatial_factor=1, temporal_factor=1)
    assert torch.equal(same, target)


def test_reference_sound_is_masked_where_it_is_padded():
    reference = Reference(latents=torch.randn(2, 8, 5, 16), lengths=torch.tensor([5, 3]))
    stream = condition(streams(), Conditions(audio=StreamConditions(reference=reference)))["audio"]
    assert stream.clean.shape == (2, 17, 128) and stream.token_mask[1].tolist() == [True] * 15 + [False] * 2
    assert torch.equal(stream.positions[:, :, 12:], geometry.audio_positions(5, 2))


@pytest.mark.parametrize(
    ("text", "parts_of_message"),
    [
        ("[[vidoe]]\nrule='prefix'\n", ("unknown section 'vidoe'", "Did you mean 'video'")),
        ("[video]\nrule='prefix'\n", ("must be written [[video]]",)),
        ("[[video]]\nrule='prefx'\n", ("rule = 'prefx'", "Did you mean 'prefix'")),
        ("[[audio]]\nrule='box'\n", ("rule = 'box'", "prefix, suffix, gap, clean, reference")),
        ("[[video]]\nrule='prefix'\nlatentframes=2\n", ("unknown key 'latentframes'", "Did you mean 'latent_frames'")),
        ("[[video]]\nrule='prefix'\nprobability=1.5\n", ("probability = 1.5", "from 0 to 1")),
        ("[[video]]\nrule='prefix'\nlatent_frames=[3,1]\n", ("must have the lowest first: [1, 3]",)),
        ("[[video]]\nrule='prefix'\nlatent_frames=1.5\n", ("a whole number of at least 1",)),
        ("[[video]]\nrule='suffix'\nlatent_frames=100000000000000000000\n", ("must be at most 1000000000",)),
        ("[[video]]\nrule='prefix'\nprobability=true\n", ("probability = True", "from 0 to 1")),
        ("[[video]]\nrule='keyframes'\nat=[]\n", ("first, last, interior, random",)),
        ("[[video]]\nrule='keyframes'\nat=['middle']\n", ("first, last, interior, random",)),
        ("[[video]]\nrule='prefix'\n[[video]]\nrule='prefix'\n", ("'prefix' twice",)),
        ("[[video]]\nrule='clean'\n[[audio]]\nrule='clean'\nprobability=0.5\n", ("1.5 together",)),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe_are_named(tmp_path: Path, text, parts_of_message):
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    for part in ("recipe.toml", *parts_of_message):
        assert part in str(caught.value)


def test_a_recipe_must_fit_the_mode(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("[[audio]]\nrule='prefix'\nseconds=[1, 2]\n", encoding="utf-8")
    flags = ConditioningOptions(conditioning_config=path)
    assert make_recipe(flags, "audio").audio == (rules.SoundPrefix(seconds=(1, 2)),)
    with pytest.raises(UserError, match="--ltx_mode video does not train"):
        make_recipe(flags, "video")
    path.write_text("[[video]]\nrule='clean'\n", encoding="utf-8")
    with pytest.raises(UserError, match="Give --ltx_mode av"):
        make_recipe(flags, "video")


def test_numbers_are_quoted_in_metadata_as_they_were_written(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("[[video]]\nrule='crop'\nprobability=1\nsize=[0.3, 1]\n[[audio]]\nrule='prefix'\nseconds=2\n", encoding="utf-8")
    assert json.dumps(load_recipe(path).describe()) == (
        '{"video": [{"rule": "Crop", "probability": 1, "size": [0.3, 1]}], '
        '"audio": [{"rule": "SoundPrefix", "probability": 1.0, "seconds": [2, 2]}]}'
    )


def test_the_short_flag_is_a_rule_of_the_recipe(tmp_path: Path):
    assert make_recipe(ConditioningOptions(first_frame_conditioning_p=0.5), "av").video == (rules.FirstFrame(probability=0.5),)
    with pytest.raises(ValueError, match="between 0 and 1"):
        make_recipe(ConditioningOptions(first_frame_conditioning_p=2.0), "av")
    path = tmp_path / "recipe.toml"
    path.write_text("[[video]]\nrule='first_frame'\n", encoding="utf-8")
    with pytest.raises(UserError, match="keep one"):
        make_recipe(ConditioningOptions(conditioning_config=path, first_frame_conditioning_p=0.5), "av")


@options
class EveryOther(rules.CellRule):
    """Every second latent frame is conditioning."""

    def cells(self, shape: tuple[int, ...], generator: torch.Generator, item: ItemShape) -> torch.Tensor:
        inside = torch.zeros(shape, dtype=torch.bool)
        inside[::2] = True
        return inside


def test_a_rule_of_ones_own(tmp_path: Path, monkeypatch):
    """A class and its name in a table: the recipe reader, the draw and the model's input know the rule."""
    monkeypatch.setitem(rules.VIDEO_RULES, "every_other", EveryOther)
    path = tmp_path / "recipe.toml"
    path.write_text("[[video]]\nrule='every_other'\n", encoding="utf-8")
    cells = drawn(load_recipe(path), shape=ItemShape(video=(3, 2, 4), audio_steps=0)).video_clean
    assert frames_of(cells) == [True, False, True]
    given = Conditions(video=StreamConditions(clean=cells.flatten()[None].expand(2, -1)))
    modality, _ = noised(condition(streams(), given)["video"], torch.randn(2, 24, 128), torch.tensor([0.7, 0.2]))
    assert (modality.timesteps[0] == 0).tolist() == [True] * 8 + [False] * 8 + [True] * 8
