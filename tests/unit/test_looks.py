"""What people are shown of a clip: its middle frame and the outline of its sound."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from musubi_tuner.cache.looks import MOST_PEAKS, look_path, read_outline
from musubi_tuner.encoding.looks import outline_of, picture_of


def test_the_picture_is_the_middle_frame_and_small():
    frames = torch.zeros(9, 192, 320, 3, dtype=torch.uint8)
    frames[4, ..., 1] = 200
    picture = Image.open(io.BytesIO(picture_of(frames)))
    assert (picture.format, picture.size) == ("JPEG", (160, 96))
    assert np.abs(np.asarray(picture).astype(int) - [0, 200, 0]).max() < 8


def test_a_picture_that_is_small_already_is_not_enlarged():
    assert Image.open(io.BytesIO(picture_of(torch.zeros(1, 32, 64, 3, dtype=torch.uint8)))).size == (64, 32)


def test_the_outline_rises_where_the_sound_does(tmp_path):
    samples = torch.zeros(2, 16000)
    samples[1, 8000:] = -0.5
    samples[0, -1] = 3.0
    path = look_path(tmp_path / "a clip_ltxv2_audio.safetensors", "audio")
    assert path == tmp_path / "ltxv2_looks" / "a clip_ltxv2_audio.json"
    path.parent.mkdir()
    path.write_bytes(outline_of(samples))
    assert read_outline(path) == [0] * 50 + [50] * 49 + [100] and MOST_PEAKS == 100
    path.write_bytes(outline_of(samples[:, :0]))
    assert read_outline(path) == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2", b"[101]", b"[true]", b"[-1]", b'["a"]', b"[" * 100_000, str([1] * 101).encode()])
def test_what_is_no_outline_is_none(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert read_outline(path) == [] and read_outline(tmp_path / "none.json") == []
