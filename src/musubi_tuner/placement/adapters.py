"""The trainable part of a run: base LoRAs merged while weights are read, the network, its start, adapters of the connectors."""

import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from musubi_tuner.config.network import NETWORK_MODULE, NETWORK_MODULE_ALIASES, parse_pairs
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.ltxv2.text.connectors import Connectors, load_connectors
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.versions import detect_version, transformer_names
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, create_network
from musubi_tuner.networks.merging import BaseNetwork, merging_place
from musubi_tuner.networks.reading import NetworkFile, read_network
from musubi_tuner.networks.targets import linear_names
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.checkpoint import connectors_path

log = logging.getLogger(__name__)

Place = Callable[[str, Tensor], Tensor]


def with_base_networks(config: TrainingConfig, checkpoint: Checkpoint, place: Place) -> Place:
    """`place`, after base LoRAs were merged into each weight as it is read."""
    options = config.network
    if not options.base_weights:
        return place
    known = [name.removesuffix(".weight") for name in transformer_names(checkpoint) if name.endswith(".weight")]
    networks = [BaseNetwork(read_network(path, known), strength) for path, strength in options.base_networks]
    for network in networks:
        log.info("merging %s x %g: %d module(s)", network.file.path.name, network.multiplier, len(network.file.adapters))
    if config.ltx_mode != "av":
        log.info("what they hold of streams that --ltx_mode %s does not build is left aside", config.ltx_mode)
    return merging_place(networks, place)


def read_start(config: TrainingConfig, checkpoint: Checkpoint, transformer: LTXModel) -> NetworkFile | None:
    """The file of `--network_weights`; call it before the transformer is adapted."""
    options = config.network
    if options.network_weights is None:
        return None
    start = read_network(options.network_weights, linear_names(transformer))
    _check_version(start, detect_version(checkpoint))
    return start


def make_network(
    config: TrainingConfig, transformer: LTXModel, start: NetworkFile | None, *, shows_references: bool = False
) -> LoRANetwork:
    """The network, not yet started from `start`, which gives its shapes where `--dim_from_weights` says so.

    Raises:
        UserError: full weights trained on references.
    """
    options = config.network
    network: LoRANetwork = network_module(options.network_module).create_network(
        transformer,
        dim=options.network_dim,
        alpha=options.network_alpha,
        args=parse_pairs(options.network_args, "--network_args"),
        seed=config.optimization.seed,
        **({"like": start} if options.dim_from_weights else {}),
    )
    if network.trains_base_weights and shows_references:
        raise UserError(
            "--network_args type=full: the recipe shows references, which only an adapter learns to follow, since samplers switch it on "
            "beside the unchanged model. Choose another type, or a recipe without the rule 'reference'."
        )
    return network


def adapted_connectors(
    config: TrainingConfig, checkpoint: Checkpoint, transformer: LTXModel, kind: str, *, device: torch.device, dtype: torch.dtype
) -> tuple[Connectors, LoRANetwork]:
    """The frozen connectors of the model's streams, and adapters of the network's type and rank on their attention.

    A start lies beside `--network_weights`.

    Raises:
        UserError: a type that adapts nothing.
    """
    options = config.network
    if kind == "full":
        raise UserError("--train_connectors: adapts the connectors by the network's type, and type=full is none that does; choose another.")
    connectors = load_connectors(checkpoint, device=device, dtype=dtype)
    for stream in {"video", "audio"} - set(transformer.streams):
        delattr(connectors, f"{stream}_embeddings_connector")
    args = parse_pairs(options.network_args, "--network_args")
    args = {key: value for key, value in args.items() if key not in ("include_patterns", "exclude_patterns")}
    start = None
    if options.network_weights is not None and (path := connectors_path(options.network_weights)).is_file():
        start = read_network(path, linear_names(connectors))
        log.info("connectors start from %s", path)
    elif options.network_weights is not None:
        log.warning("WARNING: there is no %s: the connectors start anew", connectors_path(options.network_weights))
    network = create_network(
        connectors,
        dim=options.network_dim,
        alpha=options.network_alpha,
        args=args | {"preset": "connectors", "type": kind},
        seed=config.optimization.seed,
        like=start if options.dim_from_weights else None,
    )
    if start is not None:
        network.load(start)
    return connectors, network


def _check_version(file: NetworkFile, version: str) -> None:
    """
    Raises:
        UserError: our own metadata names another base model.
    """
    trained_on = file.metadata.get("ss_base_model_version", "")
    if trained_on.startswith("ltx-") and trained_on != f"ltx-{version}":
        raise UserError(
            f"--network_weights {file.path}: was trained on {trained_on}, and --ltxv2_model is ltx-{version}. "
            f"Give a LoRA of ltx-{version}, or the model that it belongs to."
        )


def network_module(name: str) -> ModuleType:
    """The module called `name`.

    Raises:
        UserError: it cannot be imported, or makes no network.
    """
    name = NETWORK_MODULE if name in NETWORK_MODULE_ALIASES else name
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--network_module {name}: cannot be imported ({error}). The built-in one is {NETWORK_MODULE}.") from error
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name}: has no function 'create_network'. The built-in one is {NETWORK_MODULE}.")
    return module
