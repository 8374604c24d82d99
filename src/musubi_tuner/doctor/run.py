"""A look at a run: its dataset and caches, the files that its flags name, its previews and its output folder."""

import collections
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from musubi_tuner.conditioning.recipe import make_recipe
from musubi_tuner.config.dataset import DatasetConfig, DatasetSpec, load_dataset_config
from musubi_tuner.config.network import parse_pairs
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.dataset.items import Item, list_items
from musubi_tuner.doctor.findings import Finding, Note, look
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.memory.card import GIB
from musubi_tuner.networks.reading import newest_file, read_network
from musubi_tuner.placement.adapters import network_module, stored_linears
from musubi_tuner.prompts.sample_prompts import load_prompts
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.sources.listing import list_sources, sources_exist
from musubi_tuner.training.earlier import resolve_newest
from musubi_tuner.training.optimizer import make_optimizer
from musubi_tuner.training.preflight import caching_arguments, check_inputs, check_output_folder

_SHOWN = 5


def look_at_dataset(config: TrainingConfig) -> list[Finding]:
    """The TOML, its sources with their captions, and what was planned of them."""
    loaded: list[DatasetConfig] = []

    def read() -> str:
        loaded.append(load_dataset_config(config.mode.dataset_config))
        counts = f"{len(loaded[0].datasets)} dataset(s), {len(loaded[0].validation_datasets)} held out"
        return f"{config.mode.dataset_config}: {counts}"

    findings = [look("dataset", read)]
    for datasets in loaded:
        specs = (*datasets.datasets, *datasets.validation_datasets)
        findings += [look(spec.label, lambda spec=spec: _sources(spec)) for spec in specs]
        findings += [look("planned", lambda specs=datasets.datasets: _items(specs, config))]
    return findings


def look_at_run(config: TrainingConfig, checkpoint: Checkpoint) -> Iterator[Finding]:
    """What training would check before it loads the model."""

    def caches() -> str | Note:
        with _warnings() as warned:
            inputs = check_inputs(config)
        says = f"{len(inputs.items)} item(s) have all their files, of this model and these settings"
        return Note("\n".join([says, *warned])) if warned else says

    yield look("recipe", lambda: _recipe(config))
    yield look("caches", caches)
    if config.network.network_weights is not None:
        yield look("network_weights", lambda: _start(config, checkpoint))
    yield look("network", lambda: f"--network_module {network_module(config.network.network_module).__name__}")
    yield look("optimizer", lambda: _optimizer(config))
    if config.preview.sample_prompts is not None:
        yield look("previews", lambda: _prompts(config))
    yield look("output", lambda: _output(config))


def _sources(spec: DatasetSpec) -> str | Note:
    if not sources_exist(spec):
        return Note(f"no {spec.kind} file is in {spec.root}: training runs from the caches alone, and nothing can be cached anew")
    sources = list_sources(spec, require_captions=False)
    size = sum(source.path.stat().st_size for source in sources)
    says = f"{len(sources)} {spec.kind} file(s), {size / GIB:.2f} GiB, in {spec.root}"
    if lacking := [source.name for source in sources if not source.caption.strip()]:
        shown = ", ".join(lacking[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
        raise UserError(
            f"{says}; {len(lacking)} without a caption: {shown}. Put a '{spec.caption_extension}' file of the same stem beside each."
        )
    return says


def _items(specs: Sequence[DatasetSpec], config: TrainingConfig) -> str | Note:
    with _warnings() as warned:
        items = list_items(specs, config.ltx_mode, config.mode.dataset_config, caching_arguments(config))
    buckets = collections.Counter(f"{item.clip.width}x{item.clip.height}x{item.clip.frames}" for item in items)
    shown = ", ".join(f"{count} of {name}" for name, count in buckets.most_common(_SHOWN)) + (", ..." if len(buckets) > _SHOWN else "")
    says = f"{len(items)} item(s), {_with_sound(items)} with sound: {shown}"
    if config.ltx_mode == "video" and _with_sound(items):
        warned.append("--ltx_mode video leaves their sound alone; give --ltx_mode av to train it.")
    return Note("\n".join([says, *warned])) if warned else says


def _with_sound(items: Sequence[Item]) -> int:
    return sum(item.has_sound for item in items)


def _recipe(config: TrainingConfig) -> str:
    rules = make_recipe(config.conditioning, config.ltx_mode).describe()
    named = [f"{stream} {rule['rule']} ({rule['probability']:g})" for stream, found in rules.items() for rule in found]
    return ", ".join(named) or "none: everything is generated from the text"


def _start(config: TrainingConfig, checkpoint: Checkpoint) -> str:
    assert config.network.network_weights is not None
    path = newest_file(config.network.network_weights)
    return f"{path}: {read_network(path, stored_linears(checkpoint)).describe()}"


def _optimizer(config: TrainingConfig) -> str:
    options = config.optimization
    parameter = torch.nn.Parameter(torch.zeros(1))
    made = make_optimizer(
        options.optimizer_type, [parameter], options.learning_rate, parse_pairs(options.optimizer_args, "--optimizer_args")
    )
    return f"{type(made).__module__.partition('.')[0]}: {type(made).__name__}"


def _prompts(config: TrainingConfig) -> str:
    assert config.preview.sample_prompts is not None
    prompts = load_prompts(config.preview.sample_prompts)
    says = f"{config.preview.sample_prompts}: {len(prompts)} prompt(s)"
    return says if config.preview.wanted else f"{says}, at the end of the run: no flag says when else, such as --sample_every_n_steps N"


def _output(config: TrainingConfig) -> str:
    check_output_folder(config.saving.output_dir)
    resumed = resolve_newest(config).saving.resume
    return f"{config.saving.output_dir} can be written into" + ("" if resumed is None else f"; the run goes on from {resumed.name}")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What is logged meanwhile as a warning, without the word."""
    said: list[str] = []

    class _Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().removeprefix("WARNING: "))

    root, collector = logging.getLogger("musubi_tuner"), _Collect(logging.WARNING)
    root.addHandler(collector)
    root.propagate = False
    try:
        yield said
    finally:
        root.removeHandler(collector)
        root.propagate = True
