"""Measure on held-out samples how much an SAE explains, and how much of the model's skill its reconstruction keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lmm_sae_nb.model.hookpoints import in_order, require_kinds, titled
from lmm_sae_nb.model.sample_checks import check_samples
from lmm_sae_nb.model.samples import prompts
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.model.upper_layers import UpperLayers, above_each
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import SAE
from lmm_sae_nb.support.intervals import Mean, bounds, mean_interval, ratio_interval
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.tensor_files import require_finite


def evaluate_sae(place: SAEInPlace, samples: Sequence[Mapping], **settings) -> dict[str, float]:
    """Evaluate one SAE; settings, result and errors as `evaluate_saes`."""
    return evaluate_saes({"": place}, samples, **settings)[""]


@torch.no_grad()
def evaluate_saes(
    places: Mapping[str, SAEInPlace],
    samples: Sequence[Mapping],
    *,
    kinds: Sequence[str] = SAE_KINDS,
    batch_samples: int = 16,
    losses: bool = True,
) -> dict[str, dict[str, float]]:
    """Evaluate SAEs of one model on held-out samples; the untouched model runs once for all of them.

    Return the metrics of each SAE, by its name:

    - `fvu`: fraction of variance unexplained, about the mean of all tokens; `fvu_<kind>`: of one kind of token;
    - `dead_fraction`: fraction of latents that are never active; `l0`: active latents per token;
    - `loss_clean`, `loss_spliced`, `loss_zero`: mean cross-entropy of the answers in nats, for the untouched layer,
      with the reconstruction in its place, and with zeros in its place. Tokens of other kinds keep their state;
    - `loss_recovered`: (zero - spliced) / (zero - clean). It is left out if zeros change nothing, as at image tokens
      of the last layer;
    - `fvu`, the losses and `loss_recovered` also with the ends of their 99% intervals over samples, as `fvu_low` and
      `fvu_high`, if there are several samples.

    places: by name, all of the same model.
    samples: rows with `image` (PIL or None), `question` and `answer`.
    kinds: kinds of token that count.
    batch_samples: samples per forward pass.
    losses: without them nothing above the highest layer runs.

    Raises:
        ValueError: there are no samples or SAEs, a sample is wrong, the SAEs are of several models, tokens do not vary,
            or hidden states are not finite.
        UnreadableImage: a picture cannot be read; `readable` leaves such samples out.
    """
    if not len(samples):
        raise ValueError("no held-out samples to evaluate on; give at least one")
    models = {id(place.lmm): place.lmm for place in places.values()}
    if len(models) != 1:
        raise ValueError(f"the SAEs are of {len(models)} models; evaluate those of one model at a time, at least one")
    (lmm,) = models.values()
    check_samples(samples, lmm)
    for place in places.values():
        require_kinds(place.layer, kinds)
    counts = {name: _Counts(place, kinds) for name, place in places.items()}
    layers, clean = in_order(place.layer for place in places.values()), []
    batches = prompts(lmm, samples, range(len(samples)), batch_samples)
    for prompt in progress_bar(batches, desc="evaluating", total=-(-len(samples) // batch_samples)):
        mask, uppers = prompt.mask(*kinds), above_each(lmm, prompt, layers)
        if losses:
            highest = uppers[layers[-1]]
            clean.append(lmm.cross_entropy(prompt, highest.run(highest.hidden)))
        states = {layer: upper.hidden[mask].float() for layer, upper in uppers.items()}
        for layer, x in states.items():
            require_finite(x, f"hidden states of {titled(layer)}")
        of_kind = {kind: prompt.mask(kind)[mask] for kind in kinds}
        sample_of = mask.nonzero()[:, 0].cpu()
        if losses:  # the zeros of a layer are the same for all of its SAEs
            zero = {layer: _spliced_loss(uppers[layer], mask, torch.zeros_like(x)) for layer, x in states.items()}
        for each in counts.values():
            layer = each.place.layer
            x_hat = each.add(states[layer], of_kind, sample_of)
            if losses:
                each.losses["spliced"].append(_spliced_loss(uppers[layer], mask, x_hat))
                each.losses["zero"].append(zero[layer])
    return {name: each.metrics(clean) for name, each in counts.items()}


@torch.no_grad()
def fvu_differences(
    places: Mapping[str, SAEInPlace], samples: Sequence[Mapping], *, kinds: Sequence[str] = SAE_KINDS,
    batch_samples: int = 16,
) -> dict[str, Mean]:  # fmt: skip
    """Return each further SAE's FVU less that of the first, on the same tokens, by name.

    The interval is a bootstrap over samples, in which each sample counts for both SAEs. So it is narrower than the
    intervals of the two FVUs. With fewer than two samples or SAEs nothing is returned.

    places: by name, all at one layer of one model.
    samples, kinds, batch_samples: as in `evaluate_saes`.
    """
    if min(len(places), len(samples)) < 2:
        return {}
    first, *others = places
    lmm, layer = places[first].lmm, places[first].layer
    counts = {name: _Counts(place, kinds) for name, place in places.items()}
    for prompt in prompts(lmm, samples, range(len(samples)), batch_samples):
        mask = prompt.mask(*kinds)
        x = above_each(lmm, prompt, [layer])[layer].hidden[mask].float()
        for each in counts.values():
            each.add(x, {}, mask.nonzero()[:, 0].cpu())
    whole = counts[first].whole
    totals = [sample.total(whole.sum / whole.n) for sample in counts[first].samples]
    errors = {name: np.array([sample.error for sample in each.samples]) for name, each in counts.items()}
    return {name: ratio_interval(errors[name] - errors[first], totals) for name in others}


@torch.no_grad()
def control_fvus(
    place: SAEInPlace, samples: Sequence[Mapping], *, kinds: Sequence[str] = SAE_KINDS, batch_samples: int = 16,
    seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Return what other descriptions of a token with k numbers leave unexplained, on the same tokens as `evaluate_sae`.

    k is that of a TopK SAE. Of an SAE with thresholds it is the mean number of active latents, for which the model runs
    once more.

    - `fvu_untrained`: an SAE of the same size with the same `b_dec`, its other weights as before the training;
    - `fvu_components`: the first k principal components of these very tokens. No k fixed directions leave less.

    place, samples, kinds, batch_samples: as in `evaluate_saes`.
    seed: of the untrained weights.

    Raises:
        ValueError: the tokens do not vary.
    """
    sae, device = place.sae, place.device
    k = sae.k if sae.threshold is None else _active_per_token(place, samples, kinds, batch_samples)
    untrained = SAE(sae.width, sae.n_latents, k, generator=torch.Generator().manual_seed(seed)).to(device)
    untrained.b_dec.data.copy_(sae.b_dec)
    variance, products = _Variance(sae.width), torch.zeros(sae.width, sae.width, dtype=torch.float64, device=device)
    for prompt in prompts(place.lmm, samples, range(len(samples)), batch_samples):
        x = above_each(place.lmm, prompt, [place.layer])[place.layer].hidden[prompt.mask(*kinds)].float()
        variance.add(x, untrained(x))
        products += x.double().T @ x.double()
    fvu = variance.unexplained()
    mean = (variance.sum / variance.n).to(device)
    spectrum = torch.linalg.eigvalsh(products / variance.n - mean[:, None] * mean)  # ascending
    return {"fvu_untrained": fvu, "fvu_components": float(spectrum[:-k].sum() / spectrum.sum())}


