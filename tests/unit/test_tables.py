"""Tables of reports fit a terminal."""

from musubi_tuner.runtime.tables import format_table, names_of, shown_width


def test_a_table_that_fits_is_left_as_it_is() -> None:
    assert format_table([("a", 1), ("long name", 22)], ("file", "n")) == "file       n\n---------  --\na          1\nlong name  22"


def test_long_cells_wrap_and_no_line_is_wider_than_the_terminal() -> None:
    reason = "/a/path/without/any/blank/" + "x" * 150 + ": cannot be read (invalid data). Replace or remove the file."
    lines = format_table([("clip.mp4", "failed", reason), ("b.mp4", "kept", "")], ("source", "what", "why")).split("\n")
    column = lines[0].index("why")
    assert [len(line) for line in lines if len(line) > 100] == [column + len(reason.split()[0])], "a path that is copied is never broken"
    assert "".join(line[column:] for line in lines[2:-1]).replace(" ", "") == reason.replace(" ", ""), "not a letter is lost"
    assert lines[-1] == "b.mp4     kept", "the next row begins on a line of its own"


def test_wide_letters_count_twice() -> None:
    assert shown_width("桜a") == 3 and shown_width("e\u0301") == 1
    lines = format_table([("桜桜", "x"), ("ab", "y")], ("n", "k")).split("\n")
    assert [shown_width(line) for line in lines] == [7, 7, 7, 7]
    assert max(shown_width(line) for line in format_table([("桜" * 90, "y")], ("name", "k")).split("\n")) <= 100


def test_names_are_counted_where_they_are_many() -> None:
    assert names_of(["a", "b"]) == "a, b"
    assert names_of([str(i) for i in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


def test_control_characters_are_shown_and_not_sent_to_the_terminal() -> None:
    assert format_table([("a\x1b[2J\x07\x9b\r\nb", "桜\t")], ("name", "k")).split("\n")[2].rstrip() == "a\\x1b[2J\\x07\\x9b\\r b  桜"
