"""Answers of captioners become captions: phrases around them go, their length is kept, the trigger word is there, refusals are none."""

import pytest

from musubi_tuner.curation.captioning.answers import USUAL_PREFIXES, Answer, caption_of
from musubi_tuner.curation.captioning.instruction import read_instruction
from musubi_tuner.runtime.errors import UserError


def of(text, *, prefixes=USUAL_PREFIXES, trigger=None, max_words=200, cut=False):
    return caption_of(Answer(text, cut), prefixes=prefixes, trigger=trigger, max_words=max_words)


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("The video shows a dog.", "A dog."),
        ("  **This clip features\n a dog.** ", "A dog."),
        ("In this video, the image shows a dog", "A dog"),
        ('"A dog barks."', "A dog barks."),
        ('"Go", she says. "Now"', '"Go", she says. "Now"'),
        ("The videos show a dog.", "The videos show a dog."),
        ("The video showstopper.", "The video showstopper."),
        ("<think>Is it a dog?</think>\nA dog.", "A dog."),
        ("it must be a dog</think>A dog.", "A dog."),
        ("A\x12 dog\u200d.", "A dog\u200d."),
        ("Sorry, I can do it, she says.", "Sorry, I can do it, she says."),
        ("I can't stop, he says. He helps.", "I can't stop, he says. He helps."),
    ],
)
def test_what_stands_around_a_caption_goes(answer, caption):
    assert of(answer).text == caption


def test_prefixes_of_ones_own_replace_the_list_and_none_leaves_all():
    assert of("The video shows a dog.", prefixes=()).text == "The video shows a dog."
    assert of("Sure! Here: a dog. (ß)", prefixes=("SURE! here",)).text == "A dog. (ß)"
    assert of("The video shows a dog.", prefixes=("x",)).text == "The video shows a dog."


@pytest.mark.parametrize(
    ("answer", "cut", "says"),
    [
        ("I'm sorry, but I can't help with that.", False, "refuses"),
        ("I cannot assist with this request.", False, "refuses"),
        ("I’m unable to view images.", False, "refuses"),
        ("The video shows", False, "answered nothing. Try"),
        (" ... ", False, "answered nothing"),
        ("", True, "raise --max_tokens"),
        ("<think>hm", True, "thought until it ran out"),
    ],
)
def test_refusals_and_empty_answers_are_no_captions(answer, cut, says):
    with pytest.raises(UserError, match=says):
        of(answer, cut=cut)


def test_long_answers_end_with_a_sentence():
    text = "One two three. Four five six. Seven eight"
    assert of(text, cut=True).text == "One two three. Four five six." and of(text, cut=True).note == "cut at --max_tokens"
    assert of(text, max_words=7).text == "One two three. Four five six." and of(text, max_words=7).note == "cut at --max_words"
    assert of(text, max_words=6).note == "cut at --max_words" and of(text).note == ""
    assert of("One. " + "word " * 20, cut=True).text.endswith("word"), "not the most of it"
    assert of("He says “go.” Then no", cut=True).text == "He says “go.”"


def test_the_trigger_word_is_there_once():
    assert of("a man walks", trigger="MILA").text == "MILA, a man walks"
    assert of("MILA walks", trigger="MILA").text == "MILA walks"
    assert of("Milan is large", trigger="Mila").text == "Mila, Milan is large"
    assert of("{trigger} walks", trigger="C++ (x)").text == "C++ (x) walks"


def test_instructions(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("Call her {trigger}, in {max_words} words.\n", encoding="utf-8")
    own = read_instruction(path, trigger="MILA", max_words=9)
    assert own.text("video", heard=True) == own.text("image", heard=False) == "Call her MILA, in 9 words."
    ours = read_instruction(None, trigger=None, max_words=90)
    texts = {(kind, heard): ours.text(kind, heard=heard) for kind in ("video", "image", "audio") for heard in (True, False)}
    assert all("{" not in text and "90 words" in text for text in texts.values())
    assert "voice" in texts["video", True] and "voice" in texts["audio", True] and "make up no speech" in texts["video", False]
    assert "sound" not in texts["image", False]
    assert len({own.fingerprint, ours.fingerprint, read_instruction(None, trigger=None, max_words=80).fingerprint}) == 3
    for text, says in (("", "is empty"), ("{trigger}", "there is no trigger word")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=says):
            read_instruction(path, trigger=None, max_words=9)
