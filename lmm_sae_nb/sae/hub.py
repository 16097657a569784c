"""Load SAEs from the Hugging Face hub and publish them there; a repository holds a folder for each hookpoint."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, snapshot_download

from lmm_sae_nb.model.hookpoints import Hookpoint, published_as
from lmm_sae_nb.sae.formats import FORMATS, READABLE, format_of, settings_of

SUFFIXES = (".pt", ".npz", ".safetensors")  # a hookpoint that ends so is the file of an SAE's weights


def fetch(
    name_or_path: str | Path,
    hookpoint: Hookpoint | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of one SAE, or the file of its weights, downloaded into the hub's cache if necessary.

    name_or_path: a local folder, or a repository on the hub.
    hookpoint: the SAE's folder in it, such as "model.layers.24", or the file of its weights, such as
        "layer24.sae.pt"; None for an SAE at the root. 24 and "decoder.24.mlp" stand for the folders that `publish`
        makes of them. Nothing else is downloaded.
    revision, cache_dir, token, force_download, local_files_only: as of `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: the hookpoint leads out of the repository.
        FileNotFoundError: there is no SAE; the message lists the hookpoints that have one.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.
    """
    root, inside = Path(name_or_path), _inside(published_as(hookpoint) if hookpoint is not None else None)
    if isinstance(name_or_path, str) and not root.is_dir():
        forms = READABLE.values()
        files = [str(inside / file) for form in forms for file in (form.config, form.weights, *form.beside) if file]
        files = [str(inside)] if inside.suffix in SUFFIXES else files
        root = Path(
            snapshot_download(
                name_or_path,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
                allow_patterns=files,
            )
        )
    try:
        format_of(root / inside)
    except FileNotFoundError:
        hookpoints = _hookpoints(name_or_path, root, revision, token)
        where, others = f"at {hookpoint}" if hookpoint else "at its root", ", ".join(hookpoints) or "none"
        raise FileNotFoundError(f"{name_or_path} has no SAE {where}; hookpoints that hold one: {others}") from None
    return root / inside


def _inside(hookpoint: str | None) -> PurePosixPath:
    """Return a hookpoint as a path inside a repository; ValueError if it leads out of it."""
    inside = PurePosixPath(hookpoint or "")
    if inside.is_absolute() or ".." in inside.parts or "\\" in str(inside):
        raise ValueError(f"{hookpoint!r} leads out of the repository; give a folder in it, such as 'model.layers.24'")
    return inside


def _hookpoints(name_or_path: str | Path, root: Path, revision: str | None, token: str | bool | None) -> list[str]:
    """List the folders with an SAE, in a local folder or a repository."""
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    if Path(name_or_path) != root:
        files = HfApi(token=token).list_repo_files(str(name_or_path), revision=revision)
    found = set()
    for file in map(PurePosixPath, files):
        for form in READABLE.values():
            if file.match(form.weights):  # a pattern stands for several SAEs in a folder
                depth = len(PurePosixPath(form.weights).parts) - 1
                found.add(str(file if "*" in form.weights else file.parents[depth]))
    return sorted(found)


def publish(
    folder: str | Path,
    repo_id: str,
    hookpoint: Hookpoint,
    *,
    base_model: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload an SAE in one commit, with a model card if the repository has none; return the commit's URL.

    folder: of the SAE.
    repo_id: the repository; it is made if it is missing.
    hookpoint: what the SAE reads, such as 24 or "decoder.24.mlp"; the folder in the repository is sparsify's name of
        it. Any other text is the folder itself.
    base_model: the LMM's name on the hub, for the card.
    dataset: of the SAE's training, for the card.
    license: for the card.
    private, token, branch, create_pr, commit_message: as of `huggingface_hub.HfApi`.

    Raises:
        ValueError: the hookpoint leads out of the repository.
        ValueError, FileNotFoundError: as `read_sae`, before anything is sent.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.
    """
    folder, hookpoint = Path(folder), str(_inside(published_as(hookpoint)))
    if (format := format_of(folder)) not in FORMATS:
        raise ValueError(
            f"{folder} has the format {format}, which others have published already; to publish it in one of "
            f"{', '.join(FORMATS)}, load and save it first"
        )
    form, text = (
        FORMATS[format],
        card(folder, repo_id, hookpoint, base_model=base_model, dataset=dataset, license=license),
    )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    files = {f"{hookpoint}/{file}": folder / file for file in (form.config, form.weights)}
    if not api.file_exists(repo_id, "README.md", revision=branch):
        files["README.md"] = text.encode()
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message=commit_message or f"SAE of {hookpoint}",
        revision=branch,
        create_pr=create_pr,
    ).commit_url


def card(folder: str | Path, repo_id: str, hookpoint: str, *, base_model=None, dataset=None, license=None) -> str:
    """Return a model card: the SAE's input, size, format and equations, and the code that loads it."""
    format, settings = format_of(folder), settings_of(folder)
    chosen = (
        f"A latent is active above its threshold, at most {settings.k:,} of {settings.n_latents:,} for a token"
        if settings.has_threshold
        else f"At most {settings.k:,} of {settings.n_latents:,} latents are active for a token"
    )
    name, equation = ("JumpReLU", "JumpReLU") if settings.has_threshold else ("TopK", "TopK(ReLU")
    data = ModelCardData(
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        license=license,
        tags=["sparse-autoencoder", "interpretability", format],
    )
    return f"""---
{data.to_yaml()}
---

# {name} sparse autoencoder of {base_model or "a multimodal model"}

It reads the output of `{hookpoint}`{f" of `{base_model}`" if base_model else ""}, one token at a time
(width {settings.width:,}). {chosen}:

    z = {equation}(W_enc (x - b_dec) + b_enc){")" if "(" in equation else ""},   x_hat = W_dec^T z + b_dec

{f"It was trained on `{dataset}`." if dataset else ""}
The files have the format of {format}, in a folder for each hookpoint.

```python
from lmm_sae_nb import SAE

sae = SAE.from_pretrained("{repo_id}", "{hookpoint}")
```
"""
