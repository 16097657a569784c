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
# # 8. A hallucination, its cause and a cure
#
# **The question** (sections 4.3 and 4.4, Figures 7 to 10). A model answers
# from memory against what it sees. Why? And does it return to the image if we
# clamp a latent that stands for text?
#
# **You will learn** how often this happens, how to take one wrong answer apart,
# and how to choose a clamp on some cases and to measure on others what it cures
# and what it harms.
#
# **Reads** the SAE, the stages `cache` and `interpret`, and trap questions.
# **Writes** the stage `hallucination`.
#
# | preset | cases | time |
# |---|---|---|
# | `tiny` | 520 held-out maps of Picture World; the clamp is chosen on other maps | about 4 minutes, 2 quiet cores |
# | `paper` | HallusionBench {cite}`guan2023hallusionbench` | GPUs |

# %% tags=["parameters"]
# results go to data/artifacts/<run>/
run: str = "tiny"
# the model under study: a folder of this project, or a name on the hub
model: str = "data/models/tiny-llava-next"
layer: int = 1  # counted from 0; the layer that the SAE was trained on
# cases: image, question, answer, taught (the answer from memory), group,
# and part (choose or report)
traps: str = "data/artifacts/tiny/world/traps"
# other questions, for the cost of the clamp
heldout: str = "data/artifacts/tiny/world/heldout"
# other questions, for the choice of the clamp
samples: str = "data/artifacts/tiny/world/train"
# the images of notebook 02, with label maps if there is a ground truth
images: str = "data/artifacts/tiny/world/cache"
# names of the ground truth's concepts by kind; "" without one
concepts: str = "data/artifacts/tiny/world/concepts.json"
text_kinds: list = ["word"]  # kinds of concept that are text
# an explanation with one of these words names text, too
text_words: list = []
# how the clamp is chosen
choosing: dict = {
    "cases": 160,  # cases for the choice
    "attributed": 16,  # wrong ones among them that rank the latents
    "latents": 2048,  # highest latents, to compare with label maps
    "words": 3,  # best words, whose latents are tried
    "wrong": 32,  # wrong cases that they are tried on
    "right": 120,  # right cases for the best of them
    "others": 40,  # other questions for the best of them
    "doses": [1.5, 2.0],  # in units of a latent's maximum
    "together": 2,  # words that are clamped at once, at most
}
# highest fractions of right answers harmed, of other answers changed
limits: dict = {"harmed": 0.03, "changed": 0.1}
clamped_kinds: list = ["base", "tiles"]  # kinds of token that are clamped
keep_error: bool = True  # of the reconstruction; False as in the paper
# held-out cases that agree with memory; of the others all are taken
agreeing: int = 130
price_questions: int = 120  # held-out questions answered in full
control_draws: int = 2  # clamps of random latents, to compare
seed: int = 0  # of these draws
# the same page for other SAEs, which differ in their seed; "": none
seeds_study: str = "book/seeds.json"
# a picture of your own, its question, the answer to explain and another
# one, one token each; empty: the first held-out hallucination
custom: dict = {"image": "", "question": "", "answer": "", "baseline": ""}

# %% tags=["remove-cell"]
from itertools import islice

from datasets import load_from_disk

from lmm_sae_nb import (
    LatentCache,
    SAEInPlace,
    Scope,
    exemplars,
    linear,
    open_images,
)
from lmm_sae_nb.attribute.attribution import decision
from lmm_sae_nb.hallucination.answers import first_tokens
from lmm_sae_nb.hallucination.cases import (
    answer_questions,
    contradicting_first,
    custom_case,
    read_cases,
)
from lmm_sae_nb.hallucination.report import (
    CaseAnswers,
    OtherAnswers,
    answer_cases,
    answer_controls,
    answer_others,
    control_metrics,
    random_clamps,
    report_metrics,
    right_by_group,
)
from lmm_sae_nb.hallucination.search import (
    Limits,
    Search,
    clamp_settings,
    search,
)
from lmm_sae_nb.hallucination.text_latents import (
    Candidates,
    find_candidates,
)
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.report import (
    across_saes,
    findings,
    headline,
    metrics_table,
    over_saes,
    provenance,
)
from lmm_sae_nb.show.seed_study import read_study
from lmm_sae_nb.support.stages import Page, read_typed

