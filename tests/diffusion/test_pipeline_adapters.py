"""Adapters of a pipeline: the base as reference, saving and loading, precision, one update."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl import keys
from diffrl.diffusion.pipelines.denoiser import PipelineDenoiser
from diffrl.diffusion.pipelines.lora import adapters_disabled, add_lora, has_lora, save_lora
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.samplers.ddim import Ancestral
from diffrl.diffusion.samplers.sde import FlowSDE
from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.methods.sdpo import SDPOLoss
from diffrl.finetuning.placement.similarity import predict_dense
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.decoded import DecodedReward, LatentDecoder
from tests.kit.oracles import generator
from tests.kit.pipeline_policies import EACH, SHAPE, P, denoiser_of, differ, policy_of, rollout
from tests.kit.pipelines import PROMPTS, stable_diffusion
from tests.kit.pipelines import stable_diffusion_3 as sd3


def ratio(policy: DenoisingPolicy, td: TensorDict) -> Tensor:
    """π/π_old of a whole rollout, forwarded at once."""
    steps = td.reshape(-1)
    law = policy.law(steps[keys.X_T], steps[keys.INDEX].squeeze(-1), steps[keys.COND])
    return (policy.log_prob(law, steps[keys.ACTION]) - steps[keys.ACTION_LOG_PROB]).exp()


def with_random_adapters(denoiser: PipelineDenoiser, **options: Any) -> PipelineDenoiser:
    add_lora(denoiser, generator=generator(3), **options)
    with torch.no_grad():
        for p in denoiser.parameters():
            if p.requires_grad:
                p.normal_(std=0.2, generator=generator(4))
    return denoiser


# Adapters

PIPES = pytest.mark.parametrize("make", [stable_diffusion, sd3], ids=["unet", "transformer"])


@PIPES
def test_new_adapters_change_nothing(make: Callable[[], Any]) -> None:
    pipe, noisy = make(), torch.full((P,), 0.5)
    plain, tuned = denoiser_of(pipe), denoiser_of(copy.deepcopy(pipe))
    add_lora(tuned, generator=generator(1))
    x, t = torch.randn(P, *SHAPE, generator=generator()), noisy if make is sd3 else 1000 * noisy
    expected = plain(x, t, EACH)
    torch.testing.assert_close(tuned(x, t, EACH), expected, rtol=0, atol=0)
    torch.testing.assert_close(tuned.reference()(x, t, EACH), expected, rtol=0, atol=0)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert trained == [f"network.{name}" for name in tuned.trainable_state()]


def test_adapters_are_those_of_the_generator_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    states = []
    for seed in (1, 1, 2):
        denoiser = denoiser_of()
        add_lora(denoiser, rank=2, generator=generator(seed))
        states.append(denoiser.trainable_state())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(2 in tensor.shape for tensor in first.values())
    assert torch.equal(before, torch.get_rng_state())


@PIPES
def test_the_base_is_the_network_under_trained_adapters(make: Callable[[], Any]) -> None:
    pipe = make()
    base = denoiser_of(copy.deepcopy(pipe))
    tuned = with_random_adapters(denoiser_of(pipe))
    tuned.network.get_parameter(next(iter(tuned.trainable_state()))).requires_grad_(False)  # by choice
    trained = list(tuned.trainable_state())
    reference = tuned.base()
    x, t = torch.randn(P, *SHAPE, generator=generator()), torch.full((P,), 0.5 if make is sd3 else 500.0)
    before = tuned(x, t, EACH)
    value = reference(x, t, EACH)
    torch.testing.assert_close(value, base(x, t, EACH), rtol=0, atol=0)
    assert differ(before, value)
    assert not value.requires_grad and not list(reference.parameters()) and not reference.state_dict()
    torch.testing.assert_close(tuned(x, t, EACH), before, rtol=0, atol=0)
    assert list(tuned.trainable_state()) == trained
    with pytest.raises(RuntimeError, match="inside"), adapters_disabled(tuned.network):
        raise RuntimeError("inside")
    torch.testing.assert_close(tuned(x, t, EACH), before, rtol=0, atol=0)
    assert list(tuned.trainable_state()) == trained


def test_asking_the_reference_between_forward_and_backward_changes_no_gradient() -> None:
    """As a loss with a KL to the reference does; with gradient checkpointing the forward runs again afterwards."""
    gradients = []
    for ask in (False, True):
        denoiser = with_random_adapters(denoiser_of())
        denoiser.enable_gradient_checkpointing()
        x, t = torch.randn(P, *SHAPE, generator=generator()), torch.full((P,), 500.0)
        D_x = denoiser(x, t, EACH)
        if ask:
            denoiser.base()(x, t, EACH)
        D_x.square().mean().backward()
        gradients.append({name: p.grad for name, p in denoiser.named_parameters() if p.requires_grad})
    plain, asked = gradients
    assert plain and plain.keys() == asked.keys()
    for name, gradient in plain.items():
        assert gradient is not None and asked[name] is not None
        torch.testing.assert_close(asked[name], gradient, rtol=0, atol=0)


def test_without_adapters_the_reference_is_a_frozen_copy_with_the_same_prompts() -> None:
    denoiser = denoiser_of()
    reference = denoiser.reference()
    assert isinstance(reference, PipelineDenoiser)
    assert not any(p.requires_grad for p in reference.parameters())
    ours, theirs = dict(denoiser.named_buffers()), dict(reference.named_buffers())
    name = "prompt_encoder_hidden_states"
    assert ours[name].data_ptr() == theirs[name].data_ptr()
    x, t = torch.randn(P, *SHAPE, generator=generator()), torch.full((P,), 500.0)
    before = reference(x, t, EACH)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.1)
    torch.testing.assert_close(reference(x, t, EACH), before, rtol=0, atol=0)
    assert differ(denoiser(x, t, EACH), before)


@pytest.mark.parametrize("lora", [True, False])
def test_trained_weights_go_round(lora: bool) -> None:
    tuned, other = denoiser_of(), denoiser_of()
    if lora:
        with_random_adapters(tuned)
        add_lora(other, generator=generator(9))
    else:
        with torch.no_grad():
            tuned.network.conv_in.bias.add_(1.0)
    x, t = torch.randn(P, *SHAPE, generator=generator()), torch.full((P,), 500.0)
    assert differ(other(x, t, EACH), tuned(x, t, EACH))
    state = tuned.trainable_state()
    other.load_trainable_state(state)
    torch.testing.assert_close(other(x, t, EACH), tuned(x, t, EACH), rtol=0, atol=0)
    with torch.no_grad():  # they are copies
        next(p for p in tuned.parameters() if p.requires_grad).add_(1.0)
    assert torch.equal(next(iter(state.values())), next(iter(other.trainable_state().values())))


def test_weights_of_other_adapters_are_refused() -> None:
    tuned, wider = denoiser_of(), denoiser_of()
    add_lora(tuned)
    add_lora(wider, rank=8)
    with pytest.raises(ValueError, match="0 of them the same: call add_lora"):
        tuned.load_trainable_state({})
    with pytest.raises(ValueError, match="is the rank another"):
        tuned.load_trainable_state(wider.trainable_state())


@PIPES
def test_saved_adapters_are_loaded_by_diffusers(make: Callable[[], Any], tmp_path: Path) -> None:
    tuned = with_random_adapters(denoiser_of(make()), rank=2, alpha=3.0)
    save_lora(tuned, tmp_path)
    (file,) = tmp_path.iterdir()
    weights = load_file(file)
    assert len(weights) == len(tuned.trainable_state()) and all("lora" in name for name in weights)
    pipe = make()
    pipe.load_lora_weights(tmp_path)
    x, t = torch.randn(P, *SHAPE, generator=generator()), torch.full((P,), 0.5 if make is sd3 else 500.0)
    torch.testing.assert_close(denoiser_of(pipe)(x, t, EACH), tuned(x, t, EACH), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has adapters already.*fuse_lora"):
        add_lora(denoiser_of(pipe))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    add_lora(denoiser_of(pipe))  # few-step adapters are tuned so: merged first


def test_bad_adapters_are_named() -> None:
    denoiser = denoiser_of()
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(denoiser, rank=0)
    with pytest.raises(ValueError, match="alpha is 0.0"):
        add_lora(denoiser, alpha=0.0)
    with pytest.raises(ValueError, match=r"no layer of UNet2DConditionModel.*\['c_attn'\]"):
        add_lora(denoiser, target_modules=["c_attn"])
    with pytest.raises(ValueError, match="no adapters to save"):
        save_lora(denoiser, "nowhere")
    assert not has_lora(denoiser.network) and all(p.requires_grad for p in denoiser.parameters())
    denoiser.network = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="Linear takes no adapters"):
        add_lora(denoiser)


# Precision, memory, modes


@PIPES
@pytest.mark.parametrize("lora", [True, False])
def test_gradient_checkpointing_gives_the_same_gradient(make: Callable[[], Any], lora: bool) -> None:
    gradients, kept = [], []
    for checkpointing in (False, True):
        denoiser = denoiser_of(make())
        if lora:
            with_random_adapters(denoiser)
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        x, t = torch.randn(P, *SHAPE, generator=generator()), torch.full((P,), 0.5 if make is sd3 else 500.0)
        stored: list[int] = []

        def store(a: Tensor, stored: list[int] = stored) -> Tensor:
            stored.append(a.numel())
            return a

        with torch.autograd.graph.saved_tensors_hooks(store, lambda a: a):
            loss = denoiser(x, t, EACH).square().mean()
        loss.backward()
        gradients.append([p.grad for p in denoiser.parameters() if p.requires_grad])
        kept.append(sum(stored))
    assert kept[1] < 0.8 * kept[0]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("make", "sampler"), [(stable_diffusion, Ancestral()), (sd3, FlowSDE())])
def test_in_half_precision_only_the_network_is_half(
    make: Callable[[], Any], sampler: GaussianSampler, dtype: torch.dtype
) -> None:
    """The ratio before an update, in another batch than the rollout's, is 1 within a tenth of DDPO's clip range."""
    pipe = make().to(dtype)
    denoiser = denoiser_of(pipe, w=2.0)
    add_lora(denoiser, generator=generator(1))
    assert {p.dtype for p in denoiser.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in denoiser.parameters() if not p.requires_grad} == {dtype}
    policy = policy_of(denoiser, sampler)
    td = rollout(policy)
    floats = [td[key].dtype for key in (keys.X_T, keys.ACTION, keys.ACTION_LOG_PROB, keys.X0_HAT)]
    assert floats == [torch.float32] * 4
    with torch.no_grad():
        assert float((ratio(policy, td) - 1).abs().max()) < 1e-5
    DDPOLoss(policy)(td.set(keys.ADVANTAGE, torch.ones(P, 4, 1)))["loss_policy"].backward()
    grads = [p.grad for p in denoiser.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads)


def test_dropout_stays_off() -> None:
    denoiser = denoiser_of(stable_diffusion(dropout=0.5))
    policy = policy_of(denoiser)
    loss = DDPOLoss(policy)
    loss.train()
    td = rollout(policy)
    with torch.no_grad():
        torch.testing.assert_close(ratio(policy, td), torch.ones(P * 4), rtol=1e-4, atol=1e-4)


# One update


@pytest.mark.parametrize(("make", "sampler"), [(stable_diffusion, Ancestral()), (sd3, FlowSDE())])
@pytest.mark.parametrize("algorithm", ["ddpo", "sdpo"])
def test_one_update_changes_adapters_only(
    make: Callable[[], Any], sampler: GaussianSampler, algorithm: str
) -> None:
    pipe = make()
    denoiser = denoiser_of(pipe, w=2.0)
    add_lora(denoiser, generator=generator(1))
    policy, base = policy_of(denoiser, sampler), policy_of(denoiser.reference(), sampler)
    box = BlackBox(
        DecodedReward(lambda images, prompts: images.mean((1, 2, 3)), LatentDecoder(pipe.vae), PROMPTS)
    )
    pairs = algorithm == "sdpo"
    options: dict[str, Any] = {"batch_size": 2 * P, "pairs": True} if pairs else {}
    td = rollout(policy, **options)
    one = torch.ones(td.numel())
    with torch.no_grad():
        torch.testing.assert_close(ratio(policy, td), one, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ratio(base, td), one, rtol=1e-4, atol=1e-4)
    if pairs:
        loss: Any = SDPOLoss(policy)
        R = predict_dense(td[keys.X0_HAT], box, td[keys.COND][:, 0])
        assert box.queries + box.cache_hits == 3 * len(td)
    else:
        loss = DDPOLoss(policy, reference=base, kl_coef=0.1)
        R = Terminal()(td, box).sum(1).expand(P, 4)
        assert box.queries == P
    assert float(R.std(0).min()) > 0
    advantage = (R - R.mean(0)) / R.std(0)
    weights = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], lr=1e-2)
    figures = loss(td.set(keys.ADVANTAGE, advantage.unsqueeze(-1)))
    sum(figures[key] for key in figures.keys() if key.startswith("loss")).backward()
    optimiser.step()
    moved = {name for name, p in denoiser.named_parameters() if not torch.equal(p, weights[name])}
    assert moved and all("lora_" in name for name in moved)
    with torch.no_grad():
        assert float((ratio(policy, td) - 1).abs().max()) > 1e-3
        torch.testing.assert_close(ratio(base, td), one, rtol=1e-4, atol=1e-4)
