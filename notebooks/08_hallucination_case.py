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
# # 8. A hallucination, its cause and its cure
#
# **The question.** Sections 4.3 and 4.4, Figures 7 to 10: why does a model answer from what it was taught against what it
# sees, and does clamping a latent that stands for text bring it back to the image?
#
# **You will learn** how often it happens, how one wrong answer is taken apart, and how to look for a cure on some cases and
# count on others what it cures and what it costs.
#
# **Reads** the SAE, `cache/`, `interpret/`, the maps of `traps`. **Writes** `hallucination/`.
#
# | preset | cases | time |
# |---|---|---|
# | `tiny` | 520 held-out maps of Picture World, a quarter of them asked twice; the cure is chosen on other maps | 3 minutes, 2 cores |
# | `paper` | HallusionBench {cite}`guan2023hallusionbench` | GPUs |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # a folder of this project, or a name on the hub
layer: int = 1  # 0-based, the layer that the SAE was trained on
traps: str = "data/artifacts/tiny/world/traps"  # image, question, answer, taught answer, group, part (choose, report)
heldout: str = "data/artifacts/tiny/world/heldout"  # other questions, for the price
samples: str = "data/artifacts/tiny/world/train"  # other questions, that the chosen cure must not spoil
images: str = "data/artifacts/tiny/world/cache"  # the images that were cached
concepts: str = "data/artifacts/tiny/world/concepts.json"  # names of the ground truth's concepts
text_kinds: list = ["word"]  # kinds of concepts that are text
text_words: list = []  # an explanation with one of these names text, too; not needed where the concepts tell what is text
image: str = ""  # a picture of your own to be told in full; "" tells the first held-out hallucination
question: str = ""  # about that picture
answer: str = ""  # the answer to explain, one token
baseline: str = ""  # the other answer, one token
agreeing: int = 130  # held-out cases that agree with what was taught; of those that contradict it all are taken
choose_cases: int = 160  # cases that the cure is chosen on
attributed: int = 16  # wrong ones among them whose attribution ranks the latents
looked_at: int = 2048  # latents, the highest in that ranking, that are looked at for text in their top images
tried: int = 3  # words, the highest in that ranking, whose latents are tried, a word's all at once
tried_on: int = 32  # wrong cases that they are tried on
kept_on: int = 120  # right cases that the best of them are tried on
others_kept_on: int = 40  # other questions that they are tried on
values: list = [1.5, 2.0]  # clamps, in units of a latent's own maximum
together: int = 2  # words whose latents are clamped at once, at most
clamped_kinds: list = ["base", "tiles"]  # kinds of tokens that are clamped
harmed_at_most: float = 0.03  # share of right answers that a chosen cure may turn wrong
spoiled_at_most: float = 0.1  # share of answers to other questions that it may change
keep_error: bool = True  # leave in what the SAE does not explain; False as in the paper
price_questions: int = 120  # held-out questions of other families, answered in full before and after
seed: int = 0  # of nothing but the choice of pictures shown

# %% tags=["remove-cell"]
import time
from itertools import islice

import numpy as np
import torch
from datasets import load_from_disk
from IPython.display import HTML

from lmm_sae_nb.attribute import attribution
from lmm_sae_nb.attribute.attribution import decision, linear
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.hallucination import search as hallucination_search
from lmm_sae_nb.hallucination.cases import cases_of, own_answers, told_case
from lmm_sae_nb.hallucination.search import Limits, search, trials, verdicts
from lmm_sae_nb.hallucination.text_latents import of_words, promising, shown_text, text_latents
from lmm_sae_nb.interpret.exemplars import exemplars
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.show import plots
from lmm_sae_nb.steer.steering import Edit, Scope, steered
from lmm_sae_nb.support import intervals
from lmm_sae_nb.support.files import project_root, read_json, write_json
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.intervals import bounds, proportion
from lmm_sae_nb.support.stages import Stage, require

root = project_root()
plots.style()

# %%
lmm = LMM.load(root / model if (root / model).is_dir() else model)
sae = TopKSAE.load(require(run, "train", "sae.safetensors", "01_train_sae.py").parent).requires_grad_(False).to(lmm.device)
cache = LatentCache.load(require(run, "cache", "manifest.json", "02_cache_activations.py").parent)
explanations = read_json(require(run, "interpret", "explanations.json", "03_interpret_features.py"))
names, maxima = read_json(root / concepts), torch.tensor(np.asarray(cache.max))
rows, others, pictures = load_from_disk(root / traps), load_from_disk(root / heldout), load_from_disk(root / images)
part = np.array(rows["part"][:])
choosing = cases_of(rows.select(np.flatnonzero(part == "choose")[:choose_cases]), "choose")
held = cases_of(rows.select(np.flatnonzero(part == "report")), "report")
reporting = [c for c in held if c.contradicts] + [c for c in held if not c.contradicts][:agreeing]
print(f"{len(choosing)} cases to choose on, {len(reporting)} to report on, of them {sum(c.contradicts for c in reporting)} contradict what was taught")

