"""Documents that people write: dataset TOML, jsonl, recipe, and prompt files in their three forms; and any of them as no document at all.

Keys come from the checked classes themselves, so that a new key is covered by being there.
"""

from collections.abc import Iterator, Mapping

from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.conditioning.recipe import AUDIO_RULES, VIDEO_RULES
from musubi_tuner.config import dataset
from musubi_tuner.prompts import sample_prompts
from tests.malformed.base import DOCTOR, DRY, LATENTS, SOUND, TEXT, TRAIN, Malformed, writes
from tests.malformed.values import ANY, Value, fields_of, odd_for, wrong_for

_PREVIEWS = ("--sample_prompts", "{}", "--sample_width", "64", "--sample_height", "32", "--sample_frames", "9", "--sample_steps", "1")
_GENERAL = {"resolution": "[96, 64]", "target_frames": "[9]"}
_ENTRY = {"video_directory": '"clips"', "cache_directory": '"cache"'}
_PROMPT = {"prompt": '"A disc moves."', "width": "64", "height": "32", "frame_count": "9", "sample_steps": "1"}
_LINE = {"video_path": '"clips/clip_000.mp4"', "caption": '"A disc."'}
NO_DOCUMENTS: Mapping[str, bytes] = {
    "empty": b"",
    "a blank": b" \n",
    "only a mark": b"\xef\xbb\xbf",
    "UTF-16": "a = 1\n".encode("utf-16"),
    "Latin-1": 'prompt = "ä"'.encode("latin-1"),
    "zeros": bytes(64),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "brackets": b"[" * 100_000,
    "braces": b'{"a":' * 100_000,
    "nested TOML": b"a = " + b"[" * 5000 + b"]" * 5000,
    "dotted": b"a." * 5000 + b"a = 1",
    "open text": b'a = "b',
    "control": b"a = \x01\x02\n\x7f",
    "one word": b"word",
    "number": b"5",
    "null": b"null",
    "text": b'"a"',
    "lines of a million": b"#\n" * 10 + b"x" * 1_000_000,
}
_LONGER = {"clips.jsonl": "jsonl.toml"}


def systematic() -> Iterator[Malformed]:
    yield from _no_documents()
    yield from _dataset()
    yield from _jsonl()
    yield from _recipe()
    yield from prompt_files()


def prompt_files() -> Iterator[Malformed]:
    """Each holds one prompt."""
    yield from _prompts_by_key()
    yield from _prompt_lines()


