"""Rewards that judge with a model, by tiny real ones in folders: likeness, speech, CLAP, CLIP."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from musubi_tuner.media.audio import Waveform
from musubi_tuner.media.write import write_video, write_wav
from musubi_tuner.reinforcement.rewards.base import NoScore, RewardSample
from musubi_tuner.reinforcement.rewards.catalog import choose
from musubi_tuner.reinforcement.rewards.prompts import distance, quoted_speech, words_of
from musubi_tuner.runtime.errors import UserError
from tests import reward_models

RATE = 48_000


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models of mine")
    names = ("clip", "siglip", "dino", "wavlm_speakers", "wav2vec2", "whisper", "clap")
    return {name: getattr(reward_models, f"write_{name}")(folder / name) for name in names}


def tone(hertz: float, seconds: float = 1.0) -> Waveform:
    return Waveform((0.3 * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)).expand(2, -1), RATE)


def still(color: tuple[int, int, int], frames: int = 9) -> Tensor:
    return torch.tensor(color, dtype=torch.uint8).expand(frames, 64, 64, 3).contiguous()


def stripes(frames: int = 9) -> Tensor:
    picture = still((20, 40, 220), frames)
    picture[:, ::4] = 250
    return picture


def sample(
    frames: Tensor | None = None, sound: Waveform | None = None, prompt: str = "a dog", prompt_sound: Path | None = None
) -> RewardSample:
    return RewardSample(name="a", group=0, prompt=prompt, fps=24.0, decoded_frames=frames, decoded_sound=sound, prompt_sound=prompt_sound)


def made(name: str, **arguments: object):
    (chosen,) = choose([name], [f"{name}.{key}={value}" for key, value in arguments.items()], ())
    reward = chosen.kind()
    assert chosen.files(reward), "weights count for what a score is"
    reward.setup(torch.device("cpu"), **chosen.arguments)
    return reward


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """The user's own: a picture and a video, with a voice."""
    folder = tmp_path_factory.mktemp("meine clips")
    Image.fromarray(stripes(1)[0].numpy()).save(folder / "a.png")
    write_video(folder / "b.mp4", stripes(), 24.0, tone(220, 9 / 24))
    write_wav(folder / "c.wav", tone(220))
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    return folder


@pytest.mark.parametrize("model", ["clip", "siglip", "dino"])
def test_pictures_like_the_users_own_score_higher(models, clips, model):
    reward = made("picture_likeness", model=models[model], clips=clips)
    with torch.inference_mode():
        like, unlike = reward.score([sample(stripes()), sample(still((200, 30, 30)))])
    assert unlike < like and 0.95 < like <= 1 + 1e-5


@pytest.mark.parametrize("model", ["wavlm_speakers", "wav2vec2"])
def test_voices_like_the_users_own_score_higher(models, clips, model):
    reward = made("voice_likeness", model=models[model], clips=clips)
    noise = Waveform(torch.randn(2, RATE, generator=torch.Generator().manual_seed(0)) * 0.3, RATE)
    with torch.inference_mode():
        like, unlike, short = reward.score([sample(sound=one) for one in (tone(220), noise, tone(220, 0.1))])
    assert unlike < like and 0.9 < like <= 1 + 1e-5 and short == NoScore("0.10 s hold no voice")
    own = made("voice_likeness", model=models[model])
    with torch.inference_mode():
        (by_prompt,) = own.score([sample(sound=tone(220), prompt_sound=clips / "c.wav")])
        with pytest.raises(UserError, match="the prompt 'a dog' names no sound"):
            own.score([sample(sound=tone(220))])
    assert 0.9 < by_prompt <= 1 + 1e-5


