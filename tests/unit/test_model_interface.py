"""The adapter, the model's interface, and the structure that one compiled graph needs."""

import dataclasses

import pytest
import torch

from musubi_tuner.conditioning import apply as rules
from musubi_tuner.conditioning.tokens import audio_stream, loss_weights, model_input, noised, video_stream
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.transformer import adaln
from musubi_tuner.ltxv2.transformer.adaln import timestep_embedding
from musubi_tuner.ltxv2.transformer.attention import Attention, attention_bias, key_bias
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.transformer.modality import levels_of
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper, create_network
from musubi_tuner.runtime.errors import UserError
from tests.model_parts import predict_latents

FIRST_OF_TWO = torch.tensor([[True] * 6 + [False] * 6, [False] * 12])
"""The first frame of the first item is given."""

FORMATS = ("flowmatch_1_1000", "legacy_0_1000", "sd3_0_1")


def wrapper(family, mode="av", timestep_format="sd3_0_1", dtype=torch.float32):
    return OfficialLTXV2Wrapper(load_transformer(open_checkpoint(family.ltx23), mode=mode, device="cpu", dtype=dtype), timestep_format)


def batch(size=2, frames=2, steps=6):
    generator = torch.Generator().manual_seed(0)
    video, audio = torch.randn(size, 128, frames, 2, 3, generator=generator), torch.randn(size, 8, steps, 16, generator=generator)
    return video, audio, torch.randn(size, 5, 128 + 64, generator=generator)


@torch.no_grad()
def test_latents_in_latents_out_in_every_format(tiny_family):
    from musubi_tuner.flow.path import to_timestep

    video, audio, text = batch()
    sigma = torch.tensor([0.3, 0.8])
    outputs = []
    for name in FORMATS:
        outputs.append(
            predict_latents(wrapper(tiny_family, timestep_format=name), video, to_timestep(sigma, name), text, audio_latents=audio)
        )
        assert outputs[-1][0].shape == video.shape and outputs[-1][1].shape == audio.shape
    for other in outputs[1:]:
        assert max(float((a - b).abs().max()) for a, b in zip(outputs[0], other, strict=True)) < 1e-2


def test_text_is_split_by_width_and_other_widths_are_named(tiny_family):
    text = torch.arange(192.0)[None, None]
    video, audio = wrapper(tiny_family).split_text(text)
    assert video.shape[-1] == 128 and audio.shape[-1] == 64 and float(audio[0, 0, 0]) == 128
    assert wrapper(tiny_family, "video").split_text(text[..., :128])[1] is None
    with pytest.raises(UserError, match=r"(?s)128 wide.*128 \+ 64.*backend.*--ltx_mode av"):
        wrapper(tiny_family).split_text(text[..., :128])


@torch.no_grad()
def test_contexts_reach_their_own_streams(tiny_family):
    video, audio, text = batch()
    model = wrapper(tiny_family)
    plain = predict_latents(model, video, torch.tensor(0.5), text, audio_latents=audio)
    other = text.clone()
    other[..., 128:] += 1
    changed = predict_latents(model, video, torch.tensor(0.5), other, audio_latents=audio)
    assert float((plain[1] - changed[1]).abs().max()) > 1e-2
    alone = wrapper(tiny_family, "video")
    assert torch.equal(
        predict_latents(alone, video, torch.tensor(0.5), text)[0], predict_latents(alone, video, torch.tensor(0.5), other)[0]
    )


