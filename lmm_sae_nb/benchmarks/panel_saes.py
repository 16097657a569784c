"""The SAEs of the panel: which they are, how each is trained or built, and their caches.

All have the recipe of notebook 01, but for what their `about` says. SAEs that learn from the same tokens in the same
order are trained in one pass over the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from datasets import load_from_disk

from lmm_sae_nb.cache.activations import cache_several
from lmm_sae_nb.cache.encode_images import Pictures
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.controls import dictionaries
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support import notebooks
from lmm_sae_nb.support.files import as_json, fingerprint, project_root, read_json, write_json
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.stages import code_fingerprints
from lmm_sae_nb.train.training import Recipe, train_saes

TRAINED = ""  # the model under study; other models are "untrained" and "untrained_layers"
SAMPLED = 20_000  # tokens from which the classical dictionaries are computed
RANDOM_SEED = 1000  # of the random dictionary; with that of notebook 01 it would have the first rows of its SAE
FIRST = "seed_0"  # the SAE that notebook 01 trains; controls have its size, k and samples


@dataclass(frozen=True)
class Member:
    """An SAE of the panel.

    about: what it is, in a few words.
    group: "seed", "control", "half", "size" or "classical".
    trained_in: the training pass that makes it; "" for a dictionary that is not trained.
    model: TRAINED, "untrained" or "untrained_layers".
    differs: settings of `Recipe` that are not those of notebook 01.
    """

    about: str
    group: str
    trained_in: str = ""
    model: str = TRAINED
    differs: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Pass:
    """A pass over the model's samples, which trains all members that name it.

    seed: of the first weights and of the order of samples.
    part: of the optimiser steps of notebook 01.
    model: as of `Member`.
    """

    seed: int = 0
    part: float = 1.0
    model: str = TRAINED


# the longest comes first
PASSES = {
    "first": Pass(),
    **{f"seed_{seed}": Pass(seed) for seed in range(1, 6)},
    "untrained": Pass(model="untrained"),
    "untrained_layers": Pass(model="untrained_layers"),
    "half": Pass(part=0.5),
}
SAES = {
    FIRST: Member("the recipe of notebook 01, seed 0", "seed", "first"),
    **{f"seed_{n}": Member(f"the recipe of notebook 01, seed {n}", "seed", f"seed_{n}") for n in range(1, 6)},
    "random": Member("random rows, tied encoder", "control"),
    "frozen_decoder": Member(
        "trained encoder, random decoder", "control", "first", differs={"frozen": "decoder"}
    ),
    "frozen_encoder": Member(
        "random encoder, trained decoder", "control", "first", differs={"frozen": "encoder"}
    ),
    "untrained": Member("trained on a model with new weights", "control", "untrained", "untrained"),
    "untrained_layers": Member(
        "trained on a model with new language layers", "control", "untrained_layers", "untrained_layers"
    ),
    "half": Member("half the optimiser steps", "half", "half"),
    "n_256": Member("256 latents", "size", "first", differs={"n_latents": 256}),
    "n_512": Member("512 latents", "size", "first", differs={"n_latents": 512}),
    "n_4096": Member("4,096 latents", "size", "first", differs={"n_latents": 4096}),
    "k_8": Member("k = 8", "size", "first", differs={"k": 8}),
    "k_16": Member("k = 16", "size", "first", differs={"k": 16}),
    "pca": Member("principal components, both signs", "classical"),
    "nmf": Member("non-negative matrix factorisation", "classical"),
}  # fmt: skip


@cache
def page_parameters(number: str) -> dict[str, object]:
    """Return the parameters of a notebook with their defaults.

    number: of the notebook, such as "01".
    """
    (source,) = project_root().glob(f"notebooks/{number}_*.py")
    return {name: each.default for name, each in notebooks.parameters(source).items()}


def folder_of(kind: str, name: str) -> Path:
    """Return a folder of the panel.

    kind: "trained", "built", "caches" or "parts".
    name: of the pass, or of the SAE.
    """
    return project_root() / "data" / "artifacts" / "panel" / kind / name


def sae_folder(name: str) -> Path:
    """Return the folder of a member's weights."""
    trained_in = SAES[name].trained_in
    return folder_of("trained", trained_in) / name if trained_in else folder_of("built", name)


