"""The networks of all clips and stages, looked at by their headers before the first stage is sampled."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from musubi_tuner.generation.jobs import Job
from musubi_tuner.generation.pipelines import Stage
from musubi_tuner.generation.setting import Setting
from musubi_tuner.ltxv2.transformer.load import STREAMS, read_config
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.formats import BAKED_KEY, connectors_path
from musubi_tuner.networks.reading import network_metadata, network_modules
from musubi_tuner.networks.release import check_release
from musubi_tuner.networks.stack import Strength
from musubi_tuner.networks.targets import linear_shapes
from musubi_tuner.placement.adapters import stored_linears
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_ALONE = {"video": "the sound", "audio": "the pictures"}
"""Mode -> what it builds nothing of."""


def check_networks(stages: Mapping[Job, tuple[Stage, ...]], setting: Setting) -> None:
    """Say what of a network is left out, as `--ltx_mode` builds no such stream.

    Raises:
        UserError: a network of another model or release, or one of which everything would be left out.
    """
    paths: dict[Path, None] = {}
    for job, of_job in stages.items():
        if any(stage.with_loras for stage in of_job):
            paths |= dict.fromkeys(use.path for use in job.loras if use.strength != Strength(0, 0))
        if setting.distilled_lora is not None and any(stage.distilled_lora for stage in of_job):
            paths[setting.distilled_lora] = None
    if not paths:
        return
    checkpoint, mode = setting.files.transformer, setting.config.model.ltx_mode
    version = detect_version(checkpoint)
    with torch.device("meta"):
        built = linear_shapes(LTXModel(read_config(checkpoint), STREAMS[mode]))
    linears = stored_linears(checkpoint)
    for path in paths:
        check_connectors(path, checkpoint)
        modules = network_modules(path, linears)
        check_release(path, network_metadata(path), version)
        unused = [name for name in modules if name not in built]
        if modules and len(unused) == len(modules):
            raise UserError(
                f"{path}: changes {_ALONE[mode]} alone, and --ltx_mode {mode} makes nothing of it. Leave it out, or give --ltx_mode av."
            )
        if unused:
            log.info(
                "%s: %d of its %d modules are of streams that --ltx_mode %s does not build, and are left out",
                path.name, len(unused), len(modules), mode,
            )  # fmt: skip


def check_connectors(path: Path, checkpoint: Checkpoint) -> None:
    """Warn of a network's adapters of the text connectors, unless they are baked into the checkpoint."""
    beside = connectors_path(path)
    if beside.is_file() and beside.name not in checkpoint.metadata.get(BAKED_KEY, ""):
        log.warning(
            "WARNING: %s: its adapters of the text connectors, in %s, are not used here, as they are in previews of training. Bake them "
            "into the checkpoint (ltxv2 checkpoint bake --lora %s), and have texts encoded with that one (--text_encoder).",
            path.name, beside.name, beside,
        )  # fmt: skip
