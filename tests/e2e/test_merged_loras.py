"""LoRAs of clips merged into the weights while these are loaded: what they give beside the model, faster."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.generation import stages
from musubi_tuner.generation.denoise import SampledLatents, generate
from musubi_tuner.generation.recipe import read_recipe
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.memory.quantized import QuantizedLinear, quantize
from musubi_tuner.networks.base import base_weight
from musubi_tuner.networks.merging import merge_weight
from musubi_tuner.networks.reading import read_network
from musubi_tuner.networks.stack import NetworkStack, Strength
from musubi_tuner.networks.targets import linear_shapes
from musubi_tuner.placement.load import load_for_generation
from musubi_tuner.placement.planning import place_by_hand
from musubi_tuner.runtime.errors import UserError
from tests import preview_parts as parts
from tests.e2e.test_generate import run, second_stage
from tests.e2e.test_recreate import again


@pytest.fixture(scope="module")
def loras(tiny_family, tmp_path_factory) -> tuple[Path, Path]:
    """A LoRA, and a DoRA on the same weights."""
    folder = tmp_path_factory.mktemp("loras")
    tensors = load_file(tiny_family.distilled_lora)
    save_file({key: 0.7 * value for key, value in tensors.items()}, folder / "lora.safetensors")
    for name in [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]:
        out = tensors[f"{name}.lora_B.weight"].shape[0]
        tensors[f"{name}.lora_magnitude_vector"] = torch.rand(out, generator=torch.Generator().manual_seed(1)) + 0.5
    save_file(tensors, folder / "dora.safetensors")
    return folder / "lora.safetensors", folder / "dora.safetensors"


def load(family, weight_format: str, merged: list[tuple[Path, Strength]]):
    checkpoint, cpu = open_checkpoint(family.ltx23), torch.device("cpu")
    options = MemoryOptions(weight_format=weight_format, blocks_to_swap=0, compile=False, gradient_checkpointing=False)
    placement = place_by_hand(options, read_config(checkpoint).num_layers, cpu)
    return load_for_generation(checkpoint, placement, mode="av", timestep_format="sd3_0_1", device=cpu, dtype=torch.float32, loras=merged)


def test_merged_they_give_what_they_give_beside_the_model(tiny_family, loras):
    """Several, of which one is a DoRA, whose change is of the plain weight; with strengths by stream."""
    networks = [(loras[0], Strength(0.7, 0.2)), (loras[1], Strength(0.5, 0.0)), (loras[0], Strength(-0.3, 1.0))]
    merged, beside = load(tiny_family, "bf16", networks), load(tiny_family, "bf16", [])
    NetworkStack(beside.transformer, torch.float32).use(networks)
    ours, theirs = generate(merged, parts.sample(merged)), generate(beside, parts.sample(beside))
    assert torch.allclose(ours.video, theirs.video, atol=2e-4) and torch.allclose(ours.audio, theirs.audio, atol=2e-4)


def test_weights_without_strength_stay_as_they_are(tiny_family, loras):
    plain = dict(load(tiny_family, "bf16", []).transformer.named_parameters())
    pictures = dict(load(tiny_family, "bf16", [(loras[0], Strength(1, 0))]).transformer.named_parameters())
    changed = {name for name, weight in plain.items() if not torch.equal(weight, pictures[name])}
    assert changed and not any("audio_attn1" in name or "audio_ff" in name for name in changed)


@pytest.mark.parametrize("weight_format", ["int8", "nf4"])
def test_weights_in_few_bits_are_merged_before_they_are_quantized(tiny_family, loras, weight_format):
    merged, plain = load(tiny_family, weight_format, [(loras[0], Strength(0.8, 0.8))]), load(tiny_family, "bf16", [])
    adapters = read_network(loras[0], linear_shapes(plain.transformer)).adapters
    quantized = {name: linear for name, linear in merged.transformer.named_modules() if isinstance(linear, QuantizedLinear)}
    both = quantized.keys() & adapters.keys()
    assert both
    for name in both:
        wanted = merge_weight(base_weight(plain.transformer.get_submodule(name)).float(), adapters[name], 0.8)
        found = base_weight(quantized[name]).float()
        codes = quantize(wanted, weight_format)
        expected = QuantizedLinear(codes, None, wanted.shape[1]).dequantized_weight().float()
        assert torch.equal(found, expected), name


def latents(family, texts, folder: Path, *flags: str) -> tuple[list[SampledLatents], list[int]]:
    """Of each stage, and how many networks ran beside the model."""
    kept, beside = [], []
    with pytest.MonkeyPatch.context() as patch:
        real, use = stages.generate, NetworkStack.use
        patch.setattr(stages, "generate", lambda *a, **k: kept.append(real(*a, **k)) or kept[-1])
        patch.setattr(NetworkStack, "use", lambda self, networks: beside.append(len(networks)) or use(self, networks))
        run(family, texts, folder, "--prompt", "a dog", *flags)
    return kept, beside


def test_the_program_merges_those_of_each_stage(tiny_family, texts, loras, tmp_path):
    two = ("--pipeline", "hq", "--lora", f"{loras[0]}:0.6:1:0.5", *second_stage(tiny_family))
    plain, beside = latents(tiny_family, texts, tmp_path / "beside", *two)
    merged, none = latents(tiny_family, texts, tmp_path / "merged", *two, "--merge_loras")
    assert beside == [2, 2] and none == [0, 0]
    for one, other in zip(merged, plain, strict=True):
        assert torch.allclose(one.video, other.video, atol=1e-3) and torch.allclose(one.audio, other.audio, atol=1e-3)
    base, _ = latents(tiny_family, texts, tmp_path / "base")
    off, _ = latents(tiny_family, texts, tmp_path / "off", "--lora", f"{loras[0]}:0", "--merge_loras")
    assert torch.equal(base[0].video, off[0].video) and torch.equal(base[0].audio, off[0].audio)


def test_a_recipe_says_that_they_were_merged_and_a_grid_over_them_is_refused(tiny_family, texts, loras, tmp_path):
    (clip,) = run(tiny_family, texts, tmp_path / "first", "--prompt", "a dog", "--lora", str(loras[0]), "--merge_loras")
    assert read_recipe(clip).facts["merge_loras"] is True
    folder = ("--lora_folder", str(loras[0].parent))
    assert again(tiny_family, texts, clip, tmp_path / "again", *folder).read_bytes() == clip.read_bytes()
    flags = ("--prompt", "a dog", "--lora", str(loras[0]), "--merge_loras", "--grid", "seed=10,1")
    seeds = run(tiny_family, texts, tmp_path / "seeds", *flags)
    assert next(path for path in seeds if path.name == "clip_00_10.mp4").read_bytes() == clip.read_bytes()
    for grid in ("strength=0,1", f"lora={loras[0]},none"):
        with pytest.raises(UserError, match=r"--merge_loras merges those that all clips share.*--no-merge_loras"):
            again(tiny_family, texts, clip, tmp_path / "again", *folder, "--grid", grid)
