"""From checked inputs to a run: load, adapt, plan; in the order in which mistakes are cheapest to find."""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.optim import Optimizer

from musubi_tuner.cache.names import TEXT_MASK_KEY
from musubi_tuner.config.losses import LossOptions
from musubi_tuner.config.network import parse_pairs
from musubi_tuner.config.training import OptimizationOptions, TrainingConfig
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.captions import CaptionDropout
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.draws import DrawRules
from musubi_tuner.dataset.items import Draw, Item, largest_items, token_counts
from musubi_tuner.dataset.merge import merge_sources
from musubi_tuner.flow.sigma import SAMPLER_ARGUMENTS, SigmaSettings
from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.networks.whole import TrainedNetwork, WholeTransformer
from musubi_tuner.placement.adapters import network_module
from musubi_tuner.placement.load import LoadedModel, ModelRequest
from musubi_tuner.placement.planning import BatchTokens, state_bytes
from musubi_tuner.placement.prove import load_model
from musubi_tuner.placement.sharding import sharding_is_asked_for
from musubi_tuner.runtime.device import pick_device
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.training.balance import AudioBalance
from musubi_tuner.training.earlier import turn_after
from musubi_tuner.training.facts import banner, file_facts, run_settings
from musubi_tuner.training.full_finetuning import check_sharded, check_whole, make_weight_steps, taken_over_bytes, why_not_streamed
from musubi_tuner.training.hooks import Hook, Preview, Previews, StepLog, Validation, Watching
from musubi_tuner.training.metrics import Trackers
from musubi_tuner.training.objective import BatchObjective, FlowMatching, error_function
from musubi_tuner.training.optimizer import ScheduleOptions, WeightAverage, is_schedule_free, make_optimizer, make_scheduler, try_out
from musubi_tuner.training.preflight import RunInputs, cached_prompt, preview_prompts
from musubi_tuner.training.preservation import PromptPreservation, Teacher, WithTeacher
from musubi_tuner.training.restoring import load_state
from musubi_tuner.training.run import Machine, TrainingRun, WriteWhole, make_schedule
from musubi_tuner.training.saving import Saving
from musubi_tuner.training.state import Watched
from musubi_tuner.training.watch import AudioSupervision
from musubi_tuner.training.weight_steps import gradients_used_up

log = logging.getLogger(__name__)

_TIMESTEP_RANGES = {"std": (0.01, 100.0), "uniform_prob": (0.0, 1.0), "eps": (0.0, 0.1)}


def make_machine(config: TrainingConfig, group: Processes) -> Machine:
    """Device, dtype and trackers."""
    from accelerate import Accelerator

    saving, options = config.saving, config.logging
    asked = config.optimization.mixed_precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    weight_dtype(asked or launched, asked, torch.device("cpu"))  # refused here in words, which accelerate has not for all of them
    accelerator = Accelerator(
        mixed_precision=asked,
        log_with=options.log_with,
        project_dir=str(options.logging_dir or saving.output_dir / "logs") if options.log_with else None,
    )
    device = accelerator.device if config.model.device is None else pick_device(config.model.device)
    return Machine(
        processes=group,
        device=device,
        dtype=weight_dtype(accelerator.mixed_precision, asked, device),
        trackers=Trackers(accelerator, options.log_with, saving.output_name, config.flat()),
    )


def weight_dtype(mixed_precision: str, asked: str | None, device: torch.device) -> torch.dtype:
    """
    Args:
        mixed_precision: accelerate's, which is "no" also where nobody asked for anything.
        asked: by our own flag; None = nothing.
    """
    if mixed_precision == "bf16":
        return torch.bfloat16
    if mixed_precision == "no":
        return torch.bfloat16 if asked is None and device.type == "cuda" else torch.float32
    raise UserError(
        f"mixed precision {mixed_precision!r}: LTX-2 is trained in bf16 (or 'no' for float32). Launch with --mixed_precision bf16."
    )


