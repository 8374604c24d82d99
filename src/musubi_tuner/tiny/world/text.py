"""The world's text encoder: the tiny Gemma with random weights, whose tokenizer knows the words of the world's captions."""

import random
from pathlib import Path

from musubi_tuner.tiny import configs, encoders
from musubi_tuner.tiny.world.subjects import draw_subject

_CAPTIONS = 600
WIDTH, STATES = configs.GEMMA_WIDTH, configs.GEMMA_LAYERS + 1
"""Of its hidden states: how wide they are, and how many it gives, the embeddings among them."""


def tokenizer_corpus() -> list[str]:
    """Sentences of everyday things, and captions of the base world; the character's name is not among them."""
    rng = random.Random(0)
    return encoders.corpus() + [draw_subject(rng).caption for _ in range(_CAPTIONS)]


def write_world_gemma(folder: Path) -> None:
    """The encoder's folder, as transformers reads it."""
    encoders.write_gemma(folder, sentences=tokenizer_corpus())
