"""Models as files: what is loaded is what was saved, without data, optimiser or pickle; others' files are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import diffrl
from diffrl.diffusion.networks.registry import NETWORKS
from diffrl.errors import FileError, InputError, InputTypeError


def denoise(denoiser: diffrl.Denoiser, shape: tuple[int, ...], cond: Tensor | None = None) -> Tensor:
    g = torch.Generator().manual_seed(0)
    dtype = next(denoiser.parameters()).dtype
    with torch.no_grad():
        t = denoiser.process.time_grid(3)[:3]
        D = denoiser(torch.randn(3, *shape, generator=g).to(dtype), t, cond)
    assert isinstance(D, Tensor) and bool(D.isfinite().all())
    return D


def randomised(network: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.1
    return network


@pytest.mark.parametrize("process", [diffrl.EDM(sigma_max=50.0), diffrl.DDPM(), diffrl.VP(kind="cosine")])
@pytest.mark.parametrize("name", ["mlp", "unet"])
def test_what_is_loaded_is_what_was_saved(name: str, process: Any, tmp_path: Path) -> None:
    shape = (2,) if name == "mlp" else (1, 8, 8)
    options = {"hidden": 12, "depth": 2} if name == "mlp" else {"channels": 8, "multipliers": (1, 2)}
    network = randomised(NETWORKS[name](shape, 3, **options))
    kind = "edm" if isinstance(process, diffrl.EDM) else "eps"
    saved = diffrl.Denoiser(network, process, sigma_data=0.7, prediction_type=kind)
    path = diffrl.save(saved, tmp_path / "new" / "model.safetensors")
    before = torch.get_rng_state()
    model = diffrl.load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert (
        model.denoiser.process == process and model.events[:2] == (shape, 3) and not model.denoiser.training
    )
    cond = torch.tensor([0, 2, 3])
    assert torch.equal(denoise(model.denoiser, shape, cond), denoise(saved.eval(), shape, cond))
    one, two = (
        model.sample(4, num_steps=3, seed=1),
        model.sample(4, num_steps=3, sampler=diffrl.DDIM(), seed=1),
    )
    assert one.shape == (4, *shape) and torch.equal(one, two)
    assert all(p.requires_grad for p in model.denoiser.parameters())  # for training on
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    with pytest.raises(
        InputError, match="model.safetensors is a model file or folder, and tells nothing of data"
    ):
        print(model.data)


def test_float64_stays(tmp_path: Path) -> None:
    saved = diffrl.Denoiser(randomised(diffrl.networks.MLP((2,), hidden=8)), diffrl.EDM()).double()
    loaded = diffrl.load(diffrl.save(saved, tmp_path / "m.safetensors")).denoiser
    assert torch.equal(denoise(loaded, (2,)), denoise(saved, (2,)))
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}


class Mine(nn.Module):
    """A network of the user's own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.layer(torch.cat([x, c_noise[:, None]], 1))))
        return out


def test_a_network_of_ones_own_is_given_again(tmp_path: Path) -> None:
    saved = diffrl.Denoiser(randomised(Mine()), diffrl.EDM())
    with pytest.raises(InputError, match="no attribute event_shape: give event_shape"):
        diffrl.save(saved, tmp_path / "m.safetensors")
    path = diffrl.save(saved, tmp_path / "m.safetensors", event_shape=(2,))
    with pytest.raises(InputError, match=r"author's own: .*diffrl\.load\(path, network=\.\.\.\)"):
        diffrl.load(path)
    model = diffrl.load(path, network=Mine())
    assert torch.equal(denoise(model.denoiser, (2,)), denoise(saved, (2,)))
    with pytest.raises(InputError, match="weights in .* are of another network: .*size mismatch") as refused:
        diffrl.load(path, network=Mine(width=5))
    assert "\n" not in str(refused.value)


def test_a_model_of_a_run_is_handed_over(tmp_path: Path) -> None:
    """What is saved from a run folder draws the run's samples."""
    from tests.kit.runs import run

    trained = diffrl.load(run(tmp_path / "run", "compare=false", "trainer.grad_steps=4").path)
    model = diffrl.load(diffrl.save(trained.denoiser, tmp_path / "model.safetensors"))
    heun = diffrl.Heun()
    assert torch.equal(model.sample(4, num_steps=3, sampler=heun), trained.sample(4, num_steps=3))


# What is refused


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return diffrl.save(
        diffrl.Denoiser(diffrl.networks.MLP((2,), hidden=8), diffrl.EDM()), tmp_path / "m.safetensors"
    )


@pytest.mark.parametrize("size", [0, 7, 100, 2000, -1])
def test_a_file_that_is_cut(model_file: Path, size: int) -> None:
    model_file.write_bytes(model_file.read_bytes()[:size])
    with pytest.raises(FileError, match=r"m\.safetensors is damaged .*: get the file again") as refused:
        diffrl.load(model_file)
    assert "\n" not in str(refused.value)


