"""Pipelines as policies: against diffusers' own pipelines, with the same noise; adapters; decoded rewards."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl import keys
from diffrl.diffusion.pipelines.denoiser import PipelineDenoiser, load_pipeline, process_of
from diffrl.diffusion.pipelines.lora import adapters_disabled, add_lora, has_lora, save_lora
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.samplers.consistency import LCM
from diffrl.diffusion.samplers.ddim import Ancestral
from diffrl.diffusion.samplers.loop import sample
from diffrl.diffusion.samplers.ode import Euler
from diffrl.diffusion.samplers.sde import FlowSDE
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.extras import MissingExtra
from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.methods.sdpo import SDPOLoss
from diffrl.finetuning.placement.similarity import predict_dense
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.decoded import DecodedReward, LatentDecoder
from diffrl.rewards.weighted_sum import WeightedSum
from tests.kit.oracles import generator
from tests.kit.pipelines import PROMPTS, STABLE_DIFFUSION, TOKENS, latent_consistency, stable_diffusion
from tests.kit.pipelines import stable_diffusion_3 as sd3

P = len(PROMPTS)
SHAPE = (4, 8, 8)
EACH = torch.arange(P)


def denoiser_of(pipe: Any = None, *, w: float = 1.0, **options: Any) -> PipelineDenoiser:
    pipe = stable_diffusion() if pipe is None else pipe
    return PipelineDenoiser.from_pipeline(pipe, PROMPTS, guidance_scale=w, **options)


def policy_of(denoiser: nn.Module, sampler: GaussianSampler | None = None, K: int = 4) -> DenoisingPolicy:
    return DenoisingPolicy(denoiser, sampler or Ancestral(), num_steps=K, reduction="mean")


def rollout(policy: DenoisingPolicy, **options: Any) -> TensorDict:
    given = {"batch_size": P, "cond": EACH, "generator": generator(0)} | options
    return collect_rollout(policy, SHAPE, **given)


def differ(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max()) > 1e-2


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


# Against diffusers' pipelines: whole chains, with the same noise


def chain_of(pipe: Any, policy: DenoisingPolicy, **options: Any) -> list[Tensor]:
    """The states of a run of the pipeline itself, from the policy's first latent."""
    states: list[Tensor] = []

    def keep(_: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(tensors["latents"])
        return {}

    noise = generator(0)
    first = torch.randn(P, *SHAPE, generator=noise) * policy.process.sigma(policy.grid[0]).float()
    pipe(
        PROMPTS,
        num_inference_steps=policy.num_steps,
        latents=first,
        generator=noise,
        output_type="latent",
        callback_on_step_end=keep,
        **options,
    )
    return states


def assert_same_chain(td: TensorDict, states: list[Tensor]) -> None:
    for k, state in enumerate(states):
        torch.testing.assert_close(td[keys.ACTION][:, k], state, rtol=2e-4, atol=2e-4 * float(state.std()))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("w", [1.0, 5.0])
def test_a_rollout_is_a_run_of_the_pipeline(prediction_type: str, w: float) -> None:
    """Prompts, guidance, prediction type, timesteps, DDIM with η = 1: all of it, against the pipeline's own."""
    pipe = stable_diffusion(prediction_type)
    policy = policy_of(denoiser_of(pipe, w=w))
    td = rollout(policy)
    assert_same_chain(td, chain_of(pipe, policy, eta=1.0, guidance_scale=w))
    assert td[keys.TRAINABLE][..., 0].tolist() == [[True] * 3 + [False]] * P


def test_the_negative_prompt_is_that_of_the_pipeline() -> None:
    pipe = stable_diffusion()
    policy = policy_of(denoiser_of(pipe, w=3.0, negative_prompt="ugly"))
    states = chain_of(pipe, policy, eta=1.0, guidance_scale=3.0, negative_prompt=["ugly"] * P)
    assert_same_chain(rollout(policy), states)
    other = chain_of(pipe, policy, eta=1.0, guidance_scale=3.0)
    assert differ(other[-1], states[-1])


def test_where_the_pipeline_ends_above_clean_data_only_the_last_step_differs() -> None:
    pipe = stable_diffusion()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    policy = policy_of(denoiser_of(pipe))
    td, states = rollout(policy), chain_of(pipe, policy, eta=1.0, guidance_scale=1.0)
    assert_same_chain(td, states[:-1])
    torch.testing.assert_close(td[keys.ACTION][:, -1], td[keys.X0_HAT][:, -1])
    assert differ(states[-1], td[keys.ACTION][:, -1])


@pytest.mark.parametrize("N", [1, 4])
def test_lcm_is_a_run_of_the_pipeline(N: int) -> None:
    """Embedded guidance, boundary condition, timesteps of the distillation."""
    pipe = latent_consistency()
    policy = policy_of(denoiser_of(pipe, w=7.5), LCM(), N)
    assert policy.denoiser.evaluations == 1
    assert_same_chain(rollout(policy), chain_of(pipe, policy, guidance_scale=7.5))


@pytest.mark.parametrize("w", [1.0, 4.5])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_a_run_of_the_pipeline(w: float, shift: float) -> None:
    """Two encoders, pooled embeddings, the shifted grid, Euler."""
    pipe = sd3(shift)
    policy = policy_of(denoiser_of(pipe, w=w), Euler(), 5)
    assert_same_chain(rollout(policy), chain_of(pipe, policy, guidance_scale=w))


@pytest.mark.parametrize("w", [1.0, 2.0])
def test_guidance_is_one_batch_of_two_evaluations(w: float, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, sizes = denoiser_of(w=w), []
    forward = denoiser.network.forward

    def watched(x: Tensor, **options: Any) -> Any:
        sizes.append(len(x))
        return forward(x, **options)

    monkeypatch.setattr(denoiser.network, "forward", watched)
    denoiser(torch.zeros(5, *SHAPE), torch.zeros(5), torch.zeros(5, dtype=torch.long))
    assert sizes == [5 * denoiser.evaluations] == [5 * (1 + (w > 1))]


def test_samples_by_seed_do_not_depend_on_the_batch() -> None:
    denoiser = denoiser_of(w=2.0)
    draw = {"sampler": Ancestral(), "num_steps": 3, "cond": EACH[1:].unsqueeze(-1)}
    both = sample(denoiser, (2, *SHAPE), seed=5, **draw)
    last = sample(denoiser, (1, *SHAPE), seed=6, **draw | {"cond": EACH[2:]})
    torch.testing.assert_close(both[1:], last, rtol=1e-4, atol=1e-4)


# Schedulers


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_every_scheduler_of_stable_diffusion_has_one_process(scheduler: Any) -> None:
    clip = {"clip_sample": False} if scheduler in (DDIMScheduler, DDPMScheduler) else {}
    process = process_of(scheduler(**STABLE_DIFFUSION, **clip))
    assert process == DDPM(1000, "scaled_linear", 0.00085, 0.012)


def test_stable_diffusion_3_has_the_flow_with_its_shift() -> None:
    process = process_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(process, Flow) and process.shift == 3.0
    assert process.t_min == pytest.approx(0.003 / 1.002)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lambda: DDIMScheduler(**STABLE_DIFFUSION), "clips samples"),
        (lambda: DDIMScheduler(clip_sample=False, thresholding=True), "clips samples"),
        (
            lambda: DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True),
            "other betas.*zero terminal SNR",
        ),
        (lambda: DDPMScheduler(beta_schedule="sigmoid"), "beta_schedule 'sigmoid': known are linear"),
        (lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "has use_dynamic_shifting"),
    ],
)
def test_an_unknown_scheduler_is_named(scheduler: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_of(scheduler())


# Prompts


def test_prompts_are_numbers_and_their_embeddings_are_not_saved() -> None:
    denoiser = denoiser_of(w=2.0)
    assert denoiser.prompts == tuple(PROMPTS) and denoiser.event_shape == SHAPE
    assert {name.partition(".")[0] for name in denoiser.state_dict()} == {"network"}
    assert not any(rows.requires_grad for rows in denoiser.buffers())


def test_a_list_of_one_prompt_needs_no_numbers() -> None:
    pipe = stable_diffusion()
    one = PipelineDenoiser.from_pipeline(pipe, PROMPTS[1:2], guidance_scale=2.0)
    x, t = torch.randn(2, *SHAPE, generator=generator()), torch.tensor([10.0, 500.0])
    expected = denoiser_of(pipe, w=2.0)(x, t, torch.tensor([1, 1]))
    torch.testing.assert_close(one(x, t), expected)


def test_many_prompts_are_encoded_in_parts() -> None:
    pipe = stable_diffusion()
    prompts = [PROMPTS[i % P] for i in range(40)]
    many = PipelineDenoiser.from_pipeline(pipe, prompts, guidance_scale=1.0)
    x, t = torch.randn(P, *SHAPE, generator=generator()), torch.full((P,), 300.0)
    torch.testing.assert_close(many(x, t, EACH + 36), denoiser_of(pipe)(x, t, EACH), rtol=1e-4, atol=1e-4)


def test_a_prompt_that_is_cut_off_is_warned_of() -> None:
    long = "abcdefghijklmnopqrst"
    with pytest.warns(UserWarning, match=f"prompts 1 are cut off: tokenizer reads {TOKENS} tokens.*up to 22"):
        PipelineDenoiser.from_pipeline(stable_diffusion(), ["a", long], guidance_scale=1.0)


@pytest.mark.parametrize(
    ("cond", "error", "message"),
    [
        (None, ValueError, "which of the 3 prompts"),
        (torch.tensor([0, 3]), ValueError, r"numbered 0\.\.2, not \[0, 3\]"),
        (torch.tensor([0, -1]), ValueError, r"numbered 0\.\.2"),
        (torch.tensor([0]), ValueError, "shape"),
        (torch.tensor([0.0, 1.0]), TypeError, "integers"),
        (torch.tensor([True, False]), TypeError, "integers"),
    ],
)
def test_bad_prompt_numbers_are_named(cond: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        denoiser_of()(torch.zeros(2, *SHAPE), torch.zeros(2), cond)


def unconditional() -> Any:
    return DDIMPipeline(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            attention_head_dim=4,
            norm_num_groups=2,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        DDIMScheduler(),
    )


SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "at least one string"),
        ({"prompts": "a cat"}, "'a cat': give a list"),
        ({"guidance_scale": 0.0}, "give 1 for none"),
        ({"guidance_scale": math.nan}, "give 1 for none"),
        ({"negative_prompt": "ugly"}, "no effect without guidance"),
        ({"pipe": unconditional}, "no UNet2DConditionModel or SD3Transformer2DModel"),
        ({"pipe": lambda: stable_diffusion(**SDXL)}, r"more than a prompt \(addition_embed_type\)"),
        ({"pipe": lambda: stable_diffusion(in_channels=9)}, r"further input channels"),
    ],
)
def test_a_bad_argument_is_named(options: dict[str, Any], message: str) -> None:
    given = {"pipe": stable_diffusion, "prompts": PROMPTS, "guidance_scale": 1.0} | options
    with pytest.raises(ValueError, match=message):
        PipelineDenoiser.from_pipeline(given.pop("pipe")(), **given)


