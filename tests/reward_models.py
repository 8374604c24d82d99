"""Tiny real models that rewards judge with: random weights, the real classes and preprocessors of transformers."""

from pathlib import Path

import torch

from tests.captioning_parts import _tokenizer

_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIGHT = {**_TEXT, "image_size": 32, "patch_size": 8}
_HEARING = {
    **_TEXT, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
}  # fmt: skip


def _saved(kind, config, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    (tokenizer := _tokenizer()).save_pretrained(folder)
    text = {**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}
    return _saved(CLIPModel, CLIPConfig(text_config=text, vision_config=_SIGHT, projection_dim=16), folder)


def write_siglip(folder: Path) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    (tokenizer := _tokenizer()).save_pretrained(folder)
    text = {**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    return _saved(SiglipModel, SiglipConfig(text_config=text, vision_config=_SIGHT), folder)


def write_dino(folder: Path) -> Path:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    return _saved(Dinov2Model, config, folder)


def write_wavlm_speakers(folder: Path) -> Path:
    """For x-vectors."""
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    tdnn = {"tdnn_dim": (16, 16, 16, 16, 32), "xvector_output_dim": 16, "num_ctc_classes": 80}
    return _saved(WavLMForXVector, WavLMConfig(**_HEARING, **tdnn), folder)


def write_wav2vec2(folder: Path) -> Path:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    return _saved(Wav2Vec2Model, Wav2Vec2Config(**_HEARING), folder)


def write_whisper(folder: Path) -> Path:
    """That says words of its tokenizer, whatever it hears."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
    from transformers.models.whisper.tokenization_whisper import WhisperTokenizer

    words = _tokenizer().get_vocab()
    tokenizer = WhisperTokenizer(vocab=words, merges=[], pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    WhisperProcessor(WhisperFeatureExtractor(feature_size=16), tokenizer).save_pretrained(folder)
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=16, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_target_positions=24, pad_token_id=0, eos_token_id=1,
        bos_token_id=2, decoder_start_token_id=2, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return _saved(WhisperForConditionalGeneration, config, folder)


def write_clap(folder: Path) -> Path:
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    ClapFeatureExtractor(feature_size=64, max_length_s=1, fft_window_size=1024, truncation="rand_trunc").save_pretrained(folder)
    (tokenizer := _tokenizer()).save_pretrained(folder)
    text = {**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0}
    audio = {
        "hidden_size": 64, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2], "num_mel_bins": 64,
        "spec_size": 128, "window_size": 4, "patch_size": 4, "patch_stride": [4, 4], "num_hidden_layers": 2, "num_classes": 8,
    }  # fmt: skip
    return _saved(ClapModel, ClapConfig(text_config=text, audio_config={**audio, "hidden_size": 32}, projection_dim=16), folder)
