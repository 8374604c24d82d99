"""Every component of a checkpoint of one's own against other implementations: `pytest tests/parity/test_weights.py --weights FILE`.

float32 on the CPU, the transformer a block at a time, so that a file of 46 GB takes some 16 GB of memory. Skipped without a file, and where
the file lacks the component.
"""

import math

import pytest
import torch

from musubi_tuner.conversion.checkpoint.components import TEXT, TRANSFORMER, components_of, model_names
from musubi_tuner.conversion.checkpoint.diffusers_models import model_of
from musubi_tuner.ltxv2.geometry import audio_positions, video_positions
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS, load_connectors
from musubi_tuner.ltxv2.text.features import load_feature_extractor
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.diffusers_names import diffusers_tensor
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.transformer.modality import Modality, levels_of
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError
from tests.parity import test_autoencoders as autoencoders
from tests.parity.test_autoencoders import torchaudio_stand_in  # noqa: F401 - a fixture of the module

FRAMES, HEIGHT, WIDTH, STEPS, FPS, TEXTS = 2, 2, 3, 5, 24.0, 7
TOLERANCE = 1e-4
"""Of the outputs' largest number."""


@pytest.fixture(scope="module")
def checkpoint(request):
    path = request.config.getoption("--weights", default=None)
    if path is None:
        pytest.skip("needs --weights FILE")
    return open_checkpoint(path)


def needs(checkpoint, component):
    if component not in components_of(checkpoint):
        pytest.skip(f"{checkpoint.path} holds no {component}")


def close(found, wanted):
    return float((found - wanted).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max()))


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def test_every_block_of_the_transformer_equals_diffusers(checkpoint):
    """A model of one block after the other, both with the same tensors."""
    needs(checkpoint, TRANSFORMER)
    from diffusers import LTX2VideoTransformer3DModel

    names = model_names(checkpoint)
    quantization = read_quantization(checkpoint, names)
    shapes = {full: checkpoint.shape(full) for full in quantization.weights.values()}
    model = model_of(TRANSFORMER, checkpoint, shapes, None)
    config = read_config(checkpoint)
    shortened = TransformerConfig(**{name: getattr(config, name) for name in config.__dataclass_fields__} | {"num_layers": 1})

    def value(name):
        full = quantization.weights[name]
        return quantization.restored(name, checkpoint.tensor(full), torch.device("cpu"), torch.float32).float()

    outside = {name: value(name) for name in quantization.weights if "_blocks." not in name and "_connector." not in name}
    with torch.device("meta"):
        ours = LTXModel(shortened, timestep_rule="cross").eval()
    theirs = LTX2VideoTransformer3DModel(**{**model.config, "num_layers": 1}).eval()
    different = []
    for block in range(config.num_layers):
        prefix = f"transformer_blocks.{block}."
        own = {f"transformer_blocks.0.{name.removeprefix(prefix)}": value(name) for name in quantization.weights if name.startswith(prefix)}
        ours.load_state_dict(outside | own, strict=True, assign=True)
        theirs.load_state_dict({diffusers_tensor(name): tensor for name, tensor in (outside | own).items()}, strict=True, assign=True)
        if not all(close(one, other) for one, other in zip(run(ours), run_theirs(theirs, ours), strict=True)):
            different.append(block)
    assert not different, f"the first block that differs is {different[0]}; of {config.num_layers}: {different}"


def inputs(model):
    config, count = model.config, FRAMES * HEIGHT * WIDTH
    return {
        "video": random(1, count, config.in_channels), "audio": random(1, STEPS, config.audio_in_channels),
        "texts": (random(1, TEXTS, config.video_context_width), random(1, TEXTS, config.audio_context_width)),
        "levels": torch.full((1, count), 0.6), "sound_levels": torch.full((1, STEPS), 0.3),
    }  # fmt: skip


def run(model):
    given = inputs(model)
    video, audio = (
        Modality(
            latent=given[stream], sigma=given[levels][:, 0], levels=levels_of(given[levels])[0], level_index=levels_of(given[levels])[1],
            positions=positions, context=text, context_mask=None,
        )
        for stream, levels, positions, text in (
            ("video", "levels", video_positions(FRAMES, HEIGHT, WIDTH, torch.full((1,), FPS)), given["texts"][0]),
            ("audio", "sound_levels", audio_positions(STEPS, 1), given["texts"][1]),
        )
    )  # fmt: skip
    return model(video, audio)


def run_theirs(model, ours):
    given = inputs(ours)
    return model(
        hidden_states=given["video"], audio_hidden_states=given["audio"], encoder_hidden_states=given["texts"][0],
        audio_encoder_hidden_states=given["texts"][1], timestep=given["levels"] * 1000, audio_timestep=given["sound_levels"] * 1000,
        sigma=given["levels"][:, 0] * 1000, audio_sigma=given["sound_levels"][:, 0] * 1000, num_frames=FRAMES, height=HEIGHT, width=WIDTH,
        fps=FPS, audio_num_frames=STEPS, use_cross_timestep=True, return_dict=False,
    )  # fmt: skip


def encoder_width(checkpoint):
    """Where the projection's inputs are a multiple of it; the width of one state elsewhere, which the maths here does not depend on."""
    flat = [checkpoint.shape(name)[1] for name in checkpoint.names() if name.endswith("aggregate_embed.weight")]
    width = checkpoint.config.get("transformer", {}).get("caption_channels", 3840)
    return width if not flat or flat[0] % width == 0 else math.gcd(flat[0], width)


@torch.no_grad()
def test_the_text_side_equals_diffusers(checkpoint):
    needs(checkpoint, TEXT)
    width = encoder_width(checkpoint)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    try:
        model = model_of(TEXT, checkpoint, shapes, width)
    except UserError as error:
        pytest.skip(str(error))
    theirs = model.cls(**model.config).eval()
    theirs.load_state_dict({names[0]: checkpoint.tensor(full).float() for full, names in model.targets.items()}, strict=True, assign=True)
    extractor = load_feature_extractor(checkpoint, width, device="cpu", dtype=torch.float32)
    connectors = load_connectors(checkpoint, device="cpu", dtype=torch.float32)
    states = [random(TEXTS, width) * (1 + layer % 3) for layer in range(model.config["text_proj_in_factor"])]
    wanted = connectors(*(one[None] for one in extractor(states, [TEXTS])), torch.tensor([TEXTS]))
    padded = torch.nn.functional.pad(torch.stack(states, dim=-1), (0, 0, 0, 0, CONTEXT_TOKENS - TEXTS, 0))[None]
    mask = (torch.arange(CONTEXT_TOKENS) >= CONTEXT_TOKENS - TEXTS).long()[None]
    assert all(close(found, expected) for found, expected in zip(theirs(padded.flatten(2), mask), wanted, strict=False))


@pytest.mark.parametrize(
    ("component", "test"),
    [
        ("vae", autoencoders.test_video_vae_equals_ltx_core),
        ("audio_vae", autoencoders.test_audio_vae_equals_ltx_core),
        ("vocoder", autoencoders.test_vocoder_equals_ltx_core),
    ],
)
def test_the_autoencoders_equal_ltx_core(checkpoint, component, test):
    needs(checkpoint, component)
    test(checkpoint)
