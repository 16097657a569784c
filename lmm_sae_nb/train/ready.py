"""Take a ready SAE, of this project or another library, in the place of a training."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lmm_sae_nb.model.hookpoints import Hookpoint, plain, titled
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae import hub
from lmm_sae_nb.sae.formats import FORMATS, settings_of
from lmm_sae_nb.sae.hook_names import place_of
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import HISTORY, SAE, TrainedOn
from lmm_sae_nb.support.files import fingerprint, read_json, write_json
from lmm_sae_nb.support.locks import hold
from lmm_sae_nb.train.training import TrainResult


class ReadySAE(NamedTuple):
    """An SAE that was not trained here.

    trained: as `train_sae` returns it, without a history.
    checked: a sentence that says whether the SAE's files name the layer that it reads.
    """

    trained: TrainResult
    checked: str


def use_ready_sae(
    lmm: LMM,
    layer: Hookpoint,
    *,
    sae: str | Path,
    hookpoint: str = "",
    k: int = 0,
    revision: str = "",
    folder: str | Path,
) -> ReadySAE:
    """Read an SAE, check it against the model and the layer, and write it and its record in `folder`, as training does.

    The record says how it was made, so a call that finds the same record reads what it wrote before.

    lmm: the model under study.
    layer: 0-based, or another hookpoint.
    sae: a folder, the file of the weights, or a repository on the hub.
    hookpoint: the SAE's folder or file in there; "" if `sae` is the SAE's own.
    k: active latents per token of a TopK SAE whose files do not say it; of other kinds, the most that a token may have.
        0: as the files say.
    revision: branch or commit of the repository; "" is the newest.
    folder: for the SAE and its record; an SAE of a training in it is replaced.

    Raises:
        ValueError: the SAE has another width than the layer, its files name another layer or model, or as `read_sae`.
        FileNotFoundError: there is no such SAE.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        FolderInUse: another run writes into this folder.
    """
    source = _source(sae, hookpoint, revision)
    asked = {"k": k or None, "k_max": k or None}
    settings = settings_of(source, **asked)
    run = {"ready": str(sae), "hookpoint": hookpoint, "k": k, "files": fingerprint(source)}
    run |= {"layer": plain(layer), "model": lmm.fingerprint(layer)}
    path = Path(folder) / HISTORY
    if path.is_file() and (record := read_json(path)).get("run") == run:
        return ReadySAE(TrainResult(SAE.load(folder), []), record["checked"])
    loaded = SAE.load(source, **asked | ({"k": None} if settings.has_threshold else {}))
    if loaded.trained_on:
        checked = f"The SAE's folder records that it was trained on {titled(loaded.trained_on.layer)} of this model."
    else:
        checked = _checked(settings.hook, layer)
    loaded = SAEInPlace(lmm, loaded, layer).sae  # before anything is written
    with hold(folder):
        path.unlink(missing_ok=True)
        for form in FORMATS.values():
            (Path(folder) / form.weights).unlink(missing_ok=True)
        loaded.save(folder)
        write_json(path, {"rows": [], "run": run, "checked": checked}, checked=True)
    loaded.trained_on = TrainedOn(run["layer"], run["model"])
    return ReadySAE(TrainResult(loaded, []), checked)


def _source(sae: str | Path, hookpoint: str, revision: str) -> Path:
    """Return the folder of the SAE or the file of its weights, downloaded if necessary."""
    if Path(sae).is_file():
        return Path(sae)
    if not Path(sae).is_dir() and (str(sae).count("/") > 1 or str(sae).startswith((".", "/"))):
        raise FileNotFoundError(
            f"there is no SAE at {sae}: it is no file or folder here, and no repository on the hub is called so; give "
            "a path from the project's root, or a repository such as lmms-lab/llama3-llava-next-8b-hf-sae-131k"
        )
    return hub.fetch(str(sae), hookpoint or None, revision=revision or None)


def _checked(hook: str, layer: Hookpoint) -> str:
    """Return what the hook name that the files record says of the layer."""
    if place_of(hook):
        return f"The SAE's files say that it reads `{hook}`: the output of {titled(layer)}, counted from 0."
    named = "The SAE's files do not say which layer it reads"
    if hook:
        named = f"The SAE's files call what it reads `{hook}`, which is no name known here"
    return f"{named}. So the layer was not checked; a wrong one shows in a high FVU."
