"""Feature extractors and connectors against ltx-core 1.0.0, and the encoders' own promises. float32, CPU."""

import dataclasses
import json

import pytest
import torch

from musubi_tuner.ltxv2 import reading
from musubi_tuner.ltxv2.text import connectors
from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS, load_connectors
from musubi_tuner.ltxv2.text.encoders import EncoderOptions, encoder_options, load_encoder, load_tokenizer
from musubi_tuner.ltxv2.text.features import load_feature_extractor
from musubi_tuner.ltxv2.text.pipeline import TextRecipe, load_finish_stage
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.placement.text import TextBatch, encode_prompts, load_feature_stage
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


def recipe(checkpoint, options: EncoderOptions, *, mode: str = "av", stage: str = "context") -> TextRecipe:
    return TextRecipe(checkpoint=checkpoint, config=read_config(checkpoint), options=options, mode=mode, stage=stage)


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
    features = [extractor(one, [n]) for one, n in zip(states, lengths, strict=True)]
    packed = extractor([torch.cat(layer) for layer in zip(*states, strict=True)], lengths)
    for stream in (0, 1):
        assert float((packed[stream] - torch.cat([pair[stream] for pair in features])).abs().max()) < 1e-5
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
    tokenizer, encoder = load_tokenizer(gemma(tiny_family)), load_encoder(gemma(tiny_family))
    together = encoder.encode(PROMPTS)
    assert together.lengths == tuple(len(tokenizer(prompt)) for prompt in PROMPTS)
    starts = [sum(together.lengths[:place]) for place in range(len(PROMPTS))]
    for prompt, start, length in zip(PROMPTS, starts, together.lengths, strict=True):
        ids = tokenizer(f"  {prompt}\n")
        assert ids[0] == 2 and 1 not in ids, "BOS first, no EOS, blanks around the prompt gone"
        full = torch.tensor([[0] * (CONTEXT_TOKENS - length) + ids])
        mask = (torch.arange(CONTEXT_TOKENS) >= CONTEXT_TOKENS - length).long()[None]
        output = encoder._model(input_ids=full, attention_mask=mask, output_hidden_states=True)
        assert len(together.layers) == LAYERS == len(output.hidden_states)
        for ours, padded in zip(together.layers, output.hidden_states, strict=True):
            assert float((ours[start : start + length] - padded[0, -length:]).abs().max()) < 1e-4
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state), "the last state is after the final norm"
        embedded = encoder._model.embed_tokens.weight[full[0]] * WIDTH**0.5
        assert torch.allclose(output.hidden_states[0][0], embedded, atol=1e-5), "the first state is the scaled embeddings"


def test_full_gemma_folder_gives_the_states_of_its_text_model(tiny_family, tmp_path):
    """As google/gemma-3-12b-it is stored: with a vision tower, which is not run, and a head, which is not used."""
    import shutil

    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextModel, SiglipVisionConfig

    text = Gemma3TextModel.from_pretrained(tiny_family.gemma)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text.config, vision_config=vision, mm_tokens_per_image=4))
    whole.model.language_model.load_state_dict(text.state_dict())
    whole.save_pretrained(tmp_path / "gemma")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_family.gemma / name, tmp_path / "gemma")
    full = encoder_options(str(tmp_path / "gemma"), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=None)
    recipe(open_checkpoint(tiny_family.ltx23), full).check()
    ours, plain = load_encoder(full).encode(PROMPTS), load_encoder(gemma(tiny_family)).encode(PROMPTS)
    assert all(torch.equal(one, other) for one, other in zip(ours.layers, plain.layers, strict=True))


def test_max_length_cuts_the_caption_and_not_the_context(tiny_family):
    options = gemma(tiny_family, max_length=4)
    assert len(load_tokenizer(options)(PROMPTS[1])) == 4
    text, mask = encode_prompts(recipe(open_checkpoint(tiny_family.ltx23), options), PROMPTS[1:2])[0]
    assert text.shape == (1024, 128 + 64) and bool(mask.all())


def test_modes_and_stages_have_their_shapes(tiny_family):
    checkpoint, options = open_checkpoint(tiny_family.ltx23), gemma(tiny_family)
    both = encode_prompts(recipe(checkpoint, options), PROMPTS[:1])[0][0]
    video = encode_prompts(recipe(checkpoint, options, mode="video"), PROMPTS[:1])[0][0]
    assert torch.equal(both[:, :128], video)
    features, mask = encode_prompts(recipe(checkpoint, options, stage="features"), PROMPTS[:1])[0]
    length = len(load_tokenizer(options)(PROMPTS[0]))
    assert features.shape == (length, 128 + 64) and mask.shape == (length,)


