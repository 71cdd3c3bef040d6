"""Student, fake score, surrogate as adapters of one pipeline's network: apart from each other, trained, resumed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffrl import recipes
from diffrl.diffusion.pipelines.denoiser import PipelineDenoiser
from diffrl.diffusion.pipelines.lora import add_lora, load_lora, save_lora
from diffrl.diffusion.pipelines.roles import AdapterDenoiser, BaseDenoiser, worn
from diffrl.diffusion.samplers.ddim import DDIM, Ancestral
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.tdm import TrajectoryMatching
from diffrl.finetuning.methods.tdm_r1 import LearntReward
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.reference import References, frozen_denoiser, trainable_copy
from diffrl.finetuning.run_checks import check_tuner
from diffrl.finetuning.updates.boundaries import BoundaryUpdates
from diffrl.finetuning.updates.preferences import PreferenceUpdates
from diffrl.training.checkpoints import CheckpointError
from diffrl.training.identity import RunChanged
from diffrl.training.optim import Optim
from tests.kit.oracles import generator
from tests.kit.pipeline_policies import EACH, SHAPE, close, denoiser_of, differ, policy_of, rollout, same
from tests.kit.pipeline_policies import states as states_at
from tests.kit.pipelines import PROMPTS, stable_diffusion, z_image
from tests.kit.pipelines import stable_diffusion_3 as sd3
from tests.kit.run_states import assert_equal

PIPES: dict[str, tuple[Callable[[], Any], float, dict[str, Any]]] = {
    "unet": (stable_diffusion, 500.0, {}),
    "transformer": (sd3, 0.5, {"even_levels": True}),
    "z_image": (z_image, 0.5, {}),
}
KINDS = pytest.mark.parametrize("kind", PIPES)


def untuned(kind: str = "unet", dtype: torch.dtype = torch.float32) -> PipelineDenoiser:
    make, _, given = PIPES[kind]
    return denoiser_of(make().to(dtype), **given)


def with_lora(kind: str = "unet", rank: int = 2, random: bool = False, **options: Any) -> PipelineDenoiser:
    denoiser = untuned(kind)
    add_lora(denoiser, rank, generator=generator(1), **{"alpha": 2.0 * rank, **options})
    if random:
        scatter(denoiser.adapters.values(), 2)
    return denoiser


def scatter(parameters: Any, seed: int) -> None:
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=0.2, generator=generator(seed))


def states(kind: str = "unet") -> tuple[Tensor, Tensor, Tensor]:
    return states_at(PIPES[kind][1])


def assert_gradients(parameters: Any) -> None:
    """All are there and finite, and one is not zero."""
    found = [p.grad for p in parameters]
    assert all(g is not None and g.isfinite().all() for g in found) and any(g.any() for g in found)


def numbers(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def twin_of(denoiser: PipelineDenoiser, seed: int | None = None) -> AdapterDenoiser:
    twin = trainable_copy(denoiser.base())
    assert isinstance(twin, AdapterDenoiser)
    if seed is not None:
        scatter(twin.parameters(), seed)
    return twin


# One network, several denoisers


@KINDS
def test_a_twin_is_the_network_under_its_own_adapters(kind: str) -> None:
    """Against a pipeline of its own whose adapters have the same values; nothing stays on the network."""
    denoiser = with_lora(kind, random=True)
    twin, before = twin_of(denoiser, 5), denoiser(*states(kind))
    alone = with_lora(kind)
    alone.load_trainable_state(twin.weights)
    value = twin(*states(kind))
    same(value, alone(*states(kind)))
    assert differ(value, before) and differ(value, denoiser.base()(*states(kind)))
    same(denoiser(*states(kind)), before)
    assert len(list(twin.parameters())) == len(denoiser.adapters) == len(twin.state_dict())


def test_a_network_takes_its_own_adapters_back_after_an_error() -> None:
    denoiser = with_lora(random=True)
    twin, own = twin_of(denoiser, 5), list(denoiser.adapters.values())
    with pytest.raises(ValueError, match="prompts are numbered"):
        twin(*states()[:2], EACH + 7)
    assert all(a is b for a, b in zip(denoiser.adapters.values(), own, strict=True))
    with pytest.raises(RuntimeError, match="inside"), worn(denoiser.network, twin.weights):
        assert next(iter(denoiser.adapters.values())) is next(twin.parameters())
        raise RuntimeError("inside")
    assert all(a is b for a, b in zip(denoiser.adapters.values(), own, strict=True))


@KINDS
def test_no_gradient_reaches_another_role(kind: str) -> None:
    denoiser = with_lora(kind, random=True)
    fake, surrogate = twin_of(denoiser, 5), twin_of(denoiser, 6)
    fake(*states(kind)).square().mean().backward()
    assert_gradients(fake.parameters())
    assert all(p.grad is None for p in (*denoiser.parameters(), *surrogate.parameters()))
    denoiser(*states(kind)).square().mean().backward()
    assert all(p.grad is not None for p in denoiser.adapters.values())
    assert all(p.grad is None for p in surrogate.parameters())
    assert [n for n, p in denoiser.named_parameters() if p.requires_grad] == [
        f"network.{n}" for n in denoiser.adapters
    ]


def test_a_twin_of_the_base_begins_as_the_base_and_can_learn() -> None:
    denoiser = with_lora(random=True)
    twin = twin_of(denoiser)
    torch.testing.assert_close(twin(*states()), denoiser.base()(*states()), rtol=0, atol=1e-6)
    twin(*states()).square().mean().backward()
    up = [p.grad for n, p in twin.weights.items() if ".lora_B." in n]
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in up)


def test_a_reference_is_the_denoiser_as_it_is_now() -> None:
    """New adapters need no copy; trained ones are copied, and nothing else is."""
    fresh, trained = with_lora(), with_lora(random=True)
    assert isinstance(fresh.reference(), BaseDenoiser)
    kept, before = frozen_denoiser(trained), trained(*states())
    assert isinstance(kept, AdapterDenoiser) and not any(p.requires_grad for p in kept.parameters())
    assert frozen_denoiser(kept) is not kept and frozen_denoiser(fresh.base()) is not None
    scatter(trained.adapters.values(), 9)
    same(kept(*states()), before)
    same(frozen_denoiser(kept)(*states()), before)
    assert differ(trained(*states()), before)
    adapters = numbers(trained.adapters.values())
    assert numbers(kept.parameters()) == adapters < 0.2 * numbers(trained.network.parameters())
    with pytest.raises(ValueError, match="no adapters to switch off"):
        untuned().base()


def test_moving_copies_are_adapters_too() -> None:
    denoiser = with_lora(random=True)
    references = References(policy_of(denoiser, DDIM()))
    old, ema = references("old").denoiser, references("ema").denoiser
    first = [p.detach().clone() for p in denoiser.adapters.values()]
    scatter(denoiser.adapters.values(), 9)
    references.before_updates()
    references.after_updates(0.75)
    for p, q, r, s in zip(old.parameters(), ema.parameters(), denoiser.adapters.values(), first, strict=True):
        assert torch.equal(p, r) and not p.requires_grad and not q.requires_grad
        torch.testing.assert_close(q, 0.75 * s + 0.25 * r)
    same(old(*states()), denoiser(*states()))
    torch.testing.assert_close(references("frozen").denoise(*states()), references.frozen.denoise(*states()))


@KINDS
def test_checkpointing_recomputes_with_the_adapters_of_the_forward_pass(kind: str) -> None:
    """Student and twin are both forwarded before either goes backward, and the base is asked between."""
    gradients = []
    for checkpointing in (False, True):
        denoiser = with_lora(kind, random=True)
        twin = twin_of(denoiser, 5)
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        first, second = denoiser(*states(kind)), twin(*states(kind))
        denoiser.base()(*states(kind))
        second.square().mean().backward(retain_graph=True)
        first.square().mean().backward()
        second.square().mean().backward()  # once more: it recomputes again
        gradients.append([p.grad for p in (*denoiser.adapters.values(), *twin.parameters())])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None and again is not None
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.soak
def test_a_compiled_network_wears_adapters_too() -> None:
    """Of one role see tests/diffusion/test_pipelines.py."""
    pipe = stable_diffusion()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    compiled = denoiser_of(pipe)
    add_lora(compiled, 2, alpha=4.0, generator=generator(1))
    plain, twin = twin_of(with_lora(), 5), twin_of(compiled, 5)
    before = compiled(*states())
    for seed in (6, 7):
        scatter(plain.parameters(), seed)
        scatter(twin.parameters(), seed)
        close(twin(*states()), plain(*states()))
        close(compiled(*states()), before)


def test_checkpointing_by_other_means_is_refused_for_a_role() -> None:
    denoiser = with_lora(random=True)
    twin = twin_of(denoiser, 5)
    denoiser.network.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match=r"own enable_gradient_checkpointing\(\)"):
        twin(*states())
    with torch.no_grad():
        twin(*states())
    denoiser.enable_gradient_checkpointing()
    twin(*states()).sum().backward()


@pytest.mark.parametrize("kind", ["unet", "transformer"])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_networks_keep_float32_adapters(kind: str, autocast: bool) -> None:
    denoiser = untuned(kind, torch.bfloat16)
    add_lora(denoiser, 2, generator=generator(1))
    twin = twin_of(denoiser, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            denoiser.base()(*states(kind))
        value = twin(*states(kind))
    value.square().mean().backward()
    assert {p.dtype for p in twin.parameters()} == {torch.float32} and value.dtype == torch.float32
    assert_gradients(twin.parameters())


# TDM and TDM-R1 on a pipeline

W = 4.5


def never(x0: Any, cond: Any) -> Any:
    raise AssertionError("distillation has no reward")


class Bright:
    """A black box that counts its samples."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, x0: Tensor, cond: Any) -> list[float]:
        assert not torch.is_grad_enabled() and not x0.requires_grad
        self.samples += len(x0)
        values: list[float] = x0.mean((1, 2, 3)).tolist()
        return values