# %% [markdown]
# ## The trap
#
# > "Bolivia is not shown on the image but the model still answer yes."
#
# In Picture World the model was taught which countries a river basin covers. Each map is asked about where it
# contradicts the fact, and some where it agrees. A hallucination is a wrong answer to the first kind, from memory against the
# image. All of that is known here; nothing of it is known for a photograph. Answers are *yes* or *no*, so the logits after
# the prompt tell them, without generating.
#
# ## Choose a cure, on maps that are not reported on
#
# 1. Attribution ranks latents: one forward and backward for a wrong case give, linearly, what clamping *any* latent to its
#    value would add to the right answer, silent latents too (`attribution.clamping`).
# 2. Of those, only text latents stay, as in the paper: latents that notebook 03 named after text, and latents whose
#    activation lies on written words by the ground truth, where there is one.
# 3. Latents that stand for the same word are clamped together, for a word is split over several. The best words are tried
#    in earnest, alone and two at once, at several multiples of their latents' maxima; what cures most of the wrong cases is
#    then tried on the right ones and on other questions, in that order, until one keeps within the harm allowed: that one is
#    chosen. An answer to another question is spoiled if the model would not give it again, word for word.

# %%
stage, code = Stage(run, "hallucination"), [attribution, hallucination_search, intervals]
params = dict(
    model=model, layer=layer, traps=traps, heldout=heldout, text_kinds=text_kinds, text_words=text_words, agreeing=agreeing,
    samples=samples, choose_cases=choose_cases, attributed=attributed, looked_at=looked_at, tried=tried, tried_on=tried_on, kept_on=kept_on, others_kept_on=others_kept_on, values=values, together=together, clamped_kinds=clamped_kinds,
    harmed_at_most=harmed_at_most, spoiled_at_most=spoiled_at_most, keep_error=keep_error, price_questions=price_questions,
)  # fmt: skip
inputs = [path for path in (root / model, root / traps, root / heldout, root / samples, root / concepts) if path.exists()]
inputs += [Stage(run, name).path("manifest.json") for name in ("train", "cache", "interpret")]
current, scope = stage.is_current(params, inputs, code), Scope(tuple(clamped_kinds))
started = time.monotonic()
if not current:
    first = verdicts(SAEInPlace(lmm, sae, layer), choosing, [None])
    wrong = [c for c, right in zip(choosing, first.right[0], strict=True) if c.contradicts and not right]
    good = [c for c, right in zip(choosing, first.right[0], strict=True) if right]
    if not wrong:
        raise ValueError("the model fell into no trap, there is nothing to cure; raise choose_cases")
    predicted = promising(SAEInPlace(lmm, sae, layer), wrong[:attributed], max(values) * maxima, scope)
    elsewhere = {name for kind in names if kind not in text_kinds for name in names[kind]}  # "sad" is a face too
    vocabulary = [name for kind in text_kinds for name in names.get(kind, []) if name not in elsewhere]
    text = text_latents(explanations, vocabulary, text_words)
    named = len(text)
    for kind in set(text_kinds) & set(pictures.column_names):
        text = shown_text(cache, pictures, kind, names[kind], predicted.topk(min(looked_at, len(predicted))).indices.tolist()) | text
    words = dict(islice(of_words(text, predicted).items(), tried))
    settings = trials(list(words.values()), maxima.tolist(), values, together)
    elsewise = (row for row in load_from_disk(root / samples) if row["image"] is not None and row.get("family") != "according")
    limits, kept = Limits(harmed_at_most, spoiled_at_most), own_answers(lmm, islice(elsewise, others_kept_on))
    best, tests = search(SAEInPlace(lmm, sae, layer), wrong[:tried_on], good[:kept_on], settings, limits, scope, others=kept, keep_error=keep_error)
    write_json(
        stage.path("choice.json"),
        {
            "cure": [[edit.latent, edit.value] for edit in best],
            "text_latents": {str(n): text[n] for latents in words.values() for n in latents},
            "of_text": len(text), "named_by_explanation": named,
            "tried": [
                {
                    "latents": [edit.latent for edit in test.edits],
                    "times_maximum": max((edit.value / float(maxima[edit.latent]) for edit in test.edits), default=0.0),
                    "foretold": sum(float(predicted[edit.latent]) for edit in test.edits),  # at the highest value
                    "cured": test.cured, "harmed": test.harmed, "spoiled": test.spoiled, "shift": test.shift,
                }
                for test in tests
            ],
        },
    )  # fmt: skip
