"""Bad inputs for the commands, made from the schemas of their configurations, and what the commands say to them."""

import hashlib
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from diffrl.configs import cli, commands
from diffrl.configs.cells import _composed
from diffrl.configs.groups import COMMANDS, register
from diffrl.training.runs import RunFolder

VALUES = (
    *("text", '""', "null", "[]", "{}", "true", "nan", "inf", "-1", "0", "1.5", "1e30", "1e-30"),
    *(str(10**15), str(10**22)),
)
"""For every key, whatever its type."""

FAST = {
    "train": (
        *("data=rings", "data.test_size=64", "network=mlp", "network.hidden=8", "network.depth=1"),
        *("compare=false", "trainer.grad_steps=4", "trainer.batch_size=8", "trainer.eval_every=2"),
        *("trainer.report_every=2", "trainer.checkpoint_every=2", "eval.points=8", "eval.samples=16"),
        *("eval.num_steps=[3]", "chain.num_steps=4"),
    ),
    "finetune": (
        *("compare=[]", "reward=mode_distance", "reward.point=[0.8,0]", "heldout_reward=none", "policy.num_steps=3"),
        *("rollouts.trajectories=16", "loop.iterations=2", "loop.eval_every=1", "loop.checkpoint_every=1"),
        *("evaluation.samples=16", "updates.minibatches=1", "updates.passes=1"),
    ),
    "compare": ("plan=quick", "workers=0"),
}  # fmt: skip
"""Words of a run that takes an instant."""

SECONDS = 20
"""Most for one input: what takes longer hangs."""


class Hangs(BaseException):
    """An input took too long; no `except Exception` takes it for an error of its own."""


class Accepted(BaseException):
    """A run passed all its checks, and would begin now."""


def keys(command: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every key of a command's configuration: the words that choose its group's option, and its full name."""
    register()
    repo = ConfigStore.instance().repo
    made = OmegaConf.structured(COMMANDS[command])
    for name, value in made.items_ex(resolve=False):
        options = repo.get(name)
        if not isinstance(options, dict):
            inner = value if OmegaConf.is_dict(value) and not OmegaConf.is_missing(made, name) else ()
            yield from (((), key) for key in (name, *(f"{name}.{key}" for key in inner)))
            continue
        for file, stored in options.items():
            option = file.removesuffix(".yaml")
            yield (f"{name}={option}",), name
            yield from (((f"{name}={option}",), f"{name}.{key}") for key in stored.node if key != "name")


def throw(command: str, words: Sequence[str], *, begin: bool = False, real: bool = False) -> str:
    """What a command says at its end: "" if it was accepted, or ran to its end.

    Args:
        command: its name.
        words: of its command line.
        begin: whether an accepted run begins; else it stops where its folder would be made.
        real: whether Hydra composes each time anew; else choices of groups are composed once for all that share them.
    """
    with ExitStack() as stack:
        change = stack.enter_context
        change(mock.patch.object(sys, "argv", [f"-m diffrl {command}", *words]))
        change(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if not real:
            change(mock.patch.object(cli, "register", lambda: None))
            change(mock.patch("hydra.main", _composing))
            chosen = SimpleNamespace(choices={"recipe": "ddpo_is"})
            told = SimpleNamespace(overrides=SimpleNamespace(task=[*words]), mode=RunMode.RUN, runtime=chosen)
            change(mock.patch("hydra.core.hydra_config.HydraConfig.get", lambda: told))
        change(mock.patch.object(torch, "compile", lambda call: call))  # it takes longer than runs
        for name in ("draw_summary", "draw_tuning"):  # pictures, too
            change(mock.patch.object(commands, name, lambda *args, **options: None))
        if not begin:
            change(mock.patch.object(RunFolder, "start", _accept))
            change(mock.patch.object(commands, "run_comparison", _accept))
        try:
            commands.COMMANDS[command]()
        except Accepted:
            return ""
        except SystemExit as stop:
            return "" if stop.code in (0, None) else str(stop.code)
    return ""


def thrown(command: str, words: list[str], **how: bool) -> str:
    """What is said, after a look at whether it is one line; a traceback fails the test, with the words."""
    signal.alarm(SECONDS)
    try:
        said = throw(command, words, **how)
    except (Exception, Hangs) as error:
        raise AssertionError(f"{command} {words[-1]}: {type(error).__name__}: {error}") from error
    signal.alarm(0)
    assert said == "" or (said.startswith("error: ") and "\n" not in said and len(said) > 15), (words, said)
    return said


def _accept(*args: Any, **options: Any) -> Any:
    raise Accepted


def _composing(config_name: str, **options: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Stands for `hydra.main`: all words but the last are composed once for all that share them."""

    def decorate(job: Callable[..., None]) -> Callable[[], None]:
        def run() -> None:
            *words, last = sys.argv[1:]
            (parsed,) = OverridesParser.create().parse_overrides([last])
            key = parsed.key_or_group
            if key in cli.OF_FILES or isinstance(ConfigStore.instance().repo.get(key), dict):
                return job(_composed(config_name, [*words, last]))
            config = _shared(config_name, tuple(words)).copy()
            OmegaConf.update(config, key, parsed.value(), merge=True)
            return job(config)

        return run

    return decorate


@cache
def _shared(name: str, words: tuple[str, ...]) -> DictConfig:
    return _composed(name, words)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by a digest of what it holds."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def tell(what: str, counts: Counter[str]) -> None:
    """Print how many inputs there were, by what became of them."""
    print(f"{what}: {', '.join(f'{n} {name}' for name, n in counts.items())}")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "flipped": lambda raw: raw[: len(raw) // 3] + bytes([raw[len(raw) // 3] ^ 0x55]) + raw[len(raw) // 3 + 1 :],
    "empty": lambda raw: b"",
    "foreign": lambda raw: b"\x89PNG\r\n\x1a\n\x00\xff\xfe" * 30,
    "other text": lambda raw: b"- a list\n- of words\n",
    "number": lambda raw: b"3",
}  # fmt: skip
"""What can happen to a file."""
