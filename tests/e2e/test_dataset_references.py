"""References made by the program: as many frames at the same times as the clips, where caching finds them."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from musubi_tuner import ltxv2_cache_latents, ltxv2_dataset
from musubi_tuner.media.picture import read_picture
from musubi_tuner.media.probe import probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clip, write_clips, write_stills
from tests.film_parts import bars

TOML = """
[general]
resolution = [64, 64]
target_frames = [9]

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
reference_directory = "made of clips"

[[datasets]]
image_directory = "stills"
cache_directory = "cache"
reference_directory = "made of stills"

[[validation_datasets]]
video_directory = "held out"
cache_directory = "held out cache"
reference_directory = "made of held out"
"""
UNEVEN = [i / 24 + (i % 3) * 0.01 for i in range(20)]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "dataset.toml").write_text(TOML, encoding="utf-8")
    write_clips(tmp_path / "clips", count=1, frames=20)
    write_clip(tmp_path / "clips" / "ungerade é.mkv", bars(20, 1), times=UNEVEN)
    write_clip(tmp_path / "clips" / "turned.mp4", bars(20, 2), rotation=90)
    write_stills(tmp_path / "stills", count=1)
    write_clips(tmp_path / "held out", count=1, frames=17, seed=4)
    return tmp_path


def references(folder: Path, *words: object, code: int = 0) -> None:
    assert ltxv2_dataset.main(["references", str(folder / "dataset.toml"), *map(str, words)]) == code


def pictures(path: Path) -> torch.Tensor:
    info = probe_video(path)
    return read_frames(info, range(len(info.stamps)), info.width, info.height).float()


@pytest.mark.parametrize("kind", ["edges", "blur", "gray", "downscale"])
def test_each_clip_gets_one_of_the_same_frames_and_times(folder, kind, tiny_family, capsys):
    references(folder, "--kind", kind)
    made = folder / "made of clips"
    assert sorted(path.name for path in made.iterdir()) == ["clip_000.mp4", "ltxv2_references.json", "turned.mp4", "ungerade é.mp4"]
    for name in ("clip_000.mp4", "turned.mp4", "ungerade é.mkv"):
        source, own = probe_video(folder / "clips" / name), probe_video((made / name).with_suffix(".mp4"))
        assert len(own.stamps) == len(source.stamps) and (own.width, own.height) == (source.width, source.height)
        assert own.times == pytest.approx(source.times, abs=1e-3) and own.is_variable == source.is_variable
    assert (folder / "made of stills" / "still_000.png").is_file() and (folder / "made of held out" / "clip_000.mp4").is_file()
    common = ["--dataset_config", str(folder / "dataset.toml"), "--ltx_mode", "video", "--device", "cpu"]
    assert ltxv2_cache_latents.main([*common, "--vae", str(tiny_family.ltx23)]) == 0
    assert len(list((folder / "cache").glob("*_ltxv2_ref.safetensors"))) == 4, "caching finds them"
    capsys.readouterr()
    references(folder, "--kind", kind)
    assert capsys.readouterr().out.count("there already") == 5


def test_a_folder_holds_references_of_one_kind(folder, capsys, caplog):
    references(folder, "--kind", "gray", "--most", "1")
    made = sorted((folder / "made of clips").glob("*.mp4"))
    for words, asked in ((("--kind", "blur"), "--kind blur --radius 8"), (("--function", "a/depth.py:depth"), "--function depth.py:depth")):
        (folder / "a").mkdir(exist_ok=True)
        (folder / "a" / "depth.py").write_text("def depth(frames): return frames", encoding="utf-8")
        words = tuple(str(folder / word) if ".py" in word else word for word in words)
        with pytest.raises(UserError, match=f"clips: its references were made by --kind gray .*, and {asked} is asked for.*another"):
            references(folder, *words)
    assert sorted((folder / "made of clips").glob("*.mp4")) == made
    references(folder, "--kind", "gray")
    assert len(list((folder / "made of clips").glob("*.mp4"))) == 3, "the same kind goes on"
    for path in (folder / "made of clips").glob("*.mp4"):
        path.unlink()
    (folder / "made of stills" / "ltxv2_references.json").unlink()
    caplog.clear()
    with pytest.raises(UserError, match="made of held out: its references were made by --kind gray"):
        references(folder, "--kind", "edges")
    assert not list((folder / "made of clips").glob("*.mp4")), "refused before the first one is made"
    (folder / "made of held out" / "clip_000.mp4").unlink()
    references(folder, "--kind", "edges", "--edges", "10", "20")
    with pytest.raises(UserError, match="made by --kind edges --edges 10 20 .*, and --kind edges --edges 100 200 is asked"):
        references(folder, "--kind", "edges")


def test_what_is_made_shows_what_it_says(folder):
    before = pictures(folder / "clips" / "turned.mp4")
    shown = {}
    for kind in ("edges", "blur", "gray", "downscale"):
        for name in ("clips", "stills", "held out"):
            for path in (folder / f"made of {name}").glob("*"):
                path.unlink()
        references(folder, "--kind", kind, *(["--factor", "8"] if kind == "downscale" else ["--radius", "40"]))
        shown[kind] = pictures(folder / "made of clips" / "turned.mp4")
    edges = shown["edges"]
    border = edges[:, 15:18].mean()  # of two bars, which lie across in a turned picture
    assert border > 60 and edges[:, 5:11, :40].mean() < 20
    assert float((shown["gray"] - shown["gray"].mean(-1, keepdim=True)).abs().mean()) < 3
    steepest = {kind: float((frames[:, 1:] - frames[:, :-1]).abs().amax()) for kind, frames in shown.items()}
    steep = float((before[:, 1:] - before[:, :-1]).abs().amax())
    assert steepest["blur"] < 0.4 * steep and steepest["downscale"] < 0.6 * steep, "what was sharp is soft"
    blocks = [frames.unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(-1, -2)) for frames in (shown["downscale"], before)]
    assert float((blocks[0] - blocks[1]).abs().mean()) < 6, "and what is left lies where it was"


def test_a_function_of_the_users_own_gets_all_frames_of_a_clip(folder):
    own = folder / "my depth.py"
    own.write_text(
        "import numpy as np\n"
        "def depth(frames):\n"
        "    assert frames.ndim == 4 and frames.shape[-1] == 3\n"
        "    return (255 - frames.float().mean(-1)).to(frames.dtype).numpy()\n"
        "def fewer(frames):\n"
        "    return frames[1:]\n"
        "def broken(frames):\n"
        "    raise RuntimeError('no weights')\n"
        "number = 5\n",
        encoding="utf-8",
    )
    references(folder, "--function", f"{own}:depth")
    made, clip = pictures(folder / "made of clips" / "clip_000.mp4"), pictures(folder / "clips" / "clip_000.mp4")
    assert float((made - (255 - clip.mean(-1, keepdim=True))).abs().mean()) < 3
    still, source = (read_picture(folder / name / "still_000.png").float() for name in ("made of stills", "stills"))
    assert float((still - (255 - source.mean(-1, keepdim=True))).abs().mean()) < 1
    for made_of in ("clips", "stills", "held out"):
        shutil.rmtree(folder / f"made of {made_of}")
    for name, says in (
        ("fewer", r"must give back uint8 of \(20, 64, 96, 3\) or \(20, 64, 96\), as it was given, not \(19, 64, 96, 3\)"),
        ("broken", "RuntimeError: no weights"),
        ("number", "has no function number"),
        ("none", "has no function none"),
    ):
        with pytest.raises(UserError, match=says):
            references(folder, "--function", f"{own}:{name}")
        assert not list((folder / "made of clips").glob("*.mp4")), "nothing is left"
    with pytest.raises(UserError, match="no such file"):
        references(folder, "--function", f"{folder / 'gone.py'}:depth")
    own.write_text("import nothing_of_that_name")
    with pytest.raises(UserError, match="does not load: ModuleNotFoundError"):
        references(folder, "--function", f"{own}:depth")


def test_what_cannot_be_made_is_said(folder, caplog, monkeypatch):
    (folder / "clips" / "bad.mp4").write_bytes(b"nothing")
    references(folder, "--kind", "gray", code=1)
    assert "bad.mp4" in caplog.text and (folder / "made of clips" / "turned.mp4").is_file(), "the others are made"
    for words, says in (
        ([], "exactly one of them"),
        (["--kind", "gray", "--function", "a.py:b"], "exactly one of them"),
        (["--function", "a"], "must be FILE.py:NAME"),
        (["--kind", "edges", "--edges", "5", "2"], "the lower one first"),
    ):
        with pytest.raises(UserError, match=says):
            references(folder, *words)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"OpenCV, which is not installed.*\[scenes\]"):
        references(folder, "--kind", "edges")
    toml = folder / "dataset.toml"
    toml.write_text(TOML.replace('reference_directory = "made of clips"', 'reference_directory = "clips"'), encoding="utf-8")
    with pytest.raises(UserError, match="is the folder of the clips"):
        references(folder, "--kind", "gray")
    toml.write_text("\n".join(line for line in TOML.splitlines() if "reference" not in line), encoding="utf-8")
    with pytest.raises(UserError, match="no dataset has a reference_directory"):
        references(folder, "--kind", "gray")
