"""Everything that can go wrong without the transformer's weights goes wrong here: folders, files, items, caches, prompts, references."""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.contents import content_faults
from musubi_tuner.cache.forms import text_forms
from musubi_tuner.cache.names import TEXT_MASK_KEY, prompt_path
from musubi_tuner.conditioning.recipe import Mask, Recipe, Reference, make_recipe
from musubi_tuner.config.dataset import DatasetConfig, load_dataset_config
from musubi_tuner.config.full_finetuning import NO_BASE
from musubi_tuner.config.network import NetworkOptions
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.dataset.items import Item, list_items
from musubi_tuner.dataset.verify import Wanted, verify_caches
from musubi_tuner.ltxv2.autoencoders.audio_vae import audio_vae_fingerprint
from musubi_tuner.ltxv2.autoencoders.video_vae import video_vae_fingerprint
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.text.encoders import EncoderOptions, encoder_fingerprint, encoder_options, is_local
from musubi_tuner.ltxv2.text.packed import with_projection
from musubi_tuner.ltxv2.text.pipeline import TextRecipe, projection_fingerprint, text_widths
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import looks_distilled, stored_in_8_bits, transformer_names
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork
from musubi_tuner.networks.reading import network_metadata
from musubi_tuner.prompts.prompt import PreviewPrompt
from musubi_tuner.prompts.sample_prompts import PromptDefaults, load_prompts
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import quoted
from musubi_tuner.training.objective import FlowMatching, Objective

log = logging.getLogger(__name__)

REFERENCE_DOWNSCALE = "reference_downscale_factor"
REFERENCE_TEMPORAL = "reference_temporal_scale_factor"
_UNUSUAL_SCALE = 4.0
"""Alpha / rank."""


Learns = Callable[[FlowMatching, LoRANetwork], Objective]
"""Called with the network as it starts, before a state is restored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """What a run is made of, read once and checked, before the transformer is loaded."""

    config: TrainingConfig
    recipe: Recipe
    """Parsed once: what is trained is what the metadata says, whatever becomes of its file."""
    checkpoint: Checkpoint
    datasets: DatasetConfig
    items: tuple[Item, ...]
    validation_items: tuple[Item, ...]
    wanted: Wanted
    """What the caches of this run must be."""
    learns: Learns | None = None
    """What the run learns in place of its items' content; None = that."""
    copy_bytes: float = 0.0
    """Of copies that `learns` keeps of each trained weight, on the device."""
    learned_by: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `learns` that shape the result, as plain JSON values by name; a resumed run tells which of them differ."""

    @property
    def shows_references(self) -> bool:
        """Whether the recipe shows reference videos (IC-LoRA)."""
        return self.recipe.probability("video", Reference) > 0


def check_inputs(config: TrainingConfig) -> RunInputs:
    """Read headers, indices and metadata, and no weights; imports no encoder.

    Raises:
        UserError: the first thing that is missing, stale or contradictory, with the command that fixes it.
    """
    recipe = make_recipe(config.conditioning, config.ltx_mode)
    _tell_scale(config.network)
    checkpoint = open_checkpoint(config.model.ltxv2_model)
    if config.network.full_finetune and (receipt := read_quantization(checkpoint, transformer_names(checkpoint)).receipt):
        raise UserError(
            f"{checkpoint.path}: its weights are stored as {receipt}, and --full_finetune trains them themselves. Give the release's "
            "bf16 file."
        )
    if looks_distilled(checkpoint):
        log.warning(
            "WARNING: %s: is distilled, by its name or metadata. Distilled checkpoints sample in few steps, which training on them can "
            "undo; the release's dev checkpoint is the one to train on, and its LoRAs work with both.",
            checkpoint.path.name,
        )
    if stored_in_8_bits(checkpoint):
        log.warning(
            "WARNING: %s: its weights are stored in 8 bits, so training starts from rounded ones. Where you have the bf16 file, give that: "
            "--weight_format takes as little memory, and rounds no more than it has to.",
            checkpoint.path.name,
        )
    path = config.mode.dataset_config
    datasets = load_dataset_config(path)
    if config.network.full_finetune and any(spec.preserve_base for spec in datasets.datasets):
        raise UserError(f"{path}: preserve_base: {NO_BASE}. Take it out, so that its items are trained as they are, or train a network.")
    arguments = caching_arguments(config)
    items = list_items(datasets.datasets, config.ltx_mode, path, arguments)
    held_out = datasets.validation_datasets
    validation_items = list_items(held_out, config.ltx_mode, path, arguments) if held_out else ()
    if config.logging.validate_every_n_steps and not validation_items:
        log.warning("WARNING: --validate_every_n_steps: nothing is held out; %s has no [[validation_datasets]]", path)
    if config.preview.wanted and config.preview.sample_prompts is None:
        log.warning("WARNING: no previews: %s is given without --sample_prompts FILE", config.preview.wanted)
    _check_references(recipe, items, path)
    _check_keyframes(recipe, (*items, *validation_items), path)
    if recipe.keyframes is None:
        items, validation_items = _without_keyframes(items, path), _without_keyframes(validation_items, path)
    network_weights = config.network.network_weights
    if network_weights is not None and network_weights.is_file():
        _check_reference_factors(network_weights, recipe, datasets)
    wanted = wanted_caches(config, checkpoint)
    verify_caches((*items, *validation_items), wanted)
    return RunInputs(
        config=config,
        recipe=recipe,
        checkpoint=checkpoint,
        datasets=datasets,
        items=items,
        validation_items=validation_items,
        wanted=wanted,
    )


def check_output_folder(folder: Path) -> None:
    """Write a byte there now, so that a folder that takes none is known before hours are spent.

    Raises:
        UserError: it takes none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written into ({error}). Choose another, or fix its permissions.") from error


