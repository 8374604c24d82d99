"""Trains a LoRA from caches: `accelerate launch ltxv2_train_network.py`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from musubi_tuner.config.flags import parse, without_secrets
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.runtime.program import EXIT_INTERRUPTED, EXIT_NOT_ALL, command_line, quoted, run_program

if TYPE_CHECKING:
    from musubi_tuner.preview.previewer import Previewer
    from musubi_tuner.training.preflight import RunInputs

log = logging.getLogger(__name__)

PROG = "ltxv2_train_network.py"
DESCRIPTION = "Train a LoRA for LTX-2, 2.3 or 2.5 from cached latents and captions."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse_arguments(argv, prog)
    from musubi_tuner.training.preflight import check_inputs

    return run(config, argv, prog, check_inputs)


def run(config: TrainingConfig, argv: Sequence[str], prog: str, check: Callable[[TrainingConfig], RunInputs]) -> int:
    """Train, and return the exit code.

    Args:
        argv, prog: the command as it was typed.
        check: makes everything fail that can fail without the transformer's weights, and says what is trained on what.

    Raises:
        UserError: whatever stands in the way.
    """
    argv = without_secrets(argv, type(config))
    sys.argv[1:] = without_secrets(sys.argv[1:], type(config))  # which trackers keep with the run
    from musubi_tuner.conversion.checkpoint.trained import writer_of_trained
    from musubi_tuner.runtime.processes import processes
    from musubi_tuner.runtime.signals import leave
    from musubi_tuner.training.earlier import clear_earlier, nothing_left, owned_output, resolve_newest, tell_of_later
    from musubi_tuner.training.loop import train
    from musubi_tuner.training.metrics import loss_path
    from musubi_tuner.training.publishing import Publishing
    from musubi_tuner.training.report import summary
    from musubi_tuner.training.reporting import Reporting, write_page_of
    from musubi_tuner.training.rescue import Restart, rescue
    from musubi_tuner.training.run import Outcome
    from musubi_tuner.training.setup import build_run, make_hooks, make_machine

    with processes() as group, owned_output(config.saving, group):
        config = resolve_newest(config)
        inputs = check(config)
        if nothing_left(inputs, group):
            if group.is_main and loss_path(config.saving.output_dir, config.saving.output_name).is_file():
                write_page_of(config.saving.output_dir)  # a run that was killed at its last save has not
            return 0
        preview = make_preview(inputs) if group.is_main else None
        publishing = Publishing(config) if group.is_main and config.hub.huggingface_repo_id is not None else None
        run = build_run(inputs, make_machine(config, group), writer_of_trained(inputs.checkpoint))
        if group.is_main:
            clear_earlier(config.saving)
            tell_of_later(config.saving, run.start_step)
        outcome, restart = Outcome(step=run.start_step), Restart(prog, argv, config.saving.autoresume)
        reporting = Reporting(run, inputs, command_line(prog, argv))
        with reporting.kept(outcome), rescue(run, outcome, restart):
            step_log, hooks = make_hooks(run, inputs, preview)
            train(run, outcome, step_log, [*hooks, reporting, *filter(None, [publishing])])
        run.trackers.close()
    uploaded = publishing.finish(outcome) if publishing is not None else []  # no other process waits for it
    if group.is_main:
        log.info("\n%s", summary(run, outcome, restart, uploaded))
    if outcome.interrupted:
        if publishing is not None and publishing.is_busy:
            leave(EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    elsewhere = any(file.parent != run.output_dir for file in outcome.files)
    return EXIT_NOT_ALL if elsewhere or (publishing is not None and not publishing.is_complete) else 0


def parse_arguments(argv: Sequence[str], prog: str = PROG) -> TrainingConfig:
    """The command line, checked by itself. Nothing heavy is imported before, so that `--help` is instant."""
    config = parse(TrainingConfig, argv, prog=prog, description=DESCRIPTION)
    from musubi_tuner.training.setup import sigma_settings

    sigma_settings(config.losses)
    return config


def make_preview(inputs: RunInputs) -> Previewer | None:
    """The previews of a run, tried as far as they can be before the transformer is loaded; None where none are asked for."""
    config, datasets = inputs.config, inputs.datasets
    if config.preview.sample_prompts is None:
        return None
    from musubi_tuner.generation.contexts import TextSource
    from musubi_tuner.generation.prepare import ModelFiles
    from musubi_tuner.placement.text import encode_prompts
    from musubi_tuner.preview.previewer import make_previewer
    from musubi_tuner.runtime.device import pick_device
    from musubi_tuner.training.preflight import text_recipe
    from musubi_tuner.training.setup import sigma_settings

    device = pick_device(config.model.device)
    encode = None
    if config.model.text_encoder is not None:  # for prompts that were not cached; loads the encoder only when it is called
        encode = partial(encode_prompts, text_recipe(config, inputs.checkpoint, device))
    program = "ltxv2_cache_text_encoder_outputs.py"
    command = f"python {program} {inputs.wanted.arguments[program]} --sample_prompts {quoted(config.preview.sample_prompts)}"
    return make_previewer(
        config.preview,
        ModelFiles.beside(inputs.checkpoint, config.model.vae, config.model.audio_vae),
        TextSource(cache_directory=datasets.datasets[0].cache_directory, expected=inputs.wanted.text, encode=encode, command=command),
        mode=config.ltx_mode,
        device=device,
        output_dir=config.saving.output_dir,
        output_name=config.saving.output_name,
        training_sigma=sigma_settings(config.losses),
        reference_factors=datasets.reference_factors,
    )


if __name__ == "__main__":
    run_program(main)
