"""Text encoders, all from transformers: prompts -> hidden states of their tokens. Gemma 3, the Gemma 4 of LTX-2.5, and T5."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.text.loading import LoadedBytes, OnHost, layers_of, load_model, loaded_bytes
from musubi_tuner.ltxv2.text.packed import GEMMA4, is_packed, packed_config, tokenizer_folder
from musubi_tuner.runtime.device import to_device
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json

log = logging.getLogger(__name__)

BACKENDS: dict[str, tuple[str, ...]] = {"gemma": ("gemma3", "gemma3_text", *GEMMA4), "t5": ("t5",)}
"""{backend: model types of its config.json}."""

CONTEXT_TOKENS = 1024

_MOST_NAMES = 10


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
    vram_gb: float | None = None
    """Device memory (GB of 1024^3 bytes) that may be used; None = what is free."""
    ram_gb: float | None = None
    """The same of the host, for layers that wait there."""

    @property
    def bits(self) -> int | None:
        """That bitsandbytes quantizes to while it is loaded."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else None


def encoder_options(
    path: str,
    *,
    tokenizer: str | None,
    backend: str,
    device: torch.device,
    max_length: int | None,
    dtype: torch.dtype | None = None,
    vram_gb: float | None = None,
    ram_gb: float | None = None,
) -> EncoderOptions:
    """Options with the defaults that caching and training share: bfloat16 on a GPU and float32 on the CPU, the whole context."""
    return EncoderOptions(
        path=path,
        tokenizer=tokenizer,
        backend=backend,
        device=device,
        dtype=dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16),
        max_length=max_length or CONTEXT_TOKENS,
        vram_gb=vram_gb,
        ram_gb=ram_gb,
    )


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """What an encoder's config says."""

    width: int
    states: int
    """Hidden states it gives with the embeddings: layers + 1."""
    inner: int
    """Width of the feed-forward."""
    heads: int


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Of several prompts, their real tokens alone, one prompt after the other."""

    layers: tuple[Tensor, ...]
    """(N, width) of every layer from the scaled embeddings to the final norm (Gemma), or of the last one alone (T5)."""
    lengths: tuple[int, ...]
    """Tokens of each prompt; their sum is N."""


class PromptTokenizer:
    """Prompts -> token ids, as the encoder takes them."""

    def __init__(self, tokenizer: Any, max_length: int, start: Sequence[int] = ()) -> None:
        """
        Args:
            start: ids that are put before what the tokenizer makes.
        """
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._start = list(start)

    @property
    def padding(self) -> int:
        return self._tokenizer.eos_token_id if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id

    def __call__(self, prompt: str) -> list[int]:
        """Ids of the stripped prompt with what the tokenizer adds (Gemma: BOS first, no EOS), cut to `max_length`."""
        longest = self._max_length - len(self._start)
        return self._start + self._tokenizer(prompt.strip(), truncation=True, max_length=longest)["input_ids"]

    def tell_of_cut(self, names: Mapping[str, str]) -> None:
        """Warn of prompts that are longer than `max_length`.

        Args:
            names: what each prompt is called.
        """
        tokens = {prompt: len(self._start) + len(self._tokenizer(prompt.strip(), verbose=False)["input_ids"]) for prompt in names}
        cut = [f"{names[prompt]} ({count:,} tokens)" for prompt, count in tokens.items() if count > self._max_length]
        if cut:
            log.warning(
                "WARNING: %d text(s) are longer than the %d tokens of --max_length, and the rest of them is left out: %s",
                len(cut), self._max_length, ", ".join(cut[:_MOST_NAMES]) + (", ..." if len(cut) > _MOST_NAMES else ""),
            )  # fmt: skip


class TextEncoder:
    """A loaded encoder."""

    def __init__(self, model: Any, tokenizer: PromptTokenizer, options: EncoderOptions) -> None:
        self._model = model
        self.tokenizer = tokenizer
        self._options = options

    @property
    def width(self) -> int:
        return self._model.config.hidden_size

    @property
    def layers(self) -> list[nn.Module]:
        return layers_of(self._model, self._options.backend)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> HiddenStates:
        """Run prompts together, padded to the longest among them: padding does not change the states of real tokens."""
        ids = [self.tokenizer(prompt) for prompt in prompts]
        longest = max(map(len, ids))
        left = self._options.backend == "gemma"
        rows, masks, real = [], [], []
        for number, row in enumerate(ids):
            padding = [self.tokenizer.padding] * (longest - len(row))
            rows.append(padding + row if left else row + padding)
            masks.append([0] * len(padding) + [1] * len(row) if left else [1] * len(row) + [0] * len(padding))
            first = number * longest + (len(padding) if left else 0)
            real += range(first, first + len(row))
        # The places of real tokens are made here, and not found on the device, which the host would wait for.
        tokens, mask, places = (to_device(torch.tensor(one), self._options.device) for one in (rows, masks, real))
        states = self._states(tokens, mask)
        for number, state in enumerate(states):  # one by one: a padded state is gone before the next one is packed
            states[number] = state.flatten(0, 1)[places]
        return HiddenStates(tuple(states), tuple(map(len, ids)))

    def _states(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """(B, longest) ids and mask -> (B, longest, width) of every layer, or of T5's last."""
        if self._options.backend == "t5":
            return [self._model(input_ids=tokens, attention_mask=mask).last_hidden_state]
        # Without a cache of keys and values, which nothing reads and which is as large as all hidden states.
        return list(self._model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states)


