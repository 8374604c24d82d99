"""The base model as teacher: sound of items without any, datasets that are kept as they were, the prompt of `--dop_prompt`; averages."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_cache_text_encoder_outputs, ltxv2_train_network
from musubi_tuner.cache.names import prompt_path
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.draws import DrawRules
from musubi_tuner.dataset.items import Draw, list_items
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper, create_network
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clip, write_clips, write_stills
from musubi_tuner.training.objective import total_loss
from musubi_tuner.training.optimizer import WeightAverage
from musubi_tuner.training.preservation import PromptPreservation, Teacher
from tests import training_parts as parts
from tests.e2e.test_processes import launch
from tests.model_parts import predict_latents

CLASS_PROMPT = "a disc"
TOML = """
[general]
resolution = [96, 64]
target_frames = [9]

[[datasets]]
video_directory = "clips"
cache_directory = "cache"

[[datasets]]
image_directory = "stills"
cache_directory = "stills cache"

[[datasets]]
video_directory = "mute"
cache_directory = "mute cache"
batch_size = 2
preserve_base = {preserve}
"""
RULES = DrawRules(
    seed=0, purpose="train", independent_audio_timestep=True, video_loss_weight=1.0, audio_loss_weight=1.0, audio_dop_weight=0.5
)


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    """Clips with sound, stills, and clips without sound."""
    folder = tmp_path_factory.mktemp("data")
    write_clips(folder / "clips", count=2, frames=9)
    write_stills(folder / "stills", count=1)
    (folder / "mute").mkdir()
    for number in range(2):
        write_clip(folder / "mute" / f"{number}.mp4", torch.randint(0, 255, (9, 64, 96, 3), dtype=torch.uint8))
        (folder / "mute" / f"{number}.txt").write_text("noise", encoding="utf-8")
    (folder / "dataset.toml").write_text(TOML.format(preserve="false"), encoding="utf-8")
    (folder / "prior.toml").write_text(TOML.format(preserve="true"), encoding="utf-8")
    data = parts.Data(folder, folder / "dataset.toml", tiny_family.ltx23, "av", tiny_family.gemma)
    parts.cache(data, text=("--text_encoder", str(tiny_family.gemma), "--dop_prompt", CLASS_PROMPT))
    return data


def items_of(data, toml="dataset.toml"):
    path = data.folder / toml
    items = list_items(load_dataset_config(path).datasets, "av", path)
    return {
        kind: [item for item in items if item.spec.label == f"datasets[{place}]"] for place, kind in enumerate(("clips", "stills", "mute"))
    }


def batch_of(items, rules=RULES):
    return make_batch([Draw(item, epoch=0, repeat=0) for item in items], "av", rules)


@pytest.fixture(scope="module")
def models(data):
    """Adapted model with something learned, its network, and the base model loaded apart."""
    plain = load_transformer(open_checkpoint(data.model), mode="av", device="cpu", dtype=torch.float32)
    adapted = load_transformer(open_checkpoint(data.model), mode="av", device="cpu", dtype=torch.float32)
    network = create_network(adapted, dim=4, alpha=4, args={"rank_dropout": "0"}, seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters().items():
        if name.endswith("lora_B"):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return OfficialLTXV2Wrapper(adapted, "flowmatch_1_1000"), network, OfficialLTXV2Wrapper(plain, "flowmatch_1_1000")


def losses_of(wrapper, network, batch):
    teacher = Teacher(wrapper, network)
    batch = teacher.imagine_audio(batch)
    losses = parts.item_losses(wrapper, batch, teacher=teacher)
    return batch, losses


def test_items_without_sound_keep_the_base_models(data, models):
    wrapper, network, plain = models
    items = items_of(data)
    for chosen, steps in ((items["stills"], 25), (items["mute"], 25)):
        batch, losses = losses_of(wrapper, network, batch_of(chosen))
        assert batch.audio_latents.shape[2] == steps and batch.audio_supervised == 0
        assert not losses.audio_present.any() and not losses.audio.any(), "it is no sound that was supervised"
        # the sound is what the base model alone expects of pure noise, and the target its prediction at the item's own levels
        noise = batch.audio_noise.transpose(1, 2).unflatten(1, (8, 16)).transpose(2, 3)
        _, velocity = predict_latents(plain, None, torch.tensor(1000.0), batch.text, audio_latents=noise)
        torch.testing.assert_close(
            batch.audio_latents.float(), (noise - velocity).to(batch.audio_latents.dtype).float(), atol=1e-5, rtol=1e-2
        )
        level, video_level = batch.audio_sigma[:, None, None, None], batch.video_sigma[:, None, None, None, None]
        shown = (1 - level) * batch.audio_latents.float() + level * noise
        video_noise = batch.video_noise.transpose(1, 2).unflatten(2, batch.latents.shape[2:])
        video = (1 - video_level) * batch.latents.float() + video_level * video_noise
        given = dict(
            timesteps=1 + 999 * batch.video_sigma, text=batch.text, fps=batch.fps, audio_latents=shown,
            audio_timesteps=1 + 999 * batch.audio_sigma,
        )  # fmt: skip
        with torch.no_grad():
            ours, theirs = predict_latents(wrapper, video, **given)[1], predict_latents(plain, video, **given)[1]
        expected = 0.5 * (ours - theirs).pow(2).flatten(1).mean(1)
        assert expected.min() > 1e-6
        torch.testing.assert_close(losses.preserved, expected, atol=1e-6, rtol=1e-3)


def test_sound_learns_from_stills_only_where_it_is_asked_for(data, models):
    wrapper, network, _ = models
    stills = items_of(data)["stills"]
    audio = [p for name, p in network.named_parameters().items() if ".audio_attn" in name]
    for rules, learns in ((RULES, True), (dataclasses.replace(RULES, audio_dop_weight=0.0), False)):
        batch, losses = losses_of(wrapper, network, batch_of(stills, rules))
        total_loss(losses, batch.video_weight, batch.audio_weight).backward()
        found = [p.grad for p in audio if p.grad is not None]
        assert all(bool(torch.isfinite(grad).all()) for grad in found)
        assert any(bool(grad.any()) for grad in found) == learns
        for parameter in network.parameters():
            parameter.grad = None


def test_items_with_sound_are_trained_as_ever(data, models):
    wrapper, network, _ = models
    clips = items_of(data)["clips"]
    batch, losses = losses_of(wrapper, network, batch_of(clips))
    _, plain = losses_of(wrapper, network, batch_of(clips, dataclasses.replace(RULES, audio_dop_weight=0.0)))
    assert batch.preserved is None and torch.equal(losses.video, plain.video) and torch.equal(losses.audio, plain.audio)


def test_a_prompt_is_held_to_the_base_model(data, models):
    wrapper, network, plain = models
    clips = items_of(data)["clips"]
    cached = load_file(prompt_path(clips[0].spec.cache_directory, CLASS_PROMPT))
    preservation = PromptPreservation(text=cached["text_bfloat16"][None], text_mask=None, weight=1.0)
    batch = batch_of(clips[:1])
    held = preservation.batch(batch)
    _, losses = losses_of(wrapper, network, held)
    assert not losses.video.any() and not losses.audio.any()
    assert total_loss(losses, held.video_weight, held.audio_weight) > 0
    outputs = []
    for model in (wrapper, plain):  # the same inputs, by hand
        captured = []
        parts.item_losses(model, dataclasses.replace(batch, text=held.text), error=lambda p, t, seen=captured: seen.append(p) or p)
        outputs.append(captured)
    expected = sum((ours - theirs).pow(2).mean() for ours, theirs in zip(*outputs, strict=True))
    torch.testing.assert_close(losses.preserved[0], expected, atol=1e-7, rtol=1e-4)
    with torch.no_grad():
        for name, parameter in network.named_parameters().items():
            parameter.mul_(0 if name.endswith("lora_B") else 1)
    _, untrained = losses_of(wrapper, network, held)
    assert not untrained.preserved.any()


def run(data, output, *extra: str, toml: str = "dataset.toml") -> dict[str, torch.Tensor]:
    chosen = dataclasses.replace(data, toml=data.folder / toml)
    argv = chosen.arguments("--output_dir", str(output), "--save_precision", "float32", "--network_args", "rank_dropout=0", *extra)
    assert ltxv2_train_network.main(argv) == 0
    return load_file(output / "ltxv2_lora.safetensors")


def test_runs_log_what_is_kept_and_resume_bit_for_bit(data, tmp_path):
    flags = [
        "--audio_dop_weight",
        "0.5",
        "--dop_prompt",
        CLASS_PROMPT,
        "--dop_weight",
        "0.3",
        "--ema_decay",
        "0.9",
        "--audio_balance",
        "ema",
    ]
    whole = run(data, tmp_path / "whole", *flags, "--max_train_steps", "8")
    run(data, tmp_path / "halves", *flags, "--max_train_steps", "8", "--save_state", "--save_every_n_steps", "4")
    state = tmp_path / "halves" / "ltxv2_lora-step00000004-state"
    resumed = run(data, tmp_path / "halves", *flags, "--max_train_steps", "8", "--resume", str(state))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = parts.losses(tmp_path / "whole")
    assert rows[0]["loss_dop"] == 0 and all(row["loss_dop"] > 0 for row in rows[2:])
    silent = [row for row in rows if not row.get("audio_supervised")]
    assert silent and all("loss_preserved" in row and "loss_audio" not in row for row in silent)
    assert all("loss_preserved" not in row for row in rows if row.get("audio_supervised") == 1)


def test_the_sound_stays_nearer_to_the_base_models(data, tmp_path):
    """Trained on pictures alone, the model with the teacher ends nearer to the base model's sound than the one without."""
    head, mute = TOML.format(preserve="false").split("[[datasets]]")[0], TOML.format(preserve="false").split("[[datasets]]")[3]
    (data.folder / "mute.toml").write_text(f"{head}[[datasets]]{mute}", encoding="utf-8")
    drifts = []
    for flags in ([], ["--audio_dop_weight", "3"]):
        lora = run(data, tmp_path / str(len(flags)), *flags, "--max_train_steps", "40", "--learning_rate", "1e-2", toml="mute.toml")
        drifts.append(sound_drift(data, lora))
    assert drifts[1] < 0.5 * drifts[0], drifts


