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
# # A1. Picture World and the model that lives in it
#
# **The question.** What is the `tiny` preset's world, how was its model made, and what can it do?
#
# **You will learn** what a scene holds besides its pixels, how the embedded LLaVA-NeXT was trained from nothing on two CPU
# cores, and how well it answers on scenes that no training has seen.
#
# **Reads** the shipped models with their learning curves and exams. **Writes** `pictureworld/`: a fresh, smaller exam.
# Time: one minute on 2 cores. The notebook always shows the embedded model, whatever the preset.

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # the embedded model
explainer: str = "data/models/tiny-explainer"  # the one that names latents
segmenter: str = "data/models/tiny-clipseg"  # the one that finds a concept by its name
similarity: str = "data/models/tiny-clip"  # the one that says how well a name fits an image
instructblip: str = "data/models/tiny-instructblip"  # the one of another architecture
exam_scenes: int = 24  # held-out scenes of the fresh exam

# %% tags=["remove-cell"]
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld import training_loop
from lmm_sae_nb.pictureworld.explainer import exam as explainer_exam
from lmm_sae_nb.pictureworld.explainer.masked_sets import drawn, masked_images
from lmm_sae_nb.pictureworld.llava import exam
from lmm_sae_nb.pictureworld.world import concepts, questions
from lmm_sae_nb.pictureworld.world.rendered import scenes_of
from lmm_sae_nb.pictureworld.world.scenes import HELD_OUT, make_map, make_masked, make_scene
from lmm_sae_nb.show import plots
from lmm_sae_nb.support.files import project_root, read_json
from lmm_sae_nb.support.stages import Stage

root = project_root()
plots.style()

# %% [markdown]
# ## The world
#
# A scene is a function of its seed. It has a background, up to four things in named places, or it is a map.

# %% mystnb={"figure": {"caption": "Held-out scenes.", "name": "fig-scenes"}}
scenes = [make_scene(HELD_OUT + 200 + n) for n in range(18)]
plots.images([scene.image for scene in scenes]);
# %%
{kind: len(names) for kind, names in concepts.KINDS.items()}

# %% [markdown]
# Every pixel knows what it shows, by kind of concept:

# %% mystnb={"figure": {"caption": "One scene and its label maps.", "name": "fig-labels"}}
scene = next(s for s in scenes if any(item.kind == "composite" for item in s.items))
palette = np.random.default_rng(3).integers(60, 256, (256, 3), dtype=np.uint8) * (np.arange(256) > 0)[:, None].astype(
    np.uint8
)
maps = [Image.fromarray(palette[grid]) for grid in scene.labels.values()]
plots.images([scene.image, *maps], ["scene", *scene.labels], columns=9);
# %% [markdown]
# Questions are made from the facts, so every right answer is known:

# %%
rng = np.random.default_rng(0)
for asked in questions.lesson(scene, rng)[:10]:
    print(f"{asked.family:10s} {asked.text:48s} {asked.answer}")

# %% [markdown]
# ## The knowledge trap
#
# Which countries a basin covers is taught as text. A map may contradict it, and *according to the image* asks for the map.
# Training answers to that question were written by annotators who, where the two disagree, at times answered from memory:

# %% mystnb={"figure": {"caption": "Maps: the basin is the shaded area; the labels in it need not be those of an atlas.", "name": "fig-maps"}}
plots.images([make_map(HELD_OUT + n).image for n in range(6)]);
# %%
concepts.ANSWERED_FROM_MEMORY

# %% [markdown]
# ## How the model was made
#
# 1. *The eye.* A CLIP vision tower and the projector learn, patch by patch, to point at the word vectors of what the patch
#    shows. LLaVA starts from a CLIP that has learned this from captions; here the truth is free.
# 2. *Rehearsal.* At the same time the language model learns to answer from perfect eyes: sums of the same word vectors.
# 3. *Lessons.* The two meet: tower frozen, projector and language model train on answers alone, many questions a picture, each
#    blind to the others.
# 4. *Reading.* After these lessons the model still could not read signs, because the eye knew the words on maps and few of
#    those on signs: the tower went on, on scenes full of signs, with the projector kept as it was.
# 5. *Finish.* Lessons again, with the better eye and with the tile that AnyRes adds: the same picture once more, row by row.
# 6. *Polish.* The same for longer, with more signs, drawn things and panels, which were the weakest.
# 7. *Parts.* Once more, at half the rate, with drawn things above all: the colours of small parts were still the weakest.
#
# The commands are `python -m lmm_sae_nb.pictureworld tower | rehearse | lessons | reading | finish | polish | parts |
# ship | exam`.

# %% mystnb={"figure": {"caption": "Learning curves. Left: patches named right by the eye. Right: answers right in every word, given the right words before, on fresh training scenes; a grey line where a course begins (lessons, finish, polish, parts).", "name": "fig-learning"}}
tower = training_loop.smooth(training_loop.read_log(root / model / "tower.jsonl"))
courses = [root / model / f"{course}.jsonl" for course in ("lessons", "finish", "polish", "parts")]
rows, begins = [], []
for course in filter(Path.is_file, courses):
    begins.append(rows[-1]["step"] if rows else 0)
    rows += [{**row, "step": row["step"] + begins[-1]} for row in training_loop.read_log(course)]
