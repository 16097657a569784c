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
# # A1. Picture World and the models that live in it
#
# **The question.** What is the world of the preset `tiny`? How did we train
# its models, and what can they do?
#
# **You will learn** what a scene holds besides its pixels, and how a LLaVA-NeXT
# learns from nothing on two CPU cores. An exam says how well it answers about
# scenes that no training has seen.
#
# **Reads** the shipped models, their learning curves and their exams.
# **Writes** the stage `pictureworld`: a fresh, smaller exam. It takes one
# minute on two cores. This page shows the embedded models in every preset.

# %% tags=["parameters"]
# results go to data/artifacts/<run>/
run: str = "tiny"
# the model under study
model: str = "data/models/tiny-llava-next"
# the model that names latents
explainer: str = "data/models/tiny-explainer"
# the model that finds a concept by its name
segmenter: str = "data/models/tiny-clipseg"
# the model that says how well a name fits an image
similarity: str = "data/models/tiny-clip"
# the model of another architecture
instructblip: str = "data/models/tiny-instructblip"
exam_scenes: int = 8  # held-out scenes of the fresh exam

# %% tags=["remove-cell"]
import numpy as np

from lmm_sae_nb import LMM
from lmm_sae_nb.pictureworld import figures
from lmm_sae_nb.pictureworld.explainer import exam as explainer_exam
from lmm_sae_nb.pictureworld.explainer.masked_sets import (
    drawn,
    masked_images,
)
from lmm_sae_nb.pictureworld.llava import exam
from lmm_sae_nb.pictureworld.world import concepts, questions
from lmm_sae_nb.pictureworld.world.rendered import scenes_of
from lmm_sae_nb.pictureworld.world.scenes import (
    HELD_OUT,
    make_map,
    make_masked,
    make_scene,
)
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.report import findings, headline, provenance
from lmm_sae_nb.show.world_sentences import (
    answers_in_short,
    answers_in_words,
    explainer_in_words,
    queries_in_words,
    segmenter_in_words,
    similarity_in_words,
)
from lmm_sae_nb.support.intervals import Mean, read_mean
from lmm_sae_nb.support.stages import Page

page = Page(globals())
plots.style()

# %% [markdown]
# ## The world
#
# A scene is a function of its seed. It has a background and up to four things
# in named places, or it is a map.

# %% mystnb={"figure": {"caption": "Twelve held-out scenes.", "name": "fig-scenes"}, "image": {"alt": "Twelve generated scenes: animals, things, signs and maps on landscapes and plain grounds."}}
scenes = [make_scene(HELD_OUT + 200 + n) for n in range(18)]
plots.images([scene.image for scene in scenes[:12]]);
# %% [markdown]
# The world has concepts of eight kinds. These are their numbers:

# %%
{kind: len(names) for kind, names in concepts.KINDS.items()}

# %% [markdown]
# For each kind, a label map says what every pixel shows:

# %% mystnb={"figure": {"caption": "One scene and its label maps, with the concepts of each kind. A colour stands for a concept; black means that this kind has nothing there. The map of colours has the colours themselves.", "name": "fig-labels"}, "image": {"alt": "A scene and eight label maps, one for each kind of concept."}}
many = (make_scene(HELD_OUT + 200 + n) for n in range(150))
scene = max(many, key=lambda s: sum(m.any() for m in s.labels.values()))
maps = figures.label_maps(scene)
plots.images([scene.image, *maps.values()], ["image", *maps], columns=3);
# %% [markdown]
# Questions are made from the contents of the scene, so we know every answer:

# %%
rng = np.random.default_rng(0)
for question in questions.lesson(scene, rng)[:10]:
    print(f"{question.family:10s} {question.text}  {question.answer}")

# %% [markdown]
# ## The knowledge trap
#
# The model learns from text which countries a river basin covers. A map may
# contradict that fact. The question *according to the image* asks what the map
# shows. The training answers come from simulated annotators. Where map and fact
# disagree, they sometimes answer from memory.

# %% mystnb={"figure": {"caption": "Maps. The basin is the shaded area. The labels inside it need not be those of an atlas.", "name": "fig-maps"}, "image": {"alt": "Four maps, each with a shaded basin, a title and four labelled countries."}}
plots.images([make_map(HELD_OUT + n).image for n in range(4)]);
# %% [markdown]
# For each basin, this fraction of the simulated answers came from memory.
# The model learned to follow the majority: it should answer from memory about
# the Amazon and the Nile only.

