"""Pipelines as policies: against diffusers' own pipelines, with the same noise; prompts; loading."""

import math
from collections.abc import Callable
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
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.pipelines.denoiser import PipelineDenoiser, load_pipeline, process_of
from diffrl.diffusion.pipelines.lora import add_lora
from diffrl.diffusion.renoising import between, marginal_target, renoise
from diffrl.diffusion.samplers.consistency import LCM
from diffrl.diffusion.samplers.ddim import DDIM, Ancestral
from diffrl.diffusion.samplers.loop import sample
from diffrl.diffusion.samplers.ode import Euler
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import DiffrlError
from diffrl.extras import MissingExtra
from diffrl.finetuning.guidance import Teacher
from diffrl.finetuning.policy import DenoisingPolicy
from tests.kit.oracles import generator
from tests.kit.pipeline_policies import EACH, SHAPE, P, close, denoiser_of, differ, policy_of, rollout, states
from tests.kit.pipelines import (
    PROMPTS,
    STABLE_DIFFUSION,
    TOKENS,
    latent_consistency,
    stable_diffusion,
    z_image,
)
from tests.kit.pipelines import stable_diffusion_3 as sd3

# Against diffusers' pipelines: whole chains, with the same noise


def chain_of(pipe: Any, policy: DenoisingPolicy, **options: Any) -> list[Tensor]:
    """The states of a run of the pipeline itself, from the policy's first latent."""
    states: list[Tensor] = []

    def keep(_: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(tensors["latents"])
        return {}

    noise = generator(0)
    first = torch.randn(P, *SHAPE, generator=noise) * policy.process.sigma(policy.grid[0]).float()
    given = {"num_inference_steps": policy.num_steps, "latents": first, "generator": noise}
    pipe(PROMPTS, output_type="latent", callback_on_step_end=keep, **given, **options)
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


@pytest.mark.parametrize("w", [1.0, 4.5])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_z_image_is_a_run_of_the_pipeline(w: float, shift: float) -> None:
    """Captions of several lengths, reversed time and sign, even levels; its guidance is w - 1, and 0 is off."""
    pipe = z_image(shift)
    denoiser = denoiser_of(pipe, w=w)
    assert len(denoiser.get_buffer("prompt_cap_lengths").unique()) > 2
    policy = policy_of(denoiser, Euler(), 4)
    states = chain_of(pipe, policy, guidance_scale=w - 1, height=16, width=16, max_sequence_length=256)
    assert_same_chain(rollout(policy), states)
    torch.testing.assert_close(policy.grid, pipe.scheduler.sigmas.double(), rtol=1e-5, atol=1e-6)


def test_z_images_latents_are_of_1024_pixels_unless_said_otherwise() -> None:
    assert denoiser_of(z_image()).event_shape == (4, 128, 128)


def test_even_levels_are_those_of_generators_of_four_steps() -> None:
    policy = policy_of(denoiser_of(sd3(), even_levels=True), DDIM(), 4)
    assert policy.grid.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_the_levels_of_ddim_on_stable_diffusion_end_at_clean_data() -> None:
    """x_K = D: the fake score's exact target is then the sample; times between lie on the scheduler's timesteps."""
    policy = policy_of(denoiser_of(), DDIM(), 4)
    process, grid = policy.process, policy.grid
    assert grid.tolist() == [999, 749, 499, 249, -1]
    u = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    t = between(process, grid[3].expand(50), grid[4].expand(50), u)
    assert bool((t == t.round()).all()) and 0 <= float(t.min()) <= float(t.max()) <= 249
    x_K, noise = torch.randn(2, 50, *SHAPE, generator=generator(), dtype=torch.float64)
    s = grid[4].expand(50)
    torch.testing.assert_close(marginal_target(process, x_K, s, t, noise), x_K)
    alpha, sigma = (f(t)[:, None, None, None] for f in (process.alpha, process.sigma))
    torch.testing.assert_close(renoise(process, x_K, s, t, noise), alpha * x_K + sigma * noise)


# What methods of distillation ask

MADE = {
    "eps": (stable_diffusion, 500.0, {}),
    "v": (lambda: stable_diffusion("v_prediction"), 500.0, {}),
    "lcm": (latent_consistency, 499.0, {"w": 7.5}),
    "flow": (sd3, 0.5, {}),
    "z_image": (z_image, 0.5, {}),
}


@pytest.mark.parametrize("kind", MADE)
def test_the_estimate_is_affine_in_the_networks_output(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D = c_skip x_t + c_out F, by outputs F of our own; c_in = 1, so that the network gets x_t itself."""
    make, t, options = MADE[kind]
    denoiser = denoiser_of(make(), **options)
    x, times, _ = states(t)
    F = torch.randn(x.shape, generator=generator(1))
    monkeypatch.setattr(denoiser, "_predicted", lambda x_t, t, rows: F)
    c_skip, c_out, c_in = denoiser.scalings(times.double())
    assert bool((c_in == 1).all()) and float(c_out.abs().min()) > 0
    expected = c_skip[:, None, None, None] * x + c_out[:, None, None, None] * F
    torch.testing.assert_close(denoiser(x, times, EACH), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["eps", "flow", "z_image"])
def test_a_guided_teacher_is_the_guided_denoiser(kind: str) -> None:
    """The teacher's w on a denoiser without guidance is the denoiser's own w, negative prompt included."""
    make, t, _ = MADE[kind]
    pipe = make()
    own = denoiser_of(pipe, w=4.5, negative_prompt="red")
    teacher = Teacher(policy_of(denoiser_of(pipe, negative_prompt="red"), DDIM()), 4.5)
    close(teacher(*states(t)), own(*states(t)), rtol=1e-4, atol=1e-4)
    other = Teacher(policy_of(denoiser_of(pipe), DDIM()), 4.5)
    assert differ(other(*states(t)), own(*states(t)))


def test_no_denoiser_is_guided_twice() -> None:
    teacher = Teacher(policy_of(denoiser_of(w=2.0), DDIM()), 2.0)
    with pytest.raises(ValueError, match=r"guided by 2 itself.*guidance_scale=1"):
        teacher(*states())


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


def test_the_unconditional_part_may_be_left_out_of_the_gradient() -> None:
    """F = F_∅ + w (F_c - F_∅): the same values, and with F_∅ fixed w times the gradient of F_c alone."""
    pipe, w, gradients, values = stable_diffusion(), 3.0, [], []
    for options in ({"w": w, "train_unconditional": False}, {"w": w}, {}):
        denoiser = denoiser_of(pipe, **options)
        denoiser.zero_grad()
        D_x = denoiser(*states())
        D_x.sum().backward()
        values.append(D_x.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None]))
    one_sided, both, alone = gradients
    close(values[0], values[1], rtol=0, atol=0)
    torch.testing.assert_close(one_sided, w * alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
    assert float((one_sided - both).norm() / both.norm()) > 0.1


def test_a_compiled_network_is_the_network() -> None:
    """The truth value of a compiled module is an error of its own, and its type is not the network's."""
    plain, pipe = stable_diffusion(), stable_diffusion()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    compiled, expected = denoiser_of(pipe, w=2.0), denoiser_of(plain, w=2.0)
    torch.testing.assert_close(compiled(*states()), expected(*states()))
    assert compiled.event_shape == SHAPE
    for denoiser in (compiled, expected):
        add_lora(denoiser, generator=generator(1))
    state = compiled.trainable_state()
    assert state.keys() == expected.trainable_state().keys()
    for denoiser in (compiled, expected):
        denoiser.load_trainable_state({name: value + 0.1 for name, value in state.items()})
    torch.testing.assert_close(compiled(*states()), expected(*states()))
    torch.testing.assert_close(compiled.reference()(*states()), expected.reference()(*states()))


def test_samples_by_seed_do_not_depend_on_the_batch() -> None:
    denoiser = denoiser_of(w=2.0)
    draw = {"sampler": Ancestral(), "num_steps": 3, "cond": EACH[1:].unsqueeze(-1)}
    both = sample(denoiser, (2, *SHAPE), seed=5, **draw)
    last = sample(denoiser, (1, *SHAPE), seed=6, **draw | {"cond": EACH[2:]})
    torch.testing.assert_close(both[1:], last, rtol=1e-4, atol=1e-4)


# Schedulers


def fewer_timesteps() -> Any:
    """Whose configuration was changed after its betas were made."""
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False)
    scheduler.register_to_config(num_train_timesteps=100)
    return scheduler


def stretched() -> Any:
    """Whose chains begin below pure noise."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.sigma_max = 0.8
    return scheduler


def test_a_model_distilled_on_other_timesteps_is_named() -> None:
    pipe = latent_consistency()
    pipe.scheduler.register_to_config(original_inference_steps=25)
    with pytest.warns(UserWarning, match=r"distilled on 25 timesteps: give LCM\(solver_steps=25\)"):
        denoiser_of(pipe, w=7.5)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_every_scheduler_of_stable_diffusion_has_one_process(scheduler: Any) -> None:
    clip = {"clip_sample": False} if scheduler in (DDIMScheduler, DDPMScheduler) else {}
    process = process_of(scheduler(**STABLE_DIFFUSION, **clip))
    assert process == DDPM(1000, "scaled_linear", 0.00085, 0.012)


def test_stable_diffusion_3_has_the_flow_with_its_shift() -> None:
    process = process_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(process, Flow) and process.shift == 3.0
    assert process.t_min == pytest.approx(0.003 / 1.002)


@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_a_shift_set_at_run_time_is_the_one_that_counts(shift: float) -> None:
    pipe = sd3()
    pipe.scheduler.set_shift(shift)
    policy = policy_of(denoiser_of(pipe), Euler(), 3)
    assert_same_chain(rollout(policy), chain_of(pipe, policy, guidance_scale=1.0))
    torch.testing.assert_close(policy.grid, pipe.scheduler.sigmas.double(), rtol=1e-5, atol=1e-6)


def test_a_shift_that_is_set_afterwards_is_refused() -> None:
    pipe = sd3()
    policy = policy_of(denoiser_of(pipe), Euler(), 3)
    pipe.scheduler.set_shift(6.0)
    says = r"the scheduler's shift was 3\.0 and is 6\.0 now: make the denoiser anew"
    with pytest.raises(ValueError, match=says):
        rollout(policy)


def test_a_flow_of_fewer_timesteps_tells_its_network_so() -> None:
    pipe = sd3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0)
    denoiser = denoiser_of(pipe)
    policy = policy_of(denoiser, Euler(), 3)
    td = rollout(policy)
    assert_same_chain(td, chain_of(pipe, policy, guidance_scale=1.0))
    told: list[float] = []
    denoiser.network.register_forward_pre_hook(
        lambda network, args, given: told.append(float(given["timestep"][0])), with_kwargs=True
    )
    rollout(policy)
    assert told == pytest.approx(pipe.scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (fewer_timesteps, "other betas than the 100 scaled_linear"),
        (stretched, "has the levels .* a shift of 3 would give"),
        (lambda: DDIMScheduler(**STABLE_DIFFUSION), "clips samples"),
        (lambda: DDIMScheduler(clip_sample=False, thresholding=True), "clips samples"),
        (lambda: DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True), "other betas.*terminal SNR"),
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
    x, t, _ = states(300.0)
    close(many(x, t, EACH + 36), denoiser_of(pipe)(x, t, EACH), rtol=1e-4, atol=1e-4)


def test_a_prompt_that_is_cut_off_is_warned_of() -> None:
    long = "abcdefghijklmnopqrst"
    with pytest.warns(UserWarning, match=f"prompts 1 are cut off: tokenizer reads {TOKENS} tokens.*up to 22"):
        PipelineDenoiser.from_pipeline(stable_diffusion(), ["a", long], guidance_scale=1.0)
    few = {"guidance_scale": 1.0, "max_sequence_length": 8}
    with pytest.warns(UserWarning, match="prompts 0 are cut off: tokenizer reads 8 tokens.*up to 12"):
        PipelineDenoiser.from_pipeline(z_image(), ["abcdefghij", "b"], **few)


@pytest.mark.parametrize(
    ("cond", "error", "message"),
    [
        (None, ValueError, "which of the 3 prompts"),
        (torch.tensor([0, 4]), ValueError, r"numbered 0\.\.2, and 3 is the negative one, not \[0, 4\]"),
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
    one = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return DDIMPipeline(UNet2DModel(norm_num_groups=2, attention_head_dim=4, **one), DDIMScheduler())


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
        ({"pipe": latent_consistency, "negative_prompt": "ugly"}, "no effect where guidance is embedded"),
        ({"even_levels": True}, "even_levels are those of a flow, not of DDPM"),
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


# Loading


def test_a_pipeline_is_loaded_from_its_folder(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, torch.bfloat16)
    assert loaded.unet.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.bfloat16
    close(denoiser_of(load_pipeline(tmp_path))(*states()), denoiser_of(pipe)(*states()))


@pytest.mark.parametrize("saved", [True, False])
def test_stable_diffusion_3_does_without_its_third_encoder(saved: bool, tmp_path: Path) -> None:
    """Saved without it, or left out of a whole pipeline: the encoder's rows are zeros, as in diffusers."""
    pipe = sd3()
    expected = denoiser_of(pipe)
    if not saved:
        pipe.register_modules(text_encoder_3=pipe.text_encoder, tokenizer_3=pipe.tokenizer)
    pipe.save_pretrained(tmp_path)
    left_out = () if saved else ("text_encoder_3", "tokenizer_3")
    loaded = load_pipeline(tmp_path, leave_out=left_out)
    assert loaded.text_encoder_3 is None and loaded.tokenizer_3 is None
    close(denoiser_of(loaded)(*states(0.5)), expected(*states(0.5)))


def test_a_folder_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    for _ in range(2):
        with pytest.raises(DiffrlError, match="cannot be loaded as a pipeline .*safetensors") as caught:
            load_pipeline(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        weights.rename(weights.with_suffix(".bin")) if weights.exists() else None
    (tmp_path / "model_index.json").write_text("{", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        load_pipeline(tmp_path)


def test_nothing_is_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    asked = []

    def offline(path: str, **options: Any) -> Any:
        asked.append(options["local_files_only"])
        raise OSError("not cached")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", offline)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no folder.*download=True"):
        load_pipeline("nobody/nothing")
    with pytest.raises(OSError, match=r"could be fetched \(not cached\)"):
        load_pipeline("nobody/nothing", download=True)
    assert asked == [True, False]
    with pytest.raises(FileNotFoundError, match="holds no model_index.json"):
        load_pipeline(tmp_path)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"diffusers is missing: pip install 'diffrl\[diffusers\]'"):
        load_pipeline("somewhere")
    denoiser = PipelineDenoiser.__new__(PipelineDenoiser)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"peft is missing: pip install 'diffrl\[lora\]'"):
        add_lora(denoiser)
