"""Which rewards there are: those built in and those of the user's own files; and the arguments that they take."""

import dataclasses
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch

from musubi_tuner.cache.store import file_fingerprint
from musubi_tuner.config.validation import nearest
from musubi_tuner.reinforcement.advantages import Route
from musubi_tuner.reinforcement.rewards.base import NAME, Need, Reward, scores_groups
from musubi_tuner.reinforcement.rewards.likeness import PictureLikeness, VoiceLikeness
from musubi_tuner.reinforcement.rewards.onsets import Onsets
from musubi_tuner.reinforcement.rewards.picture import Motion, Saturation, Sharpness
from musubi_tuner.reinforcement.rewards.prompts import Clap, Clip, WordError
from musubi_tuner.reinforcement.rewards.remote import HttpAudio, HttpSync, HttpVideo
from musubi_tuner.reinforcement.rewards.sound import Clipping, Loudness, Silence
from musubi_tuner.runtime.errors import UserError

_BUILT_IN: tuple[type[Reward], ...] = (
    Loudness, Silence, Clipping, Sharpness, Motion, Saturation, Onsets, PictureLikeness, VoiceLikeness, WordError, Clap, Clip,
    HttpVideo, HttpAudio, HttpSync,
)  # fmt: skip
_PLUGIN = "musubi_tuner_reward_plugin_{}"


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """A reward as a run asks for it."""

    kind: type[Reward]
    arguments: Mapping[str, Any]
    """All that its `setup` takes, defaults too."""
    plugin: Path | None
    """The file that it comes from; None = built in."""

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.kind.needs)

    @contextmanager
    def blamed(self, doing: str) -> Iterator[None]:
        """What a file of the user's own raises becomes a message that names it and its line.

        Args:
            doing: such as `to score g0000_k00`.

        Raises:
            UserError: what it raises itself, too.
        """
        try:
            yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # sys.exit(0) of a plug-in would pass for a run that has scored all
            if self.plugin is None:
                raise
            lines = [one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == str(self.plugin)]
            where = f"{self.plugin}, line {lines[-1]}" if lines else str(self.plugin)
            raise UserError(f"{where}: the reward '{self.name}' failed {doing} ({type(error).__name__}: {error}).") from error

    def files(self, reward: Reward) -> dict[str, str]:
        """Hashes of what its scores depend on besides arguments.

        Raises:
            UserError: a file that is not there, or what is no path.
        """
        with self.blamed("to name its files"):
            given = [*([self.plugin] if self.plugin else []), *reward.weight_files(**self.arguments)]
        for path in given:
            if not isinstance(path, Path):
                raise UserError(f"reward '{self.name}': `weight_files` returned {path!r:.100}: must be a list of pathlib.Path.")
        return {f"{number}/{path.name}": file_fingerprint(path) for number, path in enumerate(given)}


def choose(names: Sequence[str], arguments: Sequence[str], plugins: Sequence[Path]) -> list[Chosen]:
    """
    Args:
        names: of rewards.
        arguments: each `reward.key=value`.
        plugins: files of the user's own, which are run.

    Raises:
        UserError: names, keys or values that are none, or a file that holds no rewards.
    """
    known: dict[str, tuple[type[Reward], Path | None]] = {kind.name: (kind, None) for kind in _BUILT_IN}
    for path in plugins:
        for kind in _load(path):
            if kind.name in known:
                raise UserError(f"--reward_plugins {path}: there is a reward '{kind.name}' already. Give it another `name`.")
            known[kind.name] = (kind, path)
    given = _by_reward(arguments)
    for name in names:
        if name not in known:
            raise UserError(f"--reward_fn {name}: no such reward.{nearest(name, known)} There are {', '.join(known)}.")
    for name in given:
        if name not in names:
            raise UserError(f"--reward_args {name}. ...: '{name}' is not in --reward_fn ({', '.join(names)}).{nearest(name, names)}")
    return [Chosen(known[name][0], _bound(known[name][0], given.get(name, {})), known[name][1]) for name in names]