def test_features_finished_later_are_the_contexts(tiny_family):
    """Blocks 1 and 2, then 3 from what was kept of them, equal the one-shot path."""
    checkpoint, options = open_checkpoint(tiny_family.ltx23), gemma(tiny_family)
    features = encode_prompts(recipe(checkpoint, options, stage="features"), PROMPTS)
    contexts = encode_prompts(recipe(checkpoint, options), PROMPTS)
    connectors = load_connectors(checkpoint, device="cpu", dtype=torch.float32)
    for (feature, mask), (context, _) in zip(features, contexts, strict=True):
        video, audio = feature[None].split((128, 64), dim=-1)
        later = torch.cat(connectors(video, audio, mask.sum()[None]), dim=-1)
        assert float((later[0] - context).abs().max()) < 1e-4


@pytest.mark.parametrize("on_host", [[], [0, 1, 2]])
def test_encoder_is_gone_before_the_connectors_come(tiny_family, monkeypatch, on_host):
    import weakref

    from musubi_tuner.ltxv2.text import pipeline
    from musubi_tuner.placement import text

    seen, alive = [], []
    real_encoder, real_connectors = text.load_encoder, pipeline.load_connectors
    monkeypatch.setattr(text, "_choose", lambda *given: on_host)

    def load_and_watch(options: EncoderOptions, **kwargs: object) -> object:
        encoder = real_encoder(options, **kwargs)
        seen.append(weakref.ref(encoder._model))
        return encoder

    def load_and_look(*args: object, **kwargs: object) -> object:
        alive.extend(one() is not None for one in seen)
        return real_connectors(*args, **kwargs)

    monkeypatch.setattr(text, "load_encoder", load_and_watch)
    monkeypatch.setattr(pipeline, "load_connectors", load_and_look)
    encode_prompts(recipe(open_checkpoint(tiny_family.ltx23), gemma(tiny_family)), PROMPTS)
    assert alive == [False]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_encoder_is_near_the_full_one(tmp_path, bits):
    write_gemma(tmp_path, width=128)
    options = encoder_options(str(tmp_path), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=None)
    full = load_encoder(options).encode(PROMPTS[:1]).layers[-1]
    small = load_encoder(dataclasses.replace(options, **{f"load_in_{bits}bit": True})).encode(PROMPTS[:1]).layers[-1]
    assert 0 < float((full - small).norm()) < 0.5 * float(full.norm())


def test_t5_is_padded_with_zeros_and_masked(tiny_family):
    checkpoint = open_checkpoint(tiny_family.ltx23)
    options = encoder_options(str(tiny_family.t5), tokenizer=None, backend="t5", device=torch.device("cpu"), max_length=16)
    text, mask = encode_prompts(recipe(checkpoint, options, mode="video"), ["rain"])[0]
    assert text.shape == (16, 128)
    assert 0 < int(mask.sum()) < 16 and not bool(text[~mask].any()) and bool(text[mask].any())


def test_wrong_encoders_are_named(tiny_family, tmp_path):
    twenty = open_checkpoint(tiny_family.ltx20)
    t5 = encoder_options(str(tiny_family.t5), tokenizer=None, backend="t5", device=torch.device("cpu"), max_length=16)
    with pytest.raises(UserError, match="T5 is 128 wide.*context of 48"):
        recipe(twenty, t5, mode="video").check()
    with pytest.raises(UserError, match="model type is 't5'.*gemma3"):
        load_encoder(encoder_options(str(tiny_family.t5), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=16))
    with pytest.raises(UserError, match="hf download google/none"):
        load_encoder(encoder_options("google/none", tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=16))
    write_gemma(tmp_path / "wide", width=48)
    wide = encoder_options(str(tmp_path / "wide"), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=16)
    with pytest.raises(UserError, match="4 states of width 48, 192 features.*takes 128.*wrong --text_encoder"):
        recipe(twenty, wide, mode="video").check()
    write_gemma(tmp_path / "deep", layers=5)
    deep = encoder_options(str(tmp_path / "deep"), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=16)
    with pytest.raises(UserError, match="6 states of width 32"):
        encode_prompts(recipe(twenty, deep), ["a"])


