"""From a config to a run: load, adapt, plan; in the order in which mistakes are cheapest to find."""

import dataclasses
import logging
import math
import time
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from musubi_tuner.config.losses import LossOptions
from musubi_tuner.config.network import parse_pairs
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.collate import CaptionDropout, DrawRules, make_batch
from musubi_tuner.dataset.items import Item
from musubi_tuner.dataset.sampler import BatchPlan, Draw
from musubi_tuner.flow.sigma import SAMPLER_ARGUMENTS, SigmaSettings
from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, OfficialLTXV2Wrapper
from musubi_tuner.placement.model import LoadedModel, ModelRequest, load_model
from musubi_tuner.placement.planning import largest_item
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.averaging import WeightAverage
from musubi_tuner.training.balance import AudioBalance
from musubi_tuner.training.facts import banner, file_facts, run_settings
from musubi_tuner.training.inputs import Inputs
from musubi_tuner.training.loss import error_function, total_loss
from musubi_tuner.training.optimizer import ScheduleOptions, is_schedule_free, make_optimizer, make_scheduler
from musubi_tuner.training.preservation import BaseModel
from musubi_tuner.training.prompts import caption_dropout, prompt_preservation
from musubi_tuner.training.run import Schedule, TrainingRun
from musubi_tuner.training.state import Watched, load_state
from musubi_tuner.training.step import drawn_levels, item_losses_of_all
from musubi_tuner.training.supervision import AudioSupervision, silence_warning
from musubi_tuner.training.validation import Validator

log = logging.getLogger(__name__)

_VALIDATIONS_PER_RUN = 10
_TIMESTEP_RANGES = {"std": (0.01, 100.0), "uniform_prob": (0.0, 1.0), "eps": (0.0, 0.1)}


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
    optimizer = _make_optimizer(config, network)
    scheduler = _make_scheduler(config, optimizer, schedule.total)
    settings = run_settings(inputs, loaded.placement.weight_format)
    start_step = 0
    balance = AudioBalance(inputs.device) if config.sound.audio_balance == "ema" else None
    supervision = AudioSupervision(config.sound)
    average = _make_average(config, network, optimizer)
    with_state: dict[str, Watched | None] = {"supervision": supervision, "balance": balance, "average": average}
    watched = {name: one for name, one in with_state.items() if one is not None}
    if config.saving.resume is not None:
        start_step, differences = load_state(
            config.saving.resume, network=network, optimizer=optimizer, scheduler=scheduler, settings=settings, watched=watched
        )
        _report_resume(config.saving.resume, start_step, schedule.total, differences)
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
        facts=file_facts(inputs, network),
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
        validator=_make_validator(inputs),
    )
    if inputs.processes.is_main:
        log.info(banner(inputs, run, loaded))
        if (warning := silence_warning(inputs.items, config.ltx_mode, config.preservation.audio_dop_weight)) is not None:
            log.warning("WARNING: %s", warning)
    return run


def _make_optimizer(config: TrainingConfig, network: LoRANetwork) -> Optimizer:
    optimization = config.optimization
    return make_optimizer(
        optimization.optimizer_type,
        network.parameter_groups(optimization.learning_rate, optimization.audio_learning_rate),
        optimization.learning_rate,
        parse_pairs(optimization.optimizer_args, "--optimizer_args"),
    )


def _make_scheduler(config: TrainingConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    optimization = config.optimization
    options = ScheduleOptions(
        name=optimization.lr_scheduler,
        total_steps=total_steps,
        warmup=optimization.lr_warmup_steps,
        decay=optimization.lr_decay_steps,
        class_name=optimization.lr_scheduler_type,
        args=parse_pairs(optimization.lr_scheduler_args, "--lr_scheduler_args"),
    )
    return make_scheduler(optimizer, options)


def _make_average(config: TrainingConfig, network: LoRANetwork, optimizer: Optimizer) -> WeightAverage | None:
    decay = config.optimization.ema_decay
    if not decay:
        return None
    if is_schedule_free(optimizer):
        raise UserError(f"--ema_decay {decay:g}: --optimizer_type {config.optimization.optimizer_type} averages already; give one of them.")
    return WeightAverage(network.named_parameters(), decay)


def _make_validator(inputs: Inputs) -> Validator | None:
    if not inputs.validation_items:
        return None
    return Validator(
        items=inputs.processes.share(inputs.validation_items),
        mode=inputs.config.ltx_mode,
        rules=draw_rules(inputs.config, "validation", 0),
        device=inputs.device,
        processes=inputs.processes.count,
    )


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
        with network.dropout([batch.dropout_seeds] * passes):
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


def _report_resume(path: Path, step: int, total: int, differences: list[str]) -> None:
    if step >= total:
        raise UserError(f"--resume {path}: the state is of step {step}, and the run ends at step {total}. Raise --max_train_steps.")
    log.info("resuming %s at step %d of %d", path, step, total)
    if differences:
        log.warning("WARNING: these settings differ from the saved run, so it will not be the run it would have been:")
        for line in differences:
            log.warning("  %s", line)
