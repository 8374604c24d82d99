"""Writes docs/reference/musubi_names.md, what musubi-tuner's names are here, from the table that the programs use.

python tools/make_names_table.py
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from musubi_tuner.config import names

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "musubi_names.md"

HEAD = """\
# Coming from musubi-tuner: its names, and what they are here

What flags, config keys, dataset keys, prompt flags and network arguments of musubi-tuner and its LTX-2 fork are here. Written by
`tools/make_names_table.py` from the code; do not edit it by hand.

A pasted command runs where its flags mean the same here. Flags that nothing here needs are ignored and named in one line; every other
one is an error that says what to use. `--config_file` takes the same names; its tables are for the eye alone, as in musubi-tuner, and an
empty text is no value.

Two defaults differ: a prompt without `--f` makes 121 frames (`--sample_frames`), not a still, and `--ltx2_first_frame_conditioning_p` is
0, not 0.1.
"""


def render() -> str:
    """The whole page."""
    sections = (
        ("Taken as a flag of ours", "theirs", _aliases()),
        ("Words that are taken", "flag and word", _values()),
        ("Words that are not", "flag and word", _other_values()),
        ("Not needed, and ignored", "flag", _ignored()),
        ("Flags of another program", "flag", {f"--{key}": f"belongs to {program}" for key, program in names.ELSEWHERE.items()}),
        ("Flags with another name or none", "flag", {f"--{key}": text for key, text in names.INSTEAD.items()}),
        ("Keys of the dataset TOML", "key", names.DATASET_KEYS),
        ("Flags of a prompt line", "flag", {f"--{key}": text for key, text in names.PROMPT_FLAGS.items()}),
        ("Keys of --network_args", "key", {key: text.replace("{value}", "X") for key, text in names.NETWORK_ARGS.items()}),
    )
    return "\n".join([HEAD, *(line for section in sections for line in _table(*section))])


def _aliases() -> dict[str, str]:
    return {", ".join(f"--{name}" for name in theirs): f"`--{ours}`" for ours, theirs in names.ALIASES.items()}


def _values() -> dict[str, str]:
    words = {f"--{key} {theirs}": f"`{ours}`" for key, choices in names.VALUES.items() for theirs, ours in choices.items()}
    return words | {f"--{key} 10%": "`0.1`" for key in names.PERCENTAGES}


def _other_values() -> dict[str, str]:
    return {f"--{key} {theirs}": text for key, choices in names.OTHER_VALUES.items() for theirs, text in choices.items()}


def _ignored() -> dict[str, str]:
    by_reason: dict[str, list[str]] = {}
    for key, ignored in names.IGNORED.items():
        by_reason.setdefault(ignored.why, []).append(f"--{key}")
    return {", ".join(flags): why for why, flags in by_reason.items()}


def _table(title: str, head: str, rows: Mapping[str, str]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"| {head} | here |"
    yield "|---|---|"
    for theirs, text in rows.items():
        yield f"| {', '.join(f'`{one}`' for one in theirs.split(', '))} | {text.replace('|', chr(92) + '|')} |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8", newline="\n")
