"""What worker processes are given to do; it imports little, as each process imports it anew."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any


def work(task: Any) -> Any:
    """What a task says: ("value", x), ("raise", text), ("kill", signal), ("threads",), ("wait", folder), ..."""
    match task:
        case ("value", x):
            return x * 10
        case ("raise", text):
            raise ValueError(text)
        case ("kill", number):
            os.kill(os.getpid(), number)
        case ("leave", kind):
            raise kind(3)
        case ("sleep", seconds):
            time.sleep(seconds)
        case ("deaf", folder):  # to SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            tell_pid(Path(folder))
            time.sleep(60)
        case ("hang", folder):  # in C code that lets no other thread run
            tell_pid(Path(folder))
            re.fullmatch("(a+)+b", "a" * 64)
        case ("threads",):
            import torch

            return os.getpid(), torch.get_num_threads()
        case ("peak", size):
            return peaks(size)
        case ("wait", folder):
            return wait_for_sigterm(Path(folder))
    return None


def tell_pid(folder: Path) -> None:
    (folder / "told").write_text(str(os.getpid()), encoding="utf-8")
    (folder / "told").rename(folder / "pid")


def wait_for_sigterm(folder: Path) -> None:
    """Say that it runs, and after SIGTERM that it has saved."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    tell_pid(folder)
    while not stopped:
        time.sleep(0.01)
    (folder / "saved").write_text(f"{len(stopped)}", encoding="utf-8")


def peaks(size: int) -> tuple[int, int]:
    """Most bytes that this process has held, before and after it holds `size` more."""
    from diffrl.experiments.estimates import peak_memory

    before = peak_memory()
    held = b"\1" * size
    return before, peak_memory() if held else 0


def unsendable(task: Any) -> Any:
    return lambda: task


class Unloadable:
    """Can be pickled, but not made again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)

    def __call__(self, task: Any) -> Any:
        return task


def reward_is_known(name: str) -> bool:
    from diffrl.rewards.registry import REWARDS

    return name in REWARDS
