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
# **The question.** Sections 2.3, 4.1 and 4.2, Appendices D and H: if a latent is set by hand, does the model say what the
# latent was named for?
#
# **You will learn** what a clamp does, how much of the effect is the latent's and how much the splice's, how it grows with
# the dose, and whether one latent serves both the picture and the word.
#
# **Reads** `train/`, `cache/`, `interpret/`, `score/` and `judge/` if they are there. **Writes** `steer/`.
#
# | preset | LMM | latents steered | time |
# |---|---|---|---|
# | `tiny` | Picture World LLaVA-NeXT, shipped | 146 objects at 3 doses, 100 at random | 3 minutes, 2 cores |
# | `paper` | LLaVA-NeXT-LLaMA3-8B | the same | one GPU |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # a folder of this project, or a name on the hub
images: str = "data/artifacts/tiny/world/cache"  # the images that were cached
layer: int = 1  # 0-based, the layer that the SAE was trained on
steered_kinds: list = ["base", "tiles", "newline"]  # token kinds whose latents are clamped, where there is an image
doses: list = [8, 16, 24]  # clamp values, in units of the latent's own maximum over the cached images
n_objects: int = 100  # latents named for an object that are reported; up to as many others choose the dose
question: str = "What do you see in this image?"  # about a pure white image
blank_size: int = 192  # pixels a side of the white image
feelings: list = ["happy", "sad", "angry", "hungry", "scared", "loving", "sick", "sleepy"]  # names of latents
told: list = ["happy", "sad", "hungry"]  # those of them whose answers are shown
feeling_question: str = "How do you feel?"  # about the latent's own top image
story_prompt: str = "Tell me a story about Alice and Bob."  # without an image
case_doses: list = [1, 1.5, 2, 3]  # clamp values for feelings and stories, in units of the latent's maximum
word_prompt: str = "is there a {} ?"  # in which a concept's word is read
ranked_images: int = 200  # cached images whose latents are ranked for section 4.2
max_new_tokens: int = 24  # of an answer; stories may have twice as many
batch: int = 20  # settings that run side by side
concepts: str = "data/artifacts/tiny/world/concepts.json"  # names by kind, for the relevance; "": a judge is asked
judge: str = ""  # a language model that rates relevance: a folder, a name on the hub, or name@http://host:port/v1
judge_key: str = ""  # the environment variable with the endpoint's key; "": it wants none
concurrency: int = 8  # questions under way at once, to an endpoint
timeout: float = 120.0  # seconds that an endpoint's answer may take
seed: int = 0  # of the choice of latents and images

# %% tags=["remove-cell"]
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from IPython.display import HTML, display
from ipywidgets import VBox
from PIL import Image
from torch.testing import assert_close

from lmm_sae_nb.cache.encode_images import activation_maps
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.chat.recorded import Recorded, open_chat
from lmm_sae_nb.interpret import explainers as rating
from lmm_sae_nb.interpret.exemplars import exemplars
from lmm_sae_nb.interpret.explainers import Vocabulary, mentions
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.feature_browser import FeatureBrowser
from lmm_sae_nb.show.latent_table import LatentTable
from lmm_sae_nb.show.steering_panel import SteeringPanel
from lmm_sae_nb.show.tables import steering_strip
from lmm_sae_nb.steer import steering
from lmm_sae_nb.steer.relevance import relevance
from lmm_sae_nb.steer.steering import Edit, Scope, answers, steer_latents
from lmm_sae_nb.support import intervals
from lmm_sae_nb.support.files import project_root, read_json, write_json
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.intervals import Mean, bounds, mean_interval, proportion
from lmm_sae_nb.support.stages import Stage, require

root = project_root()
plots.style()

# %%
lmm = LMM.load(root / model if (root / model).is_dir() else model)
sae = TopKSAE.load(require(run, "train", "sae.safetensors", "01_train_sae.py").parent).requires_grad_(False)
cache = LatentCache.load(require(run, "cache", "manifest.json", "02_cache_activations.py").parent)
explanations = read_json(require(run, "interpret", "explanations.json", "03_interpret_features.py"))
pictures, white = open_images(root / images), Image.new("RGB", (blank_size, blank_size), "white")
named = {int(n): row for n, row in explanations.items() if row["concept"]}
at_image = Scope(tuple(steered_kinds))
print(f"{len(named)} named latents")

