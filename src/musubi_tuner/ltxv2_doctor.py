"""Looks at the machine, and at everything that a run would use: `ltxv2 doctor` with the flags of `ltxv2 train`, or with none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musubi_tuner.config.flags import Flag, describe, parse, read_config_file, read_words
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.runtime.program import run_program

PROG = "ltxv2 doctor"
DESCRIPTION = "Look at machine, model files, dataset, caches and flags, and say what is wrong: takes the flags of training, loads no model."
_STAND_IN = "not given"
EXIT_WRONG = 1


def main(argv: Sequence[str], prog: str = PROG) -> int:
    """
    Returns:
        0 where nothing is wrong, 1 where something is.
    """
    words, lacking = _with_stand_ins(argv, prog)
    config = parse(TrainingConfig, words, prog=prog, description=DESCRIPTION)
    from musubi_tuner.doctor.files import look_at_files
    from musubi_tuner.doctor.findings import Finding, verdict, write_report
    from musubi_tuner.doctor.machine import look_at_machine
    from musubi_tuner.doctor.run import look_at_dataset, look_at_run
    from musubi_tuner.runtime.device import pick_device
    from musubi_tuner.runtime.errors import UserError

    try:
        device = pick_device(config.model.device)
    except UserError:
        device = pick_device("cpu")  # the row of torch says what is wrong
    folders = [config.saving.output_dir] if argv else [Path.cwd()]
    sections = [("Machine", look_at_machine(device, folders))]
    if not argv:
        sections.append(
            ("Run", [Finding("flags", "skipped", "none are given; with those of a training command, its files are looked at too")])
        )
    else:
        required = [Finding("flags", "wrong", f"{name} is not given: {meaning}") for name, meaning in lacking.items()]
        files, checkpoint = look_at_files(config.model, config.ltx_mode) if "--ltxv2_model" not in lacking else ([], None)
        data = look_at_dataset(config) if "--dataset_config" not in lacking else []
        run = list(look_at_run(config, checkpoint)) if checkpoint is not None and data else []
        sections += [("Model files", files), ("Dataset", data), ("Run", [*required, *run])]
    sections = [section for section in sections if section[1]]
    print(f"{write_report(sections)}\n\n{verdict(sections)}")
    return EXIT_WRONG if any(finding.state == "wrong" for _, findings in sections for finding in findings) else 0


def _with_stand_ins(argv: Sequence[str], prog: str) -> tuple[list[str], dict[str, str]]:
    """The words with something for each flag that training requires and that is not given; and {name: meaning} of those flags."""
    flags = describe(TrainingConfig)
    typed: dict[str, Any] = dict(read_words(argv, flags, prog=prog, description=DESCRIPTION))
    if "config_file" in typed:
        typed |= read_config_file(Path(typed["config_file"][0]), flags)[0]
    lacking = [flag for flag in flags if flag.is_required and flag.key not in typed]
    stand_ins = [word for flag in lacking for word in (flag.name, _stand_in(flag))]
    return [*argv, *stand_ins], {flag.name: flag.meaning for flag in lacking}


def _stand_in(flag: Flag) -> str:
    return flag.choices[0] if flag.choices else _STAND_IN


if __name__ == "__main__":
    run_program(main)
