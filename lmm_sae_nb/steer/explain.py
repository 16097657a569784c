"""Explain latents by steering: clamp a latent on an empty image, ask the model what it sees, take that as its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.interpret.explain import Explanation, as_rows
from lmm_sae_nb.interpret.explainers import Answer, Labeller, Outcome
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.experiments import at_dose
from lmm_sae_nb.steer.steering import Scope, answers
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.accuracy import Rows, fraction_metrics, other_names

# Steered answers and the unsteered one, to the concept that each of the first has and the last has not
Finder = Callable[[Sequence[str], str], list[Answer]]
WAYS = ("exemplars", "steering", "both", "agreed")


def explain_by_steering(
    place: SAEInPlace,
    cache: LatentCache,
    latents: Sequence[int],
    question: str,
    image: Image.Image,
    dose: float,
    find: Finder,
    label: Labeller,
    *,
    scope: Scope = Scope(),  # noqa: B008  (frozen)
    keep_error: bool = False,
    batch: int = 20,
    max_new_tokens: int = 24,
) -> dict[int, Explanation]:
    """Clamp latents one at a time while the model is asked about an empty image, and take its answers as explanations.

    An answer that does not differ from the one with the SAE spliced in explains nothing: the latent is refused. It is
    unparseable if the answer differs and `find` sees no concept in it.

    cache: gives each latent's maximum over the cached images.
    image: one that shows nothing.
    dose: of the clamps, in units of these maxima.
    find: such as `Vocabulary.find`.
    label: concepts to kinds.
    scope: the tokens at which a latent is clamped.
    keep_error: as for `steered`.
    batch: clamps that run side by side.

    Raises:
        ValueError: a latent is never active on the cached images, so it has no dose.
    """
    silent = [latent for latent in latents if not cache.max[latent] > 0]
    if silent:
        raise ValueError(f"latents {silent[:5]} are silent on the cached images, so they have no dose; leave them out")
    settings = [[], *(at_dose(cache, latent, dose) for latent in latents)]
    spliced, *said = answers(
        place, question, image, settings, scope, keep_error=keep_error, batch=batch, max_new_tokens=max_new_tokens
    )
    different = [n for n, answer in enumerate(said) if answer != spliced]
    found = dict(zip(different, find([said[n] for n in different], spliced), strict=True))
    named = [n for n, concept in found.items() if concept.outcome is Outcome.EXPLAINED]
    kinds = dict(zip(named, label([found[n].text for n in named]), strict=True))
    nothing = Answer(Outcome.REFUSED, None, spliced)
    return {
        latent: Explanation(concept.outcome, concept.text, kinds.get(n), answer)
        for n, (latent, answer) in enumerate(zip(latents, said, strict=True))
        for concept in (found.get(n, nothing),)
    }


def both_ways(by_exemplars: Rows, by_steering: Rows) -> dict[str, dict[int, str | None]]:
    """Return the names that four ways of explaining give, latent to name; None where a way gives none.

    exemplars: the name by what the exemplars have in common.
    steering: the name by the steered answer.
    both: the name by exemplars; where they were refused, the name by steering.
    agreed: the name that both give.

    by_exemplars, by_steering: rows as explanations.json has them; latents that only one of them has are left out.
    """
    latents = [latent for latent in by_exemplars if latent in by_steering]
    pairs = {latent: (by_exemplars[latent]["concept"], by_steering[latent]["concept"]) for latent in latents}
    return {
        "exemplars": {latent: one for latent, (one, _) in pairs.items()},
        "steering": {latent: other for latent, (_, other) in pairs.items()},
        "both": {latent: one or other for latent, (one, other) in pairs.items()},
        "agreed": {latent: one if one == other else None for latent, (one, other) in pairs.items()},
    }


def steering_accuracy(by_exemplars: Rows, by_steering: Rows, seed: int = 0) -> Metrics:
    """Compare explanations by exemplars, by steering and by both with the truth, for all kinds of true concepts.

    For each way of `both_ways`, and by kind of true concept as `<name>_<kind>`:

    <way>_explained: fraction of the latents that get a name.
    <way>_accuracy: of these, the fraction whose name is the true concept.
    <way>_right: of the latents that have a true concept, the fraction that get it as their name.

    Further:

    steering_guessed: accuracy of the names by steering of random latents, of the same kind of name.
    steering_other_answer: accuracy of the answers to random other latents whose true concept is of the same kind.
    steering_where_refused: accuracy of steering where the exemplars were refused.
    ways_agree: of the latents that both ways name, the fraction that get one name.

    by_exemplars: rows as `add_truth` returns them.
    by_steering: rows of `explain_by_steering`.
    seed: of the controls.

    Raises:
        ValueError: no latent has rows of both, or there is no ground truth.
    """
    ways = both_ways(by_exemplars, by_steering)
    latents = list(ways["steering"])
    if not latents or not all("true_concept" in by_exemplars[latent] for latent in latents):
        raise ValueError(
            f"{len(latents)} latents are in both the {len(by_exemplars)} rows by exemplars and the {len(by_steering)} "
            "by steering, or rows have no true concept; give rows of `add_truth` of the latents that were clamped"
        )
    true = {latent: by_exemplars[latent]["true_concept"] for latent in latents}
    kind_of = {latent: by_exemplars[latent]["true_kind"] for latent in latents}
    metrics: Metrics = {"ways_latents": len(latents)}
    for kind in (None, *sorted({kind for kind in kind_of.values() if kind})):
        group, end = [n for n in latents if kind in (None, kind_of[n])], f"_{kind}" if kind else ""
        for way, names in ways.items():
            given = [n for n in group if names[n]]
            metrics |= fraction_metrics(f"{way}_explained{end}", [names[n] is not None for n in group])
            metrics |= fraction_metrics(f"{way}_accuracy{end}", [names[n] == true[n] for n in given])
            metrics |= fraction_metrics(f"{way}_right{end}", [names[n] == true[n] for n in group if true[n]])
    steered = {n: name for n, name in ways["steering"].items() if name}
    guesses = other_names({n: (name, by_steering[n]["kind"]) for n, name in steered.items()}, seed, different=False)
    others = _other_answers(ways["steering"], kind_of, seed)
    both_name = [n for n in steered if ways["exemplars"][n]]
    refused = [n for n in steered if not ways["exemplars"][n]]
    return (
        metrics
        | fraction_metrics("steering_guessed", [name == true[n] for n, name in guesses.items() if name])
        | fraction_metrics("steering_other_answer", [others[n] == true[n] for n in steered if n in others])
        | fraction_metrics("steering_where_refused", [steered[n] == true[n] for n in refused])
        | fraction_metrics("ways_agree", [ways["agreed"][n] is not None for n in both_name])
    )


def _other_answers(names: Mapping[int, str | None], kind_of: Mapping[int, str | None], seed: int) -> dict[int, str]:
    """Return for each latent the name by steering of another one, whose true concept is of the same kind."""
    rng, result = np.random.default_rng(seed), {}
    for latent in names:
        pool = [n for n, name in names.items() if name and n != latent and kind_of[n] == kind_of[latent]]
        if pool:
            result[latent] = names[pool[rng.integers(len(pool))]]
    return result


def measure_steering_explanations(
    place: SAEInPlace,
    cache: LatentCache,
    explanations: Rows,
    question: str,
    image: Image.Image,
    dose: float,
    find: Finder,
    label: Labeller,
    *,
    latents: int = 150,
    seed: int = 0,
    **how,
) -> Metrics:
    """Explain latents by steering, and compare with explanations by exemplars and with the truth.

    explanations: rows of `add_truth`, of latents that were drawn at random.
    latents: how many of these are clamped, drawn at random.
    how: `scope`, `batch` and others of `explain_by_steering`, as are the remaining arguments.
    """
    drawn = np.random.default_rng(seed).permutation(sorted(explanations))[:latents].tolist()
    steered = explain_by_steering(place, cache, drawn, question, image, dose, find, label, **how)
    return steering_accuracy(explanations, as_rows(steered), seed)
