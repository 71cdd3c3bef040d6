"""The recipes for images: each composes, costs what its first lines say, and passes the check in a small form."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffrl.configs.cli import settings
from diffrl.diffusion.networks.unet import UNet
from diffrl.diffusion.networks.unet_blocks import Attention
from diffrl.experiments.check_run import check_run
from diffrl.training.build import Events, build_denoiser
from tests.kit.configs import IMAGE_RECIPES, composed
from tests.kit.lpips import lpips_weights, vgg
from tests.kit.paths import ROOT

EVENTS = {
    **dict.fromkeys(("cifar10_edm", "cifar10_td_edm", "cifar10_short"), Events((3, 32, 32), 10)),
    **{"cifar10_td_ct": Events((3, 32, 32)), "mnist": Events((1, 28, 28)), "folder64": Events((3, 64, 64))},
}
SMALL = [
    *("device=cpu", "dtype=float32", "network.channels=8", "network.blocks=1", "network.head_channels=8"),
    *("network.noise_features=4", "trainer.batch_size=2", "chain.num_steps=4"),
    *("eval.points=4", "eval.samples=4", "eval.num_steps=[2]"),
]


def recipe(name: str, *words: str) -> dict[str, Any]:
    given = [f"experiment={name}", "data.path=images", *words]
    return settings(composed(*given), given)


def multiplications(network: UNet) -> int:
    """Of one evaluation of one image: those of convolutions, layers and attention, counted by hand."""
    C, H, W = network.event_shape
    levels = [i // network.blocks for i in range(len(network.down))]
    deepest = levels[-1]

    def of(part: nn.Module, level: int) -> int:
        pixels = (H >> level) * (W >> level)
        found = 0
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                found += module.weight.numel() * pixels
            if isinstance(module, nn.Linear):
                found += module.weight.numel()
            if isinstance(module, Attention):
                found += 2 * pixels**2 * module.out.in_channels
        return found

    found = sum(of(part, 0) for part in (network.first, network.last, network.noise_embedding))
    found += network.noise_embedding[0].frequencies.numel()
    found += of(network.middle, deepest) + of(network.attention, deepest)
    for i, level in enumerate(levels):
        up = len(levels) - 1 - i  # the way up goes through the levels backwards
        found += of(network.down[i], level) + of(network.attend_down[i], level)
        found += of(network.up[up], level) + of(network.attend_up[up], level)
    return found


def test_the_multiplications_counted_are_those_that_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = UNet((3, 8, 8), 2, channels=8, attention=True, attention_resolutions=(4,))
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert 2 * multiplications(network) == counter.get_total_flops()


@pytest.mark.parametrize("name", sorted(IMAGE_RECIPES))
def test_a_recipe_costs_what_it_says(name: str) -> None:
    """Its network is built without memory, at its full width."""
    text = (ROOT / "configs" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    for part in ("Source: ", "Cost: ", "What differs"):
        assert part in comments
    said = re.search(
        r"([\d,]+) parameters; ([\d,]+) steps, which are ([\d,]+) evaluations .*? of ([\d.]+) thousand million "
        r"multiplications",
        comments,
    )
    assert said is not None
    parameters, steps, evaluations = (int(said[i].replace(",", "")) for i in (1, 2, 3))
    config = recipe(name)
    with torch.device("meta"):
        network = build_denoiser(config, EVENTS[name]).network
    assert parameters == sum(p.numel() for p in network.parameters())
    assert float(said[4]) == round(multiplications(network) / 1e9, 2)
    assert steps == config["trainer"]["grad_steps"]
    assert evaluations == steps * config["trainer"]["batch_size"]


def test_cifar10_has_the_published_numbers() -> None:
    edm, td = recipe("cifar10_edm"), recipe("cifar10_td_edm")
    for config, lr, reduction in ((edm, 1e-3, "sum"), (td, 2e-4, "mean_over_batch")):
        optim, trainer = config["optim"], config["trainer"]
        assert trainer["batch_size"] * trainer["grad_steps"] == 200_000_000
        assert abs(trainer["batch_size"] * optim["warmup_steps"] - 10_000_000) < trainer["batch_size"]
        assert (optim["name"], optim["lr"], optim["decay"], optim["clip_norm"]) == ("adam", lr, "none", None)
        assert (trainer["augment"], trainer["label_dropout"], trainer["reduction"]) == (0.12, 0, reduction)
        assert (config["ema"]["halflife"], config["ema"]["ramp"]) == (500_000, 0.05)
        assert (config["network"]["dropout"], config["data"]["conditional"]) == (0.13, True)
    published = {"span": 3, "stride": 0.2, "num_steps": 18, "denoising_coef": 0.5, "coupling": "markov"}
    assert published.items() <= td["objective"].items() and td["objective"]["weight"] == "edm"
    assert td["target"]["decay"] is None  # that of the objective: 0.999
    same = {"objective", "optim", "trainer"}
    assert {k: v for k, v in edm.items() if k not in same} == {k: v for k, v in td.items() if k not in same}


def test_td_ct_has_the_published_numbers() -> None:
    config = recipe("cifar10_td_ct")
    objective, optim, trainer = config["objective"], config["optim"], config["trainer"]
    assert (trainer["batch_size"], trainer["grad_steps"], trainer["reduction"]) == (512, 800_001, "mean")
    assert (optim["name"], optim["lr"], optim["warmup_steps"]) == ("radam", 2e-4, 0)
    assert (optim["decay"], optim["clip_norm"], optim["betas"]) == ("none", None, [0.9, 0.999])
    published = {
        "s_0": 2,
        "s_1": 150,
        "mu_0": 0.9,
        "stride": 0.25,
        "consistency_coef": 0.5,
        "metric": "lpips",
    }
    assert {
        **published,
        "td_weight": "sum",
        "ct_weight": "uniform",
        "kappa": "markov",
    }.items() <= objective.items()
    assert 0.5 ** (512 / config["ema"]["halflife"]) == pytest.approx(0.9999, abs=1e-9)
    assert config["ema"]["ramp"] is None
    assert (config["network"]["dropout"], config["data"]["conditional"], config["data"]["flip"]) == (
        0,
        False,
        True,
    )
    assert (
        config["denoiser"] | {"prediction_type": "consistency", "time_input": "c_noise"} == config["denoiser"]
    )
    sizes = ("channels", "multipliers", "blocks", "attention_resolutions", "head_channels")
    assert all(config["network"][k] == recipe("cifar10_edm")["network"][k] for k in sizes)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder of two classes, and an idx file, by the kind of data that reads them."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(20):
        path = folder / "folder" / str(i % 2) / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    pixels = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    head = bytes([0, 0, 8, 3, *(b for n in pixels.shape for b in (0, 0, 0, n))])
    (folder / "x.idx").write_bytes(head + pixels.tobytes())
    (folder / "lpips").mkdir()
    g = torch.Generator().manual_seed(0)
    torch.save(lpips_weights(vgg(nn.AvgPool2d, g), g), folder / "lpips" / "all.pth")
    return {name: str(folder / name) for name in ("folder", "lpips")} | {"idx": str(folder / "x.idx")}


@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize("name", sorted(IMAGE_RECIPES))
def test_a_small_form_trains_and_passes_the_check(name: str, images: dict[str, str]) -> None:
    config = recipe(name, *SMALL)
    config["data"]["path"] = images[config["data"]["name"]]
    if config["objective"].get("metric") == "lpips":
        config["objective"]["metric_weights"] = images["lpips"]
    report = check_run(config)
    assert report.passed, str(report)
