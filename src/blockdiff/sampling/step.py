"""What the engine tells after each evaluation.

Shapes: B rows, S length of the longest row's canvas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The state after one network evaluation, on the host.

    `tokens` int64 [B, S]: prompt and text so far, the mask token where nothing is fixed.
    `fixed` bool [B, S]: the positions this step fixed. `nfe` int64 [B]: network evaluations of each
    row so far, the prompt's included. `lengths` int64 [B]: final length of a finished row (prompt
    and EOS included), −1 while it goes on. `rejected` bool [B]: rows ended by the low-entropy rule.
    `rows` int64 [B]: what `Engine.admit` called the rows; 0, 1, … in `stream`. `logprobs` float64
    [B, S]: log p_θ of a token in the evaluation that fixed it, before temperature and cuts, where
    `SamplingOptions.logprobs` asks for it, else NaN; None where no row asks. Where the order of a
    row edits, `edited` bool [B, S] are the positions whose token this step wrote over, and
    `settled` int64 [B] is how many tokens from each row's beginning are final. `stopped` bool [B]:
    rows that a rule or their constraint ended, and not `max_new_tokens`.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> *_, last = blockdiff.stream(model, [[1, 2]], max_new_tokens=2, stop="none")
        >>> isinstance(last, blockdiff.Step), last.lengths.tolist()
        (True, [4])
    """

    tokens: Tensor
    fixed: Tensor
    nfe: Tensor
    lengths: Tensor
    rejected: Tensor
    rows: Tensor
    logprobs: Tensor | None = None
    edited: Tensor | None = None
    settled: Tensor | None = None
    stopped: Tensor | None = None

    @property
    def done(self) -> Tensor:
        return self.lengths >= 0

    def after(self, *others: Step) -> Step:
        """This state with what `others`, of the same engine just before it, changed as well."""
        changed: dict[str, Tensor] = {}
        for name in ("fixed", "edited"):
            parts = [getattr(step, name) for step in (self, *others)]
            if parts[0] is not None:
                changed[name] = torch.stack(parts).any(0)
        return replace(self, **changed)

    def of(self, rows: Tensor) -> Step:
        """The state of some rows."""
        parts = {name: value for name, value in vars(self).items() if value is not None}
        return Step(**{name: value[rows] for name, value in parts.items()})

    def final(self, row: int, start: int, mask_token_id: int) -> list[int]:
        """The tokens of `row` from position `start` on that no later step changes.

        They end with the row, before its first masked position, or before a block that is edited.
        """
        length = int(self.lengths[row])
        if length >= 0:
            return self.tokens[row, start:length].tolist()
        end = None if self.settled is None else int(self.settled[row])
        new: list[int] = self.tokens[row, start:end].tolist()
        return new[: new.index(mask_token_id)] if mask_token_id in new else new