# %% [markdown]
# ## Equations 3 to 6
#
# > "$\text{Steer}(\mathcal{C}, k, i)$": $z_{ij} = k$ for the tokens $i \in \mathcal{C}$; then
# > $\hat{\mathbf{z}} = \text{TopK}(\mathbf{z})$ and $\hat{\mathbf{x}}$ "into the subsequent LLaVA layer instead of
# > $\mathbf{x}$".
#
# The clamp comes before TopK, so a clamped latent must earn its place among the $k$ highest. (The paper's letter $k$ for the
# clamp is `value` here, $k$ is TopK's count.) By hand, with a dense $\mathbf{z}$:

# %%
prompt = lmm.prompt(question, white)
x = lmm.hidden_states(prompt, layer)[0, prompt.spans[0].where("base")].float()
edit = Edit(latent=next(iter(named)), value=5.0)
z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
z[:, edit.latent] = edit.value
kept = z.topk(sae.k)
ours = steer_latents(sae, x, [edit])
assert_close(torch.zeros_like(z).scatter(1, ours.indices, ours.acts), torch.zeros_like(z).scatter(1, kept.indices, kept.values))

# %% [markdown]
# ## Happy, sad, hungry (Figures 5 and 6)
#
# The latents are found by their names, not by hand: of those that notebook 03 named `happy`, the one that is most active on
# an image. Notebook 03 saw nothing but pictures.

# %%
top = {latent: float(cache.max[latent]) for latent in range(sae.n_latents)}  # the unit of a dose
cases = {}
for latent in sorted(named, key=lambda n: float(cache.top_means[n, 0])):  # the most active one of a name comes last
    if named[latent]["concept"] in feelings:
        cases[named[latent]["concept"]] = latent
print(cases, "· no latent has the name", [name for name in feelings if name not in cases])
# %% mystnb={"figure": {"caption": "The latents of the case studies on the images that excite them most.", "name": "fig-cases"}}
plots.exemplar_strip([(f"latent {cases[name]}: {name}", exemplars(cache, pictures, cases[name])) for name in told if name in cases]);
# %% [markdown]
# > "When asked about its feelings without steering, the model responds that it does not experience emotions. However … when
# > we clamp the "happy" feature, the model responds with expressions of happiness."
#
# The question is asked about the latent's own top image, with the latent clamped at every token. The story has no image; the
# latent is clamped in its prompt. What the SAE leaves unexplained is kept in both. Two controls stand above the steered
# answers: the untouched model (*before*), and the SAE spliced in with nothing steered (dose 0).

# %%
stage, code = Stage(run, "steer"), [intervals, steering, rating]
params = dict(
    model=model, layer=layer, images=images, steered_kinds=steered_kinds, doses=doses, n_objects=n_objects,
    question=question, blank_size=blank_size, feelings=feelings, feeling_question=feeling_question, story_prompt=story_prompt,
    case_doses=case_doses, word_prompt=word_prompt, ranked_images=ranked_images, max_new_tokens=max_new_tokens,
    concepts=concepts, judge=judge, seed=seed,
)  # fmt: skip
stages = [Stage(run, name).path("manifest.json") for name in ("train", "cache", "interpret")]
inputs = [root / name for name in dict.fromkeys((model, concepts, judge)) if name and (root / name).exists()]
inputs += [path for path in stages if path.exists()]
current, started = stage.is_current(params, inputs, code), time.monotonic()
if not current:
    rows = []
    for name, latent in cases.items():
        settings = [[]] + [[Edit(latent, value * top[latent])] for value in case_doses]
        own = pictures[cache.top(latent)[0][0]]
        for text, image, scope in ((feeling_question, own, Scope()), (story_prompt, None, Scope(phases=("prompt",)))):
            before = lmm.generate(lmm.prompt(text, image), max_new_tokens=2 * max_new_tokens)[0]
            said = answers(SAEInPlace(lmm, sae, layer), text, image, settings, scope, keep_error=True, max_new_tokens=2 * max_new_tokens)
            rows += [{"name": name, "latent": latent, "prompt": text, "dose": value, "before": before, "answer": answer,
                      "names": mentions(answer, name)} for value, answer in zip([0, *case_doses], said, strict=True)]  # fmt: skip
    write_json(stage.path("cases.json"), {"rows": rows})
