"""What the fault campaign disturbs: a small project with everything that the pages write, and how it is made.

A project is a folder with `pyproject.toml`, so that a process that works in it writes nothing elsewhere.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.chat.questions import Question, Reply
from lmm_sae_nb.chat.recorded import Recorded
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent
from lmm_sae_nb.interpret.explain import as_rows, explain_latents
from lmm_sae_nb.interpret.explainers import Vocabulary, explainer
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld.world.scenes import make_scene
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.judges import Judgement, judge_latents, model_judge
from lmm_sae_nb.score.latents import explained_latents
from lmm_sae_nb.score.ratings import append_rating
from lmm_sae_nb.support.files import write_json
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.stages import Stage
from lmm_sae_nb.train.training import train_sae
from lmm_sae_nb.truth.accuracy import other_names

RUN, PICTURES, LAYER = "faults", 12, 1
MODEL = "data/models/tiny-llava-next"
TRAIN = dict(
    n_latents=64, k=4, steps=6, batch_tokens=256, buffer_tokens=512, batch_samples=2, lr=3e-3, seed=3,
    dead_after_tokens=200, log_every=1, checkpoint_minutes=0.0,
)  # fmt: skip
CACHE = dict(n_top=3, batch_size=2, store="float16", save_every=0.0)
CONCEPTS = {"object": ["cat", "dog", "train"], "colour": ["red", "blue"], "scene": ["kitchen"]}
PRESET = {"run": "faults", "seed": 3, "01_train_sae": {"steps": 20, "lr": 0.002, "kinds": ["base", "text"]}}
CLOCK = {"seconds", "tokens_per_second", "crc32"}  # what differs between two undisturbed runs


class Stop(Exception):
    """Ends a run in the middle."""


class KnownChat:
    """A chat whose answers follow from the question; it notes each question in a file before it answers.

    log: the file, a key a line.
    """

    name, identity, answered = "known", "known", True

    def __init__(self, log: Path):
        self._log = log

    def __call__(self, questions: Iterable[Question]) -> Iterator[tuple[int, Reply]]:
        words = [word for names in CONCEPTS.values() for word in names]
        for number, question in enumerate(questions):
            key = question.key(self.identity)
            with self._log.open("a") as log:
                log.write(key + "\n")
            place = int(key, 16)
            text = ("yes", "no")[place % 2] if "one word" in question.text else f"a {words[place % len(words)]}"
            yield number, Reply(text, confidence=0.9)


class CutImages(Sequence):
    """Pictures of which one after the first few cannot be had, as if the process ended there."""

    def __init__(self, images: Sequence, at: int):
        self._images, self._at = images, at

    def __getattr__(self, name: str) -> object:
        return getattr(self._images, name)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> Image.Image:
        if number >= self._at:
            raise Stop
        return self._images[number]


class Usual(NamedTuple):
    """An undisturbed run of a job.

    result: what it makes.
    seconds: how long it takes.
    writes: how often it flushes or renames a file.
    """

    result: object
    seconds: float
    writes: int


@dataclass
class World:
    """A model, samples, and a finished project that nothing has happened to.

    folder: of the project.
    root: the repository, with the shipped models.
    asked: where the questions are noted; outside the folder that is disturbed.
    usual: by job, filled in by `faults_processes`.
    read: what reading each kind of whole file gives, filled in by `faults_files`.
    """

    lmm: LMM
    folder: Path
    samples: list[dict]
    root: Path
    asked: Path
    usual: dict[str, Usual] = field(default_factory=dict)
    read: dict[str, object] = field(default_factory=dict)

    def copy(self, place: Path, *names: str) -> Path:
        """Copy the project, or of it only these files and folders, to a new place.

        A model's files are hard links: delete one before you write another in its place.
        """
        for name in names or [path.name for path in self.folder.iterdir()]:
            source, target = self.folder / name, place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, copy_function=os.link if name == "model" else shutil.copy2)
            else:
                shutil.copy(source, target)
        return begin_project(place)


def begin_project(folder: Path) -> Path:
    """Make an empty project, unless there is one, and work in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").touch()
    os.chdir(folder)
    return folder