def sound_drift(data, lora: dict[str, torch.Tensor]) -> float:
    model = load_transformer(open_checkpoint(data.model), mode="av", device="cpu", dtype=torch.float32)
    network = create_network(model, dim=4, alpha=4, args={"rank_dropout": "0"}, seed=0)
    for name, layer in network.layers.items():
        layer.load({leaf: lora[f"diffusion_model.{name}.{leaf}"] for leaf in ("lora_A.weight", "lora_B.weight")})
    wrapper = OfficialLTXV2Wrapper(model, "flowmatch_1_1000")
    rules = dataclasses.replace(RULES, seed=77)
    total = 0.0
    for item in items_of(data)["clips"]:  # real sound, never trained on
        given = []
        for context in (network.disabled(), network.dropout(())):
            with context, torch.no_grad():
                batch = batch_of([item], rules)
                parts.item_losses(wrapper, batch, error=lambda p, t, seen=given: seen.append(p) or p)
        total += float((given[1] - given[3]).pow(2).mean())
    return total


def test_datasets_are_kept_as_the_base_model_makes_them(data, tmp_path):
    run(data, tmp_path, "--max_train_steps", "8", toml="prior.toml")
    rows = parts.losses(tmp_path)
    kept = [row for row in rows if "loss_preserved" in row]
    assert kept and all("loss_video" not in row and "loss_audio" not in row for row in kept)
    assert len(kept) < len(rows)


