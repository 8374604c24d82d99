"""Keys, merging, batches and their order."""

from bisect import bisect
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from musubi_tuner.cache import store
from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.names import strip_key
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.conditioning.recipe import Clean, Recipe, SoundPrefix
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.draws import DrawRules, draw_item
from musubi_tuner.dataset.items import BatchPlan, Draw, Item, largest_items
from musubi_tuner.dataset.merge import merge_sources
from musubi_tuner.flow.schedule import mu_for_tokens
from musubi_tuner.flow.sigma import STRATA, SigmaSettings, stretched
from musubi_tuner.runtime.errors import UserError

RULES = DrawRules(
    seed=1,
    purpose="train",
    sigma=SigmaSettings(kind="shifted_logit_normal"),
    independent_audio_timestep=True,
    video_loss_weight=1.0,
    audio_loss_weight=1.0,
)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("latents_7x2x3_bfloat16", "latents"), ("audio_latents_51x1x1_float16", "audio_latents"),
        ("audio_latents_51x16x8_bfloat16", "audio_latents"), ("audio_lengths_int32", "audio_lengths"),
        ("text_float8_e4m3fn", "text"), ("text_mask", "text_mask"), ("t5_mask", "t5_mask"), ("video_loss_mask", "video_loss_mask"),
    ],
)  # fmt: skip
def test_keys_are_stripped(key, name):
    assert strip_key(key) == name


def spec(folder: Path, **values: object) -> DatasetSpec:
    base = DatasetSpec(label="datasets[0]", kind="video", directory=folder, jsonl_file=None, cache_directory=folder, target_frames=(9,))
    return replace(base, **values)


def make_item(folder: Path, name: str, *, steps: int | None = 10, frames: int = 9, fps: float = 24.0, **values: object) -> Item:
    """Cache files of one item; `steps` of None means a still, 0 a clip without sound."""
    generator = torch.Generator().manual_seed(len(name) + (steps or 0))
    cells = (frames - 1) // 8 + 1
    kinds = ("latents", "text") if steps is None else ("latents", "audio", "text")
    paths = {kind: folder / f"{name}{KINDS[kind].ending}" for kind in kinds}
    store.write(paths["latents"], KINDS["latents"].pack(torch.randn(128, cells, 2, 3, generator=generator).bfloat16()), {})
    if steps is not None:
        store.write(paths["audio"], KINDS["audio"].pack(torch.randn(8, steps, 16, generator=generator).bfloat16()), {})
    text = torch.randn(16, 12, generator=generator).bfloat16()
    store.write(paths["text"], KINDS["text"].pack(text, torch.ones(16, dtype=torch.bool)), {})
    clip = Clip(
        key=name, kind="video", source=f"{name}.mp4", stem=name, source_fingerprint="0", start_seconds=0, end_seconds=frames / fps, fps=fps,
        start_frame=0, frames=frames, width=96, height=64, original_width=96, original_height=64, has_audio=bool(steps),
        sidecars={kind: Sidecar(file=path.name) for kind, path in paths.items()},
    )  # fmt: skip
    return Item(key=f"datasets[0]/{name}", spec=spec(folder, **values), clip=clip, paths=paths, has_sound=bool(steps))


def draws(*items: Item, epoch: int = 0) -> list[Draw]:
    return [Draw(item, epoch, 0) for item in items]


def test_merged_sources_have_exactly_the_keys_of_the_mode(tmp_path):
    item = make_item(tmp_path, "clip")
    assert set(merge_sources(list(item.paths.values()))) == {"latents", "audio_latents", "audio_lengths", "text", "text_mask"}
    assert set(merge_sources([item.paths["latents"], item.paths["text"]])) == {"latents", "text", "text_mask"}


def test_two_keys_of_one_name_are_an_error(tmp_path):
    store.write(tmp_path / "a", {"latents_1x1x1_float32": torch.ones(1), "latents_1x1x1_bfloat16": torch.ones(1)}, {})
    with pytest.raises(UserError, match="are both 'latents'"):
        merge_sources([tmp_path / "a"])


def test_legacy_text_keys_are_read(tmp_path):
    store.write(tmp_path / "a", {"t5_bfloat16": torch.ones(2, 3), "t5_mask": torch.ones(2)}, {})
    assert set(merge_sources([tmp_path / "a"])) == {"text", "text_mask"}


