"""Grids of clips: every combination once, resumable, each as if it were made alone, with a page and a picture that show them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner.generation import clips, stages
from musubi_tuner.generation.recipe import read_recipe
from musubi_tuner.generation.unfinished import FOLDER
from musubi_tuner.networks.formats import CONNECTORS_ENDING
from musubi_tuner.page.fill import as_json
from musubi_tuner.runtime.errors import UserError
from tests.e2e.test_generate import SIZE, run


@pytest.fixture(scope="module")
def checkpoints(tiny_family, tmp_path_factory):
    """Three saves of one run, named as the trainer names them."""
    folder = tmp_path_factory.mktemp("runs") / "my run"
    folder.mkdir()
    tensors = load_file(tiny_family.distilled_lora)
    for name, factor in (("mila-step00000009", 0.5), ("mila-step00000010", 1.0), ("mila", 1.5)):
        save_file({key: value * factor for key, value in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"mila{CONNECTORS_ENDING}").write_bytes(b"of the connectors")
    return folder


def grid_flags(checkpoints: Path) -> tuple[str, ...]:
    return (
        "--prompt", "a dog", "--output_name", "grid", "--grid", f"lora={checkpoints}/mila*.safetensors", "--grid", "strength=0,0.6,1",
        "--grid", "seed=1,2",
    )  # fmt: skip


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".mp4"}


def page_data(path: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


@pytest.fixture(scope="module")
def undisturbed(tiny_family, texts, checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid") / "undisturbed"
    run(tiny_family, texts, folder, *grid_flags(checkpoints))
    return folder


def test_three_checkpoints_at_three_strengths_with_two_seeds(undisturbed):
    """The base is made once a seed: 2 + 3 x 2 x 2 clips for 18 combinations."""
    lora = [f"mila{step}" for step in ("-step00000009", "-step00000010", "")]
    names = [f"grid_00_{seed}_{name}_s{s}.mp4" for seed in (1, 2) for name in lora for s in ("0.6", "1")]
    assert sorted(made(undisturbed)) == sorted([*names, "grid_00_1.mp4", "grid_00_2.mp4"])
    assert len(set(made(undisturbed).values())) == 14 and not (undisturbed / FOLDER).exists()
    data = page_data(undisturbed / "grid.html")
    assert [axis["labels"] for axis in data["axes"]] == [lora, ["0.6", "1"], ["1", "2"]], "by their steps, the last save behind them"
    assert (data["rows"], data["columns"]) == (0, 1)
    assert sum(cell["at"][:2] == [None, None] for cell in data["cells"]) == 2 and len(data["cells"]) == 14
    assert all(clip["seconds"] > 0 and clip["recipe"] == read_recipe(undisturbed / clip["file"]).digest for clip in data["clips"])


def test_a_cell_is_the_clip_that_is_made_alone(tiny_family, texts, checkpoints, undisturbed, tmp_path):
    lora = checkpoints / "mila-step00000009.safetensors"
    (alone,) = run(tiny_family, texts, tmp_path / "a", "--prompt", "a dog --d 2", "--lora", f"{lora}:0.6")
    assert alone.read_bytes() == made(undisturbed)["grid_00_2_mila-step00000009_s0.6.mp4"]
    (off,) = run(tiny_family, texts, tmp_path / "b", "--prompt", "a dog", "--seed", "1", "--lora", f"{lora}:0")
    assert off.read_bytes() == made(undisturbed)["grid_00_1.mp4"]


def test_a_grid_that_fails_half_way_goes_on(tiny_family, texts, checkpoints, undisturbed, tmp_path, monkeypatch):
    """Stopped in sampling, and again in decoding; the model samples no clip twice, and the times of clips stay known."""
    real, calls = stages.generate, []

    def failing(*arguments, **named):
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        calls.append(1)
        return real(*arguments, **named)

    monkeypatch.setattr(stages, "generate", failing)
    with pytest.raises(RuntimeError):
        run(tiny_family, texts, tmp_path, *grid_flags(checkpoints))
    assert [clip["file"] for clip in page_data(tmp_path / "grid.html")["clips"]] == [None] * 14, "looked at meanwhile"
    monkeypatch.setattr(stages, "generate", lambda *arguments, **named: calls.append(1) or real(*arguments, **named))
    written = clips.write_sample

    def stopped(stem, *arguments):
        if stem.name.startswith("grid_00_2_mila-step00000010_s1"):
            raise KeyboardInterrupt
        return written(stem, *arguments)

    monkeypatch.setattr(clips, "write_sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_family, texts, tmp_path, *grid_flags(checkpoints))
    half = [clip["file"] for clip in page_data(tmp_path / "grid.html")["clips"]]
    assert None in half and any(half)
    monkeypatch.setattr(clips, "write_sample", written)
    run(tiny_family, texts, tmp_path, *grid_flags(checkpoints))
    assert len(calls) == 14
    assert made(tmp_path) == made(undisturbed) and not (tmp_path / FOLDER).exists()
    assert all(clip["seconds"] > 0 for clip in page_data(tmp_path / "grid.html")["clips"])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_grid_that_is_killed_goes_on(tiny_family, texts, checkpoints, undisturbed, tmp_path):
    base = ["--ltxv2_model", str(tiny_family.ltx23), "--text_cache", str(texts), "--output_dir", str(tmp_path), "--device", "cpu", *SIZE]
    words = [sys.executable, "-m", "musubi_tuner.ltxv2_generate_video", *base, *grid_flags(checkpoints)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list((tmp_path / FOLDER).glob("*_0.safetensors"))) < 5 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / FOLDER / f".0123456789ab.{process.pid}_ltxv2.safetensors.tmp").write_bytes(b"half")
    (tmp_path / f".grid_00_1.mp4.{process.pid}.tmp").write_bytes(b"half")
    run(tiny_family, texts, tmp_path, *grid_flags(checkpoints))
    assert made(tmp_path) == made(undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in undisturbed.iterdir()), "nothing is left behind"


def test_the_model_is_loaded_once_and_a_grid_that_grows_keeps_its_cells(tiny_family, texts, checkpoints, tmp_path, monkeypatch):
    loads, used = [], []
    real, use = stages.load_for_sampling, stages.NetworkStack.use
    monkeypatch.setattr(stages, "load_for_sampling", lambda *a, **k: loads.append(1) or real(*a, **k))
    monkeypatch.setattr(
        stages.NetworkStack, "use", lambda self, networks: used.append(tuple(p.name for p, _ in networks)) or use(self, networks)
    )
    flags = ("--prompt", "a dog", "--grid", "seed=1,2", "--grid", f"lora=none,{checkpoints}/mila.safetensors", "--grid", "steps=1,2")
    run(tiny_family, texts, tmp_path, *flags)
    assert len(loads) == 1 and len(used) == 8
    assert used == sorted(used), "cells that share a network follow each other"
    before = made(tmp_path)
    run(tiny_family, texts, tmp_path, *flags[:3], "seed=1,2,3", *flags[4:])
    assert len(loads) == 2 and len(used) == 12 and before.items() < made(tmp_path).items()


def test_axes_of_guidance_strengths_by_stream_and_prompts(tiny_family, texts, checkpoints, tmp_path):
    """0 is a value of guidance; --lora is what strengths are of where no axis names networks; a grid from a TOML."""
    (tmp_path / "grid.toml").write_text("audio_strength = [0, 1]\nvideo_cfg_scale = [0, 3]\nprompt = 'all'\n", encoding="utf-8")
    lora = str(checkpoints / "mila.safetensors")
    flags = ("--prompt", "a dog --l 5", "rain", "--lora", lora, "--grid_file", str(tmp_path / "grid.toml"), "--grid", "prompt=1,0")
    paths = run(tiny_family, texts, tmp_path / "out", *flags)
    names = {path.name for path in paths if path.suffix == ".mp4"}
    assert names == {f"clip_0{p}_10_a{a}_cfg{c}.mp4" for p in (0, 1) for a in (0, 1) for c in (0, 3)}
    (alone,) = run(tiny_family, texts, tmp_path / "alone", "--prompt", "a dog --l 0 --al 5", "--lora", f"{lora}:1:1:0")
    assert alone.read_bytes() == (tmp_path / "out" / "clip_00_10_a0_cfg0.mp4").read_bytes()
    assert [axis["labels"] for axis in page_data(tmp_path / "out" / "clip.html")["axes"]][2] == ["1: rain", "0: a dog"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.setdefault(self.tags[-1][0] if self.tags else "", []).append(data)


def test_the_page_holds_what_users_wrote_as_text(tiny_family, texts, tmp_path, monkeypatch):
    """Prompts and names that would be markup, a script, or the end of one."""
    evil = "</script><script>alert(1)</script><!--<b>&amp;'\"\u2028 ${x} {{data}}"
    monkeypatch.setattr(clips, "load_contexts", lambda wanted, *a, real=clips.load_contexts, **k: _as(real(["a dog"], *a, **k), wanted))
    run(tiny_family, texts, tmp_path / "a#b %41", "--prompt", evil, "--output_name", "g&'% #ä", "--grid", "seed=1,2")
    path = tmp_path / "a#b %41" / "g&'% #ä.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert page_data(path)["clips"][0]["prompt"] == evil
    assert "".join(page.texts["title"]).strip() == "g&'% #ä"
    for clip in page_data(path)["clips"]:
        assert clip["href"].isascii() and not set("#'\"& <>") & set(clip["href"]) and (path.parent / unquote(clip["href"])).is_file()
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses == ["data:,"], "it loads nothing"
    assert not re.search(r"https?://|innerHTML|eval\(", path.read_text(encoding="utf-8"))


def _as(contexts, wanted):
    return dict.fromkeys(wanted, contexts["a dog"])


def test_the_picture_shows_a_frame_of_each_cell(undisturbed):
    """2 x 3 rows (seed, checkpoint) of base, 0.6 and 1: nine different pictures a seed but for the base."""
    picture = Image.open(undisturbed / "grid.png")
    assert picture.width > 3 * 128 and picture.height > 6 * 64
    colors = picture.convert("RGB").getcolors(2**24)
    assert len(colors) > 50


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--grid", "loras=a"), "unknown axis. Did you mean 'lora'"),
        (("--grid", "seed"), "must be AXIS=VALUE"),
        (("--grid", "seed=1", "--grid", "seed=2"), "given twice"),
        (("--grid", "seed=1,1"), "1 is there twice"),
        (("--grid", "seed=1,,2"), "an empty value"),
        (("--grid", "seed=1.5"), "must be a whole number"),
        (("--grid", "strength=nan"), "must be a number"),
        (("--grid", "strength=0,1"), "there is none: give --grid lora=FILES, or --lora"),
        (("--grid", "lora=nowhere/*.safetensors"), "no such LoRA"),
        (("--grid", "prompt=1"), "no such prompt; there are 0 alone"),
        (("--grid", "rescale_scale=2"), "--grid rescale_scale=2.0: must be a share"),
        (("--grid", "stg_scale=1,2", "--pipeline", "distilled_one_stage"), "fixed steps"),
        (("--grid", "audio_cfg_scale=1,2", "--ltx_mode", "video"), "makes nothing that it changes"),
        (("--grid", "discrete_flow_shift=1,2"), "flowmatch_discrete"),
        (("--grid", *(f"{name}={','.join(map(str, range(120)))}" for name in ("seed", "stg_scale"))), "14400 cells"),
    ],
)
def test_grids_that_make_no_sense_are_refused(tiny_family, texts, tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr(stages, "load_for_sampling", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=re.escape(says)):
        run(tiny_family, texts, tmp_path, "--prompt", "a dog", *flags)


def test_a_lora_that_does_not_fit_is_found_before_the_first_cell(tiny_family, texts, checkpoints, tmp_path, monkeypatch):
    save_file(
        {"diffusion_model.nowhere.lora_A.weight": load_file(checkpoints / "mila.safetensors").popitem()[1]}, tmp_path / "z.safetensors"
    )
    monkeypatch.setattr(stages, "generate", lambda *a, **k: pytest.fail("a clip was sampled"))
    with pytest.raises(UserError, match="z.safetensors"):
        run(
            tiny_family,
            texts,
            tmp_path / "out",
            "--prompt",
            "a dog",
            "--grid",
            f"lora={checkpoints}/mila.safetensors,{tmp_path}/z.safetensors",
        )


def test_the_page_is_written_whole(undisturbed, monkeypatch):
    """Each time: what is read meanwhile is a whole page."""
    assert as_json({"a": "</script>"}) == '{"a":"\\u003c/script\\u003e"}'
    assert not list(undisturbed.glob(".*"))
