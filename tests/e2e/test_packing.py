"""Caches moved in a pack: trained from elsewhere with the same losses; damaged, cut off and malicious packs leave nothing."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from musubi_tuner import ltxv2_dataset, ltxv2_train_network
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.curation.packing import lock as locks
from musubi_tuner.curation.packing import pack as packing
from musubi_tuner.media.write import write_image
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.tiny.clips import write_audio_files, write_clips, write_stills
from tests import training_parts as parts
from tests.e2e.test_conditioning import RECIPES

LOCK = "ltxv2_pack.json"


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    """Clips with sound in a folder, stills named by a jsonl (one by its whole path), held-out clips, a cached prompt."""
    folder = tmp_path_factory.mktemp("on this machine ü")
    made = parts.make_data(folder, tiny_family, "av", count=2)
    stills = write_stills(folder / "stills", count=2)
    write_audio_files(folder / "elsewhere", count=1)
    lines = [{"image_path": "stills/still_000.png", "caption": 'a "red" disc'}, {"image_path": str(stills[1]), "caption": "a green disc"}]
    (folder / "lists").mkdir()
    lines[0]["image_path"] = "../stills/still_000.png"
    (folder / "lists" / "stills.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = made.toml.read_text(encoding="utf-8")
    more = (
        '[[datasets]]\nimage_jsonl_file = "lists/stills.jsonl"\ncache_directory = "cache of stills"\nnum_repeats = 2\n'
        'flip_x = "force"\ncaption_dropout_rate = 0.25\nresolution = [64, 64]\n\n'
    )
    made.toml.write_text(text.replace("[[validation_datasets]]", more + "[[validation_datasets]]"), encoding="utf-8")
    prompts = folder / "prompts.txt"
    prompts.write_text("a disc\n", encoding="utf-8")
    parts.cache(made, text=("--text_encoder", str(made.encoder), "--sample_prompts", str(prompts)))
    return made


@pytest.fixture(scope="module")
def archive(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("packs") / "my pack.tar"
    dataset("pack", data.toml, "--output", path)
    return path


def dataset(*words, code=0):
    assert ltxv2_dataset.main([*map(str, words)]) == code


def train(data, toml, output, *more):
    words = data.arguments("--max_train_steps", "3", "--output_dir", str(output), "--seed", "7", "--validate_every_n_steps", "3", *more)
    assert ltxv2_train_network.main([str(toml) if word == str(data.toml) else word for word in words]) == 0
    return [{key: value for key, value in row.items() if "second" not in key and "time" not in key} for row in parts.losses(output)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def left_beside(path: Path) -> list[str]:
    return [one.name for one in path.parent.iterdir() if one.name.startswith(".") or one == path]


@pytest.mark.parametrize("form", ["archive", "folder"])
def test_a_pack_trains_elsewhere_with_the_same_losses(data, archive, tmp_path, form, capsys):
    pack = archive
    if form == "folder":
        pack = tmp_path / "a pack"
        dataset("pack", data.toml, "--output", pack)
    before = train(data, data.toml, tmp_path / "here")
    away = data.folder.with_name("switched off")
    data.folder.rename(away)
    try:
        dataset("unpack", pack, "--output", tmp_path / "there ü" / "data")
        after = train(data, tmp_path / "there ü" / "data" / "dataset.toml", tmp_path / "trained there")
    finally:
        away.rename(data.folder)
    assert len(before) >= 3 and before == after
    names = ("ltxv2_lora.safetensors",)
    for name in names:
        here, there = (parts.read_tensors(tmp_path / folder / name) for folder in ("here", "trained there"))
        assert here.keys() == there.keys() and all(here[key].equal(there[key]) for key in here)
    out = capsys.readouterr().out
    assert "datasets[1]" in out and "--ltx_mode av" in out
    assert not left_beside(tmp_path / "there ü" / "data") == [], "the folder itself"
    assert left_beside(tmp_path / "there ü" / "data") == ["data"]


def test_every_kind_of_sidecar_and_shared_folders_move(tiny_family, tmp_path):
    """References, masks, keyframes, mirror images; two datasets of the same media and cache, and a setting of each kind."""
    here = tmp_path / "here"
    write_clips(here / "clips", count=1, frames=25, width=128, height=64)
    write_clips(here / "references", count=1, frames=25, width=128, height=64, seed=7)
    (here / "references" / "clip_000.txt").unlink()
    (here / "masks").mkdir()
    write_image(here / "masks" / "clip_000.png", torch.full((64, 128, 3), 255, dtype=torch.uint8))
    (here / "dataset.toml").write_text(
        '[general]\nresolution = [128, 64]\nreference_downscale = 2\nflip_x = "force"\ncaption_dropout_rate = 0.1\n'
        '[[datasets]]\nvideo_directory = "clips"\nreference_directory = "references"\nmask_directory = "masks"\ntarget_frames = [17]\n'
        'keyframes = ["first", 3, "every 8"]\nvideo_loss_weight = 0.5\n'
        '[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [9]\nframe_extraction = "uniform"\nframe_sample = 2\ntarget_fps = 12.5\n',
        encoding="utf-8",
    )
    data = parts.Data(here, here / "dataset.toml", tiny_family.ltx23, "video", tiny_family.gemma)
    parts.cache(data)
    dataset("pack", data.toml, "--output", tmp_path / "pack.tar", "--ltx_mode", "video")
    dataset("unpack", tmp_path / "pack.tar", "--output", tmp_path / "there")
    endings = {"_ref", "_mask", "_keyframes", "_mirrored_ltxv2", "_te"}
    assert all(any(f"{ending}.safetensors" in name for name in files_of(tmp_path / "there")) for ending in endings)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"dataset.toml", "datasets_0"}, "what was one folder still is"
    recipe = ("--conditioning_config", str(RECIPES / "reference_video.toml"))
    before = train(data, data.toml, tmp_path / "a", *recipe)
    here.rename(tmp_path / "gone")
    assert train(data, tmp_path / "there" / "dataset.toml", tmp_path / "b", *recipe) == before


def test_a_pack_holds_no_media_and_no_path_of_this_machine(data, archive):
    with tarfile.open(archive) as opened:
        members = {member.name: opened.extractfile(member).read() for member in opened.getmembers()}
    assert list(members)[:2] == [LOCK, "dataset.toml"]
    assert not [name for name in members if name.endswith((".mp4", ".png", ".wav"))]
    readable = {name: body for name, body in members.items() if not name.endswith((".safetensors", ".jpg"))}
    for name, body in readable.items():
        body = b"".join(line for line in body.splitlines() if b'"key":' not in line)  # a clip's draws go by its name, which stays
        assert str(data.folder).encode() not in body and data.folder.name.encode() not in body, name
    lock = json.loads(members[LOCK])
    assert {file["path"]: (file["size"], file["sha256"]) for file in lock["files"]} == {
        name: (len(body), hashlib.sha256(body).hexdigest()) for name, body in members.items() if name != LOCK
    }
    assert {(one["kind"], one["files"]) for one in lock["encoders"]} == {("latents", 7), ("audio", 3), ("text", 5)}
    assert all(len(one["encoder_fingerprint"]) >= 16 for one in lock["encoders"])
    assert lock["datasets"] == [
        {"label": "datasets[0]", "clips": 2}, {"label": "datasets[1]", "clips": 4}, {"label": "validation_datasets[0]", "clips": 1},
    ]  # fmt: skip
    assert sum("ltxv2_prompts/" in name for name in members) == 2, "the prompt and the empty one"
    assert members["datasets_0/media/clip_000.txt"].startswith(b"A red disc")


def test_the_same_caches_make_the_same_bytes(data, archive, tmp_path):
    dataset("pack", data.toml, "--output", tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()


def test_video_mode_leaves_sound_behind_and_says_so(data, tmp_path):
    dataset("pack", data.toml, "--output", tmp_path / "pack", "--ltx_mode", "video")
    assert not [name for name in files_of(tmp_path / "pack") if name.endswith("_audio.safetensors")]
    assert json.loads((tmp_path / "pack" / LOCK).read_text(encoding="utf-8"))["ltx_mode"] == "video"
    assert load_dataset_config(tmp_path / "pack" / "dataset.toml").datasets[1].caption_dropout_rate == 0.25


def test_caches_that_training_would_refuse_are_not_packed(data, tmp_path):
    (hole,) = (data.folder / "cache").glob("clip_000*_ltxv2.safetensors")
    away = hole.rename(hole.with_suffix(".away"))
    try:
        with pytest.raises(UserError, match="cannot be trained on:(.|\n)*missing(.|\n)*ltxv2_cache_latents.py"):
            dataset("pack", data.toml, "--output", tmp_path / "pack.tar")
    finally:
        away.rename(hole)
    caption = data.folder / "clips" / "clip_000.txt"
    text = caption.read_text(encoding="utf-8")
    caption.write_text("edited", encoding="utf-8")
    try:
        with pytest.raises(UserError, match="caption has changed"):
            dataset("pack", data.toml, "--output", tmp_path / "pack.tar")
    finally:
        caption.write_text(text, encoding="utf-8")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(data, archive, tmp_path):
    for name in ("there.tar", "there"):
        (tmp_path / name).mkdir() if name == "there" else (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match="is there, and nothing is written over"):
            dataset("pack", data.toml, "--output", tmp_path / name)
    (tmp_path / "there" / "mine").write_text("mine")
    with pytest.raises(UserError, match="is there, and nothing is written over"):
        dataset("unpack", archive, "--output", tmp_path / "there")
    with pytest.raises(UserError, match="is a file, not a folder"):
        dataset("unpack", archive, "--output", tmp_path / "there.tar")
    (tmp_path / "empty").mkdir()
    dataset("unpack", archive, "--output", tmp_path / "empty")
    assert (tmp_path / "there.tar").read_text() == "mine" and files_of(tmp_path / "there") == {"mine": b"mine"}


def test_checks_without_writing(archive, tmp_path, capsys):
    shutil.copy(archive, tmp_path / "pack.tar")
    dataset("unpack", tmp_path / "pack.tar", "--check")
    shown = capsys.readouterr()
    assert "every file is as it was packed" in shown.out and "(100 %)" in shown.err and len(list(tmp_path.iterdir())) == 1
    for words, says in (((), "give --output, the new folder, or --check"), (("--check", "--output", "x"), "writes nothing")):
        with pytest.raises(UserError, match=says):
            dataset("unpack", tmp_path / "pack.tar", *words)


def places(archive: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(archive) as opened:
        return [(member.name, member.offset_data, member.size) for member in opened.getmembers()]


def test_a_flipped_bit_anywhere_is_told_of_and_leaves_nothing(archive, tmp_path):
    whole = archive.read_bytes()
    found = places(archive)
    spots = {f"{name}+{at}": start + at for name, start, size in found[:4] + found[-2:] for at in (0, size // 2, size - 1)}
    spots |= {f"header of {name}": start - 512 + 5 for name, start, _ in found[:3]}
    broken, output = tmp_path / "broken.tar", tmp_path / "out" / "data"
    output.parent.mkdir()
    for what, spot in spots.items():
        broken.write_bytes(whole[:spot] + bytes([whole[spot] ^ 4]) + whole[spot + 1 :])
        for words in (("--output", output), ("--check",)):
            with pytest.raises(UserError, match="broken.tar"):
                dataset("unpack", broken, *words)
            assert list(output.parent.iterdir()) == [], what


def test_a_pack_that_is_cut_off_anywhere_is_told_of(archive, tmp_path):
    whole, found = archive.read_bytes(), places(archive)
    lasts = [
        0,
        1,
        511,
        512,
        700,
        found[0][1] + found[0][2] // 2,
        found[1][1],
        found[3][1] + 10,
        found[-1][1] - 512,
        found[-1][1],
        len(whole) // 2,
    ]
    broken, output = tmp_path / "broken.tar", tmp_path / "out" / "data"
    output.parent.mkdir()
    for last in lasts:
        broken.write_bytes(whole[:last])
        with pytest.raises(UserError, match="broken.tar"):
            dataset("unpack", broken, "--output", output)
        assert list(output.parent.iterdir()) == [], last


def write_archive(path: Path, files: dict[str, bytes], change=lambda value: None, extra=()) -> Path:
    """A pack whose lock says what its files are, but for `change`."""
    rows = tuple(locks.PackedFile(name, len(body), hashlib.sha256(body).hexdigest()) for name, body in files.items())
    data = locks.lock_bytes(locks.Lock(mode="av", datasets=(), encoders=(), files=rows))
    value = json.loads(data)
    change(value)
    if value != json.loads(data) and "digest" in value:
        del value["digest"]
        value["digest"] = locks._digest(value)
    with tarfile.open(path, "w") as opened:
        for name, body in ((LOCK, json.dumps(value).encode()), *files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            opened.addfile(member, io.BytesIO(body))
        for member in extra:
            opened.addfile(member, io.BytesIO(b"x" * member.size))
    return path


ESCAPES = [
    "../x", "a/../../x", "/tmp/x", "C:/Windows/x", "C:\\Windows\\x", "C:x", "\\\\server\\share\\x", "//server/share/x", "a\\..\\..\\x",
    "./x", "a//b", "", "a/", "..", "~/x", "a\0b", "a\nb", LOCK, "a" * 300, "b/" * 600 + "c", "ltxv2_unpacking.part",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: repr(name[:40]))
def test_paths_that_lead_elsewhere_are_refused_before_anything_is_written(tmp_path, name):
    def change(value):
        value["files"].append({"path": name, "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()})

    member = tarfile.TarInfo(name)
    member.size = 1
    (tmp_path / "in" / "out").mkdir(parents=True)
    pack = write_archive(tmp_path / "pack.tar", {"dataset.toml": b""}, change, extra=[member])
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="Nothing was unpacked"):
        dataset("unpack", pack, "--output", tmp_path / "in" / "out" / "data")
    assert files_of(tmp_path) == before and not list((tmp_path / "in" / "out").iterdir())


@pytest.mark.parametrize("pair", [("a/B", "a/b"), ("é", "e\u0301"), ("a", "a/b"), ("A/x", "a")])
def test_two_names_of_one_file_are_refused(tmp_path, pair):
    pack = write_archive(tmp_path / "pack.tar", {"dataset.toml": b"", pair[0]: b"1", pair[1]: b"2"})
    with pytest.raises(UserError, match="is one file|are one file|which is a file"):
        dataset("unpack", pack, "--output", tmp_path / "data")


def member(name, kind, target=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    "extra",
    [
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("link", tarfile.LNKTYPE, "dataset.toml"),
        member("dataset.toml", tarfile.SYMTYPE, "../x"),
        member("folder", tarfile.DIRTYPE),
        member("device", tarfile.CHRTYPE),
        member("pipe", tarfile.FIFOTYPE),
        tarfile.TarInfo("unlisted"),
        tarfile.TarInfo("dataset.toml"),
        tarfile.TarInfo("../x"),
    ],
    ids=lambda one: f"{one.name} {one.type}",
)
def test_members_that_are_not_listed_are_refused(tmp_path, extra):
    (tmp_path / "out").mkdir()
    pack = write_archive(tmp_path / "pack.tar", {"dataset.toml": b"x = 1"}, extra=[extra])
    with pytest.raises(UserError, match="pack.tar.*(no pack holds|does not list)"):
        dataset("unpack", pack, "--output", tmp_path / "out" / "data")
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda value: value.update(ltxv2_pack=2), "version 2 of packs"),
        (lambda value: value.update(cache_format="9"), "Cache the dataset again"),
        (lambda value: value.update(files={}), "'files' must be a list"),
        (lambda value: value["files"].clear(), "lists no dataset.toml"),
        (lambda value: value["files"][0].update(size=-1), "must hold path, size and sha256"),
        (lambda value: value["files"][0].update(sha256="ab"), "must hold path, size and sha256"),
        (lambda value: value["files"][0].update(size=99), "by its lock file 99"),
        (lambda value: value.pop("digest"), "its own checksum"),
        (lambda value: value.pop("ltxv2_pack"), "is no lock file"),
    ],
)
def test_locks_that_are_wrong(tmp_path, change, says):
    pack = write_archive(tmp_path / "pack.tar", {"dataset.toml": b"x = 1"}, change)
    with pytest.raises(UserError, match=says):
        dataset("unpack", pack, "--output", tmp_path / "data")
    assert left_beside(tmp_path / "data") == []


def test_what_is_no_pack(tmp_path):
    (tmp_path / "text.tar").write_text("hello " * 500)
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "other.tar", "w") as opened:
        opened.addfile(tarfile.TarInfo("a"))
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as opened:
        opened.addfile(tarfile.TarInfo("a"))
    wrong = {"text.tar": "is no archive", "folder": f"holds no {LOCK}", "none.tar": "no such file", "other.tar": "does not begin with"}
    for name, says in (wrong | {"packed.tar.gz": "is no archive"}).items():
        with pytest.raises(UserError, match=says):
            dataset("unpack", tmp_path / name, "--output", tmp_path / "data")


def test_a_folder_pack_is_checked_too(data, tmp_path):
    pack = tmp_path / "pack"
    dataset("pack", data.toml, "--output", pack)
    (pack / "ltxv2_notes.txt").write_text("of a person", encoding="utf-8")
    dataset("unpack", pack, "--check")
    toml = (pack / "dataset.toml").read_bytes()
    (pack / "dataset.toml").write_bytes(toml[:-1] + b" ")
    with pytest.raises(UserError, match="'dataset.toml' differs from its checksum"):
        dataset("unpack", pack, "--output", tmp_path / "data")
    (pack / "dataset.toml").unlink()
    with pytest.raises(UserError, match="'dataset.toml' is missing"):
        dataset("unpack", pack, "--check")
    if os.name != "nt":
        (tmp_path / "elsewhere.toml").write_bytes(toml)
        (pack / "dataset.toml").symlink_to(tmp_path / "elsewhere.toml")
        with pytest.raises(UserError, match="'dataset.toml' is missing, or a link"):
            dataset("unpack", pack, "--check")
    assert left_beside(tmp_path / "data") == []


def test_a_killed_unpack_leaves_nothing_false_and_is_gone_on_with(archive, tmp_path, monkeypatch):
    """Killed by the system after some files; what is left is neither taken for data, nor in the way, nor trusted unread."""
    script = (
        "import os, signal, sys\n"
        "from musubi_tuner import ltxv2_dataset\n"
        "from musubi_tuner.curation.packing import unpack\n"
        "write, count = unpack.write_file, [0]\n"
        "def dying(path, content):\n"
        "    count[0] += 1\n"
        "    if count[0] == 6:\n"
        "        path.write_bytes(content.read(100))\n"
        "        os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, 'SIGKILL') else signal.SIGTERM)\n"
        "    write(path, content)\n"
        "unpack.write_file = dying\n"
        "ltxv2_dataset.main(sys.argv[1:])\n"
    )
    output = tmp_path / "data"
    killed = subprocess.run(
        [sys.executable, "-c", script, "unpack", str(archive), "--output", str(output)], check=False, capture_output=True
    )
    assert killed.returncode != 0 and not output.exists()
    staging = tmp_path / ".data.unpack"
    assert len(files_of(staging)) == 6, "five whole ones and a part"
    (staging / "stranger").write_text("x")
    whole = next(path for path in staging.rglob("*.*") if path.is_file() and path.name != locks.PART_NAME)
    whole.write_bytes(whole.read_bytes()[:-1] + b"?")
    from musubi_tuner.curation.packing import unpack

    written, write = [], unpack.write_file
    monkeypatch.setattr(unpack, "write_file", lambda path, content: written.append(path) or write(path, content))
    dataset("unpack", archive, "--output", output)
    with tarfile.open(archive) as opened:
        members = {one.name: opened.extractfile(one).read() for one in opened.getmembers() if one.name != LOCK}
    assert files_of(output) == members and len(written) == len(members) - 4, "four were whole"
    assert left_beside(output) == ["data"]


def test_a_link_in_the_place_of_an_unpacking_that_was_killed_is_not_followed(archive, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dear.txt").write_text("dear")
    (tmp_path / ".data.unpack").symlink_to(tmp_path / "mine")
    dataset("unpack", archive, "--output", tmp_path / "data")
    assert (tmp_path / "mine" / "dear.txt").read_text() == "dear" and not (tmp_path / "data").is_symlink()
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["dear.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_to_itself_is_no_pack(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for words in (("unpack", tmp_path / "loop", "--output", tmp_path / "data"), ("unpack", tmp_path / "loop", "--check")):
        with pytest.raises(UserError, match=r"loop: cannot be read \(Too many levels of symbolic links\)"):
            dataset(*words)


def test_a_full_disk_and_a_second_run_at_once(data, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(TemporaryFailure, match="needs 0.00 GB, and .* has 0.00 GB left"):
        dataset("unpack", archive, "--output", tmp_path / "data")
    with pytest.raises(TemporaryFailure, match="Make room"):
        dataset("pack", data.toml, "--output", tmp_path / "pack.tar")
    monkeypatch.undo()
    from musubi_tuner.runtime.lock import held

    with held(tmp_path / ".data.unpack.lock", what="x", remedy=""), pytest.raises(UserError, match="is at work on unpacking into"):
        dataset("unpack", archive, "--output", tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changes_while_it_is_packed_is_told_of(data, tmp_path, monkeypatch):
    (text,) = (data.folder / "cache").glob("clip_001_ltxv2_te.safetensors")
    whole = text.read_bytes()
    lock_bytes, now = packing.lock_bytes, []

    def later(lock):
        text.write_bytes(now[-1])
        return lock_bytes(lock)

    monkeypatch.setattr(packing, "lock_bytes", later)
    try:
        for changed in (whole[:-1] + b"?", whole + b"?", whole[:-5]):
            now.append(changed)
            for name in ("pack.tar", "pack"):
                text.write_bytes(whole)
                with pytest.raises(UserError, match="has changed while it was packed"):
                    dataset("pack", data.toml, "--output", tmp_path / name)
    finally:
        text.write_bytes(whole)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_pack_leaves_no_pack(data, tmp_path):
    if os.name == "nt":
        pytest.skip("Windows has no SIGKILL")
    script = (
        "import os, signal, sys\n"
        "from musubi_tuner import ltxv2_dataset\n"
        "from musubi_tuner.curation.packing import pack\n"
        "add = pack._Tar.add\n"
        "def dying(self, path, size, content):\n"
        "    if path.endswith('.safetensors'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    add(self, path, size, content)\n"
        "pack._Tar.add = dying\n"
        "ltxv2_dataset.main(sys.argv[1:])\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, "pack", str(data.toml), "--output", str(tmp_path / "p.tar")], check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "p.tar").exists()
    start = time.monotonic()
    dataset("pack", data.toml, "--output", tmp_path / "p.tar")
    assert time.monotonic() - start < 60 and (tmp_path / "p.tar").is_file()