def build_run(inputs: RunInputs, machine: Machine, write_whole: WriteWhole | None = None) -> TrainingRun:
    """Load the transformer, put the network on it, and restore a state where one is given.

    Args:
        write_whole: as of `TrainingRun`; needed with `--full_finetune`.
    """
    config = inputs.config
    optimization = config.optimization
    rules = draw_rules(inputs, "train", optimization.seed, _caption_dropout(inputs))
    prompt = _prompt_preservation(inputs, machine.device)
    schedule = make_schedule(config, inputs.items, machine.processes.count, has_validation=bool(inputs.validation_items))
    optimizer_args = parse_pairs(optimization.optimizer_args, "--optimizer_args")
    schedule_options = _schedule_options_of(optimization, schedule.total)
    try_out(optimization.optimizer_type, optimization.learning_rate, optimizer_args, schedule_options, machine.device)
    network_module(config.network.network_module)
    whole = config.network.full_finetune
    shards = machine.processes.count if sharding_is_asked_for(trains_model=whole, group=machine.processes) else 1
    if whole:
        assert write_whole is not None, "given by the program"
        check_whole(config, machine)
    if shards > 1:
        check_sharded(inputs)
    balance = AudioBalance(machine.device) if config.audio.audio_balance == "ema" else None
    torch.manual_seed(optimization.seed)  # for what draws without a generator: optimizers, network modules of one's own
    loaded = _load_model(inputs, machine, rules, prompt, shards)
    network = loaded.network
    objective = make_objective(inputs, loaded.wrapper, network, balance=balance, prompt=prompt)
    weight_steps = make_weight_steps(config, optimizer_args, machine, network, shards=shards) if whole else None
    optimizer = _optimizer_of(network, optimization, optimizer_args) if weight_steps is None else weight_steps.optimizer
    scheduler = make_scheduler(optimizer, schedule_options)
    settings = run_settings(inputs, machine, loaded.placement.weight_format)
    average = _average_of(network, optimization, optimizer)
    supervision = AudioSupervision(config.audio)
    with_state: dict[str, Watched | None] = {"supervision": supervision, "balance": balance, "average": average}
    watched = {name: one for name, one in with_state.items() if one is not None}
    start_step = turn = 0
    if config.saving.resume is not None:
        start_step, differences = load_state(
            config.saving.resume,
            network=network,
            optimizer=optimizer,
            scheduler=scheduler,
            settings=settings,
            watched=watched,
            part=machine.processes.index if shards > 1 else 0,
            parts=shards,
        )
        _report_resume(config.saving.resume, start_step, schedule.total, differences)
        turn = turn_after(config.saving, start_step)
    run = TrainingRun(
        config=config,
        processes=machine.processes,
        device=machine.device,
        dtype=machine.dtype,
        wrapper=loaded.wrapper,
        network=network,
        objective=objective,
        optimizer=optimizer,
        weight_steps=weight_steps,
        scheduler=scheduler,
        items=inputs.items,
        rules=rules,
        schedule=schedule,
        start_step=start_step,
        turn=turn,
        settings=settings,
        facts=file_facts(inputs, machine, network),
        write_whole=write_whole if whole else None,
        trackers=machine.trackers,
        balance=balance,
        supervision=supervision,
        average=average,
        watched=watched,
        shards=shards,
        placement=loaded.placement,
        notes=loaded.notes,
    )
    if machine.processes.is_main:
        log.info(banner(inputs, run))
        _warn_of_sound_that_is_not_held(inputs)
    return run


def _schedule_options_of(options: OptimizationOptions, total_steps: int) -> ScheduleOptions:
    return ScheduleOptions(
        name=options.lr_scheduler,
        total_steps=total_steps,
        warmup=options.lr_warmup_steps,
        decay=options.lr_decay_steps,
        class_name=options.lr_scheduler_type,
        args=parse_pairs(options.lr_scheduler_args, "--lr_scheduler_args"),
    )


def _warn_of_sound_that_is_not_held(inputs: RunInputs) -> None:
    config = inputs.config
    if config.ltx_mode == "av" and not config.preservation.audio_dop_weight and not any(item.has_sound for item in inputs.items):
        log.warning(
            "WARNING: --ltx_mode av, and none of the %d items has sound: the video alone is trained, and nothing holds the sound that "
            "goes with it to the base model's. Give --audio_dop_weight 1 for that, or train with --ltx_mode video.",
            len(inputs.items),
        )


