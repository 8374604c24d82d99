"""Counts what caching launches on a card, on a machine without one: clips through the encoders of pictures and sound, captions through
Gemma 3 12B or the Gemma 4 of LTX-2.5.

    python -m benchmarks.encoding                           clips of four sizes, sound of two lengths, captions of three sizes
    python -m benchmarks.encoding --streamed 6              besides, layers of a smaller encoder that are streamed
    python -m benchmarks.encoding --shapes --encoder gemma4 captions of 2.5 alone

For each: launches, times that the host waits for the card while it issues them, and the most memory above the weights, with what was
expected of it. It needs a CUDA build of torch, and says so where there is none (benchmarks/simulated_card). The simulated card has no
cuDNN and no cuFFT: each convolution and each Fourier transform counts as one launch, without a workspace of its own.
"""

import argparse
import collections
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.launches import kind_of
from benchmarks.simulated_card import Card, run_within, waits

if TYPE_CHECKING:
    from torch import Tensor

    from musubi_tuner.ltxv2.text.pipeline import FeatureStage

_LAYERS = 48
_CAPTIONS = ((1, 60), (8, 200), (8, 1024))
"""(texts, tokens of the longest); the others of a batch have a few less each."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one clip or batch."""

    launches: collections.Counter[str]
    waits: int
    peak_bytes: int
    """Above what was held before."""
    expected_bytes: int

    def row(self, title: str) -> str:
        copies = sum(count for kind, count in self.launches.items() if kind.startswith("copy"))
        cells = (self.launches.total() - copies, copies, self.waits, f"{self.peak_bytes / 1e9:.2f}", f"{self.expected_bytes / 1e9:.2f}")
        return f"| {title} | " + " | ".join(map(str, cells)) + " |"


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    if not Card.is_here():
        return run_within("benchmarks.encoding", argv)
    from benchmarks.caching import SHAPES

    card = Card()
    print("| | kernels | copies | host waits | GB at most | expected |")
    print("|---" * 6 + "|")
    for name in options.shapes:
        print(count_clip(card, SHAPES[name]).row(name), flush=True)
    for seconds in options.seconds:
        print(count_sound(card, seconds).row(f"{seconds:g} s of sound"), flush=True)
    for texts, longest in _CAPTIONS:
        print(
            count_captions(card, options.encoder, texts, longest, layers=_LAYERS, streamed=0).row(f"{texts} captions, {longest} tokens"),
            flush=True,
        )
    if options.streamed:
        texts, longest = _CAPTIONS[1]
        for streamed in (0, options.streamed):
            title = f"{texts} captions, {longest} tokens, {options.streamed} layers, {streamed} of them streamed"
            print(count_captions(card, options.encoder, texts, longest, layers=options.streamed, streamed=streamed).row(title), flush=True)
    return 0


def count_clip(card: Card, shape: tuple[int, int, int]) -> Counts:
    """A clip of (frames, height, width), from frames on the host to latents on their way back."""
    import torch

    from benchmarks.encoder_counts import count_encoder, make_encoder
    from musubi_tuner.encoding.pictures import frame_encoder
    from musubi_tuner.ltxv2.autoencoders.video_vae import ENCODER_TILES, VideoVAE

    encode = frame_encoder(VideoVAE(make_encoder("cuda", torch.bfloat16, toy=False), ENCODER_TILES, torch.bfloat16))
    frames = torch.zeros(*shape, 3, dtype=torch.uint8)
    with _empty_library_calls() as made:
        counts = _counted(card, lambda: encode([frames]), made, count_encoder(shape, ENCODER_TILES).peak_bytes)
    return counts


def count_sound(card: Card, seconds: float) -> Counts:
    """Stereo sound, from samples on the host to latents on their way back."""
    import torch

    from benchmarks.encoder_counts import make_sound_encoder, sound_bytes
    from musubi_tuner.encoding.audio import audio_encoder
    from musubi_tuner.ltxv2.geometry import AUDIO_SAMPLE_RATE

    encode = audio_encoder(make_sound_encoder("cuda"))
    samples = torch.zeros(2, round(seconds * AUDIO_SAMPLE_RATE))
    with _empty_library_calls() as made:
        return _counted(card, lambda: encode([samples]), made, sound_bytes(samples.shape[1]))


