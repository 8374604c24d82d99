"""What a captioner is asked, for what it sees and hears."""

from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.store import text_fingerprint
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_text

TRIGGER, MAX_WORDS = "{trigger}", "{max_words}"

_TASK = {
    "video": "You see frames of one video clip, evenly spaced and in order. Write the caption of the whole clip.",
    "image": "You see a picture. Write its caption.",
    "audio": "You hear a recording. Write its caption.",
}
_SEEN = {
    "video": (
        "Say who or what is there and how they look, what they do from beginning to end in the order in which it happens, where it is, "
        "the light and the colors, how close the camera is and how it moves."
    ),
    "image": "Say who or what is there and how they look, where it is, the light and the colors, and from where it is seen.",
    "audio": "",
}
_HEARD = (
    "Say what is heard: each voice (man, woman or child, its tone and pace) with its exact words in quotation marks and in their own "
    "language, noises and when they come, music with its instruments and mood, the sound of the room; say so if it is silent."
)
_NOT_HEARD = "You do not hear the clip: say nothing of sound, and make up no speech."
_STYLE = (
    f"One paragraph of at most {MAX_WORDS} words, in plain English and in the present tense. Say only what is there; leave out guesses, "
    "moods that nothing shows, and remarks on quality. Do not speak of a video, clip, frame, picture or recording, and do not begin with "
    "a phrase such as 'The video shows'. No title and no list. Answer with the caption alone."
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """What is asked."""

    own: str | None
    """A person's; None: ours."""
    trigger: str | None
    max_words: int

    def text(self, kind: str, *, heard: bool) -> str:
        """
        Args:
            kind: `video`, `image` or `audio`.
            heard: whether there is sound to listen to.
        """
        if self.own is None:
            sound = _HEARD if heard else _NOT_HEARD if kind == "video" else ""
            text = " ".join(part for part in (_TASK[kind], _SEEN[kind], sound, _STYLE) if part)
        else:
            text = self.own
        return text.replace(MAX_WORDS, str(self.max_words)).replace(TRIGGER, self.trigger or "")

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all that it may ask."""
        kinds = [(kind, heard) for kind in _TASK for heard in (False, True)]
        return text_fingerprint("\n".join(self.text(kind, heard=heard) for kind, heard in kinds))[:16]


def read_instruction(path: Path | None, *, trigger: str | None, max_words: int) -> Instruction:
    """
    Raises:
        UserError: a file that cannot be read, is empty, or holds {trigger} where there is no trigger word.
    """
    if path is None:
        return Instruction(None, trigger, max_words)
    text = read_text(
        path, named="--instruction", remedy="Give a text file, or leave the flag out for the instruction of this program."
    ).strip()
    if not text:
        raise UserError(f"--instruction {path}: is empty. Write the instruction there, or leave the flag out.")
    if TRIGGER in text and trigger is None:
        raise UserError(f"--instruction {path}: holds {TRIGGER}, and there is no trigger word. Give --trigger_word, or take it out.")
    return Instruction(text, trigger, max_words)
