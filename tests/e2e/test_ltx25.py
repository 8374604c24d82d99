"""LTX-2.5 the whole way on its tiny split pack: caches, a LoRA with previews, clips with sound. Text by the packed Gemma 4."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import av
import pytest
import torch
from PIL import Image

from musubi_tuner import (
    ltxv2_cache_audio_latents,
    ltxv2_cache_latents,
    ltxv2_cache_text_encoder_outputs,
    ltxv2_generate_video,
    ltxv2_train_network,
)
from musubi_tuner.cache import store
from musubi_tuner.cache.names import text_name
from musubi_tuner.generation.pipelines import Pipeline
from musubi_tuner.generation.recipe import read_recipe
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clips
from musubi_tuner.training.preflight import wanted_caches
from tests.training_parts import losses, read_tensors

TOML = "[general]\nresolution = [64, 64]\ntarget_frames = [9]\n[[datasets]]\nvideo_directory = 'clips'\ncache_directory = 'cache'\n"
PIPELINES = [
    ("one_stage", "conv"), ("one_stage", "diffusion"), ("two_stage", "conv"), ("distilled", "conv"), ("distilled_one_stage", "diffusion"),
    ("ic_lora", "conv"), ("keyframes", "conv"), ("hq", "diffusion"),
]  # fmt: skip
PROMPT = "A red disc --w 64 --h 64 --f 9 --s 2"


@dataclass(frozen=True)
class Project:
    """A dataset and its caches."""

    folder: Path
    model: Path
    vae: Path
    sound: Path
    encoder: Path

    @property
    def common(self) -> list[str]:
        return ["--dataset_config", str(self.folder / "dataset.toml"), "--ltx_mode", "av", "--device", "cpu"]

    @property
    def files(self) -> list[str]:
        return ["--ltxv2_model", str(self.model), "--vae", str(self.vae), "--audio_vae", str(self.sound)]

    def cache_texts(self, *flags: str) -> int:
        arguments = ["--ltxv2_model", str(self.model), "--text_encoder", str(self.encoder), *flags]
        return ltxv2_cache_text_encoder_outputs.main([*self.common, *arguments])

    def train(self, name: str, *flags: str) -> Path:
        more = ["--ltxv2_timestep_format", "flowmatch_1_1000", "--network_dim", "4", "--network_alpha", "4", "--mixed_precision", "no"]
        more += ["--max_train_steps", "2", "--max_data_loader_n_workers", "0", "--learning_rate", "1e-2", *flags]
        assert ltxv2_train_network.main([*self.common, *self.files, *more, "--output_dir", str(self.folder / name)]) == 0
        return self.folder / name


@pytest.fixture(scope="module")
def project(tiny_family, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("two point five")
    write_clips(folder / "clips", count=2, frames=9, width=64, height=64)
    (folder / "dataset.toml").write_text(TOML, encoding="utf-8")
    (folder / "prompts.txt").write_text(f"{PROMPT}\n", encoding="utf-8")
    family = tiny_family
    made = Project(folder, family.ltx25_transformer, family.ltx25_vae, family.ltx25_audio_vae, family.ltx25_gemma)
    assert ltxv2_cache_latents.main([*made.common, "--vae", str(made.vae)]) == 0
    assert ltxv2_cache_audio_latents.main([*made.common, "--audio_vae", str(made.sound)]) == 0
    assert made.cache_texts("--sample_prompts", str(folder / "prompts.txt")) == 0
    return made


def plays(path: Path) -> bool:
    with av.open(str(path)) as container:
        pictures = len(list(container.decode(video=0)))
    with av.open(str(path)) as container:
        return pictures == 9 and sum(frame.samples for frame in container.decode(audio=0)) > 0


def test_a_lora_is_trained_and_previewed_from_cached_texts(project):
    before = {path: path.read_bytes() for path in (project.folder / "cache").rglob("*.safetensors")}
    made = project.train(
        "cached", "--sample_prompts", str(project.folder / "prompts.txt"), "--sample_at_first", "--sample_every_n_steps", "2"
    )
    assert [len(losses(made)), *map(plays, sorted((made / "sample").glob("*.mp4")))] == [2, True, True]
    assert before == {path: path.read_bytes() for path in before}


def test_the_file_with_the_diffusion_decoder_caches_the_same_latents_and_previews(project, tiny_family, tmp_path):
    other = replace(project, folder=tmp_path, vae=tiny_family.ltx25_diffusion_vae)
    shutil.copytree(project.folder / "clips", tmp_path / "clips")
    shutil.copy(project.folder / "dataset.toml", tmp_path)
    assert ltxv2_cache_latents.main([*other.common, "--vae", str(other.vae)]) == 0
    for path in (tmp_path / "cache").glob("*.safetensors"):
        found, wanted = read_tensors(path), read_tensors(project.folder / "cache" / path.name)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    seen = replace(project, vae=other.vae).train("diffusion", "--sample_prompts", str(project.folder / "prompts.txt"))
    assert [plays(path) for path in (seen / "sample").glob("*.mp4")] == [True]


def test_previews_encode_a_prompt_that_was_not_cached(project):
    (project.folder / "new.txt").write_text("Nobody cached this --w 64 --h 64 --f 1 --s 1\n", encoding="utf-8")
    made = project.train("encoded", "--sample_prompts", str(project.folder / "new.txt"), "--text_encoder", str(project.encoder))
    assert len(list((made / "sample").glob("*.png"))) == 1


def test_every_pipeline_is_tried_below():
    assert {pipeline for pipeline, _ in PIPELINES} == set(get_args(Pipeline))


@pytest.mark.parametrize(("pipeline", "decoder"), PIPELINES)
def test_pipelines_play_with_sound(project, tiny_family, tmp_path, pipeline, decoder):
    picture, clip = project.folder / "start.png", next((project.folder / "clips").glob("*.mp4"))
    Image.new("RGB", (128, 64), (200, 40, 90)).save(picture)
    prompt = "a dog" + {"ic_lora": f" --v {clip}", "keyframes": f" --k 8={picture}"}.get(pipeline, "")
    project = replace(project, vae=tiny_family.ltx25_vae if decoder == "conv" else tiny_family.ltx25_diffusion_vae)
    size = ["--sample_width", "128", "--sample_height", "64", "--sample_frames", "9", "--sample_steps", "2", "--device", "cpu"]
    second = ["--spatial_upsampler_path", str(tiny_family.upsampler), "--distilled_lora", str(tiny_family.distilled_lora)]
    text = ["--text_encoder", str(project.encoder), "--prompt", prompt, "--pipeline", pipeline, "--output_dir", str(tmp_path)]
    assert ltxv2_generate_video.main([*project.files, *size, *second, *text]) == 0
    (path,) = tmp_path.glob("*.mp4")
    assert plays(path) and read_recipe(path).facts["pipeline"] == pipeline


def test_file_folder_and_pack_make_the_same_texts(project, tiny_family, tmp_path):
    """The projection from the encoder's file, or from the folder of the whole pack; the encoder from its file or its own folder."""
    stem = next((project.folder / "cache").glob("*_ltxv2_te.safetensors")).name.removesuffix("_ltxv2_te.safetensors")
    wanted = read_tensors(project.folder / "cache" / text_name(stem))["text_bfloat16"]
    projection = store.read_metadata(project.folder / "cache" / text_name(stem))["projection_fingerprint"]
    pack = tmp_path / "pack"
    for path in (tiny_family.ltx25_transformer, tiny_family.ltx25_vae, tiny_family.ltx25_audio_vae, tiny_family.ltx25_gemma):
        (pack / path.stem).mkdir(parents=True)
        shutil.copy(path, pack / path.stem)
    for name, encoder in (("file", tiny_family.ltx25_gemma), ("folder", tiny_family.gemma4)):
        folder = tmp_path / name
        shutil.copytree(project.folder / "clips", folder / "clips")
        shutil.copy(project.folder / "dataset.toml", folder)
        other = replace(project, folder=folder, model=pack, vae=pack, sound=pack, encoder=encoder)
        assert other.cache_texts() == 0
        found = folder / "cache" / text_name(stem)
        assert torch.equal(read_tensors(found)["text_bfloat16"], wanted)
        assert store.read_metadata(found)["projection_fingerprint"] == projection


