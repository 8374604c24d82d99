"""Previews during training: everything that can fail is tried before the first step, and nothing of training is changed."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from musubi_tuner.config.preview import PreviewOptions
from musubi_tuner.flow.sigma import SigmaSettings
from musubi_tuner.generation.contexts import TextSource
from musubi_tuner.generation.decode import decode_samples, write_sample
from musubi_tuner.generation.denoise import SampledLatents, SampleInputs, generate
from musubi_tuner.generation.prepare import ModelFiles, prepare_samples
from musubi_tuner.generation.sampling import describe_plans
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.runtime.device import free_memory
from musubi_tuner.runtime.progress import Progress

log = logging.getLogger(__name__)

FOLDER = "sample"
"""Of previews, in the run's output folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Previewer:
    """The previews of a run, ready to be made at any step."""

    samples: tuple[SampleInputs, ...]
    files: ModelFiles
    folder: Path
    name: str

    def __call__(self, wrapper: OfficialLTXV2Wrapper, step: int, epoch: int) -> list[Path]:
        """Sample, decode and write every prompt; returns the files. Random state and train mode are left as they were.

        Where the card has no room for the sampling, a warning takes the place of the previews; where it has none for the decoders, they
        run on the CPU.
        """
        device = next(wrapper.parameters()).device
        with untouched(wrapper, device):
            latents = self._generate_where_it_fits(wrapper, step, device)
            if latents is None:
                return []
            paths = self._write_where_it_fits(latents, step, device)
        log.info("previews of step %d (epoch %d): %s", step, epoch, ", ".join(str(path) for path in paths))
        return paths

    def _generate_where_it_fits(self, wrapper: OfficialLTXV2Wrapper, step: int, device: torch.device) -> list[SampledLatents] | None:
        free_memory(device)
        total = sum(sample.plan.steps for sample in self.samples)
        try:
            with Progress(f"previews of step {step}", total, unit="step", leave=False) as bar:
                return [generate(wrapper, sample, advance=bar.advance) for sample in self.samples]
        except torch.OutOfMemoryError:
            log.warning(
                "WARNING: step %d: no previews: the card ran out of memory, and training goes on without them. Give the prompts a smaller "
                "size or fewer frames (--w, --h, --f), or leave room with --vram_gb.",
                step,
            )
            return None
        finally:
            free_memory(device)

    def _write_where_it_fits(self, latents: list[SampledLatents], step: int, device: torch.device) -> list[Path]:
        try:
            return self._write(latents, step, device)
        except torch.OutOfMemoryError:
            log.warning("WARNING: step %d: the card has no room for the decoders; the previews are decoded on the CPU, which is slow", step)
        free_memory(device)
        return self._write(latents, step, torch.device("cpu"))

    def _write(self, latents: list[SampledLatents], step: int, device: torch.device) -> list[Path]:
        """Decode on `device` and write `{name}_s{step}_{index}_{seed}`, the names that sort a prompt's samples by step."""
        paths = []
        decoded = decode_samples(latents, self.files.vae, self.files.audio_vae, device)
        for sample, (frames, sound) in zip(self.samples, decoded, strict=True):
            stem = self.folder / f"{self.name}_s{step:08d}_{sample.prompt.index:02d}_{sample.prompt.seed}"
            paths.append(write_sample(stem, sample.prompt, frames, sound))
        return paths


def make_previewer(
    options: PreviewOptions,
    files: ModelFiles,
    texts: TextSource,
    *,
    mode: str,
    device: torch.device,
    output_dir: Path,
    output_name: str,
    training_sigma: SigmaSettings,
    reference_factors: tuple[int, int] = (1, 1),
) -> Previewer:
    """Prepare the samples of `--sample_prompts`, and log how each is sampled.

    Args:
        texts: where the run's cached text is, what it must be, and the encoder of `--text_encoder`.
        training_sigma: how training draws noise levels, which the table shows beside those of the previews.
        reference_factors: as of `prepare_samples`.

    Raises:
        UserError: anything that would make a preview fail later: a prompt, a size, a text that is not cached, a VAE that is not there.
    """
    samples = prepare_samples(options, files, texts, mode=mode, device=device, reference_factors=reference_factors)
    if options.wanted is None:
        log.info("previews are made once, at the end of the run: no --sample_at_first or --sample_every_n_steps says when else")
    prompts, plans = [sample.prompt for sample in samples], [sample.plan for sample in samples]
    log.info("%s", describe_plans(options, prompts, plans, training_sigma.kind, training_sigma.shift))
    return Previewer(samples=samples, files=files, folder=output_dir / FOLDER, name=output_name)


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """`model` in eval mode inside; every module's mode and every global random state as before outside."""
    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(python_state)
            np.random.set_state(numpy_state)
