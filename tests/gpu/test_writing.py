"""A language model that writes prompts out on a GPU with streamed layers."""

from functools import partial

import pytest
import torch

from musubi_tuner.ltxv2.text.enhancing import Enhancer, enhance
from musubi_tuner.placement import writing
from musubi_tuner.placement.writing import place_writer
from musubi_tuner.tiny.encoders import write_gemma

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_streamed_layers_write_what_resident_ones_write(tmp_path, monkeypatch):
    write_gemma(tmp_path / "gemma", layers=6)
    how = Enhancer(encoder=str(tmp_path / "gemma"), instruction="default", seed=10, device=torch.device("cuda"), dtype=torch.bfloat16)
    place = partial(place_writer, device=how.device, vram_gb=None, ram_gb=None)
    wanted = enhance(how, [("a dog barks", None)], place)
    monkeypatch.setattr(writing, "_streamed", lambda *given: 6)
    assert enhance(how, [("a dog barks", None)], place) == wanted
