# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Score the explanations
#
# **The question.** Section 3.2, Tables 1 and 2: does the region that a concept's name points to match the region that
# excites the latent, and would a judge agree with the name?
#
# **You will learn** what intersection over union (IoU) and the CLIP score measure here, how they compare with three kinds
# of chance, and how much of a score comes from the way in which it is taken.
#
# **Reads** `interpret/`, `cache/`, the SAE. **Writes** `score/`, `judge/`.
#
# | preset | segmenters | image-text similarity | judge | time |
# |---|---|---|---|---|
# | `tiny` | ground truth, and the embedded CLIPSeg | the embedded CLIP | ground truth | 3 minutes, 2 cores |
# | `small` | GroundingDINO-tiny + SAM-base | CLIP ViT-B/32 | none | an hour, one GPU |
# | `paper` | GroundingDINO-base + SAM-huge | CLIP ViT-B/32 | none | a day, one GPU |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # a folder of this project, or a name on the hub
images: str = "data/artifacts/tiny/world/cache"  # the images that were cached
concepts: str = "data/artifacts/tiny/world/concepts.json"  # names of the ground truth's concepts; "": there is none
layer: int = 1  # 0-based, the layer that the SAE was trained on
segmenter: str = "data/models/tiny-clipseg"  # finds a concept by its name, beside the ground truth; "": none
detector: str = ""  # a Grounding DINO, or an OWLv2, finds boxes for a SAM; "": the segmenter reads names itself
similarity: str = "data/models/tiny-clip"  # image-text similarity; "": no CLIP score
n_scored: int = 5000  # explained latents, at random if there are more
n_top: int = 5  # exemplars of each latent
threshold: float = 0.25  # strict mode: a patch is active above this share of its image's highest activation
random_runs: int = 10  # draws of n_top random images, IoU
clip_runs: int = 30  # the same, CLIP score
judge: str = ""  # who says whether explanations fit: a folder, a hub name or name@http://host/v1; "": the ground truth
judge_key: str = ""  # the environment variable with the endpoint's key; "": it wants none
concurrency: int = 8  # questions under way at once, to an endpoint
timeout: float = 120.0  # seconds that an endpoint's answer may take
n_judged: int = 100  # latents of each kind that are judged
seed: int = 0  # of everything random, and of the bootstrap

# %% tags=["remove-cell"]
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from IPython.display import display

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.chat.recorded import Recorded, open_chat
from lmm_sae_nb.interpret import explainers
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score import (
    clip,
    masks,
    segmenters,
)
from lmm_sae_nb.score import (
    iou as score_iou,
)
from lmm_sae_nb.score import judges as score_judges
from lmm_sae_nb.score import (
    ratings as score_ratings,
)
from lmm_sae_nb.score import similarity as score_similarity
from lmm_sae_nb.score import (
    tables as score_tables,
)
from lmm_sae_nb.score.masks import PAPER, STRICT, activation_mask, concept_mask, exemplar_maps, iou, ious
from lmm_sae_nb.score.ratings import read_ratings
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.rater import Rater
from lmm_sae_nb.support.files import project_root, read_json, write_json
from lmm_sae_nb.support.images import Remembered, open_images
from lmm_sae_nb.support.stages import Stage, require
from lmm_sae_nb.truth.label_maps import TrueMasks

root = project_root()
device = "cuda" if torch.cuda.is_available() else "cpu"
plots.style()


def named(path: str) -> str | Path:
    return root / path if (root / path).is_dir() else path


# %%
cache = LatentCache.load(require(run, "cache", "manifest.json", "02_cache_activations.py").parent)
explanations = read_json(require(run, "interpret", "explanations.json", "03_interpret_features.py"))
pictures = Remembered(open_images(root / images))
truth = TrueMasks(load_from_disk(root / images), root / concepts) if concepts else None
explained = score_tables.explained(explanations, truth, most=n_scored, seed=seed)
concept_of = {latent: concept for latent, (concept, _) in explained.items()}
kind_of = {str(latent): kind for latent, (_, kind) in explained.items()}
modes = {"paper": PAPER, "strict": replace(STRICT, threshold=threshold)}
print(f"{len(explanations)} latents asked about, {len(explained)} of them explained and scored")
if truth:
    unknown = sum(not truth.kinds_of(row["concept"]) for row in explanations.values() if row["concept"])
    print(f"{unknown} more have a name that the ground truth does not know: there is nothing to score it with")


shown = ExemplarsByLatent(cache, pictures, n_top=n_top, threshold=threshold)


# %% [markdown]
# Who says where a concept is: the ground truth, where there is one, and a segmenter that is given its name.

