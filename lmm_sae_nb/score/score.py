"""Section 3.2: how well explanations fit what excites their latents, beside chance; Tables 1 and 2."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image
from tqdm.auto import tqdm

from lmm_sae_nb.cache.activations import activation_maps
from lmm_sae_nb.chat.chats import pixel_hash
from lmm_sae_nb.interpret.explain import Exemplar
from lmm_sae_nb.interpret.explainers import KINDS, Judge
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.masks import PAPER, STRICT, Mode, Spot, TrueMasks, Where, activation_mask, ious, moved, spots
from lmm_sae_nb.support.intervals import Mean, Share, bounds, mean_interval, run_interval, share

BASELINES = ("_random", "_area", "_shuffled")
JUDGED = ("judged", "judged_shuffled")  # verdicts on a latent's own name, and on another's
Grid = Callable[[Sequence[Image.Image], Sequence[str]], Float[np.ndarray, "images texts"]]  # cosines of each with each
Verdicts = Callable[[Sequence[Sequence[Exemplar]], Sequence[str]], "list[str | None]"]  # yes, no, unsure; None: none


# ---- what is scored -------------------------------------------------------------------------------------------


def explained(
    rows: Mapping[str, Mapping], truth: TrueMasks | None = None, *, most: int | None = None, seed: int = 0
) -> dict[int, tuple[str, str]]:
    """Concept and kind of every latent that was explained, from the rows of explanations.json; at random, if `most`.

    With ground truth, what names no concept of the data set is left out. A kind that the explanation does not tell is
    the ground truth's, or "other". ValueError if fewer than two are left.
    """
    found = {}
    for latent, row in rows.items():
        concept = row["concept"] if row.get("outcome", "explained") == "explained" else None
        known = truth.kinds_of(concept) if truth and concept else []
        if concept and (known or not truth):
            found[int(latent)] = (concept, row.get("kind") or (known or ["other"])[0])
    if len(found) < 2:
        raise ValueError(
            f"{len(found)} of {len(rows)} latents have an explanation that can be scored, scores need two; "
            "run notebooks/03_interpret_features.py with more latents"
        )
    kept = _drawn(sorted(found), most, seed)
    return dict(sorted(((n, found[n]) for n in kept), key=lambda item: (item[1], item[0])))  # a concept's side by side


def _drawn(latents: Sequence, most: int | None, seed: int) -> list:
    """All of them, or `most` at random, in their order."""
    if most is None or len(latents) <= most:
        return list(latents)
    return [latents[n] for n in np.sort(np.random.default_rng(seed).choice(len(latents), most, replace=False))]


def shuffled(named: Mapping[int, tuple[str, str]], seed: int = 0) -> dict[int, str | None]:
    """For each latent the concept of another one, at random, that is not its own; None if all have the same.

    named: concept and kind of each. It is of the same kind where that has another concept: some kinds score higher.
    """
    rng, result = np.random.default_rng(seed), {}
    for latent, (concept, kind) in named.items():
        others = [row for row in named.values() if row[0] != concept]
        pool = [row for row in others if row[1] == kind] or others
        result[latent] = pool[rng.integers(len(pool))][0] if pool else None
    return result


class Compared(NamedTuple):
    """A latent's score on its own images, and what chance gives in its place; None where that has no meaning.

    random: other images, by run; area: the same images, the activation moved elsewhere; shuffled: another's concept.
    """

    score: float
    random: tuple[float, ...] | None
    area: float | None
    shuffled: float | None

    def columns(self, name: str) -> dict[str, float]:
        """As named numbers for a table; the runs of `random` as their mean."""
        told = {name: self.score, f"{name}_area": self.area, f"{name}_shuffled": self.shuffled}
        told[f"{name}_random"] = None if self.random is None else float(np.mean(self.random))
        return {key: float(value) for key, value in told.items() if value is not None}


# ---- IoU ------------------------------------------------------------------------------------------------------


def latent_iou(
    own: Sequence[Spot], drawn: Sequence[Spot], concept: str, other: str | None, where: Where, mode: Mode,
    *, runs: int = 10, seed: int = 0,
) -> Compared:  # fmt: skip
    """Section 2.2: mean IoU of a latent's activation masks with its concept's masks, over its own images.

    drawn: the same latent on random images, equally many for each of `runs`. ValueError if there are no own images,
    or the drawn ones do not make up the runs.
    """
    if not own:
        raise ValueError(f"no exemplars to score {concept!r} with; leave out latents that never fire")
    if runs < 1 or not drawn or len(drawn) % runs:
        raise ValueError(f"{len(drawn)} random images cannot be shared by {runs} runs; draw as many for each")
    rng = np.random.default_rng(seed)
    return Compared(
        float(ious(own, concept, where, mode).mean()),
        tuple(ious(drawn, concept, where, mode).reshape(runs, -1).mean(1).tolist()),
        float(ious(own, concept, where, mode, elsewhere=rng).mean()),
        None if other is None else float(ious(own, other, where, mode).mean()),
    )


def drawn_spots(
    lmm: LMM, sae: TopKSAE, images: Sequence[Image.Image], layer: int, latents: Sequence[int], numbers: Sequence[int]
) -> dict[int, list[Spot]]:
    """Each latent on the same images, by their numbers: at random, they are the baseline of `latent_iou`.

    NoPatchGrid for a model without one.
    """
    pictures = [images[number] for number in numbers]
    maps = activation_maps(lmm, sae, pictures, layer, latents)
    return {
        latent: [Spot(n, p.size, m) for n, p, m in zip(numbers, pictures, maps[:, column], strict=True)]
        for column, latent in enumerate(latents)
    }


def all_ious(
    places: Callable[[int], tuple[Sequence[Spot], Sequence[Spot]]], concepts: Mapping[int, str],
    others: Mapping[int, str | None], segmenters: Mapping[str, Where], modes: Sequence[Mode] = (PAPER, STRICT),
    *, runs: int = 10, seed: int = 0,
) -> dict[str, dict[int, Compared]]:  # fmt: skip
    """`latent_iou` of every latent, in every mode, by every segmenter: a dictionary a column.

    places: a latent's own and drawn images. Columns are called iou_MODE for the first segmenter and
    iou_MODE_SEGMENTER for the others. Latents with one concept are best next to each other.
    """
    names = {
        (mode, name): f"iou_{mode.name}" + f"_{name}" * bool(n) for mode in modes for n, name in enumerate(segmenters)
    }
    found: dict[str, dict[int, Compared]] = {column: {} for column in names.values()}
    for latent, concept in tqdm(concepts.items(), desc="segmenting", unit=" latents", mininterval=2):
        own, drawn = places(latent)
        for (mode, name), column in names.items():
            found[column][latent] = latent_iou(
                own, drawn, concept, others[latent], segmenters[name], mode, runs=runs, seed=seed + latent
            )
    return found


# ---- CLIP score -----------------------------------------------------------------------------------------------


def region(exemplar: Exemplar, mode: Mode, elsewhere: np.random.Generator | None = None) -> Image.Image:
    """What CLIP sees of an exemplar: the whole image, or (`mode.region`) the active patches with the rest black."""
    if not mode.region:
        return exemplar.image
    (spot,) = spots([exemplar])
    mask = activation_mask(spot, mode)
    mask = mask if elsewhere is None else moved(mask, elsewhere)
    return Image.fromarray(np.asarray(exemplar.image.convert("RGB")) * mask[..., None])


def clip_scores(
    similar: Grid, pictures: Iterable[Image.Image], concepts: Sequence[str], batch: int = 64
) -> Float[np.ndarray, "pictures concepts"]:
    """100 max(cosine, 0) of every picture with every concept, as torchmetrics' CLIPScore; pictures may be a stream.

    Of pictures with the same pixels one is looked at. ValueError for no pictures, or a similarity of another shape.
    """
    found, waiting, places, numbers = [], [], [], {}

    def score() -> None:
        cosines = np.asarray(similar(waiting, list(concepts)), np.float32)
        if cosines.shape != (len(waiting), len(concepts)):
            raise ValueError(
                f"the similarity gave shape {cosines.shape} for {len(waiting)} images and {len(concepts)} texts; it "
                "has to give a cosine for each of an image with a text"
            )
        found.append(100 * np.maximum(cosines, 0))
        waiting.clear()

    for picture in pictures:
        number = numbers.setdefault(pixel_hash(picture), len(numbers))
        if number == len(found) * batch + len(waiting):  # not seen before
            waiting.append(picture)
        places.append(number)
        if len(waiting) == batch:
            score()
    if waiting:
        score()
    if not found:
        raise ValueError("no pictures to compare with concepts; leave out latents that never fire")
    return np.concatenate(found)[places]


def latents_clip(
    similar: Grid, sets: Callable[[], Iterator[Sequence[Exemplar]]], concepts: Sequence[str],
    others: Sequence[str | None], mode: Mode, drawn: Iterable[Image.Image], *, runs: int = 30, seed: int = 0,
) -> list[Compared]:  # fmt: skip
    """CLIP score of each latent's concept with its own images (Table 1's CS), and beside it chance.

    sets: gives each latent's exemplars, anew at every call. Whole images have random images as baseline (`drawn`, as
    many for each run); highlighted regions have regions of the same area elsewhere in the same images.
    """
    vocabulary = sorted({*concepts, *filter(None, others)})
    column = {concept: n for n, concept in enumerate(vocabulary)}
    sizes: list[int] = []

    def regions() -> Iterator[Image.Image]:
        for own in sets():
            sizes.append(len(own))
            if not own:
                raise ValueError(f"{concepts[len(sizes) - 1]!r} has no image; give each concept at least one image")
            yield from (region(e, mode) for e in own)

    by_region = clip_scores(similar, regions(), vocabulary)
    if len(sizes) != len(concepts):
        raise ValueError(f"{len(concepts)} concepts, images of {len(sizes)}; give each concept at least one image")
    ends = np.cumsum(sizes)[:-1]
    seen = np.split(by_region, ends)
    if mode.region:
        rng = np.random.default_rng(seed)
        away = (region(e, mode, rng) for own in sets() for e in own)
        areas, randoms = np.split(clip_scores(similar, away, vocabulary), ends), None
    else:
        by_picture = clip_scores(similar, drawn, vocabulary)
        if len(by_picture) % runs:
            raise ValueError(f"{len(by_picture)} random images cannot be shared by {runs} runs; draw as many for each")
        areas, randoms = None, by_picture.reshape(runs, -1, len(vocabulary)).mean(1)
    return [
        Compared(
            float(seen[n][:, column[concept]].mean()),
            None if randoms is None else tuple(randoms[:, column[concept]].tolist()),
            None if areas is None else float(areas[n][:, column[concept]].mean()),
            None if other is None else float(seen[n][:, column[other]].mean()),
        )
        for n, (concept, other) in enumerate(zip(concepts, others, strict=True))
    ]


def all_clips(
    similar: Grid, shown: Callable[[int], Sequence[Exemplar]], concepts: Mapping[int, str],
    others: Mapping[int, str | None], drawn: Sequence[Image.Image], modes: Sequence[Mode] = (PAPER, STRICT),
    *, runs: int = 30, seed: int = 0,
) -> dict[str, dict[int, Compared]]:  # fmt: skip
    """`latents_clip` in every mode, as columns clip_MODE; shown: a latent's exemplars."""
    names, wrong = list(concepts.values()), [others[latent] for latent in concepts]
    return {
        f"clip_{mode.name}": dict(
            zip(
                concepts,
                latents_clip(similar, lambda: map(shown, concepts), names, wrong, mode, drawn, runs=runs, seed=seed),
                strict=True,
            )
        )
        for mode in modes
    }


