"""The runs of each part of the study, and a file that keeps what is finished."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from diffrl.errors import FileError
from diffrl.text_files import read_text, write_atomically
from stall.ground import Run, train

SEEDS = (21, 22, 23)  # none of them is a mixture of the pilot's
MC, OWN, SLOW = Run(target="monte_carlo"), Run(target="own"), Run(target="slow", decay=0.98)
FLOW: dict[str, Any] = {"process": "flow", "dim": 16, "steps": 1500}
DDPM: dict[str, Any] = {"process": "ddpm", "dim": 16, "steps": 1500, "batch": 8}


def _seeds(*runs: Run) -> list[Run]:
    return [replace(run, seed=seed) for run in runs for seed in SEEDS]


def _betas(run: Run, *betas: float) -> list[Run]:
    return [replace(run, beta1=beta) for beta in betas]


PARTS: dict[str, list[Run]] = {
    "baseline": _seeds(*_betas(MC, 0.9, 0.5, 0.0), *_betas(OWN, 0.9, 0.5, 0.0), SLOW),
    "momentum": [
        *_seeds(*(replace(OWN, correction=c) for c in ("diagonal", "first order", "transport"))),
        *(replace(MC, correction=c) for c in ("first order", "transport")),
    ],
    "sgd": [
        replace(run, optimiser="sgd", lr=lr, beta1=beta)
        for run in (MC, OWN)
        for lr in (0.1, 0.3, 1.0, 3.0)
        for beta in (0.0, 0.9)
    ],
    "rates": [
        *(replace(run, lr=lr) for lr in (5e-4, 1e-3) for run in (MC, OWN)),
        *(replace(run, lr=lr) for lr in (4e-3, 8e-3) for run in (MC, *_betas(OWN, 0.5))),
        *_betas(OWN, 0.7, 0.8),
    ],
    "switch": [
        *_seeds(replace(OWN, then=0.5, at=400), replace(OWN, beta1=0.5, at=400)),
        *(replace(OWN, then=0.5, at=at) for at in (100, 200)),
        replace(OWN, after="monte_carlo", at=400),
        replace(OWN, after="monte_carlo", at=400, forget=True),
        *_seeds(*(replace(run, then=0.5, at=400, recentre=True) for run in (OWN, *_betas(OWN, 0.5)))),
        *(replace(run, norm=True) for run in (MC, OWN, *_betas(OWN, 0.5))),
        *(replace(OWN, warmup=warmup) for warmup in (400, 1000)),
    ],
    "levels": _seeds(
        *_betas(replace(MC, levels="apart"), 0.9, 0.0), *_betas(replace(OWN, levels="apart"), 0.9, 0.0)
    ),
    "lag": [
        *(replace(SLOW, decay=decay) for decay in (0.5, 0.8, 0.9, 0.95, 0.99)),
        *(replace(SLOW, decay=0.0, every=every) for every in (2, 3, 5, 20)),
    ],
    "step": [
        *_seeds(
            *_betas(replace(MC, moment_of="own"), 0.9, 0.5),
            *_betas(replace(OWN, moment_of="monte_carlo"), 0.9, 0.5),
        ),
        *_betas(replace(MC, step_of="own"), 0.5),
        *_betas(replace(OWN, step_of="monte_carlo"), 0.9, 0.5),
    ],
    "noise": [
        *_seeds(*(replace(run, exact=True) for run in (MC, OWN, *_betas(OWN, 0.5)))),
        *(replace(run, batch=256) for run in (MC, OWN, *_betas(OWN, 0.5, 0.0))),
    ],
    "processes": [
        *_seeds(
            *(replace(run, **FLOW) for run in (MC, OWN, *_betas(OWN, 0.5), SLOW, replace(OWN, value="clean")))
        ),
        *(
            replace(run, **FLOW)
            for run in (replace(OWN, beta1=0.0), replace(OWN, lr=5e-4), replace(OWN, first=0.0))
        ),
        replace(OWN, **FLOW, value="clean", beta1=0.5),
        replace(OWN, **FLOW, lmbda=0.9),
        *_seeds(*(replace(run, **DDPM) for run in (MC, OWN, *_betas(OWN, 0.5), SLOW))),
        *(
            replace(run, **DDPM)
            for run in (replace(OWN, lr=5e-4), replace(OWN, value="clean"), replace(OWN, lmbda=0.9))
        ),
    ],
}


def name(run: Run) -> str:
    """What differs from the default run, in one line: "own, beta1=0.5"."""
    differ = [
        f.name for f in fields(run) if f.name not in ("target", "seed") and getattr(run, f.name) != f.default
    ]
    return ", ".join([run.target, *(f"{key}={getattr(run, key)}" for key in differ)])


def _key(run: Run) -> str:
    return f"{name(run)}, seed {run.seed}"


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines. A last line that was cut short is taken away, so that its run is made again.

    Raises:
        FileError: another line is damaged.
    """
    whole, _, cut = (read_text(path) if path.exists() else "").rpartition("\n")
    if cut:
        write_atomically(path, f"{whole}\n" if whole else "")
    rows = []
    for i, line in enumerate(whole.splitlines()):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise FileError(
                f"{path}, line {i + 1} is damaged: remove it, and its run is made again"
            ) from error
    return rows


class Kept:
    """Finished runs in a file of JSON lines, by all that they depend on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in kept_rows(path)}

    def look(self, run: Run) -> dict[str, Any] | None:
        """The result of a run that is finished."""
        return self.rows.get(_key(run))

    def get(self, run: Run) -> dict[str, Any]:
        """The result of a run, which is made if it is missing."""
        key = _key(run)
        if key not in self.rows:
            found = train(run)
            print(f"{name(run)}, seed {run.seed}: {found['error']:.3g}", flush=True)
            rounded = {**found, "levels": [float(f"{e:.4g}") for e in found["levels"]]}
            rounded["curve"] = [(k, float(f"{e:.4g}")) for k, e in found["curve"]]
            self.rows[key] = {"key": key, **rounded}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]
