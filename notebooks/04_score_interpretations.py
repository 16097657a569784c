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
# **The question** (section 3.2, Tables 1 and 2). Notebook 03 gave latents a
# name. Does the region that the name points to match the region that excites
# the latent? And would a judge agree with the name?
#
# **You will learn** what intersection over union (IoU) and the CLIP score
# measure here. You will compare both with three kinds of chance. And you will
# see how much of a score comes from the way in which it is computed.
#
# **Reads** the stages `train`, `cache` and `interpret`. **Writes** the stage
# `score` (Table 1) and the stage `judge` (Table 2).
#
# | preset | segmenters | similarity | judge | time |
# |---|---|---|---|---|
# | `tiny` | ground truth, small CLIPSeg | small CLIP | ground truth | 3 minutes, 2 cores |
# | `small` | GroundingDINO-tiny + SAM-base | CLIP ViT-B/32 | none | an hour, one GPU |
# | `paper` | GroundingDINO-base + SAM-huge | CLIP ViT-B/32 | none | a day, one GPU |

# %% tags=["parameters"]
# results go to data/artifacts/<run>/
run: str = "tiny"
# the model under study: a folder of this project, or a name on the hub
model: str = "data/models/tiny-llava-next"
layer: int = 1  # counted from 0; the layer that the SAE was trained on
# the images that were cached
images: str = "data/artifacts/tiny/world/cache"
# names of the ground truth's concepts; "" if there is no ground truth
concepts: str = "data/artifacts/tiny/world/concepts.json"
# finds a concept by its name, beside the ground truth; "" for none
segmenter: str = "data/models/tiny-clipseg"
# a model that finds boxes (not the detectors of page 03), if the
# segmenter is a SAM, which needs boxes: Grounding DINO or OWLv2
detector: str = ""
# compares images with texts (CLIP); "" for no CLIP score
similarity: str = "data/models/tiny-clip"
n_scored: int = 5000  # explained latents, at random if there are more
n_top: int = 5  # exemplars of each latent, and images in a random run
# strict mode: a patch is active above this fraction of its image's
# highest activation
threshold: float = 0.25
random_runs: int = 10  # draws of random images for the IoU
clip_runs: int = 30  # draws of random images for the CLIP score
# judges explanations: a folder, a name on the hub, or
# name@http://host:port/v1; "" for the ground truth
judge: str = ""
n_judged: int = 100  # latents of each kind that are judged
# for a judge behind an endpoint
endpoint: dict = {
    "key_variable": "",  # environment variable with the key; "" for none
    "concurrency": 8,  # questions asked at the same time
    "timeout": 120.0,  # seconds that an answer may take
}
seed: int = 0  # of everything random, and of the bootstrap
# the same page for other SAEs, which differ in their seed; "": none
seeds_study: str = "book/seeds.json"

# %% tags=["remove-cell"]
from datasets import load_from_disk
from IPython.display import display

from lmm_sae_nb import LatentCache, SAEInPlace, open_images
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent
from lmm_sae_nb.score.examples import median_overlaps, overlaps
from lmm_sae_nb.score.judges import (
    Judgement,
    consistency,
    judge_latents,
    judge_metrics,
    open_judge,
    table_2,
)
from lmm_sae_nb.score.latents import (
    explained_latents,
    sample_by_kind,
    score_latents,
)
from lmm_sae_nb.score.masks import both_modes
from lmm_sae_nb.score.ratings import (
    compare_raters,
    read_ratings,
    verdicts_by_rater,
)
from lmm_sae_nb.score.scores import Column, Scores
from lmm_sae_nb.score.segmenters import open_segmenters
from lmm_sae_nb.score.similarity import open_similarity
from lmm_sae_nb.score.tables import (
    explanation_metrics,
    kind_counts,
    kind_tables,
    means_by_truth,
    score_metrics,
    series_by_kind,
    table_1,
    values_by_kind,
)
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.rater import Rater
from lmm_sae_nb.show.report import (
    across_saes,
    findings,
    headline,
    metrics_table,
    over_saes,
    percent,
    provenance,
    published_numbers,
)
from lmm_sae_nb.show.seed_study import read_study
from lmm_sae_nb.support.images import Remembered
from lmm_sae_nb.support.stages import Page
from lmm_sae_nb.truth.accuracy import other_names
from lmm_sae_nb.truth.label_maps import LabelMaps

page = Page(globals())
plots.style()

# %% [markdown]
# ## The latents that are scored
#
# Only explained latents are scored. We look at each latent through its
# exemplars: the images that excite it most.