def test_what_cannot_work_is_said_before_the_run(data, tmp_path):
    with pytest.raises(UserError, match="(?s)the prompt 'a square' is not cached.*--dop_prompt needs it.*--dop_prompt \"a square\""):
        run(data, tmp_path, "--dop_prompt", "a square")
    with pytest.raises(UserError, match="--audio_dop_weight 1: keeps the sound that goes with pictures; --ltx_mode video"):
        run(data, tmp_path, "--audio_dop_weight", "1", "--ltx_mode", "video")
    with pytest.raises(UserError, match="--ema_decay 1: must be a share"):
        run(data, tmp_path, "--ema_decay", "1")
    with pytest.raises(UserError, match="AdamWScheduleFree.*averages already"):
        run(data, tmp_path, "--ema_decay", "0.9", "--optimizer_type", "AdamWScheduleFree")
    folder = tmp_path / "copy"
    shutil.copytree(data.folder, folder)
    copy = dataclasses.replace(data, folder=folder, toml=folder / "dataset.toml")
    argv = ["--dataset_config", str(copy.toml), "--ltx_mode", "av", "--device", "cpu", "--ltxv2_model", str(data.model)]
    argv += ["--text_encoder", str(data.encoder), "--dop_prompt", CLASS_PROMPT, "--max_length", "2"]
    (folder / "keep.safetensors").write_bytes(prompt_path(folder / "cache", CLASS_PROMPT).read_bytes())
    assert ltxv2_cache_text_encoder_outputs.main(argv) == 0
    assert prompt_path(folder / "cache", CLASS_PROMPT).read_bytes() != (folder / "keep.safetensors").read_bytes()
    (folder / "keep.safetensors").replace(prompt_path(folder / "cache", CLASS_PROMPT))
    with pytest.raises(UserError, match="the prompt 'a disc' is not cached as it should be .*--max_length 2 cuts it elsewhere"):
        run(copy, tmp_path, "--dop_prompt", CLASS_PROMPT, "--max_length", "2")


