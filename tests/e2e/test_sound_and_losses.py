"""Balance, strict sound, losses, dropped captions, optimizers and noise levels through the real program."""

import dataclasses
import json
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from musubi_tuner import ltxv2_train_network
from musubi_tuner.cache import store
from musubi_tuner.cache.names import prompt_path
from musubi_tuner.cache.store import read_metadata
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.captions import CaptionDropout
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.draws import DrawRules
from musubi_tuner.dataset.items import Draw, list_items
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import processes
from musubi_tuner.tiny.clips import write_clip
from musubi_tuner.training import objective
from musubi_tuner.training.objective import BatchObjective, ItemLosses, Objective, Prediction
from musubi_tuner.training.preflight import check_inputs
from musubi_tuner.training.setup import draw_rules
from tests import training_parts as parts


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("data"), tiny_family, "av", held_out=False)


def run(data, output, *extra: str) -> dict[str, torch.Tensor]:
    assert ltxv2_train_network.main(data.arguments("--output_dir", str(output), "--save_precision", "float32", *extra)) == 0
    return load_file(output / "ltxv2_lora.safetensors")


def test_a_balanced_run_is_logged_and_resumes_bit_for_bit(data, tmp_path):
    flags = ["--audio_balance", "ema", "--audio_supervision_mode", "error", "--audio_supervision_warmup_steps", "1"]
    whole = run(data, tmp_path / "whole", *flags, "--max_train_steps", "6")
    halves = tmp_path / "halves"
    run(data, halves, *flags, "--max_train_steps", "6", "--save_state", "--save_every_n_steps", "3")
    (halves / "ltxv2_lora.safetensors").unlink()
    resumed = run(data, halves, *flags, "--max_train_steps", "6", "--resume", str(halves / "ltxv2_lora-step00000003-state"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = parts.losses(tmp_path / "whole")
    assert [row["audio_balance"] for row in rows] == [row["audio_balance"] for row in parts.losses(halves)]
    assert rows[0]["audio_balance"] == 1, "nothing was heard before"
    for row in rows[1:]:
        assert 0.05 <= row["audio_balance"] <= 20
        assert row["loss_audio_scaled"] == pytest.approx(row["audio_balance"] * row["loss_audio"])
    assert rows[-1]["audio_balance"] != rows[1]["audio_balance"]
    plain = run(data, tmp_path / "plain", "--max_train_steps", "6")
    assert not any("loss_audio_scaled" in row for row in parts.losses(tmp_path / "plain"))
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


def test_held_out_noise_is_that_of_any_sampler(data, tmp_path):
    """So held-out losses of runs compare that draw noise levels in other ways."""
    noises = []
    for sampling in ("shifted_logit_normal", "uniform"):
        inputs = check_inputs(
            ltxv2_train_network.parse_arguments(data.arguments("--output_dir", str(tmp_path), "--timestep_sampling", sampling))
        )
        of = {
            purpose: make_batch([Draw(inputs.items[0], epoch=0, repeat=0)], "av", draw_rules(inputs, purpose, 0))
            for purpose in ("train", "validation")
        }
        noises.append({purpose: (batch.video_noise, batch.audio_noise) for purpose, batch in of.items()})
    first, second = noises
    assert all(torch.equal(*pair) for pair in zip(first["validation"], second["validation"], strict=True))
    assert not torch.equal(first["train"][0], second["train"][0])


def test_the_balance_takes_the_place_of_the_flag_and_leaves_other_weights(data, tmp_path):
    """Datasets whose audio weighs nothing stay out; weights of datasets and of noise levels count beside it."""
    flags = ("--audio_balance", "ema", "--audio_loss_weight", "3", "--max_train_steps", "1")
    argv = data.arguments("--output_dir", str(tmp_path), *flags)
    config = ltxv2_train_network.parse_arguments(argv)
    with processes() as group:
        built, inputs = parts.build(config, group)
        batch = make_batch([Draw(inputs.items[0], epoch=0, repeat=0)], "av", built.rules)

        silent = dataclasses.replace(batch, audio_weight=torch.zeros(1))

        def gradients(objective: BatchObjective, batch: Batch) -> torch.Tensor:
            built.optimizer.zero_grad(set_to_none=False)
            objective.backward(batch)
            return torch.cat([parameter.grad.flatten() for parameter in built.network.parameters()])

        heard = gradients(built.objective, batch)
        assert torch.equal(gradients(built.objective, silent), gradients(dataclasses.replace(built.objective, balance=None), silent))
        assert not torch.equal(gradients(built.objective, silent), heard)
        assert batch.audio_weight.tolist() == [1.0]
        louder = dataclasses.replace(batch, audio_weight=torch.full((1,), 5.0))
        of_video = gradients(built.objective, silent)
        torch.testing.assert_close(gradients(built.objective, louder) - of_video, 5 * (heard - of_video), atol=1e-4, rtol=1e-3)


def test_strict_sound_stops_a_run_that_is_half_silent(data, tiny_family, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(data.folder / "clips", folder / "clips")
    (folder / "mute").mkdir()
    for number in range(3):
        write_clip(folder / "mute" / f"mute_{number}.mp4", torch.randint(0, 255, (25, 64, 96, 3), dtype=torch.uint8))
        (folder / "mute" / f"mute_{number}.txt").write_text("noise", encoding="utf-8")
    toml = folder / "dataset.toml"
    toml.write_text(
        parts.TOML.format(batch_size=1).split("[[validation_datasets]]")[0]
        + '[[datasets]]\nvideo_directory = "mute"\ncache_directory = "mute cache"\n',
        encoding="utf-8",
    )
    half = parts.Data(folder, toml, data.model, "av", data.encoder)
    parts.cache(half)
    flags = ["--max_train_steps", "12", "--audio_supervision_warmup_steps", "6"]
    with pytest.raises(UserError, match="items that should have sound had it.*audio_supervision_min_ratio is 0.9"):
        run(half, tmp_path / "out", *flags, "--audio_supervision_mode", "error")
    run(half, tmp_path / "out", *flags, "--audio_supervision_mode", "error", "--audio_supervision_min_ratio", "0.2", "--overwrite")
    rows = parts.losses(tmp_path / "out")
    assert {row["audio_supervised"] for row in rows} == {0.0, 1.0}, "each item keeps its own supervision"


def test_losses_noise_levels_and_weights_train_and_are_recorded(data, tmp_path, caplog):
    flags = ["--loss_type", "huber", "--huber_delta", "0.5", "--weighting_scheme", "cosmap", "--timestep_sampling", "stratified"]
    flags += ["--timestep_args", "shift=1.5", "std=0.8", "--min_timestep", "100", "--max_timestep", "900", "--noise_offset", "0.1"]
    ours = run(data, tmp_path, *flags, "--max_train_steps", "2")
    plain = run(data, tmp_path / "plain", "--max_train_steps", "2")
    assert any(not torch.equal(ours[name], plain[name]) for name in plain)
    with safe_open(tmp_path / "ltxv2_lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ltxv2_loss_type"] == "huber" and json.loads(metadata["ltxv2_timestep_args"]) == ["shift=1.5", "std=0.8"]
    with pytest.raises(UserError, match="--timestep_args shft=1: unknown to --timestep_sampling shifted.*known are eps, shift"):
        run(data, tmp_path, "--timestep_args", "shft=1")


@pytest.mark.parametrize("optimizer", ["Lion", "CAME", "AdamWScheduleFree", "ProdigyPlusScheduleFree"])
def test_optimizers_resume_bit_for_bit(data, tmp_path, optimizer):
    flags = ["--optimizer_type", optimizer, "--max_train_steps", "4", "--lr_warmup_steps", "0.25"]
    whole = run(data, tmp_path / "whole", *flags)
    halves = tmp_path / "halves"
    run(data, halves, *flags, "--save_state", "--save_every_n_steps", "2")
    (halves / "ltxv2_lora.safetensors").unlink()
    resumed = run(data, halves, *flags, "--resume", str(halves / "ltxv2_lora-step00000002-state"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_dropped_captions_are_the_empty_prompt_by_stream(data):
    config = load_dataset_config(data.toml)
    items = list_items(config.datasets, "av", data.toml)
    empty = prompt_path(config.datasets[0].cache_directory, "")
    blank = load_file(empty)["text_bfloat16"]
    rules = DrawRules(seed=0, purpose="train", independent_audio_timestep=True, video_loss_weight=1.0, audio_loss_weight=1.0)
    kept = make_batch([Draw(items[0], 0, 0)], "av", rules).text[0]
    width = 128

    def text(**shares: float) -> torch.Tensor:
        dropped = CaptionDropout(**{"both": 0.0, "video": 0.0, "audio": 0.0} | shares, empty=empty, video_width=width)
        return make_batch([Draw(items[0], 0, 0)], "av", dataclasses.replace(rules, dropped=dropped)).text[0]

    assert torch.equal(text(), kept) and torch.equal(text(both=1.0), blank) and not torch.equal(kept, blank)
    video, audio = text(video=1.0), text(audio=1.0)
    assert torch.equal(video[:, :width], blank[:, :width]) and torch.equal(video[:, width:], kept[:, width:])
    assert torch.equal(audio[:, :width], kept[:, :width]) and torch.equal(audio[:, width:], blank[:, width:])
    dropped = CaptionDropout(both=0.3, video=0.0, audio=0.0, empty=empty, video_width=width)
    rules = dataclasses.replace(rules, dropped=dropped)
    share = sum(torch.equal(make_batch([Draw(items[0], epoch, 0)], "av", rules).text[0], blank) for epoch in range(100)) / 100
    assert 0.15 < share < 0.45


def test_a_dataset_has_a_rate_of_its_own(data, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(data.folder, folder)
    copy = dataclasses.replace(data, folder=folder, toml=folder / "dataset.toml")
    text = copy.toml.read_text(encoding="utf-8")
    copy.toml.write_text(f"{text}\ncaption_dropout_rate = 1.0\n", encoding="utf-8")
    dropped = run(copy, tmp_path / "dropped", "--max_train_steps", "2")
    everywhere = run(data, tmp_path / "everywhere", "--max_train_steps", "2", "--caption_dropout_rate", "1")
    plain = run(data, tmp_path / "plain", "--max_train_steps", "2")
    assert all(torch.equal(dropped[name], everywhere[name]) for name in plain)
    assert any(not torch.equal(dropped[name], plain[name]) for name in plain)
    copy.toml.write_text(f"{text}\ncaption_dropout_rate = 1.5\n", encoding="utf-8")
    with pytest.raises(UserError, match="caption_dropout_rate = 1.5: must be a share between 0 and 1"):
        run(copy, tmp_path / "refused")


def test_a_dropped_caption_takes_its_mask_along(tmp_path):
    empty = tmp_path / "empty"
    store.write(empty, {"text_float32": torch.zeros(4, 3), "text_mask": torch.tensor([True, False, False, False])}, {})
    caption = {"text": torch.ones(4, 3), "text_mask": torch.tensor([True, True, True, False])}
    for shares in ({"both": 1.0, "video": 0.0}, {"both": 0.0, "video": 1.0}):  # one stream of text, as T5 gives it
        dropped = CaptionDropout(**shares, audio=0.0, empty=empty, video_width=3)
        found = dropped.apply(caption, torch.Generator(), None)
        assert not found["text"].any() and found["text_mask"].tolist() == [True, False, False, False]


def test_dropping_captions_needs_the_empty_prompt(data, tmp_path):
    run(data, tmp_path, "--caption_dropout_rate", "0.5", "--max_train_steps", "2")
    folder = tmp_path / "copy"
    shutil.copytree(data.folder, folder)
    copy = parts.Data(folder, folder / "dataset.toml", data.model, "av", data.encoder)
    empty = prompt_path(folder / "cache", "")
    store.write(empty, parts.read_tensors(empty), read_metadata(empty) | {"widths": "128"})
    with pytest.raises(UserError, match="(?s)cached with --ltx_mode video.*ltxv2_cache_text_encoder_outputs.py"):
        run(copy, tmp_path / "b", "--caption_dropout_rate", "0.5")
    empty.unlink()
    with pytest.raises(UserError, match="(?s)the empty prompt is not cached.*missing.*ltxv2_cache_text_encoder_outputs.py"):
        run(copy, tmp_path / "b", "--caption_dropout_rate", "0.5")


@dataclasses.dataclass(frozen=True)
class Watching:
    """An objective whose prediction can be looked for."""

    inner: Objective
    seen: list[weakref.ref] = dataclasses.field(default_factory=list)

    def predict(self, batch: Batch) -> Prediction:
        prediction = self.inner.predict(batch)
        self.seen.append(weakref.ref(prediction.velocity.video))
        return prediction

    def loss(self, prediction: Prediction) -> ItemLosses:
        return self.inner.loss(prediction)


def test_nothing_but_the_losses_holds_the_prediction_while_it_is_differentiated(data, tmp_path, monkeypatch):
    """A second copy of it would be kept through the backward pass of the largest batch."""
    config = ltxv2_train_network.parse_arguments(data.arguments("--output_dir", str(tmp_path)))
    with processes() as group:
        built, inputs = parts.build(config, group)
        watching, alive, backward = Watching(built.objective.objective), [], objective._backward
        monkeypatch.setattr(objective, "_backward", lambda loss: alive.append(watching.seen[0]() is not None) or backward(loss))
        batch = make_batch([Draw(inputs.items[0], epoch=0, repeat=0)], "av", built.rules)
        dataclasses.replace(built.objective, objective=watching).backward(batch)
    assert alive == [False]
