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
# # 6. Steer the model by its latents
#
# **The question** (sections 2.3, 4.1 and 4.2, Appendices D and H). A latent was
# named for what its images show. If we set this latent by hand, does the model
# say that name?
#
# **You will learn** how a latent is clamped, and how to choose the dose so that
# answers stay whole sentences. You will see which controls steering needs, and
# whether one latent serves both the picture and the word.
#
# **Reads** the stages `train`, `cache` and `interpret`; for *Try it* also
# `score` and `judge`, if they are there. **Writes** the stage `steer`.
#
# | preset | model | latents clamped | time |
# |---|---|---|---|
# | `tiny` | LLaVA-NeXT of Picture World | about 260 | 2 minutes, 2 cores |
# | `paper` | LLaVA-NeXT-LLaMA3-8B | about 300 | one GPU |

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
# the images that were cached
images: str = "data/artifacts/tiny/world/cache"
# counted from 0; the layer that the SAE was trained on.
# Or another hookpoint, such as "decoder.1.mlp" (see Your own LMM)
layer: "int or str" = 1
# feelings and stories
cases: dict = {
    # names of latents
    "concepts": [
        "happy", "sad", "angry", "hungry",
        "scared", "loving", "sick", "sleepy",
    ],
    # words for a concept that no latent has as its name: {"happy":
    # ["smile"]} also takes a latent named "a smile" or "happy people"
    "named_by": {},
    # those whose answers the page shows
    "displayed": ["happy", "sad", "hungry"],
    # about a white image
    "question": "How do you feel?",
    # without an image
    "story": "Tell me a story about Alice and Bob.",
    # ask the untouched model for a feeling: the ordinary answers
    "asked_feeling": "Imagine that you are {}. How do you feel?",
    "asked_story": "Tell me a {} story about Alice and Bob.",
    "kinds": ["base", "tiles", "newline"],  # clamped for a feeling
    "doses": [1, 2, 4, 8, 16],
    "story_doses": [0.1, 0.15, 0.2, 0.25, 0.3, 0.5],
    "max_new_tokens": 30,  # longest answer
}  # fmt: skip
# objects on a white image
objects: dict = {
    "question": "What do you see in this image?",
    "size": 192,  # pixels a side of the white image
    "kinds": ["tiles", "newline"],  # tokens that are clamped
    "doses": [4, 8, 16, 32],
    "count": 100,  # latents that are reported
    "choosing": 50,  # up to as many others choose the dose
    # other images, whose unsteered answers fluency is compared with
    "others": 100,
    "max_new_tokens": 24,
}
word_prompt: str = "is there a {} ?"  # in which a name is read
ranked_images: int = 200  # images whose latents are ranked
# rates relevance: a folder, a name on the hub, or name@http://host:port/v1
judge: str = ""
# names by kind: without a judge, relevance is rated by these words
concepts: str = "data/artifacts/tiny/world/concepts.json"
# for a judge that is an endpoint
endpoint: dict = {
    "key_variable": "",  # environment variable with its key
    "concurrency": 8,  # questions at the same time
    "timeout": 120.0,  # seconds that an answer may take
    # fields of a request to add, or with None to leave out, such as
    # {"chat_template_kwargs": {"enable_thinking": False}}
    "extra": {},
}
batch: int = 20  # clamps that run side by side
seed: int = 0  # of the choice of latents and images
# the same page for other SAEs, which differ in their seed; "": none. It is
# left out where notebook 01 has another recipe
seeds_study: str = "book/seeds.json"
# the same metrics of control SAEs (A4); "" or another recipe: none
panel: str = "book/panel.json"

# %% tags=["remove-cell"]
import numpy as np
import torch
from ipywidgets import VBox
from PIL import Image
from torch.testing import assert_close

from lmm_sae_nb import (
    Edit,
    LatentCache,
    SAEInPlace,
    Scope,
    exemplars,
    open_images,
)
from lmm_sae_nb.interpret.explain import ExplanationRows
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.feature_browser import FeatureBrowser
from lmm_sae_nb.show.latent_table import LatentTable
from lmm_sae_nb.show.panel import read_panel
from lmm_sae_nb.show.report import (
    findings,
    headline,
    metrics_table,
    provenance,
)
from lmm_sae_nb.show.seed_study import read_study
from lmm_sae_nb.show.steering_panel import SteeringPanel
from lmm_sae_nb.show.steering_sentences import (
    steering_findings,
    steering_of_others,
    steering_result,
)
from lmm_sae_nb.steer.experiments import (
    CaseStudy,
    RankedKinds,
    WordActivation,
    at_chosen_dose,
    case_metrics,
    case_studies,
    kinds_by_rank,
    latents_named,
    ranks_on_top_images,
    with_next_latents,
    word_activations,
    word_metrics,
)
from lmm_sae_nb.steer.objects import (
    FEW,
    ObjectSteering,
    clamp_values,
    steer_objects,
)
from lmm_sae_nb.steer.relevance import Relevance, rate_objects
from lmm_sae_nb.steer.steering import steer_latents
from lmm_sae_nb.support.images import Chosen
from lmm_sae_nb.support.stages import Metrics, Page