def test_the_average_follows_its_formula_and_leaves_the_run_alone(data, tmp_path):
    values = [torch.nn.Parameter(torch.zeros(3))]
    average, expected = WeightAverage({"a": values[0]}, 0.5), torch.zeros(3, dtype=torch.float64)
    for step in range(1, 30):
        values[0].data = torch.full((3,), float(step * step))
        average.step()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step * step
    with average.applied():
        torch.testing.assert_close(values[0].data.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(values[0].data, torch.full((3,), 841.0))
    plain = run(data, tmp_path / "plain", "--max_train_steps", "4")
    averaged = run(data, tmp_path / "averaged", "--max_train_steps", "4", "--ema_decay", "0.9")
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)
    assert [row["loss_video"] for row in parts.losses(tmp_path / "plain") if "loss_video" in row] == [
        row["loss_video"] for row in parts.losses(tmp_path / "averaged") if "loss_video" in row
    ]


def test_two_processes_hold_to_the_base_model_as_one_does(data, tmp_path):
    flags = ["--audio_dop_weight", "0.5", "--dop_prompt", CLASS_PROMPT, "--ema_decay", "0.9", "--audio_balance", "ema"]
    flags += ["--optimizer_type", "torch.optim.SGD", "--learning_rate", "0.05", "--max_train_steps", "4"]
    one = run(data, tmp_path / "one", *flags, "--gradient_accumulation_steps", "2")
    flags = [*data.arguments("--save_precision", "float32", "--network_args", "rank_dropout=0"), *flags]
    done = launch(2, "musubi_tuner.ltxv2_train_network", *flags, "--output_dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_file(tmp_path / "two" / "ltxv2_lora.safetensors")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
    for ours, theirs in zip(*(parts.losses(tmp_path / name) for name in ("one", "two")), strict=True):
        assert ours.keys() == theirs.keys() and all(abs(ours[name] - theirs[name]) < 1e-4 for name in ours), ours["step"]
