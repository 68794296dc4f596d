"""How to sample; imports nothing heavy, for the command line's sake."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample.

    Attributes:
        max_new_tokens: New tokens per row, any number; past the context the window slides.
        sampler: first_hitting (one network evaluation a token), ancestral, or analytic (SEDD).
        steps: Steps per block of the ancestral and analytic samplers.
        schedule: Noise schedule of these.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the k most likely tokens.
        top_p: Keep the smallest set of tokens whose probability reaches p.
        top_p_rule: nucleus, or paper for the public code's variant (drops the token crossing p).
        seed: Seed of every random number; the same seed gives the same text.
        stop: What ends a row before max_new_tokens: eos, second_eos (of prompt and text together),
            low_entropy (the last 256 tokens under 4 nats; such a row counts as rejected), several
            of them with commas, paper (second_eos,low_entropy), or none.
        block_size: Block size L' to sample with; the model's own when left out.
    """

    max_new_tokens: int = 128
    sampler: str = "first_hitting"
    steps: int | None = None
    schedule: str = "linear"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    top_p_rule: str = "nucleus"
    seed: int = 0
    stop: str = "eos"
    block_size: int | None = None
