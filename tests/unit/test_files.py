"""Reading files of the user: whatever is wrong is told by the file's name."""

import sys
from pathlib import Path

import pytest

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json, read_json_lines, read_text, read_toml


def put(folder: Path, content: bytes | str) -> Path:
    path = folder / "fïle 1"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1,\n"b" 2}', "not valid JSON: .*line 2"),
        ("", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ("[NaN]", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("[1e999]", "1e999 is not a finite number"),
        ("[18446744073709551616]", "more than 64 bits"),
        ("[" + "9" * 5000 + "]", "not valid JSON"),
        (r'["\ud800"]', "surrogates not allowed"),
        ("ä".encode("latin-1"), "not UTF-8 text.*Save the file as UTF-8"),
    ],
)
def test_what_is_wrong_with_json_is_named(tmp_path: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(UserError, match=f"fïle 1: .*{message}"):
        read_json(put(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a = 1\nb = \nc = 2", "not valid TOML: .*line 2"),
        ('p = "C:\\Users"', r"not valid TOML: .*Windows paths"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "9" * 5000, "not valid TOML"),
        ("a = 1\na = 2", "not valid TOML"),
        (b"\xff\xfea", "not UTF-8"),
    ],
)
def test_what_is_wrong_with_toml_is_named(tmp_path: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(UserError, match=f"fïle 1: .*{message}"):
        read_toml(put(tmp_path, content))


def test_files_that_are_not_there_name_flag_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--f .*none: no such file\. Give it\."):
        read_text(tmp_path / "none", named="--f", remedy="Give it.")
    with pytest.raises(UserError, match="no such file"):
        read_text(put(tmp_path, "") / "below a file")
    with pytest.raises(UserError, match="is a folder"):
        read_toml(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(Path("a\0b"))
    with pytest.raises(UserError, match="no such file" if sys.platform == "win32" else "cannot be read"):  # as the system has it
        read_json(tmp_path / ("a" * 5000))


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    assert read_json(put(tmp_path, b'\xef\xbb\xbf{"a": [1, 2.5, "\xc3\xa4", "\\ud83d\\ude00"]}')) == {"a": [1, 2.5, "ä", "😀"]}
    assert read_toml(put(tmp_path, b"\xef\xbb\xbfa = 1")) == {"a": 1}


def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path: Path) -> None:
    path = put(tmp_path, '{"a": 1}\r\n\n{"a": "\u2028"}\n{')
    lines = read_json_lines(path)
    assert next(lines) == (f"{path}, line 1", {"a": 1})
    assert next(lines) == (f"{path}, line 3", {"a": "\u2028"})
    with pytest.raises(UserError, match="line 4: not valid JSON"):
        next(lines)