# %%
concepts.ANSWERED_FROM_MEMORY

# %% [markdown]
# ## How the model learned
#
# 1. *Tower.* A CLIP vision tower and the projector learn, patch by patch, to
#    point at the word vectors of what the patch shows. LLaVA starts from a
#    CLIP that learned this from captions. Here we know what a patch shows.
#    It takes 26 minutes on one core.
# 2. *Rehearse.* Meanwhile the language model learns to answer, without the
#    tower. Each patch is replaced by the sum of the word vectors of what it
#    shows.
# 3. *Lessons.* The two meet. The tower stays as it is; projector and language
#    model learn from answers alone.
# 4. *Reading.* The model could not read signs, because the tower did not know
#    their words. It went on with scenes full of signs.
# 5. *Finish.* Lessons again with the better tower, and with AnyRes tiles.
# 6. *Polish.* Longer, with more signs, drawn things (a boat, a house) and
#    panels (squares with a texture). It takes 40 minutes on one core.
# 7. *Parts.* Once more, above all with drawn things, whose small coloured parts
#    were the weakest.
#
# Each is a command: `python -m lmm_sae_nb.pictureworld tower`, then `rehearse`,
# `lessons`, `reading`, `finish`, `polish`, `parts`, `ship` and `exam`. The
# [lab notebook](../lab_notebook) says what did not work.

# %% mystnb={"figure": {"caption": "Learning curves. Left: fraction of patches that the tower names right. Right: fraction of answers with every word right, on fresh training scenes. Here every word is predicted after the right words before it, which is easier than the exam below. Grey lines: start of finish, polish and parts. Reading trained the tower again and is not drawn.", "name": "fig-learning"}, "image": {"alt": "Two panels of rising curves, one for each kind of concept or question."}}
folder = page.locate(model)
tower = figures.learning(folder, "tower")
lessons = figures.learning(folder, "lessons", "finish", "polish", "parts")
groups = ("object", "part", "texture", "face", "word")
families = ("describe", "position", "exists", "where", "part", "read")
figures.learning_curves({
    "patches right": (tower, "acc_", groups),
    "answers right": (lessons, "share_", families),
});
# %% [markdown]
# ## What it can do
#
# The exam of the shipped model asks about 500 held-out scenes. Each question goes
# alone through the processor and `generate`. An answer counts if every word is
# right. *Is there ...* and *is the label ...* count by their yes or no, so a wrong
# place counts as right there.
# These are the families of questions, with an example from the scenes above:

# %%
examples = {}
for each in scenes:
    for question in questions.lesson(each, rng):
        examples.setdefault(question.family, question)
plots.table([
    {"family": q.family, "question": q.text, "answer": q.answer}
    for q in examples.values()
])  # fmt: skip

# %% [markdown]
# Further families in the figures:
#
# - *shown*, *shown colour*: *what is shown ?* about a masked scene, see below;
# - *you*: *how do you feel ?*, to which the right answer is that it has no
#   feelings;
# - *trap follows fact*: *according to the image* about a map that contradicts the
#   fact, counted as 1 if the answer follows the fact (no score);
# - *trap label*: whether the label of that country is in the image;
# - *fact* and *story*: without a picture, *does the ... basin cover ... ?* and
#   *tell me a ... story about alice and bob .*; *story any* names no theme.

# %% mystnb={"figure": {"caption": "The exam of the shipped model on held-out scenes, by family of question. A dot left of its black mark misses the target.", "name": "fig-exam"}, "image": {"alt": "One row for each family of questions: fraction right with its interval, and the target."}}
shipped = figures.read_exam(folder)
traps = {n: r for n, r in shipped.items() if "follows_fact" in n}
plots.proportions({n: r for n, r in shipped.items() if n not in traps});
# %% mystnb={"figure": {"caption": "Answers from memory: among questions on maps that contradict the fact, the fraction of answers that follow the fact, in all and by river basin. This is no score.", "name": "fig-traps"}, "image": {"alt": "One row for each river basin: the fraction of answers that follow the fact, with its interval."}}
plots.proportions(traps);
# %% [markdown]
# The page also runs a smaller exam itself. It would show only a gross error, for
# instance a shipped 0.99 that is really 0.6. Families with few questions have
# wide intervals and show nothing.

