"""Flags from dataclasses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from musubi_tuner import ltxv2_train_network
from musubi_tuner.config.flags import describe, flag, parse
from musubi_tuner.config.training import TrainingConfig, check_training_config, parse_pairs
from musubi_tuner.runtime.errors import UserError

REQUIRED = ["--ltxv2_model", "m.safetensors", "--dataset_config", "d.toml"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Numbers."""

    count: int = flag("how many", default=3)
    rate: float | None = flag("how fast", default=None)
    on: bool = flag("whether", default=True)
    kind: Literal["a", "b"] = flag("which", default="a")
    pairs: tuple[str, ...] = flag("some", default=())
    file: Path | None = flag("where", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All."""

    section: Section


def read(*argv):
    return parse(Config, argv, prog="p", description="d").section


def training(*argv):
    config = parse(TrainingConfig, [*REQUIRED, *argv], prog="p", description="d")
    check_training_config(config)
    return config


def test_types_and_defaults():
    assert read() == Section()
    section = read("--count", "5", "--rate", "2", "--no-on", "--kind", "b", "--pairs", "x=1", "y=2", "--file", "a b/ü.txt")
    assert section == Section(count=5, rate=2.0, on=False, kind="b", pairs=("x=1", "y=2"), file=Path("a b/ü.txt"))


def test_config_file_supplies_flags_and_the_command_line_wins(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('count = 7\nkind = "b"\npairs = ["x=1"]\nfile = "f"\n', encoding="utf-8")
    section = read("--config_file", str(path), "--kind", "a")
    assert section == Section(count=7, kind="a", pairs=("x=1",), file=Path("f"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("cuont = 7", "Did you mean 'count'"), ("count = 'x'", "of type int"), ("kind = 'c'", "one of a, b"), ("count = ", "not valid TOML")],
)
def test_config_file_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read("--config_file", str(path))


def test_required_flags_may_come_from_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('ltxv2_model = "m"\ndataset_config = "d"\n', encoding="utf-8")
    config = parse(TrainingConfig, ["--config_file", str(path)], prog="p", description="d")
    assert config.model.ltxv2_model == Path("m")


def test_abbreviated_and_unknown_flags_are_errors_that_name_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--coun", "5")
    assert stopped.value.code == 2
    assert "unrecognized arguments: --coun 5. Did you mean '--count'?" in capsys.readouterr().err


def test_missing_timestep_format_lists_the_three_values():
    with pytest.raises(UserError, match=r"(?s)flowmatch_1_1000.*legacy_0_1000.*sd3_0_1"):
        training()
    assert training("--ltxv2_timestep_format", "sd3_0_1").mode.ltxv2_timestep_format == "sd3_0_1"


@pytest.mark.parametrize(
    ("argv", "mode"),
    [
        ((), "video"),
        (("--ltxv2_audio_video",), "av"),
        (("--ltxv2_audio_video", "--ltx_mode", "video"), "video"),
        (("--ltx_mode", "audio"), "audio"),
    ],
)
def test_mode_comes_from_the_newer_flag_first(argv, mode):
    assert training("--ltxv2_timestep_format", "sd3_0_1", *argv).ltx_mode == mode


@pytest.mark.parametrize(
    "argv",
    [
        ("--network_dim", "0"),
        ("--learning_rate", "-1"),
        ("--output_name", "a/b"),
        ("--network_alpha", "0"),
        ("--vram_gb", "0"),
        ("--blocks_to_swap", "-1"),
    ],
)
def test_values_out_of_range_are_named(argv):
    with pytest.raises(UserError, match=argv[0]):
        training("--ltxv2_timestep_format", "sd3_0_1", *argv)


def test_pairs():
    assert parse_pairs(("a=1", "b=x=y"), "--f") == {"a": "1", "b": "x=y"}
    for bad in (("a",), ("a=1", "a=2")):
        with pytest.raises(UserError, match="--f"):
            parse_pairs(bad, "--f")


def test_flags_of_training_are_a_decision():
    """A new flag is added here on purpose."""
    names = {info.name for info in describe(TrainingConfig) if info.section != "Previews"}
    assert names == {
        "--conditioning_config", "--first_frame_conditioning_p",
        "--dim_from_weights", "--train_connectors", "--base_weights", "--base_weights_multiplier", "--audio_learning_rate",
        "--dataset_config", "--ltx_mode", "--ltxv2_audio_video", "--ltxv2_timestep_format", "--timestep_sampling",
        "--independent_audio_timestep", "--av_timestep_rule", "--video_loss_weight", "--audio_loss_weight", "--ltxv2_model", "--vae",
        "--audio_vae", "--text_encoder", "--text_encoder_backend", "--tokenizer", "--max_length", "--ltxv2_backend", "--device",
        "--network_module", "--network_dim", "--network_alpha", "--network_args", "--network_weights", "--optimizer_type",
        "--optimizer_args", "--learning_rate", "--lr_scheduler", "--lr_warmup_steps", "--max_train_steps", "--max_train_epochs",
        "--gradient_accumulation_steps", "--max_grad_norm", "--gradient_checkpointing", "--mixed_precision", "--seed",
        "--max_data_loader_n_workers", "--output_dir", "--output_name", "--save_every_n_steps", "--save_every_n_epochs",
        "--save_precision", "--save_state", "--save_last_n_states", "--resume", "--logging_dir", "--log_with", "--log_every_n_steps",
        "--validate_every_n_steps", "--vram_gb", "--ram_gb", "--weight_format", "--fp8_base", "--fp8_scaled", "--blocks_to_swap",
        "--compile", "--attn_mode", "--timestep_args", "--min_timestep", "--max_timestep", "--loss_type", "--huber_delta",
        "--weighting_scheme", "--min_snr_gamma", "--noise_offset", "--caption_dropout_rate", "--video_caption_dropout_rate",
        "--audio_caption_dropout_rate", "--audio_balance", "--audio_supervision_mode", "--audio_supervision_min_ratio",
        "--audio_supervision_warmup_steps", "--lr_scheduler_type", "--lr_scheduler_args", "--lr_decay_steps",
        "--save_last_n", "--autoresume", "--dop_prompt", "--dop_weight", "--audio_dop_weight", "--ema_decay",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("launched", "asked", "device", "expected"),
    [
        ("bf16", None, "cpu", torch.bfloat16), ("no", None, "cuda", torch.bfloat16), ("no", "no", "cuda", torch.float32),
        ("no", None, "cpu", torch.float32),
    ],
)  # fmt: skip
def test_weights_are_bf16_on_a_gpu_unless_float32_is_asked_for(launched, asked, device, expected):
    assert ltxv2_train_network.weight_dtype(launched, asked, torch.device(device)) == expected


def test_other_precisions_are_refused():
    with pytest.raises(UserError, match="mixed precision 'fp16'.*bf16"):
        ltxv2_train_network.weight_dtype("fp16", None, torch.device("cpu"))
