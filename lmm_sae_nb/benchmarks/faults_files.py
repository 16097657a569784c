"""Faults of files: every kind of file that is read, cut short, with flipped bits, or with values of other types."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import numpy as np
import pyarrow
from PIL import Image
from safetensors.torch import load_file

from lmm_sae_nb.benchmarks import faults_world as jobs
from lmm_sae_nb.benchmarks.faults_endings import Ending, compare
from lmm_sae_nb.benchmarks.faults_world import CONCEPTS, LAYER, PRESET, RUN, World
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.interpret.explain import latents_in_training
from lmm_sae_nb.interpret.explainers import Vocabulary
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.sample_checks import check_samples, open_samples
from lmm_sae_nb.model.samples import SampleReader
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.ratings import VERDICTS, read_ratings
from lmm_sae_nb.support import presets
from lmm_sae_nb.support.images import UnreadableImage, open_images
from lmm_sae_nb.support.stages import Page, Stage
from lmm_sae_nb.support.tensor_files import hash_of

# ---- damage ----------------------------------------------------------------------------------------------------

STRANGE = (None, "text", "", 3.7, -1, True, 10**30, [], {}, [1], {"a": 1}, float("nan"))  # in place of a value


def damage(file: Path, rng: random.Random) -> str:
    """Damage a file as crashes, disks and editors do; return what was done."""
    data = file.read_bytes()
    ways: list[Callable] = [_cut, _flip, _flip, _flip_early, _zeros, _gone]
    if file.suffix in (".json", ".yaml"):
        ways += [_other_value] * 6
    while True:
        case, damaged = rng.choice(ways)(data, rng)
        if damaged != data:
            break
    file.unlink()
    if damaged is not None:
        file.write_bytes(damaged)
    return f"{file.name}, {case}"


def _cut(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    length = rng.choice((0, rng.randrange(len(data)), len(data) - 1))
    return f"cut to {length} of {len(data)} bytes", data[:length]


def _flip(data: bytes, rng: random.Random, first: int | None = None) -> tuple[str, bytes]:
    place, bit = rng.randrange(min(first or len(data), len(data))), rng.randrange(8)
    return f"bit {bit} of byte {place} flipped", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def _flip_early(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    return _flip(data, rng, first=400)


def _zeros(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    place = rng.randrange(len(data))
    zeros = bytes(min(512, len(data) - place))
    return f"zeros at byte {place}", data[:place] + zeros + data[place + len(zeros) :]


def _gone(data: bytes, rng: random.Random) -> tuple[str, None]:
    return "deleted", None


def _other_value(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Put something else in the place of one value of a JSON file, or leave the value out."""
    value = json.loads(data)
    path = rng.choice(list(_places(value)))
    within = value
    for step in path[:-1]:
        within = within[step]
    name = ".".join(map(str, path))
    if isinstance(within, dict) and rng.random() < 0.2:
        del within[path[-1]]
        return f"without {name}", json.dumps(value).encode()
    within[path[-1]] = new = copy.deepcopy(rng.choice(STRANGE))
    return f"{name} is {new!r}", json.dumps(value).encode()


def _places(value: object, path: tuple = ()) -> Iterator[tuple]:
    for name, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, name)
        if isinstance(each, dict | list):
            yield from _places(each, (*path, name))


# ---- what reads the files --------------------------------------------------------------------------------------


class Read(NamedTuple):
    """A kind of file and how it is read.

    needs: what of the project is copied; the files are below it.
    files: a pattern of the files to damage.
    read: called with world and project; returns something that can be compared.
    tries: how many attempts make a campaign; fewer where reading takes a second.
    valid: whether a user could have written this file, and what reading it should then give, found without the code
        under test; None if only this package writes such files.
    """

    needs: tuple[str, ...]
    files: str
    read: Callable[[World, Path], object]
    tries: int
    valid: Callable[[World, Path], tuple[bool, object]] | None = None


def damaged(name: str, world: World, place: Path, seed: int) -> Ending:
    """Damage a file and read it: a clear error, the usual result, or, where a user writes the file, what it says."""
    kind, rng = READS[name], random.Random(f"{name} {seed}")
    project = world.copy(place / "project", *kind.needs)
    file = rng.choice(sorted(path for path in project.glob(kind.files) if path.is_file()))
    usual = _usual(name, world)
    os.chdir(project)
    case = damage(file, rng)
    before = file.read_bytes() if file.is_file() else None
    names = [file.name, *(str(folder) for folder in file.parents if project in folder.parents)]
    if kind.valid:
        is_valid, wanted = kind.valid(world, file)
        if is_valid:
            ending = compare(case, lambda: kind.read(world, project), wanted, names)
            same = ending.ending == "as usual"
            return ending._replace(ending="harmless" if wanted == usual else "another valid file") if same else ending
    ending = compare(case, lambda: kind.read(world, project), usual, names)
    if ending.ending == "as usual":
        after = file.read_bytes() if file.is_file() else None
        return ending._replace(ending="harmless" if before == after else "made again")
    return ending


