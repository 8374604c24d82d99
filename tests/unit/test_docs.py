"""The documents say what the programs do: their commands parse, their links lead somewhere, the table of options is current."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from musubi_tuner.config.flags import describe, read_words
from musubi_tuner.prompts.sample_prompts import INPUT_FLAGS, split_line
from tools.make_options_table import OPTIONS, PROGRAMS, render

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CONFIGS = {Path(program.script).name: program.config for program in PROGRAMS}
SCRIPTS = {Path(program.script).name: program.script for program in PROGRAMS}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED_TEST = re.compile(r"`(?=tests/|::)(tests/[\w/]+\.py)?(?:::(\w+))?`")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)\)")


def blocks(document: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCED.findall(document.read_text(encoding="utf-8")) if language in languages]


def commands() -> list[tuple[str, list[str]]]:
    """(document, words) of every command line that starts one of the programs."""
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "", "bash", "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if any(Path(word).name in CONFIGS for word in words):
                    found.append((document.name, words))
    return found


def test_there_are_commands_of_every_program() -> None:
    started = {Path(word).name for _, words in commands() for word in words}
    assert set(CONFIGS) <= started


@pytest.mark.parametrize(("document", "words"), commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60])
def test_commands_in_documents_parse(document: str, words: list[str]) -> None:
    place = next(index for index, word in enumerate(words) if Path(word).name in CONFIGS)
    script = Path(words[place]).name
    typed = read_words(words[place + 1 :], describe(CONFIGS[script]), prog=script, description="")
    missing = {flag.key for flag in describe(CONFIGS[script]) if flag.is_required} - set(typed)
    assert not missing or "config_file" in typed
    if "launch" in words[:place]:
        from accelerate.commands.launch import launch_command_parser

        assert launch_command_parser().parse_args(words[words.index("launch") + 1 :]).training_script == words[place]


def test_toml_in_documents_is_valid() -> None:
    for document in DOCUMENTS:
        for text in blocks(document, "toml"):
            tomllib.loads(text)


def test_prompt_lines_in_documents_parse_and_exercise_every_flag() -> None:
    lines = [(path.name, line) for path in DOCUMENTS for block in blocks(path, "prompt") for line in block.splitlines()]
    found = {key for name, line in lines for key in split_line(name, line)[1]}
    assert set(INPUT_FLAGS.values()) <= found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = [target for target in LINK.findall(text) if "://" not in target and not (document.parent / target).exists()]
    assert not missing


def test_requirement_rows_name_tests_that_exist() -> None:
    """A name without a file is of the file before it in the line."""
    named = set()
    for line in (REPOSITORY / "docs" / "requirements_status.md").read_text(encoding="utf-8").splitlines():
        path = ""
        for found, name in NAMED_TEST.findall(line):
            path = found or path
            named.add((path, name))
    assert len(named) > 100
    missing = []
    for path, name in sorted(named):
        source = REPOSITORY / path
        if not source.is_file() or name and not re.search(rf"^def {name}\(", source.read_text(encoding="utf-8"), re.MULTILINE):
            missing.append(f"{path}::{name}")
    assert not missing


def test_the_table_of_options_is_current() -> None:
    assert OPTIONS.read_text(encoding="utf-8") == render(), "run: python tools/make_options_table.py"


@pytest.mark.parametrize("script", sorted(CONFIGS))
def test_help_is_readable(script: str) -> None:
    """Every script is thin, and its --help_all names every flag."""
    path = REPOSITORY / SCRIPTS[script]
    assert len(path.read_text(encoding="utf-8").splitlines()) < 15
    answer = subprocess.run([sys.executable, str(path), "--help_all"], capture_output=True, text=True, encoding="utf-8", check=False)
    assert answer.returncode == 0, answer.stderr
    assert all(flag.usage in answer.stdout for flag in describe(CONFIGS[script]))
    assert max(map(len, answer.stdout.splitlines())) <= 140
