"""Datasets and their caches: looked into before they are trained on."""

import logging
from collections.abc import Sequence
from typing import Any

from musubi_tuner.config import dataset_tools as config
from musubi_tuner.config.caching import first_given
from musubi_tuner.config.captioning import CaptionConfig
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.packing import PackConfig, UnpackConfig
from musubi_tuner.config.subcommands import Subcommand, run_subcommand
from musubi_tuner.runtime.program import EXIT_NOT_ALL, run_program
from musubi_tuner.runtime.tables import format_table

log = logging.getLogger(__name__)

PROG = "tools/dataset.py"
DESCRIPTION = "Datasets: captions for media, cached clips back into files that play, caches moved to another machine."
_MOST_ROWS = 40


def main(argv: Sequence[str], prog: str = PROG) -> int:
    return run_subcommand(SUBCOMMANDS, argv, prog=prog, description=DESCRIPTION)


def _decode(options: config.DecodeConfig) -> int:
    from musubi_tuner.curation.decoding import choose, decode
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import pick_device
    from musubi_tuner.runtime.progress import Progress

    models, chosen = options.models, options.decoding
    datasets = load_dataset_config(options.dataset.dataset_config)
    vae = open_checkpoint(first_given(("--vae", models.vae), ("--ltxv2_model", models.ltxv2_model)))
    audio_vae = vae if models.audio_vae is None else open_checkpoint(models.audio_vae)
    wanted = choose(datasets, chosen.output_dir, clips=chosen.clips, most=chosen.most, references=chosen.references)
    with Progress("decoding", len(wanted), unit="clip") as bar:
        made = list(decode(wanted, datasets, vae, audio_vae, pick_device(chosen.device), lambda: bar.advance()))
    holes = [one for one in made if one.path is None]
    rows = [(one.clip, one.what, "" if one.path is None else str(one.path)) for one in [*holes, *(o for o in made if o.path is not None)]]
    print(format_table(rows[:_MOST_ROWS], ("clip", "what", "file")))
    if len(rows) > _MOST_ROWS:
        print(f"... and {len(rows) - _MOST_ROWS} more")
    if holes:
        log.warning("WARNING: %d of %d clips are not cached; run the caching programs again", len(holes), len(made))
    return EXIT_NOT_ALL if holes else 0


def _caption(options: CaptionConfig) -> int:
    from musubi_tuner.curation.captioning.program import caption

    return caption(options)


def _pack(options: PackConfig) -> int:
    from musubi_tuner.curation.packing.program import pack

    return pack(options)


def _unpack(options: UnpackConfig) -> int:
    from musubi_tuner.curation.packing.program import unpack

    return unpack(options)


SUBCOMMANDS: dict[str, Subcommand[Any]] = {
    "decode": Subcommand(config.DecodeConfig, _decode, "Cached clips as mp4, png or wav: what will be trained.", "dataset_config"),
    "caption": Subcommand(
        CaptionConfig, _caption, "Captions for videos, images and sounds, by a local model or a server of yours.", "media"
    ),
    "pack": Subcommand(
        PackConfig, _pack, "Caches as one archive or folder, to train elsewhere without media and encoders.", "dataset_config"
    ),
    "unpack": Subcommand(UnpackConfig, _unpack, "Caches out of a pack, each file compared with its checksum.", "pack"),
}


if __name__ == "__main__":
    run_program(main)
