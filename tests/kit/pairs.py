"""Two processes that share a run, started as torchrun starts them, from one server that has imported all of it once."""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffrl.training.distributed import RankLost
from diffrl.training.loop import Loop

Work = Callable[[int, Path, Callable[[], None]], None]
"""Takes the rank, a folder, and what is to be called before each meeting."""
HAVE_IMPORTED = ["diffrl.experiments.train", "torch.nn.parallel", "tests.kit.configs"]


def free_ports(count: int) -> list[int]:
    """Ports that nobody has."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def in_pair(work: Work, folder: Path, meetings: int, seconds: float = 200.0) -> list[int | None]:
    """Let two processes do their work; their exit codes, and None for one that was still at it.

    Args:
        work: what each does, a function of a module.
        folder: to leave something in.
        meetings: how often they meet anew at most.
        seconds: until they are ended.
    """
    context, ports = multiprocessing.get_context("forkserver"), free_ports(meetings)
    context.set_forkserver_preload(HAVE_IMPORTED)
    pair = [context.Process(target=_member, args=(work, rank, folder, ports)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(seconds)
    codes = [process.exitcode for process in pair]
    for process in pair:
        process.kill()
        process.join()
    return codes


def _member(work: Work, rank: int, folder: Path, ports: Sequence[int]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    left = iter(ports)

    def meet() -> None:
        os.environ["MASTER_PORT"] = str(next(left))

    work(rank, folder, meet)


def stopped(loop: type[Loop], step: int, how: Callable[[], object]) -> None:
    """Let something happen in the middle of a training or a tuning."""
    advance = loop._advance

    def advance_and_stop(self: Loop) -> Any:
        if self.step == step:
            how()
        return advance(self)

    loop._advance = advance_and_stop  # type: ignore[method-assign]


def lose_the_other(run: Callable[[], object], said: dict[str, Any], path: Path) -> None:
    """Write what was said; where the other process dies in this run, write that too, and end with status 3."""
    begun = time.monotonic()
    path.write_text(json.dumps(said), encoding="utf-8")
    try:
        run()
    except RankLost as lost:
        said |= {"lost": str(lost), "seconds": time.monotonic() - begun}
        path.write_text(json.dumps(said), encoding="utf-8")
        os._exit(3)