def read_encoder_shape(options: EncoderOptions) -> EncoderShape:
    """Widths and depth from the encoder's config.json; loads no weights.

    Raises:
        UserError: no such encoder here, or of another type than the backend.
    """
    config = read_encoder_config(options)
    config = getattr(config, "text_config", config)
    inner = config.d_ff if options.backend == "t5" else config.intermediate_size
    return EncoderShape(config.hidden_size, config.num_hidden_layers + 1, inner, config.num_attention_heads)


def load_tokenizer(options: EncoderOptions) -> PromptTokenizer:
    """The tokenizer alone.

    That of LTX-2.5's Gemma 4 adds no BOS, which the model was trained with all the same; it is put before every prompt here.

    Raises:
        UserError: it is not here, or it is none of the backend's kind.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    flag = "--tokenizer" if options.tokenizer else "--text_encoder"
    name = options.tokenizer or options.path
    try:
        with _tokenizer_files(name, flag) as (folder, packed):
            # A packed tokenizer.json is taken as it is: the class that its config names would build the steps around its words anew.
            kind = PreTrainedTokenizerFast if packed else AutoTokenizer
            tokenizer: Any = kind.from_pretrained(folder, local_files_only=True)
        start = tokenizer("")["input_ids"]
    except UserError:
        raise
    except Exception as error:  # of tokenizers, which has no narrower class for what is wrong with a file
        raise UserError(
            f"{flag} {name}: holds no tokenizer that transformers can read ({error}). Give its folder with --tokenizer."
        ) from error
    bos = tokenizer.bos_token_id
    adds_none = options.backend == "gemma" and start == [] and bos is not None and read_encoder_config(options).model_type in GEMMA4
    if options.backend == "gemma" and start != [bos] and not adds_none:
        raise UserError(
            f"{flag} {name}: its tokenizer makes {start} of an empty prompt; a Gemma tokenizer puts BOS first and adds no EOS. "
            "Give the tokenizer of the encoder."
        )
    return PromptTokenizer(tokenizer, options.max_length, [bos] if adds_none else [])


@contextmanager
def _tokenizer_files(name: str, flag: str) -> Iterator[tuple[Path, bool]]:
    """Their folder, and whether they came from a packed file."""
    path = Path(resolve_model(name, flag))
    if path.is_dir():
        yield path, False
    else:
        with tokenizer_folder(path) as folder:
            yield folder, True


def encoder_bytes(options: EncoderOptions) -> LoadedBytes | None:
    """What its weights will take, read from configs alone; None where bitsandbytes or transformers loads them.

    Raises:
        UserError: what `read_encoder_shape` raises, or no weights.
    """
    config = read_encoder_config(options)
    if options.bits is not None:
        return None
    return loaded_bytes(Path(resolve_model(options.path, "--text_encoder")), config, backend=options.backend, dtype=options.dtype)


def load_encoder(options: EncoderOptions, *, on_host: OnHost | None = None) -> TextEncoder:
    """Load encoder and tokenizer from a local folder, a packed file, or a hub id that is already in the local cache; never downloads.

    Args:
        on_host: layers that are left in host memory; somebody has to bring them to the device before they run.

    Raises:
        UserError: neither is there, the model is of another type than the backend, and what `load_model` raises.
    """
    config = read_encoder_config(options)
    source = Path(resolve_model(options.path, "--text_encoder"))
    tokenizer = load_tokenizer(options)
    model = load_model(
        source, config, backend=options.backend, device=options.device, dtype=options.dtype, bits=options.bits, on_host=on_host or {}
    )
    return TextEncoder(model, tokenizer, options)


def read_encoder_config(options: EncoderOptions) -> Any:
    """The encoder's config, as transformers has it: of a folder's config.json, or of a packed file's metadata.

    Raises:
        UserError: no such encoder here, of another type than the backend, or of one that the installed transformers does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    path = Path(resolve_model(options.path, "--text_encoder"))
    where, file, packed = f"--text_encoder {options.path}", path / "config.json", path.is_file()
    content = packed_config(path) if packed else read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: is no JSON object. Download the encoder's config.json again.")
    kind = str(content.get("model_type"))
    if kind in GEMMA4 and kind not in CONFIG_MAPPING:
        raise UserError(
            f"{where}: the Gemma 4 of LTX-2.5 ('{kind}'), which transformers {__version__} does not know. Install a newer one: "
            "pip install --upgrade transformers (constraints.txt has the version that the tests pass with)."
        )
    config: Any = None
    try:
        if not packed:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            kind = config.model_type
        elif kind in CONFIG_MAPPING:
            config = AutoConfig.for_model(**content)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{where}: its config.json cannot be read ({error}). Give the folder of a model.") from error
    if kind not in BACKENDS[options.backend]:
        raise UserError(
            f"{where}: its model type is '{kind}'; --text_encoder_backend {options.backend} takes "
            f"{' or '.join(BACKENDS[options.backend])}. Backends are {', '.join(BACKENDS)}."
        )
    return config