def described(path: Path, change: Any) -> Path:
    """The file with another description."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()["diffrl"])
    safetensors.torch.save_file(tensors, path, {"diffrl": json.dumps(change(told))})
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda told: [], "no model of diffrl"),
        (lambda told: {**told, "format": 9}, "format 9, and this diffrl reads 1: upgrade"),
        (lambda told: {k: v for k, v in told.items() if k != "process"}, "cannot be followed .*process"),
        (
            lambda told: {**told, "network": {"name": "os.system"}},
            "author's own, 'os.system': import the module",
        ),
        (lambda told: {**told, "process": {"name": "edm", "sigma_min": "x"}}, "cannot be followed"),
        (lambda told: {**told, "process": {"name": "edm", "nope": 1}}, "cannot be followed"),
        (lambda told: {**told, "event_shape": "ab"}, "cannot be followed"),
        (lambda told: {**told, "event_shape": None}, "cannot be followed"),
        (
            lambda told: {**told, "denoiser": {**told["denoiser"], "sigma_data": -1}},
            "cannot be followed .*sigma_data",
        ),
        (lambda told: {**told, "dtype": "float3"}, "cannot be followed .*float3"),
        (lambda told: {**told, "denoiser": {**told["denoiser"], "scale_input": "no"}}, "scale_input is 'no'"),
        (lambda told: {**told, "denoiser": {"sigma_data": 0.5}}, "cannot be followed .*prediction_type"),
        (lambda told: {**told, "network": {**told["network"], "hidden": 2**16}}, "of another network"),
        (lambda told: {**told, "network": {**told["network"], "hidden": 2**40}}, "cannot be followed"),
    ],
)
def test_a_description_that_cannot_be_followed(model_file: Path, change: Any, says: str) -> None:
    with pytest.raises((FileError, InputError), match=says) as refused:
        diffrl.load(described(model_file, change))
    assert "\n" not in str(refused.value) and "m.safetensors" in str(refused.value)


def rewritten(path: Path, change: Callable[[Tensor], Tensor]) -> Path:
    """The file with other weights."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: change(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        safetensors.torch.save_file(tensors, path, file.metadata())
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_computed_in_that_of_the_description(
    model_file: Path, dtype: torch.dtype
) -> None:
    """As a converted file has them: the same function up to their rounding, and samples in float32."""
    whole = diffrl.load(model_file).denoiser
    found = diffrl.load(rewritten(model_file, lambda w: w.to(dtype)))
    assert {p.dtype for p in found.denoiser.parameters()} == {torch.float32}
    assert found.sample(2, num_steps=2).dtype == torch.float32
    torch.testing.assert_close(denoise(found.denoiser, (2,)), denoise(whole, (2,)), rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda w: w.masked_fill(torch.ones_like(w, dtype=torch.bool), torch.nan),
            "holds NaN or infinity in its weights",
        ),
        (lambda w: w.long(), "of another network"),
    ],
)
def test_weights_that_cannot_be_used(model_file: Path, change: Any, says: str) -> None:
    with pytest.raises((FileError, InputError), match=says) as refused:
        diffrl.load(rewritten(model_file, change))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_weights_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(FileError, match="holds weights, but no model of diffrl.save"):
        diffrl.load(path)
    torch.save({"w": torch.zeros(3)}, tmp_path / "theirs.pt")
    with pytest.raises(FileError, match="theirs.pt is damaged"):
        diffrl.load(tmp_path / "theirs.pt")
    with pytest.raises(FileError, match="nowhere.safetensors cannot be read"):
        diffrl.load(tmp_path / "nowhere.safetensors")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's compiler uses it
@pytest.mark.parametrize("part", ["denoiser", "network"])
def test_what_was_compiled_is_loaded_as_if_it_were_not(part: str, tmp_path: Path) -> None:
    network = randomised(diffrl.networks.MLP((2,), hidden=8))
    before = denoise(diffrl.Denoiser(network, diffrl.EDM()), (2,))
    compiled: Any = torch.compile(network) if part == "network" else network
    compiled = diffrl.Denoiser(compiled, diffrl.EDM())
    compiled = torch.compile(compiled) if part == "denoiser" else compiled
    path = diffrl.save(compiled, tmp_path / "m.safetensors")
    assert torch.equal(denoise(diffrl.load(path).denoiser, (2,)), before)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    denoiser = diffrl.Denoiser(diffrl.networks.MLP((2,), hidden=8), diffrl.EDM())
    with pytest.raises(InputError, match=r"model\.pt .*ends with \.safetensors"):
        diffrl.save(denoiser, tmp_path / "model.pt")
    exact = diffrl.GaussianDenoiser(diffrl.EDM(), torch.zeros(2), torch.eye(2))
    with pytest.raises(InputTypeError, match="denoiser is a GaussianDenoiser"):
        diffrl.save(exact, tmp_path / "m.safetensors")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(FileError, match="cannot be written"):
        diffrl.save(denoiser, tmp_path / "file" / "m.safetensors")
    path = diffrl.save(denoiser, tmp_path / "m.safetensors")
    before = path.read_bytes()
    if Path("/dev/full").exists():
        (tmp_path / "m.safetensors.tmp").symlink_to("/dev/full")
        with pytest.raises(FileError, match="No space left on device"):
            diffrl.save(diffrl.Denoiser(randomised(denoiser.network), diffrl.EDM()), path)
        assert path.read_bytes() == before
