"""Captions by a server that speaks the OpenAI chat protocol: llama.cpp, vLLM, LM Studio, Ollama and others."""

import base64
import json
from pathlib import Path
from typing import Any

from musubi_tuner.curation.captioning.answers import Answer
from musubi_tuner.curation.captioning.local import Sampling
from musubi_tuner.curation.captioning.media import Look, as_waveform
from musubi_tuner.media.picture import small_jpeg
from musubi_tuner.media.write import wav_bytes
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.servers import Client, Flags, Refused, Remedies, Server, shortened
from musubi_tuner.runtime.servers import find_server as find_any_server

_JPEG_QUALITY = 90
_FLAGS = Flags(url="--endpoint ", key_file="--api_key_file", allow_remote="--allow_remote", example="http://127.0.0.1:8000/v1")


def find_server(url: str, *, key_file: Path | None, allow_remote: bool, timeout: float, retries: int) -> Server:
    """As `runtime.servers.find_server`, in the words of captioning's flags."""
    return find_any_server(
        url, key_file=key_file, allow_remote=allow_remote, timeout=timeout, retries=retries, flags=_FLAGS, ending="/chat/completions"
    )


class EndpointCaptioner:
    """A model of a server. Its methods may be called in several threads."""

    def __init__(self, server: Server, model_name: str | None, sampling: Sampling) -> None:
        """Asks the server for its models.

        Raises:
            UserError: nothing answers, or it lists other than one model and none is named.
        """
        self._server, self._sampling = server, sampling
        self._client = Client(
            server,
            Remedies(
                gone="Start the server, or correct --endpoint; then run the same command again.",
                late="Raise --timeout, or give fewer --requests or --frames.",
                kind="a server of the chat protocol",
                hint=self._hint,
            ),
        )
        self._listed = self._models()
        if model_name is None and len(self._listed) != 1:
            names = f"lists {', '.join(self._listed[:10])}" if self._listed else "lists no models"
            raise UserError(f"--endpoint {server.url}: {names}. Name one with --model_name.")
        self.name = model_name or self._listed[0]

    def ask(self, instruction: str, look: Look) -> Answer:
        """What it says, after as many tries as are allowed.

        Raises:
            ServerGone: nothing answers any more.
            UserError: it refuses the request, or its answer is none.
        """
        body = json.dumps(self._request(instruction, look)).encode("ascii")
        answer = self._client.send("/chat/completions", body)
        where = f"{self._server.url}: its answer"
        try:
            choice = answer["choices"][0]
            said = choice["message"]["content"]
        except (TypeError, LookupError) as error:
            raise UserError(
                f"{where} holds no choices with a message: {shortened(answer)}. Is it a server of the chat protocol?"
            ) from error
        if isinstance(said, list):
            said = "".join(str(part.get("text") or "") for part in said if isinstance(part, dict))
        if said is not None and not isinstance(said, str):
            raise UserError(f"{where} is no text: {shortened(said)}.")
        return Answer(_clean(said or ""), choice.get("finish_reason") == "length")

    def _request(self, instruction: str, look: Look) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for picture in look.pictures:
            data = small_jpeg(picture, longest=max(picture.shape[:2]), quality=_JPEG_QUALITY)
            content.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_base64(data)}"}})
        if look.sound is not None:
            data = wav_bytes(as_waveform(look.sound))
            content.append({"type": "input_audio", "input_audio": {"data": _base64(data), "format": "wav"}})
        content.append({"type": "text", "text": instruction})
        return {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._sampling.max_tokens,
            "temperature": self._sampling.temperature,
            "seed": self._sampling.seed,
            "stream": False,
        }

    def _models(self) -> list[str]:
        """Names of what the server lists; none where it has no list.

        Raises:
            UserError: nothing answers, or the key is refused.
        """
        try:
            listed = self._client.send("/models", None)
        except Refused as error:
            if error.status in (401, 403):
                raise
            return []
        rows = listed.get("data") if isinstance(listed, dict) else None
        found = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)] if isinstance(rows, list) else []
        return list(dict.fromkeys(_clean(name) for name in found if name.strip()))

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            return "Give its key with --api_key_file."
        if status == 404:
            known = f" It lists {', '.join(self._listed[:10])}." if getattr(self, "_listed", None) else ""
            return f"Correct --model_name or --endpoint (most servers' ends with /v1).{known}"
        if status in (400, 413, 415, 422):
            return "It may take no pictures, no sound, or not as many: try fewer --frames, a smaller --longest_side, --sound off."
        return "See what the server says."


def _clean(text: str) -> str:
    """Without halves of pairs of escapes, which no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