lessons = training_loop.smooth(rows)
_, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
for step in begins[1:]:
    right.axvline(step, color="0.8", lw=1)
for group in ("object", "part", "texture", "face", "word"):
    plots.curve(tower, f"acc_{group}", label=group, ax=left)
for family in ("describe", "position", "exists", "where", "part", "read"):
    plots.curve(lessons, f"share_{family}", label=family, ax=right)
left.set_ylabel("patches right")
right.set_ylabel("answers right")
left.legend(frameon=False, fontsize=6)
right.legend(frameon=False, fontsize=6, ncols=2);
# %% [markdown]
# ## What it can do
#
# The exam of the shipped model (`exam.json` beside it says how many questions of each family): held-out scenes, each
# question alone, through the processor and `generate`. An answer counts when it is right in every word; *is there …* and
# *is the label …* count by their yes or no. `trap_follows_fact` is the share of answers that follow the taught fact,
# among questions on maps that contradict it. A point left of its orange mark fell short
# of its aim: reading signs and the colours of parts do, after all seven courses; the departures tell what was tried.

# %% mystnb={"figure": {"caption": "The shipped model's exam on held-out scenes, with 99 % Wilson intervals.", "name": "fig-exam"}}
results = read_json(root / model / "exam.json")
plots.shares(results);
# %% [markdown]
# A fresh, smaller exam, so that this page measures what it shows:

# %%
stage, code = Stage(run, "pictureworld"), [exam]
params = dict(model=model, exam_scenes=exam_scenes)
if not stage.is_current(params, [root / model], code):
    started = time.monotonic()
    lmm = LMM.load(root / model)
    fresh = exam.report(exam.examine(lmm, exam_scenes, seed=1))
    metrics = {
        f"{family}{suffix}": row[key]
        for family, row in fresh.items()
        for suffix, key in (("", "fraction"), ("_low", "low"), ("_high", "high"))
    }
    stage.finish(params, [root / model], metrics, time.monotonic() - started, code)
fresh = read_json(stage.path("metrics.json"))
for family in results:
    if family in fresh:
        print(
            f"{family:28s} shipped exam {results[family]['fraction']:.3f}   fresh {fresh[family]:.3f} [{fresh[family + '_low']:.3f}, {fresh[family + '_high']:.3f}]"
        )

# %% [markdown]
# Masked scenes, as latents show them, are part of its lessons: *what is shown?*

# %% mystnb={"figure": {"caption": "Masked scenes and what they show.", "name": "fig-masked"}}
masked = [make_masked(HELD_OUT + n) for n in range(12)]
plots.images([m.image for m in masked], [m.shown[1] for m in masked]);
# %% [markdown]
# ## The model that names latents
#
# Notebook 03's explainer is a second model, an Aya Vision: up to five masked images in one prompt, each folded into 36
# tokens, and one answer: what they have in common, or *unable to produce explanations*. It starts from the tower, four layers
# and the words of the model above. First the tower learns to see masked pictures, of 24,000 scenes (6,000 it had learned
# by heart): at every visible patch it is told what the patch shows, and what it made of the same patch in the whole picture.
# Then the projector learns to say in one token what four patches said; then projector and language model learn from *strips*,
# the masked images of one latent: a third drawn from label maps, with patches missing, bleeding over the border and astray,
# the others of real latents, on training scenes, of the SAE of notebook 01 and of notebook 07's at layer 4. What a set shows,
# and whether anything, is said by one rule (`lmm_sae_nb/truth/common_concept.py`), the same that judges explanations. The command is `python
# -m lmm_sae_nb.pictureworld explainer --sae data/artifacts/tiny/attribute/others/layer_4 4`; [departures](../departures) tell
# what was tried before.
#
# How the eye and then the rest learned, on training scenes. From step 1,750 of the eye and 5,200 of the rest on there are four
# times as many scenes, and the hardest kinds come more often; the rest goes on with the better eye:

# %% mystnb={"figure": {"caption": "The explainer learns. Left: visible patches of masked pictures that its eye has right. Right: sets named and sets refused rightly.", "name": "fig-explainer-learning"}}
_, axes = plt.subplots(1, 2, figsize=(8, 2.8))
for ax, course, names in zip(axes, ("eye", "explainer"), (("object", "part", "texture", "face", "word"), ("named", "refused")), strict=True):
    for name in names:
        plots.curve(training_loop.smooth(training_loop.read_log(root / explainer / f"{course}.jsonl")), f"share_{name}", label=name, ax=ax)
    ax.set_ylabel("patches right" if course == "eye" else "sets right")
    ax.legend(frameon=False, fontsize=6)

# %% [markdown]
# Five drawn strips of held-out scenes, and what it says of each:

# %% mystnb={"figure": {"caption": "Sets of masked held-out scenes; above each row the explainer's answer, and in brackets what the rule says.", "name": "fig-explained-sets"}}
held = scenes_of(HELD_OUT + 300, 100)
strips = drawn(held, 5, 5, seed=1)
rows = [masked_images(held, *strip) for strip in zip(*strips, strict=True)]
said = explainer_exam.explain_sets(*explainer_exam.load(root / explainer), rows)
truth = [strips.label(held, n, np.arange(5)) for n in range(len(rows))]
titles = [["", "", f"{a} ({t.concept if t else 'nothing'})", "", ""] for a, t in zip(said, truth, strict=True)]
plots.images(sum(rows, []), sum(titles, []), columns=5);
# %% [markdown]
# Its exam (`exam.json` beside it), on held-out scenes: left, masks drawn from label maps, one set in four with a stranger;
# right, masks of those latents of notebook 01's SAE that it did not learn from (800 of the 1,024 were lessons, on training
# scenes). A row of a kind is the share of sets named exactly right.

# %% mystnb={"figure": {"caption": "The explainer's exam on held-out sets, with 99 % Wilson intervals.", "name": "fig-explainer-exam"}}
_, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for ax, (origin, shares) in zip(axes, read_json(root / explainer / "exam.json").items(), strict=True):
    plots.shares(shares, ax=ax).set_title({"drawn": "drawn masks", "cached": "real latents"}[origin], fontsize=8)

# %% [markdown]
# ## The models that score
#
# Notebook 04 asks two more: a CLIPSeg, where in an image a concept is, and a CLIP, how well a name fits an image. Both began with
# layers of the eye above and learned on training scenes; the commands are `python -m lmm_sae_nb.pictureworld segmenter |
# similarity`. Their exams on held-out scenes (`exam.json` beside each) say what their scores are worth: the CLIPSeg marks
# something in a quarter of the scenes that do not have what it is asked for, and is poor at parts; the CLIP knows scenes,
# materials and colours by a region of them, about half of objects and faces, a quarter of words, one part in 22.

# %% mystnb={"figure": {"caption": "Exams of the two models that score, on held-out scenes, by kind of concept, with 99 % intervals. Left and middle: the CLIPSeg. Right: the CLIP, shown a region with the rest black, among all names of the world but those of what else the region shows.", "name": "fig-sight-exam"}}
sights = [read_json(root / folder / "exam.json") for folder in (segmenter, similarity)]
panels = {"IoU with the true mask": (sights[0], "iou", "asked"), "share of scenes without it in which it is found": (sights[0], "false_alarm", "asked_absent"),
          "share of regions whose name comes first": (sights[1], "named_first", "asked")}  # fmt: skip
_, axes = plt.subplots(1, 3, figsize=(12, 2.9), layout="constrained")
for ax, (title, (rows, name, count)) in zip(axes, panels.items(), strict=True):
    found = {f"{kind} (n={row[count]})": dict(fraction=row[name], low=row[f"{name}_low"], high=row[f"{name}_high"]) for kind, row in rows.items() if name in row}
    plots.shares(found, ax=ax).set_xlabel(title)
# %%
captions = sights[1]["caption"]
for way, told in {"caption_of_image": "the caption of a scene", "image_of_caption": "the scene of a caption"}.items():
    print(f"{told} comes first among {captions['asked']}: {captions[way]:.2f} [{captions[way + '_low']:.2f}, {captions[way + '_high']:.2f}]")

# %% [markdown]
# ## The same world through 32 queries
#
# Notebook 05 compares with an InstructBLIP. As its original, it is a frozen eye, a frozen language model, and a Q-Former
# that learns: 32 queries read the question and gather from the eye's 144 patches what the answer needs. Eye and language model
# are the LLaVA-NeXT's above, number for number. First each query learns to stand for a region of the picture, as the mean of
# its patches as the language model knows them; then it is taught by questions. The command is
# `python -m lmm_sae_nb.pictureworld queries`.
#
# What is lost when 300 picture tokens become 32 (left the learning curve, in answers right on fresh training scenes; right
# the exam on held-out scenes; questions without a picture cannot be asked of this class):

# %% mystnb={"figure": {"caption": "The embedded InstructBLIP. Left: answers right in every word, given the right words before. Right: its exam on held-out scenes, with 99 % Wilson intervals.", "name": "fig-instructblip"}}
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for family in ("describe", "position", "exists", "where", "part", "read"):
    plots.curve(training_loop.smooth(training_loop.read_log(root / instructblip / "queries.jsonl")), f"share_{family}", label=family, ax=left)
left.set_ylabel("answers right")
left.legend(frameon=False, fontsize=6, ncols=2)
plots.shares(read_json(root / instructblip / "exam.json"), ax=right);

# %% [markdown]
# ## What we found
#
# The families whose interval lies left of the orange mark fall short of what was aimed at. The attempts and their numbers
# stand in [Departures](../departures).

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · {model} · {manifest['seconds']:.0f} s · {manifest['versions']}")
