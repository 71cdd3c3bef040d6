"""The card of a model that is handed over: what it is, how to sample from it, how it was trained, what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffrl.data.splits import Split
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.registry import NETWORKS
from diffrl.experiments.reports.parts import reward_label
from diffrl.experiments.reports.run_table import (
    count_label,
    data_label,
    figure_rows,
    judged_label,
    objective_label,
)
from diffrl.finetuning.evaluation import TO_BASE, to_base_of
from diffrl.text_tables import markdown_table
from diffrl.training.model_folders import FILES
from diffrl.training.teachers import named_teacher

__all__ = ["model_card"]

STEPS = 18  # of the example, where no run says how many
JUDGED = {
    "eval_reward": "reward, on held-out noise",
    "heldout_reward": "held-out reward, never trained on",
    "kl_to_base": "KL to the base, nats a chain",
    TO_BASE: "distance to the base",
    "diversity": "diversity",
}
UNKNOWN = "Nothing is recorded of its training: write here on what data, how, and with what result."


def model_card(
    denoiser: Denoiser,
    description: Mapping[str, Any],
    *,
    name: str,
    config: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    objective: str = "",
    averaged: bool = False,
) -> str:
    """The text of README.md, in Markdown with the head that model hubs read; the licence is left to the user.

    Args:
        denoiser: the model.
        description: what config.json says of it.
        name: of its folder, for the example.
        config: of the run that made it, if one did.
        results: of that run.
        objective: of a training run, the one that trained it.
        averaged: whether the weights are averaged ones, with those of the last step beside them.
    """
    config, results = config or {}, results or {}
    lines = [*_head(description), f"# {_title(description, config)}\n", *_what_it_is(denoiser, description)]
    lines += _sampling(name, description, config)
    lines += ["## How it was trained\n"]
    if "trainer" in config:
        lines += _training(config, results, objective)
    elif "loop" in config:
        lines += _tuning(config, results)
    else:
        lines += [f"{UNKNOWN}\n"]
    lines += ["## Files\n", *_files(averaged), "\n## Licence\n"]
    lines += [
        "None is given here: whoever publishes this model chooses one, with regard to the data and to what it was made "
        "from, and writes `license: ...` into the head of this file."
    ]
    return "\n".join(lines) + "\n"


def _head(description: Mapping[str, Any]) -> list[str]:
    images = len(description["event_shape"]) == 3 and not description["num_classes"]
    kind = ["pipeline_tag: unconditional-image-generation"] if images else []
    return ["---", "library_name: diffrl", *kind, "tags:", "- diffusion", "- diffrl", "---\n"]


def _title(description: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if "trainer" in config:
        return f"A diffusion model of {data_label(config)}"
    if "loop" in config:
        return f"A diffusion model tuned for {reward_label(config['reward'])}"
    return f"A diffusion model of samples of shape {tuple(description['event_shape'])}"


def _what_it_is(denoiser: Denoiser, description: Mapping[str, Any]) -> list[str]:
    network = (description["network"] or {"name": type(denoiser.network).__name__})["name"]
    form = ", ".join(f"{key} {value}" for key, value in description["denoiser"].items())
    count = sum(p.numel() for p in denoiser.parameters())
    rows = [
        ["", ""],
        ["samples", f"shape {tuple(description['event_shape'])}"],
        ["labels", f"0 to {description['num_classes'] - 1}" if description["num_classes"] else "none"],
        ["network", f"`{network}`, {count:,} parameters, {description['dtype']}"],
        ["noise process", f"`{denoiser.process}`"],
        ["form", form],
    ]
    return [markdown_table(rows)]


def _sampling(name: str, description: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    steps = config.get("policy", {}).get("num_steps") or max(config.get("eval", {}).get("num_steps", [STEPS]))
    network = description["network"]
    own, module = (
        ("", NETWORKS.entry(network["name"]).module) if network else (", network=network", "diffrl.")
    )
    known = (
        []
        if module.startswith("diffrl.")
        else [f"import {module}  # of its author: it makes the network known"]
    )
    return [
        "## How to sample\n",
        "```python",
        *("import diffrl", *known, ""),
        f'model = diffrl.load("{name}"{own})  # this folder; the data are not needed',
        f"samples = model.sample(16, num_steps={steps}, seed=0)",
        "```\n",
        f'`diffrl.from_pretrained("{name}"{own})` is the denoiser alone, D(x_t, t).\n',
    ]


def _training(config: Mapping[str, Any], results: Mapping[str, Any], objective: str) -> list[str]:
    """How long, on what, and the figures with their numbers of samples."""
    found, length, measured = results.get("objectives", {}).get(objective), config["trainer"], config["eval"]
    steps = length["grad_steps"] if found is None else found["grad_steps"]
    rows = [["", ""], ["data", data_label(config)]]
    rows += [["held out", str(Split(**results["split"]))]] if "split" in results else []
    rows += _made_from(config.get("init"), named_teacher(config["objective"]))
    rows += [
        ["objective", objective_label(objective, config)],
        ["length", f"{steps:,} gradient steps of {length['batch_size']:,} data"],
        ["optimiser", f"{config['optim']['name']}, learning rate {config['optim']['lr']:g}"],
        ["average of the weights", f"half-life {config['ema']['halflife']:g} data"],
        ["seed", str(config["seed"])],
        *_versions(results),
    ]
    if found is None:
        return [
            markdown_table(rows),
            "The run was not finished when this was written: there are no figures.\n",
        ]
    samples = count_label(found["sample_distance"]["metric"])
    return [
        markdown_table(rows),
        "## Figures\n",
        f"Of one run, seed {config['seed']}, n = 1: they have no interval. Errors are taken at up to "
        f"{measured['points']:,} data, distances between the data and {samples}; less is better, but of precision and "
        "recall more. "
        "docs/metrics.md of diffrl defines them.\n",
        markdown_table([["figure", "found"], *figure_rows(found)]),
    ]


def _tuning(config: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """The same of a fine-tuning run: figures before and after."""
    found = results.get("finetuning")
    method = f"{config['surrogate']['name']}, {config['credit']['name']} credit"
    rows = [["", ""], ["tuned for", reward_label(config["reward"])], ["method", method]]
    rows += _made_from(config["model"].get("path"))
    if found is None:
        rows += [["seed", str(config["seed"])]]
        return [
            markdown_table(rows),
            "The run was not finished when this was written: there are no figures.\n",
        ]
    rows += [
        ["length", f"{found['iteration']:,} iterations, {found['queries']:,} queries of the reward"],
        ["seed", str(config["seed"])],
        *_versions(results),
    ]
    before, after = found["base"], found["final"]
    words = {to_base_of(after) if name == TO_BASE else name: label for name, label in JUDGED.items()}
    labels = {name: judged_label(name, label) for name, label in words.items() if name in after}
    figures = [[label, f"{before[k]:#.3g}", f"{after[k]:#.3g}"] for k, label in labels.items()]
    return [
        markdown_table(rows),
        "## Figures\n",
        f"Of one run, seed {config['seed']}, n = 1: they have no interval. They are taken on "
        f"{config['evaluation']['samples']:,} samples. docs/metrics.md of diffrl defines them.\n",
        markdown_table([["figure", "before tuning", "after"], *figures]),
    ]


def _made_from(*sources: str | None) -> list[list[str]]:
    """What it started from or learnt from, whose licence may hold on: the last part of each path."""
    names = [Path(source).name for source in sources if source]
    return [["made from", ", ".join(names)]] if names else []


def _versions(results: Mapping[str, Any]) -> list[list[str]]:
    known = results.get("versions", {})
    return [["made with", ", ".join(f"{k} {known[k]}" for k in ("diffrl", "torch"))]] if known else []


def _files(averaged: bool) -> list[str]:
    told = "the weights, averaged along the training" if averaged else "the weights"
    last = (
        [f"* `{FILES['model']}`: those of the last step, without the average, to train on from"]
        if averaged
        else []
    )
    return [
        f"* `{FILES['ema']}`: {told}",
        *last,
        "* `config.json`: what the network and its noise process are, and how it is sampled",
    ]