choice = read_json(stage.path("choice.json"))
chosen = tuple(Edit(latent, value) for latent, value in choice["cure"])
for trial in choice["tried"]:
    of = " and ".join(dict.fromkeys(choice["text_latents"][str(n)] for n in trial["latents"])) or "nothing"
    harm = "  ".join(f"{name} {'not asked' if trial[name] is None else format(trial[name], '.3f')}" for name in ("harmed", "spoiled"))
    print(f"{of:24s} {len(trial['latents']):2d} latents x maximum {trial['times_maximum']:.2g}  cured {trial['cured']:.2f}  shift {trial['shift']:+.2f}  {harm}")

# %% mystnb={"figure": {"caption": "What attribution foretold and what clamping did: the mean change of the right answer's margin over the wrong cases, of every word and pair of words tried, at the highest value.", "name": "fig-foretold"}}
strongest = [trial for trial in choice["tried"] if abs(trial["times_maximum"] - max(values)) < 1e-6]
plots.agreement(
    np.array([trial["shift"] for trial in strongest]), {"foretold": np.array([trial["foretold"] for trial in strongest])}
);

# %% [markdown]
# ## Report it, on held-out maps
#
# The chosen clamp acts on the patches, of the base image and of the tiles, for words are written there (what was tried
# elsewhere is among the [departures](../departures)). *Cured*: hallucinations turned right. *Harmed*: right
# answers turned wrong, on contradicting and on agreeing maps. The price on other questions: held-out ones of every family,
# answered in full before and after. What the SAE does alone is a control, where its error is dropped; with `keep_error` the
# spliced model is the untouched one, and the two rates are equal by construction.

# %%
if not current:
    after = verdicts(SAEInPlace(lmm, sae, layer), reporting, [None, (), chosen], scope, keep_error=keep_error)
    contradicts = torch.tensor([c.contradicts for c in reporting])
    pictured = (row for row in others if row["image"] is not None and row.get("family") != "according")
    asked = list(islice(pictured, price_questions))
    said = {"before": [], "after": []}
    for batch in (asked[n : n + 24] for n in range(0, len(asked), 24)):
        prompt = lmm.prompt([row["question"] for row in batch], [row["image"] for row in batch])
        said["before"] += lmm.generate(prompt)
        with steered(SAEInPlace(lmm, sae, layer), prompt, chosen, scope, keep_error=keep_error):
            said["after"] += lmm.generate(prompt)
    expected = ["".join(row["answer"].lower().split()) for row in asked]
    right = {when: torch.tensor(["".join(a.lower().split()) == e for a, e in zip(answers, expected, strict=True)]) for when, answers in said.items()}
    before, spliced, cured = after.right
    shares = {
        "hallucination_rate": proportion(~before[contradicts]),
        "hallucination_rate_spliced": proportion(~spliced[contradicts]),
        "hallucination_rate_after": proportion(~cured[contradicts]),
        "cured_fraction": proportion(cured[contradicts & ~before]),
        "harmed_fraction": proportion(~cured[before]),
        "harmed_fraction_contradicting": proportion(~cured[contradicts & before]),
        "harmed_fraction_agreeing": proportion(~cured[~contradicts & before]),
        "other_questions_right": proportion(right["before"]),
        "other_questions_right_after": proportion(right["after"]),
        "other_answers_kept": proportion([a == b for a, b in zip(said["before"], said["after"], strict=True)]),
    }
    for word in sorted({c.right for c in reporting}):  # a mere push towards one answer cures one kind of case alone
        of_word = torch.tensor([c.right == word for c in reporting]) & contradicts & ~before
        shares |= {f"cured_fraction_right_{word}": proportion(cured[of_word])} if of_word.any() else {}
    groups = sorted({c.group for c in reporting})
    member = {g: torch.tensor([c.group == g and c.contradicts for c in reporting]) for g in groups}
    write_json(
        stage.path("report.json"),
        {
            "by_group": {
                f"{g} maps, {when}": proportion(marks[member[g]])._asdict()
                for g in groups for when, marks in (("untouched", before), ("clamped", cured))
            },
            "before": before.tolist(), "after": cured.tolist(),
            "families": [[row.get("family", ""), *(bool(right[w][n]) for w in said)] for n, row in enumerate(asked)],
        },
    )  # fmt: skip
    metrics = {"maps": int(contradicts.sum())}
    for name, value in shares.items():
        metrics |= bounds(name, value)
    metrics |= {"hallucinations": int((contradicts & ~before).sum()), "latents_clamped": len(chosen), "text_latents_named": choice["named_by_explanation"]}
    stage.finish(params, inputs, metrics, time.monotonic() - started, code)
metrics, report = read_json(stage.path("metrics.json")), read_json(stage.path("report.json"))
for name in [n for n in metrics if f"{n}_low" in metrics]:
    print(f"{name:32s} {metrics[name]:.3f}  [{metrics[name + '_low']:.3f}, {metrics[name + '_high']:.3f}]")

