"""Predict the memory of one GPU on every page of a preset, and the hours of the pages whose work is known before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from lmm_sae_nb.full_scale.costs import (
    ASSUMPTIONS,
    TOPK_BYTES,
    Assumptions,
    Device,
    StageCost,
    cache_cost,
    sae_bytes,
    train_cost,
)
from lmm_sae_nb.full_scale.models import activation_bytes, count_parameters, image_layout, meta_model, width_of
from lmm_sae_nb.full_scale.presets import preset_costs
from lmm_sae_nb.model.hookpoints import Hookpoint, in_order, layers_below

Needs = dict[str, float]  # bytes, by what needs them

PARAMETERS = {  # of models that no page of A3 builds, as their hub pages say
    "Salesforce/instructblip-vicuna-7b": 7.91e9,
    "facebook/sam-vit-huge": 0.641e9,
    "IDEA-Research/grounding-dino-base": 0.233e9,
    "openai/clip-vit-base-patch32": 0.151e9,
}
SAM_BATCH = 16 * 3.0e8  # bytes of 16 boxes on one picture of 1024 x 1024 px, and of its global attention
BESIDE = 20  # answers that run side by side on pages 06 and 08


class Scale(NamedTuple):
    """What the pages of a preset have in common.

    preset: of `read_preset`.
    lmm: the model under study, without weights.
    size: bytes of a number, as pages 01 to 06 load the model.
    """

    preset: Mapping[str, Mapping]
    lmm: PreTrainedModel
    size: int
    gpus: int
    assumptions: Assumptions

    @property
    def train(self) -> Mapping:
        """The parameters of page 01."""
        return self.preset["01_train_sae"]

    @property
    def sae(self) -> float:
        """The bytes of page 01's SAE."""
        return sae_bytes(width_of(self.lmm), self.train["n_latents"])

    @property
    def sample(self) -> int:
        """The tokens of an image with its question."""
        return image_layout(self.lmm, self.assumptions.image).tokens + self.assumptions.text_tokens

    def model(self, size: int | None = None) -> float:
        """Return the bytes of the model under study.

        size: bytes of a number; by default as it was loaded.
        """
        return float((size or self.size) * count_parameters(self.lmm))

    def forward(self, tokens: float, size: int | None = None) -> float:
        """Return the bytes of one layer's intermediate results."""
        return activation_bytes(self.lmm, tokens, size or self.size)

    def above(self, layer: Hookpoint) -> int:
        """Return the number of layers above a hookpoint."""
        return max(1, self.lmm.config.get_text_config().num_hidden_layers - layers_below(layer))

    def kept(self, tokens: float, layers: int) -> float:
        """Return the bytes of the keys and values of some layers."""
        text = self.lmm.config.get_text_config()
        head = text.hidden_size // text.num_attention_heads
        return 2.0 * self.size * layers * text.num_key_value_heads * head * tokens


def page_needs(
    preset: Mapping[str, Mapping], images: int, *, gpus: int = 8, assumptions: Assumptions = ASSUMPTIONS
) -> dict[str, Needs]:
    """Return what one GPU holds on each page of a preset, at the page's worst moment.

    Pages 02 to 08 and A4 use one GPU. Models behind an endpoint run elsewhere. A1 to A3 need next to nothing.

    preset: of `read_preset`; one of `paper`'s geometry.
    images: how many are cached.
    gpus: how many train on page 01.
    assumptions: what no preset gives.

    Raises:
        ValueError: the preset leaves out a value that a prediction needs.
    """
    train, cache, _ = preset_costs(preset, images, gpus=gpus, assumptions=assumptions)
    dtype = preset["01_train_sae"].get("loading", {}).get("dtype", "bfloat16")
    lmm = meta_model(preset["01_train_sae"]["model"])
    scale = Scale(preset, lmm, getattr(torch, dtype).itemsize, gpus, assumptions)
    pages: dict[str, Callable[[Scale], Needs]] = {
        "03": _explaining, "04": _scoring, "05": _comparing, "06": _steering, "07": _attributing, "08": _curing,
        "A4": _controlling,
    }  # fmt: skip
    needs = {"01": train.gpu, "02": cache.gpu}
    needs |= {name: page(scale) | {"libraries": assumptions.library_memory} for name, page in pages.items()}
    return dict(sorted(needs.items()))


def _explaining(scale: Scale) -> Needs:
    """Page 03: the model and the SAE only where there is a ground truth, or where images choose the latents."""
    page = scale.preset["03_interpret_features"]
    uses_sae = page.get("concepts") or page.get("asked", {}).get("by") == "images"
    return {"LMM": scale.model(), "SAE": scale.sae} if uses_sae else {}


