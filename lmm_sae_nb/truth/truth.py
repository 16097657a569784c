"""What images really show, patch by patch, and what latents respond to: only where a data set has label maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy import sparse

from lmm_sae_nb.cache.activations import LatentCache, base_latents
from lmm_sae_nb.interpret.explain import Exemplar, require_patches
from lmm_sae_nb.interpret.explainers import Outcome, Refiner
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.masks import TrueMasks
from lmm_sae_nb.support.intervals import bounds, share
from lmm_sae_nb.truth.common_concept import PURE, SHOWS, Shown, best_shown, common, names_of

Shares = Float[np.ndarray, "concepts patches"]


class PatchTruth:
    """The share of each base patch of an image that each concept covers: `truth[index]`, (concepts, patches) float32.

    names: (kind, concept) of each row; kinds: the kind alone. Each label map is read once.
    """

    def __init__(self, masks: TrueMasks, grid: tuple[int, int]):
        self.names, self.grid = names_of(masks.concepts), grid
        self.kinds = np.array([kind for kind, _ in self.names])
        self._masks = masks
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # few concepts are in an image

    def __getitem__(self, index: int) -> Shares:
        if index not in self._known:
            shares = self._masks.covered(index, self.grid)
            rows = np.flatnonzero(shares.any(1))
            self._known[index] = rows, shares[rows]
        rows, shares = self._known[index]
        whole = np.zeros((len(self.names), shares.shape[1]), np.float32)
        whole[rows] = shares
        return whole

    def shows(self, indices: Iterable[int]) -> sparse.csr_array:
        """(concepts, images * patches): 1 where a patch shows a concept, which is to cover a quarter of it."""
        return sparse.csr_array(np.concatenate([self[n] >= SHOWS for n in indices], 1).astype(np.float32))


# ---- what a latent's exemplars have in common -----------------------------------------------------------------

RESPONSES = ("one concept", "a detail", "a place", "edges", "several concepts", "nothing")
SAME_PLACE = 0.3  # mean IoU of the visible patches of two images; of patches at random it is below 0.1
ON_EDGES = 0.5  # of the visible patches; of all patches about 0.2 are
BESIDE = 0.125  # of a patch that each of two labels must cover for an edge to run through it
SEVERAL = 3  # concepts that together leave out one image in five at most


def shown_by(truth: PatchTruth, exemplars: Sequence[Exemplar]) -> Shown | None:
    """The concept that a latent's exemplars show best by the rule of `best_shown`; None if they have none in common."""
    visible, shares = _patches(truth, exemplars)
    return best_shown(visible, shares, truth.names) if len(visible) else None


def _patches(
    truth: PatchTruth, exemplars: Sequence[Exemplar]
) -> tuple[Bool[np.ndarray, "images patches"], Float[np.ndarray, "images concepts patches"]]:
    require_patches(exemplars)
    visible = np.array([exemplar.visible.ravel() for exemplar in exemplars], bool)
    return visible, np.array([truth[exemplar.image_index] for exemplar in exemplars])


def responds_to(truth: PatchTruth, exemplars: Sequence[Exemplar]) -> str:
    """What a latent responds to, by its exemplars: the first of `RESPONSES` that holds.

    One concept: they have one in common (`shown_by`). A detail: they do, but it fits the visible patches worse than
    that rule allows. A place: patches are visible in the same part of the images. Edges: patches are, through
    which the border of something runs. Several concepts: at most three, colours apart, account for four images in
    five. Nothing: all else, and a latent without exemplars.
    """
    visible, shares = _patches(truth, exemplars)
    if not len(visible):
        return "nothing"
    if best_shown(visible, shares, truth.names):
        return "one concept"
    coloured = truth.kinds == "colour"
    if common(visible, shares)[~coloured].any():
        return "a detail"
    pairs = [(one & two).sum() / max(1, (one | two).sum()) for one, two in combinations(visible, 2)]
    if pairs and np.mean(pairs) >= SAME_PLACE:
        return "a place"
    if (_edges(truth, shares) & visible).sum() >= ON_EDGES * visible.sum():
        return "edges"
    return "several concepts" if _account(visible, shares[:, ~coloured]) <= SEVERAL else "nothing"


def _edges(truth: PatchTruth, shares: np.ndarray) -> Bool[np.ndarray, "images patches"]:
    """Patches with two labels of one kind, no label being one too; colours apart."""
    found = np.zeros((len(shares), shares.shape[2]), bool)
    for kind in set(truth.kinds) - {"colour"}:
        parts = shares[:, truth.kinds == kind]
        none = 1 - parts.sum(1, keepdims=True)
        found |= (np.concatenate([parts, none], 1) >= BESIDE).sum(1) > 1
    return found


def _account(visible: Bool[np.ndarray, "images patches"], shares: np.ndarray) -> float:
    """How many concepts, taken greedily, leave out one image in five at most; infinity if none do."""
    patches = np.maximum(visible.sum(1), 1)[:, None]
    shows = ((shares >= SHOWS) & visible[:, None]).sum(2) / patches >= PURE
    taken = 0
    while len(shows) > len(visible) // 5:
        best = shows.sum(0).argmax()
        if not shows[:, best].any():
            return float("inf")
        shows, taken = shows[~shows[:, best]], taken + 1
    return taken


