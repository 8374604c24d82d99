"""The diffusion decoder of LTX-2.5 against diffusers' own, with its attention, and neighborhood attention against its definition.
float32, CPU."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load, save_file

from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD
from musubi_tuner.ltxv2.autoencoders.diffusion_decoder import diffusers_config, least_cells
from musubi_tuner.ltxv2.autoencoders.neighborhood import neighborhood_attention
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE, video_vae_fingerprint
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.errors import UserError

PLAIN = {"device": "cpu", "dtype": torch.float32}


def by_definition(query, key, value, kernel):
    """Each cell attends to the box around it, which is moved inwards at the borders."""
    grid, result = query.shape[1:4], torch.empty_like(query)
    sides = [min(size, length) for size, length in zip(kernel, grid, strict=True)]
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                cell = (t, h, w)
                begins = [min(max(at - side // 2, 0), length - side) for at, side, length in zip(cell, sides, grid, strict=True)]
                box = tuple(slice(begin, begin + side) for begin, side in zip(begins, sides, strict=True))
                keys, values = (one[:, *box].flatten(1, 3) for one in (key, value))
                weights = torch.einsum("bhd,bkhd->bhk", query[:, t, h, w], keys).softmax(-1)
                result[:, t, h, w] = torch.einsum("bhk,bkhd->bhd", weights, values)
    return result


@pytest.mark.parametrize(("grid", "kernel"), [((3, 20, 9), (3, 5, 3)), ((9, 8, 17), (11, 3, 7)), ((1, 3, 4), (1, 1, 3))])
@pytest.mark.parametrize("gathered", [2**28, 2**14])
def test_neighborhood_attention_is_what_it_says(monkeypatch, grid, kernel, gathered):
    monkeypatch.setattr("musubi_tuner.ltxv2.autoencoders.neighborhood._GATHERED_BYTES", gathered)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, *grid, 2, 8, generator=generator) for _ in range(3))
    found = neighborhood_attention(query, key, value, kernel)
    assert torch.allclose(found, by_definition(query, key, value, kernel), atol=1e-5)


@pytest.fixture(scope="module")
def checkpoint(tiny_family):
    return open_checkpoint(tiny_family.ltx25_diffusion_vae)


def theirs(checkpoint):
    """diffusers' decoder with the same weights: three linears in place of the fused one, names by hand."""
    from diffusers import LTX2VideoDiffusionDecoderModel

    model = LTX2VideoDiffusionDecoderModel(**diffusers_config(checkpoint.config["vae"]))
    values = {"latents_mean": checkpoint.tensor(MEAN), "latents_std": checkpoint.tensor(STD)}
    for name in checkpoint.names():
        if name.startswith("decoder."):
            tensor, theirs = checkpoint.tensor(name), name.replace("attn.proj", "attn.to_out.0")
            theirs = (
                theirs.replace("q_norm", "norm_q")
                .replace("k_norm", "norm_k")
                .replace("t_embedder.mlp.0", "t_embedder.timestep_embedder.linear_1")
            )
            theirs = theirs.replace("t_embedder.mlp.2", "t_embedder.timestep_embedder.linear_2")
            parts = zip(("to_q", "to_k", "to_v"), tensor.chunk(3)) if ".qkv." in name else [("", tensor)]
            values |= {theirs.replace("qkv", part): value for part, value in parts}
    model.load_state_dict(values, strict=True)
    return model.eval()