def _scoring(scale: Scale) -> Needs:
    """Page 04: the finders in float32, the model and the SAE for random images."""
    page = scale.preset["04_score_interpretations"]
    names = [page["segmenter"], page["detector"], page["similarity"]]
    return {
        "LMM": scale.model(),
        "SAE": scale.sae,
        "finders": sum(4 * PARAMETERS.get(name, 0.0) for name in names),
        "finders' activations": SAM_BATCH,
        "LMM activations": scale.forward(16 * scale.sample),
    }


def _comparing(scale: Scale) -> Needs:
    """Page 05: the worse of two moments. An SAE learns, or attribution runs in float32; further models lie beside."""
    page, width = scale.preset["05_compare_layers_and_models"], width_of(scale.lmm)
    others = sum(scale.size * PARAMETERS.get(name, 0.0) for name in page["others"])
    sizes = [page["training"]["n_latents"], *page["sizes"]] if page["sizes"] else [page["training"]["n_latents"]]
    common = {"LMM": scale.model(), "further models": others}
    learning = common | _learning(scale, page["training"], max(sizes), max([page["training"]["k"], *page["ks"]]))
    if not page["at_once"]:
        same = len(page["layers"]) + len(page["ks"]) - 1 + len(page["training_kinds"])
        every = [page["training"]["n_latents"]] * same + list(page["sizes"])
        learning |= {"SAEs": 4 * sum(sae_bytes(width, n) for n in every)}
    scored = common | {
        "SAEs": sum(sae_bytes(width, n) for n in page["sizes"])
        + sae_bytes(width, page["training"]["n_latents"])
        * (len(page["layers"]) + len(page["ks"]) - 2 + len(page["training_kinds"])),
        "LMM activations": scale.forward(16 * scale.sample),
        "TopK": TOPK_BYTES,
    }
    attributed = common | {
        "LMM": scale.model(4),
        "SAEs": sae_bytes(width, page["training"]["n_latents"]),
        "LMM activations": scale.above(min(page["layers"])) * scale.forward(scale.sample, 4),
        "TopK": TOPK_BYTES,
    }
    return max(learning, scored, attributed, key=lambda needs: sum(needs.values()))


def _steering(scale: Scale) -> Needs:
    """Page 06: clamped answers about a white image side by side, and answers about photographs."""
    page = scale.preset["06_steer_features"]
    beside = max(page["batch"], BESIDE)
    layers = scale.lmm.config.get_text_config().num_hidden_layers
    return {
        "LMM": scale.model(),
        "SAE": scale.sae,
        "LMM activations": scale.forward(beside * scale.sample),
        "keys and values": scale.kept(beside * (scale.sample + page["cases"]["max_new_tokens"]), layers),
        "TopK": TOPK_BYTES,
    }


def _attributing(scale: Scale) -> Needs:
    """Page 07: the worse of two moments. The small SAEs learn in one pass, or attribution runs in float32."""
    page = scale.preset["07_attribute_decisions"]
    small, layers = page["other_sae"], page["other_layers"]
    size = getattr(torch, page["loading"]["dtype"]).itemsize
    learning = {"LMM": scale.model(size), "SAE": scale.sae}
    of_one = _learning(scale, small, small["n_latents"], small["k"], size)
    per_layer = ("SAE in training", "buffer")
    learning |= {name: need * (len(layers) if name in per_layer else 1) for name, need in of_one.items()}
    every = [*layers, scale.train["layer"]]
    attributed = {
        "LMM": scale.model(4),
        "SAEs": scale.sae + len(layers) * sae_bytes(width_of(scale.lmm), small["n_latents"]),
        "LMM activations": page["batch"] * scale.above(in_order(every)[0]) * scale.forward(scale.sample, 4),
        "TopK": TOPK_BYTES,
    }
    return max(learning, attributed, key=lambda needs: sum(needs.values()))


def _curing(scale: Scale) -> Needs:
    """Page 08: the worse of two moments. A fit keeps its prompts above the layer, or attribution runs in float32."""
    page, layer = scale.preset["08_hallucination_case"], scale.train["layer"]
    kept = max(sum(page[fit][part] for part in ("wrong", "right", "others")) for fit in ("fitting", "new_questions"))
    fitted = {
        "LMM": scale.model(),
        "SAE": scale.sae,
        "prompts of the fit": scale.kept(kept * scale.sample, scale.above(layer)),
        "LMM activations": scale.forward(BESIDE * scale.sample),
        "TopK": TOPK_BYTES,
    }
    attributed = {
        "LMM": scale.model(4),
        "SAE": scale.sae,
        "LMM activations": scale.above(layer) * scale.forward(scale.sample, 4),
        "TopK": TOPK_BYTES,
    }
    return max(fitted, attributed, key=lambda needs: sum(needs.values()))