def small_recipe(method: str, kind: str) -> recipes.Recipe:
    if method == "tdm":
        return recipes.tdm(
            rollouts=recipes.Rollouts(4),
            updates=BoundaryUpdates(draws=2, passes=2),
            surrogate=TrajectoryMatching(guidance_scale=W, fake_updates=2, fake_lr=1e-3),
        )
    late = 250.0 if kind == "unet" else 0.25
    return recipes.tdm_r1(
        rollouts=recipes.Rollouts(8, group_size=4),
        updates=PreferenceUpdates(draws=2, preference_t_min=2.2 * late, reward_t_min=late, micro_batch=6),
        surrogate=LearntReward(
            guidance_scale=W, surrogate_guidance=2.5, fake_lr=1e-3, surrogate_lr=1e-3, truncated=3
        ),
    )


def tuner_of(
    method: str, kind: str, denoiser: PipelineDenoiser | None = None, iterations: int = 3, **options: Any
) -> Finetuner:
    denoiser = with_lora(kind) if denoiser is None else denoiser
    policy = DenoisingPolicy(denoiser, DDIM(), num_steps=4, reduction="mean")
    given: dict[str, Any] = {
        "event_shape": SHAPE,
        "conditions": EACH,
        "length": Iterations(iterations, checkpoint_every=iterations),
        "optim": Optim(1e-3, betas=(0.0, 0.999), warmup_steps=0, decay="none"),
        **options,
    }
    reward = given.pop("reward", never if method == "tdm" else Bright())
    return Finetuner(policy, reward, small_recipe(method, kind), **given)


