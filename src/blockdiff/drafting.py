"""Objectives of models that draft and verify: (model, x_0, draw) → parts of the loss, [B, L] each.

    joint   {"bound", "ar"}: `bd3lm` of the noised stream and `ar` of the clean one, in one pass
    draft   {"draft", "accepted"}: cross entropy of masked blocks with what AR says there, of what
            drafts alone; and the share of drafts that AR would accept

A model that `joint` trained verifies with the clean stream alone, by exact AR, and drafts with the
noised one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blockdiff.laws import Objective
from blockdiff.layout import BlockLayout
from blockdiff.models.denoiser import Context
from blockdiff.models.gated import is_draft
from blockdiff.noising import Draw
from blockdiff.objectives import Forward, bd3lm, place
from blockdiff.registry import register_objective


def joint(
    model: Forward,
    x_0: Tensor,
    draw: Draw,
    layout: BlockLayout,
    context: Context | None = None,
) -> dict[str, Tensor]:
    """`bd3lm`, and beside it what AR pays: both streams predict, in one pass.

    {"bound", "ar"}: nats per token [B, L] of each. With blocks of one token the two are the same,
    and "ar" is left out.
    """
    if layout.block_size == 1:
        return {"bound": bd3lm(model, x_0, draw, layout, context)}
    assert draw.maskable is not None
    masked, counted = draw.masked, draw.maskable.clone()
    counted[:, 0] = False
    of_masked = x_0.repeat(len(masked) // len(x_0), 1)[masked]
    nll = model(
        draw.x_t,
        x_0=x_0 if context is None else None,
        context=context,
        sigma=draw.sigma,
        at=masked,
        clean_at=counted,
        targets=torch.cat([of_masked, x_0[counted]]),
        layout=layout,
    ).nll
    assert nll is not None
    own, exact = nll[: len(of_masked)], nll[len(of_masked) :]
    bound = place(own * draw.weight[masked], masked).view(-1, *x_0.shape).sum(0)
    return {"bound": bound, "ar": place(exact, counted)}


def draft(
    model: Forward,
    x_0: Tensor,
    draw: Draw,
    layout: BlockLayout,
    context: Context | None = None,
) -> dict[str, Tensor]:
    """What a drafter pays: cross entropy with the AR distribution at every masked token.

    {"draft", "accepted"}, per token [B, L], means over what is drafted: −Σ_v p(v) log q(v), and the
    share Σ_v min(p(v), q(v)) that verification accepts. p is what blocks of one token say after the
    true text, without a gradient; q the masked block's prediction with the chain's after the true
    token before. The copies are fully masked: weights and the first token of a block under
    "shift", which is AR's own, play no part.
    """
    masked = draw.x_t != x_0
    own: dict[str, Any] = {"x_0": x_0 if context is None else None, "context": context}
    row, column = masked.nonzero(as_tuple=True)
    own |= {"at": masked, "previous": x_0[row, (column - 1).clamp(min=0)], "sigma": draw.sigma}
    if layout.prediction == "shift":
        logits = model(draw.x_t, clean_at=masked, layout=layout, **own).logits
        assert logits is not None
        drafted, exact = logits.float().chunk(2)
    else:
        found = model(draw.x_t, layout=layout, **own).logits
        single = replace(layout, block_size=1)
        with torch.no_grad():
            true = model(draw.x_t, layout=single, **own | {"previous": None}).logits
        assert found is not None and true is not None
        drafted, exact = found.float(), true.float()
    log_q, log_p = (_log_softmax(x, draw.x_t[masked]) for x in (drafted, exact.detach()))
    p = log_p.exp()
    paid = -(p * log_q.masked_fill(p == 0, 0.0)).sum(-1)
    accepted = torch.minimum(p, log_q.detach().exp()).sum(-1)
    # The mean over all that counts is then one over what is drafted.
    assert draw.maskable is not None
    share = draw.maskable.sum() / masked.sum().clamp(min=1)
    return {
        name: place(share * value, masked)
        for name, value in (("draft", paid), ("accepted", accepted))
    }


def _log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """log p [P, V] of logits, where the mask token `mask` [P] has none."""
    return logits.scatter(-1, mask[:, None], -torch.inf).log_softmax(-1)


register_objective(
    Objective(
        "joint",
        joint,
        network={"prediction": "shift", "clean_stream": "causal"},
        bound=bd3lm,
        parts={"ar": 1.0},
    )
)
register_objective(
    Objective("draft", draft, bound=bd3lm, masks="all", parts={"accepted": 0.0}, trains=is_draft)
)