def wanted_caches(config: TrainingConfig, checkpoint: Checkpoint) -> Wanted:
    """Fingerprints of every encoder that can be looked at: the VAEs where a file holds them, connectors and projection, the encoder's
    folder or file."""
    mode, model = config.ltx_mode, config.model
    vae = checkpoint if model.vae is None else open_checkpoint(model.vae)
    audio_vae = vae if model.audio_vae is None else open_checkpoint(model.audio_vae)
    latents = {"encoder_fingerprint": video_vae_fingerprint(vae)} if _holds(vae, "vae.encoder.", "encoder.down_blocks.") else {}
    audio = {"encoder_fingerprint": audio_vae_fingerprint(audio_vae)} if _holds(audio_vae, "audio_vae.encoder.") else {}
    text = {"stage": text_stage(config), "widths": "+".join(map(str, text_widths(read_config(checkpoint), mode)))}
    if model.text_encoder_backend is not None:
        text["backend"] = model.text_encoder_backend
    if model.max_length is not None:
        text["max_length"] = str(model.max_length)
    whole = with_projection(checkpoint, model.text_encoder)
    if model.text_encoder_backend != "t5" and _holds(whole, "text_embedding_projection."):
        text["projection_fingerprint"] = projection_fingerprint(whole)
    if checkpoint.model_version:
        text["model_version"] = checkpoint.model_version
    if model.text_encoder is not None and is_local(model.text_encoder, "--text_encoder"):
        text["encoder_fingerprint"] = encoder_fingerprint(text_encoder_options(config, torch.device("cpu")))
    return Wanted(latents=latents, audio=audio, text=text, arguments=caching_arguments(config))


def text_stage(config: TrainingConfig) -> Literal["context", "features"]:
    """Connectors that are trained read what comes before them."""
    return "features" if config.network.train_connectors else "context"


def text_encoder_options(config: TrainingConfig, device: torch.device) -> EncoderOptions:
    """Of the encoder of `--text_encoder`, which must be given."""
    model = config.model
    assert model.text_encoder is not None
    return encoder_options(
        model.text_encoder,
        tokenizer=model.tokenizer,
        backend=model.text_encoder_backend or "gemma",
        device=device,
        max_length=model.max_length,
        vram_gb=config.memory.vram_gb,
        ram_gb=config.memory.ram_gb,
    )


def text_recipe(config: TrainingConfig, checkpoint: Checkpoint, device: torch.device) -> TextRecipe:
    """How prompts that were not cached are encoded; `--text_encoder` must be given."""
    return TextRecipe(
        checkpoint=checkpoint,
        config=read_config(checkpoint),
        options=text_encoder_options(config, device),
        mode=config.ltx_mode,
        stage=text_stage(config),
    )


