"""Training from real caches on the tiny 2.3-style checkpoint: modes, resuming, errors that come before work is lost."""

import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_cache_audio_latents, ltxv2_train_network
from musubi_tuner.dataset import verify
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.preflight import check_inputs
from tests import training_parts as parts


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("daten ü"), tiny_family, "av")


@pytest.fixture(scope="module")
def video_data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("video"), tiny_family, "video", held_out=False)


def run(data: parts.Data, output: Path, *extra: str) -> dict[str, torch.Tensor]:
    assert ltxv2_train_network.main(data.arguments("--output_dir", str(output), *extra)) == 0
    return load_file(output / "ltxv2_lora.safetensors")


def copy_of(data: parts.Data, folder: Path) -> parts.Data:
    shutil.copytree(data.folder, folder)
    return parts.Data(folder, folder / "dataset.toml", data.model, data.mode, data.encoder)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def banner(caplog) -> dict[str, str]:
    """The rows of the table that a run shows before its first step."""
    (table,) = [text for record in caplog.records if (text := record.getMessage()).startswith("training\n")]
    _, rule, *lines = table.splitlines()
    width = len(rule.split()[0])
    rows: dict[str, str] = {}
    for line in lines:
        name = line[:width].strip() or list(rows)[-1]
        rows[name] = f"{rows.get(name, '')} {line[width:].strip()}".strip()
    return rows


@pytest.mark.parametrize(("flags", "warned"), [((), False), (("--network_alpha", "8"), False), (("--network_alpha", "32"), True)])
def test_an_alpha_that_stayed_where_the_rank_was_lowered_is_told(data, tmp_path, caplog, flags, warned):
    check_inputs(ltxv2_train_network.parse_arguments(data.arguments("--output_dir", str(tmp_path), *flags)))
    told = "--network_dim 4 with --network_alpha 32: the update is scaled by 8"
    assert any(told in record.getMessage() for record in caplog.records) is warned


def test_av_run_leaves_a_lora_of_all_streams_losses_and_a_page(data, tmp_path, caplog):
    with caplog.at_level("INFO"):
        lora = run(data, tmp_path, "--max_train_steps", "3", "--save_every_n_steps", "2")
    rows = banner(caplog)
    assert rows["model"] == "ltx2_tiny_2.3.safetensors: LTX-2.3, mode av, float32"
    numbers = sum(tensor.numel() for tensor in lora.values())
    assert rows["network"] == f"lora rank 4 alpha 4, 16 video, 16 audio, 16 cross linears, {numbers:,} parameters"
    assert (rows["items"], rows["held out"]) == ("3 in 1 bucket(s), 3 with sound", "1 items")
    assert rows["run"] == "3 steps, 3 steps an epoch, 1 process(es), cpu"
    assert len(lora) == 2 * 2 * 24, "six attentions of four linears in each of two blocks"
    assert all(name.startswith("diffusion_model.transformer_blocks.") for name in lora)
    assert not any("alpha" in name or "gate_logits" in name for name in lora)
    assert {tensor.dtype for tensor in lora.values()} == {torch.bfloat16}
    assert {path.name for path in tmp_path.iterdir()} == {
        "ltxv2_lora.safetensors", "ltxv2_lora-step00000002.safetensors", "ltxv2_lora-loss.jsonl", "ltxv2_lora-report.json", "report.html",
    }  # fmt: skip
    rows = parts.losses(tmp_path)
    steps = [row for row in rows if "loss_video" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["loss_audio"] > 0 and row["audio_supervised"] == 1 for row in steps)
    for row in steps:  # one item a step: its loss is the whole of the one range that it falls into
        ranges = {name: value for name, value in row.items() if name.startswith("noise_level/")}
        assert sorted(ranges.values()) == pytest.approx(sorted((row["loss_video"], row["loss_audio"]))), ranges
    assert {row["step"] for row in rows if "validation/loss_audio" in row} == {0, 1, 2, 3}
    metadata = open_checkpoint(tmp_path / "ltxv2_lora.safetensors").metadata
    assert metadata["ltxv2_adapted_streams"] == "video,audio,cross"
    assert (metadata["ss_steps"], metadata["ss_network_dim"], metadata["ltxv2_mode"]) == ("3", "4", "av")
    assert metadata["ltxv2_timestep_format"] == "flowmatch_1_1000"


def test_video_run_adapts_no_sound(video_data, tmp_path, caplog):
    with caplog.at_level("INFO"):
        lora = run(video_data, tmp_path, "--max_train_steps", "2")
    rows = banner(caplog)
    assert "mode video" in rows["model"] and ", 16 video linears, " in rows["network"] and rows["held out"] == "none"
    assert rows["items"].endswith("3 with sound, which --ltx_mode video does not train")
    assert len(lora) == 2 * 2 * 8
    assert not any("audio" in name for name in lora)
    assert all("loss_audio" not in row for row in parts.losses(tmp_path))


