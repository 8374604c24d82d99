"""The Gemma 4 of LTX-2.5 against transformers' whole model and diffusers' text path of 2.5, from a folder and from one packed file.
float32, CPU."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS
from musubi_tuner.ltxv2.text.encoders import EncoderOptions, encoder_options, load_encoder
from musubi_tuner.ltxv2.text.pipeline import TextRecipe
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.placement.text import encode_prompts, load_streamed
from musubi_tuner.tiny.checkpoint import projection_tensors
from musubi_tuner.tiny.configs import AUDIO_HEAD, AUDIO_WIDTH, GEMMA_WIDTH, HEADS, REGISTERS, VIDEO_HEAD, VIDEO_WIDTH
from musubi_tuner.tiny.encoders import pack_gemma4, write_gemma4

LAYERS = 7
"""The sixth is global, as in the released model, and so is the last, which has to be."""
PROMPTS = ["A dog barks.", "The rain taps on the roof while an old man waits quietly beside the neon sign.", ""]
BOS = 2
SHORT = 40
"""Tokens, more than the longest prompt has."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of seven layers, and the packed file of the same model with a projection for eight states."""
    folder = tmp_path_factory.mktemp("gemma 4")
    write_gemma4(folder / "folder", layers=LAYERS)
    tensors, metadata = pack_gemma4(folder / "folder", projection_tensors("2.5", states=LAYERS + 1))
    from safetensors.torch import save_file

    save_file(tensors, folder / "packed.safetensors", metadata=metadata)
    return folder / "folder", folder / "packed.safetensors"


def options(path, **changes) -> EncoderOptions:
    made = encoder_options(str(path), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=None)
    return dataclasses.replace(made, **changes)


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return ours.shape == expected.shape and float((ours - expected).norm()) < tolerance * float(expected.norm())


@pytest.fixture(scope="module")
def theirs(files):
    """{padded length: (states, mask)} of diffusers' pipeline of 2.5, run on transformers' whole model and a tokenizer that adds BOS itself.

    Its own padding to 1024 tokens moves prompts to positions where float32 angles of RoPE are rounded to 6e-5.
    """
    from diffusers import LTX2Pipeline
    from tokenizers import processors
    from transformers import AutoTokenizer, Gemma4UnifiedForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(files[0])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    model = Gemma4UnifiedForConditionalGeneration.from_pretrained(files[0]).eval()
    pipeline = SimpleNamespace(text_encoder=model, tokenizer=tokenizer)

    def run(length: int):
        with torch.no_grad():
            states, mask = LTX2Pipeline._get_gemma_prompt_embeds(
                pipeline, PROMPTS, max_sequence_length=length, device=torch.device("cpu"), dtype=torch.float32
            )
        return states.unflatten(2, (GEMMA_WIDTH, LAYERS + 1)), mask

    return {length: run(length) for length in (SHORT, CONTEXT_TOKENS)}


@pytest.mark.parametrize("packed", [False, True])
def test_states_are_those_of_transformers_and_diffusers(files, theirs, packed):
    encoder = load_encoder(options(files[packed]))
    ids = [encoder.tokenizer(prompt) for prompt in PROMPTS]
    assert all(row[0] == BOS and row.count(BOS) == 1 and 1 not in row for row in ids), "BOS first, though the tokenizer adds none; no EOS"
    found = encoder.encode(PROMPTS)
    assert len(found.layers) == LAYERS + 1
    for length, tolerance in ((SHORT, 1e-5), (CONTEXT_TOKENS, 1e-4)):
        states, mask = theirs[length]
        assert found.lengths == tuple(mask.sum(1).tolist())
        for number, layer in enumerate(found.layers):
            assert close(layer, states[mask.bool()][..., number], tolerance)
    assert torch.equal(load_encoder(options(files[packed])).encode(PROMPTS).layers[-1], found.layers[-1])


def test_the_last_state_is_after_the_final_norm_and_layers_end_with_their_scalar(files):
    encoder = load_encoder(options(files[1]))
    scalars = [float(layer.layer_scalar) for layer in encoder.layers]
    assert len(set(scalars)) == LAYERS and 1.0 not in scalars, "those of the file"
    assert [layer.self_attn.v_proj is None for layer in encoder.layers] == [False] * (LAYERS - 1) + [True]
    before = []
    encoder._model.norm.register_forward_pre_hook(lambda module, given: before.append(given[0]))
    last = encoder.encode(PROMPTS[:1]).layers[-1]
    assert close(last, encoder._model.norm(before[0])[0]) and not close(last, before[0][0])