by_case = read_json(stage.path("cases.json"))["rows"]
for name, text in [(name, text) for text in (feeling_question, story_prompt) for name in told if name in cases]:
    rows = [row for row in by_case if (row["name"], row["prompt"]) == (name, text)]
    display(HTML(f"<b>{name}</b>: {text}" + steering_strip([(row["dose"], row["answer"]) for row in rows], rows[0]["before"])))

# %% [markdown]
# > "For instance, in Fig. 5, the feature for "happy" ranks only 78th, with many low-level concepts also present."
#
# The rank of each of these latents among all latents of its own image is in the metrics below.

# %% [markdown]
# ## One latent for the picture and the word?
#
# The paper's latent for *hungry* answers to eating and to the word. Here for every latent named for an object or a feeling:
# its activation where its concept's word is read, in units of its maximum on patches, against the words of the other
# latents (the control).

# %%
if not current:
    shown = {n: row["concept"] for n, row in named.items() if row["kind"] in ("object", "face")}
    words = sorted(set(shown.values()))
    prompt = lmm.prompt([word_prompt.format(word) for word in words])
    read = sae.encode(lmm.hidden_states(prompt, layer).flatten(0, 1).float())
    text = prompt.mask("text").cpu()
    heard = {n: (torch.where(read.indices == n, read.acts, 0).sum(-1).cpu().reshape(text.shape) * text).amax(1) / top[n] for n in shown}
    write_json(stage.path("words.json"), {
        str(n): {"concept": word, "own": float(heard[n][words.index(word)]), "others": float(np.delete(heard[n], words.index(word)).mean())}
        for n, word in shown.items()
    })  # fmt: skip
by_word = list(read_json(stage.path("words.json")).values())
own, others = ([row[which] for row in by_word] for which in ("own", "others"))
print(f"{len(by_word)} latents; own word {mean_interval(own)}, other words {mean_interval(others)} of the maximum on patches")
# %% mystnb={"figure": {"caption": "Activation where a latent's own word is read, beside the mean over other words, in units of its maximum on patches. On the line the word makes no difference.", "name": "fig-words"}}
plots.scatter(others, own, "other words", "own word");

# %% [markdown]
# ## A hundred objects on a white image (Appendix D)
#
# > "The prompt is "What do you see in this image?" and the given image feature a pure white background. We selected 100
# > object neurons, and only 11 of them exhibit a difference before and after steering."
#
# Latents that are named for an object, at random, are clamped at the image's tokens, at several doses. Which dose the numbers
# below report is not read off these latents: other latents named for an object are clamped too, and the dose at which the
# greatest number of them name their concept is taken, of equals the lowest; if none does, the highest. The control is as many
# live latents at random at that dose, asked for the same names. Relevance, from 1 to 10, is given by a language model where one is named,
# as by GPT-4 in the paper; else by the words of the world (10 names the concept, 5 another of its kind, 1 none).

# %%
if not current:
    rng = np.random.default_rng(seed)
    objects = sorted(n for n, row in named.items() if row["kind"] == "object")
    order = rng.permutation(objects).tolist()
    objects, choosing = order[:n_objects], order[n_objects : 2 * n_objects]
    rest = np.setdiff1d(np.flatnonzero(np.asarray(cache.live)), objects)
    control = rng.choice(rest, len(objects), replace=len(rest) < len(objects)).tolist()
    untouched = lmm.generate(lmm.prompt(question, white), max_new_tokens=max_new_tokens)[0]
    ask = partial(answers, SAEInPlace(lmm, sae, layer), question, white, scope=at_image, batch=batch, max_new_tokens=max_new_tokens)
    tries = [(group, value, n, n) for group, some in (("object", objects), ("choosing", choosing)) for value in doses for n in some]
    spliced, *said = ask([[], *([Edit(n, value * top[n])] for _, value, n, _ in tries)])
    dose = steering.strongest(doses, (value for (group, value, n, _), answer in zip(tries, said, strict=True)
                                      if group == "choosing" and mentions(answer, named[n]["concept"])))  # fmt: skip
    said += ask([[Edit(n, dose * top[n])] for n in control])
    tries += [("random", dose, n, own) for n, own in zip(control, objects, strict=True)]  # asked for the same names
    rows = [
        {"group": group, "dose": value, "latent": n, "concept": named[own]["concept"], "answer": answer,
         "changed": answer != spliced, "names": mentions(answer, named[own]["concept"])}
        for (group, value, n, own), answer in zip(tries, said, strict=True)
    ]  # fmt: skip
    how = dict(key_variable=judge_key, concurrency=concurrency, timeout=timeout)
    talk = Recorded(open_chat(judge, **how), stage.path("replies.jsonl")) if judge else None
    rate = relevance(talk) if talk else Vocabulary(root / concepts).rate if concepts else None
    reported = [row for row in rows if row["dose"] == dose and row["group"] != "choosing"]
    rates = rate([row["answer"] for row in reported], [row["concept"] for row in reported]) if rate else [None] * len(reported)
    for row, rated in zip(reported, rates, strict=True):
        row["relevance"] = rated
    write_json(stage.path("answers.json"), {"untouched": untouched, "spliced": spliced, "dose": dose, "steered": rows})