def count_captions(card: Card, encoder: str, texts: int, longest: int, *, layers: int, streamed: int) -> Counts:
    """A batch of captions, from words to features on the host, once others have been encoded."""
    from musubi_tuner.ltxv2.text.encoders import EncoderShape
    from musubi_tuner.placement.text import TextBatch, batch_bytes

    options = _encoder_options()
    stage = _make_stage(encoder, options, layers, streamed)
    shape = EncoderShape(width=_GEMMA["hidden_size"], states=layers + 1, inner=_GEMMA["intermediate_size"], heads=16)
    prompts = [" ".join(["word"] * (longest - 3 * place)) for place in range(texts)]
    of_projection = _GEMMA["hidden_size"] * sum(_PROJECTED) * options.dtype.itemsize
    expected = batch_bytes(shape, TextBatch(texts, longest), options) + of_projection
    return _counted(card, lambda: stage.encode(prompts), [], expected)


_GEMMA = {
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "sliding_window": 1024,
}
"""Of both encoders."""
_OWN = {
    "gemma3": {"vocab_size": 262208, "query_pre_attn_scalar": 256},
    "gemma4": {"vocab_size": 262144, "global_head_dim": 512, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
}
"""Of Gemma 3 12B, and of the Gemma 4 of LTX-2.5."""
_KINDS = {"gemma3": "gemma3_text", "gemma4": "gemma4_unified_text"}
"""Their names in transformers."""
_PROJECTED = (4096, 2048)
"""Widths of both streams of 2.3."""


def _encoder_options() -> Any:
    import torch

    from musubi_tuner.ltxv2.text.encoders import encoder_options

    return encoder_options("gemma", tokenizer=None, backend="gemma", device=torch.device("cuda"), max_length=None)


def _make_stage(encoder: str, options: Any, layers: int, streamed: int) -> "FeatureStage":
    """Encoder and text projection without numbers, as the caching program has them."""
    import torch
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    from musubi_tuner.ltxv2.text.encoders import PromptTokenizer, TextEncoder
    from musubi_tuner.ltxv2.text.features import FeatureExtractor
    from musubi_tuner.ltxv2.text.pipeline import FeatureStage
    from musubi_tuner.memory.streaming import spread
    from musubi_tuner.placement.text import stream_layers

    with torch.device("meta"):
        config = CONFIG_MAPPING[_KINDS[encoder]](**_GEMMA, **_OWN[encoder], num_hidden_layers=layers)
        model = MODEL_MAPPING[type(config)](config).to(options.dtype)
        extractor = FeatureExtractor(_GEMMA["hidden_size"], layers + 1, *_PROJECTED, version="V2").to(options.dtype)
    on_host = spread(layers, streamed)
    for number in on_host:
        model.layers[number].to_empty(device="cpu")
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            module.to_empty(device=options.device, recurse=False)
    loaded = TextEncoder(model.requires_grad_(False).eval(), PromptTokenizer(_Words(), options.max_length), options)
    if on_host:
        stream_layers(loaded.layers, on_host, options.device)
    return FeatureStage(loaded, extractor.to_empty(device=options.device).requires_grad_(False).eval(), options.dtype)


class _Words:
    """A tokenizer: a token for each word."""

    eos_token_id = pad_token_id = 0

    def __call__(self, text: str, **named: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text.split())}


def _counted(card: Card, run: Callable[[], object], further: list[str], expected: int) -> Counts:
    """The second run; `further` are lines of the log that the card does not write."""
    import torch

    run()
    further.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with card.watched() as lines, waits() as found:
        run()
    launches = collections.Counter(map(kind_of, (*lines, *further)))
    return Counts(launches, len(found), torch.cuda.max_memory_allocated() - before, expected)


@contextmanager
def _empty_library_calls() -> Iterator[list[str]]:
    """Convolutions and Fourier transforms that take and give memory, and run nothing; a line in the list for each."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    lines: list[str] = []
    aten = torch.ops.aten
    convolutions = (aten.convolution.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv3d.padding)
    kinds = (*convolutions, aten._fft_r2c.default)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> "Tensor":
            if operation in (aten.stft.center, aten.stft.default, aten.fft_rfft.default):  # they come here in one piece
                with self:
                    return operation.decompose(*arguments, **(named or {}))
            compiled_at_once = operation is aten.abs.default and arguments[0].is_complex()  # by NVRTC, which is not here either
            if operation not in kinds and not compiled_at_once:
                return operation(*arguments, **(named or {}))
            lines.append("product convolution" if operation in convolutions else "other transform")
            made = operation(*(one.to("meta") if isinstance(one, torch.Tensor) else one for one in arguments))
            return torch.empty_like(made, device=arguments[0].device)

    with Mode():
        yield lines


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from benchmarks.caching import SHAPES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="clips (default: all)")
    parser.add_argument("--seconds", nargs="*", type=float, default=[2, 5], help="lengths of sound (default: 2 5)")
    parser.add_argument("--encoder", default="gemma3", choices=list(_KINDS), help="of captions (default: gemma3)")
    parser.add_argument("--streamed", type=int, default=0, help="streamed layers; each takes 0.45 GB of this machine (default: 0)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
