"""Fit clamps that correct wrong answers of every kind: latents and values by gradient.

The clamp acts on the tokens of the question, which come after the image. So the tokens before them are run once for
each batch of prompts, and a step of the fit costs only the question's tokens in the layers above the SAE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from lmm_sae_nb.attribute.attribution import single_token
from lmm_sae_nb.hallucination.answers import Edits
from lmm_sae_nb.hallucination.cases import Answered, Case
from lmm_sae_nb.model.token_kinds import KINDS
from lmm_sae_nb.model.upper_layers import above
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import Edit, Scope, set_latents
from lmm_sae_nb.support.progress import progress_bar

ASKED = Scope(("text",), ("prompt",))  # the words of the prompt


@dataclass(frozen=True)
class FitSettings:
    """How a clamp is fitted.

    rounds: each adds latents and refits all values.
    each: latents that a round adds.
    refits: steps of Adam in a round.
    rate: its learning rate, in units of activation.
    start: activation that a new latent is clamped to at first.
    direction_steps: steps of Adam for the direction.
    direction_rate: its learning rate.
    sharpness: of the logistic loss of wrong answers; the margin is multiplied by it.
    kept_margin: right answers cost nothing as long as their margin is above this, in logits.
    weight: of right answers and of other questions, each relative to one kind of wrong answers.
    batch: prompts of each kind at once.
    """

    rounds: int = 8
    each: int = 4
    refits: int = 10
    rate: float = 3.0
    start: float = 25.0
    direction_steps: int = 60
    direction_rate: float = 1.0
    sharpness: float = 5.0
    kept_margin: float = 1.0
    weight: float = 2.0
    batch: int = 12


class Batch:
    """Prompts that are run up to the SAE's layer once, with the tokens before the first clamped one remembered.

    place: the model and the SAE.
    prompts: each with a question and an image.
    scope: the tokens that are clamped.
    spare: how many latents may be clamped at once.
    keep_error: whether what the SAE leaves unexplained stays in; if not, the SAE is spliced in at all its tokens.

    Raises:
        ValueError: a prompt has no token that is clamped.
    """

    def __init__(
        self,
        place: SAEInPlace,
        prompts: Sequence[Case | Answered],
        scope: Scope,
        spare: int,
        *,
        keep_error: bool = True,
    ):
        lmm, self.sae = place.lmm, place.sae
        prompt = lmm.prompt([each.question for each in prompts], [each.image for each in prompts])
        clamped = (scope.of_prompt(prompt) & place.mask(prompt, KINDS)).to(place.device)
        if not bool(clamped.any(1).all()):
            raise ValueError(f"a prompt has no token of {scope}; choose tokens that every prompt has")
        self.upper = above(lmm, prompt, place.layer)
        with torch.no_grad():
            hidden = self.upper.hidden
            self.untouched = lmm.head(self.upper.remember(hidden)[:, -1])
            self.start = int(clamped.any(0).int().argmax())
            self.clamped = clamped[:, self.start :]
            clean = hidden[:, self.start :][self.clamped].float()
            self.highest = self.sae.encode(clean, k=min(self.sae.k + spare, self.sae.n_latents))
            self.clean = self.sae.decode(self.sae.activation.choose(self.highest))
            if not keep_error:
                tokens = place.mask(prompt).to(place.device)
                hidden = hidden.masked_scatter(tokens[..., None], self.sae(hidden[tokens]))
                self.upper.remember(hidden)
            self.states = hidden[:, self.start :]

    def clamp(self, latents: Int64[Tensor, " n"], values: Float[Tensor, " n"]) -> Float[Tensor, "batch late width"]:
        """Return the layer's states from the first clamped token on (equations 4 to 6).

        Gradients flow into `values`. Their numbers are those of `steered_states`.
        """
        if not len(latents):
            return self.states
        values = values.expand(len(self.highest.acts), -1)
        clamped = set_latents(self.highest, latents, values, self.sae.activation)
        change = torch.einsum("tk,tkw->tw", clamped.acts, self.sae.W_dec[clamped.indices]) + self.sae.b_dec - self.clean
        return self.states.masked_scatter(
            self.clamped[..., None], (self.states[self.clamped] + change).to(self.states.dtype)
        )

    def logits(self, states: Float[Tensor, "batch late width"]) -> Float[Tensor, "batch vocab"]:
        """Return the logits after the prompt where the layer puts out these states."""
        return self.upper.lmm.head(self.upper.resume(states, self.start)[:, -1])


Loss = Callable[[Float[Tensor, "batch vocab"]], Tensor]


class _Part:
    """A batch with what its logits should be."""

    def __init__(self, batch: Batch, loss: Loss):
        self.batch, self.loss = batch, loss

    def slope(self, latents: Int64[Tensor, " n"], values: Float[Tensor, " n"]) -> Float[Tensor, "clamped width"]:
        """Return the gradient of the loss in the states of the clamped tokens, where these latents are clamped."""
        states = self.batch.clamp(latents, values).detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.loss(self.batch.logits(states)), states)
        return gradient[self.batch.clamped].float()

    def pushed(self, direction: Float[Tensor, " width"]) -> Tensor:
        """Return the loss with a direction added at the clamped tokens."""
        states = self.batch.states + self.batch.clamped[..., None] * direction
        return self.loss(self.batch.logits(states.to(self.batch.states.dtype)))

    def clamped(self, values: Float[Tensor, " n"], latents: Int64[Tensor, " n"]) -> Tensor:
        """Return the loss with these latents clamped."""
        return self.loss(self.batch.logits(self.batch.clamp(latents, values.clamp_min(0))))


def _margins(place: SAEInPlace, cases: Sequence[Case], loss: Callable[[Tensor], Tensor]) -> Loss:
    """Return a loss of the margins of the right answers."""
    right, tempting = (
        torch.tensor([single_token(place.lmm, getattr(case, name)) for case in cases]) for name in ("right", "tempting")
    )
    rows = torch.arange(len(cases))
    return lambda logits: loss(logits[rows, right] - logits[rows, tempting])


def _parts(
    place: SAEInPlace,
    wrong: Sequence[Case],
    right: Sequence[Case],
    others: Sequence[Answered],
    scope: Scope,
    settings: FitSettings,
    keep_error: bool,
) -> list[list[_Part]]:
    """Return the batches of each group: wrong answers by their right answer, right answers, other questions."""
    sharpness, kept, weight = settings.sharpness, settings.kept_margin, settings.weight

    def batches(group: Sequence) -> Iterator[Sequence]:
        return (group[n : n + settings.batch] for n in range(0, len(group), settings.batch))

    def cured(margin: Tensor) -> Tensor:
        return -logsigmoid(sharpness * margin).mean()

    def spared(margin: Tensor) -> Tensor:
        return weight * (kept - margin).relu().mean()

    def part(group: Sequence, loss: Callable[[Batch], Loss]) -> _Part:
        batch = Batch(place, group, scope, settings.rounds * settings.each, keep_error=keep_error)
        return _Part(batch, loss(batch))

    kinds = [[case for case in wrong if case.right == word] for word in sorted({case.right for case in wrong})]
    groups = [
        [part(some, lambda _, some=some: _margins(place, some, cured)) for some in batches(kind)] for kind in kinds
    ]
    groups.append([part(some, lambda _, some=some: _margins(place, some, spared)) for some in batches(right)])
    groups.append([part(some, lambda batch: _same_token(batch, weight)) for some in batches(others)])
    return [group for group in groups if group]


def _same_token(batch: Batch, weight: float) -> Loss:
    expected = batch.untouched.argmax(-1)
    return lambda logits: weight * cross_entropy(logits, expected)


@dataclass(frozen=True)
class Fit:
    """Clamps with more and more latents, and a direction that was fitted to the same answers without an SAE.

    clamps: number of latents to the clamp; empty if there was nothing to correct.
    direction: is added to the layer's output at each clamped token; empty if there was nothing to correct.
    """

    clamps: dict[int, Edits]
    direction: list[float]


def fit(
    place: SAEInPlace,
    wrong: Sequence[Case],
    right: Sequence[Case],
    others: Sequence[Answered] = (),
    scope: Scope = ASKED,
    settings: FitSettings = FitSettings(),  # noqa: B008  (frozen)
    *,
    keep_error: bool = True,
) -> Fit:
    """Fit clamps that correct wrong answers, whatever the right answer is, and leave right ones as they are.

    The loss is the mean of -log sigmoid(sharpness * margin) over the wrong answers of each right answer (*no* and *yes*
    count the same), plus what right answers and the first tokens of other answers lose. Each round adds the latents for
    which the gradient predicts the largest fall of the loss if they are clamped to `settings.start` or silenced. Then
    Adam refits all values through equations 4 to 6, TopK included. A value below a token's k-th highest activation has
    no effect there.

    wrong: cases that are answered wrong with nothing clamped; without one, nothing is fitted.
    right: cases that are answered right.
    others: questions that have nothing to do with the cases.
    scope: the tokens that are clamped; in a causal model, tokens behind the image make this fast.
    keep_error: whether what the SAE leaves unexplained stays in.
    """
    if not wrong:
        return Fit({}, [])
    turns = [cycle(group) for group in _parts(place, wrong, right, others, scope, settings, keep_error)]
    latents = torch.zeros(0, dtype=torch.long, device=place.device)
    values = torch.zeros(0, device=place.device)
    clamps = {}
    for _ in progress_bar(range(settings.rounds), desc="fitting a clamp"):
        added, at = _best_latents(place, turns, latents, values, settings)
        latents, values = torch.cat([latents, added]), torch.cat([values, at])
        loss = partial(_Part.clamped, latents=latents)
        values = _descend(turns, values, loss, settings.rate, settings.refits).clamp_min(0)
        pairs = zip(latents.tolist(), values.tolist(), strict=True)
        clamps[len(latents)] = tuple(Edit(latent, value) for latent, value in pairs)
    direction = torch.zeros(place.sae.width, device=place.device)
    direction = _descend(turns, direction, _Part.pushed, settings.direction_rate, settings.direction_steps)
    return Fit(clamps, direction.tolist())


def _descend(
    turns: Sequence[Iterator[_Part]], start: Tensor, loss: Callable[[_Part, Tensor], Tensor], rate: float, steps: int
) -> Tensor:
    """Return what Adam makes of `start`, with one batch of each group a step."""
    found = start.clone().requires_grad_()
    adam = torch.optim.Adam([found], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            adam.zero_grad()
            sum(loss(next(turn), found) for turn in turns).backward()
            adam.step()
    return found.detach()


def _best_latents(
    place: SAEInPlace, turns: Sequence[Iterator[_Part]], latents: Tensor, values: Tensor, settings: FitSettings
) -> tuple[Int64[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the latents whose clamp to `start` or to 0 lowers the loss most by the gradient, and these values.

    Each group counts with three of its batches.
    """
    sae = place.sae
    slope = torch.zeros(sae.n_latents, device=place.device)  # of the loss in a latent's value at all clamped tokens
    present = torch.zeros_like(slope)  # the same times its present activations
    for part in (next(turn) for turn in turns for _ in range(3)):
        gradient, clean = part.slope(latents, values), sae.activation.choose(part.batch.highest)
        slope += sae.W_dec @ gradient.sum(0)
        effects = torch.einsum("tw,tkw->tk", gradient, sae.W_dec[clean.indices]) * clean.acts
        present.index_add_(0, clean.indices.flatten(), effects.flatten())
    clamped = present - settings.start * slope
    fall = torch.maximum(clamped, present)
    fall[latents] = -torch.inf
    best = fall.topk(settings.each).indices
    return best, torch.where(clamped[best] >= present[best], settings.start, 0.0)