def test_sound_is_padded_and_keeps_its_place_in_the_batch(tmp_path):
    items = [make_item(tmp_path, "none", steps=0), make_item(tmp_path, "long", steps=10), make_item(tmp_path, "still", steps=None)]
    batch = make_batch(draws(*items, make_item(tmp_path, "short", steps=7)), "av", RULES)
    assert batch.audio_lengths.tolist() == [0, 10, 0, 7] and batch.audio_padded
    assert batch.audio_latents.shape == (4, 8, 10, 16)
    assert torch.equal(batch.audio_latents[1], merge_sources(list(items[1].paths.values()))["audio_latents"])
    assert not bool(batch.audio_latents[0].any()) and not bool(batch.audio_latents[3, :, 7:].any())
    assert batch.latents.shape == (4, 128, 2, 2, 3) and batch.text_mask is None


def test_padding_is_clean_where_all_of_an_items_audio_is(tmp_path):
    """Else a stream that is wholly given would be noised at its padding, and would not count as clean (`Modality.sigma`)."""
    items = [make_item(tmp_path, "long", steps=12), make_item(tmp_path, "short", steps=7)]
    whole = make_batch(draws(*items), "av", replace(RULES, recipe=Recipe(audio=(Clean(),)))).conditions.audio.clean
    assert whole.shape == (2, 12) and bool(whole.all())
    part = make_batch(draws(*items), "av", replace(RULES, recipe=Recipe(audio=(SoundPrefix(seconds=(0.04, 0.04)),)))).conditions.audio.clean
    assert part.sum(1).tolist() == [1, 1]


def test_a_batch_without_any_sound_has_no_audio_stream(tmp_path):
    batch = make_batch(draws(make_item(tmp_path, "none", steps=0)), "av", RULES)
    assert batch.audio_latents is None and batch.audio_lengths.tolist() == [0]


def test_an_items_draws_do_not_depend_on_its_batch(tmp_path):
    one, other = make_item(tmp_path, "one", steps=7), make_item(tmp_path, "other", steps=10)
    alone, both = make_batch(draws(one), "av", RULES), make_batch(draws(other, one), "av", RULES)
    assert torch.equal(alone.video_noise[0], both.video_noise[1])
    assert torch.equal(alone.audio_noise[0], both.audio_noise[1, :7])
    assert (alone.video_sigma[0], alone.audio_sigma[0]) == (both.video_sigma[1], both.audio_sigma[1])
    assert alone.video_sigma[0] != make_batch(draws(one, epoch=1), "av", RULES).video_sigma[0]


def test_noise_levels_of_sound_are_apart_or_together(tmp_path):
    item = make_item(tmp_path, "one")
    together = replace(RULES, independent_audio_timestep=False)
    apart = torch.tensor(
        [
            [make_batch(draws(item, epoch=e), "av", RULES).video_sigma[0], make_batch(draws(item, epoch=e), "av", RULES).audio_sigma[0]]
            for e in range(300)
        ]
    )
    assert abs(float(torch.corrcoef(apart.T)[0, 1])) < 0.15
    batch = make_batch(draws(item), "av", together)
    assert torch.equal(batch.video_sigma, batch.audio_sigma)
    weighted = make_batch(draws(item), "av", replace(together, weighting_scheme="cosmap"))
    assert torch.equal(weighted.video_weight, weighted.audio_weight), "the mean is over the video's levels, which the sound takes"


def strata_of(item: Item, rules: DrawRules, turns: int) -> list[tuple[int, int]]:
    """Of picture and sound, turn by turn; by quantiles of what the sampler draws at this length."""
    found = []
    for turn in range(turns):
        epoch, repeat = divmod(turn, item.spec.num_repeats)
        drawn = draw_item(Draw(item, epoch, repeat), torch.empty(1, 128, 2, 2, 3), 10, rules)
        edges = [
            [stretched(NormalDist().inv_cdf(place / STRATA), mu_for_tokens(tokens)) for place in range(1, STRATA)] for tokens in (12, 10)
        ]
        found.append((bisect(edges[0], drawn.video_sigma), bisect(edges[1], drawn.audio_sigma)))
    return found