def test_wrong_tokenizers_and_paths_are_named(tiny_family, tmp_path):
    def options(path: object, tokenizer: object = None, backend: str = "gemma") -> EncoderOptions:
        return encoder_options(
            str(path), tokenizer=tokenizer and str(tokenizer), backend=backend, device=torch.device("cpu"), max_length=16
        )

    with pytest.raises(UserError, match="--tokenizer.*puts BOS first"):
        load_tokenizer(options(tiny_family.gemma, tiny_family.t5))
    with pytest.raises(UserError, match="a URL"):
        load_encoder(options("https://example.org/gemma"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="config.json cannot be read"):
        load_encoder(options(tmp_path / "empty"))
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(options(tiny_family.gemma, tmp_path / "empty"))


def test_missing_bitsandbytes_says_what_to_install(tiny_family, monkeypatch):
    import dataclasses
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_encoder(dataclasses.replace(gemma(tiny_family), load_in_8bit=True))


def test_files_without_projection_or_connectors_are_named(tiny_family, tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoint = open_checkpoint(tiny_family.ltx23)
    with pytest.raises(UserError, match="no text projection"):
        recipe(open_checkpoint(tiny_family.ltx25_transformer), gemma(tiny_family)).check()
    kept = {name: value for name, value in load_file(tiny_family.ltx23).items() if "_connector." not in name}
    save_file(kept, tmp_path / "stripped.safetensors", metadata={"config": json.dumps(dict(checkpoint.config))})
    with pytest.raises(UserError, match="no text connectors"):
        recipe(open_checkpoint(tmp_path / "stripped.safetensors"), gemma(tiny_family)).check()
    mixed = kept | {"text_embedding_projection.aggregate_embed.weight": torch.zeros(128, 128)}
    save_file(mixed, tmp_path / "mixed.safetensors", metadata={"config": json.dumps(dict(checkpoint.config))})
    with pytest.raises(UserError, match="mixture of versions"):
        load_feature_extractor(open_checkpoint(tmp_path / "mixed.safetensors"), WIDTH, device="cpu", dtype=torch.float32)


def test_connectors_must_divide_the_context(tiny_family, tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoint = open_checkpoint(tiny_family.ltx23)
    key = "model.diffusion_model.video_embeddings_connector.learnable_registers"
    values = load_file(tiny_family.ltx23)
    values[key] = values[key][:100].clone()
    save_file(values, tmp_path / "m.safetensors", metadata={"config": json.dumps(dict(checkpoint.config))})
    with pytest.raises(UserError, match="100 connector registers"):
        load_connectors(open_checkpoint(tmp_path / "m.safetensors"), device="cpu", dtype=torch.float32)


def test_the_feature_stage_reads_the_projection_alone(checkpoint, tiny_family, monkeypatch):
    """Of a checkpoint of 46 GB, the text stages read what is theirs."""
    read, whole = [], reading._read_into

    def watched(data, name, entry):
        if entry.file == checkpoint.path:  # and not the encoder's own
            read.append(name)
        return whole(data, name, entry)

    monkeypatch.setattr(reading, "_read_into", watched)
    load_feature_stage(recipe(checkpoint, gemma(tiny_family)), [TextBatch(texts=1, longest=16)])
    assert read and all(name.startswith("text_embedding_projection.") for name in read)
    read.clear()
    load_finish_stage(recipe(checkpoint, gemma(tiny_family)))
    assert read and all("_embeddings_connector." in name for name in read)


def test_the_audio_connector_falls_back_to_the_keys_of_the_video(tiny_family):
    """2.0 has one set of keys for both; where the audio's own are there, they win."""
    checkpoint = open_checkpoint(tiny_family.ltx23)
    section = {key: value for key, value in checkpoint.config["transformer"].items() if not key.startswith("audio_connector_")}
    own = {"audio_connector_num_attention_heads": 2, "audio_connector_attention_head_dim": 24, "audio_connector_num_layers": 3}
    shared, split = (connectors._build(config, "audio_", registers=8) for config in (section, section | own))
    video = connectors._build(section, "", registers=8)
    shapes = [{name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (video, shared, split)]
    assert shapes[0] == shapes[1] != shapes[2]
    assert max(int(name.split(".")[1]) for name in shapes[2] if name.startswith("transformer_1d_blocks.")) == 2
