"""All options of `ltxv2 dataset caption`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from musubi_tuner.config.dataset import CaptionExtension
from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, Count, List, Seed, Text, options
from musubi_tuner.runtime.errors import UserError

NO_PREFIXES = "none"
"""`--strip_prefix` that leaves answers as they begin."""


@options
class MediaOptions:
    """Media."""

    media: AnyPath = flag("dataset TOML, or a folder of videos, images and sounds; the flag's name may be left out")
    caption_extension: CaptionExtension | None = flag(
        "ending of caption files; default: that of the dataset TOML, .txt for a folder", default=None
    )
    frames: Annotated[int, Field(ge=1, le=256)] = flag("frames of a video that the model sees, evenly spaced", default=8)
    longest_side: Annotated[int, Field(ge=32, le=4096)] = flag(
        "pixels of the longer side of what it sees; larger pictures are made smaller", default=768
    )
    sound: Literal["auto", "on", "off"] = flag(
        "let it hear videos; auto: where the processor of --model takes sound. Sound files are always heard", default="auto"
    )
    sound_seconds: Annotated[float, Field(ge=0.5, le=3600)] = flag(
        "seconds of sound, from the beginning, that it hears at most", default=60.0
    )
    most: Count | None = flag("captions to write, at most; run again for the others", default=None)


@options
class CaptionerOptions:
    """Who writes: --model or --endpoint."""

    model: AnyPath | None = flag("folder of a vision-language or omni model, as transformers reads it; nothing is downloaded", default=None)
    device: Text | None = flag("device of --model, such as cuda:0 or cpu; default: the best there is", default=None)
    endpoint: Text | None = flag(
        "address of a server that speaks the OpenAI chat protocol (llama.cpp, vLLM, LM Studio, Ollama), such as http://127.0.0.1:8000/v1",
        default=None,
    )
    model_name: Text | None = flag("model of the server; default: the one that it lists, where it lists one", default=None)
    requests: Annotated[int, Field(ge=1, le=64)] = flag("requests to the server at once", default=4)
    timeout: Annotated[float, Field(gt=0, le=86_400)] = flag("seconds to wait for the server's answer", default=300.0)
    retries: Annotated[int, Field(ge=0, le=20)] = flag("further tries of a request that fails, after 1, 2, 4 ... seconds", default=3)
    api_key_file: AnyPath | None = flag("text file with the key that the server asks for", default=None)
    allow_remote: bool = flag("let pictures and sound leave this machine and its private network", default=False)

    @model_validator(mode="after")
    def _check(self) -> "CaptionerOptions":
        if (self.model is None) == (self.endpoint is None):
            found = "neither was given" if self.model is None else "both were given"
            raise UserError(f"who writes the captions: give --model FOLDER or --endpoint URL ({found}).")
        of_server = ("model_name", "api_key_file")
        if self.model is not None and (given := [name for name in of_server if getattr(self, name) is not None]):
            raise UserError(f"--{given[0]} is for --endpoint; --model reads its folder alone.")
        return self


@options
class WordingOptions:
    """What is asked, and what is made of the answers."""

    instruction: AnyPath | None = flag(
        "text file with your own instruction; {trigger} and {max_words} in it are filled in; default: one about "
        "picture, motion, speech and sound",
        default=None,
    )
    trigger_word: Text | None = flag("put in front of each caption that does not hold it, or where {trigger} stands", default=None)
    strip_prefix: Annotated[tuple[Text, ...], List] = flag(
        "beginning to take off answers, such as 'The video shows'; may be given again; default: a list of the usual ones (docs/how-to/"
        f"caption_clips.md); {NO_PREFIXES}: leave them",
        default=(),
        repeats=True,
    )
    max_words: Count = flag("longest caption; it is cut at the end of a sentence", default=200)
    max_tokens: Count = flag("tokens of an answer, at most", default=512)
    temperature: Annotated[float, Field(ge=0, le=5)] = flag("0: always the likeliest words; higher: drawn at random", default=0.0)
    seed: Seed = flag("of the draws; the same for each file", default=0)


@options
class CaptionWritingOptions:
    """What is written."""

    overwrite: bool = flag("caption again what this program captioned and nobody has edited since", default=False)
    page: bool = flag("also write caption_review.html beside the media: each with its caption, for a browser", default=False)
    output: AnyPath | None = flag(
        "new jsonl of a jsonl dataset; default: beside the old one, with .captioned before its ending", default=None
    )


@options
class CaptionConfig:
    """All sections."""

    media: MediaOptions
    captioner: CaptionerOptions
    wording: WordingOptions
    writing: CaptionWritingOptions