# ---- Table 1 --------------------------------------------------------------------------------------------------


def records(
    named: Mapping[int, tuple[str, str]], found: Mapping[str, Mapping[int, Compared]]
) -> tuple[dict[str, dict], dict[str, dict[str, list[float]]]]:
    """Scores as they are kept: latent to concept, kind and columns; and column to latent to the random runs."""
    rows = {
        str(latent): {"concept": concept, "kind": kind}
        | {key: value for column, scores in found.items() for key, value in scores[latent].columns(column).items()}
        for latent, (concept, kind) in named.items()
    }
    runs = {
        column: {str(latent): list(score.random) for latent, score in scores.items()}
        for column, scores in found.items()
        if all(score.random is not None for score in scores.values())
    }
    return rows, runs


def by_kind(kinds: Mapping[str, str]) -> dict[str, list[str]]:
    """The latents of each kind, Table 1's kinds first, and of all of them under "total"."""
    found = defaultdict(list)
    for latent, kind in kinds.items():
        found[kind].append(latent)
    order = [*KINDS, *sorted(found.keys() - set(KINDS))]
    return {kind: found[kind] for kind in order if kind in found} | {"total": list(kinds)}


def table(
    rows: Mapping[str, Mapping], runs: Mapping[str, Mapping[str, Sequence[float]]], column: str, seed: int = 0
) -> dict[str, dict[str, Mean]]:
    """Table 1 for one column: for each kind and in total the mean score, and the mean of each baseline that there is.

    rows: latent to its columns and `kind`; runs: column to latent to the random baseline's runs. Intervals (99 %) are
    bootstraps over latents, `random`'s over its runs, as the paper's; `gain` is score less random, over latents. Kinds
    with fewer than two latents are left out.
    """
    result = {}
    for kind, latents in by_kind({latent: row["kind"] for latent, row in rows.items() if column in row}).items():
        if len(latents) < 2:
            continue
        series = {"top": [rows[n][column] for n in latents]}
        for name in ("area", "shuffled"):
            series[name] = [value for n in latents if (value := rows[n].get(f"{column}_{name}")) is not None]
        if column in runs:
            series["gain"] = [rows[n][column] - rows[n][f"{column}_random"] for n in latents]
        result[kind] = {name: mean_interval(values, seed=seed) for name, values in series.items() if len(values) > 1}
        if column in runs:
            result[kind]["random"] = run_interval(np.array([runs[column][n] for n in latents]))
    return result


