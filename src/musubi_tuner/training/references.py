"""References in the LoRA's metadata, where those who sample with it read how large they are to be."""

from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.cache.store import read_metadata
from musubi_tuner.config.conditioning import Mask, Recipe, Reference
from musubi_tuner.config.dataset import DatasetConfig
from musubi_tuner.dataset.items import Item
from musubi_tuner.runtime.errors import UserError

SPATIAL = "reference_downscale_factor"
TEMPORAL = "reference_temporal_scale_factor"


def reference_facts(recipe: Recipe, datasets: DatasetConfig) -> dict[str, object]:
    """Entries of the metadata; none where the recipe shows no reference."""
    if not recipe.probability("video", Reference):
        return {}
    space, time = (str(factor) for factor in datasets.reference_factors)
    return {SPATIAL: space, "reference_spatial_scale_factor": space, TEMPORAL: time}


def check_reference_factors(path: Path, recipe: Recipe, datasets: DatasetConfig) -> None:
    """A LoRA to start from must have been trained on references of the same scale; files that do not say are taken.

    Raises:
        UserError: names both factors.
    """
    metadata = read_metadata(path)
    wanted = reference_facts(recipe, datasets)
    for key, setting in ((SPATIAL, "reference_downscale"), (TEMPORAL, "reference_temporal_scale")):
        if key in metadata and key in wanted and metadata[key] != wanted[key]:
            raise UserError(
                f"--network_weights {path}: its {key} is {metadata[key]}, the dataset's {setting} is {wanted[key]}. "
                f"Set {setting} = {metadata[key]} in {datasets.path} and cache the references again, or start without --network_weights."
            )


def check_references(recipe: Recipe, items: Sequence[Item], dataset_config: Path) -> None:
    """A recipe that shows references needs them, and references need a recipe.

    Raises:
        UserError: one without the other.
    """
    if recipe.probability("video", Mask) and not any("mask" in item.paths for item in items):
        raise UserError(
            f"{dataset_config}: the recipe has the rule 'mask', but no dataset has masks. "
            "Give one mask_directory (or a jsonl with mask_path) and run ltxv2_cache_latents.py."
        )
    files = {
        "video": ("reference", "reference_directory", "reference_path", "ltxv2_cache_latents.py"),
        "audio": ("reference_audio", "reference_audio_directory", "reference_audio_path", "ltxv2_cache_audio_latents.py"),
    }
    for stream, (kind, directory, path, program) in files.items():
        there = any(kind in item.paths for item in items)
        wanted = recipe.probability(stream, Reference) > 0
        if wanted and not there:
            raise UserError(
                f"{dataset_config}: the recipe has the rule 'reference' for {stream}, but no dataset has references. "
                f"Give one {directory} (or a jsonl with {path}) and run {program}."
            )
        if there and not wanted:
            ready = "reference_video" if stream == "video" else "reference_sound"
            raise UserError(
                f"{dataset_config}: has references ({directory}), but nothing shows them. Give --conditioning_config "
                f"conditioning_recipes/{ready}.toml (its rule is 'reference'), or take {directory} out."
            )
