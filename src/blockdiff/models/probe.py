"""Whether a causal language model can be adapted, found out by what it does.

    its attention is called once in every layer, without a mask or a bias of its own, and is told
    the sliding window that the configuration gives the layer
    at L' = 1 it gives the logits that the model itself gives
    a token of a later block changes nothing, and one of the same block does
    tokens after a cached prefix give what they give in one pass

The text is two rows of three blocks of four tokens: a tenth of a second for a small model. A model
is probed when it is adapted, and again whenever it is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockdiff.cache import LayerShape
from blockdiff.errors import first_line
from blockdiff.layout import BlockLayout
from blockdiff.models.adapted import Adapted
from blockdiff.models.passes import INTERFACE, Cached, Streams, Unsuitable

BLOCK, BLOCKS = 4, 3


@dataclass
class _Recorder(Streams):
    """Attends like `Streams`, and keeps which layers were called, their shapes and windows."""

    calls: list[int] = field(default_factory=list)
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sliding: int | None, **score: Any
    ) -> Tensor:
        self.calls.append(layer)
        self.windows[layer] = sliding
        self.shapes[layer] = LayerShape(k.shape[1], k.shape[-1], v.shape[-1])
        return super().__call__(layer, q, k, v, sliding, **score)


def require_interface(lm: PreTrainedModel) -> None:
    """Raises `Unsuitable` where transformers cannot put another attention into the model."""
    name = type(lm).__name__
    if lm.get_output_embeddings() is None:
        raise Unsuitable(f"{name} cannot be adapted: it has no map from hidden states to logits")
    if not lm._can_set_attn_implementation():
        raise Unsuitable(
            f"{name} cannot be adapted: its attention is written into its layers, and "
            "transformers' attention interface does not reach it"
        )


@torch.no_grad()
def probe(model: Adapted) -> None:
    """Raises `Unsuitable` for a model that does not behave; finds the shapes of its cache."""
    was_training = model.training
    model.eval()
    try:
        _probe(model)
    except Unsuitable as error:
        name = type(model.lm).__name__
        raise Unsuitable(f"{name} cannot be adapted: {error}") from None
    finally:
        model.train(was_training)


def _probe(model: Adapted) -> None:
    config, lm = model.config, model.lm
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, BLOCKS * BLOCK), generator=random)
    tokens[tokens == config.mask_token_id] = (config.mask_token_id + 1) % config.vocab_size
    tokens = tokens.to(model.device)
    whole = BlockLayout(tokens.shape[1], BLOCK)
    single = BlockLayout(tokens.shape[1], 1)
    lm.set_attn_implementation("eager")
    try:
        own = lm(input_ids=tokens, use_cache=False).logits
    except Exception as error:  # whatever a model's own code says
        raise Unsuitable(f"it does not run on token ids alone: {first_line(error)}") from None
    finally:
        lm.set_attn_implementation(INTERFACE)
    recorder = _Recorder(single, len(tokens), "auto")
    try:
        hidden = model._run(tokens, None, recorder)
    except Unsuitable:
        raise
    except Exception as error:
        raise Unsuitable(
            f"its layers do not run with another attention: {first_line(error)}"
        ) from None
    layers = config.num_hidden_layers
    if sorted(recorder.calls) != list(range(layers)):
        raise Unsuitable(
            f"attention is called {len(recorder.calls)} times in its {layers} layers, where each "
            "must call it once: some mix tokens in another way"
        )
    _check_windows(lm.config.get_text_config(), recorder.windows, config.length)
    model.shapes = [recorder.shapes[layer] for layer in range(layers)]
    # Windows ask the cache for positions; experts may ask the device who is theirs (untried).
    experts = any("experts" in name for name, _ in lm.named_modules())
    model.graphs = not experts and not any(recorder.windows.values())
    causal = model._read_out(hidden, None).logits
    assert causal is not None
    if not _close(causal, own, model.dtype):
        raise Unsuitable(
            "with blocks of one token its logits are not its own: they differ by up to "
            f"{(causal - own).abs().max():.2g}"
        )

    def states(x: Tensor) -> Tensor:
        return model._run(x, None, Streams(whole, len(x), "auto"))

    base, later, inside = states(tokens), tokens.clone(), tokens.clone()
    later[:, 2 * BLOCK] = _other(tokens[:, 2 * BLOCK], config.vocab_size)
    inside[:, 2 * BLOCK - 1] = _other(tokens[:, 2 * BLOCK - 1], config.vocab_size)
    if not _close(states(later)[:, : 2 * BLOCK], base[:, : 2 * BLOCK], model.dtype):
        raise Unsuitable("a token changes what comes before its block")
    if torch.equal(states(inside)[:, BLOCK], base[:, BLOCK]):
        raise Unsuitable("a token does not see the later ones of its block")
    if not _close(_after_cache(model, tokens), base[:, 2 * BLOCK :], model.dtype):
        raise Unsuitable("a block after cached ones is not what it is in one pass")


def _check_windows(base: Any, found: dict[int, int | None], length: int) -> None:
    """Raises `Unsuitable` where attention is not told the window that the configuration has.

    The text of the probe is shorter than nearly all windows: its logits would not tell.
    """
    window = getattr(base, "sliding_window", None)
    if getattr(base, "use_sliding_window", None) is False:
        window = None
    kinds = getattr(base, "layer_types", None)
    for layer, told in found.items():
        kind = kinds[layer] if kinds else None
        if kind not in (None, "full_attention", "sliding_attention"):
            raise Unsuitable(f"layer {layer} is of the kind {kind!r}, which is more than attention")
        wanted = None if kind == "full_attention" else window
        if min(told or length, length) != min(wanted or length, length):
            raise Unsuitable(
                f"layer {layer} has a sliding window of {wanted} tokens, and its attention is told "
                f"{told}"
            )


def _after_cache(model: Adapted, tokens: Tensor) -> Tensor:
    """Hidden states of the last block after the others were cached."""
    before, rows = 2 * BLOCK, np.arange(len(tokens))
    context = model.encode(tokens[:, :before], BlockLayout(before, BLOCK))
    cache = model.new_cache(len(tokens), before, BLOCK)
    counts = np.full(len(tokens), before)
    cache.admit(rows, np.full(len(tokens), BLOCK), counts)
    cache.append(rows, context.keys, context.values, counts)
    positions = torch.arange(before, tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    return model._run(tokens[:, before:], positions, Cached(cache, positions, None))


def _other(token: Tensor, vocab_size: int) -> Tensor:
    return (token + 1 + vocab_size // 2) % vocab_size


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for rounding, relative to the largest.

    In bf16 some numbers of a deep network are off by a tenth of the largest, whichever way
    attention is computed: norms are compared there, which a wrong mask moves by half.
    """
    a, b = a.float(), b.float()
    if dtype in (torch.float32, torch.float64):
        return bool((a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-3))
    return bool((a - b).norm() <= 0.2 * b.norm())
