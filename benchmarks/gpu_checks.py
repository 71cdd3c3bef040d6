"""What training costs on a GPU, in one call that writes one JSON file.

python benchmarks/gpu_checks.py --out gpu.json                          # the network of experiment=cifar10_edm
python benchmarks/gpu_checks.py --batch 128 --out gpu.json              # on a card with less memory
python benchmarks/gpu_checks.py --device cpu --small --out cpu.json     # the same checks, tiny, without a GPU

Time of a training step: of diffrl over a plain PyTorch loop around the same network, of bfloat16 over float32, of
channels last, compiled and augmented over plain, of TD-EDM and TD over EDM, with as many states in each. Ratios are
medians over rounds in which both run in turn, with 95 % bootstrap intervals. Of each step also images a second and the
greatest memory. Then samples: how fast, and how near the GPU's clean estimates are to the processor's, with TF32 as
PyTorch allows it and without.

A check that fails is told in the file and at the end, and the others go on; the file is written after each.
"""

import argparse
import copy
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RL_WARNINGS", "0")

import numpy as np
import torch
from gpu_steps import LEVELS, Bench, Variant
from timing import Ratio, interleave

import diffrl
from diffrl.devices import usable_device
from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import DiffrlError
from diffrl.text_files import write_atomically
from diffrl.training.provenance import versions

__all__ = ["main"]

AS_THEY_ARE = ("trainer.augment=0", "network.augment_dim=0")
BFLOAT16 = (*AS_THEY_ARE, "dtype=bfloat16")
VARIANTS = {
    "EDM": Variant(AS_THEY_ARE),
    "EDM, plain PyTorch": Variant(AS_THEY_ARE, plain=True),
    "EDM, augmented": Variant(),
    "EDM, bfloat16": Variant(BFLOAT16),
    "EDM, bfloat16, plain PyTorch": Variant(BFLOAT16, plain=True),
    "EDM, bfloat16, channels last": Variant((*BFLOAT16, "trainer.channels_last=true")),
    "EDM, bfloat16, compiled": Variant((*BFLOAT16, "trainer.compile=true")),
    "TD-EDM": Variant(AS_THEY_ARE, experiment="cifar10_td_edm"),
    "TD": Variant((*AS_THEY_ARE, "objective=td"), chains=True),
}
OVER = (
    ("EDM", "EDM, plain PyTorch"),
    ("EDM, augmented", "EDM"),
    ("EDM, bfloat16", "EDM"),
    ("EDM, bfloat16", "EDM, bfloat16, plain PyTorch"),
    ("EDM, bfloat16, channels last", "EDM, bfloat16"),
    ("EDM, bfloat16, compiled", "EDM, bfloat16"),
    ("TD-EDM", "EDM"),
    ("TD", "EDM"),
)
"""Which step is compared with which."""
STATES = 8  # whose clean estimates are compared
NUM_STEPS = 18  # of sampling


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write, print."""
    given = _given(words)
    device = _device(given)
    bench = Bench(
        device, given.small, images=64 if given.small else max(1024, given.batch or 0), batch=given.batch
    )
    found: dict[str, Any] = {**_about(device), "small": given.small, "rounds": given.rounds}
    found |= {"steps": {}, "ratios": {}, "samples": {}, "errors": {}}

    def write() -> None:
        write_atomically(Path(given.out), json.dumps(found, indent=2, ensure_ascii=False) + "\n")

    def attempt(name: str, check: Callable[[], None]) -> None:
        try:
            _free(device)
            check()
        except Exception as error:  # a GPU's time is dear: the others go on, and this one is told
            found["errors"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        write()
        print(f"{name}: {found['errors'].get(name, 'done')}", flush=True)

    try:
        write()  # what cannot be written is known before anything is measured
    except DiffrlError as error:
        sys.exit(f"error: --out: {error}")
    for name in VARIANTS:
        attempt(name, partial(_alone, bench, name, found["steps"]))
    for one, other in OVER:
        attempt(f"{one} over {other}", partial(_over, bench, one, other, given.rounds, found))
    attempt("samples", lambda: found["samples"].update(_samples(bench)))
    if found["errors"]:
        sys.exit(f"error: {len(found['errors'])} checks failed; {given.out} says how")


def _device(given: argparse.Namespace) -> torch.device:
    """Where the checks run; what cannot be is told in one line."""
    kind = given.device.partition(":")[0]
    if kind not in ("cuda", "cpu"):
        sys.exit(f"error: --device is {given.device!r}: give cuda, cuda:1, ... or cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here: give --device cpu --small to try the checks on the processor")
    if given.rounds < 2:
        sys.exit(f"error: --rounds is {given.rounds}: an interval needs at least 2")
    if kind == "cpu" and not given.small:
        sys.exit("error: the checks at full size are for a GPU: give --small too")
    levels = LEVELS[given.small]
    if given.batch is not None and (given.batch < levels or given.batch % levels):
        sys.exit(f"error: --batch is {given.batch}: give a multiple of {levels}, the noise levels of a chain")
    try:
        return usable_device(given.device)
    except DiffrlError as error:
        sys.exit(f"error: --{error}")


def _given(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu, ...")
    parser.add_argument("--small", action="store_true", help="a tiny network and batch")
    parser.add_argument("--batch", type=int, help="states of a step; without it those of the recipe, 512")
    parser.add_argument("--rounds", type=int, default=10, help="ratios of each comparison")
    parser.add_argument("--out", default="gpu_checks.json", help="file to write")
    return parser.parse_args(words)


def _about(device: torch.device) -> dict[str, Any]:
    cuda, tf32 = device.type == "cuda", {"convolutions": torch.backends.cudnn.allow_tf32}
    tf32 |= {"matrices": torch.backends.cuda.matmul.allow_tf32}
    name = torch.cuda.get_device_name(device) if cuda else platform.processor()
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if cuda else None
    return {
        **{"device": str(device), "name": name or platform.machine(), "memory_gib": memory},
        **{"tf32": tf32, "versions": versions()},
    }


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds that have passed once the device has done what it was given; of a processor, its own time."""
    if device.type != "cuda":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _alone(bench: Bench, name: str, steps: dict[str, Any]) -> None:
    """Parameters and states of a step, and the greatest memory of three; where there is none to ask, null."""
    cuda = bench.device.type == "cuda"
    step, parameters = bench.step(VARIANTS[name])
    if cuda:
        gc.collect()  # what building the step left behind is not its own
        torch.cuda.reset_peak_memory_stats(bench.device)
    for _ in range(3 if cuda else 1):
        step()
    peak = torch.cuda.max_memory_allocated(bench.device) / 2**30 if cuda else None
    steps[name] = {"parameters": parameters, "states": bench.states(VARIANTS[name]), "peak_gib": peak}


