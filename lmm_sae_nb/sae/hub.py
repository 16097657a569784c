"""SAEs on the Hugging Face hub: a repository holds one folder for each hookpoint, as the published one does."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, snapshot_download

from lmm_sae_nb.sae.formats import FORMATS, format_of, settings_of


def fetch(
    name_or_path: str | Path,
    hookpoint: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder of one SAE: of a local folder, or of a repository, downloaded into the hub's cache if need be.

    hookpoint: its folder there, such as "model.layers.24"; None for an SAE at the root. Nothing else is downloaded.
    The other arguments are `snapshot_download`'s, and HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE hold as everywhere.
    FileNotFoundError, with the hookpoints that there are, if there is no SAE; the hub's own errors otherwise.
    """
    root, inside = Path(name_or_path), PurePosixPath(hookpoint or "")
    if isinstance(name_or_path, str) and not root.is_dir():
        files = [str(inside / file) for form in FORMATS.values() for file in (form.config, form.weights)]
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
        found = _hookpoints(name_or_path, root, revision, token)
        where, others = f"at {hookpoint}" if hookpoint else "at its root", ", ".join(found) or "none"
        raise FileNotFoundError(f"{name_or_path} has no SAE {where}; hookpoints that hold one: {others}") from None
    return root / inside


def _hookpoints(name_or_path: str | Path, root: Path, revision: str | None, token: str | bool | None) -> list[str]:
    """Folders with an SAE, in a local folder or a repository."""
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    if Path(name_or_path) != root:
        files = HfApi(token=token).list_repo_files(str(name_or_path), revision=revision)
    weights = {form.weights for form in FORMATS.values()}
    return sorted(str(path.parent) for path in map(PurePosixPath, files) if path.name in weights)


def publish(
    folder: str | Path,
    repo_id: str,
    hookpoint: str,
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
    """Upload the SAE in `folder` as `hookpoint` of a repository, which is made if it is missing; the commit's URL.

    One commit: config, weights and, if the repository has none yet, a model card that says what it is, from
    `base_model` (the LMM's hub name), `dataset` (what the SAE was trained on) and `license`. Errors as `read_sae`,
    before anything is sent, and the hub's own.
    """
    folder, form = Path(folder), FORMATS[format_of(folder)]
    text = card(folder, repo_id, hookpoint, base_model=base_model, dataset=dataset, license=license)
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
    """A model card: what the SAE reads, its size and format, the equations, and the lines that load it."""
    format, settings = format_of(folder), settings_of(folder)
    data = ModelCardData(
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        license=license,
        tags=["sparse-autoencoder", "interpretability", format],
    )
    return f"""---
{data.to_yaml()}
---

# TopK sparse autoencoder of {base_model or "a multimodal model"}

It reads the output of `{hookpoint}`{f" of `{base_model}`" if base_model else ""}, one token at a time
(width {settings.width:,}), and writes it as at most {settings.k:,} active latents out of {settings.n_latents:,}:

    z = TopK(ReLU(W_enc (x - b_dec) + b_enc)),   x_hat = W_dec^T z + b_dec

{f"It was trained on `{dataset}`." if dataset else ""}
The files are as {format} writes them, in a folder for each hookpoint.

```python
from lmm_sae_nb.sae.topk import TopKSAE

sae = TopKSAE.from_pretrained("{repo_id}", "{hookpoint}")
```
"""