def _controlling(scale: Scale) -> Needs:
    """Page A4: the SAE and the random dictionary in its place."""
    page = scale.preset["A4_controls_and_metrics"]
    base = image_layout(scale.lmm, scale.assumptions.image).base
    return {
        "LMM": scale.model(),
        "SAEs": 2 * scale.sae,
        "LMM activations": scale.forward(page["batch_size"] * base),
        "TopK": TOPK_BYTES,
    }


def _learning(scale: Scale, training: Mapping, n_latents: int, k: int, size: int | None = None) -> Needs:
    """Return what one more SAE in training needs, beside the model: as `train_cost` on one GPU."""
    cost = train_cost(
        scale.lmm, scale.train["layer"], n_latents, k, training["steps"], training["batch_tokens"],
        dtype={2: "bfloat16", 4: "float32"}[size or scale.size], k_aux=training.get("k_aux", 0),
        batch_samples=training.get("batch_samples", 16), assumptions=scale.assumptions,
    ).gpu  # fmt: skip
    return {"SAE in training": cost["SAE"] + cost["gradient, Adam"]} | {
        name: cost[name] for name in ("buffer", "a batch", "TopK", "AuxK", "LMM activations")
    }


def page_hours(
    preset: Mapping[str, Mapping], images: int, device: Device, utilisation: float, *, gpus: int = 8,
    assumptions: Assumptions = ASSUMPTIONS,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return the hours of each kind of work on pages 01, 02, 05 and 07, without explaining and scoring.

    Page 05 trains and caches each of its SAEs, `at_once` at a time; page 07 trains its small SAEs in one pass. What
    other pages take depends on the length of answers.

    arguments: as of `page_needs`.
    device, utilisation: as of `StageCost.hours`.
    """
    train, cache, _ = preset_costs(preset, images, gpus=gpus, assumptions=assumptions)
    lmm = meta_model(preset["01_train_sae"]["model"])
    compare, attribute = preset["05_compare_layers_and_models"], preset["07_attribute_decisions"]
    how = {"assumptions": assumptions, "tf32": compare["tf32"], "workers": compare["workers"]}

    def learn(last: int, n: int, k: int, settings: Mapping) -> StageCost:
        aux = {"k_aux": settings.get("k_aux", 0), "batch_samples": settings.get("batch_samples", 16)}
        return train_cost(lmm, last, n, k, settings["steps"], settings["batch_tokens"], **aux, **how)

    size = compare["training"]
    of_layers = [(last, size["n_latents"], size["k"]) for last in compare["layers"]]
    middle = compare["layers"][len(compare["layers"]) // 2]
    saes = of_layers + [(middle, n, size["k"]) for n in compare["sizes"] if n != size["n_latents"]]
    saes += [(middle, size["n_latents"], k) for k in compare["ks"] if k != size["k"]]
    saes += [(middle, size["n_latents"], size["k"]) for _ in compare["training_kinds"]]
    how_cached = {"n_top": compare["n_top"], "batch_size": 16, "images": images, **how}
    each = [learn(*sae, size) for sae in saes] + [cache_cost(lmm, *sae, **how_cached) for sae in saes]
    small = attribute["other_sae"]
    others = [learn(last, small["n_latents"], small["k"], small) for last in attribute["other_layers"]]
    one = {"01": ([train], gpus), "02": ([cache], 1), "05": (each, 1), "07": (others, 1)}
    hours: dict[str, dict[str, float]] = {}
    for page, (costs, count) in one.items():
        hours[page] = {}
        for cost in costs:
            for kind, time in cost.hours(device, count, utilisation).items():
                hours[page][kind] = hours[page].get(kind, 0.0) + time
    return hours


def page_rows(needs: Mapping[str, Needs], device: Device) -> list[dict[str, str | float]]:
    """Return a row for each page: its memory, what needs most of it, and whether the GPU is large enough."""
    return [
        {
            "page": page,
            "GB of one GPU": sum(parts.values()) / 1e9,
            "most": max(parts, key=parts.get),
            "GB of that": max(parts.values()) / 1e9,
            f"fits {device.name}": "yes" if sum(parts.values()) < device.memory else "no",
        }
        for page, parts in needs.items()
    ]


def dominating(hours: Mapping[str, Mapping[str, float]]) -> tuple[str, str, float, float]:
    """Return the page and the kind of work that takes longest, its hours, and the hours of everything."""
    page, kind, most = max(
        ((page, kind, time) for page, parts in hours.items() for kind, time in parts.items()), key=lambda each: each[2]
    )
    return page, kind, most, sum(sum(parts.values()) for parts in hours.values())