def latents(*cells: int) -> torch.Tensor:
    return torch.randn(1, 128, *cells, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_decoding_equals_diffusers_pipeline(checkpoint):
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2VideoDiffusionDecodePipeline

    pipeline = LTX2VideoDiffusionDecodePipeline(theirs(checkpoint), FlowMatchEulerDiscreteScheduler())
    x = latents(2, 3, 3)
    wanted = pipeline(x, generator=generator_for(0, "diffusion decoder"), output_type="pt", return_dict=False)[0]
    found = VideoVAE.load(checkpoint, **PLAIN, parts=("decoder",)).decode(x)
    assert found.shape == (1, 3, 9, 96, 96)
    pixels = (found / 2 + 0.5).clamp(0, 1)[0].transpose(0, 1)
    assert float((pixels - wanted[0]).abs().max()) < 1e-5
    assert float(pixels.std()) > 0.02, "there is something to compare"


@torch.no_grad()
def test_tiles_equal_diffusers(checkpoint):
    vae, reference = VideoVAE.load(checkpoint, **PLAIN, parts=("decoder",)), theirs(checkpoint)
    sizes = {"tile_sample_min_height": 48, "tile_sample_min_width": 48, "tile_sample_min_num_frames": 8}
    sizes |= {"tile_sample_stride_height": 32, "tile_sample_stride_width": 32, "tile_sample_stride_num_frames": 6}
    for model in (vae._diffusion._network, reference):
        model.enable_tiling(**sizes)
    x = latents(2, 3, 4)
    raw = x * checkpoint.tensor(STD).view(1, -1, 1, 1, 1) + checkpoint.tensor(MEAN).view(1, -1, 1, 1, 1)
    wanted = reference.decode(raw, generator=generator_for(0, "diffusion decoder"), return_dict=False)[0]
    found = vae.decode(x)
    assert found.shape == wanted.shape == (1, 3, 9, 96, 128)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_small_clips_and_stills_are_decoded_too(checkpoint):
    """Smaller than the boxes of attention: as if their last cells went on, and twice the same."""
    vae = VideoVAE.load(checkpoint, **PLAIN)
    for cells in ((1, 1, 1), (1, 2, 4), (2, 1, 3)):
        x = latents(*cells)
        found = vae.decode(x)
        assert found.shape == (1, 3, 8 * (cells[0] - 1) + 1, 32 * cells[1], 32 * cells[2])
        assert torch.equal(found, vae.decode(x))
    still, going_on = latents(1, 3, 3), latents(1, 3, 3).expand(-1, -1, 2, -1, -1)
    assert torch.allclose(vae.decode(going_on)[:, :, :1], vae.decode(still), atol=1e-5)


def test_least_sizes_of_the_release(checkpoint):
    from types import SimpleNamespace

    kernels = ((3, 7, 7), (3, 7, 7), (3, 5, 5), (3, 5, 5))
    strides = ((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2))
    released = SimpleNamespace(decoder_stage_kernels=kernels, decoder_stage5_kernel=(11, 11, 11), decoder_upsample_strides=strides)
    assert least_cells(released) == (3, 7, 7), "17 frames of 224 x 224"
    assert VideoVAE.load(checkpoint, **PLAIN, parts=("decoder",))._diffusion._least == (2, 3, 3)


def test_both_files_encode_to_the_same_latents(checkpoint, tiny_family):
    conv = open_checkpoint(tiny_family.ltx25_vae)
    assert video_vae_fingerprint(checkpoint) == video_vae_fingerprint(conv)
    pixels = torch.rand(1, 3, 9, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    found, wanted = (VideoVAE.load(one, **PLAIN, parts=("encoder",)).encode(pixels) for one in (checkpoint, conv))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage_channels": None}, "'stage_channels'.*ltx-2.5-video-vae-conv"),
        ({"resampler_kind": "conv"}, "resampler_kind is 'conv'.*ltx-2.5-video-vae-conv"),
        ({"stage_channels": [64, 32, 16, 16, 12]}, "nothing can be built.*ltx-2.5-video-vae-conv"),
        ({"stage_depths": [1, 1, 1, 1, 1]}, "do not fit.*unexpected"),
    ],
)
def test_other_decoders_are_refused_in_words(checkpoint, change, message):
    section = json.loads(json.dumps(checkpoint.config["vae"]))
    section["decoder"] = {key: value for key, value in (section["decoder"] | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        VideoVAE.load(dataclasses.replace(checkpoint, config={"vae": section}), **PLAIN)


def test_gates_are_refused_and_coarse_heads_left_aside(checkpoint, tiny_family, tmp_path):
    tensors = load(tiny_family.ltx25_diffusion_vae.read_bytes())
    for name, further in (("aside", ["decoder.coarse_head.weight", "decoder.type_emb"]), ("gates", ["decoder.diff_blocks.0.gate_msa"])):
        save_file(tensors | {one: torch.ones(2) for one in further}, tmp_path / f"{name}.safetensors", metadata=dict(checkpoint.metadata))
    VideoVAE.load(open_checkpoint(tmp_path / "aside.safetensors"), **PLAIN)
    with pytest.raises(UserError, match="with gates .'decoder.diff_blocks.0.gate_msa'.*ltx-2.5-video-vae-conv"):
        VideoVAE.load(open_checkpoint(tmp_path / "gates.safetensors"), **PLAIN)