def preview_prompts(config: TrainingConfig) -> tuple[PreviewPrompt, ...]:
    """Of `--sample_prompts`; none where there is none."""
    if config.preview.sample_prompts is None:
        return ()
    return load_prompts(config.preview.sample_prompts, PromptDefaults(fps=config.preview.sample_fps))


def cached_prompt(datasets: DatasetConfig, prompt: str, wanted: Wanted, why: str, flags: str = "") -> Path:
    """The cache file of a text beside the captions: the empty prompt of dropped captions, the prompt of `--dop_prompt`.

    Raises:
        UserError: it is not cached, or for another model; `why` it is needed, and the command with its `flags`.
    """
    path = prompt_path(datasets.datasets[0].cache_directory, prompt)  # the first dataset's folder holds all prompts
    reason = reason_to_rebuild(path, {"kind": "text", **wanted.text}, ("text", TEXT_MASK_KEY), text_forms, to_read=True)
    if reason is None:
        reason = content_faults({path: text_forms}).get(path)
    if reason is not None:
        name, program = f"the prompt '{prompt}'" if prompt else "the empty prompt", "ltxv2_cache_text_encoder_outputs.py"
        raise UserError(
            f"{path}: {name} is not cached as it should be ({reason}), and {why}. "
            f"Run, then start training again:\n  python {program} {wanted.arguments[program]}{flags}"
        )
    return path


def reference_facts(recipe: Recipe, datasets: DatasetConfig) -> dict[str, object]:
    """Scale of the references in the LoRA's metadata, where samplers read it; none where the recipe shows no reference."""
    if not recipe.probability("video", Reference):
        return {}
    space, time = (str(factor) for factor in datasets.reference_factors)
    return {REFERENCE_DOWNSCALE: space, "reference_spatial_scale_factor": space, REFERENCE_TEMPORAL: time}


def _check_reference_factors(path: Path, recipe: Recipe, datasets: DatasetConfig) -> None:
    """A LoRA to start from must have been trained on references of the same scale; files that do not say are taken.

    Raises:
        UserError: names both factors.
    """
    metadata = network_metadata(path)
    wanted = reference_facts(recipe, datasets)
    for key, setting in ((REFERENCE_DOWNSCALE, "reference_downscale"), (REFERENCE_TEMPORAL, "reference_temporal_scale")):
        if key in metadata and key in wanted and metadata[key] != wanted[key]:
            raise UserError(
                f"--network_weights {path}: its {key} is {metadata[key]}, the dataset's {setting} is {wanted[key]}. "
                f"Set {setting} = {metadata[key]} in {datasets.path} and cache the references again, or start without --network_weights."
            )


def _tell_scale(network: NetworkOptions) -> None:
    """Warn where the rank alone was lowered: alpha stays as it is, and the update counts many times."""
    scale = network.network_alpha / network.network_dim
    by_rank = not (network.full_finetune or network.dim_from_weights or "rank_stabilized=true" in network.network_args)
    if by_rank and scale >= _UNUSUAL_SCALE:
        log.warning(
            "WARNING: --network_dim %d with --network_alpha %g: the update is scaled by %g. Usual are 1 and 2: give --network_alpha %d, or "
            "a learning rate that is so much lower.",
            network.network_dim,
            network.network_alpha,
            scale,
            network.network_dim,
        )


def _check_references(recipe: Recipe, items: Sequence[Item], dataset_config: Path) -> None:
    """A recipe that shows masks or references needs them, and references need a recipe.

    Raises:
        UserError: one without the other.
    """
    if recipe.probability("video", Mask) and not any("mask" in item.paths for item in items):
        raise UserError(
            f"{dataset_config}: the recipe has the rule 'mask', but no dataset has masks. "
            "Give one mask_directory (or a jsonl with mask_path) and run ltxv2_cache_latents.py."
        )
    video = any("reference" in item.paths for item in items)
    audio = any("reference_audio" in item.paths for item in items)
    for stream, found, infix, program, ready in (
        ("video", video, "", "ltxv2_cache_latents.py", "reference_video"),
        ("audio", audio, "audio_", "ltxv2_cache_audio_latents.py", "reference_sound"),
    ):
        shown = recipe.probability(stream, Reference) > 0
        if shown and not found:
            raise UserError(
                f"{dataset_config}: the recipe has the rule 'reference' for {stream}, but no dataset has references. "
                f"Give one reference_{infix}directory (or a jsonl with reference_{infix}path) and run {program}."
            )
        if found and not shown:
            raise UserError(
                f"{dataset_config}: has references (reference_{infix}directory), but nothing shows them. Give --conditioning_config "
                f"conditioning_recipes/{ready}.toml (its rule is 'reference'). To train without them, take reference_{infix}directory out "
                f"and run {program} again, which needs the media: of caches that came in a pack, where they were packed, and pack again."
            )