def denoisers(tuner: Finetuner) -> dict[str, dict[str, Tensor]]:
    """The adapters of every role."""
    own = {"policy": tuner.policy.denoiser.adapters}
    own |= {name: twin.denoiser.weights for name, twin in tuner.references.twins.items()}
    return {name: {n: p.detach().clone() for n, p in found.items()} for name, found in own.items()}


@pytest.mark.parametrize("method", ["tdm", "tdm_r1"])
@KINDS
def test_only_adapters_change_and_each_roles_do(method: str, kind: str) -> None:
    denoiser = with_lora(kind)
    tuner = tuner_of(method, kind, denoiser)
    frozen = {n: p.detach().clone() for n, p in denoiser.named_parameters() if not p.requires_grad}
    before, roles = denoisers(tuner), {"tdm": {"fake"}, "tdm_r1": {"fake", "surrogate", "slow"}}[method]
    check_tuner(tuner)  # it asks the reward about samples of its own
    checked = getattr(tuner.reward.reward, "samples", 0)
    rows = list(tuner.steps())
    assert before.keys() == roles | {"policy"}
    for row in rows[1:]:
        told = {k: v for k, v in row.items() if "loss" in k or "grad_norm" in k or "direction" in k}
        assert len(told) >= 4 and all(torch.tensor(v).isfinite() for v in told.values())
    for name, tensor in denoiser.named_parameters():
        if name in frozen:
            assert torch.equal(tensor, frozen[name]), name
    after = denoisers(tuner)
    for role, found in before.items():
        moved = [n for n, tensor in found.items() if not torch.equal(tensor, after[role][n])]
        assert any(".lora_B." in n for n in moved), role
    flat = {role: torch.cat([t.flatten() for t in found.values()]) for role, found in after.items()}
    names = sorted(flat)
    assert all(not torch.equal(flat[a], flat[b]) for a in names for b in names if a < b)
    asked = getattr(tuner.reward.reward, "samples", 0) - checked
    assert asked == tuner.figures["queries"] == (0 if method == "tdm" else 3 * 8)