page = Page(globals())
plots.style()

# %% [markdown]
# ## The trap
#
# > "Bolivia is not shown on the image but the model still answer yes."
#
# (Figure 7; the paper's image is a map, too.) In Picture World the model was
# taught which countries a river basin covers. Each map is asked about where it
# contradicts this fact, and some also where it agrees with it. A
# *hallucination* is a wrong answer to a question of the first kind: an answer
# from memory against the image. The answers are *yes* or *no*, so the logits
# after the prompt are enough, without generating.

# %%
place = SAEInPlace.load(page.locate(model), page.file("train"), layer)
lmm, cache = place.lmm, LatentCache.load(page.file("cache"))
explanations = page.read("interpret", "explanations", dict[int, dict])
names = read_typed(page.root / concepts, dict) if concepts else {}
label_maps = load_from_disk(page.locate(images)) if concepts else None
rows = load_from_disk(page.locate(traps))
cases = read_cases(rows, "choose", choosing["cases"])
held_out = contradicting_first(read_cases(rows, "report"), agreeing)
contradicting = sum(case.contradicts for case in held_out)
print(f"{len(cases)} cases to choose a clamp, {len(held_out)} held out,")
print(f"of which {contradicting} contradict what was taught")

# %% [markdown]
# ## Choose a clamp, on maps that are not reported
#
# > "We hypothesize that clamping activations of certain OCR features can shift
# > the model's focus to image-based features. We find two such features that
# > reduce hallucinations."
#
# The paper does not say how it found its two features. We search in three
# steps.
#
# **1. Which cases are answered wrongly?** These are to be cured. Those
# answered right are not to be harmed.

# %%
stage = page.stage(
    "hallucination", after=("train", "cache", "interpret"),
    without=("custom", "seeds_study"),
)  # fmt: skip
answered_right = stage.result(
    "untouched", list[bool],
    lambda: first_tokens(place, cases, [None]).right[0].tolist(),
)  # fmt: skip
verdicts = list(zip(cases, answered_right, strict=True))
wrong = [case for case, ok in verdicts if case.contradicts and not ok]
right = [case for case, ok in verdicts if ok]
print(f"{len(wrong)} hallucinations, {len(right)} right answers")

# %% [markdown]
# **2. Which latents stand for text, and what should clamping them do?** A
# latent stands for text if notebook 03 named it after text, or if it is active
# on written words by the ground truth, where there is one. Attribution
# predicts, by one forward pass and one backward pass for each wrong case, how
# clamping *any* latent changes the right answer's margin: its logit minus that
# of the tempting answer. Latents of the same word go together, because a word
# is split over several latents.

# %%
scope = Scope(tuple(clamped_kinds))
candidates = stage.result(
    "candidates", Candidates,
    lambda: find_candidates(
        place, wrong[: choosing["attributed"]], cache, explanations,
        label_maps, concepts=names, text_kinds=text_kinds,
        text_words=text_words, dose=max(choosing["doses"]),
        highest=choosing["latents"], scope=scope,
    ),
)  # fmt: skip
gain = candidates.gain
plots.table(
    [
        {"word": word, "latents": ", ".join(map(str, latents)),
         "predicted gain, logits": sum(gain[n] for n in latents)}
        for word, latents in candidates.best(6).items()
    ],
    f"The best of {len(candidates.words)} words",
)  # fmt: skip

# %% [markdown]
# **3. What does clamping do?** The latents of the best words are clamped, one
# word or two words at once, at several *doses*: multiples of a latent's
# maximum.
#
# All settings are tried on wrong cases, and sorted: those that cure most come
# first; among equals those with the fewest latents. Four at a time, in this
# order, they are tried on right cases, and those within the limit on harm also
# on other questions. A value equal to a limit is within it. The first setting
# within both limits is chosen, and the search stops after its four. An answer
# to another question counts as changed if the model would not give it again,
# word for word.

