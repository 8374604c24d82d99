"""What is put onto a frozen model: base LoRAs merged while its weights are read, the trained network and its start, adapters of the text
connectors."""

import importlib
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from musubi_tuner.config.network import NETWORK_MODULE, NETWORK_MODULE_ALIASES, NetworkOptions, parse_pairs
from musubi_tuner.ltxv2.text.connectors import Connectors, load_connectors
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.versions import detect_version, transformer_names
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.arguments import SHAPE_ARGUMENTS
from musubi_tuner.networks.formats import connectors_path
from musubi_tuner.networks.lora import DoRALayer
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, create_network
from musubi_tuner.networks.lycoris import LoHaLayer, LoKrLayer
from musubi_tuner.networks.merging import BaseNetwork, merging_place, summing_place
from musubi_tuner.networks.reading import NetworkFile, read_network
from musubi_tuner.networks.release import check_release
from musubi_tuner.networks.stack import Strength
from musubi_tuner.networks.targets import is_audio_side, linear_names, linear_shapes
from musubi_tuner.networks.whole import TrainedNetwork, WholeTransformer
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_WEIGHT = ".weight"

Place = Callable[[str, Tensor], Tensor]
"""What is done with each weight as it is read: (name, tensor) -> the tensor that the model holds."""


def with_base_networks(networks: Sequence[tuple[Path, float]], checkpoint: Checkpoint, mode: str, place: Place) -> Place:
    """`place`, after LoRA files were merged into each weight as it is read, each with its strength.

    Raises:
        UserError: a file that cannot be read, or was made for another model.
    """
    if not networks:
        return place
    merged = [BaseNetwork(_read_to_merge(path, f"x {strength:g}", checkpoint), strength) for path, strength in networks]
    for one in merged:
        check_release(one.file.path, one.file.metadata, detect_version(checkpoint))
    if mode != "av":
        log.info("their weights of streams that --ltx_mode %s does not build are ignored", mode)
    return merging_place(merged, place)


def with_networks(networks: Sequence[tuple[Path, Strength]], checkpoint: Checkpoint, place: Place, device: torch.device) -> Place:
    """`place`, after the networks that clips are made with were merged into each weight on `device`.

    Raises:
        UserError: as `with_base_networks`.
    """
    if not networks:
        return place
    found = [
        (_read_to_merge(path, f"x {strength.video:g} (sound {strength.audio:g})", checkpoint), strength) for path, strength in networks
    ]
    return summing_place(found, place, device)


def _read_to_merge(path: Path, how: str, checkpoint: Checkpoint) -> NetworkFile:
    file = read_network(path, stored_linears(checkpoint))
    log.info("merging %s %s: %s", file.path.name, how, file.describe())
    if left := file.left_out:
        log.warning("WARNING: its %d adapter(s) of the text connectors are left out, first '%s'", len(left), left[0])
    return file


def stored_linears(checkpoint: Checkpoint) -> dict[str, tuple[int, ...] | None]:
    """Official names of the linears of a checkpoint's transformer, of all its streams, and their shapes where the file tells them: several
    values may be packed into one byte."""
    names = {name.removesuffix(_WEIGHT): full for name, full in transformer_names(checkpoint).items() if name.endswith(_WEIGHT)}
    return {name: None if checkpoint.dtype(full) == torch.uint8 else checkpoint.shape(full) for name, full in names.items()}


def read_start(options: NetworkOptions, checkpoint: Checkpoint, transformer: LTXModel) -> NetworkFile | None:
    """The file of `--network_weights`; call it before the transformer is adapted.

    Raises:
        UserError: a file that cannot be read, or whose own metadata names a release that does not go with this model.
    """
    if options.network_weights is None:
        return None
    start = read_network(options.network_weights, linear_shapes(transformer))
    check_release(start.path, start.metadata, detect_version(checkpoint))
    return start


def make_network(
    options: NetworkOptions, transformer: LTXModel, start: NetworkFile | None, *, seed: int, shows_references: bool = False
) -> LoRANetwork:
    """The network, not yet started from `start`, which gives its shapes where `--dim_from_weights` is set.

    Args:
        shows_references: training shows references (IC-LoRA).

    Raises:
        UserError: full weights trained on references.
    """
    network: LoRANetwork = network_module(options.network_module).create_network(
        transformer,
        dim=options.network_dim,
        alpha=options.network_alpha,
        args=parse_pairs(options.network_args, "--network_args"),
        seed=seed,
        **({"like": start} if options.dim_from_weights else {}),
    )
    if network.trains_base_weights and shows_references:
        raise UserError(
            "--network_args type=full: the recipe shows references, which only an adapter learns to follow, since samplers switch it on "
            "beside the unchanged model. Choose another type, or a recipe without the rule 'reference'."
        )
    return network


