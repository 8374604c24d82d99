"""Runs the caching programs that a training needs, one after the other, each in a process of its own: one model in memory at a time."""

import logging
import os
import time
from collections.abc import Sequence

from musubi_tuner.config.caching import AudioCachingConfig, CacheAllConfig, LatentCachingConfig, TextCachingConfig
from musubi_tuner.config.flags import describe, parse
from musubi_tuner.runtime.children import run_command
from musubi_tuner.runtime.program import EXIT_NOT_ALL, run_program
from musubi_tuner.runtime.tables import format_table

log = logging.getLogger(__name__)

PROG = "ltxv2_cache_all.py"
DESCRIPTION = "Cache all that a training needs: video latents, audio latents and text, one model in memory at a time."
LATENTS, SOUND, TEXT = "cache-latents", "cache-audio", "cache-text"
_CONFIGS = {LATENTS: LatentCachingConfig, SOUND: AudioCachingConfig, TEXT: TextCachingConfig}
_OF_MODE = {"video": (LATENTS, TEXT), "av": (LATENTS, SOUND, TEXT), "audio": (SOUND, TEXT)}


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse(CacheAllConfig, argv, prog=prog, description=DESCRIPTION)
    commands = {name: words_of(config, name) for name in _OF_MODE[config.ltx_mode]}
    for name, words in commands.items():
        parse(_CONFIGS[name], words, prog=prog, description=DESCRIPTION)
    if not config.data.dry_run:  # the last program's models are looked at before the first one works for hours
        code = run_command(TEXT, [*commands[TEXT], "--dry_run"], quiet=True)
        if code > EXIT_NOT_ALL:
            return code
    rows, worst = [], 0
    for name, words in commands.items():
        log.info("\n=== ltxv2 %s", name)
        started = time.monotonic()
        code = run_command(name, words)
        rows.append((f"ltxv2 {name}", f"{time.monotonic() - started:.0f} s", "done" if code == 0 else f"exit code {code}"))
        worst = max(worst, code)
        if code > EXIT_NOT_ALL:
            break
    if int(os.environ.get("RANK", "0")) == 0:
        log.info("\n%s", format_table(rows, ("program", "time", "")))
    return worst


def words_of(config: CacheAllConfig, name: str) -> list[str]:
    """The flags of one program that differ from its defaults, as they would be typed."""
    values = {flag.key: getattr(getattr(config, flag.section), flag.key) for flag in describe(CacheAllConfig)}
    of_text = values.pop("text_batch_size")
    if name == TEXT:
        values["batch_size"] = of_text
    words = []
    for flag in describe(_CONFIGS[name]):
        value = values.get(flag.key, flag.default)
        if value == flag.default or value is None:
            continue
        words += [f"--{flag.key}" if value else f"--no-{flag.key}"] if isinstance(value, bool) else [f"--{flag.key}", str(value)]
    return words


if __name__ == "__main__":
    run_program(main)