def _active_per_token(place: SAEInPlace, samples: Sequence[Mapping], kinds: Sequence[str], batch_samples: int) -> int:
    """Return how many latents are active for a token on average, at least 1."""
    active, tokens = 0, 0
    for prompt in prompts(place.lmm, samples, range(len(samples)), batch_samples):
        x = above_each(place.lmm, prompt, [place.layer])[place.layer].hidden[prompt.mask(*kinds)].float()
        active, tokens = active + int((place.sae.encode(x).acts > 0).sum()), tokens + len(x)
    return max(1, round(active / max(tokens, 1)))


class _Variance:
    """Unexplained and total variance of a stream of tokens, about the mean of all of them."""

    def __init__(self, width: int):
        self.n, self.sum, self.squares, self.error = 0, torch.zeros(width, dtype=torch.float64), 0.0, 0.0

    def add(self, x: Float[Tensor, "tokens width"], x_hat: Float[Tensor, "tokens width"]) -> None:
        """Count tokens and their reconstructions."""
        x, x_hat = x.double().cpu(), x_hat.double().cpu()
        self.n, self.sum = self.n + len(x), self.sum + x.sum(0)
        self.squares += float(x.square().sum())
        self.error += float((x - x_hat).square().sum())

    def total(self, mean: Float[Tensor, " width"]) -> float:
        """Return the variance of these tokens about a mean, summed over tokens."""
        return self.squares - 2 * float(mean @ self.sum) + self.n * float(mean @ mean)

    def unexplained(self) -> float:
        """Return the fraction of variance unexplained; ValueError if the tokens do not vary."""
        total = self.squares - float(self.sum.square().sum()) / max(self.n, 1)
        if total <= 0:
            raise ValueError(
                f"{self.n} held-out tokens do not vary, so there is nothing to explain; give other samples"
            )
        return self.error / total


