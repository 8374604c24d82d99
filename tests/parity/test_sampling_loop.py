"""A whole guided sampling with our parts against one put together from ltx-core's: model, schedule, guider and steps."""

import json

import pytest
import torch
from safetensors import safe_open

from musubi_tuner.generation.denoise import SampleInputs, generate
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.versions import TRANSFORMER_PREFIXES
from tests import preview_parts as parts

TOLERANCE = 1e-4
STEPS = 4


def official_model(path):
    from ltx_core.model.transformer.model_configurator import LTXModelConfigurator

    with safe_open(path, framework="pt") as file:
        section = json.loads(file.metadata()["config"])["transformer"]
        prefix = TRANSFORMER_PREFIXES[0]
        weights = {name.removeprefix(prefix): file.get_tensor(name).float() for name in file.keys() if name.startswith(prefix)}
    model = LTXModelConfigurator.from_config({"transformer": section}).to_empty(device="cpu")
    model.load_state_dict({name: value for name, value in weights.items() if "embeddings_connector" not in name}, strict=True)
    return model.eval()


def official_sampling(model, sample: SampleInputs, noise: dict[str, torch.Tensor], widths: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The official loop, by the official classes."""
    from ltx_core.components.diffusion_steps import EulerDiffusionStep
    from ltx_core.components.guiders import MultiModalGuider, MultiModalGuiderParams
    from ltx_core.components.schedulers import LTX2Scheduler
    from ltx_core.guidance.perturbations import BatchedPerturbationConfig, Perturbation, PerturbationConfig, PerturbationType

    blocks = list(sample.plan.stg_blocks)
    kinds = PerturbationType
    stg = [Perturbation(kinds.SKIP_VIDEO_SELF_ATTN, blocks), Perturbation(kinds.SKIP_AUDIO_SELF_ATTN, blocks)]
    apart = [Perturbation(kinds.SKIP_A2V_CROSS_ATTN, None), Perturbation(kinds.SKIP_V2A_CROSS_ATTN, None)]
    runs = [
        (sample.positive.text, BatchedPerturbationConfig.empty(1)),
        (sample.negative.text, BatchedPerturbationConfig.empty(1)),
        (sample.positive.text, BatchedPerturbationConfig([PerturbationConfig(stg)])),
        (sample.positive.text, BatchedPerturbationConfig([PerturbationConfig(apart)])),
    ]
    sigmas = LTX2Scheduler().execute(STEPS)
    x = dict(noise)
    for step in range(STEPS):
        predictions = {name: [] for name in x}
        for text, perturbations in runs:
            contexts = text.split(widths, dim=-1)
            video, audio = (
                modality(name, x[name], sigmas[step], own, sample) for name, own in zip(("video", "audio"), contexts, strict=True)
            )
            for name, velocity in zip(("video", "audio"), model(video, audio, perturbations), strict=True):
                predictions[name].append(x[name] - sigmas[step] * velocity)
        for name, four in predictions.items():
            scales = sample.plan.scales(name)
            params = MultiModalGuiderParams(
                cfg_scale=scales.cfg, stg_scale=scales.stg, rescale_scale=scales.rescale, modality_scale=scales.modality
            )
            x[name] = EulerDiffusionStep().step(x[name], MultiModalGuider(params).calculate(*four), sigmas, step)
    return x


def modality(name: str, latent: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, sample: SampleInputs):
    from ltx_core.model.transformer.modality import Modality

    prompt, steps = sample.prompt, latent.shape[1]
    width, height = geometry.latent_size(prompt.width, prompt.height)
    frames = geometry.latent_frames(prompt.frames)
    positions = geometry.audio_positions(steps, 1)
    if name == "video":
        positions = geometry.video_positions(frames, height, width, torch.tensor([prompt.fps]))
    return Modality(
        latent=latent, sigma=sigma[None], timesteps=sigma.expand(1, steps), positions=positions, context=context, context_mask=None,
        enabled=True,
    )  # fmt: skip


@pytest.mark.parametrize("style", ["ltx20", "ltx23"])
def test_a_guided_sampling_equals_the_official_parts(tiny_family, style: str) -> None:
    path = getattr(tiny_family, style)
    wrapper = parts.load_wrapper(path, timestep_format="sd3_0_1")
    made = parts.sample(
        wrapper,
        version="2.0" if style == "ltx20" else "2.3",
        of_prompt=parts.prompt(width=96, frames=17),
        of_options=parts.options(sample_steps=STEPS),
    )
    noise = {}

    def remember(module: torch.nn.Module, arguments: tuple) -> None:
        noise.setdefault("video", arguments[0].latent.clone())
        noise.setdefault("audio", arguments[1].latent.clone())

    handle = wrapper.register_forward_pre_hook(remember)
    ours = generate(wrapper, made)
    handle.remove()
    widths = (wrapper.config.video_context_width, wrapper.config.audio_context_width)
    with torch.inference_mode():
        theirs = official_sampling(official_model(path), made, noise, widths)
    for name, mine in (("video", geometry.patchify_video(ours.video)), ("audio", geometry.patchify_audio(ours.audio))):
        scale = theirs[name].abs().max().clamp(min=1)
        assert (mine - theirs[name]).abs().max() <= TOLERANCE * scale, name