def encoder_fingerprint(options: EncoderOptions) -> str:
    """Identity of the encoder's and the tokenizer's files, whatever their folders, or a packed file, are called.

    Weights are hashed by samples, so a 24 GB folder takes a second.

    Raises:
        UserError: a file that cannot be read, or no such folder.
    """
    places = [resolve_model(options.path, "--text_encoder")]
    if options.tokenizer:
        places.append(resolve_model(options.tokenizer, "--tokenizer"))
    digest = hashlib.sha256()
    for place in dict.fromkeys(map(Path, places)):
        packed = place.is_file()
        found = (
            [] if packed else [path for path in place.iterdir() if path.suffix in (".json", ".safetensors", ".model") and path.is_file()]
        )
        for path in [place] if packed else sorted(found):
            size = path.stat().st_size
            digest.update(f"{'packed' if packed else path.name} {size}".encode())
            try:
                with path.open("rb") as file:
                    for block in range(16):
                        file.seek(max(0, size - 2**16) * block // 15)
                        digest.update(file.read(2**16))
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror}). The encoder's files must all be readable.") from error
    return digest.hexdigest()[:32]


def is_local(name: str, flag: str) -> bool:
    """Whether an encoder is given by its folder or file, and not by a hub id.

    Raises:
        UserError: a name that no path can have.
    """
    try:
        return Path(name).is_dir() or Path(name).is_file()
    except OSError as error:
        raise UserError(f"{flag} {name:.100}: no encoder can be there ({error.strerror}). Give its folder.") from error


def resolve_model(name: str, flag: str) -> str:
    """A local folder or packed file as it is, or the folder of a hub id in the local cache.

    Raises:
        UserError: neither is there.
    """
    if "://" in name:
        raise UserError(f"{flag} {name}: a URL. Encoders are local folders: download it first and give its path.")
    if is_local(name, flag) and (Path(name).is_dir() or is_packed(Path(name))):
        return str(Path(name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        if Path(name).is_file():
            raise UserError(
                f"{flag} {name}: is a file, and not one that carries its config ('gemma_config' in its metadata), as the text encoder of "
                "LTX-2.5 does. Give the folder that holds the encoder's config.json and weights."
            ) from error
        raise UserError(
            f"{flag} {name}: neither a local folder nor a model in the local Hugging Face cache. Nothing is downloaded here: "
            f"run 'hf download {name}' first, or give the folder."
        ) from error
