"""Rewards by a server of the user's own: each sample is POSTed to it as JSON, and it answers with a score.

{"reward": "http_sync", "name": "g0003_k02", "group": 3, "prompt": "...", "fps": 24.0, "seconds": 2.04,
 "frames": ["<base64 of a JPEG>", ...],     http_video and http_sync
 "sound": "<base64 of a wav>"}              http_audio and http_sync
-> {"score": 0.7}                           or {"score": null, "reason": "no face"}
"""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.media.picture import small_jpeg
from musubi_tuner.media.write import wav_bytes
from musubi_tuner.reinforcement.rewards.base import NoScore, Reward, RewardSample, Score
from musubi_tuner.reinforcement.rewards.local import evenly
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.servers import Client, Flags, Remedies, find_server, shortened

_QUALITY = 95


class _Http(Reward):
    """What `url` answers. `frames` (8) are sent, evenly spread, as JPEG of at most `longest_side` pixels (512; 0: as they are)."""

    has_model = False
    indifferent = ("timeout", "retries", "key_file", "allow_remote")

    def setup(
        self,
        device: torch.device,
        url: str,
        frames: int = 8,
        longest_side: int = 512,
        timeout: float = 120.0,
        retries: int = 3,
        key_file: Path | None = None,
        allow_remote: bool = False,
    ) -> None:
        arg = f"--reward_args {self.name}."
        for key, value, least in (("frames", frames, 1), ("longest_side", longest_side, 0), ("retries", retries, 0)):
            if value < least:
                raise UserError(f"{arg}{key}={value}: must be at least {least}.")
        if not 0 < timeout <= 86_400:
            raise UserError(f"{arg}timeout={timeout:g}: must be above 0, and at most 86400 seconds.")
        flags = Flags(
            url=f"{arg}url=", key_file=f"{arg}key_file", allow_remote=f"{arg}allow_remote=true", example="http://127.0.0.1:8000/score"
        )
        server = find_server(url, key_file=key_file, allow_remote=allow_remote, timeout=timeout, retries=retries, flags=flags)
        self._frames, self._longest, self._url = frames, longest_side or math.inf, server.url
        remedies = Remedies(
            gone=f"Start the server, or correct {arg}url; then run the same command again: what has a score keeps it.",
            late=f"Raise {arg}timeout, or send fewer {arg}frames.",
            kind="a server of scores (docs/how-to/rewards.md)",
            hint=lambda status: f"Give its key by {arg}key_file." if status in (401, 403) else "See what the server says.",
        )
        self._client = Client(server, remedies)

    def score(self, samples: Sequence[RewardSample]) -> list[Score]:
        return [self._score(one) for one in samples]

    def _score(self, sample: RewardSample) -> Score:
        answer = self._client.send("", json.dumps(self._request(sample)).encode("ascii"))
        if not isinstance(answer, dict) or "score" not in answer:
            raise UserError(f'{self._url}: its answer holds no score: {shortened(answer)}. It must be {{"score": NUMBER}}.')
        found = answer["score"]
        if found is None:
            return NoScore(shortened(answer.get("reason") or "the server has none for it"))
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise UserError(f"{self._url}: its score is {shortened(found)}: must be a number or null.")
        return found

    def _request(self, sample: RewardSample) -> dict[str, Any]:
        request: dict[str, Any] = {
            "reward": self.name, "name": sample.name, "group": sample.group, "prompt": sample.prompt, "fps": sample.fps,
        }  # fmt: skip
        if "video" in self.needs:
            request["seconds"] = len(sample.frames) / sample.fps
            request["frames"] = [_base64(self._jpeg(frame)) for frame in evenly(sample.frames, self._frames)]
        if "audio" in self.needs:
            request["seconds"] = sample.sound.samples.shape[1] / sample.sound.rate
            request["sound"] = _base64(wav_bytes(sample.sound))
        return request

    def _jpeg(self, frame: torch.Tensor) -> bytes:
        return small_jpeg(frame, longest=int(min(self._longest, max(frame.shape[:2]))), quality=_QUALITY)


class HttpVideo(_Http):
    """Of the pictures."""

    name, route, needs = "http_video", "video", ("video",)


class HttpAudio(_Http):
    """Of the sound."""

    name, route, needs = "http_audio", "audio", ("audio",)


class HttpSync(_Http):
    """Of both."""

    name, route, needs = "http_sync", "sync", ("video", "audio")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
