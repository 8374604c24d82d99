"""What a run says of itself: settings for its state, entries for its file's metadata, the table before its first step."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch

from musubi_tuner import __version__
from musubi_tuner.cache.store import canonical, read_metadata, text_fingerprint
from musubi_tuner.dataset.items import Item
from musubi_tuner.ltxv2.versions import detect_version, looks_distilled, transformer_names
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.scales import FOLDED
from musubi_tuner.networks.whole import TrainedNetwork, WholeTransformer
from musubi_tuner.placement.planning import describe_placement
from musubi_tuner.runtime.tables import format_table
from musubi_tuner.training.preflight import RunInputs, reference_facts
from musubi_tuner.training.run import Machine, TrainingRun, make_schedule

_WHERE_ONLY = {
    "output_dir",
    "output_name",
    "logging_dir",
    "log_with",
    "resume",
    "autoresume",
    "overwrite",
    "device",
    "max_data_loader_n_workers",
    "network_weights",
}
"""Settings that change nothing in the result, so that a resumed run may differ in them."""


_OF_DATASETS = ("batch_size", "num_repeats", "video_loss_weight", "audio_loss_weight", "preserve_base", "caption_dropout_rate")
"""Keys of a dataset that no cache file tells of."""


def run_settings(inputs: RunInputs, machine: Machine, weight_format: str | None) -> dict[str, Any]:
    """Flags and facts that shape the result, as plain JSON values."""
    config = inputs.config
    values: dict[str, Any] = {}
    sections = (config.mode, config.network, config.losses, config.audio, config.preservation, config.optimization, config.saving)
    for section in sections:
        for field in dataclasses.fields(section):
            if field.name not in _WHERE_ONLY and not field.name.startswith("save_"):
                values[field.name] = getattr(section, field.name)
    values |= {"dtype": str(machine.dtype), "weight_format": weight_format}
    values |= {"processes": machine.processes.count, "items": len(inputs.items)}
    values |= {"datasets": _drawn_as(inputs.items), "clips": _identity(inputs.items)}
    values |= {"model": inputs.checkpoint.path.name, "weights": _weights(inputs.checkpoint)}
    values["conditioning"] = inputs.recipe.describe()
    values |= inputs.learned_by
    return json.loads(json.dumps(values, default=str))


def _weights(checkpoint: Checkpoint) -> str:
    """Which weights, whatever the file is called: a fingerprint of one tensor in eight, as another model differs in nearly all."""
    names = sorted(transformer_names(checkpoint).items())
    return f"{len(names)} tensors with the fingerprint {checkpoint.fingerprint(dict(names[::8]))[:12]}"


def _drawn_as(items: Sequence[Item]) -> list[dict[str, Any]]:
    """What each dataset says of batches, repeats and weights."""
    specs = {item.spec.label: item.spec for item in items}
    return [{key: getattr(spec, key) for key in _OF_DATASETS} for spec in specs.values()]


def _identity(items: Sequence[Item]) -> str:
    """Which clips with which captions, in which order, whatever folder they lie in: their number and a fingerprint."""
    captions = {path: read_metadata(path) for path in {item.paths["text"] for item in items}}
    rows = []
    for item in items:
        sidecars = {name: dataclasses.asdict(own) | {"source": ""} for name, own in item.clip.sidecars.items()}
        caption = captions[item.paths["text"]]
        said = caption.get("source_fingerprint", caption.get("caption", ""))
        rows.append([item.key, dataclasses.asdict(dataclasses.replace(item.clip, sidecars={})), sidecars, said])
    return f"{len(items)} with the fingerprint {text_fingerprint(canonical(rows))[:12]}"


def file_facts(inputs: RunInputs, machine: Machine, network: TrainedNetwork) -> dict[str, object]:
    """Entries of the file's metadata."""
    if isinstance(network, WholeTransformer):
        facts = _facts_of_run(inputs, machine, network)
        own = {"modelspec.architecture": f"ltx-{detect_version(inputs.checkpoint)}", "ltxv2_full_finetune": network.describe()}
        return {key: value for key, value in facts.items() if not key.startswith(("ss_network_", "ltxv2_network_"))} | own
    rank, alpha = network.rank_and_alpha
    return _facts_of_run(inputs, machine, network) | {"ss_network_dim": rank, "ss_network_alpha": alpha}


