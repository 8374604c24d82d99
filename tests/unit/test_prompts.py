"""Prompt files: what is read, and what is refused by name."""

import json
from pathlib import Path

import pytest

from musubi_tuner.prompts.sample_prompts import PromptDefaults, all_prompt_texts, load_prompts
from musubi_tuner.runtime.errors import UserError


def write(folder: Path, text: str, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_flag_of_a_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "erstes Bild.png").write_bytes(b"")
    line = "Ein Häuschen, am Meer --w 640 --h 480 --f 25 --d 7 --s 12 --fr 16.5 --n blurry, dark --i erstes Bild.png --l 2.5 --al 5"
    (prompt,) = load_prompts(write(tmp_path, f"# comment\n\n  {line}  \n"))
    assert (prompt.prompt, prompt.negative) == ("Ein Häuschen, am Meer", "blurry, dark")
    assert (prompt.width, prompt.height, prompt.frames, prompt.seed, prompt.steps, prompt.fps) == (640, 480, 25, 7, 12, 16.5)
    assert (prompt.video_cfg, prompt.audio_cfg) == (2.5, 5.0)
    assert prompt.inputs.image == tmp_path / "erstes Bild.png"
    assert prompt.where.endswith("line 3")


@pytest.mark.parametrize("text", ["I walk along", "w 640 h 480", "fr 5 d 9", "a--quiet--place", "l 3"])
def test_flags_begin_only_after_a_double_dash(tmp_path: Path, text: str) -> None:
    (prompt,) = load_prompts(write(tmp_path, text + " --d 3"))
    assert prompt.prompt == text and prompt.seed == 3 and prompt.width == 768


def test_tabs_part_flags_as_blanks_do(tmp_path: Path) -> None:
    (prompt,) = load_prompts(write(tmp_path, "A dog runs.\t--w 512\t--h\t320 --n dark\tstreet"))
    assert (prompt.prompt, prompt.width, prompt.height, prompt.negative) == ("A dog runs.", 512, 320, "dark\tstreet")


def test_a_picture_needs_more_than_one_frame(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="--i with 1 frame.*Raise --f"):
        load_prompts(write(tmp_path, "a fox --f 1 --i a.png"))


def test_what_a_prompt_leaves_out_comes_from_the_defaults(tmp_path: Path) -> None:
    defaults = PromptDefaults(width=64, height=96, frames=9, fps=16.0, steps=3)
    (prompt,) = load_prompts(write(tmp_path, "a fox"), defaults)
    assert (prompt.width, prompt.height, prompt.frames, prompt.fps, prompt.steps) == (64, 96, 9, 16.0, 3)
    assert (prompt.negative, prompt.video_cfg, prompt.audio_cfg, prompt.inputs.image) == ("", None, None, None)


@pytest.mark.parametrize("flag", ["l", "g"])
def test_one_cfg_scale_serves_both_streams(tmp_path: Path, flag: str) -> None:
    (prompt,) = load_prompts(write(tmp_path, f"a fox --{flag} 4"))
    assert (prompt.video_cfg, prompt.audio_cfg) == (4.0, 4.0)


def test_audio_cfg_alone_leaves_the_video_to_the_command_line(tmp_path: Path) -> None:
    (prompt,) = load_prompts(write(tmp_path, "a fox --al 0"))
    assert (prompt.video_cfg, prompt.audio_cfg) == (None, 0.0)


def test_toml_takes_defaults_from_its_table(tmp_path: Path) -> None:
    text = '[prompt]\nwidth = 640\nheight = 480\n[[prompt.subset]]\nprompt = "a fox"\n'
    text += '[[prompt.subset]]\nprompt = "an owl"\nwidth = 320\nframe_rate = 16\n'
    fox, owl = load_prompts(write(tmp_path, text, "p.toml"))
    assert (fox.prompt, fox.width, fox.height) == ("a fox", 640, 480)
    assert (owl.prompt, owl.width, owl.height, owl.fps, owl.index) == ("an owl", 320, 480, 16.0, 1)


def test_json_takes_objects_and_lines(tmp_path: Path) -> None:
    entries = [{"prompt": "a fox", "frame_count": 9, "cfg_scale": 2}, "an owl --f 17 --d 5"]
    fox, owl = load_prompts(write(tmp_path, json.dumps(entries), "p.json"))
    assert (fox.frames, fox.video_cfg, owl.prompt, owl.frames, owl.seed) == (9, 2, "an owl", 17, 5)


