"""Two processes that share a run, started as torchrun starts them, from one server that has imported all of it once."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

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
