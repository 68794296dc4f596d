"""Parts of the network against the plain operators they replace."""

import pytest
import torch

from blockdiff.models.layers import _Heads, drop, rope


def plain_heads(qkv, cos, sin, heads):
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    return rotate(q), rotate(k), v


@pytest.mark.parametrize("own_positions", [False, True], ids=["shared", "of each row"])
def test_rotated_heads_and_their_gradient(own_positions):
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(50, (3, 7), generator=generator) if own_positions else torch.arange(7)
    cos, sin = rope(positions, 8)
    if own_positions:
        cos, sin = cos[:, None], sin[:, None]
    results = []
    for law in (plain_heads, _Heads.apply):
        qkv = torch.randn(3, 7, 3 * 16, generator=torch.Generator().manual_seed(1))
        qkv.requires_grad_()
        out = law(qkv, cos, sin, 2)
        sum((x * (i + 1) * x.detach().sin()).sum() for i, x in enumerate(out)).backward()
        results.append([*out, qkv.grad])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    x = torch.full((3, 333, 101), 2.0, requires_grad=True)
    torch.manual_seed(0)
    out = drop(x, rate)
    dropped = (out == 0).double().mean().item()
    # 4 standard errors of a share of 100,899: wrong once in 16,000.
    assert abs(dropped - rate) < 4 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert out[out > 0].unique().item() == pytest.approx(2 / (1 - rate), rel=1e-4)
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0)
    torch.manual_seed(0)
    assert torch.equal(drop(x, rate), out), "the seed decides"


def test_neighbours_are_dropped_independently():
    """Four elements share one random number of 64 bits."""
    torch.manual_seed(1)
    kept = drop(torch.ones(40_000, 4), 0.5) > 0
    patterns = (kept * torch.tensor([1, 2, 4, 8])).sum(-1).bincount(minlength=16)
    chi_square = ((patterns - 2500) ** 2 / 2500).sum().item()
    assert chi_square < 44.3  # 15 degrees of freedom, rejects wrongly once in 10,000


def test_no_dropout_is_nothing():
    x = torch.randn(5)
    assert torch.equal(drop(x, 0.0), x)