# %%
explanations = page.read("interpret", "explanations", dict[int, dict])
pictures = Remembered(open_images(page.locate(images)))
truth = None
if concepts:
    truth = LabelMaps(
        load_from_disk(page.locate(images)), page.locate(concepts)
    )
explained = explained_latents(
    explanations, truth, most=n_scored, seed=seed
)
cache = LatentCache.load(page.file("cache"))
exemplars = ExemplarsByLatent(
    cache, pictures, explained, n_top=n_top, threshold=threshold
)
print(f"{len(explained)} of {len(explanations)} latents are scored")

# %% [markdown]
# The kinds of concept are those of Table 1. Picture World also has faces and
# words. We compare the latents that the explainer named as a kind with those
# whose true concept is of this kind. Both small: the SAE has few such latents.
# Only the first small: the explainer misses them.

# %%
plots.table(kind_counts(explained, explanations))

# %% [markdown]
# ## Two modes
#
# > "The IoU score between the segmentation mask and our activation mask is
# > then calculated, serving as the reference score for the feature's
# > relevance."
#
# We compute every score in two modes.
#
# | mode | active patches | patches to pixels | concept | CLIP sees |
# |---|---|---|---|---|
# | `paper` | every patch with an activation above 0 | bilinear | all masks found | the whole image |
# | `strict` | above `threshold` of the maximum | nearest neighbour (blocks) | a model's most confident mask; with the ground truth, the label map | the active patches |
#
# `paper` does what the reference code does. A *segmenter* says where a concept
# is. The ground truth is the first, if there is one. Then comes a model that
# only gets the concept's name.

