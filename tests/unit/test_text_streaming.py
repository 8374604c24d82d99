"""A text encoder whose layers are streamed gives the states of one that lies on its device, and the plan says how many have to be."""

import dataclasses
import logging

import pytest
import torch

from musubi_tuner.ltxv2.text.encoders import EncoderShape, encoder_bytes, encoder_options, load_encoder
from musubi_tuner.ltxv2.text.loading import LoadedBytes
from musubi_tuner.ltxv2.text.pipeline import TextRecipe
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.memory.card import GIB
from musubi_tuner.memory.ring import Ring
from musubi_tuner.memory.streaming import BlockStreamer, spread
from musubi_tuner.placement import text
from musubi_tuner.placement.text import TextBatch, batch_bytes, load_feature_stage, load_streamed, streamed_count
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.tiny.encoders import write_gemma

CPU = torch.device("cpu")
PROMPTS = ["A dog barks.", "The rain taps on the roof while an old man waits quietly beside the neon sign.", "hm"]
LAYERS = 7

GEMMA_12B = LoadedBytes(layers=(448_297_984,) * 48, beside=2_013_765_120)
"""In bfloat16."""
PROJECTION = 50 * 3840 * (4096 + 2048) * 2
"""Of 2.3, in bfloat16: of 49 states, and one of these once more."""


def options(folder, backend="gemma", **changes):
    return dataclasses.replace(encoder_options(str(folder), tokenizer=None, backend=backend, device=CPU, max_length=32), **changes)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "gemma"
    write_gemma(folder, layers=LAYERS)
    return folder


@pytest.fixture
def recipe(tiny_family):
    checkpoint = open_checkpoint(tiny_family.ltx23)
    settings = {"config": read_config(checkpoint), "options": options(tiny_family.gemma)}
    return TextRecipe(checkpoint=checkpoint, **settings, mode="av", stage="context")


@pytest.mark.parametrize("streamed", [1, 3, LAYERS])
def test_streamed_layers_give_the_same_states(gemma, streamed):
    wanted = load_encoder(options(gemma))
    numbers = spread(LAYERS, streamed)
    encoder = load_streamed(options(gemma), numbers, poison=True)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS):  # the ring turns back to the first layers for the next batch
        for one, other in zip(encoder.encode(prompts).layers, wanted.encode(prompts).layers, strict=True):
            assert torch.equal(one, other)


def test_layers_are_on_their_way_before_their_turn(gemma, monkeypatch):
    fetched: list[int] = []
    load, use, at_its_turn = Ring.load, BlockStreamer._use, []
    monkeypatch.setattr(Ring, "load", lambda ring, number: fetched.append(number) or load(ring, number))
    numbers = spread(LAYERS, 5)
    encoder = load_streamed(options(gemma), numbers)
    encoder.encode(PROMPTS)
    fetched.clear()

    def watched(streamer, layer):
        before = len(fetched)
        use(streamer, layer)
        at_its_turn.append(len(fetched) - before)

    monkeypatch.setattr(BlockStreamer, "_use", watched)
    encoder.encode(PROMPTS)
    assert sorted(fetched) == [0, 1, 2, 3, 4] and at_its_turn == [0] * 5


