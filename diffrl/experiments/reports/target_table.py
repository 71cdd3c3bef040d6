"""The part of a training report on targets: bias and variance of each, and which of them foretells the outcome."""

from collections.abc import Mapping

import numpy as np

from diffrl.experiments.reports.agreement import rank_correlation
from diffrl.experiments.reports.parts import folded
from diffrl.experiments.study_findings import Panel
from diffrl.metrics.intervals import interval

__all__ = ["foretold", "targets"]

PARTS = {"bias_sq": "bias²", "variance": "variance", "total": "their sum"}
OWN = {"own": "the network's own error there"}


def targets(panel: Panel) -> str:
    """A table of targets beside what came of them, and their rank correlations; empty where no target was measured."""
    having = [scheme for scheme in panel.compared if _parts(panel, scheme)]
    if not having:
        return ""
    rows = [["scheme", *PARTS.values(), *OWN.values(), "distance of samples, mean over NFE"]]
    for scheme in having:
        found = _parts(panel, scheme)
        cells = [f"{interval(found[part]):#.3g}" if part in found else "" for part in (*PARTS, *OWN)]
        rows.append([scheme, *cells, f"{interval(_outcome(panel, scheme)):#.3g}"])
    table = folded("Targets against their oracle, at the trained networks", rows)
    correlations = {part: values for part, values in foretold(panel).items() if len(values)}
    if not correlations:
        return table
    told = ", ".join(f"{PARTS[part]} {interval(values):.2f}" for part, values in correlations.items())
    return f"{table}\nRank correlation over {len(having)} schemes with the distance of samples: {told}.\n"


def foretold(panel: Panel) -> Mapping[str, list[float]]:
    """The rank correlation over schemes of each part of a target's error with the distance of samples, by seed.

    The distance is the geometric mean over numbers of evaluations. A seed counts if at least three schemes have both.

    Raises:
        MissingExtra: scipy is not installed.
    """
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for seed in panel.study.seeds:
        here = [s for s in panel.compared if seed in panel.seeds(s) and _parts(panel, s)]
        if len(here) < 3:
            continue
        outcomes = [_outcome(panel, s)[panel.seeds(s).index(seed)] for s in here]
        for part, values in found.items():
            errors = [_parts(panel, s)[part][panel.seeds(s).index(seed)] for s in here]
            values.append(rank_correlation(errors, outcomes))
    return found


def _parts(panel: Panel, scheme: str) -> dict[str, list[float]]:
    """Each part at each seed of a scheme; empty where its target was not measured."""
    of_seeds = [panel.cells[scheme][seed].figures.get("target_error", {}) for seed in panel.seeds(scheme)]
    if not all(of_seeds):
        return {}
    return {part: [found[part] for found in of_seeds] for part in of_seeds[0]}


def _outcome(panel: Panel, scheme: str) -> list[float]:
    """The geometric mean of sample distances over numbers of evaluations, at each seed."""
    distances = [
        panel.cells[scheme][seed].figures["sample_distance"]["by_nfe"] for seed in panel.seeds(scheme)
    ]
    return [float(np.exp(np.mean(np.log([*found.values()])))) for found in distances]