def _optimizer_of(network: TrainedNetwork, options: OptimizationOptions, args: Mapping[str, str]) -> Optimizer:
    groups = network.parameter_groups(options.learning_rate, options.audio_learning_rate)
    return make_optimizer(options.optimizer_type, groups, options.learning_rate, args)


def _average_of(network: TrainedNetwork, options: OptimizationOptions, optimizer: Optimizer) -> WeightAverage | None:
    """None without `--ema_decay`.

    Raises:
        UserError: the optimizer averages already.
    """
    if not options.ema_decay:
        return None
    if is_schedule_free(optimizer):
        raise UserError(f"--ema_decay {options.ema_decay:g}: --optimizer_type {options.optimizer_type} averages already; give one of them.")
    return WeightAverage(network.named_parameters(), options.ema_decay)


def make_hooks(run: TrainingRun, inputs: RunInputs, preview: Preview | None) -> tuple[StepLog, list[Hook]]:
    """The log of a run's steps, and what happens between them, in order.

    Raises:
        UserError: the disk has no room for the LoRA.
    """
    beside = 0 if run.write_whole is None else taken_over_bytes(inputs.checkpoint, run.network)
    saving = Saving(run, beside_trained=beside)
    if run.processes.is_main:
        saving.space.check_before()
    step_log = StepLog(run)
    hooks: list[Hook] = [Watching(run), saving]
    if inputs.validation_items:
        together = run.shards > 1  # all processes run all items, as each holds a part of the weights
        items = inputs.validation_items if together else run.processes.share(inputs.validation_items)
        hooks.append(Validation(run, items, draw_rules(inputs, "validation", 0), step_log.report))
    if preview is not None:
        hooks.append(Previews(run, preview, [one.prompt for one in preview_prompts(run.config)]))
    return step_log, hooks


def make_objective(
    inputs: RunInputs,
    wrapper: OfficialLTXV2Wrapper,
    network: TrainedNetwork,
    *,
    balance: AudioBalance | None = None,
    prompt: PromptPreservation | None = None,
) -> BatchObjective:
    """What a run learns, which the trial of its memory plan learns too."""
    losses = inputs.config.losses
    matching = FlowMatching(wrapper, error_function(losses.loss_type, losses.huber_delta))
    if isinstance(network, WholeTransformer):
        return BatchObjective(network=network, objective=matching, balance=balance, prompt=prompt)
    objective = WithTeacher(matching, Teacher(wrapper, network)) if inputs.learns is None else inputs.learns(matching, network)
    return BatchObjective(network=network, objective=objective, balance=balance, prompt=prompt)


