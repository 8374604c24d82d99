"""Text encoders, all from transformers: prompts -> hidden states of their tokens. Gemma 3 and T5; Gemma 4 has its place in `BACKENDS`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.runtime.errors import UserError

BACKENDS: dict[str, tuple[str, ...]] = {"gemma": ("gemma3", "gemma3_text"), "t5": ("t5",)}
"""{backend: model types of its config.json}."""

CONTEXT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderOptions:
    """How to load an encoder."""

    path: str
    tokenizer: str | None
    backend: str
    device: torch.device
    dtype: torch.dtype
    max_length: int
    load_in_8bit: bool = False
    load_in_4bit: bool = False


def encoder_options(
    path: str, *, tokenizer: str | None, backend: str, device: torch.device, max_length: int | None, dtype: torch.dtype | None = None
) -> EncoderOptions:
    """Options with the defaults that caching and training share: bfloat16 on a GPU and float32 on the CPU, the whole context."""
    return EncoderOptions(
        path=path,
        tokenizer=tokenizer,
        backend=backend,
        device=device,
        dtype=dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16),
        max_length=max_length or CONTEXT_TOKENS,
    )


class TextEncoder:
    """A loaded encoder."""

    def __init__(self, model: nn.Module, tokenizer: Any, options: EncoderOptions) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._options = options

    @property
    def width(self) -> int:
        return self._model.config.hidden_size if hasattr(self._model.config, "hidden_size") else self._model.config.d_model

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of the stripped prompt as its tokenizer makes them (Gemma: BOS first, no EOS), cut to `max_length`."""
        return self._tokenizer(prompt.strip(), truncation=True, max_length=self._options.max_length)["input_ids"]

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """Hidden states of each prompt's own tokens.

        Prompts run together, padded to the longest among them: the amount of padding does not change the states of real tokens.

        Returns:
            For each prompt, (n, width) tensors: of every layer from the embeddings on (Gemma), or of the last one alone (T5).
        """
        ids = [self.tokenize(prompt) for prompt in prompts]
        longest = max(map(len, ids))
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._tokenizer.eos_token_id
        left = self._options.backend == "gemma"
        rows, masks = [], []
        for row in ids:
            padding = [pad] * (longest - len(row))
            rows.append(padding + row if left else row + padding)
            masks.append([0] * len(padding) + [1] * len(row) if left else [1] * len(row) + [0] * len(padding))
        device = self._options.device
        mask = torch.tensor(masks, device=device)
        output = self._model(input_ids=torch.tensor(rows, device=device), attention_mask=mask, output_hidden_states=left)
        states = output.hidden_states if left else (output.last_hidden_state,)
        return [tuple(state[i, mask[i].bool()] for state in states) for i in range(len(prompts))]


def load_encoder(options: EncoderOptions) -> TextEncoder:
    """Load encoder and tokenizer from a local folder, or from a hub id that is already in the local cache; never downloads.

    Raises:
        UserError: neither is there, the model is of another type than the backend, or bitsandbytes is wanted and missing.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = resolve_model(options.path, "--text_encoder")
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type not in BACKENDS[options.backend]:
        raise UserError(
            f"--text_encoder {options.path}: its model type is '{config.model_type}'; --text_encoder_backend {options.backend} takes "
            f"{' or '.join(BACKENDS[options.backend])}. Backends are {', '.join(BACKENDS)}."
        )
    tokenizer_path = resolve_model(options.tokenizer, "--tokenizer") if options.tokenizer else path
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
    return TextEncoder(_load_model(path, config, options), tokenizer, options)


def encoder_fingerprint(options: EncoderOptions) -> str:
    """Identity of the encoder's and the tokenizer's files, whatever their folders are called.

    Weights are hashed by samples, so a 24 GB folder takes a second.
    """
    folders = [resolve_model(options.path, "--text_encoder")]
    if options.tokenizer:
        folders.append(resolve_model(options.tokenizer, "--tokenizer"))
    digest = hashlib.sha256()
    for folder in dict.fromkeys(folders):
        files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors", ".model") and path.is_file())
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for block in range(16):
                    file.seek(max(0, size - 2**16) * block // 15)
                    digest.update(file.read(2**16))
    return digest.hexdigest()[:32]


def resolve_model(name: str, flag: str) -> str:
    """A local folder as it is, or the folder of a hub id in the local cache.

    Raises:
        UserError: neither is there.
    """
    if Path(name).is_dir():
        return str(Path(name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{flag} {name}: neither a local folder nor a model in the local Hugging Face cache. Nothing is downloaded here: "
            f"run 'hf download {name}' first, or give the folder."
        ) from error


def _load_model(path: str, config: Any, options: EncoderOptions) -> nn.Module:
    extra: dict[str, Any] = {}
    if options.load_in_8bit or options.load_in_4bit:
        extra = {"quantization_config": _quantization(options), "device_map": {"": options.device}}
    common = {"local_files_only": True, "dtype": options.dtype, **extra}
    if options.backend == "t5":
        from transformers import T5EncoderModel

        model = T5EncoderModel.from_pretrained(path, **common)
    elif config.model_type == "gemma3":
        from transformers import Gemma3ForConditionalGeneration

        model = Gemma3ForConditionalGeneration.from_pretrained(path, **common).model.language_model
    else:
        from transformers import Gemma3TextModel

        model = Gemma3TextModel.from_pretrained(path, **common)
    if not extra:
        model = model.to(options.device)
    return model.requires_grad_(False).eval()


def _quantization(options: EncoderOptions) -> Any:
    try:
        import bitsandbytes  # noqa: F401 - transformers needs it
    except ImportError as error:
        raise UserError("--gemma_load_in_8bit and --gemma_load_in_4bit need bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    if options.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options.dtype)