def test_a_renamed_encoder_encodes_nothing_again(project, tmp_path, monkeypatch):
    from musubi_tuner.ltxv2.text.pipeline import FeatureStage

    renamed = shutil.copy(project.encoder, tmp_path / "another name.safetensors")
    monkeypatch.setattr(FeatureStage, "encode", lambda *given: pytest.fail("encoded again"))
    assert replace(project, encoder=Path(renamed)).cache_texts("--skip_existing") == 0


def test_texts_of_another_encoder_are_told_before_training(project, tiny_family):
    with pytest.raises(UserError, match="made with another encoder"):
        project.train("other", "--text_encoder", str(tiny_family.gemma4))


def test_training_holds_cached_texts_against_the_projection_in_the_encoders_file(project):
    """The transformer's file has none, so without --text_encoder nothing is known of it."""
    cached = store.read_metadata(next((project.folder / "cache").glob("*_ltxv2_te.safetensors")))["projection_fingerprint"]
    common = [*project.common, "--ltxv2_model", str(project.model), "--ltxv2_timestep_format", "flowmatch_1_1000", "--output_dir", "o"]
    found = []
    for flags in (["--text_encoder", str(project.encoder)], []):
        config = ltxv2_train_network.parse_arguments([*common, *flags], "train")
        found.append(wanted_caches(config, open_checkpoint(project.model)).text.get("projection_fingerprint"))
    assert found == [cached, None]


