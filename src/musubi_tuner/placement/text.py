"""A text encoder on this machine: as many of its layers as fit lie on the device, the others are streamed from host memory.

Gemma 3 12B has 24 GB of weights in bfloat16. Where a card has less to spare, some layers wait in pinned host memory and come to the device
while their predecessors compute, as the streamed blocks of training do (memory/streaming.py). The numbers are the same; each batch pays
for copying these layers once, so that batches as large as fit are best.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.text.encoders import (
    EncoderOptions,
    EncoderShape,
    TextEncoder,
    encoder_bytes,
    load_encoder,
    load_tokenizer,
    read_encoder_shape,
)
from musubi_tuner.ltxv2.text.features import extractor_names, load_feature_extractor
from musubi_tuner.ltxv2.text.loading import LoadedBytes
from musubi_tuner.ltxv2.text.pipeline import Features, FeatureStage, TextRecipe, load_finish_stage
from musubi_tuner.memory.card import GIB, cap_device_memory
from musubi_tuner.memory.card import free_memory as memory_to_use
from musubi_tuner.memory.compiling import first_line
from musubi_tuner.memory.plan import SLOTS
from musubi_tuner.memory.regions import Region
from musubi_tuner.memory.streaming import BlockStreamer, spread
from musubi_tuner.runtime.device import free_memory
from musubi_tuner.runtime.errors import TemporaryFailure, UserError

log = logging.getLogger(__name__)

_TOGETHER = 8
"""Prompts of a preview that are encoded together."""
_REMEDY = (
    "Encode with --gemma_load_in_4bit of ltxv2_cache_text_encoder_outputs.py (pip install bitsandbytes), whose encoder takes a quarter, "
    "or close programs that hold memory"
)


@dataclass(frozen=True, slots=True)
class TextBatch:
    """The size of texts that are encoded together."""

    texts: int
    longest: int
    """Tokens of the longest, to which the others are padded."""


def load_feature_stage(recipe: TextRecipe, batches: Sequence[TextBatch], *, sharers: int = 1) -> FeatureStage:
    """Load encoder and projection, with as many layers on the device as leave room for the largest batch.

    Args:
        batches: all that will be encoded.
        sharers: processes of this machine that each load an encoder; their host memory is one.

    Raises:
        UserError: what `TextRecipe.check` and `load_encoder` raise, and memory that does not suffice.
    """
    recipe.check()
    options = recipe.options
    on_host = _choose(recipe, batches, sharers)
    cap_device_memory(options.device, options.vram_gb)
    encoder, extractor = load_streamed(options, on_host) if on_host else load_encoder(options), None
    if options.backend != "t5":
        extractor = load_feature_extractor(recipe.whole, encoder.width, device=options.device, dtype=options.dtype)
    return FeatureStage(encoder, extractor, options.dtype)


def encode_prompts(recipe: TextRecipe, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """(text, mask) of a few prompts; leaves nothing in memory.

    Raises:
        UserError: what `load_feature_stage` raises.
    """
    recipe.check()
    tokenizer = load_tokenizer(recipe.options)
    tokenizer.tell_of_cut({prompt: f"the prompt '{prompt[:40]}...'" for prompt in prompts})
    batches = [prompts[start : start + _TOGETHER] for start in range(0, len(prompts), _TOGETHER)]
    with memory_in_words("the prompts are cached by ltxv2_cache_text_encoder_outputs.py, with --sample_prompts and a small --batch_size"):
        first = load_feature_stage(recipe, [TextBatch(len(batch), max(len(tokenizer(prompt)) for prompt in batch)) for batch in batches])
        features: list[Features] = []
        for batch in batches:
            features += first.encode(batch)
        del first
        free_memory(recipe.options.device)
        second = load_finish_stage(recipe)
        finished = [pair for start in range(0, len(features), _TOGETHER) for pair in second.finish(features[start : start + _TOGETHER])]
    del second
    free_memory(recipe.options.device)
    return finished


@contextmanager
def memory_in_words(remedy: str, doing: str = "texts were encoded") -> Iterator[None]:
    """Around the encoding, or writing, of texts.

    Args:
        remedy: that takes less memory: "... where <remedy>".
        doing: when it ran out: "... while <doing>".

    Raises:
        TemporaryFailure: in place of a device that runs out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TemporaryFailure(
            f"the card ran out of memory while {doing} ({first_line(error)}). Close other programs that hold memory of the "
            f"card; less is needed where {remedy}."
        ) from error


def load_streamed(options: EncoderOptions, on_host: Sequence[int], *, poison: bool = False) -> TextEncoder:
    """Load an encoder some layers of which are streamed; they are read into the memory that they stay in.

    Args:
        on_host: numbers of these layers.
        poison: as `BlockStreamer`, for tests.

    Raises:
        UserError: what `load_encoder` and `stream_layers` raise.
    """
    weights = encoder_bytes(options)
    assert weights is not None, "nobody has layers of such an encoder streamed"
    regions = Region.of_own(weights.layers[number] for number in on_host)
    encoder = load_encoder(options, on_host={number: region.put for number, region in zip(on_host, regions, strict=True)})
    stream_layers(encoder.layers, on_host, options.device, regions=regions, poison=poison)
    return encoder