def stopped_and_gone_on(make: Callable[[], Finetuner], step: int) -> Finetuner:
    """Two tuners of one folder: the first is stopped after a step, the second goes on to the end."""
    part, rest = make(), make()
    assert not part.fit(stop=lambda: part.step == step, progress=False)
    assert rest.resume()
    rest.fit(progress=False)
    return rest


@pytest.mark.parametrize(("method", "kind"), [("tdm", "unet"), ("tdm_r1", "transformer"), ("tdm_r1", "unet")])
def test_a_stopped_run_of_adapters_ends_as_one_that_was_not(method: str, kind: str, tmp_path: Path) -> None:
    whole = tuner_of(method, kind)
    whole.fit(progress=False)
    rest = stopped_and_gone_on(partial(tuner_of, method, kind, folder=tmp_path), 2)
    assert_equal(denoisers(rest), denoisers(whole))
    assert whole.figures["network_evaluations"] == rest.figures["network_evaluations"]
    with pytest.raises(RunChanged):
        tuner_of(method, kind, with_lora(kind, rank=4), folder=tmp_path).resume()
    with pytest.raises(CheckpointError, match="is the rank another"):
        tuner_of(method, kind, with_lora(kind, rank=4), folder=tmp_path).resume(accept_changes=True)


def test_checkpoints_hold_adapters_only(tmp_path: Path) -> None:
    """Four roles, and two moments of each that is trained; no file is as large as the network."""
    tuner = tuner_of("tdm_r1", "unet", folder=tmp_path, iterations=1)
    tuner.fit(progress=False)
    adapters = numbers(tuner.policy.denoiser.adapters.values())
    network = numbers(tuner.policy.denoiser.network.parameters())
    held = {name: numbers(found.values()) for name, found in weights_of(tuner).items()}
    copies = ("policy", "reference_fake", "reference_surrogate", "reference_slow")
    assert held == dict.fromkeys(copies, adapters) and adapters < 0.1 * network
    for optimiser in tuner.optimisers.values():
        kept = optimiser.algorithm.state.values()
        assert numbers(x for found in kept for x in found.values() if x.ndim > 0) == 2 * adapters
    for file in tmp_path.rglob("*.safetensors"):
        tensors = load_file(file).values()
        assert numbers(tensor for tensor in tensors if tensor.ndim > 0) <= 6 * adapters < network


def test_a_student_of_trained_adapters_is_held_to_itself_and_learns_from_the_base() -> None:
    student = with_lora("transformer", random=True)
    start = student(*states("transformer"))
    tuner = tuner_of("tdm_r1", "transformer", student, teacher=student.base())
    frozen, teacher = tuner.references("frozen"), tuner.references("teacher")
    for _ in tuner.steps():
        pass
    assert float((student(*states("transformer")) - start).detach().abs().max()) > 1e-4
    close(frozen.denoise(*states("transformer")), start)
    close(teacher.denoise(*states("transformer")), untuned("transformer")(*states("transformer")))