def bytes_in_flight(network: TrainedNetwork, *, video_tokens: int, audio_tokens: int, compute_bytes: int) -> float:
    """What the adapters of one block take while it runs backward, beside what those of a LoRA do: LoHa's changes of the weights are as
    large as the weights, two factors in float32 and their product; LoKr's inner products are about as large as the linears' outputs, and
    so is what DoRA's lengths multiply.

    `python -m benchmarks.peaks --network lokr` counts it.
    """
    if isinstance(network, WholeTransformer):
        return 0.0
    blocks: dict[str, float] = defaultdict(float)
    for name, layer in network.layers.items():
        if not name.startswith("transformer_blocks."):
            continue
        block, tokens = name.split(".")[1], audio_tokens if is_audio_side(name) else video_tokens
        if isinstance(layer, LoHaLayer):
            blocks[block] += layer.base.out_features * layer.base.in_features * (2 * 4 + compute_bytes)
        elif isinstance(layer, LoKrLayer):
            blocks[block] += tokens * layer.inner_in * (layer.base.out_features // layer.inner_out) * compute_bytes
        elif isinstance(layer, DoRALayer):
            blocks[block] += tokens * layer.base.out_features * compute_bytes
    return max(blocks.values(), default=0.0)


def report_network(options: NetworkOptions, transformer: LTXModel, network: LoRANetwork, start: NetworkFile | None) -> None:
    """Say before the first step what a network was started from, and what is not as the flags may have been meant."""
    if start is not None:
        log.info("starting from %s: %s", start.path, start.describe())
        if start.left_out and not options.train_connectors:
            log.warning(
                "WARNING: its %d adapter(s) of the text connectors are left out, first '%s'. --train_connectors goes on with them.",
                len(start.left_out),
                start.left_out[0],
            )
        if options.dim_from_weights and (unused := _of_no_use(options)):
            log.warning(
                "WARNING: --dim_from_weights takes modules and ranks from %s at scale 1, its own being folded in: %s change nothing",
                start.path,
                ", ".join(unused),
            )
    if network.trains_base_weights:
        log.info(
            "type=full: the weights of the %d linears that include_patterns names are trained and all others stay as they are; the file "
            "holds the difference to the base model's weights (keys 'diff'), each as large as its weight",
            len(network.names),
        )
    for key, pattern in network.idle_patterns([name.removesuffix(".base") for name in linear_names(transformer)]):
        what = "module that is adapted" if key in ("ranks", "alphas") else "linear of this model"
        log.warning("WARNING: --network_args %s: the pattern %r matches no %s", key, pattern, what)


def _of_no_use(options: NetworkOptions) -> list[str]:
    """What is given of shapes and scales beside `--dim_from_weights`."""
    alpha = options.network_alpha
    args = [pair for pair in options.network_args if pair.partition("=")[0] in SHAPE_ARGUMENTS]
    return [*([f"--network_alpha {alpha:g}"] if alpha != NetworkOptions().network_alpha else []), *args]


def adapted_connectors(
    options: NetworkOptions,
    checkpoint: Checkpoint,
    transformer: LTXModel,
    kind: str,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Connectors, LoRANetwork]:
    """The frozen connectors of the model's streams, and adapters of the network's type and rank on their attention.

    They start from the file beside `--network_weights`, where there is one.

    Raises:
        UserError: a type that adapts nothing.
    """
    if kind == "full":
        raise UserError("--train_connectors: connectors cannot be adapted with type=full; choose another type.")
    connectors = load_connectors_of(checkpoint, transformer, device=device, dtype=dtype)
    args = parse_pairs(options.network_args, "--network_args")
    args = {key: value for key, value in args.items() if key not in ("include_patterns", "exclude_patterns")}
    start = None if options.network_weights is None else _connectors_start(options.network_weights, connectors)
    network = create_network(
        connectors,
        dim=options.network_dim,
        alpha=options.network_alpha,
        args=args | {"preset": "connectors", "type": kind},
        seed=seed,
        like=start if options.dim_from_weights else None,
    )
    if start is not None:
        network.load(start)
    return connectors, network


def load_connectors_of(checkpoint: Checkpoint, transformer: LTXModel, *, device: torch.device, dtype: torch.dtype) -> Connectors:
    """The frozen connectors of the streams that the transformer has."""
    connectors = load_connectors(checkpoint, device=device, dtype=dtype)
    for stream in {"video", "audio"} - set(transformer.streams):
        delattr(connectors, f"{stream}_embeddings_connector")
    return connectors


def _connectors_start(path: Path, connectors: Connectors) -> NetworkFile | None:
    """The connectors' adapters beside a LoRA file, or within it; None where there are none."""
    beside = connectors_path(path)
    start = read_network(beside if beside.is_file() else path, linear_shapes(connectors), of_connectors=True)
    if start.adapters:
        log.info("connectors start from %s: %s", start.path, start.describe())
        return start
    log.warning("WARNING: there is no %s, and %s has no adapters of them: the connectors start as the base model's", beside, path)
    return None


def network_module(name: str) -> ModuleType:
    """The module called `name`.

    Raises:
        UserError: it cannot be imported, or makes no network.
    """
    name = NETWORK_MODULE if name in NETWORK_MODULE_ALIASES else name
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a user's module raises what it likes, and a name that is none TypeError or ValueError
        raise UserError(
            f"--network_module {name or repr(name)}: cannot be imported ({error}). The built-in one is {NETWORK_MODULE}."
        ) from error
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name}: has no function 'create_network'. The built-in one is {NETWORK_MODULE}.")
    return module
