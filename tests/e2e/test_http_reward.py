"""A reward by a server: what it is sent, what it may answer, what is refused."""

import base64
import io
import json
import re
import threading
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from musubi_tuner import ltxv2_score_rollouts
from musubi_tuner.reinforcement.rollouts import read_rollouts
from musubi_tuner.runtime import servers
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from tests.rl_parts import make


@pytest.fixture(scope="module")
def made(tiny_family, tmp_path_factory):
    return make(tiny_family, tmp_path_factory.mktemp("http"), "--rl_group_size", "2", prompts=("a dog barks",))


@contextmanager
def serving(answer: Callable[[dict, int], tuple[int, Any]]) -> Iterator[tuple[str, list]]:
    """Its address, and (path, headers, body) of each request."""
    seen: list = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            status, value = answer(body, len(seen))
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run(family, folder, reward: str, *arguments: str) -> int:
    base = ["--rl_rollout_cache", str(folder), "--reward_fn", reward, "--device", "cpu", "--vae", str(family.ltx23)]
    given = [part for one in arguments for part in ("--reward_args", f"{reward}.{one}")]
    return ltxv2_score_rollouts.main([*base, *given])


def written(folder, reward: str) -> dict:
    return json.loads((folder / "scores" / f"{reward}.json").read_text(encoding="utf-8"))


def test_a_server_gets_what_the_route_names_and_its_scores_are_kept(tiny_family, made, tmp_path):
    key = tmp_path / "key.txt"
    key.write_text("s3cret\n", encoding="utf-8")
    with serving(lambda body, number: (200, {"score": 0.25 * number})) as (url, seen):
        for reward, holds in (("http_video", {"frames"}), ("http_audio", {"sound"}), ("http_sync", {"frames", "sound"})):
            seen.clear()
            assert run(tiny_family, made, reward, f"url={url}", "frames=3", "longest_side=48", f"key_file={key}") == 0
            assert len(seen) == 2
            for (path, headers, body), sample in zip(seen, read_rollouts(made).samples, strict=True):
                assert path == "/score" and headers["Authorization"] == "Bearer s3cret"
                assert set(body) == {"reward", "name", "group", "prompt", "fps", "seconds"} | holds
                assert (body["reward"], body["name"], body["prompt"]) == (reward, sample.name, "a dog barks")
                assert body["seconds"] == pytest.approx(9 / 24)
                if "frames" in holds:
                    pictures = [Image.open(io.BytesIO(base64.b64decode(one, validate=True))) for one in body["frames"]]
                    assert [(one.format, max(one.size)) for one in pictures] == [("JPEG", 48)] * 3
                if "sound" in holds:
                    with wave.open(io.BytesIO(base64.b64decode(body["sound"], validate=True))) as file:
                        assert file.getnframes() == pytest.approx(file.getframerate() * 9 / 24, abs=1)
            assert list(written(made, reward)["scores"].values()) == [0.25, 0.5]
    assert "s3cret" not in (made / "scores" / "http_sync.json").read_text(encoding="utf-8")


def test_a_server_may_have_no_score(tiny_family, made):
    answers: list[object] = [{"score": None, "reason": "no face"}, b'{"score": NaN}']
    with serving(lambda body, number: (200, answers[number - 1])) as (url, _):
        assert run(tiny_family, made, "http_video", f"url={url}", "retries=0") == 0
    assert written(made, "http_video")["errors"] == {"g0000_k00": "no face", "g0000_k01": "the reward gave nan, which is not finite"}


def test_how_long_one_waits_for_a_server_changes_no_score(tiny_family, made):
    with serving(lambda body, number: (200, {"score": number})) as (url, seen):
        run(tiny_family, made, "http_video", f"url={url}", "timeout=5")
        run(tiny_family, made, "http_video", f"url={url}", "timeout=6", "retries=1")
        assert len(seen) == 2
        run(tiny_family, made, "http_video", f"url={url}", "frames=2")
        assert len(seen) == 4


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, {"value": 1}), "its answer holds no score: {'value': 1}"),
        ((200, [1]), "its answer holds no score"),
        ((200, {"score": "high"}), "its score is high: must be a number or null"),
        ((200, b'{"score": 1' + b"0" * 400 + b"}"), "gave a whole number beyond any float as a score"),
        ((200, {"score": True}), "its score is True: must be a number or null"),
        ((200, b"<html>"), "its answer is no JSON"),
        ((403, {"error": "who are you"}), "error 403 (who are you). Give its key by --reward_args http_video.key_file."),
        ((302, {}), "error 302"),
    ],
)
def test_what_is_no_score_ends_the_run(tiny_family, made, answer, says):
    with serving(lambda body, number: answer) as (url, _), pytest.raises(UserError, match=re.escape(says)):
        run(tiny_family, made, "http_video", f"url={url}", "retries=0", "timeout=9")


def test_a_server_that_stumbles_is_asked_again_and_one_that_is_gone_keeps_what_was_scored(tiny_family, made, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(servers, "sleep", waits.append)
    with serving(lambda body, number: (503, {}) if number == 1 else (200, {"score": number})) as (url, _):
        assert run(tiny_family, made, "http_audio", f"url={url}", "timeout=8") == 0
    assert waits == [1.0] and written(made, "http_audio")["scores"] == {"g0000_k00": 2.0, "g0000_k01": 3.0}
    with pytest.raises(TemporaryFailure, match="nothing answers .*what has a score keeps it"):
        run(tiny_family, made, "http_sync", f"url={url}", "timeout=7")
    assert waits == [1.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "http_video: needs --reward_args http_video.url="),
        (("url=http://8.8.8.8/score",), "neither this machine nor in a private network"),
        (("url=http://me:secret@127.0.0.1/score",), "holds a name or password"),
        (("url=file:///etc/passwd",), "must be an address such as http://127.0.0.1:8000/score"),
        (("url=http://127.0.0.1:9/score", "frames=0"), "http_video.frames=0: must be at least 1"),
        (("url=http://127.0.0.1:9/score", "timeout=0"), "http_video.timeout=0: must be above 0"),
        (("url=http://127.0.0.1:9/score", "allow_remote=maybe"), "allow_remote=maybe: must be true or false"),
    ],
)
def test_addresses_and_arguments_that_are_refused(tiny_family, made, arguments, says):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        run(tiny_family, made, "http_video", *arguments)
    assert "secret" not in str(caught.value)
