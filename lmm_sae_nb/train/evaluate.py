"""How good an SAE is on samples that its training has not seen: what it explains, what skill it leaves the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lmm_sae_nb.model.hooks import Hidden
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.samples import KINDS, prompts, token_mask
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.tensor_files import require_finite


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


def evaluate_sae(place: SAEInPlace, samples: Sequence[Mapping], **settings) -> dict[str, float]:
    """How good an SAE is on held-out samples: `evaluate_saes` of one."""
    lmm, sae, layer = place.lmm, place.sae, place.layer
    return evaluate_saes(lmm, {"": (sae, layer)}, samples, **settings)[""]


@torch.no_grad()
def evaluate_saes(
    lmm: LMM,
    studied: Mapping[str, tuple[TopKSAE, int]],
    samples: Sequence[Mapping],
    *,
    kinds: Sequence[str] = KINDS,
    batch_samples: int = 16,
    losses: bool = True,
) -> dict[str, dict[str, float]]:
    """How good SAEs, each with its layer, are on held-out samples; the untouched model runs once for all.

    fvu (about the mean of all these tokens) in all and as fvu_<kind>; dead_fraction: latents that never fire on
    them; l0: active latents a token; loss_clean, loss_spliced, loss_zero: mean cross-entropy of answers, in nats,
    untouched, with the reconstruction in the layer's place, and with zeros there (both on tokens of `kinds`; others
    keep their own state); loss_recovered = (zero - spliced) / (zero - clean), left out where zeros change nothing, as
    at image tokens of the last layer. losses: without them the model need not run again for each SAE, nor behind the
    last of the layers.
    ValueError as `SAEInPlace`, or if there are no samples.
    """
    for sae, layer in studied.values():
        SAEInPlace(lmm, sae, layer)  # checks that they belong together
    if not len(samples):
        raise ValueError("no held-out samples to evaluate on; give at least one")
    found = {name: _Measured(sae, layer, kinds) for name, (sae, layer) in studied.items()}
    layers, clean = sorted({layer for _, layer in studied.values()}), []
    asked = prompts(lmm, samples, range(len(samples)), batch_samples)
    for prompt in progress_bar(asked, desc="evaluating", total=-(-len(samples) // batch_samples)):
        mask, hidden = token_mask(prompt, kinds), lmm.hidden_states(lmm.entered(prompt), layers)
        if losses:  # what follows the last of the layers, and then for each what follows it with its states replaced
            clean.append(lmm.cross_entropy(prompt, lmm.above(prompt, layers[-1], hidden[layers[-1]])))
        states = {layer: hidden[layer][mask].float() for layer in layers}
        for layer, x in states.items():
            require_finite(x, f"hidden states of layer {layer}")
        of_kind = {kind: token_mask(prompt, [kind])[mask] for kind in kinds}
        for one in found.values():
            x_hat = one.add(states[one.layer], of_kind)
            for name, value in {"spliced": x_hat, "zero": torch.zeros_like(x_hat)}.items() if losses else ():
                one.losses[name].append(_spliced_loss(lmm, prompt, one.layer, hidden[one.layer], mask, value))
    return {name: one.told(clean) for name, one in found.items()}


class _Measured:
    """What is counted of an SAE, batch by batch."""

    def __init__(self, sae: TopKSAE, layer: int, kinds: Sequence[str]):
        self.sae, self.layer, self.active = sae, layer, 0
        self.whole, self.by_kind = _Variance(sae.width), {kind: _Variance(sae.width) for kind in kinds}
        self.fired = torch.zeros(sae.n_latents, dtype=torch.bool)
        self.losses: dict[str, list[Tensor]] = {"spliced": [], "zero": []}

    def add(self, x: Float[Tensor, "tokens width"], of_kind: Mapping[str, Tensor]) -> Float[Tensor, "tokens width"]:
        """Count a batch of tokens, of which `of_kind` tells the kinds; their reconstruction."""
        latents = self.sae.encode(x)
        x_hat = self.sae.decode(latents)
        self.whole.add(x, x_hat)
        for kind, own in of_kind.items():
            self.by_kind[kind].add(x[own], x_hat[own])
        self.fired[latents.indices[latents.acts > 0].cpu()] = True
        self.active += int((latents.acts > 0).sum())
        return x_hat

    def told(self, clean: Sequence[Tensor]) -> dict[str, float]:
        loss = {f"loss_{name}": float(torch.cat(parts).mean()) for name, parts in self.losses.items() if parts}
        if clean:
            loss = {"loss_clean": float(torch.cat(list(clean)).mean())} | loss
            if lost := loss["loss_zero"] - loss["loss_clean"]:
                loss["loss_recovered"] = (loss["loss_zero"] - loss["loss_spliced"]) / lost
        return {
            "tokens": self.whole.n, "fvu": self.whole.unexplained(),
            **{f"fvu_{kind}": variance.unexplained() for kind, variance in self.by_kind.items() if variance.n > 1},
            "dead_fraction": float((~self.fired).float().mean()), "l0": self.active / self.whole.n, **loss,
        }  # fmt: skip


def _spliced_loss(
    lmm: LMM, prompt: Prompt, layer: int, hidden: Hidden, mask: Tensor, value: Tensor
) -> Float[Tensor, " batch"]:
    """Cross-entropy of the answers with `value` at the masked tokens of the layer's output."""
    spliced = hidden.clone()
    spliced[mask] = value.to(hidden.dtype)
    return lmm.cross_entropy(prompt, lmm.above(prompt, layer, spliced))
