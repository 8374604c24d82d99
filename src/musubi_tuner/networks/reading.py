"""Files of trained networks: read in every form that users have, checked, and brought to our own form with the scale folded in."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from musubi_tuner.ltxv2.versions import transformer_prefix
from musubi_tuner.networks.base import Tensors
from musubi_tuner.networks.formats import CONNECTORS_ENDING
from musubi_tuner.networks.keys import ALPHA, FLATTENED, PREFIXES, Key, is_text_side, read_key, unknown_prefix
from musubi_tuner.networks.lora import DOWN, MAGNITUDE, UP
from musubi_tuner.networks.lycoris import LOHA, W1, W2, W2_DOWN, W2_UP
from musubi_tuner.networks.scales import PEFT_FILE, PeftScale, peft_scale
from musubi_tuner.networks.shapes import adapted_shape, broken_shape
from musubi_tuner.networks.targets import count_by_stream, stream_of
from musubi_tuner.networks.types import DIFF
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import quoted

Linears = Mapping[str, tuple[int, ...] | None]
"""Official names of a model's linears, and the (out, in) of their weights; None where it is not known."""

_COMPONENTS = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.", "duration_head.", "encoder.", "decoder.")
"""What the tensors of a checkpoint's other parts begin with."""
_SCALED = {"lora": UP, "dora": UP, "loha": LOHA[2], "full": DIFF}


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """One module's part of a file."""

    kind: str
    """A type of `networks.types.TYPES`."""
    stored: Tensors
    """Under our endings, otherwise as the file has them: a distilled LoRA of 8 GB would have twice that in float32."""
    rank: int = 0
    """Of its tensors; 0 where they have none."""
    scale: float = 1.0
    """To be folded in."""

    @property
    def tensors(self) -> Tensors:
        """float32 under our endings, scale folded in; made anew each time."""
        tensors = {leaf: tensor.float() for leaf, tensor in self.stored.items()}
        if self.scale != 1.0:
            leaf = scaled_leaf(self.kind, self.stored)
            tensors[leaf] = tensors[leaf] * self.scale
        return tensors


@dataclass(frozen=True, slots=True)
class NetworkFile:
    """A file that was read."""

    path: Path
    adapters: Mapping[str, StoredAdapter]
    """By official module name."""
    metadata: Mapping[str, str]
    form: str = ""
    """Whose naming its keys follow."""
    scale_from: str = ""
    """Where the scale was found, in words."""
    left_out: tuple[str, ...] = ()
    """Modules of the text connectors, which are no part of the transformer."""

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

    def describe(self) -> str:
        """What was read, in one line: form, modules by stream, ranks, scale."""
        streams = ", ".join(f"{stream} {count}" for stream, count in count_by_stream(list(self.adapters)).items() if count)
        types = ", ".join(sorted({adapter.kind for adapter in self.adapters.values()}))
        ranks = _range(adapter.rank for adapter in self.adapters.values() if adapter.rank)
        scales = _range(adapter.scale for adapter in self.adapters.values())
        return (
            f"{types} on {len(self.adapters)} module(s) ({streams}), keys {self.form}, "
            f"{f'rank {ranks}, ' if ranks else ''}scale {scales} ({self.scale_from}), all values finite"
        )


def read_network(path: Path, linears: Linears, *, of_connectors: bool = False) -> NetworkFile:
    """Read a network's file, or the newest one of a folder.

    Args:
        linears: those of the model; flattened keys are looked up among them.
        of_connectors: take the adapters of the text connectors, which `linears` are then of, and leave the transformer's alone; there
            may be none.

    Raises:
        UserError: an unreadable file, a key of no known form, two keys for one tensor, an adapter that is not whole or not finite, a
            module that the model lacks or has in another size, or no adapter at all.
    """
    path = newest_file(path)
    stored, metadata = _read_tensors(path)
    keys = _read_keys(path, stored, linears)
    chosen = {key: one for key, one in keys.items() if is_text_side(one.module) == of_connectors or one.module in linears}
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    stems: dict[str, str] = {}
    for key, one in chosen.items():
        modules[one.module][one.leaf] = _checked_values(path, key, stored[key], may_be_whole=one.leaf == ALPHA)
        stems[one.module] = one.stem
    _refuse_foreign(path, modules, linears)
    said = peft_scale(path, metadata, stored)
    adapters = {name: _adapter(path, name, tensors, stems[name], said) for name, tensors in modules.items()}
    for name, adapter in adapters.items():
        _check_size(path, name, adapter, linears[name])
    left_out = tuple(sorted({one.module for one in keys.values()} - set(modules)))
    if not adapters and not of_connectors:
        raise UserError(
            f"{path}: holds no adapter{' but those of the text connectors' if left_out else ''}; give a trained network's file."
        )
    with_alpha = any(one.leaf == ALPHA for one in chosen.values())
    return NetworkFile(
        path,
        adapters,
        metadata,
        form=Counter(one.form for one in chosen.values() if one.leaf != ALPHA).most_common(1)[0][0] if chosen else "",
        scale_from="alpha tensors" if with_alpha else said.where.removeprefix(f"{path}, ") if said else "no alpha in the file",
        left_out=() if of_connectors else left_out,
    )