page = Page(globals())
plots.style()

# %%
place = SAEInPlace.load(
    page.locate(model), page.file("train"), layer, **loading
)
cache = LatentCache.load(page.file("cache"))
pictures = open_images(page.locate(images))
explanations = page.read("interpret", "explanations", ExplanationRows)
named = {n: row for n, row in explanations.items() if row["concept"]}
names = {n: row["concept"] for n, row in named.items()}
white = Image.new("RGB", (objects["size"],) * 2, "white")
stage = page.stage(
    "steer", after=("train", "cache", "interpret"),
    without=(
        "endpoint.key_variable", "endpoint.concurrency",
        "endpoint.timeout", "batch", "seeds_study", "panel",
    ),
)  # fmt: skip
print(f"{len(named)} named latents")

# %% [markdown]
# ## A clamp (equations 3 to 6)
#
# > "steering in SAEs entails setting the i-th hidden representation to a
# > predetermined value k. We define the steering operation
# > $\text{Steer}(\mathcal{C}, k, i)$ in SAEs as follows":
# > $z[\mathcal{C}, j] = k$ (4), $\hat{z} = \text{TopK}(z)$ (5). "Following the
# > steering operation, we input $\hat{\mathbf{x}}$ into the subsequent LLaVA
# > layer instead of $\mathbf{x}$."
#
# $\mathcal{C}$ is a set of tokens. $\text{Steer}(\mathcal{C}, k, i)$ sets
# latent $i$ to $k$ there: $z[\mathcal{C}, i] = k$ (the paper writes $j$ in this
# place). To *clamp* a latent is to set its activation so. The clamp comes before
# TopK, so the clamped latent must be among the highest to count. We write
# `value` for the paper's $k$, because our $k$ is TopK's count. The same in plain
# PyTorch:

# %%
sae = place.sae
prompt = place.lmm.prompt(objects["question"], white)
states = place.lmm.hidden_states(prompt, layer)[0]
x = states[prompt.mask("base")[0]].float()
# any latent and value will do for the check
edit = Edit(latent=min(named, default=0), value=5.0)

z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
z[:, edit.latent] = edit.value
kept = z.topk(sae.k)
expected = torch.zeros_like(z).scatter(1, kept.indices, kept.values)
if sae.threshold is not None:  # of another kind than TopK
    expected = torch.where(z > sae.threshold, z, 0)

ours = steer_latents(sae, x, [edit])
dense = torch.zeros_like(z).scatter(1, ours.indices, ours.acts)
assert_close(dense, expected)

# %% [markdown]
# We give a clamp as a *dose*: a multiple of the latent's highest activation on
# the cached images. A dose of 1 is the most that an image ever caused.
#
# `Scope` gives the set $\mathcal{C}$: kinds of tokens (such as `base` or
# `text`), and the phase in which they come, the prompt or the answer.
# Without parameters it has all kinds that the SAE was trained on, in both phases.

# %% [markdown]
# ## Happy, sad, hungry (section 4.1, Figures 5 and 6)
#
# We find the latents by their names. For each name, we take the latent that
# responds most to a single image. Notebook 03 gave these names, and it saw
# only pictures.

# %%
latents = latents_named(
    cache, names, cases["concepts"], cases["named_by"]
)  # fmt: skip
displayed = [name for name in cases["displayed"] if name in latents]
print(latents)
if len(latents) < 2:
    print("No case study: fewer than two of these names have a latent.")

# %% mystnb={"figure": {"caption": "The latents of the case studies, on the images that excite them most. Below: the patches above a quarter of the image's highest activation.", "name": "fig-cases"}, "image": {"alt": "Rows of example images for the latents named happy, sad and hungry, with their activation maps and visible patches."}}
strips = []
for name in displayed:
    found = exemplars(cache, pictures, latents[name])
    strips.append((f"latent {latents[name]}: {name}", found))