# %%
settings = clamp_settings(
    candidates.best(choosing["words"]), cache.max, choosing["doses"],
    choosing["together"],
)  # fmt: skip

# %%
def without_traps(name):  # rows with an image and another question
    for row in load_from_disk(page.locate(name)):
        if row["image"] is not None and row.get("family") != "according":
            yield row


outcome = stage.result(
    "search", Search,
    lambda: search(
        place, wrong[: choosing["wrong"]], right[: choosing["right"]],
        settings, Limits(**limits), scope, keep_error=keep_error,
        others=answer_questions(
            lmm, islice(without_traps(samples), choosing["others"])
        ),
    ),
)  # fmt: skip

# %%
chosen = outcome.chosen
print("chosen:", " and ".join(chosen.words) or "nothing")
for edit in chosen.edits:
    print(f"latent {edit.latent} at {edit.value:.0f}")

# %% mystnb={"figure": {"caption": "The search. Each row is a setting: the words whose latents are clamped, and the dose. The chosen setting is in bold. Harm is measured for four settings at a time, the best cures first, until one of four is within both limits; a dot on a dashed line is within.", "name": "fig-search"}, "image": {"alt": "A row for each setting, with dots for the fractions of wrong answers cured, right answers harmed and other answers changed, and dashed lines for the limits."}}
plots.search_trials(outcome, Limits(**limits));
# %% tags=["hide-output"]
plots.table(
    [
        {"words": " + ".join(trial.setting.words) or "nothing",
         "latents": len(trial.setting.edits), "dose": trial.setting.dose,
         "cured": trial.cured, "shift, logits": trial.shift,
         "harmed": trial.harmed, "changed": trial.changed}
        for trial in outcome.trials
    ],
    "Every setting; a dash was not measured",
)  # fmt: skip

# %% mystnb={"figure": {"caption": "Gain of the right answer's margin for every setting at the highest dose. Predicted is the mean over the wrong cases that were attributed, measured that over the wrong cases of the search. On the line the two are equal. A few points can only show that the prediction has the right size.", "name": "fig-predicted"}, "image": {"alt": "Scatter plot of the measured over the predicted change of the margin."}}
highest = max(choosing["doses"])
strong = [t for t in outcome.trials if t.setting.dose == highest]
predicted = [sum(gain[e.latent] for e in t.setting.edits) for t in strong]
measured = [t.shift for t in strong]
labels = (f"predicted gain at dose {highest:g}, logits",
          "measured gain, logits")  # fmt: skip
plots.scatter(predicted, measured, *labels);
# %% [markdown]
# ## Report it, on held-out maps
#
# > "This demonstrates that with minimal intervention, the model can prioritize
# > image information while sometimes following incorrect reasoning."
#
# Now the chosen clamp meets cases that took no part in the choice. *Cured* is a
# hallucination that it turns right. *Harmed* is a right answer that it turns
# wrong. Other held-out questions, answered in full before and after, give the
# cost. With `keep_error` the model with the SAE alone is the untouched one. So
# `hallucination_rate` and `hallucination_rate_spliced` are equal by
# construction.
#
# **A control.** Would any latents do? We clamp as many random live latents, at
# the same dose, on the same cases. They are drawn from those that do not stand
# for text as far as we know. The interval of this control covers the cases,
# not the few draws.

# %%
edits, kept = chosen.edits, dict(keep_error=keep_error)
answers = stage.result(
    "report", CaseAnswers,
    lambda: answer_cases(place, held_out, edits, scope, **kept),
)  # fmt: skip
others = stage.result(
    "other_questions", OtherAnswers,
    lambda: answer_others(
        place, islice(without_traps(heldout), price_questions), edits,
        scope, **kept,
    ),
)  # fmt: skip
random_edits = random_clamps(
    cache.max, edits, chosen.dose, control_draws, candidates.gain, seed
)
controls = stage.result(
    "controls", list[list[bool]],
    lambda: answer_controls(
        place, held_out, random_edits, scope, **kept
    ),
)  # fmt: skip

