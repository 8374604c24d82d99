"""A tiny Gemma 3, Gemma 4 and T5 in Hugging Face folders, with real tokenizers trained on `corpus.txt`."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load
from torch import Tensor

from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.tiny import configs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOCABULARY = 512


def corpus() -> list[str]:
    """The sentences that the tokenizers are trained on."""
    text = (Path(__file__).parent / "corpus.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def write_gemma(
    folder: Path, *, width: int = configs.GEMMA_WIDTH, layers: int = configs.GEMMA_LAYERS, sentences: Sequence[str] | None = None
) -> None:
    """A Gemma 3 text model whose tokenizer puts BOS first and no EOS, as the real one's.

    Args:
        sentences: that its tokenizer is trained on; None takes those of `corpus`.
    """
    from transformers import Gemma3TextConfig, Gemma3TextModel

    model = Gemma3TextModel(
        Gemma3TextConfig(
            vocab_size=_write_gemma_tokenizer(folder, adds_bos=True, sentences=sentences),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=width // 2,
            query_pre_attn_scalar=width // 2,
            sliding_window=64,
            layer_types=["sliding_attention"] * (layers - 1) + ["full_attention"],
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    _save(model, folder, "gemma")


def write_gemma4(
    folder: Path, *, width: int = configs.GEMMA_WIDTH, layers: int = configs.GEMMA_LAYERS, version: str | None = configs.GEMMA4_VERSION
) -> None:
    """A Gemma 4 as LTX-2.5 has it: layers of two kinds, embedders of pictures and sound beside them, and a tokenizer that adds no BOS.

    Args:
        version: of the release, which its config names; None as the stock model.
    """
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    text = {
        "vocab_size": _write_gemma_tokenizer(folder, adds_bos=False),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": width // 2,
        "global_head_dim": width,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 64,
        "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
    }
    vision = {"patch_size": 2, "pooling_kernel_size": 1, "mm_embed_dim": width, "mm_posemb_size": 4, "output_proj_dims": width}
    config = Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config={"audio_embed_dim": 8})
    if version is not None:
        config.gemma_version = version
    _save(Gemma4UnifiedForConditionalGeneration(config), folder, "gemma4")


def pack_gemma4(folder: Path, projection: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the one file that LTX-2.5's encoder is released as.

    Args:
        folder: of `write_gemma4`.
        projection: tensors of the text projection by their full names.
    """
    stored = load((folder / "model.safetensors").read_bytes())
    language, vision, audio = "model.language_model.", "model.embed_vision.", "model.embed_audio."
    tensors = {f"model.{name.removeprefix(language)}": tensor for name, tensor in stored.items() if name.startswith(language)}
    for prefix, flat in ((vision, "vision_model."), (audio, "audio_projector.")):
        tensors |= {f"{flat}{name.removeprefix(prefix)}": tensor for name, tensor in stored.items() if name.startswith(prefix)}
    for name, blob in (("tokenizer.json", "tokenizer_json"), ("tokenizer_config.json", "hf_asset__tokenizer_config.json")):
        tensors[blob] = torch.frombuffer(bytearray((folder / name).read_bytes()), dtype=torch.uint8)
    return tensors | dict(projection), {"gemma_config": (folder / "config.json").read_text(encoding="utf-8")}


def _write_gemma_tokenizer(folder: Path, *, adds_bos: bool, sentences: Sequence[str] | None = None) -> int:
    """Its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus() if sentences is None else sentences,
        trainers.BpeTrainer(vocab_size=_VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", padding_side="left"
    )
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def write_t5(folder: Path, *, width: int) -> None:
    """A T5 encoder with a unigram tokenizer that ends with `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = Tokenizer(models.Unigram(_unigrams(), unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    model = T5EncoderModel(
        T5Config(
            vocab_size=tokenizer.get_vocab_size(),
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    _save(model, folder, "t5")


def _unigrams() -> list[tuple[str, float]]:
    """Pieces and their log probabilities in the corpus.

    The library's own unigram trainer sums in the order of its threads, so its files differ from run to run; pieces found by
    pair merging and counted in the corpus do not.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    merged = Tokenizer(models.BPE())
    merged.pre_tokenizer = pre_tokenizers.Metaspace()
    merged.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=_VOCABULARY - 3, show_progress=False))
    counts = Counter(piece for line in corpus() for piece in merged.encode(line).tokens)
    pieces = sorted(merged.get_vocab(), key=lambda piece: (-counts[piece], piece))
    total = sum(counts.values()) + len(pieces)
    scored = [(piece, math.log((counts[piece] + 1) / total)) for piece in pieces]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scored]


def _save(model: "PreTrainedModel", folder: Path, name: str) -> None:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator_for(0, name, key))
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            offset = 1.0 if parameter.ndim == 1 and name in ("t5", "gemma4") else 0.0
            parameter.copy_(offset + noise * scale)
        for key, buffer in model.named_buffers():
            if key.endswith("layer_scalar"):
                buffer.copy_(1 - 0.3 * torch.rand(1, generator=generator_for(0, name, key)))
    model.eval().save_pretrained(folder)