def _usual(name: str, world: World) -> object:
    """What reading the whole file gives; known after the first time."""
    if name not in world.read:
        place = world.folder.parent / f"usual {name}"
        shutil.rmtree(place, ignore_errors=True)
        world.read[name] = READS[name].read(world, world.copy(place, *READS[name].needs))
    return world.read[name]


def _resume_training(world: World, project: Path) -> object:
    return jobs.train(world, project / "half")


def _resume_caching(world: World, project: Path) -> object:
    return jobs.cache(world, project / "half")


def _train_again(world: World, project: Path) -> object:
    jobs.train(world, project)
    return _load_sae(world, project), json.loads((project / "train" / "history.json").read_text())["rows"][-1]["fvu"]


def _load_sae(world: World, project: Path) -> object:
    """As page 02 does."""
    sae = SAEInPlace(world.lmm, TopKSAE.load(project / "train"), LAYER).sae
    return sae.k, {name: weights.numpy().tobytes() for name, weights in sae.state_dict().items()}


def _cache_again(world: World, project: Path) -> object:
    jobs.cache(world, project)
    return _load_cache(world, project)


def _load_cache(world: World, project: Path) -> object:
    """As page 03 does: look up every latent and every image."""
    known = LatentCache.load(project / "cache")
    rows = [known.top(latent) for latent in range(known.n_latents)]
    maps = [known.patch_map(latent, 0).numpy().tobytes() for latent in range(known.n_latents)]
    store = [[part.tobytes() for part in known.store.image(number)] for number in range(known.images)]
    statistics = [getattr(known, name).numpy().tobytes() for name in ("frequency", "mean", "max", "top_images")]
    return rows, maps, store, statistics, known.images, known.layer, known.grid


def _explain_again(world: World, project: Path) -> object:
    return jobs.explain(world, project)


def _explanations(world: World, project: Path) -> object:
    """As page 04 does."""
    return Page({"run": RUN}).read("interpret", "explanations", dict[int, dict])


def _ratings(world: World, project: Path) -> object:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return read_ratings(project / "ratings.jsonl"), any("ratings.jsonl" in str(each.message) for each in caught)


def _concepts(world: World, project: Path) -> object:
    words = Vocabulary(project / "concepts.json")
    names = sorted({name for known in CONCEPTS.values() for name in known})
    return words.label(names), [tuple(answer) for answer in words.refine([f"A {name}." for name in names])]


def _lessons(world: World, project: Path) -> object:
    return sorted(latents_in_training(project / "explainer", project / "trained"))


def _preset(world: World, project: Path) -> object:
    return presets.preset(project / "preset.yaml")["01_train_sae"]


def _pictures(world: World, project: Path) -> object:
    images = open_images(project / "pictures")
    return {number: images[number].tobytes() for number in range(len(images))}


def _samples(world: World, project: Path) -> object:
    """As page 01 does: every sample that can be read, by number, and which cannot."""
    samples = open_samples(project / "samples")
    check_samples(samples, world.lmm)
    reader, rows = SampleReader(samples), {}
    for number in range(len(reader)):
        try:
            row = reader[number]
        except UnreadableImage as fault:  # it names the sample
            rows[number] = "unreadable" if f"sample {number}" in str(fault) else "unnamed"
        else:
            rows[number] = (row["image"] and row["image"].tobytes(), row["question"], row["answer"])
    return rows


def _model(world: World, project: Path) -> object:
    return {hash_of([weights]) for weights in LMM.load(project / "model").model.parameters()}


def changed_input(name: str, world: World, place: Path, seed: int) -> Ending:
    """Damage an input of a finished stage: the stage does not count as current, whatever the file now says."""
    rng = random.Random(f"changed {name} {seed}")
    project = world.copy(place / "project", "samples", "model", "pictures", f"data/artifacts/{RUN}/finished")
    file = rng.choice(sorted(path for path in (project / name).rglob("*") if path.is_file()))
    os.chdir(project)
    case = damage(file, rng)
    inputs = [project / each for each in ("samples", "model", "pictures")]
    if Stage(RUN, "finished").holds() or Stage(RUN, "finished").begin({"seed": 3}, inputs, {}).is_current:
        return Ending(case, "another result", "the stage still counts as current")
    return Ending(case, "made again")


