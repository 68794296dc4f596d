"""What every denoiser that is a `transformers` model has in common: its face towards transformers.

    model(x_t, x_0)                       logits: see `Denoiser`
    model(input_ids, labels=labels)       .loss of the network's own objective, for a plain Trainer
    model.generate(input_ids, …)          text, by this package's sampler
    model.resize_token_embeddings(size)   the mask token stays the mask token

The objective and the sampler are floors above: both are found in the registry, by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from blockdiff.cache import BlockCache
from blockdiff.errors import InputError
from blockdiff.estimators import Estimator, make_estimator
from blockdiff.layout import BlockLayout
from blockdiff.models.card import CARD, card_to_push
from blockdiff.models.chain import Chain
from blockdiff.models.denoiser import Context, DenoiserOutput
from blockdiff.models.ngrams import Table
from blockdiff.noising import stratified_noise
from blockdiff.registry import GENERATION, OBJECTIVES

RECORD = "block_diffusion"  # where config.json of an adapted folder keeps our conventions
SAME = (
    "this model was adapted to predict masked tokens (prediction same): as the causal model that "
    "its folder opens as here it predicts badly; blockdiff.load_model opens it as what it is"
)
# The label of a token that does not count, as in all of transformers.
NOT_COUNTED = -100
# What transformers, peft and collators pass along, whatever its value, and no denoiser reads.
_UNREAD = {
    *("use_cache", "return_dict", "token_type_ids", "special_tokens_mask", "seq_idx"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}


class DenoiserModel(PreTrainedModel, GenerationMixin):
    """A `Denoiser` that is a transformers model.

    A subclass has `denoise`, `encode`, `decode` and `new_cache`, and a configuration with the
    conventions. A base class rather than a mixin, because `forward`, `generate` and
    `resize_token_embeddings` stand in the place of transformers' own: they have to come before
    PreTrainedModel and GenerationMixin in the order of bases, and here that is written once.

    Attributes:
        attention_backend: auto, dense, blockwise or flex.
        estimator: What draws the masks of a loss, by name or as an object; when left out the clip
            the configuration names while training, else `exact_k`, which is unbiased.
        graphs: Whether a sampler on CUDA records its evaluations as graphs.
        drawable: bool [V], which ids have a token; `load` knows.
        draft_table: What the order `verified` may draft with; `load` reads it from the folder.
    """

    supports_gradient_checkpointing: ClassVar[bool] = True  # type: ignore[misc]
    estimator: str | Estimator | None = None
    chain: Chain | None  # a subclass makes it
    # A subclass's: `Denoiser.__call__`, with the `backend` of attention, and the rest of it.
    denoise: Callable[..., DenoiserOutput]
    encode: Callable[..., Context]
    decode: Callable[..., Tensor]
    new_cache: Callable[..., BlockCache]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.attention_backend = "auto"
        self.graphs = True
        self.drawable: Tensor | None = None
        self.draft_table: Table | None = None
        ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")}
        self.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **ids)
        if config.causal or config.keep_first:
            # Trainer then counts a batch's tokens without position 0, as the loss does.
            self.loss_type = "ForCausalLM"

    def forward(
        self,
        input_ids: Tensor,
        x_0: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        layout: BlockLayout | None = None,
        sigma: Tensor | None = None,
        context: Context | None = None,
        at: Tensor | None = None,
        clean_at: Tensor | None = None,
        previous: Tensor | None = None,
        targets: Tensor | None = None,
        backend: str | None = None,
        **unread: Any,
    ) -> DenoiserOutput:
        """Logits or nll of x_t = `input_ids`, as `Denoiser` says; or the loss, with `labels`.

        With `labels` int64 [B, L], `input_ids` [B, L] are the clean tokens. A label is that of its
        own place, or −100 where the token is given and does not count, such as a prompt's. The
        output has `loss` alone: the mean nats per counted token of the model's own objective, over
        masks drawn by `estimator` (AR: exact); `num_items_in_batch`, where it is given, divides in
        the place of their number. A model of several block sizes trains each call in one of them,
        and is measured in the largest. Random numbers come from torch's global generator.

        `attention_mask` [B, L]: 0 at padding, which counts nowhere and which nothing attends to.
        `position_ids` [B, L]: where they do not go on from one token to the next another document
        begins, which nothing looks out of. Texts need not be multiples of the block size. Raises
        `InputError` for other labels, and for what a denoiser does not read.
        """
        _require_unread(unread)
        documents = _documents(input_ids, attention_mask, position_ids)
        others: dict[str, Any] = {"x_0": x_0, "layout": layout, "sigma": sigma}
        others |= {"context": context, "at": at, "clean_at": clean_at, "targets": targets}
        others |= {"previous": previous}
        if labels is not None:
            if told := [name for name, value in others.items() if value is not None]:
                raise InputError(
                    f"with `labels` the model draws its own masks: leave {told[0]} out"
                )
            return DenoiserOutput(
                loss=self._loss(input_ids, labels, documents, num_items_in_batch, backend)
            )
        if documents is not None:
            if layout is None:
                layout = self.own_layout(input_ids.shape[1], x_0 is None and context is None)
            others["layout"] = replace(layout, documents=documents)
        return self._chained(input_ids, **others, backend=backend)

    def _chained(
        self, input_ids: Tensor, *, previous: Tensor | None = None, **others: Any
    ) -> DenoiserOutput:
        """`denoise`, and the chain where the tokens before are given."""
        out = self.denoise(input_ids, **others)
        if previous is not None and self.chain is not None and out.logits is not None:
            count = len(previous)
            own = out.logits[:count] + self.chain(previous).to(out.logits.dtype)
            out.logits = torch.cat([own, out.logits[count:]])
        return out

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compiles each layer; raises `InputError` where a network cannot be compiled."""
        raise InputError("`compile` is for the package's own networks; leave it out")

    def own_layout(self, length: int, alone: bool = False) -> BlockLayout:
        """The configuration's blocks; one block where x_t is `alone` (MDLM), unless it is AR."""
        whole = alone and not self.config.causal
        layout: BlockLayout = self.config.layout_of(length, length if whole else None)
        return layout

    def _loss(
        self,
        x_0: Tensor,
        labels: Tensor,
        documents: Tensor | None,
        tokens: Tensor | int | None,
        backend: str | None,
    ) -> Tensor:
        config, (rows, length) = self.config, x_0.shape
        counted = _counted(x_0, labels, config.mask_token_id)
        objective = OBJECTIVES.find(config.objective)
        sizes = config.block_sizes if self.training else (config.block_size,)
        chosen = sizes[int(torch.randint(len(sizes), ()))] if len(sizes) > 1 else sizes[-1]
        size = objective.block_size(length, chosen)
        if short := -length % size:  # the last block is padded
            if documents is None:
                documents = torch.zeros_like(x_0)
            documents = F.pad(documents, (0, short), value=-1)
            x_0, counted = F.pad(x_0, (0, short)), F.pad(counted, (0, short))
        layout = config.layout_of(length + short, size, documents=documents)
        what: Any = counted & objective.counted(x_0, config.keep_first, documents)
        tokens = what.sum() if tokens is None else tokens
        if objective.noised:
            seed = int(torch.randint(2**62, ()))
            noise = stratified_noise(rows, layout, torch.Generator(x_0.device).manual_seed(seed))
            clip = None if config.clip is None else tuple(config.clip)
            unbiased = clip is None or not self.training
            estimator = self.estimator or ("exact_k" if unbiased else "clipped")
            if objective.masks == "all":
                estimator, clip = "clipped", (1.0, 1.0)
            draw = make_estimator(estimator, clip=clip)
            what = draw(x_0, layout, noise, what, config.mask_token_id)
        # Not the model itself: hooks on it, such as a sharded model's, run once a pass.
        network = self._chained if backend is None else partial(self._chained, backend=backend)
        found = objective.nats(network, x_0, what, layout)
        parts = found if isinstance(found, dict) else {"": found}
        nats = torch.stack([objective.parts.get(name, 1.0) * parts[name] for name in parts])
        return nats.sum() / torch.as_tensor(tokens, device=nats.device).clamp(min=1)

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> Any:
        """Prompts with the text that follows them, ids int64 [B, T] padded on the right.

        `inputs` or `input_ids` int64 [B, P], padded on the left where `attention_mask` is 0;
        without them the text begins with the beginning-of-text token. `options`: those of a
        `GenerationConfig` that mean something here (`max_new_tokens` or `max_length`, `do_sample`,
        `temperature`, `top_k`, `top_p`, `eos_token_id`, `pad_token_id`, `stop_strings` with the
        `tokenizer`, `num_return_sequences`, `return_dict_in_generate`), and all of
        `SamplingOptions` (`sampler`, `block_size`, `seed`, …). What is not given is that of
        `generation_config`, else the model's own, else that of `SamplingOptions`. With a `seed` the
        tokens are those of `blockdiff.generate`; without one it is drawn from torch's global
        generator, and 0 where nothing is sampled.

        `streamer`: its `put` gets the prompt, then tokens [T] as they are final, in the order of
        the text; its `put_draft`, where it has one, the ids [T] behind them, masks included; last
        comes `end`. Raises `InputError` for what cannot be meant or is not read here.

        Example:
            >>> import blockdiff
            >>> model, tokenizer = blockdiff.load("starter", device="cpu")
            >>> prompt = tokenizer("The people of", return_tensors="pt")
            >>> ids = model.generate(**prompt, max_new_tokens=5, seed=1)
            >>> ids.shape[1] - prompt["input_ids"].shape[1]
            5
        """
        if inputs is not None and input_ids is not None:
            raise InputError("`inputs` and `input_ids` are the same: give one of them")
        return GENERATION["transformers"].generate(
            self,
            inputs if input_ids is None else input_ids,
            attention_mask,
            generation_config,
            options,
            streamer,
        )

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """The embedding after the vocabulary has another size; the output map follows.

        The mask token keeps its id; a model that has none goes on having none. Raises `InputError`
        for a size that would cut the mask token off.
        """
        config, mask, before = self.config, self.config.mask_token_id, self.config.vocab_size
        if new_num_tokens is not None and mask < before:
            rows = new_num_tokens + -new_num_tokens % (pad_to_multiple_of or 1)
            if rows <= mask:
                raise InputError(
                    f"a vocabulary of {rows} has no room for the mask token, whose id is {mask}; "
                    f"keep at least {mask + 1} tokens"
                )
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if mask >= before:
            config.mask_token_id = config.vocab_size
        if self.drawable is not None:
            # New ids have tokens, what pads the vocabulary has none.
            known = torch.zeros(config.vocab_size, dtype=torch.bool, device=self.drawable.device)
            known[:before] = self.drawable[: config.vocab_size]
            known[before:new_num_tokens] = new_num_tokens is not None
            self.drawable = known
        return table

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *rest: Any, **by: Any) -> Any:
        # transformers has just put a card of its own there, or the one that is on the hub.
        card = Path(working_dir) / CARD
        card.write_text(card_to_push(self, repo_id, card.read_text("utf-8")), "utf-8")
        return super()._upload_modified_files(working_dir, repo_id, *rest, **by)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: a saved folder's file imports this package, and holds no copy of its code."""


