"""The parts of the panel: what is measured for each SAE, and once for the model. A new part is a line of `PARTS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
from datasets import load_from_disk
from PIL import Image

from lmm_sae_nb.benchmarks import panel_saes
from lmm_sae_nb.benchmarks.panel_saes import FIRST, SAES, TRAINED, folder_of, page_parameters
from lmm_sae_nb.cache.encode_images import base_states
from lmm_sae_nb.compare import depth
from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.controls import chain, direction_steering, directions, kind_steering
from lmm_sae_nb.controls.chain import PartResult
from lmm_sae_nb.interpret import explain
from lmm_sae_nb.interpret import open as interpret_open
from lmm_sae_nb.interpret.explainers import Vocabulary
from lmm_sae_nb.interpret.open import Interpreter, open_interpreter
from lmm_sae_nb.measures import (
    absorption,
    consistency,
    detection_scoring,
    image_latents,
    modality,
    monosemanticity,
    probing,
    selectivity,
)
from lmm_sae_nb.measures.image_latents import ImageLatents
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld.world import pairs, questions
from lmm_sae_nb.pictureworld.world.concepts import NESTED
from lmm_sae_nb.pictureworld.world.questions import FOR_KIND
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score import latents as score_latents
from lmm_sae_nb.score import tables as score_tables
from lmm_sae_nb.score.latents import explained_latents
from lmm_sae_nb.score.scores import Explained
from lmm_sae_nb.score.similarity import ImageTextSimilarity
from lmm_sae_nb.steer import explain as steer_explain
from lmm_sae_nb.steer import objects
from lmm_sae_nb.steer.objects import SteeredQuestion
from lmm_sae_nb.steer.steering import Scope
from lmm_sae_nb.support.files import project_root, read_json
from lmm_sae_nb.support.images import Remembered, open_images
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.train import evaluate
from lmm_sae_nb.truth import accuracy, detectors
from lmm_sae_nb.truth.label_maps import LabelMaps

MODEL = "model"  # the name under which parts that need no SAE are kept
SIZES = {  # of the panel, where they differ from the notebooks'
    "evaluated": 120, "latents": 300, "scored": 150, "clip_runs": 10, "objects": 30, "choosing": 15, "others": 40,
    "decisions": 8, "pairs": 32, "clamped": 60, "naming_dose": 16.0, "seed": 0,
    "of_kind": {"doses": [4, 16, 64], "count": 12, "choosing": 6}, "others_of_kind": 20,
}  # fmt: skip
CONTROLS = ("random", "frozen_decoder", "frozen_encoder", "untrained", "untrained_layers")
STEERED_TO_KINDS = (*(f"seed_{seed}" for seed in range(6)), *CONTROLS, "pca", "nmf")


# ---- what a part gets -----------------------------------------------------------------------------------------------


@cache
def _images(name: str) -> Remembered:
    return Remembered(open_images(project_root() / name))


@cache
def _labels(name: str) -> LabelMaps:
    return LabelMaps(load_from_disk(project_root() / name), project_root() / page_parameters("03")["concepts"])


@cache
def _similarity() -> ImageTextSimilarity:
    return ImageTextSimilarity.load(project_root() / page_parameters("04")["similarity"])


@cache
def _heldout_states(model: str):
    heldout = _images(page_parameters("03")["heldout"])
    return base_states(panel_saes.load_model(model), page_parameters("01")["layer"], heldout)


@cache
def _pairs() -> list[pairs.Pair]:
    return pairs.make_pairs()


@cache
def _pair_states(model: str):
    lmm, layer = panel_saes.load_model(model), page_parameters("01")["layer"]
    return base_states(lmm, layer, selectivity.images_of(_pairs()))


@lru_cache(1)
def _latents(name: str) -> tuple[ImageLatents, ImageLatents]:
    study = panel_saes.cached(name)
    held = ImageLatents.of_states(study.place, _heldout_states(SAES[name].model))
    return ImageLatents.of_cache(study.cache), held


@cache
def _embedded_heldout():
    return _similarity().embed(_images(page_parameters("03")["heldout"]))


@cache
def _name_cosines() -> dict:
    names = sorted({name for _, name in _labels(page_parameters("03")["heldout"]).names})
    heldout = _images(page_parameters("03")["heldout"])
    return detection_scoring.name_cosines(_similarity().all_pairs, heldout, names)


@cache
def _asked(model: str) -> dict[str, SteeredQuestion | None]:
    """The question of each kind of concept about a white image, None where there is none."""
    page, images = page_parameters("06")["objects"], _images(page_parameters("02")["images"])
    white = Image.new("RGB", (page["size"],) * 2, "white")
    drawn = np.random.default_rng(SIZES["seed"]).permutation(len(images))[: SIZES["others_of_kind"]].tolist()
    others = [images[n] for n in drawn]
    how = dict(batch=20, max_new_tokens=page["max_new_tokens"])
    return {
        kind: SteeredQuestion(panel_saes.load_model(model), text, white, others, **how) if text else None
        for kind, text in FOR_KIND.items()
    }


@dataclass(frozen=True)
class PanelCase:
    """What a part measures: an SAE of the panel with its model, or the model alone, and the data.

    name: of the SAE; `MODEL` for a part that needs no SAE.
    part: the part that is measured.
    """

    name: str
    part: str

    @cached_property
    def study(self) -> CachedSAE:
        """The SAE at its layer, with its cache; the first SAE for the model alone."""
        return panel_saes.cached(FIRST if self.name == MODEL else self.name)

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
        found = read_json(part_file(FIRST if self.name == MODEL else self.name, part))["rows"]
        return {int(latent): row for latent, row in found.items()}

    @property
    def explained(self) -> dict[int, Explained]:
        """The latents with a name that the world knows; ValueError if there are fewer than two."""
        return explained_latents(self.rows(), self.truth)

    @property
    def cached_latents(self) -> ImageLatents:
        """The activations of all latents on the cached images."""
        return _latents(self.name)[0]

    @property
    def heldout_latents(self) -> ImageLatents:
        """The activations of all latents on the held-out images."""
        return _latents(self.name)[1]

    @property
    def seed(self) -> int:
        return SIZES["seed"]


def part_file(sae: str, part: str) -> Path:
    """Return the file of a part's result."""
    return folder_of("parts", sae) / f"{part}.json"