def test_modality_is_frozen_and_its_timesteps_are_per_token():
    latents, fps = torch.randn(2, 128, 2, 2, 3), torch.tensor([24.0, 16.0])
    stream = rules.keep_clean(video_stream(latents, fps), FIRST_OF_TWO)
    modality = model_input(stream, torch.zeros_like(stream.clean), torch.tensor([0.7, 0.2]))
    assert modality.timesteps[0].tolist() == pytest.approx([0.0] * 6 + [0.7] * 6)
    assert modality.timesteps[1].tolist() == pytest.approx([0.2] * 12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        modality.sigma = None
    levels, index = levels_of(modality.timesteps)
    assert torch.equal(levels.gather(1, index), modality.timesteps)


def test_clean_tokens_reach_the_model_unchanged_without_loss():
    latents = torch.randn(2, 128, 2, 2, 3)
    stream = rules.keep_clean(video_stream(latents, torch.full((2,), 24.0)), FIRST_OF_TWO)
    modality, _ = noised(stream, torch.randn_like(stream.clean), torch.tensor([0.7, 0.2]))
    assert torch.equal(modality.latent[0, :6], geometry.patchify_video(latents)[0, :6])
    assert loss_weights(stream).tolist() == [[0.0] * 6 + [1.0] * 6, [1.0] * 12]
    assert modality.keyframe_marker.sum(1).tolist() == [6, 6]


def test_patchify_and_back():
    video, audio = torch.randn(2, 128, 3, 2, 4), torch.randn(2, 8, 5, 16)
    tokens = geometry.patchify_video(video)
    assert torch.equal(tokens[:, 1 * 8 + 1 * 4 + 2], video[:, :, 1, 1, 2])
    assert torch.equal(geometry.unpatchify_video(tokens, 3, 2, 4), video)
    sound = geometry.patchify_audio(audio)
    assert torch.equal(sound[:, 3, 2 * 16 + 7], audio[:, 2, 3, 7])
    assert torch.equal(geometry.unpatchify_audio(sound), audio)


def test_positions_are_seconds_and_pixels_for_every_sample():
    positions = geometry.video_positions(3, 2, 2, torch.tensor([24.0, 16.0, 24.0]))
    assert positions.shape == (3, 3, 12, 2)
    assert torch.equal(positions[0], positions[2])
    assert (positions[1, 0, [0, 4, 8]] * 16).tolist() == [[0, 1], [1, 9], [9, 17]]
    assert positions[0, 1, :4].tolist() == [[0, 32], [0, 32], [32, 64], [32, 64]]
    seconds = geometry.audio_positions(4, 1)[0, 0]
    assert torch.allclose(seconds, torch.tensor([[0, 0.01], [0.01, 0.05], [0.05, 0.09], [0.09, 0.13]]))
    assert geometry.audio_latent_steps(121, 24.0) == 126 and geometry.audio_steps_of_mel(505) == 127


@pytest.mark.parametrize("frames", [1, 9, 17, 25, 33, 41, 49, 57, 65, 73, 81, 89, 97, 121])
def test_valid_frame_counts(frames):
    assert geometry.latent_frames(frames) == (frames + 7) // 8


@pytest.mark.parametrize(("frames", "near"), [(24, "17 and 25"), (48, "41 and 49"), (100, "97 and 105"), (45, "41 and 49")])
def test_invalid_frame_counts_name_the_nearest(frames, near):
    with pytest.raises(UserError, match=near):
        geometry.latent_frames(frames)


def test_sigma_stays_float32_until_the_embedding():
    close = timestep_embedding(torch.tensor([500.3, 500.4]))
    assert close.dtype == torch.float32
    assert float((close[0] - close[1]).abs().max()) > 1e-2


@torch.no_grad()
def test_a_bf16_model_gets_its_noise_levels_in_float32(tiny_family, monkeypatch):
    """bfloat16 has 8 bits: 0.7012 and 0.7031 would be one level."""
    seen = []
    monkeypatch.setattr(adaln, "timestep_embedding", lambda timesteps: seen.append(timesteps) or timestep_embedding(timesteps))
    video, audio, text = (one.bfloat16() for one in batch())
    model = wrapper(tiny_family, dtype=torch.bfloat16)
    sigma = torch.tensor([0.7012, 0.7031])
    video_modality = model_input(video_stream(video, torch.full((2,), 24.0)), torch.zeros(2, 12, 128), sigma)
    model(video_modality, model_input(audio_stream(audio, None), torch.zeros(2, 6, 128), sigma), text, None)
    assert seen and {levels.dtype for levels in seen} == {torch.float32}
    scales = {round(float(value), 2) for levels in seen for value in levels.flatten()}
    assert {701.2, 703.1} <= scales, scales


def test_masks_reach_attention_as_bool_or_in_the_dtype_of_the_query():
    bias = attention_bias(torch.tensor([[[1.0, 0.5, 0.0]]]), torch.bfloat16)
    assert bias.dtype == torch.bfloat16
    assert bias[0, 0, 0].float().tolist() == pytest.approx([0.0, -0.693, torch.finfo(torch.bfloat16).min], rel=1e-2)
    assert attention_bias(torch.ones(1, 2, 2, dtype=torch.bool), torch.bfloat16).dtype == torch.bool
    with pytest.raises(TypeError, match="bool"):
        key_bias(torch.zeros(1, 4))


@torch.no_grad()
def test_attention_of_different_lengths():
    attention = Attention(12, 8, 2, 6, gated=True, eps=1e-6)
    assert attention(torch.randn(2, 5, 12), torch.randn(2, 9, 8)).shape == (2, 5, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrapped_layers_return_the_dtype_they_received(tiny_family, dtype):
    model = load_transformer(open_checkpoint(tiny_family.ltx23), mode="video", device="cpu", dtype=dtype)
    network = create_network(model, dim=4, alpha=4, args={}, seed=0)
    layer = next(iter(network.layers.values()))
    assert layer(torch.randn(1, 3, 128, dtype=dtype)).dtype == dtype
    assert layer.lora_A.dtype == torch.float32
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(p.numel() for p in network.parameters()) > 0


def gradients(family, prepare=lambda model: None):
    model = wrapper(family)
    network = create_network(model.transformer, dim=4, alpha=4, args={}, seed=0)
    for layer in network.layers.values():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    prepare(model.transformer)
    video, audio, text = batch()
    outputs = predict_latents(model, video, torch.tensor(0.5), text, audio_latents=audio)
    sum(output.pow(2).mean() for output in outputs).backward()
    return [p.grad for p in network.parameters()]


def test_checkpointing_recomputes_every_block_and_changes_no_gradient(tiny_family, monkeypatch):
    calls = []

    def count(model):
        blocks = model.transformer_blocks
        model.run_block = BlockEngine(blocks, [Recompute.EVERYTHING] * len(blocks), max_rank=4)
        for block in blocks:
            forward = block.forward
            monkeypatch.setattr(block, "forward", lambda *a, forward=forward: calls.append(1) or forward(*a))

    plain, recomputed = gradients(tiny_family), gradients(tiny_family, count)
    assert len(calls) == 2 * 2, "each of two blocks ran twice"
    assert all(float((a - b).abs().max()) < 1e-6 for a, b in zip(plain, recomputed, strict=True))


@torch.no_grad()
def test_padded_sound_is_excluded_from_attention(tiny_family):
    video, audio, text = batch()
    model = wrapper(tiny_family)
    garbage = audio.clone()
    garbage[:, :, 4:] = 100
    lengths = torch.tensor([4, 4])
    padded = predict_latents(model, video, torch.tensor(0.5), text, audio_latents=garbage, audio_lengths=lengths)
    exact = predict_latents(model, video, torch.tensor(0.5), text, audio_latents=audio[:, :, :4])
    assert float((padded[0] - exact[0]).abs().max()) < 1e-4
    assert float((padded[1][:, :, :4] - exact[1]).abs().max()) < 1e-4
    assert loss_weights(audio_stream(garbage, lengths))[0].tolist() == [1, 1, 1, 1, 0, 0]