# ---- what a file says, read without the code under test --------------------------------------------------------


def _plain_json(file: Path) -> object:
    """The value of a JSON file; None if it is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(file.read_bytes().decode())
    return None


def _valid_ratings(world: World, file: Path) -> tuple[bool, object]:
    """Every line that holds an answer counts, and a warning names others, but for a last one that was cut short."""
    lines, kept, warned = file.read_bytes().split(b"\n") if file.is_file() else [], {}, False
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
            texts = [row[name] for name in ("rater", "concept", "verdict", "time")]
            is_row = all(isinstance(text, str) for text in texts) and isinstance(row["kind"], str | None)
            is_row = is_row and type(row["latent"]) is int and row["verdict"] in (*VERDICTS, "undone")
        except (ValueError, KeyError, TypeError):
            is_row = False
        if is_row:
            row = {
                name: each.replace("\x7f", "\ufffd") if isinstance(each, str) else each for name, each in row.items()
            }
            kept[row["rater"], row["latent"], row["concept"]] = row
        else:
            warned |= bool(line.strip()) and number < len(lines)
    return True, ([row for row in kept.values() if row["verdict"] != "undone"], warned)


def _valid_concepts(world: World, file: Path) -> tuple[bool, object]:
    value = _plain_json(file)
    lists = list(value.values()) if isinstance(value, dict) else [None]
    if not lists or not all(isinstance(names, list) and names for names in lists):
        return False, None
    if not all(isinstance(name, str) and name.strip() for names in lists for name in names):
        return False, None
    kinds = {}
    for kind, names in value.items():
        for name in names:
            kinds.setdefault(name.lower(), kind)
    asked = sorted({name for known in CONCEPTS.values() for name in known})
    answers = [
        ("explained", name, f"A {name}.", None) if name in kinds else ("unparseable", None, f"A {name}.", None)
        for name in asked
    ]
    return True, ([kinds.get(name) for name in asked], answers)


def _valid_lessons(world: World, file: Path) -> tuple[bool, object]:
    if not file.is_file():
        return True, []
    value = _plain_json(file)
    lessons = value.get("lessons") if isinstance(value, dict) else None
    if not isinstance(lessons, list) or not all(isinstance(lesson, dict) for lesson in lessons):
        return False, None
    latents = set()
    for lesson in lessons:
        trained, numbers = lesson.get("trained", 0), lesson.get("latents")
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            return False, None
        if trained is None:
            continue
        if not isinstance(trained, dict) or not isinstance(trained.get("params"), dict):
            return False, None
        inputs = trained.get("inputs")
        if not isinstance(inputs, list) or not all(isinstance(name, str) for name in inputs):
            return False, None
        same = {"seed": 3, "steps": 6}.items()
        if inputs == ["data/world"] and all((name, each) in same for name, each in trained["params"].items()):
            latents.update(numbers)
    return True, sorted(latents)


def _valid_preset(world: World, file: Path) -> tuple[bool, object]:
    """A preset of the same names and types is valid; which notebook gets what is known for this one preset.

    In a text's place, a number or a word such as `no` is the text as it is written.
    """
    import yaml

    if not file.is_file():
        return False, None
    try:
        value = yaml.safe_load(file.read_bytes().decode())
    except (ValueError, yaml.YAMLError, RecursionError):
        return False, None
    value = {} if value is None else value  # an empty file gives nothing
    if not isinstance(value, dict) or not set(value) <= set(PRESET):
        return False, None
    own = value.get("01_train_sae") or {}
    if not isinstance(own, dict) or not set(own) <= set(PRESET["01_train_sae"]):
        return False, None
    types = {"run": (str,), "seed": (int,), "steps": (int,), "lr": (int, float), "kinds": (list,)}
    given = {name: each for name, each in value.items() if name != "01_train_sae"} | own
    node = yaml.compose(file.read_bytes().decode())
    for name, part in (_entries(node) | _entries(_entries(node).get("01_train_sae"))).items():
        if name == "run" and not isinstance(given["run"], NoneType | list | dict):
            given["run"] = part.value
        if name == "kinds" and isinstance(given["kinds"], list):
            given["kinds"] = [
                each if isinstance(each, NoneType | list | dict) else item.value
                for each, item in zip(given["kinds"], part.value, strict=True)
            ]
    if not all(type(each) in types[name] for name, each in given.items()):
        return False, None
    is_folder = Path(given.get("run", "a")).name == given.get("run", "a")
    if not is_folder or not all(isinstance(kind, str) for kind in given.get("kinds", [])):
        return False, None
    return math.isfinite(given.get("lr", 1)), given


def _entries(node) -> dict:
    """The nodes of a YAML mapping by name; none of anything else."""
    return {name.value: part for name, part in node.value} if node is not None and node.tag.endswith(":map") else {}


def _valid_pictures(world: World, file: Path) -> tuple[bool, object]:
    """A picture that Pillow opens without an error is another picture; nobody can know more."""
    pixels = {path.name: _pixels(path) for path in sorted(file.parent.iterdir())}
    return None not in pixels.values(), dict(enumerate(pixels.values()))


def _valid_samples(world: World, file: Path) -> tuple[bool, object]:
    """Tables that pyarrow finds whole, with the same columns, are another data set; a picture may be unreadable."""
    if file.suffix != ".arrow" or not file.is_file():
        return False, None
    try:
        with pyarrow.memory_map(str(file)) as source:
            table = pyarrow.ipc.open_stream(source).read_all()
        table.validate(full=True)
        rows = table.to_pylist()
        known = {
            number: (
                row["image"] and (_pixels(io.BytesIO(row["image"]["bytes"])) or "unreadable"),
                row["question"],
                row["answer"],
            )
            for number, row in enumerate(rows)
        }
    except Exception:  # whatever is wrong with it
        return False, None
    if not all(isinstance(text, str) for row in known.values() for text in row[1:]):
        return False, None
    return True, {number: row[0] if row[0] == "unreadable" else row for number, row in known.items()}


def _valid_model(world: World, file: Path) -> tuple[bool, object]:
    """Weights that safetensors reads, of the same names and shapes, are those of another model."""
    if file.suffix != ".safetensors" or not file.is_file():
        return False, None
    try:
        weights = load_file(file)
    except Exception:  # whatever is wrong with it
        return False, None
    usual = load_file(world.folder / "model" / file.name)
    if {name: each.shape for name, each in weights.items()} != {name: each.shape for name, each in usual.items()}:
        return False, None
    return True, {hash_of([each.float()]) for each in weights.values()}


def _pixels(file: Path | io.BytesIO) -> bytes | None:
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB")).tobytes()
    except Exception:
        return None


INTERPRET = f"data/artifacts/{RUN}/interpret"
READS = {
    "checkpoint": Read(("half/train",), "half/train/checkpoint/*/*", _resume_training, 150),
    "state of a pass": Read(("half/cache",), "half/cache/.partial/**/*", _resume_caching, 120),
    "finished training": Read(("train",), "train/*", _train_again, 120),
    "SAE": Read(("train",), "train/*", _load_sae, 300),
    "finished cache": Read(("cache",), "cache/**/*", _cache_again, 120),
    "cache": Read(("cache",), "cache/**/*", _load_cache, 300),
    "replies": Read((f"{INTERPRET}/replies.jsonl",), f"{INTERPRET}/replies.jsonl", _explain_again, 200),
    "finished stage": Read((INTERPRET,), f"{INTERPRET}/*.json", _explain_again, 200),
    "explanations": Read((INTERPRET,), f"{INTERPRET}/explanations.json", _explanations, 300),
    "metrics": Read((INTERPRET,), f"{INTERPRET}/metrics.json", _explain_again, 200),
    "ratings": Read(("ratings.jsonl",), "ratings.jsonl", _ratings, 300, _valid_ratings),
    "concepts": Read(("concepts.json",), "concepts.json", _concepts, 300, _valid_concepts),
    "taught.json": Read(("explainer", "trained"), "explainer/taught.json", _lessons, 300, _valid_lessons),
    "preset": Read(("preset.yaml",), "preset.yaml", _preset, 300, _valid_preset),
    "data set": Read(("samples",), "samples/*", _samples, 300, _valid_samples),
    "model": Read(("model",), "model/*.[js]*[ns]", _model, 150, _valid_model),
    "pictures": Read(("pictures",), "pictures/*", _pictures, 300, _valid_pictures),
}
KINDS = {
    f"damaged file, {name}": (partial(damaged, name), kind.tries, f"{kind.files}: cut, flipped, with other values")
    for name, kind in READS.items()
}
KINDS |= {
    f"changed input, {name}": (
        partial(changed_input, folder), 150, f"{folder}/ of a finished stage: cut, flipped, with other values"
    )
    for name, folder in (("data set", "samples"), ("model", "model"), ("pictures", "pictures"))
}  # fmt: skip