def test_speech_is_judged_by_what_whisper_hears(models):
    """This one says something of its own; what counts is that its words are compared, and that prompts without speech have no score."""
    reward = made("word_error", model=models["whisper"])
    with torch.inference_mode():
        one = sample(sound=tone(220), prompt='She says: "Come home, now!"')
        heard = reward.heard(one)
        assert words_of(heard)
        assert reward.score([one]) == [-distance(["come", "home", "now"], words_of(heard)) / 3]
        assert reward.score([sample(sound=tone(220), prompt=f'He says "{heard}"')]) == [0.0]
        assert reward.score([sample(sound=tone(220), prompt="a dog barks")]) == [NoScore("its prompt quotes no speech")]
    with pytest.raises(UserError, match="word_error.language=klingon"):
        made("word_error", model=models["whisper"], language="klingon").score([one])


def test_words_and_their_distance():
    assert quoted_speech('"One." she said, “two”, «drei», „vier“ and 「五」; it\'s') == ["One.", "two", "drei", "vier", "五"]
    assert words_of("Don’t STOP — 3 Straßen, 日本!") == ["don't", "stop", "3", "strassen", "日", "本"]
    for wanted, heard, count in (("a b c", "a b c", 0), ("a b c", "a c", 1), ("a b c", "a x c d", 2), ("a b", "", 2), ("", "a b", 2)):
        assert distance(wanted.split(), heard.split()) == count


def test_clap_compares_sound_and_prompt_the_same_every_time(models):
    """Also where the sound is longer than it hears, of which its own preprocessor would cut a random piece out."""
    reward = made("clap", model=models["clap"])
    assert next(reward._model.parameters()).dtype == torch.float32
    sound = Waveform(torch.cat([tone(200, 1.3).samples, tone(900, 1.2).samples], 1), RATE)
    with torch.inference_mode():
        first, second, other, words = reward.score(
            [sample(sound=sound), sample(sound=sound), sample(sound=tone(900)), sample(sound=sound, prompt="rain " * 200)]
        )
    assert first == second != other and words != first and all(-1 <= score <= 1 for score in (first, other, words))


@pytest.mark.parametrize("model", ["clip", "siglip"])
def test_clip_compares_pictures_and_prompt(models, model):
    reward = made("clip", model=models[model])
    with torch.inference_mode():
        a, b, c = reward.score([sample(stripes()), sample(still((200, 30, 30))), sample(stripes(), prompt="a cat " * 100)])
    assert len({a, b, c}) == 3 and all(-1 <= score <= 1 for score in (a, b, c))


def test_clip_is_that_of_transformers(models):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    frames = stripes(1)
    model = CLIPModel.from_pretrained(models["clip"]).eval()
    pixels = AutoImageProcessor.from_pretrained(models["clip"])(images=[Image.fromarray(frames[0].numpy())], return_tensors="pt")
    text = AutoTokenizer.from_pretrained(models["clip"])(["a dog"], padding="max_length", max_length=77, return_tensors="pt")
    with torch.inference_mode():
        found = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=pixels["pixel_values"])
        (ours,) = made("clip", model=models["clip"]).score([sample(frames)])
        assert ours == pytest.approx(float(found.logits_per_image / model.logit_scale.exp()), abs=1e-5)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder. Give the folder of a CLIP"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "its weights are pickles"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be loaded"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "its preprocessing cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_model_is_told_what_it_lacks(models, tmp_path, spoil, says):
    folder = tmp_path / "clip"
    shutil.copytree(models["clip"], folder)
    spoil(folder)
    with pytest.raises(UserError, match=re.escape(f"--reward_args clip.model={folder}: ")) as caught:
        made("clip", model=folder)
    assert says in str(caught.value)


def test_a_folder_without_clips_is_told_what_it_lacks(models, tmp_path):
    with pytest.raises(UserError, match="picture_likeness.clips=.*: holds none of the media that are compared with"):
        made("picture_likeness", model=models["clip"], clips=tmp_path)
    with pytest.raises(UserError, match="clip: needs --reward_args clip.model="):
        choose(["clip"], (), ())
    with pytest.raises(UserError, match="it knows no texts"):
        made("clip", model=_with_words(models["dino"], tmp_path / "dino"))


def _with_words(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    reward_models._tokenizer().save_pretrained(folder)
    return folder
