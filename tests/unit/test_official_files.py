"""Files of the official trainer that are none: each is refused by its name, before memory is asked for."""

from pathlib import Path

import pytest
import torch

from musubi_tuner.conversion.official_dataset.files import read_audio, read_text, read_video
from musubi_tuner.runtime.errors import UserError


@pytest.mark.parametrize("data", [b"", b"junk", b"\x80\x02\x8a\n", bytes(100), b"PK\x05\x06" + bytes(18), b"text\n"], ids=repr)
@pytest.mark.parametrize("read", [read_video, read_audio, read_text])
def test_bytes_that_are_no_file_of_torch_are_refused_by_name(tmp_path: Path, data: bytes, read) -> None:
    path = tmp_path / "clip_0.pt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"clip_0\.pt: torch\.load\(weights_only=True\) does not read it"):
        read(path)


def test_a_mask_of_another_length_is_not_spread_out_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "clip_0.pt"
    torch.save({"video_prompt_embeds": torch.zeros(8, 4), "prompt_attention_mask": torch.ones(1).expand(2**42)}, path)
    with pytest.raises(UserError, match=r"clip_0\.pt: features are .* found \(8, 4\) and \(4398046511104,\)"):
        read_text(path)