plots.exemplar_strip(strips);
# %% [markdown]
# > "When asked about its feelings without steering, the model responds that it
# > does not experience emotions. However … when we clamp the "happy" feature,
# > the model responds with expressions of happiness."
#
# We ask about a white image, which shows no feeling. We clamp the latent at all
# tokens of the image, and at no token of the text. A clamp in the answer makes
# the model repeat one word. Two answers stand above the clamped ones:
#
# - *untouched*: the model without the SAE;
# - *spliced*: the SAE takes the layer's place, and nothing is clamped. What the
#   SAE leaves unexplained is dropped, as in the paper. So this is a control.
#
# Marked are words that the untouched answer does not have in the same place.

# %%
feeling = dict(
    image=white, unsteered=cases["asked_feeling"], keep_error=False,
    doses=cases["doses"], scope=Scope(tuple(cases["kinds"])),
    max_new_tokens=cases["max_new_tokens"],
)  # fmt: skip
feelings = stage.result(
    "feelings", list[CaseStudy],
    lambda: case_studies(
        place, cache, latents, cases["question"], **feeling
    ),
)  # fmt: skip
plots.case_studies([c for c in feelings if c.concept in displayed])

# %% [markdown]
# ### Which dose leaves sentences whole?
#
# A high dose brings the name, but breaks the sentence. So we measure two
# things for each answer, as AxBench does for language models.
#
# - *Concept*: 1 if the answer names the feeling, otherwise 0.
# - *Fluency*, from 0 to 1: min(1, reference / perplexity), times the fraction
#   of 3-grams of words that are not repetitions. The *perplexity* is that of the
#   answer under the untouched model, after the same prompt.
#
# A steered answer says something that the model would not say here. So the
# reference must do that too. We ask the untouched model for each feeling ("Imagine
# that you are happy. How do you feel?"). We read its answers as if they were
# answers to our prompt. The reference is the median perplexity of those for the
# other feelings. The answer for the feeling itself is the control.
#
# We choose the dose by the mean *harmonic mean* of concept and fluency. A
# latent's dose is chosen on the other latents, so no latent chooses for itself:

# %%
plots.table(at_chosen_dose(feelings), cases["question"])

# %% [markdown]
# As a control we take the answers of the next feeling in the list, and still look
# for the word of the first feeling. Nothing is asked again. Here are those for the
# first feeling; the clamped latent is that of the next one:

# %%
plots.case_studies(with_next_latents(feelings)[:1])

# %% [markdown]
# > "To test this, we clamp this feature and prompt the model with "Tell me a
# > story about Alice and Bob"; the generated response revolves around themes of
# > greed as shown in Fig. 6."
#
# A story has no image. We clamp the latent at the tokens of the answer only. We
# keep what the SAE leaves unexplained (row A4 of the [departures](../departures)).
# Without it, stories broke at the lowest dose that we tried. The doses are low here.
# The ordinary answers are the stories that the untouched model tells when it is
# asked for one of each feeling. The control is again the next feeling's latent.
#
# A clamp brings in everything that a latent responds to, not only its name.
# Compare odd words in the answers with the images above.

# %%
story = dict(
    unsteered=cases["asked_story"], doses=cases["story_doses"],
    scope=Scope(phases=("generated",)),
    max_new_tokens=cases["max_new_tokens"],
)  # fmt: skip
stories = stage.result(
    "stories", list[CaseStudy],
    lambda: case_studies(place, cache, latents, cases["story"], **story),
)  # fmt: skip
plots.case_studies([c for c in stories if c.concept in displayed])

# %%
plots.table(at_chosen_dose(stories), cases["story"])

# %% [markdown]
# > "For instance, in Fig. 5, the feature for "happy" ranks only 78th, with many
# > low-level concepts also present."
#
# The paper's rank is 78 of $2^{17}$ = 131,072, on one image. Here is the rank of
# each latent among all latents, by mean activation. The image is the one that
# excites the latent most, so a rank near 1 is expected:

# %%
ranks = stage.result(
    "ranks_of_cases", dict[str, int],
    lambda: ranks_on_top_images(place, cache, latents, pictures),
)  # fmt: skip
plots.table(
    [{"latent named": name, "rank": rank} for name, rank in ranks.items()],
    f"of {place.sae.n_latents:,} latents",
)

# %% [markdown]
# ## One latent for the picture and the word? (section 4.1)
#
# > "We notice that the feature activates in response to the word hungry in the
# > image, suggesting that it connects not only to the action eat but can also
# > extend to broader concepts."
#
# Does a latent that was named from pictures also respond to its name as text?
# We let the model read the name in a prompt without an image. As a control, it
# also reads the names of the other latents, and we take the mean over these. The
# unit is the latent's maximum on image patches.