def test_strata_are_visited_in_turn_by_each_item_and_all_at_once_by_many(tmp_path):
    """Were items in step, an epoch of many clips would have an eighth of the levels; were streams, picture and sound would share one."""
    rules = replace(RULES, sigma=SigmaSettings(kind="stratified"))
    item = make_item(tmp_path, "one", num_repeats=2)
    items = [replace(item, key=f"datasets[0]/{number}") for number in range(60)]
    by_item = [strata_of(one, rules, 2 * STRATA) for one in items]
    for turns in by_item:
        for cycle in (turns[:STRATA], turns[STRATA:]):
            assert sorted(video for video, _ in cycle) == sorted(audio for _, audio in cycle) == [*range(STRATA)]
    assert by_item[0][:STRATA] != by_item[0][STRATA:]
    first = torch.tensor([turns[0] for turns in by_item])
    assert all(len(set(first[:, stream].tolist())) == STRATA for stream in (0, 1))
    assert abs(float(torch.corrcoef(first.T.float())[0, 1])) < 0.3


def test_missing_key_names_item_and_program(tmp_path):
    item = make_item(tmp_path, "one")
    store.write(item.paths["text"], {"other": torch.ones(1)}, {})
    with pytest.raises(UserError, match=r"datasets\[0\]/one: no 'text'.*ltxv2_cache_text_encoder_outputs.py"):
        make_batch(draws(item), "av", RULES)


def test_loss_weights_of_the_dataset_win(tmp_path):
    plain, weighted = make_item(tmp_path, "a"), make_item(tmp_path, "b", video_loss_weight=0.5, audio_loss_weight=0.0)
    batch = make_batch(draws(plain, weighted), "av", replace(RULES, audio_loss_weight=2.0))
    assert batch.video_weight.tolist() == [1.0, 0.5] and batch.audio_weight.tolist() == [2.0, 0.0]
    assert (batch.audio_expected, batch.audio_supervised) == (1, 1), "sound that weighs nothing is neither expected nor trained"


def test_an_epoch_covers_every_item_as_often_as_it_repeats_and_batches_stack(tmp_path):
    items = [make_item(tmp_path, f"s{i}", batch_size=3, num_repeats=2) for i in range(5)]
    items += [make_item(tmp_path, f"l{i}", frames=17, batch_size=3, num_repeats=2) for i in range(4)]
    plan = BatchPlan(items, seed=3)
    epoch = [plan.batch(i) for i in range(plan.batches_per_epoch)]
    seen = [draw.item.key for batch in epoch for draw in batch]
    assert sorted(seen) == sorted(2 * [item.key for item in items])
    assert all(len({draw.item.bucket for draw in batch}) == 1 for batch in epoch)
    for batch in epoch:
        make_batch(batch, "av", RULES)
    again = [BatchPlan(items, seed=3).batch(i) for i in range(plan.batches_per_epoch)]
    assert epoch == again
    assert epoch != [plan.batch(plan.batches_per_epoch + i) for i in range(plan.batches_per_epoch)], "the next epoch has another order"


def test_a_noise_offset_is_one_number_a_channel(tmp_path):
    """As for pictures: the mean of each channel is moved, all tokens alike; 0 is the run without it."""
    item = make_item(tmp_path, "long", steps=12, frames=17)
    plain, moved, off = (make_batch(draws(item), "av", replace(RULES, noise_offset=offset)) for offset in (0.0, 0.5, 0.0))
    difference = moved.video_noise - plain.video_noise
    assert torch.allclose(difference, difference[:, :1].expand_as(difference), atol=1e-6)
    assert 0.3 < float(difference[0, 0].std()) < 0.7, "128 draws of deviation 0.5"
    assert torch.equal(off.video_noise, plain.video_noise) and torch.equal(moved.audio_noise, plain.audio_noise)
    assert torch.equal(moved.video_sigma, plain.video_sigma)


def test_a_batch_that_is_largest_by_its_text_or_its_attention_is_tried_too(tmp_path):
    """Each clip of a batch has its own text: many small ones take more of it than one long clip."""

    def item(name: str, frames: int, width: int, clips: int, *, seconds: float = 0.0) -> Item:
        one = make_item(tmp_path, name, steps=round(25 * seconds), batch_size=clips)
        return replace(one, clip=replace(one.clip, frames=frames, width=width, height=256, end_seconds=seconds))

    clip, stills, few = item("clip", 49, 768, 1, seconds=2), item("stills", 1, 256, 16), item("few", 1, 256, 8)
    assert largest_items([few, stills, clip], "av") == (clip, stills)
    long = item("long", 49, 320, 4)
    assert largest_items([clip, long, few], "av") == (long, clip, few), "attention of the clip, and text of the few"
    assert largest_items([clip, long], "video") == (long, clip)
    assert largest_items([item("sound", 9, 256, 1, seconds=9), clip], "av", widths=(4096, 2048)) == (clip,)
    assert largest_items([clip, replace(clip, key="like it")], "av") == (clip,)
