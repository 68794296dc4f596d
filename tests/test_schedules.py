import dataclasses

import pytest
import torch

from blockdiff.errors import InputError
from blockdiff.schedules import SCHEDULES, get_schedule

NAMES = ["linear", "cosine", "square", "square_root", "logarithmic"]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def test_the_five_schedules_are_there():
    assert sorted(SCHEDULES) == sorted(NAMES)
    assert all(get_schedule(name).name == name for name in NAMES)


def test_unknown_name_is_an_input_error():
    with pytest.raises(InputError, match="linear"):
        get_schedule("quadratic")


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_ends_are_exact(name, dtype):
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    schedule = get_schedule(name)
    assert schedule.alpha(ends).tolist() == [1, 0]
    assert schedule.mask_rate(ends).tolist() == [0, 1]
    assert schedule.weight(ends)[0] == torch.inf
    assert schedule.alpha(ends).dtype == dtype


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_mask_rate_is_what_is_not_clean_and_only_grows(name, dtype):
    t = torch.linspace(0, 1, 1001, dtype=dtype)
    schedule = get_schedule(name)
    rate = schedule.mask_rate(t)
    torch.testing.assert_close(rate, 1 - schedule.alpha(t), rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert (rate.diff() > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_mask_rate_keeps_its_digits_near_zero(name):
    """In float32 1 − α is 0 there for cosine and square; the mask rate must not be."""
    t = torch.tensor([1e-5, 1e-4, 1e-3])
    schedule = get_schedule(name)
    expected = schedule.mask_rate(t.double())
    torch.testing.assert_close(schedule.mask_rate(t).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_inverse_undoes_mask_rate(name):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    schedule = get_schedule(name)
    torch.testing.assert_close(schedule.inverse(schedule.mask_rate(t)), t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_weight_is_the_derivative_it_stands_for(name):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    schedule = get_schedule(name)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - alpha), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("name", "alpha"),
    [
        ("linear", 0.75),
        ("cosine", 0.9238795325112867),  # cos(π/8)
        ("square", 0.9375),
        ("square_root", 0.5),
        ("logarithmic", 0.6780719051126377),  # 1 − log2(1.25)
    ],
)
def test_each_name_means_its_own_curve(name, alpha):
    t = torch.tensor(0.25, dtype=torch.float64)
    assert get_schedule(name).alpha(t).item() == pytest.approx(alpha, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mask_rate", lambda t: 0.5),
        ("mask_rate", lambda t: t * torch.nan),
        ("mask_rate", lambda t: t / 2),
        ("mask_rate", lambda t: 1 - t),
        ("alpha", lambda t: t),
        ("weight", lambda t: -1 / t),
        ("weight", lambda t: t.sum()),
        ("inverse", lambda rate: rate**2),
        ("inverse", lambda rate: rate * torch.nan),
    ],
)
def test_what_cannot_be_a_schedule_is_refused_when_it_is_made(name, wrong):
    with pytest.raises(InputError, match=f"the schedule 'linear': `{name}` must") as error:
        dataclasses.replace(get_schedule("linear"), **{name: wrong})
    assert "\n" not in str(error.value)