def test_texts_to_encode_hold_negatives_and_the_empty_prompt_once(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path, "a fox --n dark\nan owl\na fox --d 2"))
    assert all_prompt_texts(prompts) == ["a fox", "dark", "an owl", ""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox --q 3", r"line 1: unknown flag '--q'.*--w"),
        ("a man -- tall", r"unknown flag '--tall'"),
        ("ok\na fox --f 24", r"line 2: --f '24': must be 8n\+1.*17 and 25"),
        ("a fox --w 100", r"--w '100': must be a multiple of 32; the nearest are 96 and 128"),
        ("a fox --h 0", r"--h '0': must be a multiple of 32"),
        ("a fox --l 2 --g 3", "both are the CFG scale"),
        ("a fox --d 1 --d 2", "--d is given twice"),
        ("a fox --s many", r"--s 'many': must be a whole number"),
        ("a fox --s 0", "--s '0': must be at least 1"),
        ("a fox --fr 0", "--fr '0': must be at least 0.01"),
        ("a fox --fr 1e-320", "--fr '1e-320': must be at least 0.01"),
        ("a fox --w 32000", "--w '32000': must be at most 16384"),
        (f"a fox --w {2**63}", "must be at most 16384"),
        ("a fox --s 1000000000", "--s '1000000000': must be at most 1000"),
        ("a fox --l 1e300", "must be at most 1000"),
        ("a fox --w 16384 --h 16384 --f 97", "latent cells; the most is"),
        ("a fox --f", "--f '': must be a whole number"),
        (f"a fox --i {'x' * 5000}", "must be a path"),
        ("A dog.--w 512 --h 320", r"line 1: '--w' stands within the text\. Put a blank before it"),
        ("a fox --n blurry--d 5", "'--d' stands within the text"),
        ("ok\na fox \u2014w 512 \u2014h 320", "line 2: '\u2014w' is no flag and would be part of the text.*two plain dashes: --w"),
        ("a fox \u2013\u2013f 9", "'\u2013\u2013f' is no flag"),
        ("a fox -w 512", "'-w' is no flag"),
        ("a fox --fs 3.0", "--fs is not read here: leave it out.*--discrete_flow_shift"),
        ("a fox --gl a.png", "--gl is not read here: give --i FILE"),
        ("a fox --l -1", "--l '-1': must be at least 0"),
        ("a fox --al nan", "--al 'nan': must be a finite number"),
        ("a fox --i nowhere.png", "--i 'nowhere.png'"),
        ("--w 64 a fox", "begins with a flag"),
        ("# only a comment\n", "holds no prompt"),
    ],
)
def test_mistakes_in_text_are_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_prompts(write(tmp_path, text))


def test_a_json_line_is_a_prompt_with_a_datasets_names(tmp_path: Path) -> None:
    (tmp_path / "voice.wav").write_bytes(b"sound")
    lines = ['{"prompt": "a fox", "audio": "voice.wav", "seed": 3}', "", '"an owl --w 64"']
    fox, owl = load_prompts(write(tmp_path, "\n".join(lines), "p.jsonl"))
    assert (fox.prompt, fox.seed, fox.inputs.audio) == ("a fox", 3, tmp_path / "voice.wav")
    assert (owl.prompt, owl.width, owl.inputs.audio, owl.where[-6:]) == ("an owl", 64, None, "line 3")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.jsonl", '{"prompt": "a"}\n[', "line 2: not valid JSON"),
        ("p.jsonl", '{"prompt": "a", "audio": "b", "input_audio_path": "c"}', "line 1: 'audio' and 'input_audio_path' are the same"),
        ("p.jsonl", '{"prompt": "a", "audio": "none.wav"}', "line 1: --a 'none.wav': no such file"),
        ("p.json", '[{"prompt": "a", "audio": "none.wav"}]', "entry 1: unknown key 'audio'"),
        ("p.toml", "[prompt", "not valid TOML"),
        ("p.toml", 'prompt = "a fox"', r"\[prompt\]"),
        ("p.toml", "[prompt]\nwidth=64\n", r"\[\[prompt.subset\]\]"),
        ("p.toml", '[prompt]\n[[prompt.subset]]\nprompt="a"\nwidht=64', "number 1: unknown key 'widht'. Did you mean 'width'"),
        ("p.toml", "[prompt]\nsubset = [3]", "number 1: must hold keys and values"),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', "'prompt' appears twice"),
        ("p.json", '[{"prompt": "a", "keyframes": [1]}]', r"keyframes = \[1\]: must be text"),
        ("p.json", "{}", "must hold a list"),
        ("p.json", "[3]", "entry 1: must hold keys and values, not 3"),
        ("p.json", "[", "not valid JSON"),
        ("p.json", '[{"width": 64}]', "'prompt' is missing"),
        ("p.json", '[{"prompt": "a", "seed": "x"}]', "seed = 'x': must be a whole number"),
        ("p.json", '[{"prompt": "a", "seed": true}]', "seed = True"),
        ("p.yaml", "a", "ends in .txt, .toml, .json or .jsonl"),
    ],
)
def test_mistakes_in_structured_files_are_named(tmp_path: Path, name: str, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_prompts(write(tmp_path, text, name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_prompts(tmp_path / "none.txt")