# %%
modes = both_modes(threshold)
segmenters = open_segmenters(
    truth, page.locate(segmenter), page.locate(detector), pictures
)
ranked = sorted(
    explained, key=lambda n: explanations[n].get("true_iou") or 0
)
latent = ranked[len(ranked) // 2]  # one with a middling fit
concept = explained[latent].concept
example = overlaps(exemplars[latent][0], concept, segmenters, modes)
print(f"latent {latent}: {concept}")

# %% mystnb={"figure": {"caption": "A worked example (Figure 3): what is active (blue), the concept (yellow), and both (green), in each mode and by each segmenter. Yellow is visible only where the concept is not active. Bilinear growth makes the active area larger in the paper's mode, so its IoU is lower.", "name": "fig-worked"}, "image": {"alt": "One image as a heat map of its activation, then with the masks of the latent and of the concept."}}
plots.overlaps(example, exemplar=exemplars[latent][0]);
# %% [markdown]
# The IoU is the number of green pixels, divided by the number of all coloured
# pixels:

# %%
for one in example:
    both = (one.active & one.concept).sum()
    either = (one.active | one.concept).sum()
    assert one.iou == both / max(1, either)

# %% [markdown]
# ## Every explained latent, and chance
#
# > "For the random result, we randomly sampled 5 images from the cache dataset
# > and run 10 times for IOU and 30 times for the CLIP-Score. We then reported
# > the average result of each run along with the 99% confidence interval."
#
# A score means something only beside chance. We use three kinds.
#
# - *Random images*, as in the paper: the same latent and name on other images.
#   Most latents are silent there, which scores 0. So this chance is weak.
# - *Moved*: the latent's own images, with the activation at a random other
#   place, exactly as large.
# - *Other name*: the latent's own images, with the name of another latent, of
#   the same kind if possible.

# %%
stage = page.stage(
    "score",
    after=("train", "cache", "interpret"),
    without=("judge", "n_judged", "endpoint", "seeds_study"),
)

# %%
how = dict(
    threshold=threshold, n_top=n_top, random_runs=random_runs,
    clip_runs=clip_runs, skipped=list(cache.skipped), seed=seed,
)  # fmt: skip
scores = stage.result(
    "comparisons", Scores,
    lambda: score_latents(
        SAEInPlace.load(page.locate(model), page.file("train"), layer),
        pictures, exemplars, explained, segmenters,
        open_similarity(page.locate(similarity)), **how,
    ),
)  # fmt: skip
# flat rows, one for each latent, for the feature browser
stage.result("scores", dict[int, dict], scores.rows)
tables = kind_tables(scores, seed)
metrics = stage.finish(
    score_metrics(scores, tables)
    | explanation_metrics(explanations, truth)
)

# %% [markdown]
# ## Table 1
#
# The scores by kind of concept, beside chance and the paper's Table 1
# {cite}`zhang2024large`. The paper used photographs, a model of 8 billion
# parameters, Grounding DINO and SAM. The first table takes the ground truth as
# segmenter, if there is one.
#
# Intervals have a level of 99 %. They are over latents, but for random images
# over runs, as in the paper. An interval over runs says how much the draw of
# images matters. It cannot be compared directly with one over latents.

# %%
paper = published_numbers("score")
for caption, rows in table_1(tables, paper).items():
    display(plots.table(rows, caption))

# %% mystnb={"figure": {"caption": "IoU by kind of concept in both modes: own images and three kinds of chance. Intervals (99 %) are over latents, for random images over runs.", "name": "fig-iou-by-kind"}, "image": {"alt": "Two panels with a row for each kind of concept and the total. Each row has a point for the own images and one for each kind of chance."}}
iou = {mode.name: tables[Column("iou", mode.name)] for mode in modes}
plots.mean_panels({
    f"IoU, mode {name}": series_by_kind(table)
    for name, table in iou.items()
});
# %% mystnb={"figure": {"caption": "A gallery (Figure 4): for each kind the latent of median strict IoU, on its first image. Active in blue, the concept in yellow, both in green. The number is the mean IoU over all images of the latent.", "name": "fig-gallery"}, "image": {"alt": "An image for each kind of concept with the masks of the latent and of the concept."}}
reference = next(iter(segmenters))
plots.overlaps(
    median_overlaps(scores, exemplars, segmenters[reference], modes[1])
);
# %% [markdown]
# ## How far can we trust a segmenter?
#
# With photographs only a segmenter says where a concept is. Where the truth is
# known, we can compare the two, latent by latent.

# %% mystnb={"figure": {"caption": "Strict IoU of each latent by the segmenter, over the same by the ground truth. On the line they agree.", "name": "fig-calibration"}, "image": {"alt": "A cloud of points, one for each latent, around the diagonal."}}
known = values_by_kind(scores, Column("iou", "strict"))
for column in scores.columns:
    if column.segmenter and column.mode == "strict":
        plots.calibration(
            known, values_by_kind(scores, column),
            f"IoU by {reference}", f"IoU by {column.segmenter}",
        )  # fmt: skip
# %% [markdown]
# A name is right if it is the true concept of notebook 03. If the segmenter
# gives wrong names a higher IoU than the label maps do, it marks things that
# only look like the concept. [Appendix A1](A1_picture_world) has the
# segmenter's exam.

# %%
if truth:
    display(plots.table(means_by_truth(scores, explanations, reference)))

# %% [markdown]
# ## Table 2: would a judge agree?
#
# > "we employ GPT-4 as a judge and conduct a human study"
#
# We report the fraction of explanations that a judge accepts, with Wilson's
# 99 % interval. As a control, the same judge also sees names of other latents.
# A judge that accepts these too tells us nothing.
#
# In the preset `tiny` the ground truth is the judge. It says yes if three of
# five images show the concept in half of the visible patches. So it repeats
# `concept_common` of notebook 03; the new part is the control. Answers of a
# model are saved one by one, so no answer is lost if the judge fails.

# %%
judgements = {}
if judge or truth:
    judging = page.stage(
        "judge", after=("cache", "interpret"),
        without=("endpoint", "seeds_study"),
    )  # fmt: skip
    replies = judging.path("replies.jsonl")
    judgements = judging.result(
        "verdicts", dict[int, Judgement],
        lambda: judge_latents(
            open_judge(judge, truth, endpoint, replies=replies), exemplars,
            explained, other_names(explained, seed), each=n_judged,
            seed=seed,
        ),
    )  # fmt: skip
    judged = judging.finish(judge_metrics(judgements, explained))

# %%
judge_name = judge or "ground truth"
paper = published_numbers("judge")
plots.table(table_2(judgements, explained, judge_name, paper))

# %% [markdown]
# And what do people say? Open this chapter in Jupyter (`make lab`), type your
# name, and answer with y (yes), n (no) or u (unsure). There are ten latents of
# each kind. Each answer is saved at once.

# %%
ratings = stage.folder.parent / "ratings.jsonl"
asked = sample_by_kind(explained, 10, seed)
Rater(ratings, {n: explained[n]._asdict() for n in asked}, exemplars).box

# %% [markdown]
# Each rater's fraction of yes:

# %%
concept_of = {latent: row.concept for latent, row in explained.items()}
verdicts = verdicts_by_rater(read_ratings(ratings), concept_of)
plots.table([
    {"rater": rater} | consistency(answers, explained)
    for rater, answers in verdicts.items()
] or [{"rater": "nobody yet"}])  # fmt: skip

# %% [markdown]
# How often two raters agree on the latents that both have rated. Cohen's kappa
# is 0 if they agree as often as chance would make them, and 1 if they always
# agree:

# %%
plots.table([
    pair._asdict() | {"raters": " and ".join(pair.raters)}
    for pair in compare_raters(verdicts)
] or [{"raters": "no two yet"}])  # fmt: skip

# %% [markdown]
# ## Other SAEs
#
# The intervals above say how much the choice of latents or images matters.
# They do not say how much the choice of the SAE matters. So this page ran for
# several SAEs that differ only in the seed of notebook 01
# (`python -m lmm_sae_nb.benchmarks seeds`).

# %% mystnb={"figure": {"caption": "The same page for several SAEs that differ only in their seed (grey), with their median (black), and this page's SAE (blue).", "name": "fig-score-seeds"}, "image": {"alt": "A row for each metric with a dot for each SAE."}}
study = read_study(page.locate(seeds_study))
of_all = {
    "iou_paper": "IoU, the paper's mode",
    "iou_paper_random": "the same on random images",
    "iou_strict": "IoU, strict",
    "iou_strict_area": "the same with the activation moved",
    "iou_strict_shuffled": "the same with another name",
}
plots.other_saes(study, stage, of_all, "IoU");
# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
means = tables[Column("iou", "strict")]
total = means["total"]
beaten = [
    kind
    for kind, row in means.items()
    if kind != "total" and row.area and row.score.low > row.area.high
]
sentences = [
    f"With {reference} as segmenter, the strict IoU of explained latents is "
    f"{total.score}. With the activation moved it is {total.area}, with "
    f"another name {total.shuffled}, on random images {total.random}.",
    "Random images are a weak opponent, because most latents are silent "
    "there. The more latents an SAE has, the weaker it is.",
    "Beyond its interval, the IoU exceeds that of the moved activation "
    f"in {len(beaten)} of {len(means) - 1} kinds"
    + (f": {', '.join(beaten)}." if beaten else "."),
]
sentences += [
    f"By {column.segmenter}, the strict IoU is {metrics[str(column)]:.2f} "
    f"instead of {metrics['iou_strict']:.2f}. The correlation of the two "
    f"over latents is {metrics[f'{column}_correlation']:.2f}."
    for column in scores.columns
    if f"{column}_correlation" in metrics and column.mode == "strict"
]
if "clip_paper_kinds" in metrics:
    sentences.append(
        "The CLIP score is higher than for random images in "
        f"{metrics['clip_paper_kinds_above_random']} of "
        f"{metrics['clip_paper_kinds']} kinds."
    )
if judgements and "judged" in judged:
    own = percent(judged["judged"], 1)
    other = percent(judged.get("judged_shuffled", 0), 1)
    sentences.append(
        f"The judge ({judge_name}) accepts {own} of the names, and {other} "
        "of other latents' names."
    )
findings(*sentences, *across_saes(study, stage, of_all, "{:.3f}".format))

# %% [markdown]
# **Limits.** The numbers hold for explained latents only. A scene fills the
# image, so its moved activation also lies on the scene; that chance is hard to
# beat. The small CLIPSeg and CLIP know the world that they score. The
# [results page](../results) gathers the numbers of every page. Notebook 05
# asks whether other layers and models give the same result.

# %% tags=["remove-input", "hide-output"]
metrics_table(stage)

# %% tags=["remove-input", "hide-output"]
metrics_table(judging) if judgements else None

# %% tags=["result", "remove-input"]
clip_score = ""
if "clip_paper_random" in metrics:
    clip_score = (
        f", and the CLIP score is {metrics['clip_paper']:.1f} instead of "
        f"{metrics['clip_paper_random']:.1f}"
    )
paper = published_numbers("score")
of_saes = over_saes(study, stage, "iou_paper", "{:.2f}".format)
of_saes = of_saes and f" The IoU, {of_saes}."
headline(
    page,
    f"on images that excite a latent, the IoU with its concept is "
    f"{metrics['iou_paper']:.2f} in the paper's mode, instead of "
    f"{metrics['iou_paper_random']:.3f} on random images{clip_score} "
    f"({metrics['latents_scored']} latents).{of_saes}",
    f"an IoU of {paper['iou_paper']:.2f} instead of "
    f"{paper['iou_paper_random']:.3f}, and a CLIP score of "
    f"{paper['clip_paper']:.1f} instead of "
    f"{paper['clip_paper_random']:.1f} (Table 1).",
    "drawings have few, clearly bounded concepts. A larger SAE has more "
    "latents that are silent on random images.",
)

# %% tags=["remove-input"]
provenance(page, stage, *([judging] if judgements else []))