white_answers = read_json(stage.path("answers.json"))
dose = white_answers["dose"]
print("untouched:", white_answers["untouched"], "· spliced:", white_answers["spliced"], "· dose", dose, "chosen on", len({row["latent"] for row in white_answers["steered"] if row["group"] == "choosing"}), "other latents")
for row in [row for row in white_answers["steered"] if row["dose"] == dose and row["group"] == "object"][:12]:
    print(f"{row['latent']:6d}  {row['concept']:12s} {row['answer']}")
# %% mystnb={"figure": {"caption": "Dose and response: share of latents whose clamping changes the answer about a white image, and makes it name the concept, with 99 % intervals; the dose in units of the latent's own maximum.", "name": "fig-dose"}}
groups = {"object, changed": ("object", "changed"), "object, named": ("object", "names"), "choosing the dose, named": ("choosing", "names"), "random, changed": ("random", "changed"), "random, named": ("random", "names")}
curves = {}
for name, (group, key) in groups.items():
    at = sorted({row["dose"] for row in white_answers["steered"] if row["group"] == group})
    found = {value: [row[key] for row in white_answers["steered"] if (row["group"], row["dose"]) == (group, value)] for value in at}
    curves |= {name: {value: Mean(*proportion(cases)[:3]) for value, cases in found.items()}} if found else {}
plots.dose_curves(curves, "dose, in the latent's own maximum", "share of latents");

# %% [markdown]
# ## Low-level features (section 4.2, Appendix H)
#
# > "One key distinction in our features, compared to those in Large Language Models, is the presence of numerous low-level
# > visual features."
#
# For each of some images the latents are ranked by mean activation; whose names fill the top ranks? Latents that no name
# fits are `unnamed`, those that notebook 03 did not ask about are left out.

# %%
if not current:
    asked = np.array(sorted(map(int, explanations)))
    chosen = np.random.default_rng(seed).choice(len(pictures), min(ranked_images, len(pictures)), replace=False).tolist()
    means = activation_maps(SAEInPlace(lmm, sae, layer), [pictures[i] for i in chosen], asked.tolist()).mean((2, 3))
    kinds = np.array([explanations[str(n)]["kind"] or "unnamed" for n in asked])
    active = np.sort(means, 1)[:, ::-1] > 0
    ranked = kinds[np.argsort(-means, 1)]
    ranges = {f"rank {a + 1}-{b}": (a, b) for a, b in ((0, 10), (10, 20), (20, 40), (40, 80))}
    shares = {name: Counter(ranked[:, a:b][active[:, a:b]].tolist()) for name, (a, b) in ranges.items()}
    shares["by breadth"] = Counter(kinds[np.argsort(-np.asarray(cache.frequency)[asked])[:40]].tolist())
    shares["all asked"] = Counter(kinds.tolist())
    write_json(stage.path("ranks.json"), {name: {k: v / sum(c.values()) for k, v in sorted(c.items())} for name, c in shares.items() if c})
# %% mystnb={"figure": {"caption": "Which kinds of concepts fill the top ranks of an image's latents by mean activation, and the forty that fire most widely (by breadth).", "name": "fig-ranks"}}
plots.stacked(read_json(stage.path("ranks.json")), "share of latents");