def network_modules(path: Path, linears: Linears) -> list[str]:
    """Official names of the modules that a network's file adapts, by its header alone; those of the text connectors left out.

    Raises:
        UserError: an unreadable file, a key of no form that is read, or a module that the model lacks.
    """
    _check_can_be_read(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            stored = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    found = dict.fromkeys(one.module for one in _read_keys(path, stored, linears).values())
    modules = [name for name in found if name in linears or not is_text_side(name)]
    _refuse_foreign(path, modules, linears)
    return modules


def scaled_leaf(kind: str, tensors: Collection[str]) -> str:
    """Which of an adapter's tensors takes its scale."""
    return _SCALED[kind] if kind in _SCALED else W2_UP if W2_UP in tensors else W2


def network_metadata(path: Path) -> dict[str, str]:
    """What the header of a network's file says beside its tensors.

    Raises:
        UserError: an unreadable file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def check_finite(path: Path) -> None:
    """Read a file tensor by tensor, whatever it holds.

    Raises:
        UserError: an unreadable file, or values that are not finite.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():
                _checked_values(path, key, file.get_tensor(key), may_be_whole=True)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def newest_file(path: Path) -> Path:
    """The newest network in a folder, connectors' files aside; a file stands for itself, and a folder of PEFT for its one file.

    Raises:
        UserError: a folder without any.
    """
    if not path.is_dir():
        return path
    files = [one for one in path.glob("*.safetensors") if not one.name.endswith(CONNECTORS_ENDING)]
    if not files:
        raise UserError(f"{path}: no .safetensors file in this folder.")
    return max(files, key=lambda one: (one.name == PEFT_FILE, one.stat().st_mtime_ns, one.name))


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _check_can_be_read(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            _refuse_checkpoint(path, names)
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _refuse_checkpoint(path: Path, names: Sequence[str]) -> None:
    """Before 46 GB of tensors are read.

    Raises:
        UserError: the tensors are weights of a model, or of one of its components.
    """
    prefix = transformer_prefix(names)
    found = [name for name in names if name.startswith(_COMPONENTS) and read_key(name, {}) is None]
    if prefix is not None or found:
        what = f"the model's own weights, '{found[0]}' among them" if found else "the transformer's own weights"
        raise UserError(
            f"{path}: is a checkpoint ({what}), and no LoRA. See what is in it by: ltxv2 checkpoint inspect {quoted(path)}. Its difference "
            "to another checkpoint becomes a LoRA by ltxv2 lora extract."
        )


def _check_can_be_read(path: Path) -> None:
    """safetensors says "no such file" of every file that it cannot open, whatever the reason."""
    if not path.is_file():
        raise UserError(f"{path}: no such LoRA file.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable safetensors file ({error}). Copy or download it again.")


def _read_keys(path: Path, stored: Collection[str], linears: Linears) -> dict[str, Key]:
    """
    Raises:
        UserError: a key of no known form, or two for one tensor.
    """
    flattened = {name.replace(".", "_"): name for name in linears}
    keys: dict[str, Key] = {}
    origin: dict[tuple[str, str], str] = {}
    for key in stored:
        one = read_key(key, flattened)
        if one is None:
            raise UserError(
                f"{path}: the key '{key}' is of no form that is read here "
                "(lora_A/lora_B, lora_down/lora_up, lokr_w1/lokr_w2, hada_w1_a..., diff)."
            )
        if (twice := origin.setdefault((one.module, one.leaf), key)) != key:
            raise UserError(f"{path}: the keys '{twice}' and '{key}' are for one tensor of one module. Keep one of the two networks in it.")
        keys[key] = one
    return keys


def _checked_values(path: Path, key: str, tensor: Tensor, *, may_be_whole: bool) -> Tensor:
    """The tensor as it is."""
    if not tensor.is_floating_point() and not may_be_whole:
        raise UserError(f"{path}: '{key}' is of dtype {str(tensor.dtype).removeprefix('torch.')}; an adapter's tensors are floating point.")
    if not bool(tensor.float().isfinite().all()):
        raise UserError(f"{path}: '{key}' holds NaN or infinity. Its training diverged; give an earlier file.")
    return tensor


def _refuse_foreign(path: Path, modules: Collection[str], linears: Linears) -> None:
    """
    Raises:
        UserError: modules that the model lacks, and why as far as their names tell.
    """
    foreign = sorted(set(modules) - set(linears))
    if not foreign:
        return
    what = f"{path}: adapts {len(foreign)} module(s) that this model lacks, first '{foreign[0]}'."
    if prefix := unknown_prefix(foreign[0], linears):
        raise UserError(f"{what} The prefix '{prefix}' is not known; read are {', '.join((*PREFIXES, *FLATTENED))} and none.")
    for stream, lacks in (("audio", not any("audio" in name for name in linears)), ("video", all("audio" in name for name in linears))):
        if lacks and all(stream_of(name) in (stream, "cross") for name in foreign):
            raise UserError(f"{what} They are of the {stream} side, which this --ltx_mode does not build. Give --ltx_mode av.")
    raise UserError(f"{what} It was made for another model, or with another network's names.")


def _check_size(path: Path, name: str, adapter: StoredAdapter, shape: Sequence[int] | None) -> None:
    found = adapted_shape(adapter.kind, adapter.stored)
    if shape is not None and found != tuple(shape):
        raise UserError(
            f"{path}: made for another model: '{name}' takes {found[1]} values and gives {found[0]} in the file, "
            f"{shape[1]} and {shape[0]} in this model."
        )


def _adapter(path: Path, name: str, tensors: dict[str, Tensor], stem: str, said: PeftScale | None) -> StoredAdapter:
    alpha = tensors.pop(ALPHA, None)
    kind = _kind(path, name, set(tensors))
    if MAGNITUDE in tensors:
        tensors[MAGNITUDE] = _magnitude(path, name, tensors)
    if broken := broken_shape(kind, tensors):
        raise UserError(f"{path}: '{name}': {broken}. The file is damaged, or of a network that is not read here.")
    rank, scale = _rank(kind, tensors), 1.0
    if alpha is not None:
        if alpha.numel() != 1 or not float(alpha) > 0:
            raise UserError(f"{path}: '{stem}.alpha' is {alpha.tolist()!r:.100}; it must be one number above 0.")
        scale = float(alpha) / rank if rank else 1.0  # LyCORIS leaves alpha aside where both halves of a LoKr are whole
    if said is not None and kind in ("lora", "dora"):
        told = said.of(stem, rank)
        if alpha is not None and abs(told - scale) > 1e-3 * told:
            raise UserError(f"{path}: '{stem}.alpha' gives a scale of {scale:g}, {said.where} one of {told:g}. Remove one of the two.")
        scale = told
    if scale != 1.0 and not bool((tensors[scaled_leaf(kind, tensors)].float() * scale).isfinite().all()):
        raise UserError(f"{path}: the scale of '{stem}', {scale:g}, makes infinity of its values. Its alpha is damaged; give another file.")
    return StoredAdapter(kind, tensors, rank, scale)


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
    magnitude, rows = tensors[MAGNITUDE], tensors[UP].shape[0] if tensors[UP].ndim else 0
    if magnitude.numel() != rows:
        raise UserError(
            f"{path}: the DoRA magnitude of '{name}' is {tuple(magnitude.shape)}; read are ({rows},) and ({rows}, 1), one for each output."
        )
    return magnitude.flatten()


def _rank(kind: str, tensors: Tensors) -> int:
    """What alpha is divided by; 0 where nothing is scaled."""
    if kind == "full":
        return 0
    if kind == "lokr":
        return tensors[W2_DOWN].shape[0] if W2_DOWN in tensors else tensors[f"{W1}_b"].shape[0] if f"{W1}_b" in tensors else 0
    return tensors[LOHA[1] if kind == "loha" else DOWN].shape[0]


def _range(values: Iterable[float]) -> str:
    found = sorted(set(values))
    return "" if not found else f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"
