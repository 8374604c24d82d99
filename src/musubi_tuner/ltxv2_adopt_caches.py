"""Takes over cache files of other tools that have our names and keys: checks them, and writes metadata and index for training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from musubi_tuner.config.caching import AdoptConfig
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.flags import parse
from musubi_tuner.runtime.program import quoted, run_program
from musubi_tuner.runtime.tables import format_table

if TYPE_CHECKING:
    from musubi_tuner.conversion.adoption import Adopted, Claims

log = logging.getLogger(__name__)

PROG = "tools/adopt_caches.py"
DESCRIPTION = "Take over caches of other tools: sidecars with our names and keys get metadata and an index; their tensors stay as they are."
_MOST_ROWS = 40


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse(AdoptConfig, argv, prog=prog, description=DESCRIPTION)
    datasets = load_dataset_config(config.data.dataset_config)
    from musubi_tuner.conversion.adoption import adopt
    from musubi_tuner.runtime.processes import processes

    claims = _claims(config)
    with processes() as group:
        reports = adopt(datasets, claims, group, workers=config.work.num_workers, dry_run=config.data.dry_run)
    _report(reports, config)
    return 1 if any(report.left for report in reports) else 0


def _claims(config: AdoptConfig) -> Claims:
    from musubi_tuner.conversion.adoption import CONTEXT_TOKENS, Claims
    from musubi_tuner.ltxv2.autoencoders.audio_vae import audio_vae_fingerprint
    from musubi_tuner.ltxv2.autoencoders.video_vae import video_vae_fingerprint
    from musubi_tuner.ltxv2.text.encoders import encoder_fingerprint, encoder_options
    from musubi_tuner.ltxv2.text.packed import with_projection
    from musubi_tuner.ltxv2.text.pipeline import projection_fingerprint, text_widths
    from musubi_tuner.ltxv2.transformer.load import read_config
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import pick_device

    data, model = config.data, config.model
    checkpoint = open_checkpoint(model.ltxv2_model)
    vae = checkpoint if model.vae is None else open_checkpoint(model.vae)
    audio_vae = vae if model.audio_vae is None else open_checkpoint(model.audio_vae)
    transformer = read_config(checkpoint)
    modes = ("av", "video") if data.ltx_mode == "video" else ("av",)
    text = "not told"
    if model.text_encoder is not None:
        options = encoder_options(
            model.text_encoder, tokenizer=None, backend=model.text_encoder_backend, device=pick_device("cpu"), max_length=None
        )
        text = encoder_fingerprint(options)
    return Claims(
        mode=data.ltx_mode,
        widths={mode: text_widths(transformer, mode) for mode in modes},
        encoders={
            "video_vae": "" if data.ltx_mode == "audio" else video_vae_fingerprint(vae),
            "audio_vae": "" if data.ltx_mode == "video" else audio_vae_fingerprint(audio_vae),
            "text": text,
        },
        projection=projection_fingerprint(with_projection(checkpoint, model.text_encoder))
        if model.text_encoder_backend == "gemma"
        else "none",
        model_version=checkpoint.model_version,
        backend=model.text_encoder_backend,
        stage=data.text_cache_stage,
        max_length=model.max_length or CONTEXT_TOKENS,
        source_fps=data.source_fps,
    )


def _report(reports: Sequence[Adopted], config: AdoptConfig) -> None:
    rows = [
        (report.label, kind, report.taken[kind], report.ours[kind]) for report in reports for kind in sorted(report.taken | report.ours)
    ]
    log.info("%s", format_table(rows, ("dataset", "kind", "taken over", "ours already")))
    checks = [
        ("keys, shapes, dtypes", "yes", "against the window and the model's widths"),
        ("values", "yes", "finite, and within the range of what encoders make"),
    ]
    for report in reports:
        told = "planned from the media that are there" if report.media else "the media are gone: taken from the files' names"
        checks.append((f"{report.label}: windows", "yes" if report.media else "no", told))
        told = "that of the source now is taken for the cached one" if report.media else "not known"
        checks.append((f"{report.label}: captions", "no", told))
    checks.append(("encoders", "no", "nothing tells which were used: --vae, --audio_vae, --text_encoder and --ltxv2_model are recorded"))
    log.info("\n%s", format_table(checks, ("what", "checked", "how")))
    left = [(report.label, *row) for report in reports for row in report.left]
    if left:
        more = f"\n... and {len(left) - _MOST_ROWS} more" if len(left) > _MOST_ROWS else ""
        log.info("\n%s%s", format_table(left[:_MOST_ROWS], ("dataset", "left out", "because")), more)
    clips, done = sum(report.clips for report in reports), "would be taken over (--dry_run)" if config.data.dry_run else "taken over"
    log.info("\nCaches: %d clips %s, %d file(s) or source(s) left out", clips, done, len(left))
    if not config.data.dry_run:
        features = " --train_connectors" if config.data.text_cache_stage == "features" else ""
        log.info("Train with --dataset_config %s --ltx_mode %s%s", quoted(config.data.dataset_config), config.data.ltx_mode, features)


if __name__ == "__main__":
    run_program(main)
