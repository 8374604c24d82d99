"""The network that is trained, and what is merged into the model before."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, Count, List, Wording, options
from musubi_tuner.runtime.errors import UserError

NETWORK_MODULE = "musubi_tuner.networks.lora_ltxv2"
NETWORK_MODULE_ALIASES = ("networks.lora_ltxv2", "networks.lora_ltx2")

Alpha = Annotated[float, Field(gt=0), Wording("a number above 0; it scales the update by alpha / rank")]


@options
class NetworkOptions:
    """Network."""

    network_module: str = flag("module that makes the network", default=NETWORK_MODULE)
    network_dim: Count = flag("rank", default=32, common=True)
    network_alpha: Alpha = flag("alpha; the update is scaled by alpha / rank", default=32.0, common=True)
    network_args: Annotated[tuple[str, ...], List] = flag(
        "key=value: type, preset, rank_dropout and so on (docs/how-to/networks.md)", default=(), common=True
    )
    network_weights: AnyPath | None = flag("LoRA file to start from, or a folder, whose newest one is taken", default=None)
    dim_from_weights: bool = flag("take type, modules and ranks from --network_weights", default=False)
    train_connectors: bool = flag("adapt the text connectors too; needs caches made with --text_cache_stage features", default=False)
    full_finetune: bool = flag(
        "train the weights of the model itself and write whole checkpoints, in place of a network (docs/how-to/full_finetuning.md)",
        default=False,
        common=True,
    )
    base_weights: Annotated[tuple[AnyPath, ...], List] = flag("LoRA files that are merged into the model before training", default=())
    base_weights_multiplier: Annotated[tuple[float, ...], List] = flag("strength of each of --base_weights; default: 1", default=())

    @property
    def base_networks(self) -> tuple[tuple[Path, float], ...]:
        """Each of `base_weights` with its strength."""
        strengths = self.base_weights_multiplier or (1.0,) * len(self.base_weights)
        return tuple(zip(self.base_weights, strengths, strict=True))

    @model_validator(mode="after")
    def _check(self) -> "NetworkOptions":
        if self.dim_from_weights and self.network_weights is None:
            raise UserError("--dim_from_weights: needs --network_weights, the file that type, modules and ranks are taken from.")
        numbers, files = len(self.base_weights_multiplier), len(self.base_weights)
        if numbers not in (0, files):
            raise UserError(f"--base_weights_multiplier: {numbers} number(s) for {files} file(s) of --base_weights; give one for each.")
        return self


def parse_pairs(pairs: tuple[str, ...], flag_name: str) -> dict[str, str]:
    """`key=value` arguments as a dict.

    Raises:
        UserError: an argument without `=`, or a key given twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise UserError(f"{flag_name} {pair!r}: must be key=value.")
        if key in values:
            raise UserError(f"{flag_name}: {key} is given twice.")
        values[key] = value
    return values
