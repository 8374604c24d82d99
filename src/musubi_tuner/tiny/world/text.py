"""The world's text encoder: a tiny Gemma with random weights, whose tokenizer knows the words of the world's captions.

It is kept as files, since the transformer was trained on its hidden states: other versions of the libraries that make it may draw other
weights or merge other tokens.
"""

import random
import shutil
from pathlib import Path

from musubi_tuner.tiny import configs, encoders
from musubi_tuner.tiny.world.subjects import draw_subject

_KEPT = Path(__file__).parent / "data" / "gemma3"
_CAPTIONS = 600
WIDTH, STATES = configs.GEMMA_WIDTH, configs.GEMMA_LAYERS + 1
"""Of its hidden states: how wide they are, and how many it gives, the embeddings among them."""


def write_world_gemma(folder: Path) -> None:
    """The encoder's folder, as transformers reads it: the one that the world's transformer was trained with."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(_KEPT.iterdir()):
        shutil.copyfile(path, folder / path.name)


def make_world_gemma(folder: Path) -> None:
    """Make another one, in the way in which the one that is kept was made; a transformer has to be trained with it."""
    encoders.write_gemma(folder, sentences=tokenizer_corpus())


def tokenizer_corpus() -> list[str]:
    """Sentences of everyday things, and captions of the base world; the character's name is not among them."""
    rng = random.Random(0)
    return encoders.corpus() + [draw_subject(rng).caption for _ in range(_CAPTIONS)]
