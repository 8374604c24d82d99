"""What the preview tests share: the tiny 2.3-style transformer with a LoRA on it, and samples to make."""

from dataclasses import replace
from pathlib import Path

import torch

from musubi_tuner.conditioning.conditions import Conditions, StreamConditions
from musubi_tuner.config.preview import PreviewOptions
from musubi_tuner.generation.contexts import TextContext
from musubi_tuner.generation.denoise import SampleInputs
from musubi_tuner.generation.encode import TEXT_ALONE, ConditioningLatents, video_cells
from musubi_tuner.generation.sampling import make_plan
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, OfficialLTXV2Wrapper, create_network
from musubi_tuner.prompts.prompt import PreviewPrompt

TEXT_TOKENS = 16


def load_wrapper(
    path: Path, mode: str = "av", timestep_format: str = "flowmatch_1_1000", dtype: torch.dtype = torch.float32
) -> OfficialLTXV2Wrapper:
    transformer = load_transformer(open_checkpoint(path), mode=mode, device="cpu", dtype=dtype)
    return OfficialLTXV2Wrapper(transformer, timestep_format)


def add_lora(wrapper: OfficialLTXV2Wrapper, *, random_b: bool) -> LoRANetwork:
    network = create_network(wrapper.transformer, dim=4, alpha=4, args={}, seed=0)
    if random_b:
        generator = torch.Generator().manual_seed(5)
        for layer in network.layers.values():
            layer.lora_B.data = 0.2 * torch.randn(layer.lora_B.shape, generator=generator)
    return network


def prompt(**values: object) -> PreviewPrompt:
    base = PreviewPrompt(
        index=0, prompt="a fox", negative="", width=64, height=32, frames=9, fps=24.0, seed=3, steps=None, video_cfg=None,
        audio_cfg=None, where="prompts.txt, line 1",
    )  # fmt: skip
    return replace(base, **values)


def options(**values: object) -> PreviewOptions:
    return replace(PreviewOptions(sample_steps=3), **values)


def context(wrapper: OfficialLTXV2Wrapper, seed: int = 0) -> TextContext:
    width = wrapper.config.video_context_width + wrapper.config.audio_context_width
    return TextContext(torch.randn(1, TEXT_TOKENS, width, generator=torch.Generator().manual_seed(seed)), None)


def sample(
    wrapper: OfficialLTXV2Wrapper,
    *,
    mode: str = "av",
    version: str = "2.3",
    of_prompt: PreviewPrompt | None = None,
    of_options: PreviewOptions | None = None,
    image: torch.Tensor | None = None,
) -> SampleInputs:
    of_prompt = of_prompt or prompt()
    plan = make_plan(of_options or options(), of_prompt, mode=mode, version=version, num_layers=wrapper.config.num_layers)
    return SampleInputs(
        prompt=of_prompt, plan=plan, positive=context(wrapper), negative=context(wrapper, 1), conditioning=first_image(of_prompt, image)
    )


def first_image(of_prompt: PreviewPrompt, image: torch.Tensor | None) -> ConditioningLatents:
    """(1, 128, 1, h, w) latents given as the first frame."""
    if image is None:
        return TEXT_ALONE
    latents = torch.zeros(1, 128, *video_cells(of_prompt))
    latents[:, :, :1] = image
    clean = torch.zeros(video_cells(of_prompt), dtype=torch.bool)
    clean[0] = True
    return ConditioningLatents(video=latents, conditions=Conditions(video=StreamConditions(clean=clean.flatten()[None])))
