"""The dataset TOML: what it may say, and what is said back."""

import shutil
import tomllib
from pathlib import Path

import pytest

from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.runtime.errors import UserError

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "dataset_configs").glob("*.toml"))


def load(folder: Path, text: str):
    (folder / "clips").mkdir(exist_ok=True)
    path = folder / "Datensätze 1.toml"
    path.write_text(text, encoding="utf-8")
    return load_dataset_config(path)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text)
    return str(caught.value)


def test_general_fills_in_what_a_dataset_leaves_out(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        [general]
        resolution = [832, 480]
        target_frames = 25
        batch_size = 3
        [[datasets]]
        video_directory = "clips"
        batch_size = 1
        [[validation_datasets]]
        video_directory = "clips"
        frame_extraction = "chunk"
        """,
    )
    train, held_out = config.datasets[0], config.validation_datasets[0]
    assert (train.resolution, train.target_frames, train.batch_size, train.enable_bucket) == ((832, 480), (25,), 1, True)
    assert (held_out.label, held_out.batch_size, held_out.frame_extraction) == ("validation_datasets[0]", 3, "chunk")
    assert config.all == (train, held_out)


def test_general_settings_hold_for_the_datasets_that_they_fit(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        [general]
        target_frames = [25]
        flip_x = true
        [[datasets]]
        video_directory = "clips"
        [[datasets]]
        video_directory = "clips"
        target_seconds = 2.0
        [[datasets]]
        audio_directory = "clips"
        """,
    )
    assert [(spec.target_frames, spec.target_seconds, spec.flip_x) for spec in config.datasets] == [
        ((25,), None, True),
        ((), 2.0, True),
        ((), None, False),
    ]


def test_relative_paths_start_at_the_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    spec = load(tmp_path, '[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [9]\n').datasets[0]
    assert spec.directory == tmp_path / "clips"
    assert spec.cache_directory == spec.directory


def test_a_link_to_itself_is_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "video_directory = 'loop': no such folder" in refused(tmp_path, '[[datasets]]\nvideo_directory = "loop"\ntarget_frames = [9]\n')


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(tmp_path: Path, example: Path) -> None:
    copy = Path(shutil.copy(example, tmp_path))
    values = tomllib.loads(example.read_text(encoding="utf-8"))
    for entry in [*values["datasets"], *values.get("validation_datasets", [])]:
        for key, value in entry.items():
            if key.endswith("_directory"):
                (tmp_path / value).mkdir(parents=True, exist_ok=True)
    assert load_dataset_config(copy).datasets


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[dataset]]\nvideo_directory = "clips"', ["unknown section 'dataset'", "'datasets'"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frame = [25]', ["datasets[0]", "'target_frame'", "'target_frames'"]),
        ('[general]\nresolutoin = [64, 64]\n[[datasets]]\nvideo_directory = "clips"', ["general", "'resolutoin'", "'resolution'"]),
        ('[general]\nvideo_directory = "clips"', ["general", "video_directory", "[[datasets]]"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [48]', ["48", "8n+1", "41 and 49"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = 9\nkeyframes = ["middle"]', ["keyframes", '"last"', '"every N"']),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = 9\nkeyframes = "every 0"', ["keyframes", "every 0", '"every N"']),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = 9\nkeyframes = [-1]', ["keyframes", "[-1]", "from 0 on"]),
        ('[[datasets]]\nimage_directory = "clips"\nkeyframes = ["first"]', ["keyframes is for videos"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nresolution = [830, 480]', ["width 830", "32", "800 and 832"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nresolution = [832, 500]', ["height 500", "480 and 512"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nbatch_size = "2"', ["batch_size", "'2'", "a whole number"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nbatch_size = true', ["batch_size", "True"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nenable_bucket = 1', ["enable_bucket", "true or false"]),
        ('[[datasets]]\nvideo_directory = "clips"', ["target_frames or target_seconds"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\ntarget_seconds = 1.0', ["exclude"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nframe_extraction = "first"', ["'first'", "head", "chunk"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nnum_repeats = 0', ["num_repeats = 0", "at least 1"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\ntarget_fps = 0', ["target_fps = 0"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\naudio_loss_weight = -1', ["audio_loss_weight = -1", "at least 0"]),
        ('[[datasets]]\nvideo_directory = "clips"\nimage_directory = "clips"\ntarget_frames = [25]', ["exactly one"]),
        ('[[datasets]]\nvideo_directory = "nowhere"\ntarget_frames = [25]', ["video_directory", "nowhere", "no such folder"]),
        ('[[datasets]]\naudio_directory = "clips"\nframe_extraction = "slide"\ntarget_seconds = 1', ["slide", "chunk"]),
        ("[general]\nbatch_size = 1", ["no [[datasets]]"]),
        ('[[datasets]]\nvideo_directory = "C:\\Users\\clips"', ["not valid TOML", "\\"]),
        ('[datasets]\nvideo_directory = "clips"', ["[[datasets]]"]),
        ("[[general]]\nbatch_size = 1", ["must be written [general]"]),
        ("datasets = [3]", ["must be written [[datasets]]"]),
        ('[general]\nbatch_size = 0\n[[datasets]]\nvideo_directory = "clips"', ["general: batch_size = 0", "at least 1"]),
        ("[[datasets]]\nvideo_directory = 3", ["video_directory = 3", "a path in quotes"]),
        ('[[datasets]]\nvideo_directory = ""', ["video_directory = ''", "a path"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\ntarget_fps = nan', ["target_fps = nan", "finite"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nflip_x = "no"', ["flip_x = 'no'", "force"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nresolution = 512', ["resolution = 512", "[width, height]"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nresolution = [32, 320000]', ["height 320000", "at most 16384"]),
        ('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\nkind = "video"', ["unknown key 'kind'"]),
        ('[[datasets]]\naudio_directory = "clips"\nflip_x = true', ["flip_x is for videos and images"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refused(tmp_path, text)
    assert "Datensätze 1.toml" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("frames", [1, 9, 17, 25, 33, 41, 49, 57, 65, 73, 81, 89, 97, 121])
def test_counts_of_8n_plus_1_pass(tmp_path: Path, frames: int) -> None:
    assert load(tmp_path, f'[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [{frames}]').datasets[0].target_frames == (frames,)


@pytest.mark.parametrize("frames", [0, -7, 24, 32, 48, 64, 100])
def test_other_counts_are_refused(tmp_path: Path, frames: int) -> None:
    assert "8n+1" in refused(tmp_path, f'[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [{frames}]')


def test_settings_hold_what_shapes_planning_and_nothing_else(tmp_path: Path) -> None:
    text = '[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [25]\n'
    plain = load(tmp_path, text).datasets[0].settings()
    assert load(tmp_path, text + "batch_size = 4\nnum_repeats = 9\nvideo_loss_weight = 0.5\n").datasets[0].settings() == plain
    assert load(tmp_path, text + "resolution = [64, 64]\n").datasets[0].settings() != plain


def test_a_moved_dataset_has_the_same_settings(tmp_path: Path) -> None:
    text = '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\ntarget_frames = [25]\n'
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert load(tmp_path / "one", text).datasets[0].settings() == load(tmp_path / "two", text).datasets[0].settings()
