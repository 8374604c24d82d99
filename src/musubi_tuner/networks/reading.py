"""Files of trained networks, in every form that users have: ours, kohya's flattened names with alpha, and diffusers' names."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from musubi_tuner.networks.base import Tensors
from musubi_tuner.networks.formats import CONNECTORS_ENDING, DORA_SCALE, PREFIX
from musubi_tuner.networks.lora import DOWN, MAGNITUDE, UP
from musubi_tuner.networks.lycoris import LOHA, W1, W2, W2_DOWN, W2_UP
from musubi_tuner.networks.types import DIFF
from musubi_tuner.runtime.errors import UserError

_ALPHA = "alpha"
_FLATTENED = ("lora_unet_", "lycoris_")
_LEAVES = {
    DOWN: DOWN, UP: UP, "lora_down.weight": DOWN, "lora_up.weight": UP, MAGNITUDE: MAGNITUDE, f"{MAGNITUDE}.weight": MAGNITUDE,
    DORA_SCALE: MAGNITUDE, DIFF: DIFF, _ALPHA: _ALPHA,
    **{leaf: leaf for leaf in (*LOHA, W1, f"{W1}_a", f"{W1}_b", W2, W2_UP, W2_DOWN)},
}  # fmt: skip
"""Endings that are read, and what we call them."""
_FOLDED = {"lora": (UP, DOWN, 0), "dora": (UP, DOWN, 0), "loha": ("hada_w2_a", "hada_w1_b", 0)}
"""Type -> (tensor that takes the scale, tensor that tells the rank, which axis of it)."""

_FROM_DIFFUSERS = (
    ("av_cross_attn_video_scale_shift.", "av_ca_video_scale_shift_adaln_single."),
    ("av_cross_attn_audio_scale_shift.", "av_ca_audio_scale_shift_adaln_single."),
    ("av_cross_attn_video_a2v_gate.", "av_ca_a2v_gate_adaln_single."),
    ("av_cross_attn_audio_v2a_gate.", "av_ca_v2a_gate_adaln_single."),
    ("audio_prompt_adaln.", "audio_prompt_adaln_single."),
    ("prompt_adaln.", "prompt_adaln_single."),
    ("audio_time_embed.", "audio_adaln_single."),
    ("time_embed.", "adaln_single."),
    ("audio_proj_in.", "audio_patchify_proj."),
    ("proj_in.", "patchify_proj."),
)


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """One module's part of a file."""

    kind: str
    """A type of `networks.types.TYPES`."""
    tensors: Tensors
    """float32 under our endings, scale folded in."""


@dataclass(frozen=True, slots=True)
class NetworkFile:
    """A file that was read."""

    path: Path
    adapters: Mapping[str, StoredAdapter]
    """By official module name."""
    metadata: Mapping[str, str]

    @property
    def kind(self) -> str:
        """The type of all its adapters.

        Raises:
            UserError: more than one type.
        """
        kinds = sorted({adapter.kind for adapter in self.adapters.values()})
        if len(kinds) != 1:
            raise UserError(f"{self.path}: holds adapters of {len(kinds)} types ({', '.join(kinds)}); a start needs one type.")
        return kinds[0]


def read_network(path: Path, model_names: Sequence[str]) -> NetworkFile:
    """Read a network's file, or the newest one of a folder.

    Args:
        model_names: official names of the model's linears, which flattened keys are looked up in.

    Raises:
        UserError: an unreadable file, a key of no known form, an adapter that is not whole, or a module that the model lacks.
    """
    path = newest_file(path)
    if not path.is_file():
        raise UserError(f"{path}: no such LoRA file.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}).") from error
    flattened = {name.replace(".", "_"): name for name in model_names}
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in stored.items():
        stem, leaf = _split(path, key)
        modules[official_name(stem, flattened)][leaf] = tensor.float()
    foreign = sorted(set(modules) - set(model_names))
    if foreign:
        raise UserError(
            f"{path}: adapts {len(foreign)} module(s) that this model lacks, first '{foreign[0]}'. "
            "It was made for another model or mode (an AV LoRA does not fit --ltx_mode video)."
        )
    return NetworkFile(path, {name: _adapter(path, name, tensors) for name, tensors in modules.items()}, metadata)


