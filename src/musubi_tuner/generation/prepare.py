"""From a prompt file to all that its samples are made from. Whatever can fail about them fails here, before a transformer is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from musubi_tuner.config.preview import PreviewOptions
from musubi_tuner.generation.contexts import TextSource, load_contexts
from musubi_tuner.generation.decode import try_decoders
from musubi_tuner.generation.denoise import SampleInputs
from musubi_tuner.generation.encode import ConditioningEncoders, encode_conditioning, still_crf
from musubi_tuner.generation.sampling import make_plan
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.prompts.sample_prompts import PromptDefaults, load_prompts
from musubi_tuner.runtime.device import free_memory


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """The opened checkpoints that samples are made with."""

    transformer: Checkpoint
    vae: Checkpoint
    audio_vae: Checkpoint
    """Audio VAE and vocoder."""

    @staticmethod
    def beside(transformer: Checkpoint, vae: Path | None, audio_vae: Path | None) -> "ModelFiles":
        """With `vae` from the transformer's file unless it has its own, and `audio_vae` from that of `vae`."""
        opened = {transformer.path: transformer}

        def open_once(path: Path) -> Checkpoint:
            if path not in opened:
                opened[path] = open_checkpoint(path)
            return opened[path]

        video = open_once(vae or transformer.path)
        return ModelFiles(transformer=transformer, vae=video, audio_vae=open_once(audio_vae or video.path))


def prepare_samples(
    options: PreviewOptions,
    files: ModelFiles,
    texts: TextSource,
    *,
    mode: str,
    device: torch.device,
    reference_factors: tuple[int, int] = (1, 1),
) -> tuple[SampleInputs, ...]:
    """The samples of `--sample_prompts`: prompts read, plans made, decoders tried, texts found or encoded, conditioning encoded.

    Args:
        mode: `video`, `av` or `audio`.
        device: of the encoders.
        reference_factors: how many times smaller and slower references are (`DatasetConfig.reference_factors`).

    Raises:
        UserError: a prompt, a size, a text that is not cached, a VAE that is not there, a file that does not fit.
    """
    assert options.sample_prompts is not None
    defaults = PromptDefaults(
        width=options.sample_width,
        height=options.sample_height,
        frames=options.sample_frames,
        fps=options.sample_fps,
        steps=options.sample_steps,
    )
    prompts = load_prompts(options.sample_prompts, defaults)
    config, version = read_config(files.transformer), detect_version(files.transformer)
    plans = [make_plan(options, prompt, mode=mode, version=version, num_layers=config.num_layers) for prompt in prompts]
    try_decoders(files.vae, files.audio_vae, {stream for plan in plans for stream in plan.streams})
    needed = [prompt.prompt for prompt in prompts]
    needed += [prompt.negative for prompt, plan in zip(prompts, plans, strict=True) if plan.needs_negative]
    both = config.video_context_width + config.audio_context_width
    widths = (config.video_context_width, both) if mode == "video" else (both,)
    contexts = load_contexts(list(dict.fromkeys(needed)), texts, widths=widths)
    free_memory(device)
    encoders = ConditioningEncoders(files.vae, files.audio_vae, device, reference_factors=reference_factors, still_crf=still_crf(version))
    samples = tuple(
        SampleInputs(
            prompt=prompt,
            plan=plan,
            positive=contexts[prompt.prompt],
            negative=contexts[prompt.negative] if plan.needs_negative else None,
            conditioning=encode_conditioning(prompt, plan.streams, encoders),
        )
        for prompt, plan in zip(prompts, plans, strict=True)
    )
    encoders.close()
    return samples