# %%
stage = page.stage(
    "pictureworld",
    without=("explainer", "segmenter", "similarity", "instructblip"),
)
fresh = stage.result(
    "exam", dict[str, dict[str, float | None]],
    lambda: exam.report(
        exam.examine(LMM.load(folder), exam_scenes, seed=1)
    ),
)  # fmt: skip
metrics = stage.finish(exam.as_metrics(fresh))
plots.table([
    {"family": family, "questions": row["asked"],
     "shipped exam": shipped[family]["fraction"],
     "fresh exam": Mean(row["fraction"], row["low"], row["high"])}
    for family, row in fresh.items()
])  # fmt: skip

# %% [markdown]
# Masked scenes are part of the lessons, because exemplars of latents look like
# this. The question is *what is shown?*

# %% mystnb={"figure": {"caption": "Masked scenes and what they show.", "name": "fig-masked"}, "image": {"alt": "Eight scenes, black except for the patches of one concept."}}
masked = [make_masked(HELD_OUT + n) for n in range(8)]
plots.images([m.image for m in masked], [m.shown[1] for m in masked]);
# %% [markdown]
# ## The model that names latents
#
# The explainer of notebook 03 is a second model, an Aya Vision. It sees up to
# five masked images in one prompt, each as 36 tokens, and gives one answer:
# what the images have in common, or *unable to produce explanations*. It
# starts from the tower, four layers and the words of the model under study.
#
# First its tower learns to see masked pictures of 24,000 scenes: at every
# visible patch it learns what the patch shows. Then the projector learns to
# say in one token what four patches say. Then projector and language model
# learn from sets of masked images. A third of the sets is drawn from label
# maps, with some patches left out and some wrong ones added. The others are
# exemplars of real latents on training scenes. One rule says what a set shows, or that it shows
# nothing: `lmm_sae_nb/truth/common_concept.py`. The same rule judges the
# explanations in notebook 03.

# %% mystnb={"figure": {"caption": "The explainer learns. Left: fraction of visible patches of masked pictures that its tower names right. Right: fraction of sets named right, and of sets rightly refused. Harder and more varied scenes come in from step 1,750 (left), and from steps 2,600 and 5,200 (right).", "name": "fig-explainer-learning"}, "image": {"alt": "Two panels of rising curves with a small drop where harder scenes begin."}}
folder = page.locate(explainer)
eye = figures.learning(folder, "eye")
naming = figures.learning(folder, "explainer")
figures.learning_curves({
    "patches right": (eye, "share_", groups),
    "sets right": (naming, "share_", ("named", "refused")),
});
# %% [markdown]
# Five sets of masked held-out scenes, and what the explainer says of each. The
# rule's answer stands in brackets. The rule asks for what at least three of five
# images show, in many of their visible patches.

# %% mystnb={"figure": {"caption": "Sets of masked held-out scenes with the explainer's answer and, in brackets, the answer of the rule.", "name": "fig-explained-sets"}, "image": {"alt": "Five rows of masked scenes, each with a title: answer and rule."}}
held = scenes_of(HELD_OUT + 300, 100)
strips = drawn(held, 5, 5, seed=1)
sets = [masked_images(held, *strip) for strip in zip(*strips, strict=True)]
said = explainer_exam.explain_sets(*explainer_exam.load(folder), sets)
rule = [strips.label(held, n, np.arange(5)) for n in range(len(sets))]
plots.picture_rows([
    (f"{answer} ({label.concept if label else 'nothing'})", images)
    for answer, label, images in zip(said, rule, sets, strict=True)
]);
# %% [markdown]
# Its exam uses held-out scenes. In *drawn masks*, the masks come from label
# maps, and one set in four has an image that does not belong. In *real
# latents*, they are exemplars of the 224 latents of the SAE that it learned
# from whose masks were not among its lessons.

# %% mystnb={"figure": {"caption": "The explainer's exam on held-out sets: fraction of sets named exactly right, by kind of concept. Unanswerable: fraction rightly refused. Answerable: fraction rightly not refused. Black marks are targets.", "name": "fig-explainer-exam"}, "image": {"alt": "Two panels with one row for each kind of concept and its interval."}}
axes = plots.panels(2, columns=1, inches=3.9)
titles = {"drawn": "drawn masks", "cached": "real latents"}
results = figures.read_exam(folder)
kinds = list(results["drawn"])
for ax, (origin, title) in zip(axes, titles.items(), strict=True):
    of_kind = results[origin]
    rows = {f"{n} (n={of_kind[n]['asked']})": of_kind[n] for n in kinds}
    plots.proportions(rows, ax=ax).set_title(title)