def test_max_length_counts_the_bos(files):
    ids = load_encoder(options(files[1])).tokenizer(PROMPTS[1])
    cut = load_encoder(options(files[1], max_length=4)).tokenizer
    assert cut(PROMPTS[1]) == ids[:4]
    assert load_encoder(options(files[1], max_length=1)).tokenizer(PROMPTS[1]) == [BOS]


def test_cut_captions_are_told_with_the_bos(files, caplog):
    tokenizer = load_encoder(options(files[1], max_length=3)).tokenizer
    count = len(load_encoder(options(files[1])).tokenizer(PROMPTS[0]))
    tokenizer.tell_of_cut({PROMPTS[0]: "one"})
    assert f"one ({count} tokens)" in caplog.text


def test_streamed_layers_of_two_kinds_give_the_same_states(files):
    wanted = load_encoder(options(files[1])).encode(PROMPTS)
    for numbers in ([1, LAYERS - 1], list(range(LAYERS))):
        encoder = load_streamed(options(files[1]), numbers, poison=True)
        for _ in range(2):
            found = encoder.encode(PROMPTS)
            assert all(torch.equal(one, other) for one, other in zip(found.layers, wanted.layers, strict=True))


def test_contexts_are_those_of_diffusers(files, theirs, tiny_family):
    """Projection from the encoder's file, connectors from the transformer's."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    checkpoint = open_checkpoint(tiny_family.ltx25_transformer)
    recipe = TextRecipe(checkpoint=checkpoint, config=read_config(checkpoint), options=options(files[1]), mode="av", stage="context")
    recipe.check()
    contexts = encode_prompts(recipe, PROMPTS)
    reference = LTX2TextConnectors(
        caption_channels=GEMMA_WIDTH, text_proj_in_factor=LAYERS + 1, video_connector_num_attention_heads=HEADS,
        video_connector_attention_head_dim=VIDEO_HEAD, video_connector_num_learnable_registers=REGISTERS, video_gated_attn=True,
        audio_connector_num_attention_heads=HEADS, audio_connector_attention_head_dim=AUDIO_HEAD,
        audio_connector_num_learnable_registers=REGISTERS, audio_gated_attn=True, rope_type="split", per_modality_projections=True,
        video_hidden_dim=VIDEO_WIDTH, audio_hidden_dim=AUDIO_WIDTH, proj_bias=True,
    )  # fmt: skip
    values = {}
    whole = recipe.whole
    for name in whole.names():
        if match := re.search(r"(video|audio)_(embeddings_connector\.|aggregate_embed\.)(.*)", name):
            place = "connector." if match[2].startswith("emb") else "text_proj_in."
            leaf = match[3].replace("transformer_1d_blocks", "transformer_blocks").replace("q_norm", "norm_q").replace("k_norm", "norm_k")
            values[f"{match[1]}_{place}{leaf}"] = whole.tensor(name)
    reference.load_state_dict(values, strict=True)
    states, mask = theirs[SHORT]
    beside = CONTEXT_TOKENS - SHORT
    states, mask = torch.nn.functional.pad(states, (0, 0, 0, 0, beside, 0)), torch.nn.functional.pad(mask, (beside, 0))
    with torch.no_grad():
        video, audio, _ = reference(states, mask)
    for (context, valid), *expected in zip(contexts, video, audio, strict=True):
        assert context.shape == (CONTEXT_TOKENS, VIDEO_WIDTH + AUDIO_WIDTH) and bool(valid.all())
        for ours, wanted in zip(context.split((VIDEO_WIDTH, AUDIO_WIDTH), dim=1), expected, strict=True):
            assert close(ours, wanted)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_encoder_is_near_the_full_one(tmp_path, bits, packed):
    write_gemma4(tmp_path / "gemma", width=128)
    path = tmp_path / "gemma"
    if packed:
        tensors, metadata = pack_gemma4(path, {"text_embedding_projection.a": torch.zeros(2)})
        from safetensors.torch import save_file

        path = tmp_path / "packed.safetensors"
        save_file(tensors, path, metadata=metadata)
    full = load_encoder(options(path)).encode(PROMPTS[:1]).layers[-1]
    small = load_encoder(options(path, **{f"load_in_{bits}bit": True})).encode(PROMPTS[:1]).layers[-1]
    assert 0 < float((full - small).norm()) < 0.5 * float(full.norm())