def test_audio_run_adapts_sound_alone(data, tmp_path):
    audio = parts.Data(data.folder, data.toml, data.model, "audio", data.encoder)
    lora = run(audio, tmp_path, "--max_train_steps", "2")
    assert len(lora) == 2 * 2 * 8
    assert all("audio_attn" in name for name in lora)


def test_two_runs_are_the_same_and_workers_change_nothing(data, tmp_path):
    first = run(data, tmp_path / "a", "--max_train_steps", "4")
    second = run(data, tmp_path / "b", "--max_train_steps", "4", "--max_data_loader_n_workers", "1")
    assert same(first, second)
    assert parts.losses(tmp_path / "a") == parts.losses(tmp_path / "b")


def test_checkpointing_and_accumulation_give_the_same_gradients(data, tmp_path):
    plain = run(data, tmp_path / "a", "--max_train_steps", "2", "--no-gradient_checkpointing", "--save_precision", "float32")
    kept = run(data, tmp_path / "b", "--max_train_steps", "2", "--save_precision", "float32")
    assert max(float((plain[name] - kept[name]).abs().max()) for name in plain) < 1e-6


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor", "Prodigy", "torch.optim.SGD", "AdamW8bit"])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(data, tmp_path, optimizer):
    flags = ["--optimizer_type", optimizer, "--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--gradient_accumulation_steps", "2"]
    whole = run(data, tmp_path / "whole", *flags, "--max_train_steps", "6", "--save_precision", "float32")
    halves = tmp_path / "halves"
    run(data, halves, *flags, "--max_train_steps", "6", "--save_state", "--save_every_n_steps", "3", "--save_precision", "float32")
    (halves / "ltxv2_lora.safetensors").unlink()
    state = str(halves / "ltxv2_lora-step00000003-state")
    resumed = run(data, halves, *flags, "--max_train_steps", "6", "--resume", state, "--save_precision", "float32")
    assert same(whole, resumed)
    training = [row for row in parts.losses(halves) if "loss_video" in row]
    assert training == [row for row in parts.losses(tmp_path / "whole") if "loss_video" in row]


def test_killed_training_resumes_to_the_same_lora(data, tmp_path):
    """Killed at once, without a chance to save: the last state is whole, and the run ends as it would have."""
    flags = data.arguments("--max_train_steps", "40", "--save_state", "--save_every_n_steps", "2", "--save_precision", "float32")
    process = subprocess.Popen([sys.executable, "-m", "musubi_tuner.ltxv2_train_network", *flags, "--output_dir", str(tmp_path / "killed")])
    try:
        while not (states := sorted((tmp_path / "killed").glob("*-state"))):
            assert process.poll() is None, "the run ended before it saved a state"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    states = sorted((tmp_path / "killed").glob("*-state"))
    step = int(states[-1].name.split("step")[1][:8])
    steps = str(step + 3)
    extra = ["--save_precision", "float32", "--max_train_steps", steps]
    resumed = run(data, tmp_path / "killed", *extra, "--resume", str(states[-1]))
    assert same(run(data, tmp_path / "whole", *extra), resumed)


def test_interrupt_saves_a_state_and_says_how_to_go_on(data, tmp_path, monkeypatch, caplog):
    import signal

    from musubi_tuner.training.hooks import StepLog

    original = StepLog.write

    def interrupt_at_two(self, step, norm, bar):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, step, norm, bar)

    monkeypatch.setattr(StepLog, "write", interrupt_at_two)
    with caplog.at_level("INFO"):
        flags = ["--output_dir", str(tmp_path), "--max_train_steps", "9", "--validate_every_n_steps", "1"]
        assert ltxv2_train_network.main(data.arguments(*flags)) == 130
    assert (tmp_path / "ltxv2_lora-step00000002-state").is_dir()
    validated = {row["step"]: row for row in parts.losses(tmp_path) if "validation/loss_video" in row}
    assert set(validated) == {0, 1}, "nobody who stops a run waits for a validation"
    first, last = (f"{validated[step]['validation/loss_video']:.4f}" for step in (0, 1))
    assert re.search(rf"validation/loss_video +{first} -> {last}", caplog.text)
    assert "--resume" in caplog.text and "ltxv2_lora-step00000002-state" in caplog.text


def test_validation_is_of_the_plain_loss_whatever_training_adds(data, tmp_path):
    plain = ["--max_train_steps", "1", "--validate_every_n_steps", "9"]
    run(data, tmp_path / "a", *plain)
    run(data, tmp_path / "b", *plain, "--noise_offset", "0.5", "--weighting_scheme", "cosmap")
    (first, second), (left, right) = (parts.losses(tmp_path / name)[:2] for name in "ab")
    assert first == left and "validation/loss_audio" in first
    assert second["loss_video"] != right["loss_video"]