class _Counts:
    """Counts and sums for one SAE, batch by batch."""

    def __init__(self, place: SAEInPlace, kinds: Sequence[str]):
        self.place, self.active = place, 0
        self.whole = _Variance(place.sae.width)
        self.by_kind = {kind: _Variance(place.sae.width) for kind in kinds}
        self.fired = torch.zeros(place.sae.n_latents, dtype=torch.bool)
        self.losses: dict[str, list[Tensor]] = {"spliced": [], "zero": []}
        self.samples: list[_Variance] = []

    def add(
        self, x: Float[Tensor, "tokens width"], of_kind: Mapping[str, Bool[Tensor, " tokens"]],
        sample_of: Int64[Tensor, " tokens"],
    ) -> Float[Tensor, "tokens width"]:  # fmt: skip
        """Count a batch of tokens and return their reconstruction.

        of_kind: marks the tokens of each kind.
        sample_of: the number of each token's sample in the batch.
        """
        latents = self.place.sae.encode(x)
        x_hat = self.place.sae.decode(latents)
        self.whole.add(x, x_hat)
        for number in sample_of.unique():
            own = (sample_of == number).to(x.device)
            self.samples.append(_Variance(x.shape[1]))
            self.samples[-1].add(x[own], x_hat[own])
        for kind, marked in of_kind.items():
            self.by_kind[kind].add(x[marked], x_hat[marked])
        self.fired[latents.indices[latents.acts > 0].cpu()] = True
        self.active += int((latents.acts > 0).sum())
        return x_hat

    def metrics(self, clean: Sequence[Float[Tensor, " _"]]) -> dict[str, float]:
        """Return the metrics of `evaluate_saes`.

        clean: losses of the untouched model, batch by batch; empty if losses were not asked for.
        """
        losses = {
            f"loss_{name}": torch.cat(parts).double().cpu().numpy() for name, parts in self.losses.items() if parts
        }
        if clean:
            losses = {"loss_clean": torch.cat(list(clean)).double().cpu().numpy()} | losses
        loss = {name: float(values.mean()) for name, values in losses.items()}
        intervals = self._intervals(losses)
        if clean and (lost := loss["loss_zero"] - loss["loss_clean"]):
            loss["loss_recovered"] = (loss["loss_zero"] - loss["loss_spliced"]) / lost
        return {
            "tokens": self.whole.n, "fvu": self.whole.unexplained(),
            **{f"fvu_{kind}": variance.unexplained() for kind, variance in self.by_kind.items() if variance.n > 1},
            "dead_fraction": float((~self.fired).float().mean()), "l0": self.active / self.whole.n, **loss,
            **intervals,
        }  # fmt: skip

    def _intervals(self, losses: Mapping[str, Float[np.ndarray, " samples"]]) -> dict[str, float]:
        """Return the ends of the intervals over samples; nothing for a single sample.

        losses: of each sample, by metric.
        """
        if len(self.samples) < 2:
            return {}
        mean = self.whole.sum / self.whole.n
        means = {
            "fvu": ratio_interval([each.error for each in self.samples], [each.total(mean) for each in self.samples])
        }
        means |= {name: mean_interval(values) for name, values in losses.items()}
        if losses and (losses["loss_zero"] != losses["loss_clean"]).any():
            kept, lost = (losses["loss_zero"] - losses[name] for name in ("loss_spliced", "loss_clean"))
            means["loss_recovered"] = ratio_interval(kept, lost)
        return {key: x for name, value in means.items() for key, x in bounds(name, value).items() if key != name}


def _spliced_loss(
    upper: UpperLayers, mask: Bool[Tensor, "batch tokens"], value: Float[Tensor, "marked width"]
) -> Float[Tensor, " batch"]:
    """Return the cross-entropy of the answers with `value` at the marked tokens of the layer's output."""
    spliced = upper.hidden.clone()
    spliced[mask] = value.to(spliced.dtype)
    return upper.lmm.cross_entropy(upper.prompt, upper.run(spliced))
