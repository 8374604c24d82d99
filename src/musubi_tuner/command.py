"""The installed command `ltxv2`: `ltxv2 train ...` is `ltxv2_train_network.py ...`, and so on."""

import importlib
from collections.abc import Sequence

from musubi_tuner.config.flags import VERSION
from musubi_tuner.config.validation import nearest
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import run_program

COMMANDS = {
    "cache": "ltxv2_cache_all",
    "cache-latents": "ltxv2_cache_latents",
    "cache-audio": "ltxv2_cache_audio_latents",
    "cache-text": "ltxv2_cache_text_encoder_outputs",
    "train": "ltxv2_train_network",
    "generate": "ltxv2_generate_video",
    "cache-rollouts": "ltxv2_cache_rollouts",
    "score-rollouts": "ltxv2_score_rollouts",
    "train-rl": "ltxv2_train_rl",
    "rl-rounds": "ltxv2_rl_rounds",
    "report": "ltxv2_report",
    "dataset": "ltxv2_dataset",
    "lora": "ltxv2_lora",
    "checkpoint": "ltxv2_checkpoint",
    "import-precomputed": "ltxv2_import_precomputed",
    "adopt": "ltxv2_adopt_caches",
    "doctor": "ltxv2_doctor",
    "make-tiny": "make_tiny",
}
"""Modules of this package that have `main`, `PROG` and `DESCRIPTION`."""


def dispatch(argv: Sequence[str]) -> int:
    """Run the program that the first word names, with the other words.

    Raises:
        UserError: there is no such command.
    """
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: ltxv2 COMMAND [flags]\n")
        for command, module in COMMANDS.items():
            print(f"  {command:<20}{importlib.import_module(f'musubi_tuner.{module}').DESCRIPTION.partition(': ')[0].rstrip('.')}")
        print("\nltxv2 COMMAND --help shows a command's usual flags, --help_all all of them; ltxv2 --version the version.")
        return 0
    if name == "--version":
        print(VERSION)
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'.{nearest(name, COMMANDS)}\nltxv2 --help lists the commands.")
    return importlib.import_module(f"musubi_tuner.{COMMANDS[name]}").main(rest, prog=f"ltxv2 {name}")


def main() -> None:
    run_program(dispatch)


if __name__ == "__main__":
    main()