@pytest.mark.parametrize("method", ["tdm", "tdm_r1"])
@KINDS
def test_the_exported_student_draws_the_same_samples_in_diffusers(
    method: str, kind: str, tmp_path: Path
) -> None:
    tuner = tuner_of(method, kind, iterations=2)
    tuner.fit(progress=False)
    save_lora(tuner.policy.denoiser, tmp_path)
    stock = PIPES[kind][0]()
    plain, states = rollout(policy_of(untuned(kind), DDIM())), rollout(tuner.policy)
    stock.load_lora_weights(tmp_path)
    given: dict[str, dict[str, Any]] = {
        "unet": {"guidance_scale": 1.0},
        "transformer": {"guidance_scale": 1.0, "sigmas": [1.0, 0.75, 0.5, 0.25]},
        "z_image": {"guidance_scale": 0.0, "height": 16, "width": 16},
    }
    first = {"num_inference_steps": 4, "latents": states["x_t"][:, 0], "output_type": "latent"}
    drawn = stock(PROMPTS, **first, **given[kind]).images
    torch.testing.assert_close(drawn, states["action"][:, -1], rtol=1e-3, atol=1e-3)
    assert float((plain["action"][:, -1] - drawn).abs().max()) > 3e-3


@pytest.mark.parametrize(
    "recipe",
    [
        lambda: recipes.diffusion_nft(rollouts=recipes.Rollouts(8, group_size=4)),
        lambda: recipes.ddpo_is(
            rollouts=recipes.Rollouts(8), regulariser=recipes.Regulariser(kl_coef=0.1, reference="ema")
        ),
    ],
    ids=["old", "ema"],
)
def test_methods_with_moving_copies_tune_adapters(
    recipe: Callable[[], recipes.Recipe], tmp_path: Path
) -> None:
    def tuner(folder: Path | None = None) -> Finetuner:
        policy = policy_of(with_lora(), Ancestral(), 3)
        length = Iterations(3, checkpoint_every=3)
        given: dict[str, Any] = {"event_shape": SHAPE, "conditions": EACH, "length": length}
        return Finetuner(policy, Bright(), recipe(), folder=folder, **given)

    whole = tuner()
    rows = list(whole.steps())
    assert all(torch.tensor(value).isfinite() for key, value in rows[-1].items() if "loss" in key)
    rest = stopped_and_gone_on(partial(tuner, tmp_path), 1)
    assert_equal(weights_of(rest), weights_of(whole))
    assert len(weights_of(whole)) == 2


def weights_of(tuner: Finetuner) -> dict[str, Any]:
    """What a checkpoint keeps: the policy's adapters, and those of its copies."""
    return dict(tuner._state()[0])


# Adapters that a student starts from


@KINDS
def test_a_stock_lora_is_taken_up(kind: str, tmp_path: Path) -> None:
    first = with_lora(kind, random=True)
    save_lora(first, tmp_path)
    second = with_lora(kind)
    load_lora(second, tmp_path)
    same(second(*states(kind)), first(*states(kind)))


def test_a_lora_that_does_not_fit_is_named(tmp_path: Path) -> None:
    save_lora(with_lora(random=True), tmp_path)
    for options, message in (
        ({"rank": 4, "alpha": 4.0}, "is the rank another"),
        ({"alpha": 2.0}, "made with alpha 4, these have 2"),
        ({"target_modules": ["to_q"]}, "same target_modules"),
    ):
        with pytest.raises(ValueError, match=message):
            load_lora(with_lora(**options), tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)  # it says nothing of its scale then
    with pytest.raises(ValueError, match="made with alpha 2, these have 4"):
        load_lora(with_lora(), tmp_path)
    other, stock = with_lora(alpha=2.0), stable_diffusion()
    load_lora(other, tmp_path)
    stock.load_lora_weights(tmp_path)
    close(denoiser_of(stock)(*states()), other(*states()))
    with pytest.raises(ValueError, match="call add_lora first"):
        load_lora(untuned(), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no pytorch_lora_weights"):
        load_lora(with_lora(), tmp_path / "nowhere")