def test_gemma_3_is_refused_for_2_5_and_gemma_4_for_2_3(project, tiny_family):
    with pytest.raises(UserError, match=r"gemma3: a Gemma 3; .* is LTX-2\.5, which was trained with the Gemma 4 of its release"):
        pack = project.folder / "pack"
        pack.mkdir()
        for path in (tiny_family.ltx25_transformer, tiny_family.ltx25_gemma):
            shutil.copy(path, pack)
        replace(project, model=pack, encoder=tiny_family.gemma).cache_texts()
    for encoder in (tiny_family.gemma4, tiny_family.ltx25_gemma):
        with pytest.raises(UserError, match=r"a Gemma 4; ltx2_tiny_2\.3\.safetensors is LTX-2\.3, which was trained with Gemma 3 12B"):
            replace(project, model=tiny_family.ltx23, encoder=encoder).cache_texts()


def predicted(project: Project, tiny_family, folder: Path, *flags: str) -> list[Path]:
    size = ["--sample_width", "64", "--sample_height", "64", "--sample_steps", "1", "--device", "cpu", "--output_dir", str(folder)]
    head = ["--duration_head", str(tiny_family.ltx25_duration_head), "--text_encoder", str(project.encoder)]
    assert ltxv2_generate_video.main([*project.files, *size, *head, *flags]) == 0
    return sorted(folder.glob("*.mp4"))


def test_clips_are_as_long_as_the_duration_head_predicts(project, tiny_family, tmp_path, monkeypatch, caplog):
    """But for prompts that name their frames; the text encoder is loaded once."""
    from musubi_tuner.placement import text

    loads, real = [], text.load_feature_stage
    monkeypatch.setattr(text, "load_feature_stage", lambda *a, **k: loads.append(1) or real(*a, **k))
    caplog.set_level("INFO")
    prompts = ["a dog --fr 12", "a cat sleeps on a red chair by the window --fr 12", "rain --f 17"]
    clips = predicted(project, tiny_family, tmp_path, "--pipeline", "distilled_one_stage", "--prompt", *prompts)
    frames = [read_recipe(path).facts["prompt"]["frames"] for path in clips]
    assert frames[2] == 17 and all(17 <= count <= 41 for count in frames[:2]) and caplog.text.count("by --duration_head") == 0
    for path, count in zip(clips, frames, strict=True):
        with av.open(str(path)) as container:
            assert len(list(container.decode(video=0))) == count
    assert caplog.text.count("predicts") == 2 and len(loads) == 2, "once for the texts to predict from, once for the others"
    before = [path.read_bytes() for path in clips]
    assert predicted(project, tiny_family, tmp_path, "--pipeline", "distilled_one_stage", "--prompt", *prompts) == clips
    assert [path.read_bytes() for path in clips] == before, "the same command makes the same clips"


def test_a_duration_head_that_does_not_fit_is_told_before_anything_is_encoded(project, tiny_family, tmp_path, monkeypatch):
    from musubi_tuner.placement import text

    monkeypatch.setattr(text, "load_feature_stage", lambda *a, **k: pytest.fail("encoded"))
    base = [*project.files, "--text_encoder", str(project.encoder), "--prompt", "a dog", "--device", "cpu", "--output_dir", str(tmp_path)]
    for flags, says in (
        (["--duration_head", str(tiny_family.upsampler)], "holds no duration head"),
        (["--duration_head", str(tiny_family.ltx25_duration_head), "--ltxv2_model", str(tiny_family.ltx23)], r"is LTX-2\.3"),
        (["--duration_head", str(tiny_family.ltx25_duration_head), "--text_encoder_backend", "t5"], "by Gemma 4"),
    ):
        words = [word for word in base if not (word in (*project.files[:2],) and "--ltxv2_model" in flags)]
        with pytest.raises(UserError, match=says):
            ltxv2_generate_video.main([*words, *flags])


def test_a_keyframe_behind_the_predicted_end_is_named(project, tiny_family, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "last.png")
    with pytest.raises(UserError, match=r"of \d+ frames by --duration_head; --f gives others\): --k 400="):
        predicted(project, tiny_family, tmp_path, "--prompt", f"a dog --k 400={tmp_path}/last.png")
