"""What is given, laid over a stream, against ltx-core's conditioning items: tokens, noise levels, positions."""

import pytest
import torch

from musubi_tuner.conditioning.apply import condition
from musubi_tuner.conditioning.conditions import Conditions, KeyframeLatents, Reference, StreamConditions
from musubi_tuner.conditioning.tokens import model_input, video_stream
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.transformer.modality import Modality

FRAMES, HEIGHT, WIDTH, FPS = 3, 4, 6, 16.0
SIGMA = 0.6


def tools():
    from ltx_core.components.patchifiers import VideoLatentPatchifier
    from ltx_core.tools import VideoLatentTools
    from ltx_core.types import VideoLatentShape

    shape = VideoLatentShape(batch=1, channels=128, frames=FRAMES, height=HEIGHT, width=WIDTH)
    return VideoLatentTools(patchifier=VideoLatentPatchifier(patch_size=1), target_shape=shape, fps=FPS)


def latents(frames: int, height: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 128, frames, height, width, generator=torch.Generator().manual_seed(seed))


def given(conditions: Conditions, clean: torch.Tensor) -> Modality:
    stream = condition({"video": video_stream(clean, torch.tensor([FPS]))}, conditions)["video"]
    return model_input(stream, torch.zeros(1, FRAMES * HEIGHT * WIDTH, 128), torch.tensor([SIGMA]))


def assert_same(ours: Modality, state) -> None:
    assert torch.equal(ours.timesteps, SIGMA * state.denoise_mask[..., 0])
    # Times differ in the last bit: they are divided by the frame rate, and here multiplied by nothing else.
    assert torch.allclose(ours.positions, state.positions, rtol=1e-6, atol=0)
    kept = state.denoise_mask[..., 0] == 0
    assert kept.any() and torch.equal(ours.latent[kept], state.clean_latent[kept])


@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 2), (2, 1)])
def test_given_latent_frames_equal_ltx_core(first: int, count: int) -> None:
    from ltx_core.conditioning.types.latent_cond import VideoConditionByLatentIndex

    clip = latents(count, HEIGHT, WIDTH, 1)
    state = tools().create_initial_state("cpu", torch.float32)
    state = VideoConditionByLatentIndex(latent=clip, strength=1.0, latent_idx=first).apply_to(state, tools())
    clean, cells = torch.zeros(1, 128, FRAMES, HEIGHT, WIDTH), torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    clean[:, :, first : first + count] = clip
    cells[first : first + count] = True
    assert_same(given(Conditions(video=StreamConditions(clean=cells.flatten()[None])), clean), state)


@pytest.mark.parametrize(("frames", "height", "width", "factor"), [(3, 4, 6, 1), (3, 2, 3, 2), (1, 2, 3, 2)])
def test_references_equal_ltx_core(frames: int, height: int, width: int, factor: int) -> None:
    from ltx_core.conditioning.types.reference_video_cond import VideoConditionByReferenceLatent

    shown = latents(frames, height, width, 2)
    state = tools().create_initial_state("cpu", torch.float32)
    state = VideoConditionByReferenceLatent(latent=shown, downscale_factor=factor).apply_to(state, tools())
    reference = Reference(latents=shown, fps=torch.tensor([FPS]), spatial_factor=factor)
    ours = given(Conditions(video=StreamConditions(reference=reference)), torch.zeros(1, 128, FRAMES, HEIGHT, WIDTH))
    assert_same(ours, state)
    assert ours.latent.shape[1] == FRAMES * HEIGHT * WIDTH + frames * height * width


def keyframes_at(frames: list[int], seed: int = 3) -> KeyframeLatents:
    return KeyframeLatents(latents=latents(len(frames), HEIGHT, WIDTH, seed), frames=torch.tensor([frames]), fps=torch.tensor([FPS]))


def test_keyframes_equal_ltx_core_but_for_the_end_of_their_time() -> None:
    """ltx-core 1.0 lets a keyframe after the first last eight frames; in v1.2 it is one, as `num_pixel_frames` = 1 says."""
    from ltx_core.conditioning.types.keyframe_cond import VideoConditionByKeyframeIndex

    keyframes, state = keyframes_at([0, 5, 16]), tools().create_initial_state("cpu", torch.float32)
    for place, frame in enumerate((0, 5, 16)):
        item = VideoConditionByKeyframeIndex(keyframes=keyframes.latents[:, :, place : place + 1], frame_idx=frame, strength=1.0)
        state = item.apply_to(state, tools())
    own, cells = FRAMES * HEIGHT * WIDTH, HEIGHT * WIDTH
    ours = given(Conditions(video=StreamConditions(keyframes=keyframes)), torch.zeros(1, 128, FRAMES, HEIGHT, WIDTH))
    assert ours.latent.shape[1] == own + 3 * cells
    later = state.positions[:, 0, own + cells :]
    later[..., 1] = later[..., 0] + 1 / FPS
    assert_same(ours, state)


def test_positions_of_keyframes_equal_diffusers() -> None:
    from types import SimpleNamespace

    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2ConditionPipeline

    scale = SimpleNamespace(
        transformer_spatial_patch_size=1,
        transformer_temporal_patch_size=1,
        vae_temporal_compression_ratio=8,
        vae_spatial_compression_ratio=32,
    )
    frames = [0, 5, 16]
    ours = geometry.keyframe_positions(torch.tensor([frames]), HEIGHT, WIDTH, torch.tensor([FPS]))
    theirs = [
        LTX2ConditionPipeline._prepare_keyframe_coords(scale, 1, HEIGHT, WIDTH, frame, 1, FPS, torch.device("cpu")) for frame in frames
    ]
    assert torch.allclose(ours, torch.cat(theirs, dim=2), rtol=1e-6, atol=0)