def make_world(folder: Path, lmm: LMM, root: Path) -> World:
    """Make the project: pictures, an SAE, half of its training, a cache, half of one, explanations, ratings.

    folder: it is made anew.
    lmm: the model under study.
    root: the repository, with the shipped models.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (begin_project(folder) / "pictures").mkdir()
    pictures = [Image.fromarray(make_scene(number).pixels) for number in range(PICTURES)]
    for number, picture in enumerate(pictures):
        picture.save(folder / "pictures" / f"{number:02d}.{'jpg' if number % 2 else 'png'}")
    samples = [
        {"image": pictures[n] if n % 4 else None, "question": f"what is {n} ?", "answer": "a cat"} for n in range(8)
    ]
    world = World(lmm, folder, samples, root, folder.with_name("asked"))
    save_samples(samples, folder / "samples")
    shutil.copytree(root / MODEL, folder / "model")
    inputs = [folder / name for name in ("samples", "model", "pictures")]
    Stage(RUN, "finished").begin({"seed": 3}, inputs, {}).finish({"made": 1})
    write_json(folder / "concepts.json", CONCEPTS)
    params = {"seed": 3, "steps": 6}
    lesson = {"trained": {"params": params, "inputs": ["data/world"]}, "latents": [1, 5, 7]}
    write_json(folder / "explainer" / "taught.json", {"lessons": [lesson]})
    write_json(folder / "trained" / "manifest.json", {"params": params, "inputs": {"data/world": "hash"}})
    (folder / "preset.yaml").write_text(json.dumps(PRESET))  # JSON is YAML
    for latent, (rater, verdict) in enumerate(itertools.product(("ada", "max"), ("yes", "no", "unsure"))):
        append_rating(folder / "ratings.jsonl", rater, latent, "cat", "object", verdict)
    train(world, folder)
    _ignoring_stop(train, world, folder / "half", after=3)
    cache(world, folder)
    _ignoring_stop(cache, world, folder / "half", until=7)
    explain(world, folder)
    score(world, folder)
    return world


def save_samples(samples: Sequence[dict], folder: Path) -> None:
    """Save samples as a data set, with the bytes of their pictures."""
    features = Features(image=ImageFeature(), question=Value("string"), answer=Value("string"))
    Dataset.from_list(samples, features=features).save_to_disk(folder)


def _ignoring_stop(job: Callable, *arguments, **settings) -> None:
    try:
        job(*arguments, **settings)
    except Stop:
        return
    raise RuntimeError(f"{job.__name__} was to stop in the middle and did not; choose an earlier moment")


# ---- the jobs: each makes something in a project, and goes on where it was -------------------------------------


def train(world: World, place: Path, after: int = 0) -> dict:
    """Train the SAE; return the content of its folder.

    after: stop after this row of the history; 0: do not.
    """

    def on_log(rows: list) -> None:
        if len(rows) == after:
            raise Stop

    train_sae(world.lmm, world.samples, LAYER, folder=place / "train", on_log=on_log, **TRAIN)
    return contents(place / "train")


def cache(world: World, place: Path, until: int = PICTURES) -> dict:
    """Cache the activations; return the content of the cache's folder.

    until: stop before this picture.
    """
    images = open_images(world.folder / "pictures")
    images = images if until >= len(images) else CutImages(images, until)
    cache_activations(_place(world), images, folder=place / "cache", **CACHE)
    return contents(place / "cache")


def explain(world: World, place: Path) -> dict:
    """Explain some latents as page 03 does; return the content of the stage's folder."""
    begin_project(place)
    stage = Stage(RUN, "interpret").begin({"seed": 3}, [], {})
    exemplars = _exemplars(world)
    chat = Recorded(KnownChat(world.asked), stage.path("replies.jsonl"))
    words = Vocabulary(world.folder / "concepts.json")
    ask = explainer(chat, "what do these images have in common ?", least_confidence=0.5)
    rows = stage.result(
        "explanations",
        dict[int, dict],
        lambda: as_rows(explain_latents(exemplars, ask, words.refine, words.label)),
    )
    stage.finish({"explained": sum(row["outcome"] == "explained" for row in rows.values())})
    return contents(stage.folder)


def score(world: World, place: Path) -> dict:
    """Score the explanations with a judge as page 04 does; return the content of the stage's folder."""
    rows = json.loads((world.folder / "data/artifacts" / RUN / "interpret/explanations.json").read_text())
    explained = explained_latents(rows)
    begin_project(place)
    stage = Stage(RUN, "score").begin({"seed": 3}, [], {})
    judge = model_judge(Recorded(KnownChat(world.asked), stage.path("replies.jsonl")))
    verdicts = stage.result(
        "judgements",
        dict[int, Judgement],
        lambda: judge_latents(judge, _exemplars(world), explained, other_names(explained, 0)),
    )
    stage.finish({"judged": len(verdicts)})
    return contents(stage.folder)


def _place(world: World) -> SAEInPlace:
    return SAEInPlace(world.lmm, TopKSAE.load(world.folder / "train"), LAYER)


def _exemplars(world: World) -> ExemplarsByLatent:
    known = LatentCache.load(world.folder / "cache")
    live = np.flatnonzero(known.live.numpy())[:8].tolist()
    return ExemplarsByLatent(known, open_images(world.folder / "pictures"), live, n_top=2)


# ---- comparing -------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, object]:
    """Return every file below a folder by name: JSON without what the clock says, anything else as a hash.

    Of a stage's manifest and of replies only the names count: they have times and the order of the answers.
    """
    return {file.relative_to(folder).as_posix(): _content(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _content(file: Path) -> object:
    if file.name in ("manifest.json", "replies.jsonl"):
        return None
    if file.suffix == ".json":
        return without_clock(json.loads(file.read_bytes()))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def without_clock(value: object) -> object:
    """Return a JSON value without the entries that say how long something took."""
    if isinstance(value, dict):
        return {name: without_clock(each) for name, each in value.items() if name not in CLOCK}
    return [without_clock(each) for each in value] if isinstance(value, list) else value
