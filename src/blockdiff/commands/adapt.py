"""`blockdiff adapt`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blockdiff.commands.options import Command, Given


@dataclass(frozen=True)
class AdaptOptions:
    """Turn a causal language model into a block diffusion model.

    Attributes:
        model: Folder or hub id of a causal language model of transformers.
        out: Folder for the adapted model; transformers opens it as what it was.
        block_size: Block size L' to train it for.
        prediction: shift keeps the model's habit of predicting the next token, and a block's first
            token is exactly that of the model as it is; same has logits at i be for token i, which
            takes far longer to learn.
        clean: What a token of the clean text sees: everything before it, as the model was trained
            (causal), or all of its block too (block, the paper's).
        draft: Leave the model itself as it is, and let it draft for itself: low-rank pairs of this
            rank that only masked tokens go through, and a chain over drafted tokens, which
            --objective draft trains.
        chain_rank: Rank of that chain.
        mask_token: Mask token; the tokenizer's own when left out, else <|mask|> is added.
        dtype: Number format of the weights that are saved; auto is that of the files.
        overwrite: Replace a model that is there.
    """

    model: str
    out: str
    block_size: int = 8
    prediction: Literal["shift", "same"] = "shift"
    clean: Literal["causal", "block"] = "causal"
    draft: int | None = None
    chain_rank: int = 64
    mask_token: str | None = None
    dtype: Literal["auto", "float32", "bf16"] = "auto"
    overwrite: bool = False


def _run(given: Given) -> None:
    options = given.make(AdaptOptions)
    from blockdiff.models.loading import adapt_folder

    model = adapt_folder(
        options.model, options.out, block_size=options.block_size, prediction=options.prediction,
        clean=options.clean, draft=options.draft, chain_rank=options.chain_rank,
        mask_token=options.mask_token, dtype=options.dtype, overwrite=options.overwrite,
    )  # fmt: skip
    config = model.config
    objective = "" if options.draft is None else " --objective draft"
    print(
        f"{options.out}: {type(model.lm).__name__}, block size {config.block_size}, mask token id "
        f"{config.mask_token_id}, context {config.length}. It is not trained yet: blockdiff train "
        f"DATA --init-from {options.out}{objective}"
    )


COMMAND = Command(
    summary="Turn a causal language model into a block diffusion model.",
    kinds=(AdaptOptions,),
    run=_run,
    places=("model", "out"),
    sections={"model": "Adapting"},
    examples=(
        "blockdiff adapt HuggingFaceTB/SmolLM2-135M runs/smol --block-size 8",
        "blockdiff adapt ./model out --prediction same --clean block",
        "blockdiff adapt ./model out --draft 32",
    ),
)