def _check_keyframes(recipe: Recipe, items: Sequence[Item], dataset_config: Path) -> None:
    """A recipe that lays keyframes beside the clips needs those that it may choose, of every clip; stills have none.

    Raises:
        UserError: names the dataset and what it lacks.
    """
    rule = recipe.keyframes
    if rule is None:
        return
    clips = [item for item in items if item.clip.frames > 1]
    for item in clips:
        spec, last = item.spec, item.clip.frames - 1
        if "keyframes" not in item.paths:
            places = json.dumps([*dict.fromkeys(name if name in ("first", "last") else "every 8" for name in rule.at)])
            remedy = f'Add keyframes = {places} (also numbers of frames, and "every N") and run ltxv2_cache_latents.py.'
            if spec.keyframes:
                remedy = "Run ltxv2_cache_latents.py on its videos; imported caches have none."
            raise UserError(
                f"{dataset_config}: {spec.label}: the recipe's rule 'keyframes' shows single pictures beside the clips, and no keyframes "
                f"of this dataset are cached. {remedy} To make latent frames of the clip itself conditioning (eight frames each), as "
                "'keyframes' did before, write rule = \"keyframes_in_place\"."
            )
        cached = item.clip.sidecars["keyframes"].at
        if lacking := rule.lacking(cached, last):
            raise UserError(
                f"{dataset_config}: {spec.label}: the recipe's rule 'keyframes' has at = {json.dumps([*rule.at])}, and of its clips of "
                f"{last + 1} frames no {lacking[0]} one is cached, but {', '.join(map(str, cached))}. Add it to keyframes and run "
                "ltxv2_cache_latents.py, or leave it out of the rule."
            )
    if not clips:
        raise UserError(f"{dataset_config}: the recipe has the rule 'keyframes', but all items are stills, which have none.")


def _without_keyframes(items: tuple[Item, ...], dataset_config: Path) -> tuple[Item, ...]:
    """Items whose keyframes are not read, as no rule shows them."""
    labels = dict.fromkeys(item.spec.label for item in items if "keyframes" in item.paths)
    if labels:
        log.warning("WARNING: %s: %s has keyframes, which no rule shows. They are not read.", dataset_config, ", ".join(labels))
    return tuple(
        dataclasses.replace(item, paths={name: path for name, path in item.paths.items() if name != "keyframes"}) for item in items
    )


def _holds(checkpoint: Checkpoint, *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in checkpoint.names())


def caching_arguments(config: TrainingConfig) -> dict[str, str]:
    """Arguments of the caching programs that go with this run."""
    model = config.model
    dataset = f"--dataset_config {quoted(config.mode.dataset_config)} --ltx_mode {config.ltx_mode}"
    vae = quoted(model.vae or model.ltxv2_model)
    encoder = quoted(model.text_encoder) if model.text_encoder else "ENCODER_FOLDER"
    text = f" --text_encoder_backend {model.text_encoder_backend}" if model.text_encoder_backend else ""
    text += f" --max_length {model.max_length}" if model.max_length else ""
    text += " --text_cache_stage features" if text_stage(config) == "features" else ""
    return {
        "ltxv2_cache_latents.py": f"{dataset} --vae {vae}",
        "ltxv2_cache_audio_latents.py": f"{dataset} --audio_vae {quoted(model.audio_vae) if model.audio_vae else vae}",
        "ltxv2_cache_text_encoder_outputs.py": f"{dataset} --ltxv2_model {quoted(model.ltxv2_model)} --text_encoder {encoder}{text}",
    }
