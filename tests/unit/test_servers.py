"""Servers that do not keep to the protocol: every answer ends in time, and in words."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.servers import Client, Remedies, Server

TIMEOUT = 0.5


@contextmanager
def answering(answer: Callable[[socket.socket], object]) -> Iterator[tuple[Client, list[bytes]]]:
    """A client of a server that reads a request and then does as it likes with the connection."""
    asked: list[bytes] = []

    def run() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    asked.append(connection.recv(65536))
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=run, daemon=True).start()
        server = Server(url=f"http://127.0.0.1:{listening.getsockname()[1]}", is_local=True, key=None, timeout=TIMEOUT, retries=1)
        yield Client(server, Remedies(gone="Start it.", late="Wait.", kind="a server", hint=lambda status: "See.")), asked


def _stall(connection: socket.socket, head: bytes) -> None:
    connection.sendall(head)
    time.sleep(3 * TIMEOUT)


def _trickle(connection: socket.socket, head: bytes) -> None:
    connection.sendall(head)
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(TIMEOUT / 5)


ERROR = b"HTTP/1.1 500 Oh\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda connection: _stall(connection, ERROR + b"out of"), "error 500"),
        (lambda connection: _trickle(connection, ERROR), "error 500"),
        (lambda connection: connection.sendall(ERROR + b"out of"), "error 500"),
        (lambda connection: connection.sendall(b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n"), "error 500"),
        (lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}"), "nothing answers"),
        (lambda connection: _trickle(connection, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"), "no answer within"),
    ],
)
def test_answers_that_stall_trickle_or_are_cut_off_are_tried_again_and_told(answer, says):
    begun = time.monotonic()
    with answering(answer) as (client, asked), pytest.raises(UserError, match=says):
        client.send("/any", b"{}")
    assert len(asked) == 2, "once, and once again"
    assert time.monotonic() - begun < 10, "a second of waiting between two tries, and the time of both"


def test_what_an_error_says_is_told():
    body = b'{"error": {"message": "out of memory"}}'
    head = b"HTTP/1.1 400 Oh\r\nContent-Length: %d\r\n\r\n" % len(body)
    with answering(lambda connection: connection.sendall(head + body)) as (client, asked), pytest.raises(UserError, match="out of memory"):
        client.send("/any", b"{}")
    assert len(asked) == 1
