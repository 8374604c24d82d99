"""From a config to a run: load, adapt, plan; in the order in which mistakes are cheapest to find."""

import dataclasses
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.config.dataset import DatasetConfig
from musubi_tuner.config.losses import LossOptions
from musubi_tuner.config.training import TrainingConfig, parse_pairs
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.collate import CaptionDropout, DrawRules, make_batch
from musubi_tuner.dataset.items import Item
from musubi_tuner.dataset.sampler import BatchPlan, Draw
from musubi_tuner.dataset.verify import Wanted
from musubi_tuner.flow.sigma import SAMPLER_ARGUMENTS, SigmaSettings
from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, OfficialLTXV2Wrapper
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.runtime.tables import format_table
from musubi_tuner.training.averaging import WeightAverage
from musubi_tuner.training.balance import AudioBalance
from musubi_tuner.training.loss import error_function, total_loss
from musubi_tuner.training.model import LoadedModel, ModelRequest, load_model
from musubi_tuner.training.optimizer import ScheduleOptions, is_schedule_free, make_optimizer, make_scheduler
from musubi_tuner.training.planning import describe_placement, largest_item
from musubi_tuner.training.preservation import BaseModel
from musubi_tuner.training.prompts import caption_dropout, prompt_preservation
from musubi_tuner.training.references import reference_facts
from musubi_tuner.training.run import Preview, Schedule, TrainingRun
from musubi_tuner.training.state import Watched, load_state
from musubi_tuner.training.step import drawn_levels, item_losses_of_all
from musubi_tuner.training.supervision import AudioSupervision, silence_warning
from musubi_tuner.training.trackers import Trackers
from musubi_tuner.training.validation import Validator

log = logging.getLogger(__name__)

