"""Makes clips with sound from prompts, with any LoRA at any strength: `ltxv2_generate_video.py`, `ltxv2 generate`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from musubi_tuner.config.flags import Beneath, parse
from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.runtime.program import run_program

log = logging.getLogger(__name__)

PROG = "ltxv2_generate_video.py"
DESCRIPTION = "Make clips with sound from prompts, with any LoRA at any strength."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse(GenerateConfig, argv, prog=prog, description=DESCRIPTION, beneath=_of_recipe)
    from musubi_tuner.generation.clips import make_clips
    from musubi_tuner.generation.durations import timed
    from musubi_tuner.generation.enhanced import enhanced
    from musubi_tuner.generation.jobs import chosen_loras, make_jobs, read_prompts
    from musubi_tuner.generation.opening import open_setting
    from musubi_tuner.runtime.tables import format_table

    if config.clips.recreate is not None:
        from musubi_tuner.generation.recreate import read_again, tell_differences

        again = read_again(config)
        prompts, loras = (again.prompt,), again.loras
        setting = dataclasses.replace(open_setting(config, PROG), reference_factors=again.reference_factors)
        tell_differences(again, setting)
    else:
        prompts, loras = enhanced(read_prompts(config), config), chosen_loras(config.loras)
        prompts, setting = timed(prompts, open_setting(config, PROG))
    if config.grid.wanted:
        from musubi_tuner.generation.axes import read_axes
        from musubi_tuner.generation.grid import make_grid
        from musubi_tuner.generation.sheet import make_cells

        made = make_cells(make_grid(config, read_axes(config.grid), prompts, loras), setting)
    else:
        made = make_clips(make_jobs(config, prompts, loras), setting)
    rows = [(str(one.path), f"{one.seconds:.1f} s" if one.seconds else "there already") for one in made]
    log.info("\n%s", format_table(rows, ("clip", "sampling")))
    return 0


def _of_recipe(given: Mapping[str, Any]) -> Beneath | None:
    """Flags of the clip that is to be made again."""
    if not isinstance(clip := given.get("recreate"), str) or not clip:
        return None
    from musubi_tuner.generation.recreate import flags_of

    return flags_of(Path(clip))


if __name__ == "__main__":
    run_program(main)