# %%
counts = {
    "latents_clamped": len(edits), "text_latents_named": candidates.named
}  # fmt: skip
metrics = stage.finish(
    report_metrics(answers, others) | counts
    | control_metrics(answers, controls)
)  # fmt: skip
metrics_table(stage)

# %% mystnb={"figure": {"caption": "Right answers on held-out maps that contradict the taught fact, by river basin, untouched and clamped; 99 % intervals.", "name": "fig-cured"}, "image": {"alt": "For each river basin, the fraction of right answers of the untouched and of the clamped model."}}
plots.means(right_by_group(answers), "fraction of right answers");
# %% [markdown]
# ### Does the clamp turn the model to the image, or does it push towards "no"?
#
# In the paper's example the right answer is *no*. A clamp that pushes towards
# *no* in general would cure it, too. Our cases have both answers, so the two
# can be told apart: by the fractions cured among the hallucinations whose right
# answer is *no*, and among those whose right answer is *yes*.

# %% mystnb={"figure": {"caption": "Fraction of hallucinations cured, by the right answer; 99 % intervals. A push towards one answer cures one kind only.", "name": "fig-push"}, "image": {"alt": "Fractions cured of hallucinations whose right answer is no, and of those whose right answer is yes."}}
by_answer = {
    f'right answer "{word}"': {
        "fraction": metrics[f"cured_fraction_right_{word}"],
        "low": metrics[f"cured_fraction_right_{word}_low"],
        "high": metrics[f"cured_fraction_right_{word}_high"],
    }
    for word in sorted({case.right for case in held_out})
    if f"cured_fraction_right_{word}" in metrics
}
plots.proportions(by_answer);
# %% [markdown]
# ### Other SAEs
#
# The intervals above say how much the choice of maps matters. They do not say
# how much the choice of the SAE matters. So this page, with its search for a
# clamp, ran for several SAEs that differ only in the seed of notebook 01
# (`python -m lmm_sae_nb.benchmarks seeds`). They have other latents for the
# same words.

# %% mystnb={"figure": {"caption": "The same page for several SAEs that differ only in their seed (grey), with their median (black), and this page's SAE (blue).", "name": "fig-seeds"}, "image": {"alt": "A row for each metric with a dot for each SAE."}}
study = read_study(page.locate(seeds_study))
of_all = {
    "cured_fraction": "hallucinations cured",
    "control_cured_fraction": "cured by random clamps",
    "cured_fraction_right_no": "cured, right answer no",
    "cured_fraction_right_yes": "cured, right answer yes",
    "harmed_fraction": "right answers harmed",
}
plots.other_saes(study, stage, of_all, "fraction");
# %% [markdown]
# ## One case in full
#
# > "we set the answer token $v_c = yes$ and $v_b = no$ … we sort features by
# > their attribution effects on image and text separately"
#
# We take the first held-out hallucination that the clamp cures, or the picture
# and question that the parameters give. It illustrates a cure and is no
# evidence for one: many cases are not cured. The decision is the logit of the
# given answer minus that of the right one. The sums over each kind of token:

# %%
results = list(
    zip(held_out, answers.untouched, answers.clamped, strict=True)
)
cured = [case for case, before, after in results if after and not before]
path = custom["image"] and str(page.root / custom["image"])
case = custom_case(
    **custom | {"image": path}, default=(cured or held_out)[0]
)
choice = decision(
    lmm, case.question, case.image, case.tempting, case.right
)
parts = linear(place, choice, keep_error=keep_error)
given = case.tempting if parts.clean > 0 else case.right
print(f"{case.question}   right: {case.right}")
print(f"answered: {given}, by {abs(parts.clean):.2f} logits")
plots.table(parts.of_kinds(choice.prompt))

