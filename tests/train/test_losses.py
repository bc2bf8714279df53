"""The loss in chunks is torch's own, and so is its gradient."""

import pytest
import torch
from torch.nn import functional

from haplovl.train.losses import TOKENS, summed_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, TOKENS, 2 * TOKENS + 7])
def test_loss_and_gradient_are_those_of_torch(tokens, dtype):
    noise = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=noise).to(dtype) for n in (tokens, 50))
    targets = torch.randint(50, (tokens,), generator=noise)
    expected, found = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    loss = functional.cross_entropy((expected[0] @ expected[1].T).float(), targets, reduction="sum")
    own = summed_cross_entropy(found[0] @ found[1].T, targets)
    torch.testing.assert_close(own, loss, rtol=1e-6, atol=1e-6)
    (loss / 3).backward()
    (own / 3).backward()
    for ours, theirs in zip(found, expected, strict=True):
        # bf16 rounds the gradient of the logits before the division by 3 instead of after it.
        close = 1e-5 if dtype == torch.float32 else 2**-7
        assert (ours.grad - theirs.grad).norm() <= close * theirs.grad.norm()


def test_logits_stay_as_they_are_where_no_gradient_is_wanted():
    logits = torch.randn(5, 7)
    before = logits.clone()
    assert torch.isfinite(summed_cross_entropy(logits, torch.zeros(5, dtype=torch.long)))
    assert torch.equal(logits, before)
