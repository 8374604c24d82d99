"""The documents say what the programs do: their commands parse, their links lead somewhere, the words that users search for open a page."""

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
DOCS = REPOSITORY / "docs"
DOCUMENTS = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
BY_TITLE = {program.title.rpartition("/")[2]: program for program in PROGRAMS}
"""`ltxv2_train_network.py`, `lora.py inspect` and so on."""
SCRIPTS = {Path(program.script).name for program in PROGRAMS}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED_TEST = re.compile(r"`(?=tests/|::)(tests/[\w/]+\.py)?(?:::(\w+))?`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
NAMED_PAGE = re.compile(r"\bdocs/[\w./-]+\.(?:md|png)\b")
NAMES_PAGES = ("tests", "tools", "benchmarks", "dataset_configs", "training_configs", "conditioning_recipes")

SEARCHES = {
    "gradient checkpointing": "explanation/memory.md",
    "activation checkpointing": "explanation/memory.md",
    "block swap": "explanation/memory.md",
    "activation offload": "explanation/memory.md",
    "quantized": "explanation/memory.md",
    "low VRAM": "how-to/small_cards.md",
    "out of memory": "how-to/small_cards.md",
    "IC-LoRA": "how-to/ic_lora.md",
    "video to video": "how-to/ic_lora.md",
    "image to video": "how-to/conditioning.md",
    "inpainting": "how-to/conditioning.md",
    "regularization": "how-to/regularization.md",
    "prior preservation": "how-to/regularization.md",
    "EMA": "how-to/regularization.md",
    "LyCORIS": "how-to/networks.md",
    "validation videos": "how-to/previews.md",
    "dashboard": "how-to/report.md",
    "bucket": "reference/dataset_toml.md",
    "resum": "how-to/train.md",
    "timestep sampling": "explanation/noise_levels.md",
    "text encoder": "how-to/captions.md",
    "latent caching": "how-to/cache.md",
    "auto-captioning": "how-to/caption_clips.md",
    "VLM": "how-to/caption_clips.md",
    "reward function": "how-to/rewards.md",
    "reward model": "how-to/rewards.md",
    "PickScore": "how-to/rewards.md",
    "another machine": "how-to/move_caches.md",
    "NaN": "how-to/troubleshooting.md",
    "GGUF": "reference/model_files.md",
    "Full fine-tuning": "how-to/full_finetuning.md",
    "FSDP": "how-to/full_finetuning.md",
    "multi-node": "how-to/several_machines.md",
}
"""What a user types into a search box -> the page whose first lines must hold it."""
FIRST_LINES = 6


def blocks(document: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCED.findall(document.read_text(encoding="utf-8")) if language in languages]


def commands() -> list[tuple[str, list[str]]]:
    """(document, words) of every command line that starts one of the programs."""
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "", "bash", "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if any(Path(word).name in SCRIPTS for word in words):
                    found.append((document.name, words))
    return found


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """The title of the program that a command starts, and its flags."""
    place = next(index for index, word in enumerate(words) if Path(word).name in SCRIPTS)
    title, flags = Path(words[place]).name, words[place + 1 :]
    if title in BY_TITLE:
        return title, flags
    title, program, flags = f"{title} {flags[0]}", BY_TITLE[f"{title} {flags[0]}"], flags[1:]
    first = program.module.SUBCOMMANDS[program.subcommand].first
    return title, [f"--{first}", *flags] if flags and not flags[0].startswith("-") else flags


def test_there_are_commands_of_every_program() -> None:
    assert set(BY_TITLE) <= {program_of(words)[0] for _, words in commands()}


@pytest.mark.parametrize(("document", "words"), commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60])
def test_commands_in_documents_parse(document: str, words: list[str]) -> None:
    title, given = program_of(words)
    flags = describe(BY_TITLE[title].config)
    typed = read_words(given, flags, prog=title, description="")
    missing = {flag.key for flag in flags if flag.is_required} - set(typed)
    assert not missing or "config_file" in typed
    place = next(index for index, word in enumerate(words) if Path(word).name in SCRIPTS)
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
    missing = []
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        place = document if path == "" else document.parent / path
        if "://" not in target and not (place.exists() and (anchor == "" or anchor in anchors(place))):
            missing.append(target)
    assert not missing


def anchors(document: Path) -> set[str]:
    """What a `#` may name in a page: its headings, as GitHub turns them into anchors."""
    headings = HEADING.findall(document.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_page_is_listed() -> None:
    listed = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCS.rglob("*.md") if path.name != "README.md" and path.relative_to(DOCS).as_posix() not in listed] == []


@pytest.mark.parametrize(("words", "page"), SEARCHES.items())
def test_words_that_users_search_for_open_a_page(words: str, page: str) -> None:
    head = " ".join((DOCS / page).read_text(encoding="utf-8").splitlines()[:FIRST_LINES])
    assert words.lower() in head.lower()


@pytest.mark.parametrize("folder", NAMES_PAGES)
def test_pages_that_files_name_exist(folder: str) -> None:
    missing = {}
    for path in (path for path in (REPOSITORY / folder).rglob("*") if path.suffix in (".py", ".toml")):
        named = NAMED_PAGE.findall(path.read_text(encoding="utf-8"))
        missing |= {f"{path.name}: {page}": page for page in named if not (REPOSITORY / page).is_file()}
    assert not missing


def test_requirement_rows_name_tests_that_exist() -> None:
    """A name without a file is of the file before it in the line."""
    named = set()
    for line in (DOCS / "development" / "requirements_status.md").read_text(encoding="utf-8").splitlines():
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


@pytest.mark.parametrize("title", sorted(BY_TITLE))
def test_help_is_readable(title: str) -> None:
    """Every script is thin, and its --help_all names every flag."""
    program = BY_TITLE[title]
    path = REPOSITORY / program.script
    assert len(path.read_text(encoding="utf-8").splitlines()) < 15
    command = [sys.executable, str(path), *filter(None, [program.subcommand]), "--help_all"]
    answer = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert answer.returncode == 0, answer.stderr
    assert all(flag.usage in answer.stdout for flag in describe(program.config))
    assert max(map(len, answer.stdout.splitlines())) <= 140
