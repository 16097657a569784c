"""Measure many SAEs and methods that are no SAEs, part by part, and write book/panel.json.

The panel is six seeds of notebook 01's SAE, control SAEs, other sizes, and classical dictionaries (`panel_saes`). They
are trained and cached first. Then each part of `PARTS` is measured for each of them. Every result is a file in
`data/artifacts/panel/`, so a command that was stopped goes on where it was; what was made with the present code,
parameters, models and data is not made again. The file is written at the end with what is finished.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
from datasets import load_from_disk
from PIL import Image
from torch import Tensor

from lmm_sae_nb.benchmarks import panel_saes
from lmm_sae_nb.benchmarks.panel_saes import PASSES, SAES, TRAINED, digest, folder_of, page_parameters
from lmm_sae_nb.benchmarks.tasks import Task, do_tasks
from lmm_sae_nb.cache.encode_images import base_states
from lmm_sae_nb.compare import depth
from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.controls import chain, literature
from lmm_sae_nb.controls.chain import PartResult
from lmm_sae_nb.interpret import explain
from lmm_sae_nb.interpret import open as interpret_open
from lmm_sae_nb.interpret.open import Interpreter, open_interpreter
from lmm_sae_nb.measures import absorption, consistency, detection_scoring, modality, monosemanticity, probing
from lmm_sae_nb.measures.absorption import NestedPair
from lmm_sae_nb.measures.detection_scoring import name_cosines
from lmm_sae_nb.measures.image_latents import ImageLatents
from lmm_sae_nb.measures.monosemanticity import concept_vectors
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld.world.concepts import NESTED
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score import latents as score_latents
from lmm_sae_nb.score import tables as score_tables
from lmm_sae_nb.score.similarity import ImageTextSimilarity, open_similarity
from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE, write_panel
from lmm_sae_nb.steer import objects
from lmm_sae_nb.support.files import fingerprint, project_root, read_json, write_json
from lmm_sae_nb.support.images import Remembered, open_images
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.stages import Metrics, code_fingerprints
from lmm_sae_nb.train import evaluate
from lmm_sae_nb.truth import accuracy, detectors
from lmm_sae_nb.truth.label_maps import LabelMaps

COMMAND = "python -m lmm_sae_nb.benchmarks panel"
ABOUT = (
    "The metrics of notebooks 01 to 07, and more, for SAEs of one model that differ in one thing, and of methods that "
    "are no SAEs. A number, or [number, low, high] with the ends of its 99 % interval."
)
MODEL = "model"  # the name under which parts that need no SAE are kept
SIZES = {  # of the panel, where they differ from the notebooks'
    "evaluated": 120, "latents": 300, "clip_runs": 10, "objects": 30, "choosing": 15, "others": 40,
    "decisions": 8, "pairs": 32, "seed": 0,
}  # fmt: skip


# ---- what a part gets -----------------------------------------------------------------------------------------------


@cache
def _images(name: str) -> Remembered:
    return Remembered(open_images(project_root() / name))


@cache
def _labels(name: str) -> LabelMaps:
    return LabelMaps(load_from_disk(project_root() / name), project_root() / page_parameters("03")["concepts"])


@cache
def _similarity():
    return open_similarity(project_root() / page_parameters("04")["similarity"])


@cache
def _heldout_states(model: str) -> Tensor:
    """The states of the held-out images: (images, patches, width), the same for all SAEs of a model."""
    page = page_parameters("01")
    return base_states(panel_saes.load_model(model), page["layer"], _images(page_parameters("03")["heldout"]))


@cache
def _heldout_vectors() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What each held-out image shows, to CLIP and in truth, and its cosines with the name of every concept."""
    name = page_parameters("03")["heldout"]
    images, unseen = _images(name), _labels(name)
    clip = ImageTextSimilarity.load(project_root() / page_parameters("04")["similarity"])
    grid = panel_saes.load_model(TRAINED).grid
    vectors = {"clip": clip.embed(images), "true": concept_vectors(unseen, len(images), grid)}
    return vectors, name_cosines(clip.all_pairs, images, sorted({name for _, name in unseen.names}))