def test_a_wrong_dtype_of_latents_is_named() -> None:
    with pytest.raises(TypeError, match="x_t has dtype torch.int64"):
        denoiser_of()(torch.zeros(P, *SHAPE, dtype=torch.long), torch.zeros(P), EACH)


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
def test_the_reference_is_the_base_under_trained_adapters(make: Callable[[], Any]) -> None:
    pipe = make()
    base = denoiser_of(copy.deepcopy(pipe))
    tuned = with_random_adapters(denoiser_of(pipe))
    tuned.network.get_parameter(next(iter(tuned.trainable_state()))).requires_grad_(False)  # by choice
    trained = list(tuned.trainable_state())
    reference = tuned.reference()
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
            denoiser.reference()(x, t, EACH)
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
    with pytest.raises(ValueError, match="alpha 0"):
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


# Rewards of decoded images


def test_latents_are_decoded_as_the_pipeline_decodes_them() -> None:
    for pipe in (stable_diffusion(), sd3()):
        images = pipe(PROMPTS, num_inference_steps=2, generator=generator(), output_type="pt").images
        z = pipe(PROMPTS, num_inference_steps=2, generator=generator(), output_type="latent").images
        decoded = LatentDecoder(pipe.vae)(z)
        assert decoded.shape == (P, 3, 16, 16) and decoded.dtype == torch.float32
        torch.testing.assert_close((decoded + 1) / 2, images, rtol=1e-4, atol=1e-4)


