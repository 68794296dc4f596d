"""How likely a causal language model finds a text: generative perplexity.

Long texts are read in windows of W tokens that move by half of one; each token is scored once, in
the first window that holds it (the paper: GPT-2 Large, W = 1,024, stride 512). Every text follows
the judge's beginning-of-text token, or its end-of-text token where it has none, so its first token
is scored too; special tokens within a text are not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from blockdiff import objectives
from blockdiff.checks import numbers
from blockdiff.data.tokenizers import bos_id
from blockdiff.device import choose_device
from blockdiff.errors import InputError, first_line
from blockdiff.models.adapted import RECORD
from blockdiff.models.config import DiTConfig
from blockdiff.models.denoiser import Denoiser
from blockdiff.models.loading import load

WINDOW = 1024
# Tokens in one evaluation of the judge.
TOKENS_PER_PASS = 8192

# ids int64 [n, T] padded on the right, their numbers of tokens [n] → nats [n, T], of token i at i.
Score = Callable[[Tensor, Tensor], Tensor]
# The same → last hidden states [n, E] of the last token.
Hidden = Callable[[Tensor, Tensor], Tensor]


class Judge:
    """A causal language model that scores texts."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        score: Score,
        hidden: Hidden,
        window: int,
    ) -> None:
        self.name, self.tokenizer, self.window = name, tokenizer, window
        self._score, self._hidden = score, hidden
        self.first = bos_id(tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    @torch.no_grad()
    def nats(
        self, texts: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Nats float64 [n] and scored tokens int64 [n] of each text; `progress`: windows done."""
        pieces: list[tuple[int, list[int], int]] = []  # text, window, tokens not to score
        for number, text in enumerate(texts):
            ids = ([] if self.first is None else [self.first]) + self.encode(text)
            for begin, unscored in windows(len(ids), self.window):
                pieces.append((number, ids[begin : begin + self.window], unscored))
        special = torch.tensor(sorted(self.tokenizer.all_special_ids), dtype=torch.int64)
        nats = torch.zeros(len(texts), dtype=torch.float64)
        count = torch.zeros(len(texts), dtype=torch.int64)
        for places, x, sizes in _batches([ids for _, ids, _ in pieces]):
            batch = [pieces[place] for place in places]
            position = torch.arange(x.shape[1])
            given = torch.tensor([piece[2] for piece in batch])[:, None]
            scored = (position >= given) & (position < sizes[:, None])
            scored &= ~torch.isin(x, special)
            found = torch.where(scored, self._score(x, sizes).cpu().double(), 0.0)
            owner = torch.tensor([piece[0] for piece in batch])
            nats.index_add_(0, owner, found.sum(-1))
            count.index_add_(0, owner, scored.sum(-1))
            if progress is not None:
                progress(len(batch))
        return nats, count

    @torch.no_grad()
    def features(
        self, texts: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """The last hidden state float32 [n, E] of each text's last token within the window."""
        rows = [([] if self.first is None else [self.first]) + self.encode(one) for one in texts]
        rows = [row[: self.window] for row in rows]
        found: list[Tensor | None] = [None] * len(rows)
        for places, x, sizes in _batches(rows):
            for place, hidden in zip(places, self._hidden(x, sizes).float().cpu(), strict=True):
                found[place] = hidden
            if progress is not None:
                progress(len(places))
        return torch.stack([one for one in found if one is not None])


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows that have tokens, of like lengths together: their places, ids padded with 0, sizes."""
    left = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i]))
    while left:
        count = max(1, TOKENS_PER_PASS // len(rows[left[-1]]))
        places, left = left[-count:], left[:-count]
        sizes = torch.tensor([len(rows[i]) for i in places])
        x = torch.zeros(len(places), int(sizes.max()), dtype=torch.int64)
        for row, i in enumerate(places):
            x[row, : len(rows[i])] = torch.tensor(rows[i])
        yield places, x, sizes


def windows(tokens: int, window: int) -> list[tuple[int, int]]:
    """Where the windows over a text of `tokens` begin, and how many first tokens each only reads.

    The first token of the text is not scored; each other is, in the first window that holds it.
    """
    stride = max(window // 2, 1)
    found = [(0, 1)]
    while found[-1][0] + window < tokens:
        begin = found[-1][0] + stride
        found.append((begin, window - stride))
    return found


def load_judge(source: str | Path, window: int | None = None, device: str | None = None) -> Judge:
    """A judge from a folder or hub id: any causal LM of `transformers`, or an AR model of ours.

    `window`: tokens it reads at once, at most (and by default) 1,024 or what it was made for.
    Raises `InputError` when there is no such model.
    """
    numbers(window=window)
    reach = WINDOW if window is None else window
    try:
        config = AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot open a judge in {source}: {first_line(error)}") from None
    where = choose_device(device)
    if config.model_type == DiTConfig.model_type:
        model, tokenizer = load(source, device=where)
        if not model.config.causal:
            raise InputError(f"{source} is {model.config.kind}; a judge must be autoregressive")
        size = min(reach, model.config.length)
        return Judge(str(source), tokenizer, _own_score(model), _own_hidden(model), size)
    record = getattr(config, RECORD, None)
    if record is not None and record.get("prediction") != "shift":
        raise InputError(
            f"{source} predicts masked tokens only (prediction same); a judge is autoregressive"
        )
    try:
        network: Any = AutoModelForCausalLM.from_pretrained(str(source), use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot open a judge in {source}: {first_line(error)}") from None
    network.eval().to(where)
    longest = getattr(config, "max_position_embeddings", None)
    longest = WINDOW if longest is None else longest
    reach = min(reach, longest)
    return Judge(str(source), tokenizer, _score_of(network), _hidden_of(network), reach)


def _own_score(model: Denoiser) -> Score:
    def score(x: Tensor, sizes: Tensor) -> Tensor:
        there = torch.arange(x.shape[1]) < sizes[:, None]
        return objectives.ar(model, x.to(model.device), there.to(model.device))

    return score


def _score_of(network: Any) -> Score:
    def score(x: Tensor, sizes: Tensor) -> Tensor:
        x = x.to(network.device)
        # Padding comes last, and a causal model never reads ahead.
        logits = network(input_ids=x).logits[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        return F.pad(nll.view(len(x), -1), (1, 0))

    return score


def _own_hidden(model: Denoiser) -> Hidden:
    def hidden(x: Tensor, sizes: Tensor) -> Tensor:
        seen: list[Tensor] = []
        head: Any = cast(Any, model).get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            last = torch.arange(x.shape[1]) == sizes[:, None] - 1
            model(x.to(model.device), at=last.to(model.device))
        finally:
            hook.remove()
        return seen[0]

    return hidden


def _hidden_of(network: Any) -> Hidden:
    def hidden(x: Tensor, sizes: Tensor) -> Tensor:
        states: Tensor = network.base_model(input_ids=x.to(network.device)).last_hidden_state
        return states[torch.arange(len(x)), (sizes - 1).to(states.device)]

    return hidden