def draw_rules(inputs: RunInputs, purpose: str, seed: int, dropped: CaptionDropout | None = None) -> DrawRules:
    """How the items of training, or of validation, are drawn."""
    losses, sound, training = inputs.config.losses, inputs.config.audio, purpose == "train"
    return DrawRules(
        seed=seed,
        purpose=purpose,
        sigma=sigma_settings(losses) if training else SigmaSettings(),  # whose noise is that of all runs; levels are fixed ones
        independent_audio_timestep=losses.independent_audio_timestep,
        weighting_scheme=losses.weighting_scheme if training else "none",
        noise_offset=losses.noise_offset if training else 0.0,
        dropped=dropped if training else None,
        text_features=inputs.config.network.train_connectors,
        video_loss_weight=sound.video_loss_weight,
        audio_loss_weight=1.0 if sound.audio_balance == "ema" and sound.audio_loss_weight else sound.audio_loss_weight,
        recipe=inputs.recipe,
        preserves=training,
        audio_dop_weight=inputs.config.preservation.audio_dop_weight if training else 0.0,
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


def _caption_dropout(inputs: RunInputs) -> CaptionDropout | None:
    """None where every item keeps its caption."""
    losses = inputs.config.losses
    if not (losses.drops_captions or any(spec.caption_dropout_rate for spec in inputs.datasets.datasets)):
        return None
    return CaptionDropout(
        both=losses.caption_dropout_rate,
        video=losses.video_caption_dropout_rate,
        audio=losses.audio_caption_dropout_rate,
        empty=cached_prompt(inputs.datasets, "", inputs.wanted, "dropped captions are replaced by it"),
        video_width=read_config(inputs.checkpoint).video_context_width,
    )


def _prompt_preservation(inputs: RunInputs, device: torch.device) -> PromptPreservation | None:
    """None without `--dop_prompt`."""
    options = inputs.config.preservation
    prompt = options.dop_prompt
    if prompt is None or not options.dop_weight:
        return None
    path = cached_prompt(inputs.datasets, prompt, inputs.wanted, "--dop_prompt needs it", f' --dop_prompt "{prompt}"')
    tensors = merge_sources([path])
    mask = tensors[TEXT_MASK_KEY].bool()
    text_mask = None if bool(mask.all()) else mask[None].to(device)
    return PromptPreservation(text=tensors["text"][None].to(device), text_mask=text_mask, weight=options.dop_weight)


def _load_model(inputs: RunInputs, machine: Machine, rules: DrawRules, prompt: PromptPreservation | None, shards: int) -> LoadedModel:
    config = inputs.config
    model = read_config(inputs.checkpoint)
    largest = largest_items(inputs.items, config.ltx_mode, rules.recipe.keyframes, widths=(model.video_dim, model.audio_dim))
    trial_rules = dataclasses.replace(rules, purpose="trial", recipe=rules.recipe.with_most_keyframes())  # its draws are nobody else's
    batches = [
        make_batch([Draw(item, epoch=0, repeat=repeat) for repeat in range(item.spec.batch_size)], config.ltx_mode, trial_rules)
        for item in largest
    ]

    accumulates = config.optimization.gradient_accumulation_steps > 1

    def trial(wrapper: OfficialLTXV2Wrapper, network: TrainedNetwork) -> float:
        seconds = []
        for batch in batches:
            if not accumulates:
                for parameter in network.parameters():
                    parameter.grad = None
            started = time.perf_counter()
            with gradients_used_up(network.parameters()) if config.optimization.fused_backward_pass else nullcontext():
                make_objective(inputs, wrapper, network, prompt=prompt).backward(batch.to(machine.device))
            if machine.device.type == "cuda":
                torch.cuda.synchronize(machine.device)
            seconds.append(time.perf_counter() - started)
        return seconds[0]

    def tokens_of(item: Item, batch: Batch) -> BatchTokens:
        video, audio = token_counts(item, config.ltx_mode, rules.recipe.keyframes)
        text = CONTEXT_TOKENS if config.network.train_connectors else batch.text.shape[1]
        return BatchTokens(video=video, audio=audio, text=text, clips=item.spec.batch_size)

    sizes = tuple(map(tokens_of, largest, batches))
    request = ModelRequest(
        checkpoint=inputs.checkpoint,
        mode=config.ltx_mode,
        timestep_format=config.mode.ltxv2_timestep_format,
        timestep_rule=config.losses.av_timestep_rule,
        device=machine.device,
        dtype=machine.dtype,
        network=config.network,
        seed=config.optimization.seed,
        shows_references=inputs.shows_references,
        memory=config.memory,
        tokens=sizes[0],
        other_tokens=sizes[1:],
        state_bytes=state_bytes(
            config.optimization.optimizer_type,
            parse_pairs(config.optimization.optimizer_args, "--optimizer_args"),
            averaged=config.optimization.ema_decay > 0,
        ),
        copy_bytes=inputs.copy_bytes,
        accumulates=accumulates or prompt is not None,  # which has a backward pass of its own
        updates_within_backward=config.optimization.fused_backward_pass,
        streams_trained=config.network.full_finetune and why_not_streamed(config, machine.processes.count) is None,
        shards=shards,
        processes=machine.processes,
    )
    return load_model(request, trial)


def _report_resume(path: Path, step: int, total: int, differences: list[str]) -> None:
    if step >= total:
        raise UserError(f"--resume {path}: the state is of step {step}, and the run ends at step {total}. Raise --max_train_steps.")
    log.info("resuming %s at step %d of %d", path, step, total)
    if differences:
        log.warning("WARNING: these settings differ from the saved run, so it will not be the run it would have been:")
        for line in differences:
            log.warning("  %s", line)