def by_quantity(tables: Mapping[str, Mapping]) -> dict[str, dict[str, Mapping]]:
    """Tables by column (`table`) as tables by what is measured and by mode: "iou_paper_sam" is iou_sam's, of paper."""
    found: dict[str, dict[str, Mapping]] = {}
    for column, rows in tables.items():
        quantity, mode, *segmenter = column.split("_", 2)
        found.setdefault("_".join([quantity, *segmenter]), {})[mode] = rows
    return found


def beside(
    found: Mapping[str, Mapping[str, Mapping[str, Mean]]], published: Mapping[str, tuple[float, float]] | None = None
) -> list[dict[str, str | float | Mean | None]]:
    """One quantity's tables as rows of `plots.table`, the modes of a kind one below the other, with what chance gives.

    found: mode to table; published: by kind, the random baseline and the score, in the mode `paper`.
    """
    told = []
    for kind in dict.fromkeys(kind for rows in found.values() for kind in rows):
        for mode, rows in ((mode, rows) for mode, rows in found.items() if kind in rows):
            cells = {name: rows[kind].get(name) for name in ("top", "random", "area", "shuffled")}
            if published:
                random, score = published.get(kind, (None, None)) if mode == PAPER.name else (None, None)
                cells |= {"published": score, "at random": random}
            told.append({"kind": kind, "mode": mode} | cells)
    return told