@cache
def load_model(name: str) -> LMM:
    """Return the model under study, or with new weights.

    name: TRAINED, "untrained" or "untrained_layers".
    """
    if name == TRAINED:
        return LMM.load(project_root() / page_parameters("01")["model"])
    return dictionaries.untrained(load_model(TRAINED), 0, keep_eye=name == "untrained_layers")


def place_of(name: str) -> SAEInPlace:
    """Return a member at its layer of its model."""
    sae = TopKSAE.load(sae_folder(name)).requires_grad_(False)
    return SAEInPlace(load_model(SAES[name].model), sae, page_parameters("01")["layer"])


def caches_of(model: str) -> Path:
    """Return the folder with the caches of a model's members; one process at a time works in it."""
    return folder_of("caches", model or "studied")


def cached(name: str) -> CachedSAE:
    """Return a member with its cache."""
    return CachedSAE(place_of(name), LatentCache.load(caches_of(SAES[name].model) / name))


@cache
def pictures() -> Pictures:
    """Return the images that are cached."""
    return open_images(project_root() / page_parameters("02")["images"])


@cache
def samples() -> Sequence[Mapping]:
    """Return the samples that the SAEs learn from."""
    return load_from_disk(project_root() / page_parameters("01")["dataset"])


# ---- what is made ---------------------------------------------------------------------------------------------------


def train(name: str, saes: Sequence[str]) -> None:
    """Train SAEs of one pass; what is finished is only read.

    name: of the pass.
    saes: members of this pass. On a CPU the others of the pass do not change their bits.
    """
    page, one = page_parameters("01"), PASSES[name]
    size = {key: page[key] for key in ("n_latents", "k", "lr")}
    recipes = {sae: Recipe(page["layer"], **size | dict(SAES[sae].differs or {})) for sae in saes}
    names = ("batch_tokens", "buffer_tokens", "repeats", "dead_after_tokens", "kinds", "accumulate", "mixed_precision")
    train_saes(
        load_model(one.model), samples(), recipes, **{key: page[key] for key in names}, seed=one.seed,
        steps=round(one.part * page["steps"]), folder=folder_of("trained", name), checkpoint_minutes=2,
    )  # fmt: skip


def build(name: str) -> None:
    """Build a dictionary that is not trained, unless it is there.

    name: of the member. The random one has the `b_dec` of the first SAE.
    """
    page, folder = page_parameters("01"), folder_of("built", name)
    first = sae_folder(FIRST) / "sae.safetensors"
    key = {
        "code": code_fingerprints([dictionaries]), "page": page, "sampled": SAMPLED,
        "first": fingerprint(first) if name == "random" else "",
        "samples": fingerprint(project_root() / page["dataset"]), "model": fingerprint(project_root() / page["model"]),
    }  # fmt: skip
    record = folder / "key.json"
    if record.is_file() and read_json(record)["key"] == digest(key):
        return
    record.unlink(missing_ok=True)
    if name == "random":
        sae = dictionaries.random_dictionary(TopKSAE.load(first.parent), seed=RANDOM_SEED)
    else:
        lmm, seed = load_model(TRAINED), page["seed"]
        states = dictionaries.sample_states(
            lmm, samples(), page["layer"], SAMPLED, kinds=page["kinds"], seed=seed
        )  # fmt: skip
        if name == "pca":
            sae = dictionaries.principal_components(states, 2 * lmm.width, page["k"])
        else:
            sae = dictionaries.nmf_dictionary(states, page["n_latents"], page["k"], seed=seed)
    sae.save(folder)
    write_json(record, {"key": digest(key)})


def cache_all(model: str, saes: Sequence[str]) -> None:
    """Cache members of one model in one pass over the images; caches that are whole are not made again.

    model: as of `Member`.
    saes: members of this model.
    """
    page = page_parameters("02")
    places = {name: place_of(name) for name in saes}
    cache_several(
        places, pictures(), n_top=page["n_top"], batch_size=page["batch_size"], store=page["store"],
        folder=caches_of(model), save_every=60,
    )  # fmt: skip


def digest(value: object) -> str:
    """Return a hash of a plain value."""
    return hashlib.sha256(as_json(value)).hexdigest()


def described(name: str) -> dict[str, object]:
    """Return what the record says of a member: all of `Member` but None."""
    return {key: value for key, value in asdict(SAES[name]).items() if value is not None}
