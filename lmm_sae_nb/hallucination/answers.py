"""What the model answers under many settings of the SAE, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lmm_sae_nb.attribute.attribution import two_tokens
from lmm_sae_nb.hallucination.cases import Answered, Case
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.token_kinds import KINDS
from lmm_sae_nb.model.upper_layers import UpperLayers, above
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import Edit, Scope, steered, steered_versions
from lmm_sae_nb.support.images import pixel_hash
from lmm_sae_nb.support.progress import progress_bar

Edits = tuple[Edit, ...]


@dataclass(frozen=True)
class Push:
    """Add a random direction at every clamped token, as long as the change that a clamp makes there.

    like: the clamp.
    seed: of the direction, which is the same at all tokens.
    """

    like: Edits
    seed: int = 0


@dataclass(frozen=True)
class Shift:
    """Add this direction at every clamped token.

    direction: of the layer's width.
    """

    direction: tuple[float, ...]


Setting = Edits | Push | Shift | None  # None is the untouched model, () has the SAE spliced in and nothing clamped


class Answers(NamedTuple):
    """The first token of the answer to each case, under each of several settings."""

    margin: Float[Tensor, "settings cases"]  # logit of the right answer minus that of the tempting one
    token: Int64[Tensor, "settings cases"]  # the token with the highest logit
    right: Bool[Tensor, "settings cases"]  # whether this is the right answer's token


@torch.no_grad()
def first_tokens(
    place: SAEInPlace,
    cases: Sequence[Case],
    settings: Sequence[Setting],
    scope: Scope | Sequence[Scope] = Scope(),  # noqa: B008  (frozen)
    *,
    keep_error: bool = True,
    at_once: int = 16,
) -> Answers:
    """Answer each case under each setting. The logits after the prompt are enough: answers differ in the first token.

    Layers up to the SAE's run once for each case. In the layers above, settings and cases that begin alike share what
    comes before their first difference: settings that change late tokens only, and questions about one image. Cases of
    equal length run side by side.

    scope: the tokens that are clamped; one for all settings, or one for each.
    keep_error: whether what the SAE leaves unexplained stays in.
    at_once: pairs of a case and a setting that run side by side.

    Raises:
        ValueError: a right or tempting answer is not one token.
    """
    lmm, scopes = place.lmm, [scope] * len(settings) if isinstance(scope, Scope) else list(scope)
    pairs = torch.tensor([two_tokens(lmm, case.right, case.tempting) for case in cases]).reshape(-1, 2)
    margin = torch.zeros(len(settings), len(cases))
    token = torch.zeros(len(settings), len(cases), dtype=torch.long)
    with progress_bar(desc="answering", total=len(cases), disable=len(cases) < 50) as bar:
        for block in _of_equal_length(lmm, cases, max(1, at_once // 2)):
            prompt = lmm.prompt([cases[n].question for n in block], [cases[n].image for n in block])
            upper = above(lmm, prompt, place.layer)
            versions = [_versions(place, upper, settings, scopes, keep_error, n) for n in range(len(block))]
            pictures = [pixel_hash(cases[n].image) for n in block]
            alike = [pictures.index(picture) for picture in pictures]
            logits = _last_logits(upper, torch.stack(versions), alike, at_once).cpu()
            ids = pairs[block][:, None].expand(-1, len(settings), -1)
            right, tempting = logits.gather(-1, ids).unbind(-1)
            margin[:, block] = (right - tempting).T
            token[:, block] = logits.argmax(-1).T
            bar.update(len(block))
    return Answers(margin, token, token == pairs[:, 0])


def _of_equal_length(lmm: LMM, cases: Sequence[Case], size: int) -> Iterator[list[int]]:
    """Yield the numbers of cases whose prompts have equally many tokens, at most `size` at a time.

    Cases about one image stand side by side.
    """
    groups: dict[tuple, list[tuple[str, int]]] = {}
    for number, case in enumerate(cases):
        words = lmm.tokenizer(case.question, add_special_tokens=False)["input_ids"]
        groups.setdefault((case.image.size, len(words)), []).append((pixel_hash(case.image), number))
    for group in groups.values():
        numbers = [number for _, number in sorted(group)]
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


@torch.no_grad()
def unchanged(
    place: SAEInPlace,
    answered: Sequence[Answered],
    settings: Sequence[Setting],
    scope: Scope = Scope(),  # noqa: B008  (frozen)
    *,
    keep_error: bool = True,
) -> Bool[Tensor, "settings answered"]:
    """Tell whether the model would give each answer again, word for word, under each setting.

    Greedy decoding gives it again if each of its tokens, and its end, is the most likely one after those before it.
    So one forward is enough, instead of one for each token.

    settings, scope, keep_error: as for `first_tokens`.
    """
    lmm, layer = place.lmm, place.layer
    same = torch.zeros(len(settings), len(answered), dtype=torch.bool)
    for n, each in enumerate(answered):
        prompt = lmm.prompt(each.question, each.image, answers=each.answer)
        upper = above(lmm, prompt, layer)
        decoded = upper.run_alike(_versions(place, upper, settings, [scope] * len(settings), keep_error))
        at = prompt.answer_mask[0, 1:]
        predicted = lmm.head(decoded[:, :-1][:, at]).argmax(-1)
        same[:, n] = (predicted == prompt.inputs["input_ids"][0, 1:][at]).all(-1).cpu()
    return same


def _versions(
    place: SAEInPlace,
    upper: UpperLayers,
    settings: Sequence[Setting],
    scopes: Sequence[Scope],
    keep_error: bool,
    sample: int = 0,
) -> Float[Tensor, "settings tokens width"]:
    """Return the layer's states of one sample of a prompt under each setting.

    scopes: one for each setting.
    """
    hidden = upper.hidden[sample]
    versions = hidden.repeat(len(settings), 1, 1)
    spliced = place.mask(upper.prompt)[sample].to(hidden.device)
    changed = [s for s, setting in enumerate(settings) if setting is not None]
    for scope in dict.fromkeys(scopes[s] for s in changed):
        of_scope = [s for s in changed if scopes[s] == scope]
        chosen = [settings[s] for s in of_scope]
        steered = scope.of_prompt(upper.prompt)[sample].to(hidden.device)
        tokens = spliced & steered if keep_error else spliced  # with the error kept, other tokens stay as they are
        edits = [setting if isinstance(setting, tuple) else getattr(setting, "like", ()) for setting in chosen]
        states = steered_versions(place.sae, hidden[tokens], [*edits, ()], steered[tokens], keep_error)
        states, clean = states[:-1], states[-1]
        for state, setting in zip(states, chosen, strict=True):
            if isinstance(setting, Push):
                state[:] = clean + _along(setting.seed, state - clean)
            elif isinstance(setting, Shift):
                state[steered[tokens]] += torch.tensor(setting.direction).to(state)
        versions[torch.tensor(of_scope)[:, None], tokens.nonzero()[:, 0]] = states.to(hidden.dtype)
    return versions


@contextmanager
def under(
    place: SAEInPlace,
    prompt: Prompt,
    setting: Edits | Shift | None,
    scope: Scope = Scope(),  # noqa: B008  (frozen)
    *,
    keep_error: bool = True,
) -> Iterator[None]:
    """Run the model on this prompt under a setting, or generate from it; `steered` for every setting but a `Push`.

    Arguments and errors as `steered`.
    """
    if setting is None:
        yield
        return
    shift = setting if isinstance(setting, Shift) else None
    in_prompt = (scope.of_prompt(prompt) & place.mask(prompt, KINDS)).to(place.device)

    def add(hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        at = in_prompt[..., None] if hidden.shape[1] == in_prompt.shape[1] else scope.of_generated
        return hidden + at * torch.tensor(shift.direction).to(hidden)

    added = place.lmm.spliced(place.layer, add) if shift else nullcontext()
    with steered(place, prompt, () if shift else setting, scope, keep_error=keep_error), added:
        yield


def _along(seed: int, change: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
    """Return changes of the same length at each token, all along one random direction."""
    direction = torch.randn(change.shape[-1], generator=torch.Generator().manual_seed(seed)).to(change)
    return change.norm(dim=-1, keepdim=True) * direction / direction.norm()


@torch.no_grad()
def strength(place: SAEInPlace, cases: Sequence[Case], edits: Edits, scope: Scope, *, keep_error: bool = True) -> float:
    """Return how long the change is that a clamp makes in the layer's output: its mean norm over the clamped tokens.

    cases: the prompts that it is averaged over; without one it is 0.
    """
    lengths = []
    for block in _of_equal_length(place.lmm, cases, 8):
        prompt = place.lmm.prompt([cases[n].question for n in block], [cases[n].image for n in block])
        upper = above(place.lmm, prompt, place.layer)
        clamped = scope.of_prompt(prompt) & place.mask(prompt, KINDS)
        for sample, tokens in enumerate(clamped.to(upper.hidden.device)):
            clean, changed = _versions(place, upper, [(), edits], [scope] * 2, keep_error, sample)
            lengths.append((changed - clean)[tokens].float().norm(dim=-1))
    return float(torch.cat(lengths).mean()) if lengths else 0.0


def _last_logits(
    upper: UpperLayers, versions: Float[Tensor, "samples settings tokens width"], alike: Sequence[int], at_once: int
) -> Float[Tensor, "samples settings vocab"]:
    """Return the logits after the last token where the layer puts out these versions of its states.

    alike: for each sample, the first one with the same image.
    """
    samples, settings = versions.shape[:2]
    states, numbers = versions.flatten(0, 1), torch.arange(samples * settings)
    like, starts = (each.flatten().cpu() for each in _beginnings(versions, alike))  # they index any device from there
    logits, order = [], []
    for roots in numbers[like == numbers].split(at_once):
        logits.append(upper.lmm.head(upper.remember(states[roots], roots // settings)[:, -1]))
        late = numbers[(like != numbers) & torch.isin(like, roots)]
        parts = late[starts[late].argsort(stable=True)].split(at_once) if len(late) else ()
        for some in parts:
            begin = int(starts[some[0]])
            decoded = upper.resume(states[some, begin:], begin, torch.searchsorted(roots, like[some]))
            logits.append(upper.lmm.head(decoded[:, -1]))
        order += [roots, *parts]
    return torch.cat(logits)[torch.cat(order).argsort()].unflatten(0, (samples, settings))


def _beginnings(
    versions: Float[Tensor, "samples settings tokens width"], alike: Sequence[int]
) -> tuple[Int64[Tensor, "samples settings"], Int64[Tensor, "samples settings"]]:
    """Return for each version the one that it begins like, and the first token that differs.

    Versions are numbered row by row. Candidates are the same setting and the first setting of the sample `alike`. A
    version that begins like neither, for half of the tokens, has its own number, and 0.
    """
    samples, settings, tokens, _ = versions.shape
    numbers = torch.arange(samples * settings, device=versions.device).view(samples, settings)
    like, starts = numbers.clone(), torch.zeros_like(numbers)
    for sample, other in enumerate(alike):
        # The first setting comes last and so wins. Then a version that others begin like begins like none itself.
        for candidates in (slice(None), slice(1)):
            differs = (versions[sample] != versions[other, candidates]).any(-1)
            first = torch.where(differs.any(-1), differs.int().argmax(-1), tokens - 1)
            found = (numbers[sample] != numbers[other, candidates]) & (2 * first > tokens)
            like[sample] = torch.where(found, numbers[other, candidates], like[sample])
            starts[sample] = torch.where(found, first, starts[sample])
    return like, starts