def test_a_half_precision_autoencoder_gives_float32_images() -> None:
    decoded = LatentDecoder(stable_diffusion().to(torch.bfloat16).vae)(10 * torch.ones(2, *SHAPE))
    assert decoded.dtype == torch.float32 and -1 <= float(decoded.min()) <= float(decoded.max()) <= 1


def doubled(z: Tensor) -> Tensor:
    return 2 * z


class Watcher:
    """A reward that keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Sequence[str] | Tensor]] = []

    def __call__(self, images: Tensor, prompts: Sequence[str] | Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.seen.append((images, prompts))
        return images.flatten(1).mean(1)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_reward_gets_its_images_and_prompts(batch_size: int) -> None:
    watcher, sizes = Watcher(), []

    def decode(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return 2 * z

    reward = DecodedReward(watcher, decode, PROMPTS, batch_size)
    z = torch.randn(5, 2, requires_grad=True)
    rewards = reward(z, torch.tensor([[2], [0], [1], [1], [2]]))
    ((images, prompts),) = watcher.seen
    assert torch.equal(images, 2 * z) and torch.equal(rewards, 2 * z.mean(1))
    assert prompts == ["red", "a cat", "two dogs", "two dogs", "red"]
    assert max(sizes) == min(batch_size, 5) and sum(sizes) == 5


def test_queries_of_decoded_rewards_are_counted_once_and_remembered() -> None:
    watcher = Watcher()
    box = BlackBox(DecodedReward(watcher, doubled, PROMPTS))
    assert box.name == "Watcher"
    z, cond = torch.randn(3, *SHAPE), torch.tensor([0, 1, 1])
    first = box(z, cond)
    torch.testing.assert_close(box(z, cond), first)
    assert box.queries == 3 and box.cache_hits == 3 and len(watcher.seen) == 1
    box(z, torch.tensor([0, 1, 2]))  # another prompt is another question
    assert box.queries == 4


def test_conditions_pass_where_no_prompts_are_given_and_one_prompt_needs_none() -> None:
    watcher, cond = Watcher(), torch.tensor([7])
    DecodedReward(watcher, doubled)(torch.zeros(1, 2), cond)
    DecodedReward(watcher, doubled, ["a cat"])(torch.zeros(2, 2))
    assert watcher.seen[0][1] is cond and watcher.seen[1][1] == ["a cat", "a cat"]


def test_a_sum_of_rewards_decodes_inside() -> None:
    parts = {name: (DecodedReward(Watcher(), doubled, PROMPTS), 0.5) for name in "ab"}
    total = WeightedSum(parts, normalise="running")
    assert total(torch.randn(3, 2), EACH).shape == (3,)
    with pytest.raises(ValueError, match="decode inside the sum"):
        DecodedReward(total, doubled, PROMPTS)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: DecodedReward(None, doubled), TypeError, "must be callables"),
        (lambda: DecodedReward(Watcher(), doubled, "a cat"), TypeError, "the string 'a cat'"),
        (lambda: DecodedReward(Watcher(), doubled, batch_size=0), ValueError, "batch_size is 0"),
        (
            lambda: DecodedReward(Watcher(), doubled, PROMPTS)(torch.zeros(2, 2)),
            ValueError,
            "number the 3 prompts",
        ),
        (
            lambda: DecodedReward(Watcher(), doubled, PROMPTS)(torch.zeros(1, 2), torch.tensor([-1])),
            ValueError,
            r"numbered 0\.\.2, not \[-1\]",
        ),
        (
            lambda: DecodedReward(Watcher(), lambda z: z[:1])(torch.zeros(2, 2)),
            ValueError,
            "1 images for 2 latents",
        ),
    ],
)
def test_a_bad_decoded_reward_is_named(
    wrong: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        wrong()


# Loading


def test_a_pipeline_is_loaded_from_its_folder(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, torch.bfloat16)
    assert loaded.unet.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.bfloat16
    x, t = torch.randn(P, *SHAPE, generator=generator()), torch.full((P,), 500.0)
    expected = denoiser_of(pipe)(x, t, EACH)
    torch.testing.assert_close(
        denoiser_of(load_pipeline(tmp_path))(x, t, EACH), expected, rtol=1e-5, atol=1e-5
    )


def test_nothing_is_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    asked = []

    def offline(path: str, **options: Any) -> Any:
        asked.append(options["local_files_only"])
        raise OSError("not cached")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", offline)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no folder.*download=True"):
        load_pipeline("nobody/nothing")
    with pytest.raises(OSError, match="not cached"):
        load_pipeline("nobody/nothing", download=True)
    assert asked == [True, False]
    with pytest.raises(FileNotFoundError, match="holds no model_index.json"):
        load_pipeline(tmp_path)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"diffusers is missing: pip install 'diffrl\[diffusers\]'"):
        load_pipeline("somewhere")
    denoiser = denoiser_of.__globals__["PipelineDenoiser"].__new__(PipelineDenoiser)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"peft is missing: pip install 'diffrl\[lora\]'"):
        add_lora(denoiser)


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