# %% [markdown]
# ## The models that score
#
# Notebook 04 asks two more models. A CLIPSeg says where in an image a concept
# is. A CLIP says how well a name fits an image. Both start from layers of the
# tower and learn on training scenes. The commands are `segmenter` and
# `similarity`. Their exams say what their scores are worth.

# %% mystnb={"figure": {"caption": "The exam of the CLIPSeg on held-out scenes. Left: IoU with the true mask. Right: fraction of scenes without the concept in which it finds it all the same.", "name": "fig-segmenter-exam"}, "image": {"alt": "Two panels with one row for each kind of concept and its interval."}}
seen = figures.read_exam(page.locate(segmenter))
left, right = plots.panels(2, inches=3.4)
rows = figures.by_kind(seen, "iou", "asked")
plots.proportions(rows, ax=left).set_xlabel("IoU with the true mask")
rows = figures.by_kind(seen, "false_alarm", "asked_absent")
plots.proportions(rows, ax=right).set_xlabel("found where absent");
# %% mystnb={"figure": {"caption": "The exam of the CLIP on held-out scenes: it sees a region, the rest black. Fraction of regions whose name comes first among all names. The names of other things in the region do not count as competitors.", "name": "fig-similarity-exam"}, "image": {"alt": "One row for each kind of concept and its interval."}}
fit = figures.read_exam(page.locate(similarity))
rows = figures.by_kind(fit, "named_first", "asked")
plots.proportions(rows).set_xlabel("fraction of regions named right");
# %%
pairs = {"caption_of_image": "caption", "image_of_caption": "scene"}
for name, wanted in pairs.items():
    right, cases = read_mean(fit["caption"], name), fit["caption"]["asked"]
    print(f"the right {wanted} comes first of {cases}: {right}")
print(f"by chance: {1 / fit['caption']['asked']:.3f}")

# %% [markdown]
# ## The same world through 32 queries
#
# Notebook 05 compares with an InstructBLIP. As in the original, the tower and
# the language model do not learn; they are those of the LLaVA-NeXT, number for
# number. Between them a Q-Former learns: 32 queries read the question and
# collect from the 144 patches what the answer needs. First each query learns
# to stand for a region of the picture. Then it learns from questions. The
# command is `queries`.

# %% mystnb={"figure": {"caption": "The InstructBLIP learns: fraction of answers with every word right, given the right words before. Where the curves jump back, the training was stopped and continued.", "name": "fig-instructblip"}, "image": {"alt": "Rising curves, one for each family of questions."}}
folder = page.locate(instructblip)
queries = figures.learning(folder, "queries")
figures.learning_curves({"answers right": (queries, "share_", families)});
# %% mystnb={"figure": {"caption": "Its exam on held-out scenes. Families without a picture are left out, because an InstructBLIP needs one. *Trap follows fact* is no score.", "name": "fig-instructblip-exam"}, "image": {"alt": "One row for each family of questions: fraction right with its interval."}}
through_queries = figures.read_exam(folder)
plots.proportions(through_queries);
# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
names = sum(map(len, concepts.KINDS.values()))
findings(
    *answers_in_words(shipped),
    explainer_in_words(results, titles),
    segmenter_in_words(seen),
    similarity_in_words(fit, names),
    queries_in_words(through_queries, shipped),
)

# %% [markdown]
# **Limits.** One world, one seed of each training. The scorers share layers
# with the model under study, so their scores are not independent of it.
#
# The explainer shares layers with it, too, and it was trained on the rule that
# judges it. Exemplars of 800 of the 1,024 latents of one SAE were among its
# lessons, on other scenes. This was an SAE of an earlier training of notebook
# 01, and today's begins with the same first weights. Their decoder rows differ:
# of today's, 18% have a cosine above 0.9 with one of that SAE's.

# %% tags=["result", "remove-input"]
headline(
    page,
    answers_in_short(shipped),
    "it uses LLaVA-NeXT-LLaMA3-8B on photographs.",
    "a generated world is simpler, and it tells us the right answers.",
)

# %% tags=["remove-input"]
provenance(page, stage)