def official_name(stem: str, flattened: Mapping[str, str]) -> str:
    """The official module name behind a key without its ending."""
    for prefix in _FLATTENED:
        if stem.startswith(prefix):
            key = stem.removeprefix(prefix)
            return flattened.get(key, key)
    for prefix in (PREFIX, "transformer.", "base_model.model."):
        stem = stem.removeprefix(prefix)
    for theirs, ours in _FROM_DIFFUSERS:
        if stem.startswith(theirs):
            return ours + stem.removeprefix(theirs)
    return stem


def newest_file(path: Path) -> Path:
    """The newest network in a folder, connectors' files aside; a file stands for itself.

    Raises:
        UserError: a folder without any.
    """
    if not path.is_dir():
        return path
    files = [one for one in path.glob("*.safetensors") if not one.name.endswith(CONNECTORS_ENDING)]
    if not files:
        raise UserError(f"{path}: no .safetensors file in this folder.")
    return max(files, key=lambda one: (one.stat().st_mtime_ns, one.name))


def _split(path: Path, key: str) -> tuple[str, str]:
    """(module, our ending) of one key."""
    for ending, leaf in _LEAVES.items():
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}"), leaf
    raise UserError(
        f"{path}: the key '{key}' is of no form that is read here (lora_A/lora_B, lora_down/lora_up, lokr_w1/lokr_w2, hada_w1_a..., diff)."
    )


def _adapter(path: Path, name: str, tensors: dict[str, Tensor]) -> StoredAdapter:
    alpha = tensors.pop(_ALPHA, None)
    kind = _kind(path, name, set(tensors))
    if MAGNITUDE in tensors:
        tensors[MAGNITUDE] = _magnitude(path, name, tensors)
    if alpha is not None:
        _fold(kind, tensors, float(alpha))
    return StoredAdapter(kind, tensors)


def _kind(path: Path, name: str, leaves: Collection[str]) -> str:
    whole = {
        frozenset((DOWN, UP)): "lora",
        frozenset((DOWN, UP, MAGNITUDE)): "dora",
        frozenset(LOHA): "loha",
        frozenset((DIFF,)): "full",
    }
    for first in ((W1,), (f"{W1}_a", f"{W1}_b")):
        for second in ((W2,), (W2_UP, W2_DOWN)):
            whole[frozenset(first + second)] = "lokr"
    kind = whole.get(frozenset(leaves))
    if kind is None:
        raise UserError(f"{path}: '{name}' has {', '.join(sorted(leaves)) or 'an alpha alone'}, which has no partner; the file is damaged.")
    return kind


def _magnitude(path: Path, name: str, tensors: Tensors) -> Tensor:
    """(out,) from either shape; one length for each input column is another method."""
    magnitude, rows = tensors[MAGNITUDE], tensors[UP].shape[0]
    if magnitude.numel() != rows:
        raise UserError(
            f"{path}: the DoRA magnitude of '{name}' is {tuple(magnitude.shape)}; read are ({rows},) and ({rows}, 1), one for each output."
        )
    return magnitude.flatten()


def _fold(kind: str, tensors: dict[str, Tensor], alpha: float) -> None:
    """alpha / rank into one of the tensors. LyCORIS leaves alpha aside where both halves of a LoKr are whole."""
    if kind == "full":
        return
    if kind == "lokr":
        rank = tensors[W2_DOWN].shape[0] if W2_DOWN in tensors else tensors[f"{W1}_b"].shape[0] if f"{W1}_b" in tensors else alpha
        leaf = W2_UP if W2_UP in tensors else W2
    else:
        leaf, telling, axis = _FOLDED[kind]
        rank = tensors[telling].shape[axis]
    tensors[leaf] = tensors[leaf] * (alpha / rank)
