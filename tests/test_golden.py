"""Parity with the paper's public code, to 1e-4 in float32; see golden/ for how it was run."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import blockdiff
from blockdiff.layout import BlockLayout
from blockdiff.models.dit import DiT
from blockdiff.models.loss import score_entropy_from_logits, subs_nll_from_logits
from blockdiff.models.released_dit import released_config, released_weights
from blockdiff.schedules import get_schedule
from helpers import GOLDEN, read_golden

BLOCKS = ["bd3lm_block1", "bd3lm_block4", "bd3lm_block16"]
DIFFUSION = [*BLOCKS, "mdlm", "sedd_backbone"]
BACKENDS = ["dense", "blockwise", "flex"]


def golden_model(name):
    config, weights, io = read_golden(name)
    if config.get("time_conditioning"):
        config["parameterization"] = "sedd"  # which the published file does not tell
    model = DiT(released_config(config, weights)).eval()
    model.load_state_dict(released_weights(weights))
    return model, io


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def run(model, io, **options):
    x_0 = io["x0"] if model.config.kind == "bd3lm" else None
    with torch.no_grad():
        return model(io["xt"], x_0=x_0, sigma=io["sigma"], **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFUSION)
def test_logits_and_losses(name, backend):
    model, io = golden_model(name)
    model.config.score = False  # the file holds cross entropies for SEDD's network too
    logits = run(model, io, backend=backend).logits
    close(logits, io["logits"])
    masked = io["xt"] == model.config.mask_token_id
    nll = subs_nll_from_logits(logits, io["x0"], model.config.mask_token_id) * masked
    close(nll, io["masked_nll"])
    torch.testing.assert_close(nll / io["t"], io["nelbo_tokens"], rtol=1e-4, atol=1e-4)
    chosen = run(model, io, backend=backend, at=masked, targets=io["x0"][masked]).nll
    close(chosen, io["masked_nll"][masked])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ar_logits(backend):
    model, io = golden_model("ar")
    assert model.config.kind == "ar" and model.sigma is None
    with torch.no_grad():
        close(model(io["x0"], backend=backend).logits, io["logits"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_cached_logits_by_encoding_the_clean_text_first(name, backend):
    model, io = golden_model(name)
    with torch.no_grad():
        context = model.encode(io["x0"], backend=backend)
        logits = model(io["xt"], context=context, backend=backend).logits
    close(logits[:, : -model.config.block_size], io["cached_logits"])


@pytest.mark.parametrize("name", BLOCKS)
def test_cached_logits_by_decoding(name):
    """Each block decoded after its clean prefix, which was itself decoded block by block."""
    model, io = golden_model(name)
    config, x_0, x_t = model.config, io["x0"], io["xt"]
    size, rows = config.block_size, np.arange(len(x_0))
    cache = model.new_cache(len(x_0), config.length, size)
    cache.admit(rows, np.full(len(rows), size), np.full(len(rows), config.length))
    every = torch.arange(x_0[:, :size].numel())
    out = []
    with torch.no_grad():
        for start in range(0, config.length, size):
            block = slice(start, start + size)
            position = torch.arange(start, start + size).expand(len(x_0), -1)
            mask = cache.visible(0, size, rows < 0)
            out.append(model.decode(x_t[:, block], position, cache, every, mask=mask))
            model.decode(x_0[:, block], position, cache, every, mask=mask)
            cache.append_staged(rows, 0)
    logits = torch.stack([part.view(len(x_0), size, -1) for part in out], 1).flatten(1, 2)
    close(logits[:, :-size], io["cached_logits"])  # the file leaves the last block out
    close(logits, io["logits"])


@pytest.mark.parametrize("name", BLOCKS)
def test_one_pass_over_both_streams_is_two_passes(name):
    """The paper's 2L × 2L pass, and the clean stream first with the noised one reading it."""
    model, io = golden_model(name)
    whole = run(model, io, backend="dense").logits
    torch.testing.assert_close(run(model, io, backend="blockwise").logits, whole)


@pytest.mark.parametrize("name", ["bd3lm_block1", "bd3lm_block4"])
def test_exact_bound(name):
    model, io = golden_model(name)
    measured = blockdiff.likelihood(model, io["x0"], estimator="enumerate", keep_first=False)
    torch.testing.assert_close(measured.nats, io["exact_nelbo"].double(), rtol=1e-4, atol=0)
    assert measured.exact and measured.mask_stderr == 0


def test_score_entropy():
    """dσ/dt · score entropy of the public code is the NELBO's weight times ours."""
    with safe_open(GOLDEN / "sedd_loss.safetensors", "pt") as file:
        io = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    mask = io["raw_output"].shape[-1] - 1
    masked = io["xt"] == mask
    ours = score_entropy_from_logits(io["raw_output"], io["x0"], mask) * masked
    alpha = torch.exp(-io["sigma"].double())
    torch.testing.assert_close(alpha, 1 - (1 - 1e-3) * io["t"].double(), rtol=1e-5, atol=0)
    weight = get_schedule("linear").weight(io["t"].double())
    torch.testing.assert_close(weight, io["dsigma"].double() * alpha / (1 - alpha))
    assert masked.sum() > 20
    torch.testing.assert_close((weight * ours).float(), io["loss_tokens"], rtol=1e-4, atol=1e-4)
    # The scores themselves: log s_v = log(α/(1 − α)) + z_v − log(V − 1).
    log_ratio = (alpha / (1 - alpha)).log().float()[..., None]
    scores = log_ratio + io["raw_output"] - math.log(mask)
    kept = masked[..., None] & (torch.arange(mask + 1) != mask)
    torch.testing.assert_close(scores[kept], io["log_score"][kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ar", *DIFFUSION])
def test_opens_as_a_released_folder(name, tmp_path):
    config, weights, io = read_golden(name)
    if config.get("time_conditioning"):
        config["parameterization"] = "sedd"
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bd3lm"}))
    clip = {"sampling_eps_min": torch.tensor(0.25), "sampling_eps_max": torch.tensor(0.75)}
    save_file(
        {k: v.contiguous() for k, v in (weights | clip).items()}, tmp_path / "model.safetensors"
    )
    model = blockdiff.load_model(tmp_path)
    assert model.config.clip == [0.25, 0.75] and not model.training
    kind = {"ar": "ar", "mdlm": "mdlm", "sedd_backbone": "sedd"}.get(name, "bd3lm")
    assert model.config.kind == kind
    with torch.no_grad():
        logits = model(io["x0"]).logits if kind == "ar" else run(model, io).logits
    close(logits, io["logits"])
    if kind == "bd3lm":
        assert model.config.layout == BlockLayout(64, config["block_size"])