def middling(rows: Mapping[str, Mapping], column: str) -> dict[str, int]:
    """For each kind the latent whose score is the median (the upper one of two)."""
    ranked = sorted((n for n in rows if column in rows[n]), key=lambda n: rows[n][column])
    groups = by_kind({n: rows[n]["kind"] for n in ranked})
    return {kind: int(latents[len(latents) // 2]) for kind, latents in groups.items() if kind != "total"}


def columns_of(rows: Mapping[str, Mapping]) -> list[str]:
    """The scores among the columns of `rows`, without their baselines."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    scores = [name for name in names if name.startswith(("iou_", "clip_"))]
    return [name for name in scores if not name.endswith(BASELINES)]


def summary(
    rows: Mapping[str, Mapping], runs: Mapping[str, Mapping[str, Sequence[float]]], seed: int = 0
) -> dict[str, float]:
    """Every table as a stage's metrics, with how many latents each kind has and what the tables come to.

    COLUMN_ratio: score by random baseline, of IoU; iou_random: iou_strict's baseline by its short name.
    clip_..._kinds_above_random: kinds whose gain has its interval above 0, of the kinds that have one.
    iou_MODE_SEGMENTER_correlation: Pearson's, with the first segmenter's IoU.
    """
    tables = {column: table(rows, runs, column, seed) for column in columns_of(rows)}
    groups = by_kind({latent: row["kind"] for latent, row in rows.items()})
    told: dict[str, float] = {"latents_scored": len(rows)}
    told |= {f"latents_{kind}": len(latents) for kind, latents in groups.items() if kind != "total"}
    told |= flat(tables)
    for column, found in tables.items():
        kinds = {kind: row for kind, row in found.items() if kind != "total" and "gain" in row}
        random = found["total"].get("random") if column.startswith("iou_") else None
        if random and column == "iou_strict":
            told |= bounds("iou_random", random)
        if random and random.mean > 0:
            told[f"{column}_ratio"] = found["total"]["top"].mean / random.mean
        if column.startswith("clip_") and kinds:
            told[f"{column}_kinds_above_random"] = sum(row["gain"].low > 0 for row in kinds.values())
            told[f"{column}_kinds"] = len(kinds)
        first = "_".join(column.split("_")[:2])
        if first != column and (pair := correlation(rows, first, column)) is not None:
            told[f"{column}_correlation"] = pair
    return told


def correlation(rows: Mapping[str, Mapping], one: str, two: str) -> float | None:
    """Pearson's over latents; None if either does not vary."""
    pairs = np.array([[row[one], row[two]] for row in rows.values()])
    return float(np.corrcoef(pairs.T)[0, 1]) if np.ptp(pairs, axis=0).all() else None


def flat(tables: Mapping[str, Mapping[str, Mapping[str, Mean]]]) -> dict[str, float]:
    """Tables by column as a stage's metrics: `column`, `column_random`, `column_kind`, each with _low and _high.

    Baselines are told in total only; gains in total, and for every kind of a CLIP score.
    """
    told = {}
    for column, kinds in tables.items():
        for kind in ("total", *(kind for kind in kinds if kind != "total")):
            for name, found in kinds.get(kind, {}).items():
                if kind == "total" or name == "top" or (name == "gain" and column.startswith("clip_")):
                    words = [column, kind if kind != "total" else "", name if name != "top" else ""]
                    told |= bounds("_".join(filter(None, words)), found)
    return told


# ---- Table 2 --------------------------------------------------------------------------------------------------


def by_sight(judge: Judge) -> Verdicts:
    """A judge of pictures as one of exemplars: it is shown the masked images."""
    return lambda sets, concepts: judge([[e.masked for e in own] for own in sets], concepts)


def knowing(truth: TrueMasks) -> Verdicts:
    """A judge that knows the ground truth: yes if the exemplars have the concept in common (`shown.common`), or no.

    None for a concept that the ground truth does not know.
    """

    def verdicts(sets: Sequence[Sequence[Exemplar]], concepts: Sequence[str]) -> list[str | None]:
        return [
            ("yes" if concept in truth.common(own) else "no") if truth.kinds_of(concept) else None
            for own, concept in zip(sets, concepts, strict=True)
        ]

    return verdicts


def some_of_each(kinds: Mapping[str, str], each: int, seed: int = 0) -> list[int]:
    """`each` latents of every kind, at random; all of a kind that has no more."""
    groups = {kind: latents for kind, latents in by_kind(kinds).items() if kind != "total"}
    return [int(latent) for latents in groups.values() for latent in _drawn(latents, each, seed)]


def judge_latents(
    verdicts: Verdicts, shown: Callable[[int], Sequence[Exemplar]], named: Mapping[int, tuple[str, str]],
    others: Mapping[int, str | None], *, each: int = 100, seed: int = 0,
) -> dict[str, dict[str, str | None]]:  # fmt: skip
    """Verdicts on `each` latents of every kind, at random, by `JUDGED`: on their concepts, and on others'.

    Beside them the concept that was judged, so that a later explanation is not taken for it.
    """
    chosen = some_of_each({str(latent): kind for latent, (_, kind) in named.items()}, each, seed)
    found: dict[str, dict[str, str | None]] = {str(n): {"concept": named[n][0]} for n in chosen}
    for column, names in zip(JUDGED, ({n: named[n][0] for n in chosen}, others), strict=True):
        asked = [n for n in chosen if names[n]]
        for n, verdict in zip(asked, verdicts([shown(n) for n in asked], [names[n] for n in asked]), strict=True):
            found[str(n)][column] = verdict
    return found


def consistency(verdicts: Mapping[str, str | None], kinds: Mapping[str, str]) -> dict[str, Share]:
    """Table 2: for each kind and in total the share of verdicts that are yes.

    What got no verdict (None) is left out; unsure counts as not yes.
    """
    given = {latent: verdict for latent, verdict in verdicts.items() if verdict is not None}
    groups = by_kind({latent: kinds[latent] for latent in given})
    return {kind: share([given[n] == "yes" for n in latents]) for kind, latents in groups.items() if latents}


def agreed(rows: Mapping[str, Mapping[str, str | None]], kinds: Mapping[str, str]) -> dict[str, float]:
    """Table 2 as a stage's metrics, each with its interval: judged, judged_KIND, and the same of judged_shuffled.

    rows: of `judge_latents`.
    """
    told: dict[str, float] = {}
    for name in JUDGED:
        shares = consistency({n: row.get(name) for n, row in rows.items()}, kinds)
        for kind, found in shares.items():
            title = name if kind == "total" else f"{name}_{kind}"
            told |= bounds(title, found) | {f"{title}_asked": found.asked}
    return told


class Agreement(NamedTuple):
    """Two raters on what both have rated; kappa is None where chance alone would make them agree."""

    raters: tuple[str, str]
    items: int
    agreement: float
    kappa: float | None


def kappa(one: Sequence[str], two: Sequence[str]) -> float | None:
    """Cohen's kappa (p - c) / (1 - c): p the share of equal verdicts, c the share that chance would make equal.

    None if c is 1: both gave one and the same verdict throughout. ValueError for none, or unequally many.
    """
    if len(one) != len(two) or not len(one):
        raise ValueError(f"{len(one)} and {len(two)} verdicts; give both raters' on the same items, at least one")
    words = {*one, *two}
    chance = sum(one.count(word) * two.count(word) for word in words) / len(one) ** 2
    same = sum(a == b for a, b in zip(one, two, strict=True)) / len(one)
    return None if chance == 1 else (same - chance) / (1 - chance)


def standing(answers: Iterable[Mapping], concepts: Mapping[int, str]) -> dict[str, dict[str, str]]:
    """Each rater's verdicts by latent, out of rows {rater, latent, concept, verdict}: those on today's explanations."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in answers:
        if concepts.get(int(row["latent"])) == row["concept"]:
            found[row["rater"]][str(row["latent"])] = row["verdict"]
    return dict(found)


def agreements(ratings: Mapping[str, Mapping[str, str]]) -> list[Agreement]:
    """For each two raters that have items in common: how often they agree. ratings: rater to item to verdict."""
    found = []
    for pair in combinations(sorted(ratings), 2):
        both = sorted(ratings[pair[0]].keys() & ratings[pair[1]].keys())
        if both:
            one, two = ([ratings[rater][item] for item in both] for rater in pair)
            same = sum(a == b for a, b in zip(one, two, strict=True)) / len(both)
            found.append(Agreement(pair, len(both), same, kappa(one, two)))
    return found