def _facts_of_run(inputs: RunInputs, machine: Machine, network: TrainedNetwork) -> dict[str, object]:
    config = inputs.config
    version = detect_version(inputs.checkpoint)
    schedule = make_schedule(config, inputs.items, machine.processes.count, has_validation=bool(inputs.validation_items))
    adapted = [stream for stream, count in network.count_by_stream().items() if count]
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"ltx-{version}/lora",
        "ltxv2_trainer_version": __version__,
        "modelspec.implementation": "https://github.com/Lightricks/LTX-2",
        "modelspec.title": config.saving.output_name,
        "ss_base_model_version": f"ltx-{version}",
        "ss_sd_model_name": inputs.checkpoint.path.name,
        "ss_network_module": config.network.network_module,
        "ss_network_args": list(config.network.network_args),
        "ltxv2_network_type": network.kind,
        "ltxv2_network_shape": network.describe(),
        "ltxv2_network_scaling": FOLDED,
        "ltxv2_base_weights": [f"{path.name} x {strength:g}" for path, strength in config.network.base_networks],
        "ss_learning_rate": config.optimization.learning_rate,
        "ltxv2_audio_learning_rate": config.optimization.audio_learning_rate,
        "ss_optimizer": config.optimization.optimizer_type,
        "ss_lr_scheduler": config.optimization.lr_scheduler,
        "ss_max_train_steps": schedule.total,
        "ss_gradient_accumulation_steps": config.optimization.gradient_accumulation_steps,
        "ss_seed": config.optimization.seed,
        "ss_num_train_items": len(inputs.items),
        "ss_mixed_precision": str(machine.dtype).removeprefix("torch."),
        "ltxv2_mode": config.ltx_mode,
        "ltxv2_adapted_streams": ",".join(adapted),
        "ltxv2_timestep_format": str(config.mode.ltxv2_timestep_format),
        "ltxv2_timestep_sampling": config.losses.timestep_sampling,
        "ltxv2_timestep_args": list(config.losses.timestep_args),
        "ltxv2_timestep_range": [config.losses.min_timestep, config.losses.max_timestep],
        "ltxv2_loss_type": config.losses.loss_type,
        "ltxv2_weighting_scheme": config.losses.weighting_scheme,
        "ltxv2_audio_balance": config.audio.audio_balance,
        "ltxv2_independent_audio_timestep": config.losses.independent_audio_timestep,
        "ltxv2_av_timestep_rule": config.losses.av_timestep_rule,
        "ltxv2_video_loss_weight": config.audio.video_loss_weight,
        "ltxv2_audio_loss_weight": config.audio.audio_loss_weight,
        "ltxv2_dop_prompt": "" if config.preservation.dop_prompt is None else config.preservation.dop_prompt,
        "ltxv2_dop_weight": config.preservation.dop_weight if config.preservation.dop_prompt is not None else 0.0,
        "ltxv2_audio_dop_weight": config.preservation.audio_dop_weight,
        "ltxv2_ema_decay": config.optimization.ema_decay,
        "ltxv2_conditioning": inputs.recipe.describe(),
        **reference_facts(inputs.recipe, inputs.datasets),
    }


def banner(inputs: RunInputs, run: TrainingRun) -> str:
    """What is about to be trained, in one table."""
    return format_table(banner_rows(inputs, run), ("training", ""))


def banner_rows(inputs: RunInputs, run: TrainingRun) -> list[tuple[str, str]]:
    """Its rows."""
    config = inputs.config
    streams = ", ".join(f"{count} {stream}" for stream, count in run.network.count_by_stream().items() if count)
    heard = sum(item.has_sound for item in inputs.items)
    left_alone = ", which --ltx_mode video does not train" if heard and config.ltx_mode == "video" else ""
    parameters = sum(p.numel() for p in run.network.parameters())
    whole = isinstance(run.network, WholeTransformer)
    unit = "tensors" if whole else "linears"
    rows = [
        (
            "model",
            f"{inputs.checkpoint.path.name}: LTX-{detect_version(inputs.checkpoint)}{', distilled' * looks_distilled(inputs.checkpoint)}, "
            f"mode {config.ltx_mode}, {str(run.dtype).removeprefix('torch.')}",
        ),
        ("full fine-tuning" if whole else "network", f"{run.network.describe()}, {streams} {unit}, {parameters:,} parameters"),
        *[("merged first", f"{path.name} x {strength:g}") for path, strength in config.network.base_networks],
        ("items", f"{len(inputs.items)} in {len({item.bucket for item in inputs.items})} bucket(s), {heard} with sound{left_alone}"),
        ("held out", f"{len(inputs.validation_items)} items" if inputs.validation_items else "none"),
        (
            "run",
            f"{run.schedule.total} steps, {run.schedule.steps_per_epoch:.4g} steps an epoch, {run.processes.count} "
            f"process(es), {run.device}",
        ),
    ]
    if whole and (rounded := _rounded(inputs, run.dtype)):
        rows.insert(2, ("", f"{rounded} of them are float32 in the file, and rounded to bfloat16 before the first step"))
    return [*rows, *describe_placement(run.placement, run.dtype), *run.notes]


def _rounded(inputs: RunInputs, dtype: torch.dtype) -> int:
    """How many of the transformer's tensors the file holds more exactly than they are trained."""
    checkpoint = inputs.checkpoint
    stored = [checkpoint.entries[full].dtype for full in transformer_names(checkpoint).values()]
    return sum(one.is_floating_point and one.itemsize > dtype.itemsize for one in stored)