@dataclass(frozen=True)
class Case:
    """What a part measures: an SAE of the panel with its model, or the model alone, and the data.

    name: of the SAE; `MODEL` for a part that needs no SAE.
    part: the part that is measured.
    """

    name: str
    part: str

    @cached_property
    def study(self) -> CachedSAE:
        """The SAE at its layer, with its cache."""
        return panel_saes.cached(self.name)

    @property
    def place(self) -> SAEInPlace:
        return self.study.place

    @property
    def lmm(self) -> LMM:
        """The model of the SAE; that under study for the model alone."""
        return panel_saes.load_model(SAES[self.name].model if self.name in SAES else TRAINED)

    @property
    def layer(self) -> int:
        return page_parameters("01")["layer"]

    @property
    def images(self) -> Remembered:
        """The cached images."""
        return _images(page_parameters("02")["images"])

    @property
    def truth(self) -> LabelMaps:
        """Their label maps."""
        return _labels(page_parameters("02")["images"])

    @property
    def heldout(self) -> Remembered:
        """The images of held-out scenes."""
        return _images(page_parameters("03")["heldout"])

    @property
    def unseen(self) -> LabelMaps:
        """Their label maps."""
        return _labels(page_parameters("03")["heldout"])

    @cached_property
    def heldout_latents(self) -> ImageLatents:
        """The activations on these images."""
        return ImageLatents.of_states(self.place, _heldout_states(SAES[self.name].model))

    @cached_property
    def samples(self) -> Sequence[Mapping]:
        """The held-out rows, with image, question and answer."""
        return load_from_disk(project_root() / page_parameters("01")["heldout"])

    @cached_property
    def interpreter(self) -> Interpreter:
        """The explainer of notebook 03. Its replies are kept with the part."""
        page = page_parameters("03")
        return open_interpreter(
            page["explainer"], page["refiner"], page["labeller"], page["endpoint"], concepts=page["concepts"],
            replies=part_file(self.name, self.part).with_suffix(".replies.jsonl"),
        )  # fmt: skip

    @property
    def exemplars(self) -> dict[str, float]:
        """The settings of exemplars in notebook 03."""
        return {name: page_parameters("03")[name] for name in ("n_top", "threshold", "dim")}

    def rows(self, part: str = "interpret") -> dict[int, dict]:
        """Return the explanations that another part gave; the part must be among `Part.reads`."""
        found = read_json(part_file(self.name, part))["rows"]
        return {int(latent): row for latent, row in found.items()}

    @property
    def seed(self) -> int:
        return SIZES["seed"]


# ---- the parts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the panel.

    measure: measures it for a case.
    uses: modules and functions whose code decides the result. Of a function only its own statements count, of a module
        also what it imports.
    reads: parts whose explanations it reads.
    of_model: it needs no SAE and is measured once.
    """

    measure: Callable[[Case], PartResult | Metrics]
    uses: tuple[ModuleType | Callable, ...]
    reads: tuple[str, ...] = ()
    of_model: bool = False


def _fidelity(case: Case) -> PartResult:
    page = page_parameters("01")
    return chain.fidelity(case.study, case.samples.select(range(SIZES["evaluated"])), kinds=page["kinds"])


def _interpret(case: Case) -> PartResult:
    limit = page_parameters("03")["explainer"]["least_confidence"]
    return chain.interpret(
        case.study, case.images, case.interpreter, case.truth, latents=SIZES["latents"], least_confidence=limit,
        seed=case.seed, **case.exemplars,
    )  # fmt: skip


def _detect(case: Case) -> PartResult:
    return chain.detect(
        case.study, case.images, case.interpreter, case.truth, case.heldout, case.unseen, **case.exemplars
    )


def _score(case: Case) -> PartResult:
    page = page_parameters("04")
    return chain.score(
        case.study, case.images, case.rows(), case.truth, {"ground truth": case.truth}, _similarity(),
        n_top=page["n_top"], threshold=page["threshold"], random_runs=page["random_runs"],
        clip_runs=SIZES["clip_runs"], seed=case.seed,
    )  # fmt: skip


def _steer(case: Case) -> PartResult:
    page = page_parameters("06")["objects"]
    drawn = np.random.default_rng(case.seed).permutation(len(case.images))[: SIZES["others"]]
    return chain.steer(
        case.study, case.rows(), page["question"], Image.new("RGB", (page["size"],) * 2, "white"), page["doses"],
        others=[case.images[int(n)] for n in drawn], count=SIZES["objects"], choosing=SIZES["choosing"],
        kinds=page["kinds"], max_new_tokens=page["max_new_tokens"], seed=case.seed,
    )  # fmt: skip


def _attribute(case: Case) -> PartResult:
    return chain.attribute(case.place, case.samples, decisions=SIZES["decisions"], pairs=SIZES["pairs"], seed=case.seed)


def _probe(case: Case) -> PartResult:
    pairs = [NestedPair(*pair) for pair in NESTED]
    return literature.measure_probes(
        case.study, case.truth, case.heldout_latents, case.unseen, pairs, seed=case.seed
    )  # fmt: skip


def _names(case: Case) -> PartResult:
    return literature.measure_names(
        case.rows(), case.heldout_latents, case.unseen, *_heldout_vectors(), seed=case.seed
    )  # fmt: skip


def _directions(case: Case) -> PartResult:
    other = next(f"seed_{n}" for n in (1, 2) if case.name != f"seed_{n}")  # seed 0 is also that of the controls
    same_model = SAES[case.name].model == TRAINED
    return literature.measure_directions(
        case.study, panel_saes.cached(other) if same_model else None, case.rows(), case.samples, seed=case.seed
    )


# A new part is one more line here.
PARTS: dict[str, Part] = {
    "fidelity": Part(_fidelity, (chain.fidelity, evaluate)),
    "interpret": Part(
        _interpret, (chain.interpret, chain.names_by_kind, explain, interpret_open, accuracy)
    ),
    "detect": Part(_detect, (chain.detect, detectors, explain, interpret_open)),
    "score": Part(_score, (chain.score, score_latents, score_tables), reads=("interpret",)),
    "steer": Part(_steer, (chain.steer, objects), reads=("interpret",)),
    "attribute": Part(_attribute, (chain.attribute, depth)),
    "probe": Part(_probe, (literature.measure_probes, probing, absorption)),
    "names": Part(
        _names, (literature.measure_names, monosemanticity, detection_scoring), reads=("interpret",)
    ),
    "directions": Part(
        _directions, (literature.measure_directions, modality, consistency), reads=("interpret",)
    ),
}  # fmt: skip


@cache
def code_of(part: Part) -> dict[str, str]:
    """Return the hashes of the code that decides a part's result, by name."""
    modules = [each for each in part.uses if isinstance(each, ModuleType)]
    functions = [part.measure, *(each for each in part.uses if not isinstance(each, ModuleType))]
    return code_fingerprints(modules) | {
        f"{each.__module__}.{each.__qualname__}": _statements(each) for each in functions
    }


