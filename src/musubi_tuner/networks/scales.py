"""By what a stored adapter is multiplied: alpha / rank, from wherever a file says it.

kohya, LyCORIS and old diffusers store a tensor `alpha` beside each module. PEFT and diffusers store rank and alpha of the whole network
as JSON, with patterns for modules that differ: in the header's metadata, or in `adapter_config.json` beside the file. A file that says
neither has its scale folded in.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.networks.keys import without_prefixes
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import parse_json, read_json

HEADER = "lora_adapter_metadata"
"""Of diffusers, in the metadata of the file."""
FOLDED = "folded into the tensors; there is no alpha to apply"
"""What the metadata say (`ltxv2_network_scaling`) of a file whose keys have no alpha."""
_PEFT_PREFIX = "base_model.model."
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, slots=True)
class PeftScale:
    """What PEFT's config says of every module."""

    where: str
    """File and place, for messages."""
    rank: int | None
    alpha: float
    ranks: Mapping[str, int]
    """By pattern over module names; so are `alphas`."""
    alphas: Mapping[str, float]
    rank_stabilized: bool

    def of(self, stem: str, rank: int) -> float:
        """
        Args:
            stem: the module, as the file names it.
            rank: of its tensors.

        Raises:
            UserError: the tensors have another rank than the config says.
        """
        said = _matching(self.ranks, stem, self.rank)
        if said is not None and said != rank:
            raise UserError(
                f"{self.where}: says rank {said:g} for '{stem}', whose tensors have rank {rank}, so its alpha cannot be trusted. "
                "Take the config and the file from the same save."
            )
        alpha = _matching(self.alphas, stem, self.alpha)
        assert alpha is not None
        return alpha / (rank**0.5 if self.rank_stabilized else rank)


def peft_scale(path: Path, metadata: Mapping[str, str], keys: Iterable[str] = ()) -> PeftScale | None:
    """What belongs to a file: its header's JSON, else the config beside `adapter_model.safetensors`, or beside a file of another name with
    the keys that PEFT alone writes; None where there is neither.

    Raises:
        UserError: a config that cannot be read, or is not one of LoRA.
    """
    if HEADER in metadata:
        where = f"{path}, '{HEADER}' in its header"
        return _read(where, parse_json(metadata[HEADER], where))
    beside = path.with_name(PEFT_CONFIG)
    if beside.is_file() and (path.name == PEFT_FILE or any(key.startswith(_PEFT_PREFIX) for key in keys)):
        return _read(str(beside), read_json(beside))
    return None


def _read(where: str, values: Any) -> PeftScale | None:
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold keys and values, not {values!r:.100}.")
    values = {key.removeprefix("transformer."): value for key, value in values.items()}  # diffusers names the part of its pipeline
    if (kind := values.get("peft_type") or "LORA") != "LORA":
        raise UserError(f"{where}: peft_type = {kind!r}: only LORA is read. Give a LoRA, or a LyCORIS file in LyCORIS' own form.")
    if "lora_alpha" not in values:
        return None
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    rank, alpha = values.get("r"), values["lora_alpha"]
    for key, value in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} = {value!r:.100}: must hold numbers by pattern.")
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}: {key}: {pattern!r} is no regular expression ({error}).") from error
    numbers = {"lora_alpha": alpha, **ranks, **alphas, **({} if rank is None else {"r": rank})}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{where}: {key} = {value!r:.100}: must be a number above 0.")
    return PeftScale(where, rank, float(alpha), ranks, alphas, bool(values.get("use_rslora")))


def _matching(patterns: Mapping[str, float], stem: str, default: float | None) -> float | None:
    """PEFT's rule: a pattern stands for names that end in it, at a dot. One with ^ is of a whole name, without the prefixes of a file."""
    names = without_prefixes(stem)
    return next(
        (value for pattern, value in patterns.items() if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names)), default
    )
