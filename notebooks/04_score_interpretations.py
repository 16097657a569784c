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
# see how much a score depends on the way in which it is computed.
#
# **Reads** the stages `train`, `cache` and `interpret`. **Writes** the stage
# `score` (Table 1) and the stage `judge` (Table 2).
#
# | preset | segmenters | similarity | judge | time |
# |---|---|---|---|---|
# | `tiny` | ground truth, small CLIPSeg | small CLIP | ground truth | 2 minutes, one core |
# | `small` | GroundingDINO-tiny + SAM-base | CLIP ViT-B/32 | none | never run |
# | `paper` | GroundingDINO-base + SAM-huge | CLIP ViT-B/32 | none | never run |

# %% tags=["parameters"]
# results go to data/artifacts/<run>/
run: str = "tiny"
# the model under study: a folder of this project, or a name on the hub
model: str = "data/models/tiny-llava-next"
# how the model under study is loaded
loading: dict = {
    "dtype": "float32",  # "bfloat16" halves the memory and rounds more
    "device": "",  # such as "cuda:1" or "cpu"; "": a GPU if there is one
    "device_map": "",  # "auto": over all GPUs, if one is too small
    "image_size": [],  # [width, height] that images get; []: their own
}
# counted from 0; the layer that the SAE was trained on.
# Or another hookpoint, such as "decoder.1.mlp" (see Your own LMM)
layer: "int or str" = 1
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
# strict mode: a patch is active above this fraction, from 0 to 1, of its
# image's highest activation
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
    # fields of a request to add, or with None to leave out, such as
    # {"chat_template_kwargs": {"enable_thinking": False}}
    "extra": {},
}
seed: int = 0  # of everything random, and of the bootstrap
# the same page for other SAEs, which differ in their seed; "": none. It is
# left out where notebook 01 has another recipe
seeds_study: str = "book/seeds.json"
# the same metrics of control SAEs (A4); "" or another recipe: none
panel: str = "book/panel.json"

# %% tags=["remove-cell"]
from datasets import load_from_disk
from IPython.display import display

