"""Trains a LoRA from caches: `accelerate launch ltxv2_train_network.py`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from musubi_tuner.config.flags import parse
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import run_program

if TYPE_CHECKING:
    import torch

    from musubi_tuner.generation.contexts import EncodePrompts
    from musubi_tuner.ltxv2.weights import Checkpoint
    from musubi_tuner.runtime.processes import Processes
    from musubi_tuner.training.hooks import Preview
    from musubi_tuner.training.preflight import RunInputs
    from musubi_tuner.training.setup import Machine

log = logging.getLogger(__name__)

PROG = "ltxv2_train_network.py"
DESCRIPTION = "Train a LoRA for LTX-2, 2.3 or 2.5 from cached latents and captions."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse_arguments(argv, prog)
    from musubi_tuner.runtime.processes import processes
    from musubi_tuner.training.loop import train
    from musubi_tuner.training.metrics import loss_path, read_losses
    from musubi_tuner.training.preflight import check_inputs, check_output_folder
    from musubi_tuner.training.report import draw_loss_curve, summary
    from musubi_tuner.training.setup import build_run, make_hooks

    config = _resolve(config)
    with processes() as group:
        if group.is_main:
            check_output_folder(config.saving.output_dir)
        inputs = check_inputs(config)
        preview = _previewer(inputs) if group.is_main else None
        machine = make_machine(config, group)
        run = build_run(inputs, machine)
        outcome = train(run, *make_hooks(run, inputs, preview))
        run.trackers.close()
        if group.is_main:
            draw_loss_curve(read_losses(loss_path(run.output_dir, run.name)), run.output_dir / f"{run.name}-loss.png")
            log.info("\n%s", summary(run, outcome))
    return 0


def parse_arguments(argv: Sequence[str], prog: str = PROG) -> TrainingConfig:
    """The command line, checked by itself. Nothing heavy is imported before, so that `--help` is instant."""
    config = parse(TrainingConfig, argv, prog=prog, description=DESCRIPTION)
    from musubi_tuner.training.setup import sigma_settings

    sigma_settings(config.losses)
    return config


def _resolve(config: TrainingConfig) -> TrainingConfig:
    """`--autoresume` and `--network_weights FOLDER` as the newest state and the newest file that they name."""
    from musubi_tuner.networks.reading import newest_file
    from musubi_tuner.training.state import newest_state

    saving, network = config.saving, config.network
    newest = newest_state(saving.output_dir, saving.output_name)
    if saving.autoresume:
        if saving.resume is not None:
            raise UserError(f"--autoresume with --resume {saving.resume}: the first one chooses the state by itself; give one of them.")
        if newest is None:
            log.info("--autoresume: no state of '%s' in %s; the run starts at step 0", saving.output_name, saving.output_dir)
        saving = dataclasses.replace(saving, resume=newest)
    elif newest is not None and saving.resume is None:
        log.warning("WARNING: %s is of an earlier run of this --output_name, whose files this one may overwrite.", newest)
    if network.network_weights is not None:
        network = dataclasses.replace(network, network_weights=newest_file(network.network_weights))
    return dataclasses.replace(config, saving=saving, network=network)


def make_machine(config: TrainingConfig, group: Processes) -> Machine:
    """Device, dtype and trackers."""
    from accelerate import Accelerator

    from musubi_tuner.runtime.device import pick_device
    from musubi_tuner.training.metrics import Trackers
    from musubi_tuner.training.setup import Machine

    saving, options = config.saving, config.logging
    accelerator = Accelerator(
        mixed_precision=config.optimization.mixed_precision,
        log_with=options.log_with,
        project_dir=str(options.logging_dir or saving.output_dir / "logs") if options.log_with else None,
    )
    device = accelerator.device if config.model.device is None else pick_device(config.model.device)
    return Machine(
        processes=group,
        device=device,
        dtype=weight_dtype(accelerator.mixed_precision, config.optimization.mixed_precision, device),
        trackers=Trackers(accelerator, options.log_with, saving.output_name, config.flat()),
    )


def weight_dtype(mixed_precision: str, asked: str | None, device: torch.device) -> torch.dtype:
    """
    Args:
        mixed_precision: accelerate's, which is "no" also where nobody asked for anything.
        asked: by our own flag; None = nothing.
    """
    import torch

    if mixed_precision == "bf16":
        return torch.bfloat16
    if mixed_precision == "no":
        return torch.bfloat16 if asked is None and device.type == "cuda" else torch.float32
    raise UserError(
        f"mixed precision {mixed_precision!r}: LTX-2 is trained in bf16 (or 'no' for float32). Launch with --mixed_precision bf16."
    )


def _previewer(inputs: RunInputs) -> Preview | None:
    """The previews of a run, tried as far as they can be; None where none are asked for."""
    config, datasets = inputs.config, inputs.datasets
    if config.preview.sample_prompts is None:
        return None
    from musubi_tuner.generation.contexts import TextSource
    from musubi_tuner.generation.prepare import ModelFiles
    from musubi_tuner.preview.previewer import make_previewer
    from musubi_tuner.runtime.device import pick_device
    from musubi_tuner.training.setup import sigma_settings

    return make_previewer(
        config.preview,
        ModelFiles.beside(inputs.checkpoint, config.model.vae, config.model.audio_vae),
        TextSource(
            cache_directory=datasets.datasets[0].cache_directory,
            expected=inputs.wanted.text,
            encode=prompt_encoder(config, inputs.checkpoint),
        ),
        mode=config.ltx_mode,
        device=pick_device(config.model.device),
        output_dir=config.saving.output_dir,
        output_name=config.saving.output_name,
        training_sigma=sigma_settings(config.losses),
        reference_factors=datasets.reference_factors,
    )


def prompt_encoder(config: TrainingConfig, checkpoint: Checkpoint) -> EncodePrompts | None:
    """Encodes prompts that were not cached, where `--text_encoder` is given; loads the encoder only when it is called."""
    if config.model.text_encoder is None:
        return None

    def encode(prompts: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        from musubi_tuner.ltxv2.text.pipeline import TextRecipe, encode_prompts
        from musubi_tuner.ltxv2.transformer.load import read_config
        from musubi_tuner.runtime.device import pick_device
        from musubi_tuner.training.preflight import text_encoder_options, text_stage

        recipe = TextRecipe(
            checkpoint=checkpoint,
            config=read_config(checkpoint),
            options=text_encoder_options(config, pick_device(config.model.device)),
            mode=config.ltx_mode,
            stage=text_stage(config),
        )
        return encode_prompts(recipe, prompts)

    return encode


if __name__ == "__main__":
    run_program(main)
