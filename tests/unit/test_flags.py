"""Flags from dataclasses."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

from musubi_tuner import __version__, make_tiny
from musubi_tuner.command import COMMANDS, dispatch
from musubi_tuner.config.flags import describe, flag, parse
from musubi_tuner.config.network import parse_pairs
from musubi_tuner.config.rl import RlTrainingConfig
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.config.validation import AnyPath, Count, List, options
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.setup import weight_dtype
from tools.make_options_table import PROGRAMS

CONFIGS = {f"{program.module.__name__.rpartition('.')[2]} {program.subcommand}".rstrip(): program.config for program in PROGRAMS}
CONFIGS["make_tiny"] = make_tiny.TinyConfig
REQUIRED = ["--ltxv2_model", "m.safetensors", "--dataset_config", "d.toml"]


@options
class Section:
    """Numbers."""

    count: Count = flag("how many", default=3)
    rate: float | None = flag("how fast", default=None)
    on: bool = flag("whether", default=True)
    kind: Literal["a", "b"] = flag("which", default="a")
    pairs: Annotated[tuple[str, ...], List] = flag("some", default=())
    file: AnyPath | None = flag("where", default=None)


@options
class Config:
    """All."""

    section: Section


def read(*argv):
    return parse(Config, argv, prog="p", description="d").section


def training(*argv):
    return parse(TrainingConfig, [*REQUIRED, *argv], prog="p", description="d")


def test_types_and_defaults():
    assert read() == Section()
    section = read("--count", "5", "--rate", "2", "--no-on", "--kind", "b", "--pairs", "x=1", "y=2", "--file", "a b/ü.txt")
    assert section == Section(count=5, rate=2.0, on=False, kind="b", pairs=("x=1", "y=2"), file=Path("a b/ü.txt"))


def test_config_file_supplies_flags_and_the_command_line_wins(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('count = 7\nkind = "b"\npairs = ["x=1"]\nfile = "f"\n', encoding="utf-8")
    section = read("--config_file", str(path), "--kind", "a")
    assert section == Section(count=7, kind="a", pairs=("x=1",), file=Path("f"))


def test_of_many_wrong_values_the_first_are_told(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(f"pairs = [{', '.join(map(str, range(5000)))}]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"pairs\[0\] = 0: must be text") as caught:
        read("--config_file", str(path))
    assert len(str(caught.value).splitlines()) == 21 and "4980 more of its values are wrong." in str(caught.value)


def test_bytes_that_are_no_text_are_no_prompt():
    for name in ("--dop_prompt", "--output_name"):
        with pytest.raises(UserError, match=rf"{name} a\\udcff: must be text in UTF-8"):
            training("--ltxv2_timestep_format", "sd3_0_1", name, "a\udcff")


def test_a_message_shows_the_beginning_of_a_long_value(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(f'file = "{"n" * 5000}"\n', encoding="utf-8")
    for argv in (["--count", "9" * 5000], ["--file", "n" * 5000], ["--config_file", str(path)]):
        with pytest.raises(UserError, match="(?:9|n){99} ...: must be ") as caught:
            read(*argv)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont = 7", "unknown key 'cuont'. Did you mean 'count'"),
        ("count = 'x'", "count = 'x': must be a whole number"),
        ("count = true", "count = True: must be a whole number"),
        ("count = 0", "count = 0: must be at least 1"),
        ("rate = nan", "rate = nan: must be a finite number"),
        ("on = 1", "on = 1: must be true or false"),
        ("kind = 'c'", "kind = 'c': must be one of a, b"),
        ("pairs = 'x'", "pairs = 'x': must be a list"),
        ("pairs = [1]", r"pairs\[0\] = 1: must be text"),
        ("count = ", "not valid TOML"),
    ],
)
def test_config_file_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"c.toml: {message}"):
        read("--config_file", str(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "x"], "--count x: must be a whole number."),
        (["--count", "-1"], "--count -1: must be at least 1."),
        (["--rate", "nan"], "--rate nan: must be a finite number."),
        (["--rate", "inf"], "--rate inf: must be a finite number."),
        (["--file", ""], "--file '': must be a path."),
        (["--kind=x"], "--kind x: must be one of a, b."),
        (["--count"], "--count: needs a value (how many).\np --help shows the usual flags, --help_all all of them."),
        (["--on=true"], "--on=true: takes no value; --on is on, --no-on is off.\np --help shows the usual flags, --help_all all of them."),
        (["--on", "true"], "unexpected 'true' after --on.\np --help shows the usual flags, --help_all all of them."),
        (["--coun", "5"], "unknown flag '--coun'. Did you mean '--count'?\np --help shows the usual flags, --help_all all of them."),
        (["--config_file", "nowhere"], "--config_file nowhere: no such file."),
    ],
)
def test_mistakes_on_the_command_line_take_two_lines(argv, message):
    with pytest.raises(UserError) as caught:
        read(*argv)
    assert str(caught.value) == message


def test_the_last_of_a_flag_given_twice_counts():
    argv = ["--count", "5", "--count=6", "--pairs", "a=1", "b=2", "--pairs", "c=3", "--no-on", "--on"]
    assert read(*argv) == Section(count=6, pairs=("c=3",))


def test_a_default_that_the_help_tells_is_told_once(capsys):
    """Of rollouts the steps are those of a pass, whatever stands in the class."""
    with pytest.raises(SystemExit):
        parse(RlTrainingConfig, ["--help"], prog="x", description="y")
    shown = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps; default: those of one pass --max_train_epochs" in shown and "rank [32]" in shown


def test_required_flags_may_come_from_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('ltxv2_model = "m"\ndataset_config = "d"\nltxv2_timestep_format = "sd3_0_1"\n', encoding="utf-8")
    config = parse(TrainingConfig, ["--config_file", str(path)], prog="p", description="d")
    assert config.model.ltxv2_model == Path("m")


def test_missing_flags_are_listed_with_what_they_are():
    with pytest.raises(UserError, match=r"missing --ltxv2_timestep_format: .*; --ltxv2_model: transformer file.*\.\np --help"):
        parse(TrainingConfig, REQUIRED[2:], prog="p", description="d")


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
        ("--learning_rate", "nan"),
        ("--lr_warmup_steps", "inf"),
        ("--max_train_steps", "99999999999"),
        ("--sample_width", "100"),
        ("--sample_frames", "24"),
        ("--max_length", "1025"),
        ("--seed", "99999999999999999999"),
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


def test_flags_of_every_program_are_a_decision():
    """A new flag is added to flags.txt on purpose."""
    lines = []
    for module in COMMANDS.values():
        if module == "ltxv2_doctor":  # takes those of training
            continue
        for name in (name for name in CONFIGS if name.partition(" ")[0] == module):
            lines.append(f"{name}:")
            lines += [" ".join(["   ", flag.name, *flag.aliases]) for flag in describe(CONFIGS[name])]
    assert (Path(__file__).parent / "flags.txt").read_text(encoding="utf-8").splitlines() == lines


def test_help_shows_the_flags_that_most_people_need():
    flags = describe(TrainingConfig)
    common = sum(flag.common for flag in flags)
    assert 20 <= common <= 30 < len(flags)
    assert all(flag.common for flag in flags if flag.is_required)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy_and_fits_a_screen(command):
    code = (
        "import sys; from musubi_tuner.command import dispatch\n"
        f"try: dispatch([{command!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'accelerate', 'safetensors', 'transformers', 'av', 'PIL'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    *lines, loaded = answer.stdout.splitlines()
    assert loaded == "[]"
    module = importlib.import_module(f"musubi_tuner.{COMMANDS[command]}")
    assert lines[0].startswith(module.DESCRIPTION[:60])
    assert sum(line.startswith(f"usage: ltxv2 {command} --") for line in lines[:4]) == 1
    assert len(lines) <= 75 and max(map(len, lines)) <= 140


def test_the_installed_command_answers_for_itself(capsys):
    assert dispatch([]) == dispatch(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)
    assert dispatch(["--version"]) == 0
    with pytest.raises(SystemExit):
        dispatch(["train", "--version"])
    assert capsys.readouterr().out.splitlines() == [f"musubi-tuner-ltxv2 {__version__}"] * 2
    with pytest.raises(UserError, match="unknown command 'trian'. Did you mean 'train'?"):
        dispatch(["trian"])
    with pytest.raises(UserError, match="(?s)missing --output_dir: folder.*ltxv2 make-tiny --help"):
        dispatch(["make-tiny"])


@pytest.mark.parametrize(
    ("launched", "asked", "device", "expected"),
    [
        ("bf16", None, "cpu", torch.bfloat16), ("no", None, "cuda", torch.bfloat16), ("no", "no", "cuda", torch.float32),
        ("no", None, "cpu", torch.float32),
    ],
)  # fmt: skip
def test_weights_are_bf16_on_a_gpu_unless_float32_is_asked_for(launched, asked, device, expected):
    assert weight_dtype(launched, asked, torch.device(device)) == expected


def test_other_precisions_are_refused():
    with pytest.raises(UserError, match="mixed precision 'fp16'.*bf16"):
        weight_dtype("fp16", None, torch.device("cpu"))
