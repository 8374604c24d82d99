"""Captions by a server that speaks the OpenAI chat protocol: llama.cpp, vLLM, LM Studio, Ollama and others."""

import base64
import http.client
import ipaddress
import json
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

from musubi_tuner.curation.captioning.answers import Answer
from musubi_tuner.curation.captioning.local import Sampling
from musubi_tuner.curation.captioning.media import Look, as_waveform
from musubi_tuner.media.picture import small_jpeg
from musubi_tuner.media.write import wav_bytes
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.files import read_text

_AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers that another try may get over."""
_LONGEST_ANSWER = 8 * 2**20
_BLOCK = 2**16
_LONGEST_WAIT = 60.0
_JPEG_QUALITY = 90


class ServerGone(TemporaryFailure):
    """Nothing answers at the address any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where it is, and how patient one is with it."""

    url: str
    """Without / at the end, such as http://127.0.0.1:8000/v1"""
    is_local: bool
    key: str | None
    timeout: float
    retries: int


def find_server(url: str, *, key_file: Path | None, allow_remote: bool, timeout: float, retries: int) -> Server:
    """Check the address.

    Raises:
        UserError: no http address, a host that is not known, or one that is neither this machine nor in a private network.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"--endpoint {url}: is no address ({error}). Give one such as http://127.0.0.1:8000/v1.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--endpoint {url}: must be an address such as http://127.0.0.1:8000/v1.")
    if parts.username or parts.password:
        raise UserError(f"--endpoint {parts.hostname}: holds a name or password. Put the key into a file and give --api_key_file.")
    if parts.query or parts.fragment:
        raise UserError(f"--endpoint {url}: must end with its path, such as /v1, without ? and #.")
    try:
        found = socket.getaddrinfo(parts.hostname, port or (443 if parts.scheme == "https" else 80), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--endpoint {url}: the host '{parts.hostname}' is not found. Correct the address.") from error
    is_local = all(_is_private(str(one[4][0])) for one in found)
    if not is_local and not allow_remote:
        raise UserError(
            f"--endpoint {url}: {parts.hostname} is neither this machine nor in a private network: pictures and sound of your media would "
            "leave it. Add --allow_remote if that is what you want."
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return Server(url=f"{parts.scheme}://{parts.netloc}{path}", is_local=is_local, key=_key(key_file), timeout=timeout, retries=retries)


def _is_private(address: str) -> bool:
    known = ipaddress.ip_address(address.partition("%")[0])
    return known.is_loopback or known.is_private or known.is_link_local


def _key(path: Path | None) -> str | None:
    if path is None:
        return None
    key = read_text(path, named="--api_key_file").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"--api_key_file {path}: must hold one key on one line, and nothing else.")
    return key


class EndpointCaptioner:
    """A model of a server. Its methods may be called in several threads."""

    def __init__(self, server: Server, model_name: str | None, sampling: Sampling) -> None:
        """Asks the server for its models.

        Raises:
            UserError: nothing answers, or it lists other than one model and none is named.
        """
        self._server, self._sampling = server, sampling
        handlers: list[Any] = [_NoRedirects(), *([urllib.request.ProxyHandler({})] if server.is_local else [])]
        self._opener = urllib.request.build_opener(*handlers)  # no proxy on the way to a machine of one's own
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
        answer = self._send("/chat/completions", body)
        where = f"{self._server.url}: its answer"
        try:
            choice = answer["choices"][0]
            said = choice["message"]["content"]
        except (TypeError, LookupError) as error:
            raise UserError(f"{where} holds no choices with a message: {_short(answer)}. Is it a server of the chat protocol?") from error
        if isinstance(said, list):
            said = "".join(str(part.get("text") or "") for part in said if isinstance(part, dict))
        if said is not None and not isinstance(said, str):
            raise UserError(f"{where} is no text: {_short(said)}.")
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
            listed = self._send("/models", None)
        except _Refused as error:
            if error.status in (401, 403):
                raise
            return []
        rows = listed.get("data") if isinstance(listed, dict) else None
        found = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)] if isinstance(rows, list) else []
        return list(dict.fromkeys(_clean(name) for name in found if name.strip()))

    def _send(self, path: str, body: bytes | None) -> Any:
        wait = 1.0
        for left in range(self._server.retries, -1, -1):
            try:
                return self._send_once(path, body)
            except _TryAgain as error:
                if not left:
                    raise error.reason from error
                sleep(min(_LONGEST_WAIT, max(wait, error.after)))
                wait *= 2
        raise AssertionError("the last try returns or raises")

    def _send_once(self, path: str, body: bytes | None) -> Any:
        url = f"{self._server.url}{path}"
        headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if body is not None else {})
        if self._server.key is not None:
            headers["Authorization"] = f"Bearer {self._server.key}"
        try:
            with self._opener.open(urllib.request.Request(url, body, headers), timeout=self._server.timeout) as response:
                data = self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                refused = _Refused(url, error.code, _message(error.read(_LONGEST_ANSWER)), self._hint(error.code))
            if error.code in _AGAIN:
                raise _TryAgain(refused, _seconds(error.headers)) from error
            raise refused from error
        except TimeoutError as error:
            raise _TryAgain(self._late(url)) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _TryAgain(self._late(url)) from error
            if isinstance(reason, ssl.SSLError):
                raise UserError(f"{url}: its certificate or encryption is not right ({reason}). Is it an http address?") from error
            gone = ServerGone(
                f"{url}: nothing answers ({_reason(reason)}). Start the server, or correct --endpoint; then run the same command again."
            )
            raise _TryAgain(gone) from error
        if len(data) > _LONGEST_ANSWER:
            raise UserError(f"{url}: its answer is longer than {_LONGEST_ANSWER // 2**20} MB. Is it a server of the chat protocol?")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{url}: its answer is no JSON: {_short(data.decode('utf-8', 'replace'))}. Is the address right?") from error

    def _read(self, response: Any) -> bytes:
        """All of an answer, as long as it is not too long, and comes within the time: one may trickle without end.

        Raises:
            TimeoutError: it does not.
        """
        parts, count, end = [], 0, monotonic() + self._server.timeout
        while count <= _LONGEST_ANSWER and (part := response.read1(_BLOCK)):
            parts.append(part)
            count += len(part)
            if monotonic() > end:
                raise TimeoutError
        return b"".join(parts)

    def _late(self, url: str) -> TemporaryFailure:
        return TemporaryFailure(
            f"{url}: no answer within {self._server.timeout:g} s. Raise --timeout, or give fewer --requests or --frames."
        )

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            return "Give its key with --api_key_file."
        if status == 404:
            known = f" It lists {', '.join(self._listed[:10])}." if getattr(self, "_listed", None) else ""
            return f"Correct --model_name or --endpoint (most servers' ends with /v1).{known}"
        if status in (400, 413, 415, 422):
            return "It may take no pictures, no sound, or not as many: try fewer --frames, a smaller --longest_side, --sound off."
        return "See what the server says."


class _Refused(UserError):
    """An answer that is an error."""

    def __init__(self, url: str, status: int, message: str, hint: str) -> None:
        super().__init__(f"{url}: the server answers with error {status}{f' ({message})' if message else ''}. {hint}")
        self.status = status


class _TryAgain(Exception):
    """What may be over after a while."""

    def __init__(self, reason: UserError, after: float = 0.0) -> None:
        super().__init__(str(reason))
        self.reason, self.after = reason, after


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Media go where one has sent them, and nowhere else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def _clean(text: str) -> str:
    """Without halves of pairs of escapes, which no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _message(data: bytes) -> str:
    """What an error says, without its wrapping."""
    text = data.decode("utf-8", "replace")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return _short(text)
    for key in ("error", "detail", "message"):
        if isinstance(value, Mapping) and value.get(key):
            value = value[key]
    return _short(value)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _seconds(headers: Any) -> float:
    """Of Retry-After; 0 where it says none, or a date."""
    found = (headers.get("Retry-After") or "").strip() if headers is not None else ""
    return float(found) if found.isdecimal() else 0.0


def _reason(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
