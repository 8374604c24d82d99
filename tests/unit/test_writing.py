"""A language model that writes with some of its layers streamed writes what it writes without, and the plan says how many have to be."""

import logging
from functools import partial

import pytest
import torch
from transformers import Gemma3TextConfig

from musubi_tuner.ltxv2.text.enhancing import Enhancer, enhance
from musubi_tuner.memory.card import GIB
from musubi_tuner.memory.ring import Ring
from musubi_tuner.placement import writing
from musubi_tuner.placement.writing import place_writer, writing_bytes
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.encoders import write_gemma

CPU = torch.device("cpu")
PROMPTS = [("a dog barks", None), ("rain", None)]
LAYERS = 6
on_cpu = partial(place_writer, device=CPU, vram_gb=None, ram_gb=None)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "gemma"
    write_gemma(folder, layers=LAYERS)
    return folder


def written(folder, place=on_cpu) -> list[str]:
    how = Enhancer(encoder=str(folder), instruction="default", seed=10, device=CPU, dtype=torch.float32)
    return enhance(how, PROMPTS, place)


@pytest.mark.parametrize("streamed", [3, LAYERS])
def test_streamed_layers_write_the_same(gemma, monkeypatch, streamed):
    wanted, fetched, load = written(gemma), [], Ring.load
    monkeypatch.setattr(Ring, "load", lambda ring, number: fetched.append(number) or load(ring, number))
    monkeypatch.setattr(writing, "_streamed", lambda *given: streamed)
    assert written(gemma) == wanted and len(fetched) > 10 * streamed, "every word passes through them"


def on_a_card(folder, monkeypatch, device_bytes: int, host_bytes: int) -> int:
    monkeypatch.setattr(writing, "memory_to_use", lambda *given: (device_bytes, host_bytes))
    found = []

    def place(model, tokens):
        found.append(writing._streamed(model, tokens, torch.device("cuda"), 7.5, None))

    written(folder, place)
    return found[0]


def test_as_many_as_do_not_fit_are_streamed_and_what_never_fits_is_refused(gemma, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    sizes = []
    written(gemma, lambda model, tokens: sizes.append((model, tokens)))
    ((model, tokens),) = sizes
    layer = sum(one.nbytes for one in model.get_decoder().layers[0].parameters())
    total = sum(one.nbytes for one in model.parameters())
    working = writing_bytes(model.config, tokens, 4, sees=False)
    assert tokens > 512 and on_a_card(gemma, monkeypatch, total + working, GIB) == 0 and "streamed" not in caplog.text
    assert on_a_card(gemma, monkeypatch, total + working - 1, GIB) == 3, "two slots lie there in place of one layer"
    assert on_a_card(gemma, monkeypatch, total + working - (LAYERS - 2) * layer, GIB) == LAYERS
    assert f"{LAYERS} of {LAYERS} layers are streamed" in caplog.text
    with pytest.raises(UserError, match=r"still needs .* of the device, .* may be used by --vram_gb 7\.5\. Leave --enhance_prompt"):
        on_a_card(gemma, monkeypatch, total + working - (LAYERS - 2) * layer - 1, GIB)
    with pytest.raises(UserError, match=r"would take .* of host memory, of which .*enhanced_prompts\.json"):
        on_a_card(gemma, monkeypatch, total + working - 1, 3 * layer - 1)


@pytest.mark.parametrize(("gigabytes", "streamed"), [(8, 39), (16, 21), (24, 3), (32, 0)])
def test_gemma_12b_on_usual_cards(gigabytes, streamed):
    """As test_text_streaming; an instruction with a prompt has some 400 tokens."""
    config = Gemma3TextConfig(
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8, head_dim=256
    )
    weights = writing.LoadedBytes(layers=(448_297_984,) * 48, beside=2_013_765_120)
    working = writing_bytes(config, 400 + 512, 2, sees=False)
    assert 0.4 * GIB < working < 0.6 * GIB
    assert writing.streamed_count(weights, working, int((gigabytes - 0.5) * GIB * 0.94)) == streamed
