"""Requests to a server of the user's: which addresses are taken, JSON out and in, tries that are repeated.

What is sent goes to that address and nowhere else: redirects are refused, and a machine of one's own is reached without a proxy.
"""

import http.client
import ipaddress
import json
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.files import read_text

_AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers that another try may get over."""
_LONGEST_ANSWER = 8 * 2**20
_BLOCK = 2**16
_LONGEST_WAIT = 60.0


class ServerGone(TemporaryFailure):
    """Nothing answers at the address any more."""


class Refused(UserError):
    """An answer that is an error."""

    def __init__(self, url: str, status: int, message: str, hint: str) -> None:
        super().__init__(f"{url}: the server answers with error {status}{f' ({message})' if message else ''}. {hint}")
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """What a message calls the settings of a server."""

    url: str
    """Such as `--endpoint `, in front of the address."""
    key_file: str
    allow_remote: str
    example: str
    """An address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where it is, and how patient one is with it."""

    url: str
    """Without / at the end, such as http://127.0.0.1:8000/v1"""
    is_local: bool
    key: str | None
    timeout: float
    retries: int


def find_server(
    url: str, *, key_file: Path | None, allow_remote: bool, timeout: float, retries: int, flags: Flags, ending: str = ""
) -> Server:
    """Check the address.

    Args:
        ending: of the path, which is taken off.

    Raises:
        UserError: no http address, a host that is not known, or one that is neither this machine nor in a private network.
    """
    named = f"{flags.url}{url}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"{named}: is no address ({error}). Give one such as {flags.example}.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{named}: must be an address such as {flags.example}.")
    if parts.username or parts.password:
        raise UserError(f"{flags.url}{parts.hostname}: holds a name or password. Put the key into a file and give {flags.key_file}.")
    if parts.query or parts.fragment:
        raise UserError(f"{named}: must end with its path, such as {urlsplit(flags.example).path}, without ? and #.")
    try:
        found = socket.getaddrinfo(parts.hostname, port or (443 if parts.scheme == "https" else 80), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{named}: the host '{parts.hostname}' is not found. Correct the address.") from error
    is_local = all(_is_private(str(one[4][0])) for one in found)
    if not is_local and not allow_remote:
        raise UserError(
            f"{named}: {parts.hostname} is neither this machine nor in a private network: pictures and sound of your media would "
            f"leave it. Add {flags.allow_remote} if that is what you want."
        )
    path = parts.path.rstrip("/").removesuffix(ending)
    key = _key(key_file, flags)
    return Server(url=f"{parts.scheme}://{parts.netloc}{path}", is_local=is_local, key=key, timeout=timeout, retries=retries)


def _is_private(address: str) -> bool:
    known = ipaddress.ip_address(address.partition("%")[0])
    return known.is_loopback or known.is_private or known.is_link_local


def _key(path: Path | None, flags: Flags) -> str | None:
    if path is None:
        return None
    key = read_text(path, named=flags.key_file).strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{flags.key_file} {path}: must hold one key on one line, and nothing else.")
    return key


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedies:
    """What is said to be done about failures."""

    gone: str
    late: str
    kind: str
    """What the server should be, such as `a server of the chat protocol`."""
    hint: Callable[[int], str]
    """By the status of an error."""


class Client:
    """Sends JSON and reads JSON. May be used in several threads."""

    def __init__(self, server: Server, remedies: Remedies) -> None:
        self._server, self._remedies = server, remedies
        handlers: list[Any] = [_NoRedirects(), *([urllib.request.ProxyHandler({})] if server.is_local else [])]
        self._opener = urllib.request.build_opener(*handlers)  # no proxy on the way to a machine of one's own

    def send(self, path: str, body: bytes | None) -> Any:
        """The answer, after as many tries as are allowed.

        Args:
            path: added to the server's address.
            body: JSON to POST; None: GET.

        Raises:
            ServerGone: nothing answers any more.
            Refused: an answer that is an error.
            UserError: it is no JSON, or too long.
        """
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
                refused = Refused(url, error.code, _message(self._told(error)), self._remedies.hint(error.code))
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
            gone = ServerGone(f"{url}: nothing answers ({_reason(reason)}). {self._remedies.gone}")
            raise _TryAgain(gone) from error
        if len(data) > _LONGEST_ANSWER:
            raise UserError(f"{url}: its answer is longer than {_LONGEST_ANSWER // 2**20} MB. Is it {self._remedies.kind}?")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{url}: its answer is no JSON: {shortened(data.decode('utf-8', 'replace'))}. Is the address right?") from error

    def _read(self, response: Any) -> bytes:
        """All of an answer, as long as it is not too long, and comes within the time: one may trickle without end.

        Raises:
            TimeoutError: it does not.
            http.client.IncompleteRead: it is cut off.
        """
        parts, count, end = [], 0, monotonic() + self._server.timeout
        while count <= _LONGEST_ANSWER and (part := response.read1(_BLOCK)):
            parts.append(part)
            count += len(part)
            if monotonic() > end:
                raise TimeoutError
        if count <= _LONGEST_ANSWER and response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)

    def _told(self, error: urllib.error.HTTPError) -> bytes:
        """What is said about an error; nothing where it does not come whole and in time, as the error itself counts."""
        try:
            return self._read(error.fp)
        except (http.client.HTTPException, OSError):
            return b""

    def _late(self, url: str) -> TemporaryFailure:
        return TemporaryFailure(f"{url}: no answer within {self._server.timeout:g} s. {self._remedies.late}")


class _TryAgain(Exception):
    """What may be over after a while."""

    def __init__(self, reason: UserError, after: float = 0.0) -> None:
        super().__init__(str(reason))
        self.reason, self.after = reason, after


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Media go where one has sent them, and nowhere else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def _message(data: bytes) -> str:
    """What an error says, without its wrapping."""
    text = data.decode("utf-8", "replace")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return shortened(text)
    for key in ("error", "detail", "message"):
        if isinstance(value, Mapping) and value.get(key):
            value = value[key]
    return shortened(value)


def shortened(value: Any) -> str:
    """On one line, for a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _seconds(headers: Any) -> float:
    """Of Retry-After; 0 where it says none, or a date."""
    found = (headers.get("Retry-After") or "").strip() if headers is not None else ""
    return float(found) if found.isdecimal() else 0.0


def _reason(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
