"""How good an SAE is on samples that its training has not seen: what it explains, what skill it leaves the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lmm_sae_nb import hooks
from lmm_sae_nb.lmm import LMM, Prompt, require_own
from lmm_sae_nb.sae import TopKSAE, require_finite
from lmm_sae_nb.tokens import KINDS, prompts, token_mask


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
    keep their own state); loss_recovered = (zero - spliced) / (zero - clean), left out where zeros change nothing, as
    at image tokens of the last layer.
    ValueError if there are no samples, or as `require_own`.
    """
    require_own(lmm, sae, layer)
    if not len(samples):
        raise ValueError("no held-out samples to evaluate on; give at least one")
    whole, by_kind = _Variance(sae.width), {kind: _Variance(sae.width) for kind in kinds}
    fired, active = torch.zeros(sae.n_latents, dtype=torch.bool), 0
    losses = {"clean": [], "spliced": [], "zero": []}
    asked = prompts(lmm, samples, range(len(samples)), batch_samples)
    for prompt in tqdm(asked, desc="evaluating", total=-(-len(samples) // batch_samples), mininterval=2):
        mask = token_mask(prompt, kinds)
        with hooks.read(lmm.layer(layer)) as output:
            losses["clean"].append(lmm.cross_entropy(prompt))
        x = output.value[mask].float()
        require_finite(x, f"hidden states of layer {layer}")
        latents = sae.encode(x)
        x_hat = sae.decode(latents)
        whole.add(x, x_hat)
        for kind, variance in by_kind.items():
            own = token_mask(prompt, [kind])[mask]
            variance.add(x[own], x_hat[own])
        fired[latents.indices[latents.acts > 0].cpu()] = True
        active += int((latents.acts > 0).sum())
        for name, value in {"spliced": x_hat, "zero": torch.zeros_like(x_hat)}.items():
            losses[name].append(_spliced_loss(lmm, prompt, layer, mask, value))
    loss = {f"loss_{name}": float(torch.cat(parts).mean()) for name, parts in losses.items()}
    lost = loss["loss_zero"] - loss["loss_clean"]
    recovered = {"loss_recovered": (loss["loss_zero"] - loss["loss_spliced"]) / lost} if lost else {}
    return {
        "tokens": whole.n, "fvu": whole.unexplained(),
        **{f"fvu_{kind}": variance.unexplained() for kind, variance in by_kind.items() if variance.n > 1},
        "dead_fraction": float((~fired).float().mean()), "l0": active / whole.n, **loss, **recovered,
    }  # fmt: skip


def _spliced_loss(lmm: LMM, prompt: Prompt, layer: int, mask: Tensor, value: Tensor) -> Float[Tensor, " batch"]:
    """Cross-entropy of the answers with `value` at the masked tokens of the layer's output."""

    def splice(hidden: Tensor) -> Tensor:
        out = hidden.clone()
        out[mask] = value.to(out.dtype)
        return out

    with lmm.spliced(layer, splice):
        return lmm.cross_entropy(prompt)