def test_warm_start_goes_on_from_a_lora(data, tmp_path):
    first = run(data, tmp_path / "a", "--max_train_steps", "3", "--save_precision", "float32")
    weights = str(tmp_path / "a" / "ltxv2_lora.safetensors")
    same_start = run(
        data,
        tmp_path / "b",
        "--max_train_steps",
        "1",
        "--learning_rate",
        "1e-12",
        "--network_weights",
        weights,
        "--save_precision",
        "float32",
    )
    assert max(float((first[name] - same_start[name]).abs().max()) for name in first) < 1e-6
    with pytest.raises(UserError, match="--network_dim 4"):
        run(data, tmp_path / "c", "--max_train_steps", "1", "--network_weights", weights, "--network_dim", "8")


def test_training_needs_no_media_and_imports_no_encoder(data, tmp_path):
    """The media are gone, and neither transformers nor diffusers nor av is ever loaded."""
    moved = copy_of(data, tmp_path / "data")
    shutil.rmtree(moved.folder / "clips")
    shutil.rmtree(moved.folder / "held out")
    flags = moved.arguments("--output_dir", str(tmp_path / "out"), "--max_train_steps", "1")
    code = (
        "import sys; import musubi_tuner.ltxv2_train_network as t; "
        "not_for_training = ('transformers', 'diffusers', 'av', 'bitsandbytes', 'musubi_tuner.encoding', 'musubi_tuner.preview'); "
        "bad = lambda: [m for m in not_for_training if m in sys.modules]; "
        "assert not bad(), bad(); assert t.main(sys.argv[1:]) == 0; assert not bad(), bad()"
    )
    subprocess.run([sys.executable, "-c", code, *flags], check=True)
    assert (tmp_path / "out" / "ltxv2_lora.safetensors").is_file()


def test_missing_sidecars_stop_an_av_run_with_the_command(video_data, tmp_path):
    av = parts.Data(video_data.folder, video_data.toml, video_data.model, "av", video_data.encoder)
    with pytest.raises(UserError, match=r"(?s)_ltxv2_audio.safetensors: missing.*ltxv2_cache_audio_latents.py --dataset_config") as error:
        run(av, tmp_path)
    assert "it was cached with --ltx_mode video" in str(error.value), "captions cached for video alone are named too"
    assert not (tmp_path / "ltxv2_lora.safetensors").exists()


def test_stale_caches_are_refused_with_reason_and_command(data, tmp_path, tiny_family):
    cases = {
        "caption": "the caption has changed",
        "latents": "missing",
        "truncated": "damaged or truncated",
        "no sound": "it lacks audio_latents",
    }
    for name, reason in cases.items():
        broken = copy_of(data, tmp_path / name)
        latents = sorted((broken.folder / "cache").glob("*_ltxv2.safetensors"))[0]
        sidecar = sorted((broken.folder / "cache").glob("*_ltxv2_audio.safetensors"))[0]
        if name == "caption":
            sorted((broken.folder / "clips").glob("*.txt"))[0].write_text("another caption", encoding="utf-8")
        elif name == "latents":
            latents.unlink()
        elif name == "truncated":
            latents.write_bytes(latents.read_bytes()[:-100])
        else:
            save_file({"other": torch.zeros(1)}, sidecar, metadata=dict(open_checkpoint(sidecar).metadata))
        with pytest.raises(UserError, match=f"(?s){reason}.*Run, then start training again") as error:
            run(broken, tmp_path / "out")
        assert "--dataset_config" in str(error.value)


def test_caches_of_another_model_are_refused(data, tmp_path, tiny_family):
    other = parts.Data(data.folder, data.toml, tiny_family.ltx20, "av", data.encoder)
    with pytest.raises(UserError, match="another encoder|another model"):
        run(other, tmp_path)


def test_captions_of_another_encoder_backend_are_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"(?s)backend.*ltxv2_cache_text_encoder_outputs\.py.*--text_encoder_backend t5"):
        run(data, tmp_path, "--text_encoder_backend", "t5")


def test_changed_settings_are_named(data, tmp_path):
    changed = copy_of(data, tmp_path / "data")
    changed.toml.write_text(changed.toml.read_text(encoding="utf-8").replace("[17]", "[9]"), encoding="utf-8")
    with pytest.raises(UserError, match=r"target_frames is \[9\], cached with \[17\]"):
        run(changed, tmp_path / "out")


