"""What the training tests share: a small dataset, cached by the real programs, and runs of the real entry."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors

from musubi_tuner import ltxv2_cache_audio_latents, ltxv2_cache_latents, ltxv2_cache_text_encoder_outputs
from musubi_tuner.conditioning.recipe import Reference, make_recipe
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.conversion.checkpoint.trained import writer_of_trained
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, OfficialLTXV2Wrapper
from musubi_tuner.placement.load import ModelRequest
from musubi_tuner.placement.planning import BatchTokens
from musubi_tuner.placement.prove import load_model
from musubi_tuner.runtime.processes import Processes, processes
from musubi_tuner.tiny.checkpoint import TinyFamily
from musubi_tuner.tiny.clips import write_clips
from musubi_tuner.training.objective import ErrorFunction, FlowMatching, ItemLosses, squared_error
from musubi_tuner.training.preflight import RunInputs, check_inputs
from musubi_tuner.training.preservation import Teacher, WithTeacher
from musubi_tuner.training.run import TrainingRun
from musubi_tuner.training.setup import build_run, make_machine

TOML = """
[general]
resolution = [96, 64]
target_frames = [17]
batch_size = {batch_size}

[[datasets]]
video_directory = "clips"
cache_directory = "cache"

[[validation_datasets]]
video_directory = "held out"
cache_directory = "held out cache"
"""


@dataclass(frozen=True)
class Data:
    """A dataset with caches for one model and mode."""

    folder: Path
    toml: Path
    model: Path
    mode: str
    encoder: Path

    def arguments(self, *extra: str) -> list[str]:
        """Flags of a short run."""
        return [
            "--dataset_config", str(self.toml), "--ltx_mode", self.mode, "--ltxv2_model", str(self.model),
            "--ltxv2_timestep_format", "flowmatch_1_1000", "--network_dim", "4", "--network_alpha", "4", "--device", "cpu",
            "--max_data_loader_n_workers", "0", "--mixed_precision", "no", "--learning_rate", "1e-3", *extra,
        ]  # fmt: skip


def make_data(folder: Path, family: TinyFamily, mode: str, *, batch_size: int = 1, count: int = 3, held_out: bool = True) -> Data:
    """Clips with sound, and caches for the 2.3-style model."""
    write_clips(folder / "clips", count=count, frames=25)
    toml = TOML.format(batch_size=batch_size)
    if held_out:
        write_clips(folder / "held out", count=1, frames=25, seed=9)
    else:
        toml = toml.split("[[validation_datasets]]")[0]
    path = folder / "dataset.toml"
    path.write_text(toml, encoding="utf-8")
    data = Data(folder, path, family.ltx23, mode, family.gemma)
    cache(data)
    return data


def cache(data: Data, *, sound: bool = True, text: tuple[str, ...] = ()) -> None:
    common = ["--dataset_config", str(data.toml), "--ltx_mode", data.mode, "--device", "cpu"]
    assert ltxv2_cache_latents.main([*common, "--vae", str(data.model)]) == 0
    if sound and data.mode != "video":
        assert ltxv2_cache_audio_latents.main([*common, "--vae", str(data.model)]) == 0
    text = text or ("--text_encoder", str(data.encoder))
    assert ltxv2_cache_text_encoder_outputs.main([*common, "--ltxv2_model", str(data.model), *text]) == 0


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Of a file that is written over while they live: `load_file` maps it, and Windows replaces no mapped file."""
    return load_tensors(path.read_bytes())


def losses(folder: Path, name: str = "ltxv2_lora") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"{name}-loss.jsonl").read_text(encoding="utf-8").splitlines()]


def load(config: TrainingConfig, data: Data) -> tuple[OfficialLTXV2Wrapper, LoRANetwork]:
    """The model and network of a run on the CPU in float32, as the program loads them."""
    with processes() as group:
        request = ModelRequest(
            checkpoint=open_checkpoint(data.model),
            mode=config.ltx_mode,
            timestep_format=config.mode.ltxv2_timestep_format,
            timestep_rule=config.losses.av_timestep_rule,
            device=torch.device("cpu"),
            dtype=torch.float32,
            network=config.network,
            seed=config.optimization.seed,
            shows_references=make_recipe(config.conditioning, config.ltx_mode).probability("video", Reference) > 0,
            memory=config.memory,
            tokens=BatchTokens(video=0, audio=0, text=0, clips=1),
            processes=group,
        )
        loaded = load_model(request, trial=lambda wrapper, network: 0.0)
    return loaded.wrapper, loaded.network


def item_losses(
    wrapper: OfficialLTXV2Wrapper, batch: Batch, *, error: ErrorFunction = squared_error, teacher: Teacher | None = None
) -> ItemLosses:
    """Raw losses of a batch at its own noise levels."""
    objective = FlowMatching(wrapper, error) if teacher is None else WithTeacher(FlowMatching(wrapper, error), teacher)
    return objective.loss(objective.predict(batch))


def build(config: TrainingConfig, group: Processes) -> tuple[TrainingRun, RunInputs]:
    """The run of a config, built as the program builds it."""
    inputs = check_inputs(config)
    return build_run(inputs, make_machine(config, group), writer_of_trained(inputs.checkpoint)), inputs