def users(name: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(program, flags) that read a document."""
    if name in ("dataset.toml", "clips.jsonl"):
        chosen = ("--dataset_config", _LONGER.get(name, name))
        return ((LATENTS, (*chosen, *DRY)), (TEXT, (*chosen, *DRY)), (SOUND, (*chosen, *DRY)), (TRAIN, chosen), (DOCTOR, chosen))
    if name == "recipe.toml":
        return ((TRAIN, ("--conditioning_config", name)), (DOCTOR, ("--conditioning_config", name)))
    if name == "flags.toml":
        return ((TRAIN, ("--config_file", name)), (DOCTOR, ("--config_file", name)))
    return ((TEXT, ("--sample_prompts", name, *DRY)), (TRAIN, tuple(word.format(name) for word in _PREVIEWS)))


def _no_documents() -> Iterator[Malformed]:
    families = {"dataset.toml": "dataset", "clips.jsonl": "jsonl", "recipe.toml": "recipe", "flags.toml": "config"}
    families |= {f"prompts.{ending}": "prompts" for ending in ("txt", "toml", "json")}
    for name, family in families.items():
        for program, more in users(name):
            for label, data in NO_DOCUMENTS.items():
                fine = name == "prompts.txt" or label in ("empty", "a blank", "only a mark") and family in ("recipe", "config")
                yield Malformed(
                    id=f"{family}/{program}/{name} is {label}", program=program, more=more, prepare=writes(name, data),
                    expect="any" if fine else "refused", names=() if fine else (name, "jsonl.toml"),
                )  # fmt: skip
            for label, other in (("missing", "nothing.toml"), ("a folder", "clips"), ("a loop", "loop"), ("a device", "/dev/null")):
                words = tuple(other if word == name else word for word in more)
                if words != more:
                    yield Malformed(
                        id=f"{family}/{program}/{name} is {label}", program=program, more=words, names=(other,),
                        expect="any" if other == "/dev/null" else "refused",
                    )  # fmt: skip


def _written(general: Mapping[str, str], entry: Mapping[str, str]) -> str:
    def table(head: str, values: Mapping[str, str]) -> str:
        return f"{head}\n" + "".join(f"{key} = {value}\n" for key, value in values.items())

    return table("[general]", general) + table("[[datasets]]", entry)


def _dataset() -> Iterator[Malformed]:
    sources = ("video_directory", "image_directory", "audio_directory", "video_jsonl_file", "image_jsonl_file", "audio_jsonl_file")
    programs = ((LATENTS, DRY), (TEXT, DRY), (SOUND, DRY), (TRAIN, ()))
    place = 0

    def made(key: str, where: str, value: Value, text: str, expect: str) -> Malformed:
        nonlocal place
        place += 1
        program, more = programs[place % len(programs)]
        return Malformed(
            id=f"dataset/{where}: {key} = {value.label}", program=program, more=more, prepare=writes("dataset.toml", text),
            expect=expect, names=(key, "dataset.toml") if expect == "refused" else (),
        )  # fmt: skip

    # pyrefly: ignore[private-usage]
    for key, kinds in fields_of(dataset._Entry).items():
        entry = {name: text for name, text in _ENTRY.items() if key not in sources or name != "video_directory"}
        for expect, values in (("refused", wrong_for(kinds)), ("any", odd_for(kinds))):
            for value in values:
                if value.toml is not None:
                    yield made(key, "datasets", value, _written(_GENERAL, entry | {key: value.toml}), expect)
    for key, kinds in fields_of(dataset.GeneralSettings).items():
        for value in wrong_for(kinds):
            if value.toml is not None:
                yield made(key, "general", value, _written(_GENERAL | {key: value.toml}, _ENTRY), "refused")
    for section in ("general", "datasets", "validation_datasets", "other"):
        for value in ANY:
            if value.toml is not None:
                text = f"{section} = {value.toml}\n" + ("" if section == "datasets" else _written({}, _ENTRY).removeprefix("[general]\n"))
                expect = "any" if value.label == "empty list" and section == "validation_datasets" else "refused"
                yield made(section, "sections", value, text, expect)


def _jsonl() -> Iterator[Malformed]:
    keys = {"video_path", "caption", *(kind.files.path for kind in KINDS.values() if kind.files is not None)}
    for number, key in enumerate(sorted(keys)):
        kinds = frozenset({"str" if key == "caption" else "path"})
        for expect, values in (("refused", wrong_for(kinds)), ("any", odd_for(kinds))):
            for value in values:
                if value.json is not None:
                    yield _line(f"{key} = {value.label}", _LINE | {key: value.json}, expect, number)
    for value in ANY:
        if value.json is not None:
            yield _line(f"a line of {value.label}", value.json, "refused", 0)
    for label, text in (
        ("key twice", '{"video_path": "a.mp4", "video_path": "a.mp4"}'),
        ("two on a line", "{} {}"),
        ("half", '{"video_path"'),
    ):
        yield _line(label, text, "refused", 0)
    yield _line("no path", {"caption": '"A"'}, "refused", 0)
    yield _line("unknown key", _LINE | {"video_paht": '"a"'}, "refused", 0)


def _line(label: str, line: Mapping[str, str] | str, expect: str, number: int) -> Malformed:
    text = line if isinstance(line, str) else "{" + ", ".join(f'"{key}": {value}' for key, value in line.items()) + "}"
    program = (LATENTS, TEXT)[number % 2]
    return Malformed(
        id=f"jsonl/{label}", program=program, more=("--dataset_config", "jsonl.toml", *DRY), expect=expect,
        prepare=writes("clips.jsonl", text + "\n"), names=("clips.jsonl",),
    )  # fmt: skip


def _recipe() -> Iterator[Malformed]:
    for stream, rules in (("video", VIDEO_RULES), ("audio", AUDIO_RULES)):
        for rule, cls in rules.items():
            for key, kinds in fields_of(cls).items():
                for expect, values in (("refused", wrong_for(kinds)), ("any", odd_for(kinds))):
                    for value in values:
                        if value.toml is not None:
                            text = f'[[{stream}]]\nrule = "{rule}"\n{key} = {value.toml}\n'
                            yield _of_recipe(f"{stream} {rule} {key} = {value.label}", text, expect, key)
        for value in ANY:
            if value.toml is not None:
                yield _of_recipe(f"{stream} rule = {value.label}", f"[[{stream}]]\nrule = {value.toml}\n", "refused", "rule")
                if value.label != "empty list":
                    yield _of_recipe(f"{stream} = {value.label}", f"{stream} = {value.toml}\n", "refused", stream)


def _of_recipe(label: str, text: str, expect: str, key: str) -> Malformed:
    more = ("--conditioning_config", "recipe.toml")
    prepare = writes("recipe.toml", text)
    names = (key, "recipe.toml") if expect == "refused" else ()
    return Malformed(id=f"recipe/{label}", program=TRAIN, more=more, prepare=prepare, expect=expect, names=names)


def _prompts_by_key() -> Iterator[Malformed]:
    # pyrefly: ignore[private-usage]
    for number, (key, kinds) in enumerate(fields_of(sample_prompts._Entry).items()):
        for value in dict.fromkeys((*wrong_for(kinds), *odd_for(kinds))):
            is_text = key in ("keyframes", "generate_seconds", "inpaint_box", "outpaint_crop", "generate_sound_seconds")
            expect = "refused" if value in wrong_for(kinds) and not is_text else "any"
            if value.toml is not None:
                yield _of_prompts(
                    key,
                    value,
                    "toml",
                    "".join(f"{k} = {v}\n" for k, v in ({"[[prompt.subset]]\n#": "1"} | _PROMPT | {key: value.toml}).items()),
                    expect,
                    number,
                )
            if value.json is not None:
                yield _of_prompts(
                    key,
                    value,
                    "json",
                    "[{" + ", ".join(f'"{k}": {v}' for k, v in (_PROMPT | {key: value.json}).items()) + "}]",
                    expect,
                    number,
                )
    for value in ANY:
        if value.toml is not None:
            yield _of_prompts("prompt", value, "toml", f"prompt = {value.toml}\n", "refused", 0, "whole ")
            yield _of_prompts("subset", value, "toml", f"[prompt]\nsubset = {value.toml}\n", "refused", 0, "whole ")
        if value.json is not None:
            yield _of_prompts("list", value, "json", f"[{value.json}]", "any" if value.json.startswith('"') else "refused", 0, "whole ")


def _of_prompts(key: str, value: Value, ending: str, text: str, expect: str, number: int, prefix: str = "") -> Malformed:
    name = f"prompts.{ending}"
    program, more = users(name)[number % 2]
    return Malformed(
        id=f"prompts/{name} {prefix}{key} = {value.label}", program=program, more=more, prepare=writes(name, text), expect=expect,
        names=(name,) if expect == "refused" else (),
    )  # fmt: skip


def _prompt_lines() -> Iterator[Malformed]:
    """Flags of a line of text."""
    numbers = ("", "nan", "inf", "-1", "0", "1e308", "1e999", "five", "1.5", "33", "1" * 5000, "\u0661", "--", "5 5", "0x10")
    texts = ("", " ", "n" * 300, "n/" * 3000, "\0", "..", "/dev/null", "loop", "clips", "recipe.toml", "\x1b[31m", "stills/still_000.png=1")
    shapes = ("0=stills/still_000.png", "9=stills/still_000.png", "0=", "=a", "a=b;", "-1=a", "1-", "-", "2-1", "nan-inf", "0,0,32",
              "0,0,32,32",
              "-32,0,32,32", "1e3,0,32,32", "0,0,0,0", "99999999999,0,32,32", "0-" + "9" * 400)  # fmt: skip
    of_number = ("w", "h", "f", "d", "s", "fr", "l", "g", "al", "is", "vs", "va")
    for number, flag in enumerate(sample_prompts._FLAGS):  # pyrefly: ignore[private-usage]
        for word in numbers if flag in of_number else (*texts, *shapes):
            shown = word if len(word) < 30 else f"{word[:5]} x {len(word)}"
            refused = (
                flag in of_number
                and word in ("", "nan", "inf", "1e999", "five", "--", "5 5", "0x10")
                or flag in of_number[:5]
                and word == "1.5"
            )
            program, more = users("prompts.txt")[number % 2]
            needed = {"at": " --a sounds/sound_000.wav", "is": " --i stills/still_000.png"}
            needed |= dict.fromkeys(("vt", "box", "crop"), " --iv clips/clip_000.mp4")
            needed |= dict.fromkeys(("vs", "va", "vm"), " --v stills/still_000.png")
            inputs = needed.get(flag, "")
            sizes = "".join(f" --{k} {v}" for k, v in (("w", 64), ("h", 32), ("f", 9), ("s", 1)) if k != flag)
            yield Malformed(
                id=f"prompts/line --{flag} {shown!a}", program=program, more=more, expect="refused" if refused else "any",
                prepare=writes("prompts.txt", f"A disc.{sizes}{inputs} --{flag} {word}\n"), names=("prompts.txt",) if refused else (),
            )  # fmt: skip
    for label, line in (("unknown", "A --zz 1"), ("twice", "A --w 64 --w 64"), ("no prompt", " --w 64"), ("l and g", "A --l 1 --g 1")):
        yield Malformed(
            id=f"prompts/line {label}", program=TEXT, more=users("prompts.txt")[0][1], expect="any" if label == "no prompt" else "refused",
            prepare=writes("prompts.txt", line + "\n"), names=("prompts.txt",),
        )  # fmt: skip