# %%
depicted = {
    n: row["concept"] for n, row in named.items()
    if row["kind"] in ("object", "face")
}  # fmt: skip
words = stage.result(
    "words", list[WordActivation],
    lambda: word_activations(place, cache, depicted, word_prompt),
)  # fmt: skip

# %% mystnb={"figure": {"caption": "Activation of each latent where its name is read, and where other names are read. On the line, the word makes no difference. Many points lie on top of each other at the origin.", "name": "fig-words"}, "image": {"alt": "Scatter plot of the activation on the latent's name against the mean activation on other names, with the diagonal."}}
on_name = [row.on_name for row in words]
on_others = [row.on_others for row in words]
unit = "in maxima on patches"
plots.scatter(
    on_others, on_name,
    f"activation on other names,\n{unit}",
    f"activation on its name,\n{unit}",
);
# %% [markdown]
# ## A hundred objects on a white image (section 4.1, Appendix D)
#
# > "The prompt is "What do you see in this image?" and the given image feature
# > a pure white background. We selected 100 object neurons, and only 11 of them
# > exhibit a difference before and after steering."
#
# We clamp object latents one at a time on a white image. Then we look for the
# object's name in the answer. Here the SAE drops what it leaves unexplained, as
# in the paper. So the *spliced* answer is a real control, and an answer counts
# as changed if it differs from it.
#
# - **Tokens.** We clamp at the tokens of the tiles only, for all latents alike.
#   With all image tokens clamped, sentences repeat words and some do not end. We
#   saw this on the latents that choose the dose.
# - **Fluency.** The untouched model answers the same question about other
#   images. We read these answers as answers about the white image, because they
#   too say what it does not show. Half of them give the reference, the other half
#   are the *unsteered* control. Steered answers can be more fluent than these:
#   they call the scene blank, and it is.
# - **Dose.** We choose it on other object latents, by the harmonic mean of
#   concept and fluency (the lowest if several tie).
# - **Controls.** We clamp as many live latents at random, and look for the same
#   names. We do so at the same dose, and again at the values of the object latents.

# %%
object_names = {
    n: row["concept"] for n, row in named.items()
    if row["kind"] == "object"
}  # fmt: skip
if len(object_names) < FEW:
    object_names = names
    print("Fewer than three latents are named for an object,", end=" ")
    print("so all named latents count as such.")
drawn = np.random.default_rng(seed).permutation(cache.readable)
steering = stage.result(
    "objects", ObjectSteering,
    lambda: steer_objects(
        place, cache, object_names, objects["question"], white,
        objects["doses"], count=objects["count"],
        choosing=objects["choosing"], scope=Scope(tuple(objects["kinds"])),
        others=Chosen(pictures, drawn[: objects["others"]]),
        batch=batch, max_new_tokens=objects["max_new_tokens"], seed=seed,
    ),
)  # fmt: skip
print("untouched:", steering.untouched)
print("spliced:  ", steering.spliced or "not asked, too few latents")
plots.table([
    {
        "latent": row.latent, "named": row.concept, "answer": row.answer,
        "fluency": f"{row.fluency:.2f}",
    }
    for row in steering.reported[:12]
], f"the first 12 latents at dose {steering.dose:g}")  # fmt: skip

# %% mystnb={"figure": {"caption": "Concept, fluency and their harmonic mean over the dose, with 99% intervals. The dotted line is the chosen dose. The dashed line is the fluency of unsteered answers about other images. The latents that choose the dose were clamped at every dose, the reported ones only at the dose that was chosen, and at the one at which most others name their object. Random latents were clamped at the chosen dose.", "name": "fig-dose"}, "image": {"alt": "Three panels above each other over the dose: the fraction of answers that name the concept, the fluency, and the harmonic mean, each with a curve for the latents that choose the dose, and points for the reported object latents and for random latents."}}
plots.dose_response(steering);
# %% [markdown]
# An unchanged answer ("a blank scene.") is fluent too. So the numbers below also
# give the fluency of those answers that name the object.
#
# The paper lets GPT-4 rate from 1 to 10 how relevant each answer is to the
# concept. Without a language model as `judge`, we rate by words. An answer that
# names the concept has 10, one that names another concept of the same kind has 5,
# and any other has 1.

# %%
relevance = stage.result(
    "relevance", Relevance,
    lambda: rate_objects(
        steering, judge, concepts, endpoint=endpoint,
        replies=stage.path("replies.jsonl"),
    ),
)  # fmt: skip
plots.table([
    {
        "clamped": group, "mean relevance": f"{mean.mean:.1f}",
        "99% interval": f"{mean.low:.1f} to {mean.high:.1f}",
    }
    for group, mean in relevance.means.items()
])  # fmt: skip

