"""What `--network_args` says, and the shape of each module's adapter that follows from it."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from musubi_tuner.config.names import NETWORK_ARGS
from musubi_tuner.networks.base import Dropout, LayerSpec
from musubi_tuner.networks.targets import TargetChoice, compile_pattern, is_audio_side
from musubi_tuner.networks.types import TYPES
from musubi_tuner.runtime.errors import UserError

RANK_DROPOUT = 0.1
"""Default of LoRA and DoRA."""
DORA_KEYS = ("lora_magnitude_vector", "dora_scale")

Rules = tuple[tuple[re.Pattern[str], float], ...]
"""(pattern over official module names, value); the first that is found in a name counts."""

_SWITCHES = {"true": True, "1": True, "false": False, "0": False}
_KNOWN = (
    "type", "preset", "include_patterns", "exclude_patterns", "rank_dropout", "module_dropout", "neuron_dropout", "rank_stabilized",
    "factor", "ranks", "alphas", "audio_dim", "audio_alpha", "dora_key", "loraplus_lr_ratio",
)  # fmt: skip
SHAPE_ARGUMENTS = (
    "preset", "include_patterns", "exclude_patterns", "rank_stabilized", "factor", "ranks", "alphas", "audio_dim", "audio_alpha",
)  # fmt: skip
"""Those that choose modules, their shapes and scales."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkArguments:
    """Checked values."""

    kind: str | None
    """None where it is not set."""
    targets: TargetChoice
    rank: int
    alpha: float
    audio_rank: int | None
    audio_alpha: float | None
    ranks: Rules
    alphas: Rules
    rank_stabilized: bool
    factor: int
    dropout: Dropout
    dora_key: str
    loraplus_ratio: float
    """1 = all parameters at one rate."""

    def spec(self, name: str) -> LayerSpec:
        """Shape of the adapter on one module. Patterns win over the audio side's values, these over the network's.

        If a rank override has no alpha override, alpha is scaled with it.
        """
        rank, alpha = self.rank, self.alpha
        if is_audio_side(name):
            rank, alpha = _set(rank, alpha, self.audio_rank, self.audio_alpha)
        rank, alpha = _set(rank, alpha, _first(self.ranks, name), _first(self.alphas, name))
        return LayerSpec(rank=rank, alpha=alpha, rank_stabilized=self.rank_stabilized, factor=self.factor, dropout=self.dropout)


def network_arguments(args: Mapping[str, str], *, dim: int, alpha: float) -> NetworkArguments:
    """
    Raises:
        UserError: an unknown key, a value out of its range, or one that the type does not have.
    """
    unknown = [f"--network_args {key}={value}: {_answer(key, value)}" for key, value in args.items() if key not in _KNOWN]
    if unknown:
        raise UserError("\n".join(unknown))
    if dim < 1:
        raise UserError(f"--network_dim {dim}: a rank of 1 at least.")
    kind = args.get("type")
    if kind is not None and kind not in TYPES:
        raise UserError(f"--network_args type={kind}: must be one of {', '.join(TYPES)}.")
    dora_key = args.get("dora_key", DORA_KEYS[0])
    if dora_key not in DORA_KEYS:
        raise UserError(f"--network_args dora_key={dora_key}: must be one of {', '.join(DORA_KEYS)}.")
    _refuse_foreign(kind or "lora", args)
    return NetworkArguments(
        kind=kind,
        targets=TargetChoice(
            preset=args.get("preset", "attention"),
            include=patterns(args, "include_patterns"),
            exclude=patterns(args, "exclude_patterns"),
        ),
        rank=dim,
        alpha=alpha,
        audio_rank=int(_number(args, "audio_dim", 0, least=1, whole=True)) or None,
        audio_alpha=_number(args, "audio_alpha", 0.0, above=0) or None,
        ranks=_rules(args, "ranks", whole=True),
        alphas=_rules(args, "alphas", whole=False),
        rank_stabilized=_switch(args, "rank_stabilized"),
        factor=_factor(args),
        dropout=Dropout(
            rank=_probability(args, "rank_dropout", RANK_DROPOUT if (kind or "lora") in ("lora", "dora") else 0.0),
            module=_probability(args, "module_dropout", 0.0),
            neuron=_probability(args, "neuron_dropout", 0.0),
        ),
        dora_key=dora_key,
        loraplus_ratio=_number(args, "loraplus_lr_ratio", 1.0, above=0),
    )