_VALIDATIONS_PER_RUN = 10
_WHERE_ONLY = {
    "output_dir",
    "output_name",
    "logging_dir",
    "log_with",
    "resume",
    "autoresume",
    "device",
    "max_data_loader_n_workers",
    "network_weights",
}
"""Settings that change nothing in the result, so that a resumed run may differ in them."""
_TIMESTEP_RANGES = {"std": (0.01, 100.0), "uniform_prob": (0.0, 1.0), "eps": (0.0, 0.1)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What the entry has found before the transformer is loaded."""

    config: TrainingConfig
    processes: Processes
    device: torch.device
    dtype: torch.dtype
    trackers: Trackers
    checkpoint: Checkpoint
    datasets: DatasetConfig
    items: tuple[Item, ...]
    validation_items: tuple[Item, ...]
    wanted: Wanted
    """What the caches of this run must be."""
    preview: Preview | None


def build_run(inputs: Inputs) -> TrainingRun:
    """Load the transformer, put the network on it, and restore a state where one is given."""
    config = inputs.config
    datasets, wanted = inputs.datasets.datasets, inputs.wanted
    dropped = caption_dropout(config.losses, datasets, wanted, read_config(inputs.checkpoint).video_context_width)
    rules = draw_rules(config, "train", config.optimization.seed, dropped)
    held = prompt_preservation(config.preservation, datasets, wanted, inputs.device)
    loaded = _load_model(inputs, rules)
    wrapper, network = loaded.wrapper, loaded.network
    schedule = make_schedule(config, inputs.items, inputs.processes.count, has_validation=bool(inputs.validation_items))
    optimization = config.optimization
    optimizer = make_optimizer(
        optimization.optimizer_type,
        network.parameter_groups(optimization.learning_rate, optimization.audio_learning_rate),
        optimization.learning_rate,
        parse_pairs(optimization.optimizer_args, "--optimizer_args"),
    )
    scheduler = make_scheduler(
        optimizer,
        ScheduleOptions(
            name=optimization.lr_scheduler,
            total_steps=schedule.total,
            warmup=optimization.lr_warmup_steps,
            decay=optimization.lr_decay_steps,
            class_name=optimization.lr_scheduler_type,
            args=parse_pairs(optimization.lr_scheduler_args, "--lr_scheduler_args"),
        ),
    )
    settings = _settings(config, inputs, loaded.placement.weight_format)
    start_step = 0
    balance = AudioBalance(inputs.device) if config.sound.audio_balance == "ema" else None
    supervision = AudioSupervision(config.sound)
    if optimization.ema_decay and is_schedule_free(optimizer):
        raise UserError(
            f"--ema_decay {optimization.ema_decay:g}: --optimizer_type {optimization.optimizer_type} averages already; give one."
        )
    average = WeightAverage(network.named_parameters(), optimization.ema_decay) if optimization.ema_decay else None
    with_state: dict[str, Watched | None] = {"supervision": supervision, "balance": balance, "average": average}
    watched = {name: one for name, one in with_state.items() if one is not None}
    if config.saving.resume is not None:
        start_step, differences = load_state(
            config.saving.resume, network=network, optimizer=optimizer, scheduler=scheduler, settings=settings, watched=watched
        )
        _report_resume(config.saving.resume, start_step, schedule.total, differences)
    validator = None
    if inputs.validation_items:
        validator = Validator(
            items=inputs.processes.share(inputs.validation_items),
            mode=config.ltx_mode,
            rules=draw_rules(config, "validation", 0),
            device=inputs.device,
            processes=inputs.processes.count,
        )
    run = TrainingRun(
        config=config,
        processes=inputs.processes,
        device=inputs.device,
        wrapper=wrapper,
        network=network,
        optimizer=optimizer,
        scheduler=scheduler,
        items=inputs.items,
        rules=rules,
        schedule=schedule,
        start_step=start_step,
        settings=settings,
        facts=_facts(inputs, network),
        trackers=inputs.trackers,
        error=error_function(config.losses.loss_type, config.losses.huber_delta),
        balance=balance,
        supervision=supervision,
        watched=watched,
        average=average,
        base=BaseModel(wrapper, network),
        prompt_preservation=held,
        passes=loaded.placement.passes,
        preview=inputs.preview,
        validator=validator,
    )
    if inputs.processes.is_main:
        log.info(banner(inputs, run, loaded))
        if (warning := silence_warning(inputs.items, config.ltx_mode, config.preservation.audio_dop_weight)) is not None:
            log.warning("WARNING: %s", warning)
    return run


def draw_rules(config: TrainingConfig, purpose: str, seed: int, dropped: CaptionDropout | None = None) -> DrawRules:
    losses, sound = config.losses, config.sound
    training = purpose == "train"
    return DrawRules(
        seed=seed,
        purpose=purpose,
        sigma=sigma_settings(losses),
        independent_audio_timestep=losses.independent_audio_timestep,
        weighting_scheme=losses.weighting_scheme if training else "none",
        noise_offset=losses.noise_offset if training else 0.0,
        dropped=dropped if training else None,
        text_features=config.network.train_connectors,
        video_loss_weight=sound.video_loss_weight,
        audio_loss_weight=sound.audio_loss_weight,
        recipe=config.recipe,
        preserves=training,
        audio_dop_weight=config.preservation.audio_dop_weight if training else 0.0,
    )


def sigma_settings(losses: LossOptions) -> SigmaSettings:
    """
    Raises:
        UserError: an unknown key of `--timestep_args`, or a value that is no number.
    """
    known = SAMPLER_ARGUMENTS[losses.timestep_sampling]
    values = {}
    for key, text in parse_pairs(losses.timestep_args, "--timestep_args").items():
        if key not in known:
            raise UserError(
                f"--timestep_args {key}={text}: unknown to --timestep_sampling {losses.timestep_sampling}; known are "
                f"{', '.join(known) or 'none'}."
            )
        try:
            values[key] = float(text)
        except ValueError:
            raise UserError(f"--timestep_args {key}={text}: must be a number.") from None
        least, most = _TIMESTEP_RANGES.get(key, (-math.inf, math.inf))
        if not least <= values[key] <= most:
            raise UserError(f"--timestep_args {key}={text}: must be within {least:g} and {most:g}.")
    low, high = losses.min_timestep / 1000, losses.max_timestep / 1000
    return SigmaSettings(kind=losses.timestep_sampling, low=low, high=high, **values)


def make_schedule(config: TrainingConfig, items: tuple[Item, ...], processes: int, *, has_validation: bool) -> Schedule:
    """When the run ends, saves, validates and previews."""
    optimization, saving, preview = config.optimization, config.saving, config.preview
    batches = BatchPlan(items, optimization.seed).batches_per_epoch
    steps_per_epoch = batches / (optimization.gradient_accumulation_steps * processes)
    total = optimization.max_train_steps
    if optimization.max_train_epochs is not None:
        total = max(1, -(-optimization.max_train_epochs * batches // (optimization.gradient_accumulation_steps * processes)))
    every = config.logging.validate_every_n_steps or max(1, total // _VALIDATIONS_PER_RUN)
    return Schedule(
        total=total,
        steps_per_epoch=steps_per_epoch,
        save_every=saving.save_every_n_steps,
        save_every_epochs=saving.save_every_n_epochs,
        validate_every=every if has_validation else None,
        preview_every=preview.sample_every_n_steps,
        preview_every_epochs=preview.sample_every_n_epochs,
        preview_first=preview.sample_at_first,
        log_every=config.logging.log_every_n_steps,
    )


def _load_model(inputs: Inputs, rules: DrawRules) -> LoadedModel:
    config = inputs.config
    batch = _largest_batch(inputs, rules)

    def trial(wrapper: OfficialLTXV2Wrapper, network: LoRANetwork, passes: int) -> float:
        batches = [batch.to(inputs.device)] * passes
        started = time.perf_counter()
        with network.dropout(batch.dropout_seeds if passes == 1 else ()):
            base = BaseModel(wrapper, network)
            batches = [base.with_imagined_sound(one) for one in batches]
            losses = item_losses_of_all(wrapper, batches, [drawn_levels(one) for one in batches], base=base)
            sum(total_loss(one, batches[0].video_weight, batches[0].audio_weight) for one in losses).backward()
        for parameter in network.parameters():
            parameter.grad = None
        if inputs.device.type == "cuda":
            torch.cuda.synchronize(inputs.device)
        return time.perf_counter() - started

    request = ModelRequest(
        config=config,
        checkpoint=inputs.checkpoint,
        device=inputs.device,
        dtype=inputs.dtype,
        items=inputs.items,
        text_tokens=CONTEXT_TOKENS if config.network.train_connectors else batch.text.shape[1],
        processes=inputs.processes,
    )
    return load_model(request, trial)


def _largest_batch(inputs: Inputs, rules: DrawRules) -> Batch:
    """The batch that a plan must hold, from real caches; its draws are nobody else's."""
    largest = largest_item(inputs.items, inputs.config.ltx_mode)
    draws = [Draw(largest, epoch=0, repeat=repeat) for repeat in range(largest.spec.batch_size)]
    return make_batch(draws, inputs.config.ltx_mode, dataclasses.replace(rules, purpose="trial"))


def _settings(config: TrainingConfig, inputs: Inputs, weight_format: str | None) -> dict[str, Any]:
    """Flags and facts that shape the result, as plain JSON values."""
    values: dict[str, Any] = {}
    sections = (config.mode, config.network, config.losses, config.sound, config.preservation, config.optimization, config.saving)
    for section in sections:
        for field in dataclasses.fields(section):
            if field.name not in _WHERE_ONLY and not field.name.startswith("save_"):
                values[field.name] = getattr(section, field.name)
    values |= {"dtype": str(inputs.dtype), "weight_format": weight_format, "processes": inputs.processes.count, "items": len(inputs.items)}
    values["model"] = inputs.checkpoint.path.name
    values["conditioning"] = config.recipe.describe()
    return json.loads(json.dumps(values, default=str))


def _facts(inputs: Inputs, network: LoRANetwork) -> dict[str, object]:
    config = inputs.config
    version = detect_version(inputs.checkpoint)
    adapted = [stream for stream, count in network.count_by_stream().items() if count]
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"ltx-{version}/lora",
        "modelspec.implementation": "https://github.com/Lightricks/LTX-2",
        "modelspec.title": config.saving.output_name,
        "ss_base_model_version": f"ltx-{version}",
        "ss_sd_model_name": inputs.checkpoint.path.name,
        "ss_network_module": config.network.network_module,
        "ss_network_dim": config.network.network_dim,
        "ss_network_alpha": config.network.network_alpha,
        "ss_network_args": list(config.network.network_args),
        "ltxv2_network_type": network.kind,
        "ltxv2_network_shape": network.describe(),
        "ltxv2_network_scaling": "folded into the tensors; there is no alpha to apply",
        "ltxv2_base_weights": [f"{path.name} x {strength:g}" for path, strength in config.network.base_networks],
        "ss_learning_rate": config.optimization.learning_rate,
        "ltxv2_audio_learning_rate": config.optimization.audio_learning_rate,
        "ss_optimizer": config.optimization.optimizer_type,
        "ss_lr_scheduler": config.optimization.lr_scheduler,
        "ss_max_train_steps": config.optimization.max_train_steps,
        "ss_gradient_accumulation_steps": config.optimization.gradient_accumulation_steps,
        "ss_seed": config.optimization.seed,
        "ss_num_train_items": len(inputs.items),
        "ss_mixed_precision": str(inputs.dtype).removeprefix("torch."),
        "ltxv2_mode": config.ltx_mode,
        "ltxv2_adapted_streams": ",".join(adapted),
        "ltxv2_timestep_format": str(config.mode.ltxv2_timestep_format),
        "ltxv2_timestep_sampling": config.losses.timestep_sampling,
        "ltxv2_timestep_args": list(config.losses.timestep_args),
        "ltxv2_timestep_range": [config.losses.min_timestep, config.losses.max_timestep],
        "ltxv2_loss_type": config.losses.loss_type,
        "ltxv2_weighting_scheme": config.losses.weighting_scheme,
        "ltxv2_audio_balance": config.sound.audio_balance,
        "ltxv2_independent_audio_timestep": config.losses.independent_audio_timestep,
        "ltxv2_av_timestep_rule": config.losses.av_timestep_rule,
        "ltxv2_video_loss_weight": config.sound.video_loss_weight,
        "ltxv2_audio_loss_weight": config.sound.audio_loss_weight,
        "ltxv2_dop_prompt": "" if config.preservation.dop_prompt is None else config.preservation.dop_prompt,
        "ltxv2_dop_weight": config.preservation.dop_weight if config.preservation.dop_prompt is not None else 0.0,
        "ltxv2_audio_dop_weight": config.preservation.audio_dop_weight,
        "ltxv2_ema_decay": config.optimization.ema_decay,
        "ltxv2_conditioning": config.recipe.describe(),
        **reference_facts(config.recipe, inputs.datasets),
    }