# ---- which latents detect which concepts ----------------------------------------------------------------------

LADDER = (0, 0.02, 0.05, *np.arange(0.1, 1.0, 0.1))  # thresholds that are tried, in units of a latent's maximum


class Detector(NamedTuple):
    """A latent that fires above `threshold` where a concept is and nowhere else, as far as F1 says."""

    kind: str
    concept: str
    latent: int
    threshold: float
    f1: float


def choose_detectors(cache: LatentCache, truth: PatchTruth, *, best: int = 3, block: int = 256) -> list[Detector]:
    """For each concept the `best` latents and their thresholds by F1 on the cached scenes' base patches.

    Thresholds are of `LADDER`; latents that never hit are left out. FileNotFoundError if the cache keeps no
    activations (notebook 02's `store`).
    """
    shows = truth.shows(range(cache.images)).T.tocsc()
    showing, patches = shows.sum(0), truth.grid[0] * truth.grid[1]
    found: list[list[Detector]] = [[] for _ in truth.names]
    for start in range(0, cache.n_latents, block):
        stop = min(start + block, cache.n_latents)
        entries = cache.store.latents(start, stop)
        highest = cache.max[start:stop].numpy()
        f1, rung = _best_rung(entries, start, highest, shows, showing, patches)
        for row, (kind, name) in enumerate(truth.names):
            top = [n for n in np.argsort(-f1[:, row], kind="stable")[:best] if f1[n, row] > 0]
            found[row] += [
                Detector(kind, name, start + int(n), float(rung[n, row] * highest[n]), float(f1[n, row])) for n in top
            ]
    return [one for row in found for one in sorted(row, key=lambda one: -one.f1)[:best]]


def _best_rung(entries, start: int, highest: np.ndarray, shows, showing: np.ndarray, patches: int):
    """For latents start to start + len(highest): the best F1 (latents, concepts) over the ladder, and its rung."""
    f1 = np.zeros((len(highest), len(showing)))
    rung = np.zeros_like(f1)
    rows, columns = entries.latents - start, entries.images * patches + entries.patches
    level = entries.acts / highest[rows]
    for part in LADDER:
        on = level > part
        fired = sparse.csr_array(
            (np.ones(on.sum(), np.float32), (rows[on], columns[on])), (len(highest), shows.shape[0])
        )
        now = _f1((fired @ shows).toarray(), fired.sum(1)[:, None], showing)
        rung[now > f1] = part
        f1 = np.maximum(f1, now)
    return f1, rung


def _f1(hits: np.ndarray, fired: np.ndarray, showing: np.ndarray) -> np.ndarray:
    return 2 * hits / np.maximum(fired + showing, 1)


def measure_detectors(
    lmm: LMM, sae: TopKSAE, images: Sequence[Image.Image], truth: PatchTruth, layer: int,
    detectors: Sequence[Detector], batch_size: int = 16,
) -> tuple[list[Detector], set[tuple[str, str]]]:  # fmt: skip
    """The same latents and thresholds with their F1 on other images, and the (kind, concept) that those show at all.

    images: those of `truth`, in its order.
    """
    row = {name: n for n, name in enumerate(truth.names)}
    column = np.full(sae.n_latents, -1)
    latents = sorted({one.latent for one in detectors})
    column[latents] = np.arange(len(latents))
    acts = np.concatenate([_columns(part, column) for part in base_latents(lmm, sae, images, layer, batch_size)])
    shows = truth.shows(range(len(acts))).toarray().astype(bool)
    acts = acts.reshape(-1, len(latents))
    measured = []
    for one in detectors:
        on, is_there = acts[:, column[one.latent]] > one.threshold, shows[row[one.kind, one.concept]]
        f1 = _f1((on & is_there).sum(), on.sum(), is_there.sum())
        measured.append(one._replace(f1=float(f1)))
    return measured, {name for name, n in row.items() if shows[n].any()}


def _columns(latents, column: np.ndarray) -> Float[np.ndarray, "images patches latents"]:
    """The activations of the latents that have a column."""
    acts, where = latents.acts.float().numpy(), column[latents.indices.numpy()]
    dense = np.zeros((*acts.shape[:2], column.max() + 1), np.float32)
    image, patch, slot = np.nonzero(where >= 0)
    dense[image, patch, where[image, patch, slot]] = acts[image, patch, slot]
    return dense


# ---- how right explanations are -------------------------------------------------------------------------------


def with_truth(rows: Mapping[str, dict], shown: Mapping[int, Sequence[Exemplar]], truth: PatchTruth) -> dict[str, dict]:
    """Rows of explanations by latent, each with what its exemplars really have in common and what it responds to.

    true_kind and true_concept are None, and true_iou is 0, where they have nothing in common; all_common: whatever
    else they have in common, such as the colour of a thing.
    """
    told = {}
    for latent, row in rows.items():
        found = shown[int(latent)]
        best = shown_by(truth, found)
        shared = np.flatnonzero(common(*_patches(truth, found))) if found else ()
        told[latent] = row | {
            "true_kind": best and best.kind, "true_concept": best and best.concept,
            "true_iou": best.iou if best else 0.0,
            "all_common": [truth.names[n][1] for n in shared],
            "responds_to": responds_to(truth, found),
        }  # fmt: skip
    return told