from lmm_sae_nb import LatentCache, SAEInPlace, open_images
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent
from lmm_sae_nb.interpret.explain import ExplanationRows
from lmm_sae_nb.score.examples import median_overlaps, overlaps
from lmm_sae_nb.score.judges import (
    Judgement,
    OpenJudge,
    consistency,
    judge_latents,
    judge_metrics,
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
from lmm_sae_nb.show.panel import read_panel
from lmm_sae_nb.show.rater import Rater
from lmm_sae_nb.show.report import (
    findings,
    headline,
    metrics_table,
    provenance,
    published_numbers,
)
from lmm_sae_nb.show.score_sentences import (
    modes_sentence,
    score_findings,
    score_result,
    scores_of_others,
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
explanations = page.read("interpret", "explanations", ExplanationRows)
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
# whose true concept is of this kind. If both numbers are small, the SAE has few
# such latents. If only the first is small, the explainer misses them.

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
# The mode `paper` does what the reference code does. Every preset has it: it is
# not the preset of the same name. A *segmenter* says where a concept is. The
# first segmenter is the ground truth, if there is one. The second is a model
# that gets only the concept's name.

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

# %% mystnb={"figure": {"caption": "A worked example (Figure 3): what is active (blue), the concept (yellow), and both (green), in each mode and by each segmenter. Yellow is visible only where the concept is not active. Bilinear growth makes the active area larger in the paper's mode. So the IoU of a small concept is lower there; that of a large concept, such as a scene, is higher.", "name": "fig-worked"}, "image": {"alt": "One image as a heat map of its activation, then with the masks of the latent and of the concept."}}
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
# A score means something only beside chance. We use three kinds. The words in
# brackets are the endings of metrics.
#
# - *Random images* (`_random`), as in the paper: the same latent and name on
#   other images. A latent that is silent there scores 0.
# - *Moved* (`_area`): the latent's own images, with the activation at a random
#   other place, exactly as large.
# - *Other name* (`_shuffled`): the latent's own images, with a different name,
#   that of another latent, of the same kind if possible. Page 03 uses the same.
#
# *Moved* is the hard one: it knows the image and the size of the region. For
# another name the IoU is low, because few images show two concepts of a kind at
# one place. All three ask about latents and names of one SAE. Control SAEs, which
# should fail, stand at the top of this page and in
# [A4](A4_controls_and_metrics).

# %%
stage = page.stage(
    "score",
    after=("train", "cache", "interpret"),
    without=("judge", "n_judged", "endpoint", "seeds_study", "panel"),
)

# %%
how = dict(
    threshold=threshold, n_top=n_top, random_runs=random_runs,
    clip_runs=clip_runs, skipped=list(cache.skipped), seed=seed,
)  # fmt: skip
scores = stage.result(
    "comparisons", Scores,
    lambda: score_latents(
        SAEInPlace.load(
            page.locate(model), page.file("train"), layer, **loading
        ),
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
# Intervals have a level of 99%. Most are bootstraps over latents. Those of
# random images are over runs, as in the paper, by Student's t; so an end may
# lie a little below 0. An interval over runs says how much the draw of images
# matters. It cannot be compared directly with one over latents. A kind with
# fewer than 20 latents has too narrow an interval, and we do not count it.
#
# Two cells of the CLIP score are always empty. In the mode `paper`, CLIP sees
# the whole image, so moving changes nothing. In the mode `strict`, random
# images have no region to show where the latent is silent.

# %%
paper = published_numbers("score")
for caption, rows in table_1(tables, paper).items():
    digits = 1 if caption.startswith("CLIP") else 3
    display(plots.table(rows, caption, digits))

# %% mystnb={"figure": {"caption": "IoU by kind of concept in both modes: own images and three kinds of chance. Intervals (99%) are over latents, for random images over runs.", "name": "fig-iou-by-kind"}, "image": {"alt": "Two panels with a row for each kind of concept and the total. Each row has a point for the own images and one for each kind of chance."}}
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
# %% tags=["remove-input"]
findings(modes_sentence(tables))

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
            f"strict IoU by {reference}",
            f"strict IoU by {column.segmenter}",
        )  # fmt: skip
# %% [markdown]
# A name is right if it is the true concept of notebook 03. A segmenter may mark
# things that only look like the concept. Then it gives wrong names a higher IoU
# than the label maps do. The last column compares this latent by latent. There it
# is above 0.
# [Appendix A1](A1_picture_world) has the segmenter's exam.

# %%
by_truth = []
if truth:
    by_truth = means_by_truth(scores, explanations, reference)
for mode in ("paper", "strict") if truth else ():
    display(plots.table([
        {words: value for words, value in row.items()
         if "," not in words or words.startswith(mode)}
        for row in by_truth
    ]))  # fmt: skip

# %% [markdown]
# ## Table 2: would a judge agree?
#
# > "we employ GPT-4 as a judge and conduct a human study"
#
# We report the fraction of explanations that a judge accepts, with Wilson's
# 99% interval. As a control, the same judge also sees names of other latents.
# A judge that accepts these too tells us nothing.
#
# In the preset `tiny` no person and no model judges, but the ground truth. It
# says yes if three of five images show the concept in half of the visible
# patches. So it repeats `concept_common` of notebook 03, and Table 2 is not
# reproduced. At most `n_judged` latents of each kind are judged, so the total
# is no mean over all latents. Answers of a
# model are saved one by one, so no answer is lost if the judge fails.

# %%
judgements, judged = {}, {}
if judge or truth:
    judging = page.stage(
        "judge", after=("cache", "interpret"),
        without=(
            "endpoint.key_variable", "endpoint.concurrency",
            "endpoint.timeout", "seeds_study", "panel",
        ),
    )  # fmt: skip
    record = judging.path("replies.jsonl")
    judge_by = OpenJudge(judge, truth, endpoint, replies=record)
    judgements = judging.result(
        "verdicts", dict[int, Judgement],
        lambda: judge_latents(
            judge_by, exemplars, explained, other_names(explained, seed),
            each=n_judged, seed=seed,
        ),
    )  # fmt: skip
    replies = judging.result(
        "reply_counts", dict[str, int], lambda: judge_by.counts
    )
    judged = judging.finish(replies | judge_metrics(judgements, explained))

# %%
judge_name = judge or "ground truth"
paper = published_numbers("judge")
plots.table(table_2(judgements, explained, judge_name, paper))

# %% [markdown]
# And what do people say? Open this page in Jupyter (`make lab`), type your
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
study = read_study(page.locate(seeds_study), page)
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
all_panel = read_panel(page.locate(panel), page)
findings(
    *score_findings(
        metrics, tables, by_truth, judged, reference=reference, judge=judge
    ),
    *scores_of_others(study, all_panel, of_all),
)

# %% [markdown]
# **Limits.** The numbers hold for explained latents only. Control SAEs reach them,
# so a high IoU or CLIP score says little about the SAE. The judge of `tiny` is the
# ground truth. A scene fills the image, so its moved activation also lies on the
# scene; that chance is hard to beat. The small CLIPSeg and CLIP know the world that they score. The
# [results page](../results) gathers the numbers of every page. Notebook 05
# asks whether other layers and models give the same result.

# %% tags=["remove-input", "hide-output"]
metrics_table(stage)

# %% tags=["remove-input", "hide-output"]
metrics_table(judging) if judgements else None

# %% tags=["result", "remove-input"]
headline(
    page,
    *score_result(metrics, study, all_panel),
)

# %% tags=["remove-input"]
provenance(page, stage, *([judging] if judgements else []))
