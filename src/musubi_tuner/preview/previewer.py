"""Previews during training: everything that can fail is tried before the first step, and nothing of training is changed."""

import logging
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from musubi_tuner.config.dataset import DatasetConfig
from musubi_tuner.config.network import parse_pairs
from musubi_tuner.config.preview import PreviewOptions
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.generation.contexts import EncodePrompts, TextContext, load_contexts
from musubi_tuner.generation.decode import decode_sounds, to_frames, video_decoder
from musubi_tuner.generation.denoise import PreviewLatents, Sample, generate
from musubi_tuner.generation.encode import Encoders, encode_given
from musubi_tuner.generation.sampling import SamplingPlan, describe_plans, make_plan
from musubi_tuner.generation.write import FOLDER, write_preview
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.media.write import Sound
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.prompts.sample_prompts import PreviewPrompt, PromptDefaults, load_prompts
from musubi_tuner.runtime.device import free_memory, pick_device

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Previewer:
    """The previews of a run, ready to be made at any step."""

    samples: tuple[Sample, ...]
    vae: Checkpoint | None
    audio_vae: Checkpoint | None
    folder: Path
    name: str

    def __call__(self, wrapper: OfficialLTXV2Wrapper, step: int, epoch: int) -> None:
        """Sample, decode and write every prompt. Random state and train mode are left as they were.

        Where the card has no room for the sampling, a warning takes the place of the previews; where it has none for the decoders, they
        run on the CPU.
        """
        device = next(wrapper.parameters()).device
        with untouched(wrapper, device):
            latents = self._generate_where_it_fits(wrapper, step, device)
            if latents is None:
                return
            paths = self._decode_where_it_fits(latents, step, device)
        log.info("previews of step %d (epoch %d): %s", step, epoch, ", ".join(str(path) for path in paths))

    def _generate_where_it_fits(self, wrapper: OfficialLTXV2Wrapper, step: int, device: torch.device) -> list[PreviewLatents] | None:
        free_memory(device)
        try:
            return self._generate(wrapper, step)
        except torch.OutOfMemoryError:
            log.warning(
                "WARNING: step %d: no previews: the card ran out of memory, and training goes on without them. Give the prompts a smaller "
                "size or fewer frames (--w, --h, --f), or leave room with --vram_gb.",
                step,
            )
            return None
        finally:
            free_memory(device)

    def _decode_where_it_fits(self, latents: list[PreviewLatents], step: int, device: torch.device) -> list[Path]:
        try:
            return self._decode(latents, step, device)
        except torch.OutOfMemoryError:
            log.warning("WARNING: step %d: the card has no room for the decoders; the previews are decoded on the CPU, which is slow", step)
        free_memory(device)
        return self._decode(latents, step, torch.device("cpu"))

    def _generate(self, wrapper: OfficialLTXV2Wrapper, step: int) -> list[PreviewLatents]:
        total = sum(sample.plan.steps for sample in self.samples)
        with tqdm(total=total, unit="step", desc=f"previews of step {step}", leave=False, file=sys.stderr) as bar:
            return [generate(wrapper, sample, advance=bar.update) for sample in self.samples]

    def _decode(self, latents: list[PreviewLatents], step: int, device: torch.device) -> list[Path]:
        """Sound first, as it is small and has to be there when its clip is written."""
        heard = [number for number, one in enumerate(latents) if one.audio is not None]
        sounds: dict[int, Sound] = {}
        if heard:
            assert self.audio_vae is not None
            sounds = dict(zip(heard, decode_sounds([latents[number].audio for number in heard], self.audio_vae, device), strict=True))
        if all(one.video is None for one in latents):
            return [self._write(number, step, None, sounds[number]) for number in heard]
        assert self.vae is not None
        with video_decoder(self.vae, device) as vae:
            return [self._write(number, step, to_frames(vae, one.video), sounds.get(number)) for number, one in enumerate(latents)]

    def _write(self, number: int, step: int, frames: Tensor | None, sound: Sound | None) -> Path:
        return write_preview(self.folder, self.name, step, self.samples[number].prompt, frames, sound)


