"""Files of the official trainer that are none: each is refused by its name, before memory is asked for."""

from pathlib import Path

import pytest
import torch

from musubi_tuner.conversion.official_dataset.files import list_samples, read_audio, read_text, read_video
from musubi_tuner.conversion.official_dataset.plan import plan_import
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


@pytest.mark.parametrize("duration", [10**400, float("inf"), float("nan"), True, 0, -1, "5", torch.zeros(2)])
def test_a_duration_that_is_none_is_refused(tmp_path: Path, duration) -> None:
    path = tmp_path / "clip_0.pt"
    torch.save({"latents": torch.zeros(8, 4, 16), "duration": duration}, path)
    with pytest.raises(UserError, match=r"clip_0\.pt: duration = .*must be a number above 0"):
        read_audio(path)


def test_a_name_without_room_for_those_of_its_caches_is_told_of(tmp_path: Path) -> None:
    stem = "n" * 240
    for folder, value in (
        ("latents", {"latents": torch.zeros(128, 2, 2, 3), "fps": 24.0}),
        ("conditions", {"video_prompt_embeds": torch.zeros(8, 4), "prompt_attention_mask": torch.ones(8)}),
    ):
        (tmp_path / folder).mkdir()
        torch.save(value, tmp_path / folder / f"{stem}.pt")
    samples, _ = list_samples(tmp_path, "video")
    with pytest.raises(UserError, match=rf"{stem}\.pt: its name is too long .* make it \d+ bytes shorter, in every folder"):
        plan_import(samples, "video", None)