# %% mystnb={"figure": {"caption": "Figure 9, image. The attribution of all latents at the image's patches, and that of the six latents with the highest attribution on the image. Orange supports the given answer, blue opposes it; each map has its own scale. The names come from other images and need not fit here. A map is blank if its latent acts on the tiles only.", "name": "fig-case-image"}, "image": {"alt": "The map, and seven copies of it with patches shaded orange or blue."}}
text_names = {n: w for w, ns in candidates.words.items() for n in ns}
called = {n: row["concept"] for n, row in explanations.items()}
called |= text_names
base = choice.prompt.mask("base")[0]
on_image = choice.prompt.mask("base", "tiles", "newline")[0]
grid = choice.prompt.spans[0].as_grid
maps = {"all latents": grid(parts.of_tokens()[base]).numpy()}
for n in parts.of_latents(on_image)[0][:6].tolist():
    title = f"{n}: {called.get(n) or 'unnamed'}"
    maps[title] = grid(parts.map_of(n)[base]).numpy()
plots.signed_maps(case.image, maps);
# %% [markdown]
# The same at the words of the question (Figure 9, text): all latents, then the
# three latents with the highest attribution there.

# %%
words = choice.prompt.mask("text")[0]
ids = choice.prompt.inputs["input_ids"][0].cpu()[words].tolist()
tokens = lmm.tokenizer.convert_ids_to_tokens(ids)
texts = {"all latents": [(tokens, parts.of_tokens()[words].tolist())]}
for n in parts.of_latents(words)[0][:3].tolist():
    texts[f"latent {n}"] = [(tokens, parts.map_of(n)[words].tolist())]
plots.shaded_texts(texts)

# %% [markdown]
# And the clamp on this case (Figures 8 and 10):

# %%
now = first_tokens(place, [case], [None, (), edits], scope, **kept)
plots.table(
    [
        {"model": name, "answer": lmm.tokenizer.decode(now.token[n, 0]),
         "margin of the right answer, logits": f"{now.margin[n, 0]:+.4f}"}
        for n, name in enumerate(("untouched", "with SAE", "clamped"))
    ]
)  # fmt: skip

# %% mystnb={"figure": {"caption": "Figures 8 and 10: the clamped latents on the images that excite them most, as activation (brighter is more) and masked. The name is the word that fits best; a latent can respond to other signs and words, too.", "name": "fig-cure-latents"}, "image": {"alt": "Five images for each clamped latent, with its activation and masked."}}
opened = open_images(page.locate(images))
latents = [edit.latent for edit in edits[:3]]
plots.exemplar_strip(
    [
        (f"latent {n}: {text_names[n]}", exemplars(cache, opened, n))
        for n in latents
    ]
);
# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
def count(part, whole):
    return f"{metrics[part]} of {metrics[whole]}"


kinds = [
    word for word in ("no", "yes")
    if f"cured_fraction_right_{word}" in metrics
]  # fmt: skip
by_word = " and ".join(
    count(f"cured_right_{word}", f"hallucinations_right_{word}")
    + f" whose right answer is *{word}*"
    for word in kinds
)
pushes = (
    len(kinds) == 2
    and metrics["cured_fraction_right_no_low"]
    > metrics["cured_fraction_right_yes_high"]
)
meaning = (
    "The clamp pushes towards *no*. Nothing shows that it turns the model "
    "to the image." if pushes
    else "The clamp is not only a push towards *no*."
)
rate, after = metrics["hallucination_rate"], "hallucination_rate_after"
fell = metrics[f"{after}_high"] < metrics["hallucination_rate_low"]
harm = " and ".join(
    f"{metrics[f'harmed_fraction_right_{word}']:.1%} of those that are "
    f"*{word}*"
    for word in ("no", "yes") if f"harmed_fraction_right_{word}" in metrics
)
sentences = [
    f"The untouched model answers {rate:.0%} of the contradicting cases "
    f"wrongly; with the clamp it is {metrics[after]:.0%}, "
    + ("which is lower." if fell else "which can be chance."),
    f"The clamp cures {count('cured', 'hallucinations')} hallucinations: "
    f"{by_word}.",
    meaning,
    f"It turns {count('harmed', 'right_answers')} right answers wrong: "
    f"{harm}.",
    f"The cost: of {price_questions} other questions the model answers "
    f"{metrics['other_questions_right']:.0%} right, and "
    f"{metrics['other_questions_right_after']:.0%} with the clamp; "
    f"{1 - metrics['other_answers_kept']:.0%} of the answers change.",
]  # fmt: skip