def counted(rows: Mapping[str, dict]) -> dict[str, float]:
    """How many latents were asked about, how many came to each outcome, and the share explained with its interval."""
    outcomes = Counter(row["outcome"] for row in rows.values())
    found = {"asked": len(rows)} | {outcome.value: outcomes[outcome.value] for outcome in Outcome}
    return found | _share("explained_fraction", [row["outcome"] == "explained" for row in rows.values()])


def judged(rows: Mapping[str, dict]) -> dict[str, float]:
    """Of rows with their truth: how many explanations are right, how many refusals, and what the rest respond to.

    concept_accuracy: of the explained, those whose concept is the true one; concept_common: those whose concept is at
    least one of all that they have in common; refusal_precision: of the refused, those that have nothing in common;
    answerable_fraction: of all, those that have something; unexplained_*: counts by `RESPONSES`.
    A share of nothing is left out.
    """
    explained = [row for row in rows.values() if row["outcome"] == "explained"]
    refused = [row["true_concept"] is None for row in rows.values() if row["outcome"] == "refused"]
    rest = Counter(row["responds_to"] for row in rows.values() if row["outcome"] != "explained")
    return (
        _share("concept_accuracy", [row["concept"] == row["true_concept"] for row in explained])
        | _share("concept_common", [row["concept"] in row["all_common"] for row in explained])
        | _share("refusal_precision", refused)
        | _share("answerable_fraction", [row["true_concept"] is not None for row in rows.values()])
        | {f"unexplained_{what.replace(' ', '_')}": rest[what] for what in RESPONSES}
    )


def untaught(rows: Mapping[str, dict], taught: Collection[int]) -> dict[str, float]:
    """Of rows with their truth those of latents that the explainer did not learn from: asked_untaught,
    explained_fraction_untaught, concept_accuracy_untaught; nothing if it learned from none of them."""
    rest = {latent: row for latent, row in rows.items() if int(latent) not in taught}
    if len(rest) == len(rows):
        return {}
    explained = [row for row in rest.values() if row["outcome"] == "explained"]
    return (
        {"asked_untaught": len(rest)}
        | _share("explained_fraction_untaught", [row["outcome"] == "explained" for row in rest.values()])
        | _share("concept_accuracy_untaught", [row["concept"] == row["true_concept"] for row in explained])
    )


def coverage(rows: Mapping[str, dict], refine: Refiner) -> list[dict[str, float]]:
    """What every limit of sureness gives: least_sure, explained_fraction and concept_accuracy, highest limit first.

    rows: of `with_truth`, their answers refined anew, so that those whom a limit has refused count as well.
    """
    told = [row for row in rows.values() if row["sureness"] is not None]
    said = zip(told, refine([row["answer"] for row in told]), strict=True)
    ranked = sorted(((row["sureness"], its.text == row["true_concept"]) for row, its in said if its.text), reverse=True)
    right = np.cumsum([hit for _, hit in ranked])
    return [
        {"least_sure": sureness, "explained_fraction": n / len(rows), "concept_accuracy": float(right[n - 1]) / n}
        for n, (sureness, _) in enumerate(ranked, 1)
    ]


def recalled(
    detectors: Sequence[Detector], present: set[tuple[str, str]], named: Mapping[int, str | None], least: float = 0.5
) -> dict[str, float]:
    """concepts_present: how many the held-out scenes show; concepts_detected: the share of them that a latent detects
    with an F1 above `least`; concept_recall: the share that such a latent detects whose explanation is its name.

    named: the concept that each latent was given, or None. ValueError if no concept is present.
    """
    if not present:
        raise ValueError("the held-out scenes show no concept; give scenes with label maps")
    good = [one for one in detectors if one.f1 > least and (one.kind, one.concept) in present]
    detected = {(one.kind, one.concept) for one in good}
    right = {(one.kind, one.concept) for one in good if named.get(one.latent) == one.concept}
    return {
        "concepts_present": len(present),
        **_share("concepts_detected", [name in detected for name in present]),
        **_share("concept_recall", [name in right for name in present]),
    }


def _share(name: str, values: Sequence[bool]) -> dict[str, float]:
    """A share with its 99 % interval; of nothing there is none."""
    return bounds(name, share(values)) if values else {}


def confusion(rows: Mapping[str, dict]) -> dict[str, dict[str, int]]:
    """True kind of concept, or `nothing`, to how often it was given each kind, or was not explained."""
    table: dict[str, Counter] = {}
    for row in rows.values():
        given = row["kind"] or "no kind" if row["outcome"] == "explained" else row["outcome"]
        table.setdefault(row["true_kind"] or "nothing", Counter())[given] += 1
    return {kind: dict(given) for kind, given in table.items()}
