"""Trains a LoRA from caches: `accelerate launch ltxv2_train_network.py`."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.flags import parse
from musubi_tuner.config.training import TrainingConfig, check_training_config
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import run_program

if TYPE_CHECKING:
    import torch

    from musubi_tuner.generation.contexts import EncodePrompts
    from musubi_tuner.ltxv2.weights import Checkpoint
    from musubi_tuner.runtime.processes import Processes
    from musubi_tuner.training.inputs import Inputs

log = logging.getLogger(__name__)

PROG = "ltxv2_train_network.py"
DESCRIPTION = "Train a LoRA for LTX-2, 2.3 or 2.5 from cached latents and captions."


def parse_arguments(argv: Sequence[str], prog: str = PROG) -> TrainingConfig:
    config = parse(TrainingConfig, argv, prog=prog, description=DESCRIPTION)
    check_training_config(config)
    from musubi_tuner.training.setup import sigma_settings

    sigma_settings(config.losses)
    return config


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse_arguments(argv, prog)
    from musubi_tuner.runtime.processes import processes
    from musubi_tuner.training.loop import train
    from musubi_tuner.training.metrics import loss_path, read_losses
    from musubi_tuner.training.report import draw_loss_curve, summary
    from musubi_tuner.training.setup import build_run

    config = _with_newest_network(_with_newest_state(config))
    with processes() as group:
        run = build_run(_gather_inputs(config, group))
        outcome = train(run)
        run.trackers.close()
        if group.is_main:
            draw_loss_curve(read_losses(loss_path(run.output_dir, run.name)), run.output_dir / f"{run.name}-loss.png")
            log.info("\n%s", summary(run, outcome))
    return 0


def _with_newest_state(config: TrainingConfig) -> TrainingConfig:
    """What `--autoresume` means, said as `--resume`."""
    from musubi_tuner.training.state import newest_state

    saving = config.saving
    found = newest_state(saving.output_dir, saving.output_name)
    if not saving.autoresume:
        if found is not None and saving.resume is None:
            log.warning("WARNING: %s is of an earlier run of this --output_name, whose files this one may overwrite.", found)
        return config
    if found is None:
        log.info("--autoresume: no state of '%s' in %s; the run starts at step 0", saving.output_name, saving.output_dir)
    return dataclasses.replace(config, saving=dataclasses.replace(saving, resume=found))


def _with_newest_network(config: TrainingConfig) -> TrainingConfig:
    """`--network_weights FOLDER` said as its newest file, so that what lies beside that file and in its metadata is found."""
    from musubi_tuner.networks.reading import newest_file

    network = config.network
    if network.network_weights is None:
        return config
    return dataclasses.replace(config, network=dataclasses.replace(network, network_weights=newest_file(network.network_weights)))


def _gather_inputs(config: TrainingConfig, group: Processes) -> Inputs:
    """Everything that can go wrong without the transformer's weights goes wrong here."""
    from accelerate import Accelerator

    from musubi_tuner.dataset.items import list_items
    from musubi_tuner.dataset.verify import verify_caches
    from musubi_tuner.ltxv2.transformer.load import read_config
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import pick_device
    from musubi_tuner.training.caches import wanted_caches
    from musubi_tuner.training.inputs import Inputs
    from musubi_tuner.training.references import check_reference_factors, check_references
    from musubi_tuner.training.trackers import Trackers

    if group.is_main:
        _check_output_folder(config.saving.output_dir)
    logging_options = config.logging
    accelerator = Accelerator(
        mixed_precision=config.optimization.mixed_precision,
        log_with=logging_options.log_with,
        project_dir=str(logging_options.logging_dir or config.saving.output_dir / "logs") if logging_options.log_with else None,
    )
    checkpoint = open_checkpoint(config.model.ltxv2_model)
    datasets = load_dataset_config(config.mode.dataset_config)
    mode = config.ltx_mode
    items = list_items(datasets.datasets, mode, config.mode.dataset_config)
    validation_items = list_items(datasets.validation_datasets, mode, config.mode.dataset_config) if datasets.validation_datasets else ()
    if logging_options.validate_every_n_steps and not validation_items:
        log.warning("WARNING: --validate_every_n_steps: nothing is held out; %s has no [[validation_datasets]]", config.mode.dataset_config)
    check_references(config.recipe, items, config.mode.dataset_config)
    if config.network.network_weights is not None and config.network.network_weights.is_file():
        check_reference_factors(config.network.network_weights, config.recipe, datasets)
    wanted = wanted_caches(config, checkpoint, read_config(checkpoint))
    verify_caches((*items, *validation_items), wanted)
    preview = None
    if config.preview.wanted and config.preview.sample_prompts is None:
        log.warning("WARNING: no previews: %s is given without --sample_prompts FILE", config.preview.wanted)
    if config.preview.sample_prompts is not None and group.is_main:
        from musubi_tuner.preview.previewer import make_previewer

        preview = make_previewer(config, checkpoint, datasets, _prompt_encoder(config, checkpoint), wanted_text=wanted.text)
    device = accelerator.device if config.model.device is None else pick_device(config.model.device)
    return Inputs(
        config=config,
        processes=group,
        device=device,
        dtype=_weight_dtype(accelerator.mixed_precision, config.optimization.mixed_precision, device),
        trackers=Trackers(accelerator, logging_options.log_with, config.saving.output_name, config.flat()),
        checkpoint=checkpoint,
        datasets=datasets,
        items=items,
        validation_items=validation_items,
        wanted=wanted,
        preview=preview,
    )


def _check_output_folder(folder: Path) -> None:
    """Write a byte there now, so that a folder that takes none is known before hours are spent.

    Raises:
        UserError: it takes none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written into ({error}). Choose another, or mend its permissions.") from error


def _prompt_encoder(config: TrainingConfig, checkpoint: Checkpoint) -> EncodePrompts | None:
    """Encodes prompts that were not cached, where `--text_encoder` is given; loads the encoder only when it is called."""
    if config.model.text_encoder is None:
        return None

    def encode(prompts: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        from musubi_tuner.ltxv2.text.encoders import encoder_options
        from musubi_tuner.ltxv2.text.pipeline import TextRecipe, encode_prompts
        from musubi_tuner.ltxv2.transformer.load import read_config
        from musubi_tuner.runtime.device import pick_device
        from musubi_tuner.training.caches import text_stage

        model = config.model
        options = encoder_options(
            model.text_encoder,
            tokenizer=model.tokenizer,
            backend=model.text_encoder_backend or "gemma",
            device=pick_device(model.device),
            max_length=model.max_length,
        )
        recipe = TextRecipe(
            checkpoint=checkpoint, config=read_config(checkpoint), options=options, mode=config.ltx_mode, stage=text_stage(config)
        )
        return encode_prompts(recipe, prompts)

    return encode


def _weight_dtype(mixed_precision: str, asked: str | None, device: torch.device) -> torch.dtype:
    """
    Args:
        mixed_precision: accelerate's, which is "no" also where nobody said so.
        asked: of our own flag; None = nothing.
    """
    import torch

    if mixed_precision == "bf16":
        return torch.bfloat16
    if mixed_precision == "no":
        return torch.bfloat16 if asked is None and device.type == "cuda" else torch.float32
    raise UserError(
        f"mixed precision {mixed_precision!r}: LTX-2 is trained in bf16 (or 'no' for float32). Launch with --mixed_precision bf16."
    )


if __name__ == "__main__":
    run_program(main)
