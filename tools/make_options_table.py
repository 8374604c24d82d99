"""Writes docs/reference/options.md, the table of every flag, from the dataclasses that the parsers are made of.

python tools/make_options_table.py          writes it
python tools/make_options_table.py --check  exits with 1 where it is not current
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from musubi_tuner import (
    ltxv2_adopt_caches,
    ltxv2_cache_all,
    ltxv2_cache_audio_latents,
    ltxv2_cache_latents,
    ltxv2_cache_rollouts,
    ltxv2_cache_text_encoder_outputs,
    ltxv2_checkpoint,
    ltxv2_dataset,
    ltxv2_generate_video,
    ltxv2_import_precomputed,
    ltxv2_lora,
    ltxv2_report,
    ltxv2_rl_rounds,
    ltxv2_score_rollouts,
    ltxv2_train_network,
    ltxv2_train_rl,
)
from musubi_tuner.config.caching import (
    AdoptConfig,
    AudioCachingConfig,
    CacheAllConfig,
    ImportConfig,
    LatentCachingConfig,
    TextCachingConfig,
)
from musubi_tuner.config.flags import Flag, describe
from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.config.report import ReportConfig
from musubi_tuner.config.rl import RlTrainingConfig
from musubi_tuner.config.rollouts import RolloutConfig
from musubi_tuner.config.rounds import RoundsConfig
from musubi_tuner.config.scoring import ScoringConfig
from musubi_tuner.config.training import TrainingConfig

OPTIONS = Path(__file__).resolve().parent.parent / "docs" / "reference" / "options.md"

HEAD = """\
# Options

Every flag of every program. Written by `tools/make_options_table.py` from the code; do not edit it by hand.

A flag of kind on/off is switched on by its name and off by `--no-` and its name. Each program also takes
`--config_file FILE`, a TOML with flags by their names without dashes (the command line wins over it), `--help` with the
flags that most people need, `--help_all` and `--version`. Installed, the programs are one command too: `ltxv2 train ...`
is `ltxv2_train_network.py ...`; `ltxv2 --help` lists them all.
"""


@dataclass(frozen=True, slots=True)
class Program:
    """One entry point."""

    module: ModuleType
    config: type
    subcommand: str = ""

    @property
    def script(self) -> str:
        return self.module.PROG

    @property
    def title(self) -> str:
        """As it is typed."""
        return f"{self.script} {self.subcommand}".rstrip()

    @property
    def description(self) -> str:
        return self.module.SUBCOMMANDS[self.subcommand].description if self.subcommand else self.module.DESCRIPTION


PROGRAMS = (
    Program(ltxv2_cache_all, CacheAllConfig),
    Program(ltxv2_cache_latents, LatentCachingConfig),
    Program(ltxv2_cache_audio_latents, AudioCachingConfig),
    Program(ltxv2_cache_text_encoder_outputs, TextCachingConfig),
    Program(ltxv2_train_network, TrainingConfig),
    Program(ltxv2_generate_video, GenerateConfig),
    Program(ltxv2_cache_rollouts, RolloutConfig),
    Program(ltxv2_score_rollouts, ScoringConfig),
    Program(ltxv2_train_rl, RlTrainingConfig),
    Program(ltxv2_rl_rounds, RoundsConfig),
    Program(ltxv2_report, ReportConfig),
    Program(ltxv2_import_precomputed, ImportConfig),
    Program(ltxv2_adopt_caches, AdoptConfig),
    *(
        Program(module, one.config, name)
        for module in (ltxv2_dataset, ltxv2_lora, ltxv2_checkpoint)
        for name, one in module.SUBCOMMANDS.items()
    ),
)


def render() -> str:
    """The whole document."""
    return "\n".join([HEAD, *itertools.chain.from_iterable(map(_program, PROGRAMS))])


def _program(program: Program) -> Iterator[str]:
    yield f"## {program.title}\n"
    yield f"{program.description}\n"
    for section, flags in itertools.groupby(describe(program.config), key=lambda flag: flag.group):
        yield f"### {section}\n"
        yield "| flag | kind | default | meaning |"
        yield "|---|---|---|---|"
        yield from map(_row, flags)
        yield ""


def _row(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in (flag.name, *flag.aliases))
    return f"| {names} | {_escaped(flag.kind)} | {_escaped('none' if flag.says_default else flag.default_text)} | {_escaped(flag.help)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    text = render()
    if "--check" in arguments:
        return 0 if OPTIONS.is_file() and OPTIONS.read_text(encoding="utf-8") == text else 1
    OPTIONS.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