def _over(bench: Bench, one: str, other: str, rounds: int, found: dict[str, Any]) -> None:
    """Time of one step over that of another."""
    variants = {name: bench.step(VARIANTS[name])[0] for name in (one, other)}
    seconds = interleave(variants, rounds=rounds, warm_up=1 if bench.small else 5, clock=_clock(bench.device))
    found["ratios"][f"{one} over {other}"] = asdict(Ratio.of(seconds, one, other))
    for name in (one, other):
        median = float(np.median(seconds[name]))
        step = found["steps"].setdefault(name, {})
        step |= {"milliseconds": 1e3 * median, "states_per_second": bench.states(VARIANTS[name]) / median}


def _samples(bench: Bench) -> dict[str, Any]:
    """Clean estimates on the device and on the processor, and how long samples take."""
    denoiser = bench.trainer(VARIANTS["EDM"]).denoiser.eval().requires_grad_(False).cpu()
    generator = torch.Generator().manual_seed(0)
    for p in denoiser.parameters():  # a fresh network predicts 0
        p.add_(0.02 * torch.randn(p.shape, generator=generator))
    here, shape = copy.deepcopy(denoiser).to(bench.device), bench.data.event_shape
    off = _largest_difference(denoiser, here, shape)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        exact = _largest_difference(denoiser, here, shape)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    count, clock = 4 if bench.small else 256, _clock(bench.device)
    cond = (torch.arange(count) % bench.data.num_classes).to(bench.device)
    seconds = []
    for _ in range(2):  # the first one warms up
        start = clock()
        samples = diffrl.sample(
            here,
            (count, *shape),
            sampler=diffrl.Heun(),
            num_steps=NUM_STEPS,
            cond=cond,
            seed=0,
            device=bench.device,
        )
        seconds.append(clock() - start)
    return {
        "samples": count,
        "evaluations": 2 * NUM_STEPS - 1,
        "seconds": seconds[-1],
        "per_second": count / seconds[-1],
        "finite": bool(samples.isfinite().all()),
        "largest_difference_from_cpu": off,
        "largest_difference_from_cpu_without_tf32": exact,
    }


def _largest_difference(denoiser: Denoiser, here: Denoiser, shape: tuple[int, ...]) -> float:
    """Of clean estimates of the same states, by one on the processor and its copy elsewhere, over the largest."""
    generator = torch.Generator().manual_seed(1)
    sigma, labels = torch.logspace(-2, 1, STATES), torch.arange(STATES)
    x = torch.randn(STATES, *shape, generator=generator) * (1 + sigma.view(-1, 1, 1, 1))
    D, device = denoiser(x, sigma, labels), next(here.parameters()).device
    found = here(*(a.to(device) for a in (x, sigma, labels))).cpu()
    return float((found - D).abs().max() / D.abs().max())


if __name__ == "__main__":
    main()