# %% [markdown]
# ## The numbers

# %%
if not current:
    at_dose = {g: [row for row in white_answers["steered"] if (row["group"], row["dose"]) == (g, dose)] for g in ("object", "random")}
    chosen_on = len({row["latent"] for row in white_answers["steered"] if row["group"] == "choosing"})
    metrics = {"objects_steered": len(at_dose["object"]), "dose": dose, "dose_chosen_on": chosen_on, "replies_failed": talk.failed if talk else 0}
    for group, name in (("object", ""), ("random", "control_")):
        for key, what in (("names", "named"), ("changed", "changed")):
            found = bounds(f"{name}{what}_of_100", proportion([row[key] for row in at_dose[group]]))
            metrics |= {title: 100 * value for title, value in found.items()}
        if rated := [row["relevance"] for row in at_dose[group] if row["relevance"]]:
            metrics[f"{name}relevance"] = mean_interval(rated, seed=seed).mean
    for text, name in ((feeling_question, "feelings"), (story_prompt, "stories")):
        right = {row["name"] for row in by_case if row["prompt"] == text and row["names"] and row["answer"] != row["before"]}
        metrics |= {f"{name}_steered": len(cases), f"{name}_named": len(right)}
    metrics["word_latents"] = len(by_word)
    metrics |= bounds("word_own", mean_interval(own, seed=seed)) | bounds("word_others", mean_interval(others, seed=seed))
    metrics |= bounds("word_own_above_others", proportion(np.array(own) > np.array(others)))
    for name, latent in cases.items():
        image = pictures[cache.top(latent)[0][0]]
        means = activation_maps(SAEInPlace(lmm, sae, layer), [image], list(range(sae.n_latents)))[0].mean((1, 2))
        metrics[f"rank_{name}"] = int((means > means[latent]).sum()) + 1
    tried, seconds = SteeringPanel(SAEInPlace(lmm, sae, layer), cache, {n: row["concept"] for n, row in named.items()}, image=white, text=question), []
    for _ in range(6):  # a new question first, of which the untouched answer is shown before; then as after a moved slider
        begun = time.perf_counter()
        next(known for known in tried.answer(tried.asked(), 0) if "steered" in known)
        seconds.append(time.perf_counter() - begun)
    metrics |= {"panel_question_seconds": seconds[0], "panel_slider_seconds": float(np.median(seconds[1:]))}
    stage.finish(params, inputs, metrics, time.monotonic() - started, code)
read_json(stage.path("metrics.json"))

# %% [markdown]
# ## Try it
#
# In JupyterLab (`make lab`) the panel below answers at once (`panel_slider_seconds` above is the median from a moved slider to
# the steered answer, `panel_question_seconds` what a new question takes): choose a latent, a dose, the tokens, a prompt, an image.
# Above it is every latent that notebook 03 asked about, to search by a word or a number and to sort by any score; *steer it* hands
# one to the panel. The [features page](../features) has the same without a kernel.

# %%
panel = SteeringPanel(SAEInPlace(lmm, sae, layer), cache, {n: row["concept"] for n, row in named.items()}, image=white, text=question)
scored = [Stage(run, "score").path("scores.json"), Stage(run, "judge").path("verdicts.json")]
catalogue = LatentTable(cache, pictures, explanations, *map(read_json, filter(Path.is_file, scored)))
browser = FeatureBrowser(catalogue, panel.choose, sort="iou_strict" if "iou_strict" in catalogue.columns else None)
VBox([browser.box, panel.box])

# %% [markdown]
# ## What we found
#
# `named_of_100` counts latents whose clamping makes the model name their concept on an image that shows nothing,
# `control_named_of_100` how often a random latent in its stead does. The paper counts 11 of 100 answers that differ at all.
# Two things differ from the paper's setting and make steering easier here: the layer is an early one, so that the layers
# behind it can act on the change, and the dose is several times what the latent ever reaches. With four other SAEs, trained
# alike but for the seed, `named_of_100` was 48, 46, 58 and 51, with this one 57; the control 0, 0, 0 and 1.

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · {model} · layer {layer} · seed {seed} · {manifest['seconds']:.0f} s · {manifest['versions']}")
