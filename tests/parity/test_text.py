"""Feature extractors and connectors against ltx-core 1.0.0, and the encoders' own promises. float32, CPU."""

import dataclasses
import json

import pytest
import torch

from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS, load_connectors
from musubi_tuner.ltxv2.text.encoders import EncoderOptions, encoder_options, load_encoder
from musubi_tuner.ltxv2.text.features import load_feature_extractor
from musubi_tuner.ltxv2.text.pipeline import load_text_pipeline
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.encoders import write_gemma

WIDTH, LAYERS = 32, 4
PROMPTS = ["A dog barks.", "The rain taps on the roof while an old man waits quietly beside the neon sign.", "hm"]


@pytest.fixture(scope="module", params=["ltx20", "ltx23"])
def checkpoint(request, tiny_family):
    return open_checkpoint(getattr(tiny_family, request.param))


def gemma(tiny_family, **extra) -> EncoderOptions:
    values = {"tokenizer": None, "backend": "gemma", "device": torch.device("cpu"), "max_length": None}
    return encoder_options(str(tiny_family.gemma), **{**values, **extra})


def reference(checkpoint):
    """ltx-core's EmbeddingsProcessor with the checkpoint's weights."""
    from ltx_core.model.transformer.rope import LTXRopeType
    from ltx_core.text_encoders.gemma.embeddings_connector import Embeddings1DConnector
    from ltx_core.text_encoders.gemma.embeddings_processor import EmbeddingsProcessor
    from ltx_core.text_encoders.gemma.feature_extractor import FeatureExtractorV1, FeatureExtractorV2

    section = checkpoint.config["transformer"]
    projection = {name: checkpoint.tensor(full) for name, full in checkpoint.with_prefix("text_embedding_projection.").items()}

    def linear(name: str) -> torch.nn.Linear:
        weight = projection[f"{name}.weight"]
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=f"{name}.bias" in projection)
        layer.load_state_dict({key.split(".")[1]: value for key, value in projection.items() if key.startswith(f"{name}.")})
        return layer

    if "aggregate_embed.weight" in projection:
        extractor = FeatureExtractorV1(linear("aggregate_embed"), is_av=True)
    else:
        extractor = FeatureExtractorV2(linear("video_aggregate_embed"), WIDTH, linear("audio_aggregate_embed"))
    connectors = []
    for stream in ("video", "audio"):
        prefix = f"model.diffusion_model.{stream}_embeddings_connector."
        values = {name: checkpoint.tensor(full) for name, full in checkpoint.with_prefix(prefix).items()}
        heads = section["connector_num_attention_heads"]
        width = values["learnable_registers"].shape[1]
        connector = Embeddings1DConnector(
            attention_head_dim=width // heads, num_attention_heads=heads, positional_embedding_max_pos=[4096],
            num_layers=1 + max(int(name.split(".")[1]) for name in values if name.startswith("transformer_1d_blocks.")),
            num_learnable_registers=values["learnable_registers"].shape[0], rope_type=LTXRopeType.SPLIT, double_precision_rope=True,
            apply_gated_attention=section.get("connector_apply_gated_attention", False),
        )  # fmt: skip
        connector.load_state_dict(values, strict=True)
        connector.learnable_registers.data = values["learnable_registers"]  # ltx-core holds them in bfloat16
        connectors.append(connector)
    return EmbeddingsProcessor(feature_extractor=extractor, video_connector=connectors[0], audio_connector=connectors[1]).eval()


@torch.no_grad()
def test_extractor_and_connectors_equal_ltx_core_for_one_prompt_and_for_three(checkpoint):
    extractor = load_feature_extractor(checkpoint, WIDTH, device="cpu", dtype=torch.float32)
    connectors = load_connectors(checkpoint, device="cpu", dtype=torch.float32)
    processor = reference(checkpoint)
    generator = torch.Generator().manual_seed(1)
    lengths = (5, 1, 40)
    states = [tuple(torch.randn(n, WIDTH, generator=generator) * (1 + i) for i in range(LAYERS)) for n in lengths]
    features = [extractor(one) for one in states]
    padded = [torch.nn.utils.rnn.pad_sequence([pair[stream] for pair in features], batch_first=True) for stream in (0, 1)]
    together = connectors(*padded, torch.tensor(lengths))
    for row, (one, pair, length) in enumerate(zip(states, features, lengths, strict=True)):
        left = tuple(torch.nn.functional.pad(state, (0, 0, CONTEXT_TOKENS - length, 0))[None] for state in one)
        mask = torch.zeros(1, CONTEXT_TOKENS, dtype=torch.int64)
        mask[:, CONTEXT_TOKENS - length :] = 1
        video, audio, _ = processor.process_hidden_states(left, mask, "left")
        alone = connectors(pair[0][None], pair[1][None], torch.tensor([length]))
        for ours, batched, expected in zip(alone, together, (video, audio), strict=True):
            assert ours.shape == expected.shape
            assert float((ours - expected).abs().max()) < 1e-4
            assert float((batched[row] - expected[0]).abs().max()) < 1e-4