def _by_reward(arguments: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for one in arguments:
        before, sign, value = one.partition("=")
        reward, dot, key = before.partition(".")
        if not (sign and dot and reward and key):
            raise UserError(f"--reward_args {one}: must be REWARD.KEY=VALUE, such as loudness.target=-20.")
        if key in found.setdefault(reward, {}):
            raise UserError(f"--reward_args {reward}.{key}: is given twice.")
        found[reward][key] = value
    return found


def _bound(kind: type[Reward], given: Mapping[str, str]) -> dict[str, Any]:
    """Every argument of `setup` after the device, as its signature types it."""
    try:
        parameters = dict(list(inspect.signature(kind.setup, eval_str=True).parameters.items())[2:])
    except Exception as error:  # an annotation in quotes is run
        raise UserError(f"--reward_fn {kind.name}: the types of its `setup` cannot be read ({error}).") from error
    known = {name: one for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    for key in given:
        if key not in known:
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            raise UserError(f"--reward_args {kind.name}.{key}: no such argument.{nearest(key, known)} {takes}")
    missing = [name for name, one in known.items() if one.default is one.empty and name not in given]
    if missing:
        raise UserError(f"--reward_fn {kind.name}: needs --reward_args {kind.name}.{missing[0]}=...")
    return {name: _value(kind.name, name, given[name], one) if name in given else one.default for name, one in known.items()}


def _value(reward: str, key: str, text: str, parameter: inspect.Parameter) -> Any:
    annotation = type(parameter.default) if parameter.annotation is parameter.empty else parameter.annotation
    types = [one for one in (get_args(annotation) or (annotation,)) if one is not type(None)]
    words = {bool: "true or false", int: "a whole number", float: "a number"}
    for wanted in (bool, int, float):
        if wanted in types:
            try:
                return {"true": True, "false": False}[text.lower()] if wanted is bool else _number(wanted, text)
            except (ValueError, KeyError, OverflowError) as error:
                if wanted is types[-1]:
                    raise UserError(f"--reward_args {reward}.{key}={text}: must be {words[wanted]}.") from error
    if not text:
        raise UserError(f"--reward_args {reward}.{key}=: needs a value.")
    return Path(text) if Path in types else text


def _number(wanted: type, text: str) -> int | float:
    value = wanted(text)
    if not torch.isfinite(torch.tensor(float(value))):
        raise ValueError
    return value


def _load(path: Path) -> Sequence[type[Reward]]:
    """The rewards of a file: its `REWARDS`."""
    if not path.is_file():
        raise UserError(f"--reward_plugins {path}: no such file.")
    module = _run(path)
    found = getattr(module, "REWARDS", None)
    if not isinstance(found, list | tuple) or not found:
        raise UserError(f"--reward_plugins {path}: must end in REWARDS = [...], a list of its rewards (docs/how-to/rewards.md).")
    for kind in found:
        _check(kind, f"--reward_plugins {path}")
    return found


def _run(path: Path) -> ModuleType:
    name = _PLUGIN.format(re.sub(r"\W", "_", path.stem))
    spec = importlib.util.spec_from_file_location(name, path, loader=importlib.machinery.SourceFileLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's file does
        raise UserError(f"--reward_plugins {path}: cannot be run ({type(error).__name__}: {error}).") from error
    return module


def _check(kind: Any, where: str) -> None:
    if not (isinstance(kind, type) and issubclass(kind, Reward)):
        raise UserError(f"{where}: {kind!r} in REWARDS is no class that subclasses Reward (musubi_tuner.reinforcement.rewards.base).")
    title = f"{where}: {kind.__name__}"
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{title}: `name` = {name!r}: must be letters, digits, - and _, as it names a file.")
    route, routes = getattr(kind, "route", None), get_args(Route)
    if route not in routes:
        raise UserError(f"{title}: `route` = {route!r}: must be one of {', '.join(routes)}: which stream learns from it.")
    needs, known = getattr(kind, "needs", None), get_args(Need)
    if not isinstance(needs, list | tuple | set | frozenset) or not needs or not all(need in known for need in needs):
        raise UserError(f"{title}: `needs` = {needs!r}: must be a list of some of {', '.join(known)}: what is decoded for it.")
    if type(kind.version) is not int:
        raise UserError(f"{title}: `version` = {kind.version!r:.60}: must be a whole number.")
    if kind.score is Reward.score and not scores_groups(kind):
        raise UserError(f"{title}: has neither `score` nor `score_groups`.")