def _report_resume(path: Path, step: int, total: int, differences: list[str]) -> None:
    if step >= total:
        raise UserError(f"--resume {path}: the state is of step {step}, and the run ends at step {total}. Raise --max_train_steps.")
    log.info("resuming %s at step %d of %d", path, step, total)
    if differences:
        log.warning("WARNING: these settings differ from the saved run, so it will not be the run it would have been:")
        for line in differences:
            log.warning("  %s", line)


def banner(inputs: Inputs, run: TrainingRun, loaded: LoadedModel) -> str:
    """What is about to be trained, in one table."""
    config = inputs.config
    streams = ", ".join(f"{count} {stream}" for stream, count in run.network.count_by_stream().items() if count)
    heard = sum(item.clip.has_audio for item in inputs.items)
    parameters = sum(p.numel() for p in run.network.parameters())
    rows = [
        (
            "model",
            f"{inputs.checkpoint.path.name}: LTX-{detect_version(inputs.checkpoint)}, mode {config.ltx_mode}, {inputs.dtype}".replace(
                "torch.", ""
            ),
        ),
        ("network", f"{run.network.describe()}, {streams} linears, {parameters:,} parameters"),
        *[("merged first", f"{path.name} x {strength:g}") for path, strength in config.network.base_networks],
        ("items", f"{len(inputs.items)} in {len({item.bucket for item in inputs.items})} bucket(s), {heard} with sound"),
        ("held out", f"{len(inputs.validation_items)} items" if inputs.validation_items else "none"),
        (
            "run",
            f"{run.schedule.total} steps, {run.schedule.steps_per_epoch:.4g} steps an epoch, {run.processes.count} "
            f"process(es), {inputs.device}",
        ),
    ]
    rows += [*describe_placement(loaded.placement, inputs.dtype), *loaded.notes]
    return format_table(rows, ("training", ""))