def test_clip_whose_sound_is_absent_is_trained_on_pictures_alone(tiny_family, tmp_path):
    from musubi_tuner.tiny.clips import disc_frames, disc_heights, write_clip

    folder = tmp_path / "mixed"
    clips = folder / "clips"
    parts.write_clips(clips, count=1, frames=25)
    write_clip(clips / "silent.mp4", disc_frames(disc_heights(25, 24, 1), 96, 64, "red", "dark"), fps=24)
    (clips / "silent.txt").write_text("a disc without a sound", encoding="utf-8")
    toml = folder / "dataset.toml"
    toml.write_text(parts.TOML.format(batch_size=2).split("[[validation_datasets]]")[0], encoding="utf-8")
    data = parts.Data(folder, toml, tiny_family.ltx23, "av", tiny_family.gemma)
    parts.cache(data)
    run(data, tmp_path / "out", "--max_train_steps", "2")
    assert [row["audio_supervised"] for row in parts.losses(tmp_path / "out")] == [0.5, 0.5]


def test_not_finite_stops_before_the_update_and_names_the_item(data, tmp_path, monkeypatch):
    broken = copy_of(data, tmp_path / "data")
    for path in (broken.folder / "cache").glob("*_ltxv2.safetensors"):
        tensors = {name: torch.full_like(value, float("nan")) for name, value in load_file(path).items()}
        save_file(tensors, path, metadata=dict(open_checkpoint(path).metadata))
    toml = broken.toml.read_text(encoding="utf-8").split("[[validation_datasets]]")[0]
    broken.toml.write_text(toml, encoding="utf-8")
    # the settings do not include validation datasets, so the index still fits
    with pytest.raises(UserError, match=r"3 cache file(.|\n)*_ltxv2.safetensors: its tensors are not those that were written"):
        run(broken, tmp_path / "out")
    monkeypatch.setattr(verify, "content_faults", lambda files: {})
    with pytest.raises(UserError, match=r"step 1: not finite: video loss nan of datasets\[0\]/"):
        run(broken, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_audio_program_and_training_agree_on_what_is_missing(data, tmp_path):
    """A rerun of the command that the message names mends the run."""
    broken = copy_of(data, tmp_path / "data")
    for path in (broken.folder / "cache").glob("*_ltxv2_audio.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="ltxv2_cache_audio_latents.py"):
        run(broken, tmp_path / "out")
    argv = ["--dataset_config", str(broken.toml), "--vae", str(broken.model), "--device", "cpu"]
    assert ltxv2_cache_audio_latents.main(argv) == 0
    run(broken, tmp_path / "out", "--max_train_steps", "1")


def test_retention_keeps_the_newest_of_steps_and_of_epochs(video_data, tmp_path, caplog):
    others = [tmp_path / name for name in ("ltxv2_lora-2-step00000001.safetensors", "ltxv2_lora-notes.safetensors")]
    for other in others:
        other.write_bytes(b"of somebody else")
    flags = ["--max_train_steps", "10", "--save_every_n_steps", "2", "--save_every_n_epochs", "1", "--save_last_n", "2"]
    caplog.set_level(logging.INFO)
    run(video_data, tmp_path, *flags)  # epochs end at steps 3, 6 and 9; step 6 has its file by step
    assert f"and 1 before them, in {tmp_path}" in " ".join(caplog.text.split())
    left = {path.name for path in tmp_path.glob("*.safetensors")} - {other.name for other in others}
    assert left == {
        "ltxv2_lora.safetensors", "ltxv2_lora-step00000006.safetensors", "ltxv2_lora-step00000008.safetensors",
        "ltxv2_lora-000001.safetensors", "ltxv2_lora-000003.safetensors",
    }  # fmt: skip
    assert all(other.is_file() for other in others)


def test_autoresume_starts_anew_and_then_goes_on_to_the_same_lora(video_data, tmp_path, caplog):
    flags = ["--save_precision", "float32", "--save_state", "--save_every_n_steps", "2"]
    whole = run(video_data, tmp_path / "whole", *flags, "--max_train_steps", "5")
    with caplog.at_level("INFO"):
        run(video_data, tmp_path / "halves", *flags, "--max_train_steps", "3", "--autoresume")
    assert "starts at step 0" in caplog.text
    (tmp_path / "halves" / "ltxv2_lora-2-step00000009-state").mkdir()  # of another run
    resumed = run(video_data, tmp_path / "halves", *flags, "--max_train_steps", "5", "--autoresume")
    assert [row["step"] for row in parts.losses(tmp_path / "halves") if "loss_video" in row] == [1, 2, 3, 4, 5]
    assert same(whole, resumed)
    with pytest.raises(UserError, match="--autoresume with --resume"):
        run(video_data, tmp_path / "both", "--autoresume", "--resume", str(tmp_path))
