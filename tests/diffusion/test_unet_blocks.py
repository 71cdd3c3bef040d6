"""Parts of the UNet: group norms in half precision, heads of attention, and attention at chosen resolutions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffrl.diffusion.networks.unet import UNet
from diffrl.diffusion.networks.unet_blocks import Attention, GroupNorm
from diffrl.errors import InputError


class NormDtypes(TorchDispatchMode):
    """Dtypes of what PyTorch's kernel of group norms was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "native_group_norm" in str(func):
            self.seen.append(tuple(a.dtype for a in args if isinstance(a, Tensor)))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "module"])
def test_statistics_of_half_precision_are_of_float32(dtype: torch.dtype, whole: bool) -> None:
    """Against the formula in float64, where the mean is 75 times the standard deviation."""
    torch.manual_seed(0)
    x = (300 + 4 * torch.randn(3, 16, 5, 7)).to(dtype)
    norm = GroupNorm(4, 16)
    for parameter in norm.parameters():
        parameter.data = torch.randn(16).to(dtype).float()
    if whole or dtype == torch.float64:
        norm.to(dtype)
    with NormDtypes() as dtypes, torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        y = norm(x)
    groups = x.double().view(3, 4, -1)
    z = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    gamma, beta = (p.detach().double()[:, None, None] for p in (norm.weight, norm.bias))
    wanted = gamma * z.view(x.shape) + beta
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    assert set(dtypes.seen) == {(inner,) * 3} and y.dtype == dtype
    half = torch.finfo(dtype).eps / 2  # rounded once; and what float32 loses of a mean of 300
    assert bool(((y - wanted).abs() <= half * wanted.abs() + 1e-4).all())


def test_heads_of_attention_are_softmaxes_of_their_channels() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 2, 3, dtype=torch.float64)
    attention = Attention(12, 4).double()
    attention.out.weight.data = torch.eye(12, dtype=torch.float64)[:, :, None, None]
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)  # [N, C, H W]
    wanted = torch.empty_like(q)
    for n in range(2):
        for head in range(3):
            c = slice(4 * head, 4 * head + 4)
            weights = (q[n, c].T @ k[n, c] / 2).exp()
            wanted[n, c] = v[n, c] @ (weights / weights.sum(1, keepdim=True)).T
    torch.testing.assert_close(attention(x) - x, wanted.view_as(x), rtol=0, atol=1e-12)
    whole, same = Attention(12), Attention(12, 12)
    same.load_state_dict(whole.state_dict())
    nn.init.normal_(whole.out.weight)
    same.out.weight.data = whole.out.weight.data
    torch.testing.assert_close(whole.double()(x), same.double()(x), rtol=0, atol=1e-12)


def test_attention_at_resolutions_stands_behind_their_blocks_and_leaves_the_rest_as_it_was() -> None:
    """Widths are 4 and 8 at heights of 8 and 4; a checkpoint without attention loads, and gives its numbers."""
    options: dict[str, Any] = {"channels": 4, "multipliers": (1, 2), "blocks": 2}
    networks = []
    for more in ({}, {"attention_resolutions": (4,), "head_channels": 4}):
        torch.manual_seed(0)
        networks.append(UNet((1, 8, 8), **options, **more))
    plain, attending = networks
    assert not any("attend" in name for name in plain.state_dict())
    for name, value in plain.state_dict().items():  # drawn before attention
        assert torch.equal(attending.state_dict()[name], value)
    places = [[isinstance(a, Attention) for a in way] for way in (attending.attend_down, attending.attend_up)]
    assert places == [[False, False, True, True], [True, True, False, False]]
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    missing, unexpected = attending.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("attend_") for name in missing) and unexpected == []
    x, c_noise = torch.randn(2, 1, 8, 8), torch.randn(2)
    assert torch.equal(attending(x, c_noise), plain(x, c_noise))  # attention begins as 0
    nn.init.normal_(attending.attend_up[0].out.weight)
    assert not torch.allclose(attending(x, c_noise), plain(x, c_noise))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_resolutions": (16,)},
            "has 16, but images in this UNet have heights of 8, 4: give some of these",
        ),
        ({"attention_resolutions": (4,), "head_channels": 3}, "head_channels is 3, .* is 8: give a divisor"),
        ({"attention": True, "head_channels": 16}, "head_channels is 16, .* is 8: give a divisor"),
        ({"attention": True, "head_channels": 0}, "head_channels is 0"),
    ],
)
def test_attention_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UNet((1, 8, 8), **{"channels": 4, **options})