def make_previewer(
    config: TrainingConfig,
    checkpoint: Checkpoint,
    datasets: DatasetConfig,
    encode_prompts: EncodePrompts | None = None,
    *,
    wanted_text: Mapping[str, str] | None = None,
) -> Previewer:
    """Read prompts, contexts and first images, and try the decoders, before the transformer is loaded.

    Args:
        checkpoint: the one of `--ltxv2_model`.
        encode_prompts: encodes texts that are not cached; None where no `--text_encoder` was given.
        wanted_text: metadata that this run demands of cached text (`training.caches.wanted_caches(...).text`).

    Raises:
        UserError: anything that would make a preview fail later: a prompt, a size, a text that is not cached, a VAE that is not there.
    """
    options, mode = config.preview, config.ltx_mode
    assert options.sample_prompts is not None
    prompts = load_prompts(options.sample_prompts, prompt_defaults(options))
    transformer = read_config(checkpoint)
    version = detect_version(checkpoint)
    plans = tuple(make_plan(options, prompt, mode=mode, version=version, num_layers=transformer.num_layers) for prompt in prompts)
    vae = _open(config, config.model.vae, checkpoint)
    audio_vae = _open(config, config.model.audio_vae or config.model.vae, checkpoint)
    needed = {stream for plan in plans for stream in plan.streams}
    _try_decoders(vae, audio_vae, needed)
    contexts = load_contexts(
        _texts_needed(prompts, plans),
        datasets.datasets[0].cache_directory,
        expected={"kind": "text", "stage": "context", **(wanted_text or {})},
        widths=_widths(transformer, mode),
        encode=encode_prompts,
    )
    device = pick_device(config.model.device)
    free_memory(device)
    _warn_if_never(options)
    shift = parse_pairs(config.losses.timestep_args, "--timestep_args").get("shift")
    log.info("%s", describe_plans(options, prompts, plans, config.losses.timestep_sampling, None if shift is None else float(shift)))
    encoders = Encoders(vae, audio_vae, device, reference_factors=datasets.reference_factors)
    samples = tuple(_make_sample(prompt, plan, contexts, encoders) for prompt, plan in zip(prompts, plans, strict=True))
    encoders.close()
    return Previewer(
        samples=samples,
        vae=vae if "video" in needed else None,
        audio_vae=audio_vae if "audio" in needed else None,
        folder=config.saving.output_dir / FOLDER,
        name=config.saving.output_name,
    )


def prompt_defaults(options: PreviewOptions) -> PromptDefaults:
    return PromptDefaults(
        width=options.sample_width,
        height=options.sample_height,
        frames=options.sample_frames,
        fps=options.sample_fps,
        steps=options.sample_steps,
    )


def _texts_needed(prompts: tuple[PreviewPrompt, ...], plans: tuple[SamplingPlan, ...]) -> list[str]:
    texts = [prompt.prompt for prompt in prompts]
    texts += [prompt.negative for prompt, plan in zip(prompts, plans, strict=True) if plan.needs_negative]
    return list(dict.fromkeys(texts))


def _widths(transformer: TransformerConfig, mode: str) -> tuple[int, ...]:
    both = transformer.video_context_width + transformer.audio_context_width
    return (transformer.video_context_width, both) if mode == "video" else (both,)


def _open(config: TrainingConfig, path: Path | None, checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint if path is None or path == config.model.ltxv2_model else open_checkpoint(path)


def _try_decoders(vae: Checkpoint, audio_vae: Checkpoint, needed: set[str]) -> None:
    """Load what will decode once, on the CPU: a missing file is found now and not at the first preview."""
    from musubi_tuner.ltxv2.autoencoders.audio_vae import audio_vae_names
    from musubi_tuner.ltxv2.autoencoders.video_vae import vae_names

    cpu = torch.device("cpu")
    if "video" in needed:
        vae_names(vae)
        with video_decoder(vae, cpu):
            pass
    if "audio" in needed:
        audio_vae_names(audio_vae)
        decode_sounds([], audio_vae, cpu)


def _make_sample(prompt: PreviewPrompt, plan: SamplingPlan, contexts: Mapping[str, TextContext], encoders: Encoders) -> Sample:
    return Sample(
        prompt=prompt,
        plan=plan,
        positive=contexts[prompt.prompt],
        negative=contexts[prompt.negative] if plan.needs_negative else None,
        given=encode_given(prompt, plan.streams, encoders),
    )


def _warn_if_never(options: PreviewOptions) -> None:
    if not (options.sample_at_first or options.sample_every_n_steps or options.sample_every_n_epochs):
        log.warning(
            "WARNING: --sample_prompts is given without --sample_at_first, --sample_every_n_steps or --sample_every_n_epochs: "
            "there will be no previews."
        )


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