def _refuse_foreign(kind: str, args: Mapping[str, str]) -> None:
    """Arguments that the type does not have."""
    only = {"factor": ("lokr",), "dora_key": ("dora",), "loraplus_lr_ratio": ("lora", "dora")}
    if kind == "full":
        shapes = ("rank_dropout", "module_dropout", "neuron_dropout", "rank_stabilized", "ranks", "alphas", "audio_dim", "audio_alpha")
        only |= dict.fromkeys(shapes, ("lora", "dora", "lokr", "loha"))
        if not args.get("include_patterns"):
            raise UserError(
                "--network_args type=full: say which linears train with include_patterns=REGEX,... (their float32 weights, gradients "
                "and optimizer states take 16 bytes a parameter with AdamW)."
            )
    for key, kinds in only.items():
        if key in args and kind not in kinds:
            raise UserError(f"--network_args {key}=...: belongs to type={' or type='.join(kinds)}, not to type={kind}.")


def _set(rank: int, alpha: float, new_rank: float | None, new_alpha: float | None) -> tuple[int, float]:
    if new_rank is not None:
        rank, alpha = int(new_rank), alpha * new_rank / rank
    return rank, alpha if new_alpha is None else new_alpha


def _first(rules: Rules, name: str) -> float | None:
    return next((value for pattern, value in rules if pattern.search(name)), None)


def _answer(key: str, value: str) -> str:
    if key in NETWORK_ARGS:
        return NETWORK_ARGS[key].format(value=value)
    near = get_close_matches(key, _KNOWN, n=1, cutoff=0.75)
    return f"unknown{f'; did you mean {near[0]}?' if near else '.'} Known: {', '.join(_KNOWN)}."


def _factor(args: Mapping[str, str]) -> int:
    factor = int(_number(args, "factor", -1, least=-1, whole=True))
    if not factor:
        raise UserError("--network_args factor=0: must be 1 at least, or -1 for a factor near the square root.")
    return factor


def patterns(args: Mapping[str, str], key: str) -> tuple[str, ...]:
    """REGEX,REGEX,... or, as musubi-tuner's notes have it, a Python list of strings."""
    text = args.get(key, "").strip()
    form = f"must be REGEX,REGEX,... or a list, \"{key}=[r'REGEX', r'REGEX']\", with its quotes and in quotes of the shell"
    if re.match(r"""\[\s*[rR]?['"]|\[\s*\]$""", text):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise UserError(f"--network_args {key}={text:.200}: {form}.") from error
        if not isinstance(found, list) or not all(isinstance(pattern, str) for pattern in found):
            raise UserError(f"--network_args {key}={text:.200}: {form}.")
        return tuple(found)
    found = _list(text)
    for pattern in found:
        if re.fullmatch(r"\[[^\]]*\]", pattern):
            raise UserError(f"--network_args {key}={text}: {pattern} is a set of single characters, which nearly every name holds; {form}.")
    return found


def _list(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _rules(args: Mapping[str, str], key: str, *, whole: bool) -> Rules:
    rules = []
    for part in _list(args.get(key, "")):
        pattern, sign, value = part.rpartition(":")
        if not sign:
            raise UserError(f"--network_args {key}={args[key]}: must be REGEX:NUMBER,... (no comma in a pattern); found '{part}'.")
        number = _number({key: value}, key, 0, least=1 if whole else None, above=0, whole=whole)
        rules.append((compile_pattern(pattern), number))
    return tuple(rules)


def _switch(args: Mapping[str, str], key: str) -> bool:
    text = args.get(key, "false").lower()
    if text not in _SWITCHES:
        raise UserError(f"--network_args {key}={args[key]}: must be true or false.")
    return _SWITCHES[text]


def _probability(args: Mapping[str, str], key: str, default: float) -> float:
    value = _number(args, key, default)
    if not 0 <= value < 1:
        raise UserError(f"--network_args {key}={args[key]}: must be at least 0 and less than 1.")
    return value


def _number(
    args: Mapping[str, str], key: str, default: float, *, least: float | None = None, above: float | None = None, whole: bool = False
) -> float:
    if key not in args:
        return default
    try:
        value = int(args[key]) if whole else float(args[key])
    except ValueError as error:
        raise UserError(f"--network_args {key}={args[key]}: must be a {'whole ' if whole else ''}number.") from error
    if (least is not None and value < least) or (above is not None and not value > above):
        raise UserError(f"--network_args {key}={args[key]}: must be {f'{least} at least' if least is not None else f'above {above}'}.")
    return value