def _statements(function: Callable) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


# ---- one part of one SAE --------------------------------------------------------------------------------------------


def part_file(sae: str, part: str) -> Path:
    """Return the file of a part's result."""
    return folder_of("parts", sae) / f"{part}.json"


@cache
def inputs() -> dict[str, object]:
    """Return what all parts depend on: the notebooks' parameters, the panel's sizes, and hashes of models and data."""
    pages = {number: page_parameters(number) for number in ("01", "02", "03", "04", "06", "07")}
    used = {
        "01": ("model", "dataset", "heldout", "layer", "n_latents", "k", "steps", "batch_tokens", "lr",
               "dead_after_tokens", "kinds", "accumulate", "mixed_precision"),
        "02": ("images", "n_top", "batch_size", "store"),
        "03": ("heldout", "concepts", "explainer", "refiner", "labeller", "n_top", "threshold", "dim"),
        "04": ("similarity", "n_top", "threshold", "random_runs"),
        "06": ("objects",),
    }  # fmt: skip
    chosen = {number: {name: pages[number][name] for name in names} for number, names in used.items()}
    models = [pages["01"]["model"], pages["03"]["explainer"]["model"], pages["04"]["similarity"]]
    return {
        "pages": chosen, "sizes": SIZES, "saes": {name: panel_saes.described(name) for name in SAES},
        "models": {name: fingerprint(project_root() / name) for name in models},
    }  # fmt: skip


@cache
def _data() -> dict[str, str]:
    names = [page_parameters("02")["images"], page_parameters("03")["heldout"], page_parameters("01")["dataset"]]
    return {name: fingerprint(project_root() / name) for name in names}


def key_of(sae: str, name: str) -> str:
    """Return a hash of everything that decides the result of a part: code, parameters, models, data, and the SAE.

    Raises:
        FileNotFoundError: the SAE is not trained, or a part that it reads is not measured.
    """
    part = PARTS[name]
    weights = "" if part.of_model else fingerprint(panel_saes.sae_folder(sae) / "sae.safetensors")
    shared = {key: value for key, value in inputs().items() if key != "saes"}
    read = {each: read_json(part_file(sae, each))["key"] for each in part.reads}
    return digest({"code": code_of(part), "weights": weights, "inputs": shared, "data": _data(), "reads": read})


def is_done(sae: str, part: str) -> bool:
    """Return whether a part was measured with the present code, parameters, models, data and SAE."""
    try:
        return read_json(part_file(sae, part))["key"] == key_of(sae, part)
    except (FileNotFoundError, KeyError, ValueError):
        return False