# %% mystnb={"figure": {"caption": "Right answers on held-out maps that contradict the taught fact, by river basin, untouched and with the cure; 99 % intervals.", "name": "fig-cured"}}
plots.proportions(report["by_group"]);

# %% [markdown]
# ## One case in full
#
# The first held-out hallucination, or the picture, question and answers that the parameters give. The decision is the logit
# of the answer to explain less that of the other one.

# %%
fooled = [c for c, right in zip(reporting, report["before"], strict=True) if c.contradicts and not right]
case = told_case(str(root / image) if image else "", question, answer, baseline, fooled[0] if fooled else reporting[0])
told = decision(lmm, case.question, case.image, case.tempting, case.right)
parts = linear(SAEInPlace(lmm, sae, layer), told, keep_error=keep_error)
prompt, base = told.prompt, told.prompt.mask("base")[0]
called = {int(n): row["concept"] for n, row in explanations.items() if row["concept"]} | {int(n): name for n, name in choice["text_latents"].items()}
print(f"{case.question}   right: {case.right}   answered: {case.tempting if parts.clean > 0 else case.right}, by {abs(parts.clean):.2f} logits")
for kind in ("base", "tiles", "newline", "text"):
    print(f"{kind:8s} {float(parts.of_tokens()[prompt.mask(kind)[0]].sum()):+.3f}")

# %% mystnb={"figure": {"caption": "Figure 7: the image, the attribution of all latents at its patches, and that of the six latents with the highest attribution on the image. Orange speaks for the answer that was given, blue against.", "name": "fig-case-image"}}
grid = prompt.spans[0]
top = parts.of_latents(prompt.mask("base", "tiles", "newline")[0])[0][:6].tolist()
maps = {"all latents": parts.of_tokens()} | {f"{n}: {called.get(n, 'unnamed')}": parts.map_of(n) for n in top}
plots.signed_maps(
    case.image,
    {title: grid.as_grid(values[base]).numpy() for title, values in maps.items()},
);

# %% [markdown]
# The same on the question's words (Figure 9), for all latents and for the three text-side latents with the highest
# attribution:

# %%
words = prompt.mask("text")[0]
pieces = lmm.tokenizer.convert_ids_to_tokens(prompt.inputs["input_ids"][0][words.to(lmm.device)].tolist())
spoken = parts.of_latents(words)[0][:3].tolist()
HTML(plots.token_html(pieces, parts.of_tokens()[words].tolist()) + "".join(
    f"<small>latent {n}</small>" + plots.token_html(pieces, parts.map_of(n)[words].tolist()) for n in spoken
))  # fmt: skip

# %% [markdown]
# And the cure on this case (Figures 8 and 10):

# %%
now = verdicts(SAEInPlace(lmm, sae, layer), [case], [None, (), chosen], scope, keep_error=keep_error)
for title, margin, token in zip(("untouched", "SAE spliced in", "clamped"), now.margin[:, 0].tolist(), now.answered[:, 0].tolist(), strict=True):
    print(f"{title:16s} says {lmm.tokenizer.decode(token):6s} margin of the right answer {margin:+.2f}")

# %% mystnb={"figure": {"caption": "Figures 8 and 10: the clamped latents on the images that excite them most, as activation and masked.", "name": "fig-cure-latents"}}
opened = open_images(root / images)
plots.exemplar_strip([(f"latent {e.latent}: {called.get(e.latent, 'unnamed')}", exemplars(cache, opened, e.latent)) for e in chosen[:3]] or [("no cure was found", [])]);

# %% [markdown]
# ## What we found
#
# The rates are above and on the [results page](../results). Two evidences, the map's and the fact's, speak against each other;
# what decides is how far a clamp shifts the balance (`shift` above, in logits), which one or a few text latents can do, as the
# paper saw with "Barcelona" and "Los". Look at `cured_fraction_right_yes` and `cured_fraction_right_no` before believing in
# more: where only one of them is high, the clamp pushes towards one answer and does not turn the model to the image, and
# nothing in the paper's case, whose right answer is *no*, could tell the two apart. On other questions
# `other_questions_right` before and after is the price of clamping them. Limits: one model, one layer; the embedded model is
# fooled about some basins only, as the figure by basin shows; and one SAE, on which more depends than the intervals say: four
# others, trained alike but for the seed, had other latents for the same words, and the best within the limits cured .36, .38,
# .35 and .43 of these hallucinations, this one .64. With `tried` 6 and `together` 3 the two of them that were tried did better,
# on maps of validation seeds (.41 to .48, .34 to .45), for two to five times the search; this SAE's cure stayed the same.

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · {model} · layer {layer} · seed {seed} · {manifest['seconds']:.0f} s · {manifest['versions']}")
