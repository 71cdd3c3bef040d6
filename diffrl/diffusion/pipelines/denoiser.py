"""The network of a diffusers pipeline as a denoiser of latents, so that it can be tuned for a reward."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.pipelines.lora import adapters, has_lora, load_tensors
from diffrl.diffusion.pipelines.parts import (
    encoded,
    load_pipeline,
    network_of,
    plain,
    prediction_of,
    process_of,
    warn_of_other_timesteps,
    warn_of_truncation,
)
from diffrl.diffusion.pipelines.roles import AdapterDenoiser, BaseDenoiser, checkpointed
from diffrl.diffusion.pipelines.z_image import LATENT_SIZE, is_z_image, velocity
from diffrl.diffusion.predictions import PredictionType, Scalings, scalings, to_x0
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int, require_number
from diffrl.shapes import expand_like, require_floating

__all__ = ["PipelineDenoiser", "load_pipeline", "process_of"]

CONSISTENCY_SIGMA = 0.5  # σd of latent consistency models


class PipelineDenoiser(nn.Module):
    """The network of a pipeline under its prompts: (latents x_t [N, C, h, w], t [N], prompt numbers [N]) → D(x_t).

        F = F_∅ + w (F_c - F_∅),    D = c_skip x_t + c_out F

    The prompts are encoded once; `cond` holds their numbers, so that rollouts carry integers. Guidance (w > 1) costs
    two evaluations for each state, made in one batch; rollouts and training use the same guided estimate. Latents, D
    and all arithmetic around the network are in float32, whatever its dtype. The network stays in eval mode, as with
    dropout a log-probability could not be computed twice.

    Fine-tuning uses `reference`, `twin`, `trainable_state` and `load_trainable_state`. Every parameter is trained, or
    only the adapters after `diffrl.diffusion.pipelines.lora.add_lora`.

    Source: Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), eq. 6 (w here is their 1 + w),
    https://arxiv.org/abs/2207.12598. Models with an embedded guidance scale: On Distillation of Guided Diffusion Models
    (Meng et al., 2023), https://arxiv.org/abs/2210.03142; their c_skip and c_out: Latent Consistency Models (Luo et
    al., 2023) and its code, https://arxiv.org/abs/2310.04378.

    Args:
        network: a diffusers `UNet2DConditionModel`, `SD3Transformer2DModel` or `ZImageTransformer2DModel`.
        process: the process that it was trained on: DDPM, whose time input is the timestep, or Flow, with T t.
        prompts: P strings.
        embeddings: keyword of the network → [P+1, ...], one row for each prompt, then one for the negative prompt.
        prediction_type: what the network predicts.
        guidance_scale: w ≥ 1; 1 is off.
        guided: whether w acts as above; False if w is an input of the network, as a row of `embeddings`.
        train_unconditional: whether F_∅ passes gradients, as in DDPO's code; False: only F_c does, as in Flow-GRPO's.
        train_steps: T, by which a flow's network is told its time, T t.
        timestep_scaling: k of c_skip = σd²/(k² t² + σd²), c_out = k t/√(k² t² + σd²), of latent consistency models,
            whose D is c_skip x_t + c_out D; None: other models.

    Raises:
        ValueError: no prompts, embeddings of another number, or guidance_scale < 1.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Schedule,
        prompts: Sequence[str],
        embeddings: Mapping[str, Tensor],
        *,
        prediction_type: PredictionType,
        guidance_scale: float,
        guided: bool = True,
        train_unconditional: bool = True,
        train_steps: int = 1000,
        timestep_scaling: float | None = None,
    ) -> None:
        super().__init__()
        _require_prompts(prompts)
        if any(len(rows) != len(prompts) + 1 for rows in embeddings.values()):
            raise InputError(
                f"embeddings need {len(prompts) + 1} rows: one a prompt, then the negative prompt's"
            )
        require_int("train_steps", train_steps)
        if timestep_scaling is not None:
            require_number("timestep_scaling", timestep_scaling, 0, ends="()")
        if not (guidance_scale >= 1 and math.isfinite(guidance_scale)):
            raise InputError(
                f"guidance_scale is {guidance_scale}: give 1 for none (diffusers takes all from 0 to 1 for that)"
            )
        self.network, self.process, self.prompts = network, process, tuple(prompts)
        self.prediction_type, self.guidance_scale = prediction_type, guidance_scale
        self.guided = guided and guidance_scale != 1
        self.train_unconditional = train_unconditional
        self.train_steps, self.timestep_scaling = train_steps, timestep_scaling
        self._keywords = tuple(embeddings)
        for keyword, rows in embeddings.items():
            self.register_buffer(f"prompt_{keyword}", rows, persistent=False)
        self.eval()

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        prompts: Sequence[str],
        *,
        guidance_scale: float,
        negative_prompt: str = "",
        max_sequence_length: int = 256,
        train_unconditional: bool = True,
        even_levels: bool = False,
    ) -> "PipelineDenoiser":
        """Make the denoiser of a loaded pipeline; afterwards its text encoders may be deleted.

        Stable Diffusion 1.x, 2.x, Turbo and latent consistency models, Stable Diffusion 3.x, and Z-Image. The encoded
        prompts take memory beside the network: in half precision 0.1 MB each for SD 1.x, 2.7 MB for SD 3.x, and 5 kB a
        token of the longest one for Z-Image.

        Args:
            pipe: the pipeline; its network is shared, so that the pipeline draws from what is trained.
            prompts: the strings that conditions count, from 0.
            guidance_scale: w ≥ 1; 1 is off.
            negative_prompt: the prompt that guidance moves away from, this denoiser's or that of a method's teacher.
            max_sequence_length: number of tokens that the T5 encoder of SD 3.x and that of Z-Image read.
            train_unconditional: whether the unconditional part of guidance passes gradients too.
            even_levels: a flow's chain of N steps visits s(1 - i/N) with the scheduler's shift s, as generators of few
                steps are distilled, and not the levels of the scheduler, which end above 0. Z-Image's always does.

        Raises:
            ValueError: a pipeline of another kind or with conditions other than prompts (SDXL's sizes, inpainting's
                masks), a scheduler that is not known, a negative prompt of a network whose guidance is embedded, even
                levels of another process than a flow.
        """
        _require_prompts(prompts)
        network, process, config = network_of(pipe), process_of(pipe.scheduler), pipe.scheduler.config
        guidance_dims = plain(network).config.get("time_cond_proj_dim")
        if negative_prompt and guidance_dims:
            raise InputError(
                f"negative_prompt {negative_prompt!r} has no effect where guidance is embedded: leave it out"
            )
        if even_levels or is_z_image(network):
            if not isinstance(process, Flow):
                raise InputError(
                    f"even_levels are those of a flow, not of {type(process).__name__}: leave it out"
                )
            process = dataclasses.replace(process, t_min=None)
        texts = [*prompts, negative_prompt]
        warn_of_truncation(pipe, texts, max_sequence_length)
        warn_of_other_timesteps(pipe.scheduler)
        embeddings = encoded(pipe, texts, max_sequence_length)
        if guidance_dims:
            w = torch.full((len(texts),), guidance_scale - 1.0)
            embeddings["timestep_cond"] = pipe.get_guidance_scale_embedding(w, embedding_dim=guidance_dims)
        weight = next(network.parameters())
        made = cls(
            network,
            process,
            prompts,
            {
                keyword: rows.to(weight) if rows.is_floating_point() else rows.to(weight.device)
                for keyword, rows in embeddings.items()
            },
            prediction_type=prediction_of(pipe.scheduler),
            guidance_scale=guidance_scale,
            guided=not guidance_dims,
            train_unconditional=train_unconditional,
            train_steps=config["num_train_timesteps"],
            timestep_scaling=config.get("timestep_scaling"),
        )
        made.__dict__["scheduler"] = pipe.scheduler, getattr(pipe.scheduler, "shift", None)
        return made

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of the latents that the network was made for; it accepts other sizes too."""
        config: Any = plain(self.network).config
        size = config.get("sample_size", LATENT_SIZE)
        h, w = (size, size) if isinstance(size, int) else size
        return config.in_channels, h, w

    @property
    def adapters(self) -> dict[str, nn.Parameter]:
        """The adapters of the network, by name; none before `add_lora`."""
        return adapters(plain(self.network))

    @property
    def evaluations(self) -> int:
        """Network evaluations for each state: 2 with guidance, else 1."""
        return 2 if self.guided else 1

    def train(self, mode: bool = True) -> "PipelineDenoiser":
        """Do nothing: the network stays in eval mode, in which gradients work as well."""
        return super().train(False)

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass: the same gradient with less memory and more time."""
        plain(self.network).enable_gradient_checkpointing(checkpointed)

    def scalings(self, t: Tensor) -> Scalings:
        """c_skip and c_out of D = c_skip x_t + c_out F at times t, of any shape; c_in is 1, as latents go in unscaled.

        Of latent consistency models they are those of D, boundary condition included.
        """
        c_skip, c_out, c_in = scalings(self.process, t, self.prediction_type, 1.0)
        if self.timestep_scaling is not None:
            skip, out = self._boundary(t)
            c_skip, c_out = skip + out * c_skip, out * c_out
        return Scalings(c_skip, c_out, torch.ones_like(c_in))

    def _boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        kt, sigma_data = (self.timestep_scaling or 0.0) * t, CONSISTENCY_SIGMA
        return sigma_data**2 / (kt**2 + sigma_data**2), kt / (kt**2 + sigma_data**2).sqrt()

    def null_condition(self, cond: Tensor) -> Tensor:
        """The number of the negative prompt, of the shape of `cond`.

        Raises:
            ValueError: guidance is on already.
        """
        if self.guided:
            raise InputError(
                f"this denoiser is guided by {self.guidance_scale:g} itself, and would be guided twice: make it with "
                "guidance_scale=1"
            )
        return torch.full_like(cond, len(self.prompts))

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Clean estimate of noisy latents.

        Args:
            x_t: latents, floating dtype, shape [N, C, h, w].
            t: times, shape [N].
            cond: prompt numbers, integers, shape [N] or [N, 1]; P is the negative prompt. None where there is one
                prompt only.

        Returns:
            D, of x_t's shape and dtype.

        Raises:
            TypeError: x_t holds integers, or cond does not.
            ValueError: prompt numbers are missing, unknown, or not one for each state; or the shift of the pipeline's
                scheduler was changed since.
        """
        require_floating([("x_t", x_t)])
        scheduler, shift = self.__dict__.get("scheduler", (None, None))
        if getattr(scheduler, "shift", None) != shift:
            raise InputError(
                f"the scheduler's shift was {shift} and is {scheduler.shift} now: make the denoiser anew"
            )
        rows = self._rows(cond, x_t)
        if self.guided:
            negative = torch.full_like(rows, len(self.prompts))
            both = self._predicted(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([negative, rows]))
            F_0, F_c = both.chunk(2)
            F_0 = F_0 if self.train_unconditional else F_0.detach()
            F_x = F_0 + self.guidance_scale * (F_c - F_0)
        else:
            F_x = self._predicted(x_t, t, rows)
        D_x = to_x0(self.process, F_x, x_t, t.to(x_t), self.prediction_type)
        if self.timestep_scaling is None:
            return D_x
        skip, out = (expand_like(c, x_t) for c in self._boundary(t.to(x_t)))
        return skip * x_t + out * D_x

    def _predicted(self, x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """F of states, conditioned on these rows of the embeddings, in x_t's dtype."""
        given = {keyword: self.get_buffer(f"prompt_{keyword}")[rows] for keyword in self._keywords}
        # that of the network; adapters have another
        dtype = self.get_buffer(f"prompt_{self._keywords[0]}").dtype
        if is_z_image(self.network):
            return velocity(self.network, x_t.to(dtype), t, **given).to(x_t.dtype)
        timestep = self.train_steps * t if isinstance(self.process, Flow) else t.round().long()
        F_x: Tensor = self.network(x_t.to(dtype), timestep=timestep, return_dict=False, **given)[0]
        return F_x.to(x_t.dtype)

    def _rows(self, cond: Tensor | None, x_t: Tensor) -> Tensor:
        P, N = len(self.prompts), len(x_t)
        if cond is None:
            if P > 1:
                raise InputError(f"which of the {P} prompts? give cond, their numbers, shape [{N}]")
            return torch.zeros(N, dtype=torch.long, device=x_t.device)
        if cond.is_floating_point() or cond.is_complex() or cond.dtype == torch.bool:
            raise InputTypeError(f"cond has dtype {cond.dtype}: give numbers of prompts, integers [{N}]")
        if cond.shape not in ((N,), (N, 1)):
            raise InputError(f"cond has shape {tuple(cond.shape)}: give numbers of prompts, integers [{N}]")
        rows = cond.reshape(N).long().to(x_t.device)
        if N and not 0 <= int(rows.min()) <= int(rows.max()) <= P:
            raise InputError(
                f"prompts are numbered 0..{P - 1}, and {P} is the negative one, not {rows.unique().tolist()}"
            )
        return rows

    def base(self) -> BaseDenoiser:
        """The network with its adapters switched off, without gradients; it costs no memory.

        Raises:
            ValueError: there are no adapters.
        """
        if not has_lora(self.network):
            raise InputError("there are no adapters to switch off: call add_lora first")
        return BaseDenoiser(self)

    def reference(self) -> nn.Module:
        """The denoiser as it is now, without gradients.

        With adapters it is a copy of them on the same network, or, as long as they change nothing, the network with
        its adapters switched off; without adapters it is a frozen copy of the network.
        """
        untrained = all(not p.any() for name, p in self.adapters.items() if ".lora_B." in name)
        if has_lora(self.network) and untrained:
            return self.base()
        return self.twin().requires_grad_(False)

    def twin(self) -> nn.Module:
        """A copy to be trained on its own: of the adapters, on the same network, if there are any, else of all."""
        if has_lora(self.network):
            return AdapterDenoiser(self, self.adapters)
        shared: dict[int, Any] = {id(rows): rows for rows in self.buffers(recurse=False)}
        return copy.deepcopy(self, shared)

    def trainable_state(self) -> dict[str, Tensor]:
        """Copies on the CPU of the parameters that are trained: the adapters, if there are any, else all."""
        return {name: p.detach().cpu().clone() for name, p in self._trained()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the parameters of a `trainable_state`.

        Raises:
            ValueError: other parameters than those that are trained here, or other shapes.
        """
        load_tensors(dict(self._trained()), state)

    def _trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in plain(self.network).named_parameters() if p.requires_grad)


def _require_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise InputError(f"prompts is {prompts!r}: give a list of at least one string")