def measure(sae: str, part: str) -> None:
    """Measure a part of one SAE and keep the result, unless it is there."""
    if is_done(sae, part):
        return
    key, began = key_of(sae, part), time.process_time()
    result = PARTS[part].measure(Case(sae, part))
    result = result if isinstance(result, PartResult) else PartResult(dict(result))
    seconds = round(time.process_time() - began, 1)
    write_json(part_file(sae, part), {"key": key, "seconds": seconds} | asdict(result))


# ---- the command ----------------------------------------------------------------------------------------------------


def make_tasks(saes: Sequence[str], parts: Sequence[str], *, keep: bool = False) -> dict[str, Task]:
    """Return the tasks of the panel by name: trainings, dictionaries, caches, then the parts.

    All SAEs are trained and cached, also those whose parts are not asked for: they share passes over the model.

    keep: take SAEs and caches as they are on the disk, also those of an earlier version of the code.
    """
    tasks = {} if keep else _making()
    for part in (name for name in PARTS if name in parts):
        for sae in [MODEL] if PARTS[part].of_model else saes:
            model = TRAINED if sae == MODEL else SAES[sae].model
            before = [f"cache {model}", *(f"{each}, {sae}" for each in PARTS[part].reads)]
            tasks[f"{part}, {sae}"] = Task(measure, (sae, part), tuple(name for name in before if name in tasks))
    return tasks


def _making() -> dict[str, Task]:
    """The tasks that make all SAEs and their caches."""
    tasks = {f"train {name}": Task(panel_saes.train, (name,)) for name in PASSES}
    for name in (name for name, member in SAES.items() if not member.trained_in):
        tasks[f"build {name}"] = Task(panel_saes.build, (name,), ("train first",) if name == "random" else ())
    for model in dict.fromkeys(member.model for member in SAES.values()):
        of_model = {name: member for name, member in SAES.items() if member.model == model}
        made = {f"train {one.trained_in}" if one.trained_in else f"build {name}" for name, one in of_model.items()}
        tasks[f"cache {model}"] = Task(panel_saes.cache_all, (model,), tuple(sorted(made)))
    return tasks


def collect(made: dict) -> Panel:
    """Gather what is measured.

    made: date, machine and versions.
    """
    missing, found = [], {}
    for sae in (*SAES, MODEL):
        of_sae = {}
        for part in (each for each in PARTS if PARTS[each].of_model == (sae == MODEL)):
            if is_done(sae, part):
                record = read_json(part_file(sae, part))
                of_sae[part] = MeasuredPart.of(record["metrics"], record["seconds"], record["why"])
            else:
                missing.append(f"{sae}, {part}")
        if of_sae:
            about, group = (SAES[sae].about, SAES[sae].group) if sae in SAES else ("the model, without an SAE", MODEL)
            found[sae] = PanelSAE(about, group, of_sae)
    return Panel(ABOUT, COMMAND, made, inputs(), missing, found)


def run(tasks: Mapping[str, Task], jobs: int) -> dict[str, str]:
    """Do the tasks with a progress bar; return why each failed that did."""
    with progress_bar(total=len(tasks), desc="panel", unit="task") as bar:

        def on_end(name: str, error: Exception | None) -> None:
            bar.update()
            bar.write(f"{time.strftime('%H:%M:%S')} {name}: {error or 'done'}", file=sys.stderr)

        return do_tasks(tasks, jobs, on_end)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's options to a parser."""
    parser.add_argument("--saes", nargs="+", default=list(SAES), choices=SAES, metavar="SAE", help=", ".join(SAES))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--keep", action="store_true", help="take SAEs and caches as they are, also those of earlier code"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes side by side")
    parser.add_argument("--out", type=Path, default=project_root() / "book" / "panel.json")


def main(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        SystemExit: the world is missing, or something failed; what is finished is written.
    """
    from lmm_sae_nb.benchmarks.comparison import circumstances

    if not (project_root() / page_parameters("03")["concepts"]).is_file():
        raise SystemExit("the datasets of Picture World are missing; run `make world` first")
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process
    failed = run(make_tasks(options.saes, options.parts, keep=options.keep), options.jobs)
    write_panel(options.out, collect(circumstances()))
    for name, error in failed.items():
        print(f"{name}: {error}", file=sys.stderr)
    if failed:
        raise SystemExit("something failed; correct the error and run the command again, it goes on where it was")
    print(options.out)