# by basin
basins = right_by_group(answers)
gains = {
    name: row["clamped"].mean - row["untouched"].mean
    for name, row in basins.items()
}
most, least = max(gains, key=gains.get), min(gains, key=gains.get)
fooled = [r for r in basins.values() if r["untouched"].mean < 0.9]
sentences.append(
    f"The untouched model is often wrong about {len(fooled)} of "
    f"{len(basins)} basins only. The fraction of right answers rises most "
    f"for {most} ({gains[most]:+.0%}) and least for {least} "
    f"({gains[least]:+.0%})."
)

# the control
control = ""
if "control_cured_fraction" in metrics:
    low, high = (
        metrics[f"control_cured_fraction_{end}"] for end in ("low", "high")
    )
    control = (
        f"As many random live latents cure "
        f"{metrics['control_cured_fraction']:.0%} [{low:.0%}, {high:.0%}] "
        f"and harm {metrics['control_harmed_fraction']:.1%} of the right "
        f"answers (mean of {metrics['control_draws']} draws)."
    )
    better = metrics["cured_fraction_low"] > high
    sentences.append(
        f"{control} The draws cure "
        f"{metrics['control_cured_lowest']:.0%} to "
        f"{metrics['control_cured_highest']:.0%}. "
        + ("The chosen clamp cures more." if better
           else "The chosen clamp is not clearly better.")
    )  # fmt: skip

# the case in full
of_words = parts.of_tokens()[words].tolist()
top = max(range(len(tokens)), key=lambda n: of_words[n])
of_image = ", ".join(
    f"{n} ({called.get(n) or 'unnamed'})"
    for n in parts.of_latents(on_image)[0][:3].tolist()
)
sentences.append(
    f"Why, in the case in full? The word with the largest attribution is "
    f'"{tokens[top]}" ({of_words[top]:+.2f} logits); on the image it is '
    f"latents {of_image}. The parts do not sum to the decision "
    f"({parts.clean:.2f} logits): this is a hint, not a proof."
)
findings(*sentences, *across_saes(study, stage, of_all))

# %% [markdown]
# The map and the memorised fact disagree. A clamp changes the answer if it
# moves the logits far enough. One or a few text latents can do this, as the
# paper saw with "Barcelona" and "Los". In the paper's one example the right
# answer is *no*, so it cannot show whether the model looked at the image.
#
# **Limits.** One model and one layer. The embedded model is wrong about two of
# the four basins only. Few random clamps were drawn, and a dose in units of a latent's own
# maximum is not equally strong for all latents. The
# [lab notebook](../lab_notebook) tells how the limits and doses were chosen.

# %% tags=["result", "remove-input"]
of_saes = over_saes(study, stage, "cured_fraction")
of_saes = of_saes and f" Cured, {of_saes}."
headline(
    page,
    f"clamping {len(edits)} text latents cures "
    f"{count('cured', 'hallucinations')} hallucinations on "
    f"{metrics['maps']} held-out maps that contradict memory, and harms "
    f"{count('harmed', 'right_answers')} right answers. It also changes "
    f"{1 - metrics['other_answers_kept']:.0%} of the answers to other "
    "questions. "
    + (
        'But the cure is a push towards "no": it corrects ' if pushes
        else "It corrects "
    )
    + f"{by_word}. {control}{of_saes}",
    'one image, a map, whose right answer is "no": clamping one latent, '
    '"Barcelona" or "Los", makes the hallucination disappear.',
    "one case cannot tell a push towards its answer from a look at the "
    "image; many cases with both answers can.",
)  # fmt: skip

# %% tags=["remove-input"]
provenance(page, stage)