@pytest.mark.parametrize("backend", ["gemma", "t5"])
def test_real_tokens_are_packed_as_by_a_mask(tiny_family, backend):
    """One prompt after the other, whatever side is padded; a cache of keys and values would change nothing."""
    encoder = load_encoder(options(getattr(tiny_family, backend), backend))
    found = encoder.encode(PROMPTS)
    ids = [encoder.tokenizer(prompt) for prompt in PROMPTS]
    longest = max(map(len, ids))
    padding = [longest - len(row) for row in ids]
    pad, left = encoder.tokenizer.padding, backend == "gemma"
    rows = torch.tensor([[pad] * gap + row if left else row + [pad] * gap for row, gap in zip(ids, padding, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in zip(ids, padding, strict=True)])
    with torch.inference_mode():
        output = encoder._model(input_ids=rows, attention_mask=mask, output_hidden_states=True)
    wanted = output.hidden_states if left else (output.last_hidden_state,)
    assert len(found.layers) == len(wanted) and found.lengths == tuple(map(len, ids))
    assert all(torch.equal(one, state[mask.bool()]) for one, state in zip(found.layers, wanted, strict=True))


def test_t5_streams_too(tiny_family):
    wanted = load_encoder(options(tiny_family.t5, "t5")).encode(PROMPTS).layers[0]
    numbers = list(range(len(load_encoder(options(tiny_family.t5, "t5")).layers)))
    encoder = load_streamed(options(tiny_family.t5, "t5"), numbers, poison=True)
    assert torch.equal(encoder.encode(PROMPTS).layers[0], wanted)


@pytest.mark.parametrize(("backend", "dtype"), [("gemma", torch.bfloat16), ("t5", torch.float16)])
def test_the_bytes_of_an_encoder_are_those_that_it_takes(tiny_family, backend, dtype):
    """T5 in float16 has linears in float32 among them."""
    wanted = options(getattr(tiny_family, backend), backend, dtype=dtype)
    found = encoder_bytes(wanted)
    encoder = load_encoder(wanted)
    assert found.layers == tuple(sum(one.nbytes for one in layer.parameters()) for layer in encoder.layers)
    assert found.total == sum(one.nbytes for one in encoder._model.parameters())
    assert encoder_bytes(dataclasses.replace(wanted, load_in_4bit=True)) is None


@pytest.mark.parametrize(
    ("gigabytes", "batch", "streamed"),
    [
        (8, TextBatch(8, 200), 45),
        (16, TextBatch(8, 200), 27),
        (16, TextBatch(8, 1024), 34),
        (24, TextBatch(8, 200), 9),
        (24, TextBatch(8, 1024), 16),
        (32, TextBatch(8, 200), 0),
        (32, TextBatch(8, 1024), 0),
        (32, TextBatch(16, 1024), 7),
    ],
)
def test_gemma_12b_on_usual_cards(gigabytes, batch, streamed):
    """With half a GB taken by the driver, and the margin that plans leave."""
    shape = EncoderShape(width=3840, states=49, inner=15360, heads=16)
    device = int((gigabytes - 0.5) * GIB * 0.94)
    beside = PROJECTION + batch_bytes(shape, batch, options("unused", dtype=torch.bfloat16))
    count = streamed_count(GEMMA_12B, beside, device)
    assert count == streamed
    on_device = (48 - count + (2 if count else 0)) * GEMMA_12B.layers[0] + GEMMA_12B.beside + beside
    assert on_device <= device
    assert not 0 < count < 3, "two slots hold two layers"


def test_a_device_without_room_for_two_layers_is_refused():
    weights = LoadedBytes(layers=(10, 12, 10), beside=5)
    assert [streamed_count(weights, 4, device) for device in (41, 40, 33, 32)] == [0, 3, 3, None]


def on_a_card(monkeypatch, recipe, device_bytes, host_bytes):
    monkeypatch.setattr(text, "memory_to_use", lambda *given: (device_bytes, host_bytes))
    card = dataclasses.replace(recipe.options, device=torch.device("cuda"))
    return text._choose(dataclasses.replace(recipe, options=card), [TextBatch(1, 4), TextBatch(2, 30)], 2)


def test_what_is_streamed_is_told_in_a_line(monkeypatch, recipe, caplog):
    caplog.set_level(logging.INFO)
    assert on_a_card(monkeypatch, recipe, GIB, GIB) == [] and not caplog.text
    weights = encoder_bytes(recipe.options)
    assert on_a_card(monkeypatch, recipe, _least(recipe), GIB) == [0, 1, 2]
    assert "3 of 3 layers are streamed from host memory" in caplog.text
    with pytest.raises(UserError, match="gemma3: 3 of its 3 layers do not fit.*of host memory.*--gemma_load_in_4bit"):
        on_a_card(monkeypatch, recipe, _least(recipe), 2 * sum(weights.layers) - 1)
    with pytest.raises(UserError, match="of the device.*the largest batch has 2 texts of 30 tokens.*--batch_size 1"):
        on_a_card(monkeypatch, recipe, _least(recipe) - 1, GIB)


def _least(recipe) -> int:
    """Bytes of the device with all layers streamed."""
    weights, shape = encoder_bytes(recipe.options), text.read_encoder_shape(recipe.options)
    names = recipe.checkpoint.with_prefix("text_embedding_projection.").values()
    projection = sum(recipe.checkpoint.tensor(name).numel() * 4 for name in names)
    batch = batch_bytes(shape, TextBatch(2, 30), recipe.options)
    return weights.beside + projection + projection // shape.states + batch + 2 * max(weights.layers)


def test_memory_that_cannot_be_pinned_is_told_with_a_remedy(monkeypatch, gemma):
    def refuse(*given, **named):
        raise UserError("448 MiB could not be pinned. Use --ram_gb.")

    monkeypatch.setattr(text, "BlockStreamer", refuse)
    with pytest.raises(UserError, match=r"2 layers cannot wait in host memory \(448 MiB.*--gemma_load_in_4bit"):
        load_streamed(options(gemma), [1, 3])


def test_a_stage_with_streamed_layers_gives_the_same_features(monkeypatch, recipe):
    wanted = load_feature_stage(recipe, [TextBatch(3, 32)]).encode(PROMPTS)
    monkeypatch.setattr(text, "_choose", lambda *given: [0, 1, 2])
    found = load_feature_stage(recipe, [TextBatch(3, 32)]).encode(PROMPTS)
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_encoder_keeps_to_the_memory_that_the_run_may_take(monkeypatch, recipe):
    """--vram_gb and --ram_gb, and torch's allocator with them, before anything is loaded."""
    given, capped = [], []
    monkeypatch.setattr(text, "memory_to_use", lambda *limits: given.append(limits[1:]) or (10, GIB))
    monkeypatch.setattr(text, "cap_device_memory", lambda device, vram_gb: capped.append((device.type, vram_gb)))
    load_feature_stage(dataclasses.replace(recipe, options=dataclasses.replace(recipe.options, vram_gb=9)), [TextBatch(1, 4)])
    assert capped == [("cpu", 9)] and not given
    card = dataclasses.replace(recipe.options, device=torch.device("cuda"), vram_gb=7.5, ram_gb=20)
    with pytest.raises(UserError, match=r"may be used by --vram_gb 7\.5 \(the largest batch"):
        load_feature_stage(dataclasses.replace(recipe, options=card), [TextBatch(1, 4)])
    assert given == [(7.5, 20)]


def test_a_card_without_room_for_texts_is_told_in_words(monkeypatch, recipe):
    def fail(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr(text.FeatureStage, "encode", fail)
    with pytest.raises(TemporaryFailure, match=r"were encoded \(CUDA out of memory. Tried\).*--sample_prompts .*--batch_size"):
        text.encode_prompts(recipe, PROMPTS)