# ---- the parts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the panel.

    measure: measures it for a case.
    uses: modules and functions whose code decides the result. Of a function only its own statements count, of a module
        also what it imports.
    reads: parts whose explanations it reads.
    of_model: it is of the model and is measured once. If it compares with an SAE, that is the first one.
    saes: names of the SAEs that it is measured for; all if empty.
    other: tells from an SAE's name which second SAE it is compared with.
    """

    measure: Callable[[PanelCase], PartResult | Metrics]
    uses: tuple[ModuleType | Callable, ...]
    reads: tuple[str, ...] = ()
    of_model: bool = False
    saes: tuple[str, ...] = ()
    other: Callable[[str], str] | None = None

    def is_for(self, sae: str) -> bool:
        """Return whether the part is measured for an SAE of the panel, or for `MODEL`."""
        if self.of_model or sae == MODEL:
            return self.of_model and sae == MODEL
        return not self.saes or sae in self.saes


def _fidelity(case: PanelCase) -> PartResult:
    page = page_parameters("01")
    return chain.fidelity(case.study, case.samples.select(range(SIZES["evaluated"])), kinds=page["kinds"])


def _interpret(case: PanelCase) -> PartResult:
    limit = page_parameters("03")["explainer"]["least_confidence"]
    return chain.interpret(
        case.study, case.images, case.interpreter, case.truth, latents=SIZES["latents"], least_confidence=limit,
        seed=case.seed, **case.exemplars,
    )  # fmt: skip


def _detect(case: PanelCase) -> PartResult:
    return chain.detect(
        case.study, case.images, case.interpreter, case.truth, case.heldout, case.unseen, **case.exemplars
    )


def _score(case: PanelCase) -> PartResult:
    page = page_parameters("04")
    return chain.score(
        case.study, case.images, case.rows(), case.truth, {"ground truth": case.truth}, _similarity().all_pairs,
        n_top=page["n_top"], threshold=page["threshold"], random_runs=page["random_runs"],
        clip_runs=SIZES["clip_runs"], seed=case.seed,
    )  # fmt: skip


def _steer(case: PanelCase, doses: Sequence[float] = ()) -> PartResult:
    page = page_parameters("06")["objects"]
    drawn = np.random.default_rng(case.seed).permutation(len(case.images))[: SIZES["others"]]
    white = Image.new("RGB", (page["size"],) * 2, "white")
    return chain.steer(
        case.study, case.rows(), page["question"], white, doses or page["doses"],
        others=[case.images[int(n)] for n in drawn], count=SIZES["objects"], choosing=SIZES["choosing"],
        kinds=page["kinds"], max_new_tokens=page["max_new_tokens"], seed=case.seed,
    )  # fmt: skip


def _steer_highest(case: PanelCase) -> PartResult:
    """Steer at the highest dose alone: where no dose names anything, `_steer` takes the lowest."""
    return _steer(case, page_parameters("06")["objects"]["doses"][-1:])


def _steer_kinds(case: PanelCase) -> PartResult:
    asked, scope = _asked(SAES[case.name].model), Scope(tuple(page_parameters("06")["objects"]["kinds"]))
    return kind_steering.steer_kinds(
        case.study, case.rows(), asked, scope=scope, seed=case.seed, **SIZES["of_kind"]
    )  # fmt: skip


def _attribute(case: PanelCase) -> PartResult:
    return chain.attribute(case.place, case.samples, decisions=SIZES["decisions"], pairs=SIZES["pairs"], seed=case.seed)


# Measures of the literature. Where a case gives too little, the error says what is missing.


def _with_explained(case: PanelCase) -> dict[int, Explained] | None:
    try:
        return case.explained
    except ValueError:
        return None


def _monosemanticity(case: PanelCase) -> Metrics:
    truth, grid = case.unseen, case.lmm.grid
    vectors = {
        "clip": _embedded_heldout(), "true": monosemanticity.concept_vectors(truth, len(case.heldout), grid),
    }  # fmt: skip
    return monosemanticity.monosemanticity(case.heldout_latents, vectors, _with_explained(case), seed=case.seed)


def _detection_scoring(case: PanelCase) -> Metrics:
    return detection_scoring.detection_scoring(
        case.heldout_latents, case.explained, case.unseen, _name_cosines(), seed=case.seed
    )


def _probing(case: PanelCase) -> Metrics:
    return probing.probing(case.cached_latents, case.truth, case.heldout_latents, case.unseen, seed=case.seed)


def _absorption(case: PanelCase) -> Metrics:
    return absorption.absorption(
        case.place.sae, case.cached_latents, case.truth, case.heldout_latents, case.unseen,
        [absorption.NestedPair(*pair) for pair in NESTED],
    )  # fmt: skip


def _modality(case: PanelCase) -> Metrics:
    return modality.modality(case.place, case.samples, _with_explained(case))


def _other_seed(sae: str) -> str:
    """Return an SAE of another seed, because SAEs of one seed share their starts."""
    return "seed_2" if sae == "seed_1" else "seed_1"


def _consistency(case: PanelCase) -> Metrics:
    if SAES[case.name].model != TRAINED:
        raise ValueError("the panel has one SAE of this model; directions of another model are no comparison")
    other = panel_saes.cached(_other_seed(case.name))
    return consistency.consistency(
        case.place, case.study.cache.live, other.place, other.cache.live, _with_explained(case), seed=case.seed
    )


def _selectivity(case: PanelCase) -> Metrics:
    states = _pair_states(SAES[case.name].model)
    return selectivity.measure_selectivity(case.place, _pairs(), case.rows(), states=states, seed=case.seed)


def _steering_names(case: PanelCase) -> Metrics:
    page, words = page_parameters("06")["objects"], Vocabulary(project_root() / page_parameters("03")["concepts"])
    white = Image.new("RGB", (page["size"],) * 2, "white")
    return steer_explain.measure_steering_explanations(
        case.place, case.study.cache, case.rows(), page["question"], white, SIZES["naming_dose"], words.find,
        words.label, latents=SIZES["clamped"], scope=Scope(tuple(page["kinds"])), seed=case.seed,
    )  # fmt: skip


# Methods that are no SAEs.


def _direction_detection(case: PanelCase) -> Metrics:
    return directions.detection_baselines(case.study, case.images, case.truth, case.heldout, case.unseen)


def _direction_steering(case: PanelCase) -> Metrics:
    rows = case.rows("detect") | case.rows()
    names = {n: row["concept"] for n, row in rows.items() if row["concept"] and row["kind"] == "object"}
    return direction_steering.steering_baselines(case.study, names, case.images, case.truth, seed=case.seed)


def _direction_kinds(case: PanelCase) -> PartResult:
    rows, names = case.rows("detect") | case.rows(), {}
    for latent, row in rows.items():
        if row["concept"]:
            names.setdefault(row["kind"], {})[latent] = row["concept"]
    return kind_steering.kind_baselines(
        case.study, names, case.images, case.truth, _asked(TRAINED), seed=case.seed, **SIZES["of_kind"]
    )  # fmt: skip


# A new part is one more line here.
PARTS: dict[str, Part] = {
    "fidelity": Part(_fidelity, (chain.fidelity, evaluate)),
    "interpret": Part(
        _interpret, (chain.interpret, chain.names_by_kind, explain, interpret_open, accuracy)
    ),
    "monosemanticity": Part(_monosemanticity, (monosemanticity, image_latents), ("interpret",)),
    "detection_scoring": Part(_detection_scoring, (detection_scoring, image_latents), ("interpret",)),
    "probing": Part(_probing, (probing, image_latents)),
    "absorption": Part(_absorption, (absorption, image_latents)),
    "modality": Part(_modality, (modality,), ("interpret",)),
    "consistency": Part(_consistency, (consistency,), ("interpret",), other=_other_seed),
    "selectivity": Part(_selectivity, (selectivity, pairs), ("interpret",)),
    "detect": Part(_detect, (chain.detect, detectors, explain, interpret_open)),
    "steer": Part(_steer, (chain.steer, objects), reads=("interpret",)),
    "steer_highest": Part(_steer_highest, (chain.steer, objects), ("interpret",), saes=CONTROLS),
    "attribute": Part(_attribute, (chain.attribute, depth)),
    "steering_names": Part(_steering_names, (steer_explain,), ("interpret",)),
    "steer_kinds": Part(_steer_kinds, (kind_steering, objects, questions), ("interpret",), saes=STEERED_TO_KINDS),
    "direction_detection": Part(_direction_detection, (directions,), of_model=True),
    "direction_steering": Part(_direction_steering, (direction_steering,), ("interpret", "detect"), of_model=True),
    "direction_kinds": Part(
        _direction_kinds, (kind_steering, direction_steering, questions), ("interpret", "detect"), of_model=True
    ),
    "score": Part(_score, (chain.score, score_latents, score_tables), reads=("interpret",)),
}  # fmt: skip
