"""Section 2.1: hidden states stream from the model into a TopK SAE; how good the SAE is afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from lmm_sae_nb.lmm import LMM, Prompt
from lmm_sae_nb.sae import TopKSAE, auxk_loss, fvu, geometric_median, require_finite

KINDS = ("base", "tiles", "newline", "text")  # special tokens are few, alike, and of outlying norm


class TrainResult(NamedTuple):
    sae: TopKSAE
    history: list[dict[str, float]]  # rows: step, tokens, fvu, auxk, dead_fraction, l0, lr, tokens_per_second


# ---- hidden states --------------------------------------------------------------------------------------------


def prompts(lmm: LMM, samples: Sequence[Mapping], order: Iterable[int], batch: int) -> Iterator[Prompt]:
    """Samples (image or None, question, answer) as in supervised fine-tuning, a batch at a time."""
    order = list(order)
    if hasattr(samples, "select_columns"):  # a data set decodes every picture of a row, label maps too
        samples = samples.select_columns(["image", "question", "answer"])
    for start in range(0, len(order), batch):
        rows = [samples[i] for i in order[start : start + batch]]
        asked = [row["question"] for row in rows]
        yield lmm.prompt(asked, [row["image"] for row in rows], answers=[row["answer"] for row in rows])


def token_mask(prompt: Prompt, kinds: Sequence[str]) -> Bool[Tensor, "batch tokens"]:
    return prompt.mask(*kinds).to(prompt.inputs["input_ids"].device)


def stream(
    lmm: LMM, samples: Sequence[Mapping], layer: int, kinds: Sequence[str], generator: torch.Generator, batch: int
) -> Iterator[Float[Tensor, "tokens width"]]:
    """Hidden states of the chosen token kinds, sample after sample in random order, again and again.

    ValueError if there are no samples, no token of these kinds, or a hidden state is not finite.
    """
    while True:
        found = 0
        for prompt in prompts(lmm, samples, torch.randperm(len(samples), generator=generator).tolist(), batch):
            hidden = lmm.hidden_states(prompt, layer)
            tokens = hidden[token_mask(prompt, kinds)].float()
            require_finite(tokens, f"hidden states of layer {layer}")
            found += len(tokens)
            if len(tokens):
                yield tokens
        if not found:
            raise ValueError(f"no sample has a token of kinds {', '.join(kinds)}; choose others")


def mixed(
    parts: Iterator[Float[Tensor, "tokens width"]], buffer_tokens: int, batch_tokens: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "batch_tokens width"]]:
    """Batches of exactly `batch_tokens` tokens, drawn at random from a buffer that is refilled when half empty.

    Every token that enters leaves once, unless the stream is given up first.
    ValueError if the buffer holds less than a batch.
    """
    if not 1 <= batch_tokens <= buffer_tokens:
        raise ValueError(
            f"batches of {batch_tokens} tokens from a buffer of {buffer_tokens}; make the buffer the larger"
        )
    pool = torch.empty(0)
    while True:
        waiting = [pool] if len(pool) else []
        held = len(pool)
        while held < buffer_tokens:
            waiting.append(next(parts))
            held += len(waiting[-1])
        pool = torch.cat(waiting)
        pool = pool[torch.randperm(len(pool), generator=generator)]
        while len(pool) >= max(batch_tokens, buffer_tokens // 2):
            yield pool[:batch_tokens]
            pool = pool[batch_tokens:]


# ---- training -------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warm: int) -> float:
    """A linear rise over `warm` optimiser steps to `peak`, then a linear fall to 0 after the last step."""
    return peak * min((step + 1) / max(1, warm), (steps - step) / max(1, steps - warm), 1.0)


def train_sae(
    lmm: LMM,
    samples: Sequence[Mapping],
    layer: int,
    *,
    n_latents: int = 131_072,
    k: int = 256,
    steps: int,
    batch_tokens: int = 8192,
    lr: float | None = None,
    kinds: Sequence[str] = KINDS,
    seed: int = 42,
    auxk_alpha: float = 1 / 32,
    dead_after_tokens: int = 10_000_000,
    buffer_tokens: int | None = None,
    batch_samples: int = 16,
    warm_steps: int | None = None,
    folder: str | Path,
    log_every: int = 10,
) -> TrainResult:
    """Train an SAE on the output of one decoder layer (0-based) and save it in `folder`.

    samples: rows with image (PIL or None), question, answer. lr: its peak; by default 2e-4 / sqrt(n_latents / 2^14),
    the published rule. A latent counts as dead when it has not fired for `dead_after_tokens` tokens. The buffer that
    mixes tokens of many samples holds 16 batches by default. Loss: FVU + auxk_alpha * AuxK. Steps: rows of W_dec
    kept at unit length, gradient norm clipped to 1, Adam, warm-up over 5 % of the steps.
    ValueError for no samples or as `stream`; nothing is saved then.
    """
    if not len(samples) or steps < 1:
        raise ValueError(
            f"{len(samples)} samples, {steps} steps: there is nothing to train on; give at least one of each"
        )
    generator = torch.Generator().manual_seed(seed)
    lr = 2e-4 / math.sqrt(n_latents / 2**14) if lr is None else lr
    warm = max(1, steps // 20) if warm_steps is None else warm_steps
    parts = stream(lmm, samples, layer, kinds, generator, batch_samples)
    batches = mixed(parts, buffer_tokens or 16 * batch_tokens, batch_tokens, generator)

    x = next(batches)
    sae = TopKSAE(lmm.width, n_latents, k, generator=generator).to(x.device)
    sae.b_dec.data.copy_(geometric_median(x))
    optimiser = torch.optim.Adam(sae.parameters(), lr=lr)
    silent = torch.zeros(n_latents, dtype=torch.long, device=x.device)  # tokens since each latent last fired
    history, began, logged = [], time.monotonic(), 0
    bar = tqdm(range(steps), desc="training", mininterval=2)
    for step in bar:
        if step:
            x = next(batches)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warm)
        losses, active = _step(sae, x, silent > dead_after_tokens, auxk_alpha)
        sae.drop_parallel_gradient()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        sae.normalise_rows()
        silent += len(x)
        silent[active] = 0
        if (step + 1) % log_every == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            row = losses | {
                "step": step + 1, "tokens": (step + 1) * batch_tokens, "lr": optimiser.param_groups[0]["lr"],
                "dead_fraction": float((silent > dead_after_tokens).float().mean()),
                "tokens_per_second": (step + 1 - logged) * batch_tokens / max(seconds, 1e-9),
            }  # fmt: skip
            history.append(row)
            bar.set_postfix(fvu=f"{row['fvu']:.3f}", dead=f"{row['dead_fraction']:.3f}", refresh=False)
            began, logged = time.monotonic(), step + 1
    sae.save(folder)
    return TrainResult(sae, history)


def _step(
    sae: TopKSAE, x: Tensor, dead: Bool[Tensor, " latents"], auxk_alpha: float
) -> tuple[dict[str, float], Tensor]:
    """Gradients of one batch's loss; what to log, and which latents fired. One with activation 0 has not fired."""
    latents = sae.encode(x)
    x_hat = sae.decode(latents)
    unexplained = fvu(x, x_hat)
    aux = auxk_loss(sae, x, x_hat, dead, k_aux=sae.width // 2) if auxk_alpha else x.new_zeros(())
    (unexplained + auxk_alpha * aux).backward()
    fired = latents.acts > 0
    logged = {
        "fvu": float(unexplained.detach()),
        "auxk": float(aux.detach()),
        "l0": float(fired.sum(-1).float().mean()),
    }
    return logged, latents.indices[fired].unique()


# ---- evaluation -----------------------------------------------------------------------------------------------


class _Variance:
    """Unexplained and total variance of a stream of tokens, about the mean of all of them."""

    def __init__(self, width: int):
        self.n, self.sum, self.squares, self.error = 0, torch.zeros(width, dtype=torch.float64), 0.0, 0.0

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        x, x_hat = x.double().cpu(), x_hat.double().cpu()
        self.n, self.sum = self.n + len(x), self.sum + x.sum(0)
        self.squares, self.error = (
            self.squares + float(x.square().sum()),
            self.error + float((x - x_hat).square().sum()),
        )

    def unexplained(self) -> float:
        total = self.squares - float(self.sum.square().sum()) / max(self.n, 1)
        if total <= 0:
            raise ValueError(
                f"{self.n} held-out tokens do not vary, so there is nothing to explain; give other samples"
            )
        return self.error / total


@torch.no_grad()
def evaluate_sae(
    lmm: LMM,
    sae: TopKSAE,
    samples: Sequence[Mapping],
    layer: int,
    *,
    kinds: Sequence[str] = KINDS,
    batch_samples: int = 16,
) -> dict[str, float]:
    """How good an SAE is on held-out samples.

    fvu (about the mean of all these tokens) in all and as fvu_<kind>; dead_fraction: latents that never fire on
    them; l0: active latents a token; loss_clean, loss_spliced, loss_zero: mean cross-entropy of answers, in nats,
    untouched, with the reconstruction in the layer's place, and with zeros there (both on tokens of `kinds`; others
    keep their own state); loss_recovered = (zero - spliced) / (zero - clean).
    ValueError if the SAE has another width than the layer, or there are no samples.
    """
    sae.require_width(lmm.width)
    if not len(samples):
        raise ValueError("no held-out samples to evaluate on; give at least one")
    whole, by_kind = _Variance(sae.width), {kind: _Variance(sae.width) for kind in kinds}
    fired, active = torch.zeros(sae.n_latents, dtype=torch.bool), 0
    losses = {"clean": [], "spliced": [], "zero": []}
    asked = prompts(lmm, samples, range(len(samples)), batch_samples)
    for prompt in tqdm(asked, desc="evaluating", total=-(-len(samples) // batch_samples), mininterval=2):
        hidden, mask = lmm.hidden_states(prompt, layer), token_mask(prompt, kinds)
        x = hidden[mask].float()
        require_finite(x, f"hidden states of layer {layer}")
        latents = sae.encode(x)
        x_hat = sae.decode(latents)
        whole.add(x, x_hat)
        for kind, variance in by_kind.items():
            own = token_mask(prompt, [kind])[mask]
            variance.add(x[own], x_hat[own])
        fired[latents.indices[latents.acts > 0].cpu()] = True
        active += int((latents.acts > 0).sum())
        for name, value in {"clean": None, "spliced": x_hat, "zero": torch.zeros_like(x_hat)}.items():
            losses[name].append(_loss(lmm, prompt, layer, mask, value))
    loss = {f"loss_{name}": float(torch.cat(parts).mean()) for name, parts in losses.items()}
    recovered = (loss["loss_zero"] - loss["loss_spliced"]) / (loss["loss_zero"] - loss["loss_clean"])
    return {
        "tokens": whole.n, "fvu": whole.unexplained(),
        **{f"fvu_{kind}": variance.unexplained() for kind, variance in by_kind.items() if variance.n > 1},
        "dead_fraction": float((~fired).float().mean()), "l0": active / whole.n, **loss, "loss_recovered": recovered,
    }  # fmt: skip


def _loss(lmm: LMM, prompt: Prompt, layer: int, mask: Tensor, value: Tensor | None) -> Float[Tensor, " batch"]:
    """Cross-entropy of the answers with `value` at the masked tokens of the layer's output, or untouched."""
    if value is None:
        return lmm.cross_entropy(prompt)

    def splice(hidden: Tensor) -> Tensor:
        out = hidden.clone()
        out[mask] = value.to(out.dtype)
        return out

    with lmm.spliced(layer, splice):
        return lmm.cross_entropy(prompt)
