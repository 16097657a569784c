"""Predict the costs of a preset's stages, and write the commands that run it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from lmm_sae_nb.full_scale.costs import (
    ASSUMPTIONS,
    Assumptions,
    Device,
    StageCost,
    cache_cost,
    explain_cost,
    train_cost,
)
from lmm_sae_nb.full_scale.models import meta_model
from lmm_sae_nb.support.notebooks import parameters, sources
from lmm_sae_nb.support.presets import preset as notebooks_values

TRAIN = ("model", "layer", "n_latents", "k", "steps", "batch_tokens", "buffer_tokens", "repeats", "batch_samples")
JOB = (*TRAIN, "loading", "dataset", "lr", "dead_after_tokens", "kinds", "seed", "tf32", "k_aux", "workers")
SPEED = ("tf32", "workers")
CACHE = ("model", "layer", "n_top", "batch_size")
EXPLAIN = ("explainer", "n_explained", "n_top")


def read_preset(path: str | Path) -> dict[str, dict]:
    """Return the parameters that each notebook has with a preset: what its file gives, else the notebook's defaults.

    Raises:
        FileNotFoundError, ValueError: as `support.presets.preset`.
    """
    given = notebooks_values(Path(path))
    defaults = {source.stem: parameters(source) for source in sources()}
    return {
        page: {name: each.default for name, each in defaults[page].items()} | values for page, values in given.items()
    }


def preset_costs(
    preset: Mapping[str, Mapping], images: int, *, gpus: int = 1, assumptions: Assumptions = ASSUMPTIONS
) -> list[StageCost]:
    """Predict the costs of the stages train, cache and explain.

    preset: of `read_preset`.
    images: how many are cached.
    gpus: how many share the work.
    assumptions: what no preset gives.

    Raises:
        ValueError: the preset leaves out a value that a prediction needs.
    """
    train = _values(preset, "01_train_sae", (*TRAIN, *SPEED, "k_aux"))
    cache = _values(preset, "02_cache_activations", (*CACHE, *SPEED)) | {
        name: train[name] for name in ("n_latents", "k")
    }
    if preset["01_train_sae"].get("ready", {}).get("sae"):  # nothing is trained
        train["steps"] = 0
    explain = _values(preset, "03_interpret_features", EXPLAIN)
    explain.pop("explainer")
    models = [meta_model(train.pop("model")), meta_model(cache.pop("model")), meta_model(explainer_name(preset))]
    return [
        train_cost(models[0], **train, gpus=gpus, assumptions=assumptions),
        cache_cost(models[1], **cache, images=images, gpus=gpus, assumptions=assumptions),
        explain_cost(models[2], **explain, gpus=gpus, assumptions=assumptions),
    ]


def cost_metrics(costs: Mapping[int, Iterable[StageCost]], device: Device, utilisation: float) -> dict[str, float]:
    """Return the predictions as a stage's metrics: STAGE_hours_gpus_N and STAGE_gb_per_gpu_gpus_N.

    costs: by the number of GPUs.
    device: each of these GPUs.
    utilisation: fraction of the device's peaks that is reached, above 0.
    """
    each = [(gpus, cost) for gpus, stages in costs.items() for cost in stages]
    hours = {f"{c.stage}_hours_gpus_{n}": sum(c.hours(device, n, utilisation).values()) for n, c in each}
    return hours | {f"{c.stage}_gb_per_gpu_gpus_{n}": sum(c.gpu.values()) / 1e9 for n, c in each}


def explainer_name(preset: Mapping[str, Mapping]) -> str:
    """Return the explainer's name on the hub, without the address of its endpoint."""
    explainer = preset["03_interpret_features"]["explainer"]
    model = explainer["model"] if isinstance(explainer, Mapping) else explainer
    return model.partition("@http")[0]


def _values(preset: Mapping[str, Mapping], notebook: str, names: Iterable[str]) -> dict:
    values = preset.get(notebook, {})
    if missing := [name for name in names if name not in values]:
        raise ValueError(
            f"the preset does not give {notebook} {', '.join(missing)}; choose a preset that gives every value, "
            "such as notebooks/params/paper.yaml"
        )
    return {name: values[name] for name in names}


def servers(preset: Mapping[str, Mapping]) -> dict[str, int]:
    """Return the models that a preset asks at an endpoint, with the port of each.

    preset: of `read_preset`.
    """
    found = re.findall(r"'([^'@]+)@https?://[^/:']+:(\d+)/v1'", str(preset))
    return {model: int(port) for model, port in found}


def commands(path: str | Path, preset: Mapping[str, Mapping], gpus: int) -> dict[str, str]:
    """Return the commands that run a preset from the repository's root, by what each does.

    path: of the preset's file.
    preset: of `read_preset`; models at an endpoint are served first.
    gpus: 1, or how many train; several train from a job file. Those who have one ask servers on another machine.
    """
    book = f"make book PRESET={shlex.quote(Path(path).stem)} JOBS=1"
    serve = {
        f"serve {model}": f"vllm serve {shlex.quote(model)} --port {port} --tensor-parallel-size 8"
        for model, port in servers(preset).items()
    }
    if gpus == 1:
        serve = {f"on another machine, {purpose}": command for purpose, command in serve.items()}
        if serve:
            where = f"sed -i 's#@http://localhost:#@http://HOST:#' {shlex.quote(str(path))}"
            serve["ask that machine, HOST, as name@http://host:port/v1"] = where
        return serve | {"all notebooks and the book": book}
    job = _values(preset, "01_train_sae", JOB) | {"folder": f"data/artifacts/{preset['01_train_sae']['run']}/train"}
    launch = f"accelerate launch --multi_gpu --num_processes {gpus}"
    return {
        "write the job": f"echo {shlex.quote(json.dumps(job))} > job.json",
        "train": f"{launch} -m lmm_sae_nb.train.launch job.json",
        **serve,
        "the rest": book,
    }