def register(config_class: type, model_class: type[DenoiserModel]) -> None:
    """Makes transformers' Auto classes open a model type as ours."""
    # Loading these registers a `DiT` (auto.py), which needs this module whole.
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        auto.register(config_class, model_class, exist_ok=True)
    warn_of_same(AutoModelForCausalLM)


def warn_of_same(auto: Any) -> None:
    """Lets transformers' Auto class say when it opens an adapted folder that is no AR model."""
    own = auto.from_pretrained.__func__

    def from_pretrained(cls: Any, *given: Any, **options: Any) -> Any:
        model = own(cls, *given, **options)
        opened = model[0] if isinstance(model, tuple) else model
        record = getattr(opened.config, RECORD, None)
        if isinstance(record, dict) and record.get("prediction") == "same":
            warnings.warn(SAME, stacklevel=2)
        return model

    auto.from_pretrained = classmethod(from_pretrained)


def _require_unread(given: Mapping[str, Any]) -> None:
    """Raises `InputError` for a keyword that asks for something."""
    for name, value in given.items():
        if name not in _UNREAD and value is not None and value is not False:
            raise InputError(f"a denoiser does not read `{name}`; leave it out")


def _documents(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor | None:
    """Which document each token belongs to, int64 [B, L], −1 at padding; None where all is one."""
    documents = None
    if position_ids is not None:
        if len(position_ids) == 1:
            position_ids = position_ids.expand(len(input_ids), -1)
        _require_shape("position_ids", position_ids, input_ids)
        begins = F.pad(position_ids.diff(dim=1) != 1, (1, 0))
        if bool(begins.any()):
            documents = begins.cumsum(1)
    if attention_mask is not None:
        _require_shape("attention_mask", attention_mask, input_ids)
        if not bool(attention_mask.all()):
            if documents is None:
                documents = torch.zeros_like(input_ids)
            documents = documents.masked_fill(attention_mask == 0, -1)
    return documents


def _counted(x_0: Tensor, labels: Tensor, mask_token_id: int) -> Tensor:
    """bool [B, L]: the tokens that have a label; raises `InputError` for labels of another text."""
    _require_shape("labels", labels, x_0)
    counted = labels != NOT_COUNTED
    wrong = counted & ((labels != x_0) | (labels == mask_token_id))
    if bool(wrong.any()):
        if bool((wrong & (labels == x_0)).any()):
            raise InputError(
                "input_ids hold the mask token; with `labels` they are the clean tokens"
            )
        raise InputError(
            "labels differ from input_ids: a label is its own place's token, or -100; the model "
            "shifts and masks by itself (for a collator: mlm=False)"
        )
    return counted


def _require_shape(name: str, given: Tensor, input_ids: Tensor) -> None:
    if given.shape != input_ids.shape or given.dim() != 2:
        raise InputError(
            f"`{name}` is {list(given.shape)}; it must be of the shape of input_ids, "
            f"{list(input_ids.shape)} (batch, tokens)"
        )