@torch.no_grad()
def test_hidden_states_do_not_depend_on_padding_or_company(tiny_family):
    encoder = load_encoder(gemma(tiny_family))
    together = encoder.encode(PROMPTS)
    for prompt, states in zip(PROMPTS, together, strict=True):
        ids = encoder.tokenize(prompt)
        assert ids[0] == 2 and 1 not in ids, "BOS first, no EOS"
        assert len(states) == LAYERS and states[0].shape == (len(ids), WIDTH)
        full = torch.tensor([[0] * (CONTEXT_TOKENS - len(ids)) + ids])
        mask = (torch.arange(CONTEXT_TOKENS) >= CONTEXT_TOKENS - len(ids)).long()[None]
        output = encoder._model(input_ids=full, attention_mask=mask, output_hidden_states=True)
        for ours, padded in zip(states, output.hidden_states, strict=True):
            assert float((ours - padded[0, -len(ids) :]).abs().max()) < 1e-4


def test_max_length_cuts_the_caption_and_not_the_context(tiny_family):
    checkpoint = open_checkpoint(tiny_family.ltx23)
    pipeline = load_text_pipeline(checkpoint, read_config(checkpoint), gemma(tiny_family, max_length=4), mode="av", stage="context")
    assert pipeline.token_count(PROMPTS[1]) == 4
    text, mask = pipeline.encode(PROMPTS[1:2])[0]
    assert text.shape == (1024, 128 + 64) and bool(mask.all())


def test_modes_and_stages_have_their_shapes(tiny_family):
    checkpoint = open_checkpoint(tiny_family.ltx23)
    config = read_config(checkpoint)
    both, _ = load_text_pipeline(checkpoint, config, gemma(tiny_family), mode="av", stage="context").encode(PROMPTS[:1])[0]
    video, _ = load_text_pipeline(checkpoint, config, gemma(tiny_family), mode="video", stage="context").encode(PROMPTS[:1])[0]
    assert torch.equal(both[:, :128], video)
    pipeline = load_text_pipeline(checkpoint, config, gemma(tiny_family), mode="av", stage="features")
    features, mask = pipeline.encode(PROMPTS[:1])[0]
    assert features.shape == (pipeline.token_count(PROMPTS[0]), 128 + 64) and mask.shape == features.shape[:1]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_encoder_is_near_the_full_one(tmp_path, bits):
    write_gemma(tmp_path, width=128)
    options = encoder_options(str(tmp_path), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=None)
    full = load_encoder(options).encode(PROMPTS[:1])[0][-1]
    small = load_encoder(dataclasses.replace(options, **{f"load_in_{bits}bit": True})).encode(PROMPTS[:1])[0][-1]
    assert 0 < float((full - small).norm()) < 0.5 * float(full.norm())


def test_t5_is_padded_with_zeros_and_masked(tiny_family):
    checkpoint = open_checkpoint(tiny_family.ltx23)
    options = encoder_options(str(tiny_family.t5), tokenizer=None, backend="t5", device=torch.device("cpu"), max_length=16)
    text, mask = load_text_pipeline(checkpoint, read_config(checkpoint), options, mode="video", stage="context").encode(["rain"])[0]
    assert text.shape == (16, 128)
    assert 0 < int(mask.sum()) < 16 and not bool(text[~mask].any()) and bool(text[mask].any())


def test_wrong_encoders_are_named(tiny_family, tmp_path):
    twenty = open_checkpoint(tiny_family.ltx20)
    t5 = encoder_options(str(tiny_family.t5), tokenizer=None, backend="t5", device=torch.device("cpu"), max_length=16)
    with pytest.raises(UserError, match="T5 is 128 wide.*context of 48"):
        load_text_pipeline(twenty, read_config(twenty), t5, mode="video", stage="context")
    with pytest.raises(UserError, match="model type is 't5'.*gemma3"):
        load_encoder(encoder_options(str(tiny_family.t5), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=16))
    with pytest.raises(UserError, match="hf download google/none"):
        load_encoder(encoder_options("google/none", tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=16))
    write_gemma(tmp_path / "wide", width=48)
    wide = encoder_options(str(tmp_path / "wide"), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=16)
    with pytest.raises(UserError, match="48.*wrong --text_encoder"):
        load_text_pipeline(twenty, read_config(twenty), wide, mode="video", stage="context").encode(["a"])


def test_connectors_must_divide_the_context(tiny_family, tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoint = open_checkpoint(tiny_family.ltx23)
    key = "model.diffusion_model.video_embeddings_connector.learnable_registers"
    values = load_file(tiny_family.ltx23)
    values[key] = values[key][:100].clone()
    save_file(values, tmp_path / "m.safetensors", metadata={"config": json.dumps(dict(checkpoint.config))})
    with pytest.raises(UserError, match="100 connector registers"):
        load_connectors(open_checkpoint(tmp_path / "m.safetensors"), device="cpu", dtype=torch.float32)
