"""What all clips of a run share, and what each of them is made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.generation.contexts import TextSource
from musubi_tuner.generation.denoise import SampleInputs
from musubi_tuner.generation.jobs import Job, reference_factors
from musubi_tuner.generation.pipelines import TWO_STAGES, WITH_DISTILLED_LORA, Stage
from musubi_tuner.generation.prepare import ModelFiles
from musubi_tuner.generation.recipe import Recipe, model_identity
from musubi_tuner.ltxv2.autoencoders.upsampler import upsampler_config
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.networks.reading import newest_file
from musubi_tuner.runtime.device import compute_dtype
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all clips of a run share."""

    config: GenerateConfig
    files: ModelFiles
    texts: TextSource
    device: torch.device
    upsampler: Checkpoint | None
    """Between two stages."""
    distilled_lora: Path | None
    reference_factors: tuple[int, int] | None = None
    """How many times smaller and slower references are, of --recreate; None = as the networks of the run say."""

    def factors_of(self, jobs: Sequence[Job]) -> tuple[int, int]:
        """As of `reference_factors`, of all clips of a run; (1, 1) where none is shown a reference."""
        if all(job.prompt.inputs.reference is None for job in jobs):
            return 1, 1
        return self.reference_factors or reference_factors(use for job in jobs for use in job.loras)

    @property
    def model(self) -> dict[str, str]:
        """What recipes know it by."""
        return model_identity(self.files.transformer, self.files.vae, self.files.audio_vae, self.config.model.ltx_mode)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.device)


@dataclass(frozen=True, slots=True)
class Planned:
    """One clip with all that it is made from."""

    job: Job
    recipe: Recipe
    stages: tuple[Stage, ...]
    inputs: tuple[SampleInputs, ...]
    """Of each stage."""


Tell = Callable[[Job, Path | None, float], None]
"""Told of each clip that has come further: its path, None where it waits to be decoded, and the seconds of its sampling."""


def open_upsampler(config: GenerateConfig) -> Checkpoint | None:
    """Of a pipeline with two stages.

    Raises:
        UserError: none is given, or another file.
    """
    pipeline, path = config.pipeline.pipeline, config.pipeline.spatial_upsampler_path
    if pipeline not in TWO_STAGES:
        return None
    if path is None:
        raise UserError(
            f"--pipeline {pipeline}: needs --spatial_upsampler_path FILE, the latent upsampler (x2) of the model's release. "
            "one_stage and distilled_one_stage work without."
        )
    checkpoint = open_checkpoint(path)
    upsampler_config(checkpoint)
    return checkpoint


def find_distilled_lora(config: GenerateConfig) -> Path | None:
    """Of a pipeline whose second stage needs it.

    Raises:
        UserError: none is given, or it is not there.
    """
    pipeline, path = config.pipeline.pipeline, config.pipeline.distilled_lora
    if pipeline not in WITH_DISTILLED_LORA or config.pipeline.distilled_lora_strength == 0:
        return None
    if path is None:
        raise UserError(
            f"--pipeline {pipeline}: its second stage has three steps, which only a distilled model can do: give --distilled_lora FILE. "
            "If --ltxv2_model is distilled itself, take --pipeline distilled, or --distilled_lora_strength 0."
        )
    if not path.exists():
        raise UserError(f"--distilled_lora {path}: not found.")
    return newest_file(path)