# %%
where = {"truth": truth} if truth else {}
if segmenter:
    parts = [named(part) for part in (detector, segmenter) if part]
    kind_of_segmenter = segmenters.BoxSegmenter if detector else segmenters.PromptedSegmenter
    found = kind_of_segmenter.load(*parts, device=device)
    where[Path(segmenter).name.removeprefix("tiny-")] = segmenters.SegmentedImages(found, pictures)
if not where:
    raise ValueError("neither `concepts` nor `segmenter` is given: there is nothing to score with; give one of them")

# %% [markdown]
# How many latents each kind of concept has. Kinds are those of Table 1, and what Picture World has besides: faces and words.
# Where fewer than 20 are scored although the truth is known, the last column tells why: so few of the latents asked about show
# such a concept at all (most of their images do, in half of what is visible).

# %%
shows = Counter(row["true_kind"] for row in explanations.values() if row.get("true_kind"))
plots.table([
    {"kind": kind, "scored": len(latents)} | ({"asked that show one": shows[kind] if kind != "total" else shows.total()} if truth else {})
    for kind, latents in score_tables.by_kind(kind_of).items()
])

# %% [markdown]
# ## Two ways to score
#
# > "The IoU score between the segmentation mask and our activation mask is then calculated, serving as the reference score
# > for the feature's relevance."
#
# The `paper` mode does what the reference code does: every patch that is not silent counts, patches are enlarged with
# bilinear interpolation, all that a segmenter finds counts together, and CLIP sees the whole image. The `strict` mode
# takes patches above a stated share of the image's highest activation, as they are, the likeliest mask, and shows CLIP
# the highlighted region alone. One case by hand:

# %% mystnb={"figure": {"caption": "A worked example (Figure 3), a latent that fits middlingly: its top image; then, by mode and by who says where the concept is, what is activated (blue), the concept (yellow), and both (green).", "name": "fig-worked"}}
latent = sorted(concept_of, key=lambda n: explanations[str(n)].get("true_iou") or 0)[len(concept_of) // 2]
case, concept = shown[latent][0], concept_of[latent]
spot, ways = exemplar_maps([case])[0], [(by, find, mode) for by, find in where.items() for mode in modes.values()]
first, *rest = plots.picture_axes(1 + len(ways))
plots.heat_map(case.image, case.activation, ax=first).set_title(plots.wrapped(f"latent {latent}: {concept}", 1.7))
for ax, (by, find, mode) in zip(rest, ways, strict=True):
    active, wanted = activation_mask(spot, mode), concept_mask(find([spot.number], concept)[0], spot.size, mode)
    fit = ious([spot], concept, find, mode)[0]
    assert fit == iou(active, wanted) == (active & wanted).sum() / max(1, (active | wanted).sum())
    plots.overlap(case.image, active, wanted, f"{mode.name}, {by}: {fit:.2f}", ax=ax)

# %% [markdown]
# ## Every explained latent, and chance
#
# > "For the random result, we randomly sampled 5 images from the cache dataset and run 10 times for IOU and 30 times for the
# > CLIP-Score. We then reported the average result of each run along with the 99% confidence interval."
#
# The paper's chance: the same latent and name on random images. There most latents are silent, which scores 0, so it is
# easily beaten. Two that are not: the activation moved elsewhere in the latent's own images, exactly as large (*area*), and
# the name of another latent, of the same kind if there is one (*shuffled*).

# %%
stage, code = Stage(run, "score"), [score_tables, masks, segmenters]
params = dict(
    model=model, images=images, concepts=concepts, layer=layer, segmenter=segmenter, detector=detector, similarity=similarity,
    n_scored=n_scored, n_top=n_top, threshold=threshold, random_runs=random_runs, clip_runs=clip_runs, seed=seed,
)  # fmt: skip
inputs = [root / name for name in (model, concepts, segmenter, detector, similarity) if name and (root / name).exists()]
before = [Stage(run, name).path("manifest.json") for name in ("train", "cache", "interpret")]
inputs += before
others = score_tables.shuffled(explained, seed)
if not stage.is_current(params, inputs, code):
    started, rng = time.monotonic(), np.random.default_rng(seed)
    lmm = LMM.load(named(model))
    sae = TopKSAE.load(require(run, "train", "sae.safetensors", "01_train_sae.py").parent)
    readable = np.setdiff1d(np.arange(len(pictures)), list(cache.skipped))
    drawn = rng.choice(readable, random_runs * n_top).tolist()
    drawn_spots = score_iou.drawn_spots(SAEInPlace(lmm, sae, layer), pictures, list(concept_of), drawn)
    found = score_iou.all_ious(
        lambda n: (exemplar_maps(shown[n]), drawn_spots[n]), concept_of, others, where, list(modes.values()), runs=random_runs, seed=seed
    )
    if similarity:
        similar = score_similarity.ImageTextSimilarity.load(named(similarity), device=device).grid
        drawn_pictures = [pictures[i] for i in rng.choice(readable, clip_runs * n_top).tolist()]
        found |= clip.all_clips(similar, shown, concept_of, others, drawn_pictures, list(modes.values()), runs=clip_runs, seed=seed)
    scores, runs = score_tables.records(explained, found)
    write_json(stage.path("scores.json"), scores)
    write_json(stage.path("random.json"), runs)
    metrics = score_tables.summary(scores, runs, seed) | ({"names_unknown": unknown} if truth else {})
    metrics |= {f"latents_showing_{kind}": many for kind, many in sorted(shows.items())}
    stage.finish(params, inputs, metrics, time.monotonic() - started, code)
scores, runs = read_json(stage.path("scores.json")), read_json(stage.path("random.json"))
metrics, columns = read_json(stage.path("metrics.json")), score_tables.columns_of(scores)
tables = {column: score_tables.table(scores, runs, column, seed) for column in columns}

# %% [markdown]
# ## Table 1
#
# IoU and CLIP score of every kind, on the latents' own images (*top*) and beside chance, in both modes; and what the paper
# has in its Table 1 {cite}`zhang2024large` (*published*, and its chance *at random*), for photographs, an 8B model, Grounding
# DINO and SAM. Intervals are 99 %: over latents, and over runs for *random*, as the paper's.

# %%
published = {
    "iou": {  # random images, the latents' own
        "scene": (0.007, 0.20), "object": (0.005, 0.19), "part": (0.007, 0.21), "material": (0.010, 0.39),
        "texture": (0.007, 0.21), "colour": (0.005, 0.10), "total": (0.005, 0.20),
    },
    "clip": {
        "scene": (18.1, 24.4), "object": (18.2, 24.0), "part": (18.1, 23.5), "material": (18.1, 24.1),
        "texture": (18.4, 20.9), "colour": (19.6, 20.3), "total": (18.2, 23.6),
    },
}  # fmt: skip
for quantity, by_mode in score_tables.by_quantity(tables).items():
    beside = published.get(quantity.split("_")[0])
    display(plots.table(score_tables.beside(by_mode, beside), f"{quantity}, {len(scores)} latents, 99 % intervals"))
# %% [markdown]
# `iou` is by the first of the segmenters above, `iou_NAME` by another; in the metrics the mode stands between the two.

# %% mystnb={"figure": {"caption": "IoU of explained latents by the kind of their concept, with 99 % intervals, in both modes: on their own images, and three kinds of chance.", "name": "fig-iou-by-kind"}}
series = ("top", "area", "shuffled", "random")
plots.mean_panels({
    f"IoU, {mode}": {kind: {name: row[name] for name in series if name in row} for kind, row in tables[f"iou_{mode}"].items()}
    for mode in modes
});
# %% mystnb={"figure": {"caption": "A gallery (Figure 4): of each kind the latent of median strict IoU, on its top image: activated (blue), the concept (yellow), both (green). The number is the mean over its images.", "name": "fig-gallery"}}
middle, find = score_tables.middling(scores, "iou_strict"), next(iter(where.values()))
for ax, (kind, n) in zip(plots.picture_axes(len(middle), lines=3), middle.items(), strict=True):
    [top] = exemplar_maps(shown[n][:1])
    active, wanted = activation_mask(top, modes["strict"]), concept_mask(find([top.number], concept_of[n])[0], top.size, modes["strict"])
    plots.overlap(pictures[top.number], active, wanted, f"{kind}: {concept_of[n]}, IoU {scores[str(n)]['iou_strict']:.2f}", ax=ax)

# %% [markdown]
# ## What a segmenter's number is worth
#
# Where the truth is known, a score by a segmenter can be held against the same score by the truth, latent by latent.

# %% mystnb={"figure": {"caption": "Strict IoU of each latent by the segmenter, over the same by the ground truth; on the line they agree.", "name": "fig-calibration"}}
by_kind = {kind: latents for kind, latents in score_tables.by_kind(kind_of).items() if kind != "total"}
for second in (column for column in columns if column.startswith("iou_strict_")):
    known, measured = ({kind: [scores[n][c] for n in latents] for kind, latents in by_kind.items()} for c in ("iou_strict", second))
    plots.calibration(known, measured, "IoU by ground truth", f"IoU by {second.removeprefix('iou_strict_')}")
# %%
for column in (column for column in columns if f"{column}_correlation" in metrics):
    first = "_".join(column.split("_")[:2])
    print(f"{column}: {metrics[column]:.3f} where {first} is {metrics[first]:.3f}; correlation over latents {metrics[column + '_correlation']:.2f}")
for by, right in (("right", True), ("wrong", False)) if truth else ():
    chosen = [n for n in scores if (explanations[n]["concept"] == explanations[n]["true_concept"]) == right]
    told = {c: np.mean([scores[n][c] for n in chosen]).round(3).item() for c in columns if c.startswith("iou_") and chosen}
    print(f"{len(chosen)} names that are {by}:", told)
# %% [markdown]
# Where the truth is known, the last two lines part the names that are the very concept that the latent shows from those that
# are not. A segmenter that gives wrong names more than the truth does marks what looks like them; [the
# appendix](A1_picture_world) has the shipped one's exam.

# %% [markdown]
# ## Table 2: would a judge agree?
#
# The share of explanations that a judge finds right, of each kind, with Wilson's 99 % interval, and the share of *another
# latent's* name that the same judge accepts: who says yes to everything is no judge. In the preset `tiny` the ground truth itself judges: yes if most of
# the images (three of five) show the concept in half of the visible patches. The scores above are on the disk by now: a judge
# that cannot be reached loses none of them, and what it has answered is not asked again.

# %%
judging, who = Stage(run, "judge"), judge or ("ground truth" if truth else "")
how = dict(judge=judge, images=images, concepts=concepts, n_scored=n_scored, n_judged=n_judged, n_top=n_top, threshold=threshold, seed=seed)
known = before + [root / name for name in (judge, concepts) if name and (root / name).exists()]
if not who:
    judging.forget()
elif not judging.is_current(how, known, [score_tables, explainers]):
    started, chat = time.monotonic(), None
    if judge:  # every verdict is on the disk before the next one is waited for
        chat = open_chat(judge, key_variable=judge_key, concurrency=concurrency, timeout=timeout)
        chat = Recorded(chat, judging.path("replies.jsonl"))
    verdicts = score_judges.by_sight(score_judges.judge(chat)) if chat else score_judges.knowing(truth)
    found = score_judges.judge_latents(verdicts, shown, explained, others, each=n_judged, seed=seed)
    write_json(judging.path("verdicts.json"), found)
    told = score_judges.agreed(found, kind_of) | {"replies_failed": chat.failed if chat else 0}
    judging.finish(how, known, told, time.monotonic() - started, [score_tables, explainers])

# %%
kinds, judges = (*score_tables.KINDS, "total"), {}
if who:
    given = read_json(judging.path("verdicts.json"))
    for name, title in zip(score_judges.JUDGED, (who, "the same, names shuffled"), strict=True):
        judges[title] = score_judges.consistency({n: row.get(name) for n, row in given.items()}, kind_of)
judges["GPT-4o, the paper"] = dict(zip(kinds, (0.93, 0.84, 0.90, 1.00, 0.85, 0.92, 0.89), strict=True))
judges["two people, the paper"] = dict(zip(kinds, (0.70, 0.85, 0.60, 0.95, 0.80, 0.60, 0.75), strict=True))
plots.table([{"kind": kind} | {title: shares.get(kind) for title, shares in judges.items()} for kind in dict.fromkeys((*score_tables.KINDS, *score_tables.by_kind(kind_of)))])

# %% [markdown]
# And two people's? Open this chapter in Jupyter (`make lab`), type your name, and answer with y, n, u. Ten latents of each
# kind; every answer is on the disk, in the run's `ratings.jsonl`, before the next one is asked, and is counted below.

# %%
ratings = stage.folder.parent / "ratings.jsonl"
asked_of_people = {n: {"concept": concept_of[n], "kind": kind_of[str(n)]} for n in score_judges.some_of_each(kind_of, 10, seed)}
Rater(ratings, asked_of_people, shown).box

# %% [markdown]
# Each rater's share of yes, and how far each two agree on what both have rated, with Cohen's kappa:

# %%
answers = score_ratings.standing(read_ratings(ratings), concept_of)
print(f"{len(answers)} people have answered")
for rater, told in answers.items():
    print(rater, {kind: str(found) for kind, found in score_judges.consistency(told, kind_of).items()})
for pair in score_ratings.agreements(answers):
    print(f"{' and '.join(pair.raters)}: alike on {pair.agreement:.2f} of {pair.items}, kappa {pair.kappa}")

# %% [markdown]
# ## What we found
#
# The numbers are above and on the [results page](../results). They hold for explained latents only. Random images are a weak
# opponent, since most latents are silent on most images, the more so the more latents there are: how many times better a
# score is than this chance says as much about the size of the SAE as about its explanations. The moved mask and the shuffled
# name are the fair opponents; scenes, which fill the image, hardly beat the first.

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(
    f"run {run} · {model} · layer {layer} · masks: {', '.join(where)} · CLIP score: {similarity or 'none'} · judge: {who or 'none'}"
    f" · seed {seed} · {manifest['seconds']:.0f} s · {manifest['versions']}"
)