def stream_layers(
    layers: Sequence[nn.Module],
    on_host: Sequence[int],
    device: torch.device,
    *,
    regions: Sequence[Region] | None = None,
    poison: bool = False,
) -> None:
    """Have layers that lie in host memory brought to the device before they run.

    Args:
        layers: all of a language model.
        on_host: numbers of those.
        regions: as `BlockStreamer`.
        poison: as `BlockStreamer`, for tests.

    Raises:
        UserError: so much host memory cannot be pinned.
    """
    streamed = [layers[number] for number in on_host]
    try:
        streamer = BlockStreamer(streamed, device, slots=SLOTS, poison=poison, regions=regions)
    except UserError as error:  # its remedies are those of training
        raise UserError(f"text encoder: {len(streamed)} layers cannot wait in host memory ({error}) {_REMEDY}.") from error

    def before(layer: nn.Module, given: object) -> None:
        streamer.before_forward(layer)

    def after(layer: nn.Module, given: object, made: object) -> None:
        streamer.after_forward(layer, last=True)

    for layer in streamed:
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)


def batch_bytes(shape: EncoderShape, batch: TextBatch, options: EncoderOptions) -> int:
    """Device memory that encoding a batch takes at most beside the weights; `python -m benchmarks.encoding` counts it.

    Kept: all hidden states (of T5 one). Beside them, of one layer: its input, that of its feed-forward, and three tensors within that; or,
    of T5, whose attention adds a bias for each head, three matrices of scores.
    """
    tokens, size = batch.texts * batch.longest, options.dtype.itemsize
    t5 = options.backend == "t5"
    kept = tokens * shape.width * size * (2 if t5 else shape.states)
    layer = tokens * (3 * shape.inner + 2 * shape.width) * size
    scores = 3 * tokens * batch.longest * shape.heads * size if t5 else 0
    return kept + max(layer, scores)


def streamed_count(weights: LoadedBytes, beside: int, device_bytes: int) -> int | None:
    """How many layers have to be streamed; None where the slots of streamed layers do not fit either.

    Args:
        beside: bytes on the device beside the encoder's weights: text projection and a batch.
        device_bytes: that may be used.
    """
    room = device_bytes - weights.beside - beside
    if sum(weights.layers) <= room:
        return 0
    largest = max(weights.layers)
    resident = room // largest - SLOTS
    return None if resident < 0 else len(weights.layers) - resident


def _capped(options: EncoderOptions) -> str:
    return "" if options.vram_gb is None else f" by --vram_gb {options.vram_gb:g}"


def _choose(recipe: TextRecipe, batches: Sequence[TextBatch], sharers: int) -> list[int]:
    """Numbers of the layers that are streamed.

    Raises:
        UserError: device or host have too little memory.
    """
    options, checkpoint = recipe.options, recipe.whole
    weights = encoder_bytes(options) if options.device.type == "cuda" else None
    if weights is None:
        return []
    shape = read_encoder_shape(options)
    batch = max(batches, key=lambda one: batch_bytes(shape, one, options))
    names = [] if options.backend == "t5" else extractor_names(checkpoint).values()
    projection = sum(prod(checkpoint.shape(name)) for name in names) * options.dtype.itemsize
    beside = projection + projection // shape.states + batch_bytes(shape, batch, options)  # a layer's part of it is copied to be used
    device_bytes, host_bytes = memory_to_use(options.device, options.vram_gb, options.ram_gb)
    count = streamed_count(weights, beside, device_bytes)
    where = f"--text_encoder {options.path}"
    if count is None:
        least = weights.beside + beside + SLOTS * max(weights.layers)
        raise UserError(
            f"{where}: with all layers in host memory it still needs {least / GIB:.1f} GiB of the device, of which "
            f"{device_bytes / GIB:.1f} may be used{_capped(options)} (the largest batch has {batch.texts} texts of {batch.longest} "
            f"tokens). {_REMEDY}, or encode fewer texts together (--batch_size 1)."
        )
    on_host = spread(len(weights.layers), count)
    waiting = sum(weights.layers[number] for number in on_host)
    if waiting * sharers > host_bytes:
        raise UserError(
            f"{where}: {count} of its {len(weights.layers)} layers do not fit on the device, and would take {waiting * sharers / GIB:.1f} "
            f"GiB of host memory, of which {host_bytes / GIB:.1f} may be used. {_REMEDY}."
        )
    if count:
        log.info(
            "Text encoder: %d of %d layers are streamed from host memory (%.1f GiB), as %.1f GiB of the device may be used and it takes "
            "%.1f; --gemma_load_in_8bit and --gemma_load_in_4bit make it smaller, with rounded weights.",
            count, len(weights.layers), waiting / GIB, device_bytes / GIB, (weights.total + beside) / GIB,
        )  # fmt: skip
    return on_host