# %% [markdown]
# ## Low-level latents (section 4.2, Appendix H)
#
# > "One key distinction in our features, compared to those in Large Language
# > Models, is the presence of numerous low-level visual features.
# > These features represent basic visual concepts, such as color, shape, and
# > patterns, and often exhibit high activation across images."
#
# We rank the latents of each image by mean activation. Which kinds of concepts
# fill the first ranks? Refused latents are `unnamed`. Latents that notebook 03
# did not ask about are left out.

# %%
kinds = {n: row["kind"] or "unnamed" for n, row in explanations.items()}
by_rank = stage.result(
    "kinds_by_rank", RankedKinds,
    lambda: kinds_by_rank(
        place, pictures, cache, kinds, images=ranked_images, seed=seed
    ),
)  # fmt: skip

# %% mystnb={"figure": {"caption": "Kinds of concepts among the latents at each range of ranks on an image. For comparison: the 40 latents that are active on most patches, and all latents that notebook 03 asked about.", "name": "fig-ranks"}, "image": {"alt": "Stacked bars with the fractions of kinds of concepts, one bar for each range of ranks."}}
plots.stacked(by_rank.fractions, "fraction of latents");

# %% [markdown]
# ## Try it
#
# In JupyterLab (`make lab`) both widgets below are live. The upper one lists
# every latent that notebook 03 asked about. Search by a word or a number, sort
# by any score, and press *steer it*. The lower one then clamps that latent.
# Choose the dose, the tokens, the prompt and the image; the answer follows at
# once. Without a kernel, the [features page](../features) has the same list.

# %%
table = LatentTable.load(run)
steering_panel = SteeringPanel(
    place, cache, names, image=white, text=objects["question"]
)
sort = "iou_strict" if "iou_strict" in table.columns else None
browser = FeatureBrowser(table, steering_panel.choose, sort=sort)
VBox([browser.box, steering_panel.box])

# %% [markdown]
# ## The numbers

# %% tags=["hide-output"]
seconds = stage.result("panel", Metrics, steering_panel.measure)
metrics = stage.finish(
    steering.metrics | clamp_values(steering, cache)
    | relevance.metrics | seconds
    | case_metrics("feelings", feelings, seed)
    | case_metrics("stories", stories, seed)
    | word_metrics(words, seed) | by_rank.metrics
    | {f"rank_{concept}": rank for concept, rank in ranks.items()}
)  # fmt: skip
metrics_table(stage)

# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
findings(*steering_findings(
    metrics, max(objects["doses"]),
    read_study(page.locate(seeds_study), page),
))  # fmt: skip

# %% [markdown]
# ## Other SAEs
#
# The intervals above say how much the choice of latents matters. They do not
# say how much the choice of the SAE matters. So this page ran for several
# SAEs that differ only in the seed of notebook 01
# (`python -m lmm_sae_nb.benchmarks seeds`).

# %% mystnb={"figure": {"caption": "The same page for several SAEs that differ only in their seed (grey), with their median (black), and this page's SAE (blue). The rows are answers of 100, at the chosen dose.", "name": "fig-steer-seeds"}, "image": {"alt": "A row for each metric with a dot for each SAE."}}
study = read_study(page.locate(seeds_study), page)
of_all = {
    "named_of_100": "object latents: the answer names the object",
    "control_value_named_of_100": "random latents, same values: names it",
    "changed_of_100": "object latents: the answer changes",
    "control_value_changed_of_100": "random latents, same values: changes",
}
plots.other_saes(study, stage, of_all, "of 100 latents", highest=100);
# %% tags=["remove-input"]
all_panel = read_panel(page.locate(panel), page)
findings(*steering_of_others(study, all_panel, of_all))

# %% [markdown]
# **Limits.** Two things probably make steering easier here than in the paper.
# The layer is an early one, so the layers above it can act on the change. And
# the dose is far above what any image causes.
#
# For objects, the tokens and the doses to try were chosen on the latents that
# choose the dose. For feelings and stories, the tokens were chosen on the eight
# latents of this page; only the dose is left to other latents.
#
# The fluency of feelings is a weak measure. The untouched model is so certain of
# one answer that the reference perplexity is very high (see the numbers). There,
# fluency sees little but repetitions. Read the answers in the table.

# %% tags=["result", "remove-input"]
headline(
    page,
    *steering_result(metrics, study, all_panel),
)

# %% tags=["remove-input"]
provenance(page, stage)
