"""The sparse autoencoder of section 2.1 (eq. 1 and 2).

A dense (tokens, latents) tensor exists only in `kernels.top_k` and `kernels.above`, for one block of tokens at a time.
No gradient has that shape.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.sae import hub, kernels
from lmm_sae_nb.sae.activation import Activation, JumpReLU, Latents, TopK
from lmm_sae_nb.sae.formats import SAEWeights, read_sae, write_sae
from lmm_sae_nb.support.files import read_json

HISTORY = "history.json"  # the file that `train_sae` writes beside its SAE


class TrainedOn(NamedTuple):
    """The layer, or other hookpoint, and the model that an SAE was trained on.

    layer: 0-based, or a name.
    model: `LMM.fingerprint(layer)`.
    """

    layer: Hookpoint
    model: str


# ---- equations 1 and 2, with their gradients --------------------------------------------------------------------


Candidates = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # of centred x, W_enc and b_enc


class _Encode(torch.autograd.Function):
    """Eq. 1 with its exact gradient: only active latents have one, so it is (tokens, k), never dense."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, candidates: Candidates, among):
        centred = x - b_dec
        if among is None:
            acts, indices = candidates(centred, W_enc, b_enc)
        else:
            acts, indices = candidates(centred, W_enc[among], b_enc[among])
            indices = among[indices]
        ctx.save_for_backward(centred, W_enc, acts, indices)
        ctx.mark_non_differentiable(indices)
        return acts, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_acts, _):
        centred, W_enc, acts, indices = ctx.saved_tensors
        grad = grad_acts * (acts > 0)
        needs_x, needs_W, *_ = ctx.needs_input_grad
        grad_x = F.embedding_bag(indices, W_enc, per_sample_weights=grad, mode="sum") if needs_x else None
        grad_W_enc = kernels.sum_by_latent(grad, indices, centred, W_enc) if needs_W else None
        grad_b_enc = grad.new_zeros(len(W_enc)).index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_W_enc, grad_b_enc, -(grad_b_enc @ W_enc), None, None


class _DecodeSparse(torch.autograd.Function):
    """Eq. 2 without b_dec, with gradients of the activations and the dictionary."""

    @staticmethod
    def forward(ctx, acts, indices, W_dec):
        ctx.save_for_backward(acts, indices, W_dec)
        return kernels.decode(acts, indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        acts, indices, W_dec = ctx.saved_tensors
        grad_acts, grad_W_dec = kernels.decode_gradients(grad, acts, indices, W_dec)
        return grad_acts, None, grad_W_dec


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, among: Int64[Tensor, " some"] | None = None
) -> Latents:
    """Return z = TopK(ReLU(W_enc (x - b_dec) + b_enc)), once differentiable in x and the weights.

    x: (tokens, width).
    k: active latents per token.
    among: the latents to choose from; by default all.

    Raises:
        ValueError: k is not from 1 to the number of latents to choose from.
    """
    return Latents(*_Encode.apply(x, W_enc, b_enc, b_dec, partial(kernels.top_k, k=k), among))


def decode_sparse(latents: Latents, W_dec: Tensor) -> Float[Tensor, "tokens width"]:
    """Return for each token the sum of W_dec's rows, weighted by the activations; differentiable in both.

    latents: (tokens, k).
    W_dec: (latents, width).
    """
    if torch.is_grad_enabled() and W_dec.requires_grad:
        return _DecodeSparse.apply(*latents, W_dec)
    return F.embedding_bag(latents.indices, W_dec, per_sample_weights=latents.acts, mode="sum")


# ---- the autoencoder --------------------------------------------------------------------------------------------


class SAE(nn.Module):
    """A sparse autoencoder (eq. 1 and 2). A latent is a row in both matrices; a trained W_dec has rows of length 1.

    Eq. 1's b_1 and eq. 2's b_3 are one parameter, b_dec, as in the published checkpoint. The encoder starts as the
    decoder's transpose. Without a threshold the SAE is that of the paper: it keeps the k largest activations.

    width: of the hidden states.
    n_latents: number of latents.
    k: active latents per token, from 1 to n_latents; with a threshold, the most that a token may have.
    threshold: of each latent, at least 0: an SAE of the kind JumpReLU, or another that `activation` describes.
    dtype: of the weights.
    generator: draws the dictionary.

    Raises:
        ValueError: k is out of range.
    """

    trained_on: TrainedOn | None = None  # known if the SAE was loaded from a folder of `train_sae`
    hook_name: str = ""  # what its files say that it reads; see `hook_names`
    threshold: Tensor | None

    def __init__(
        self,
        width: int,
        n_latents: int,
        k: int = 256,
        *,
        threshold: Float[Tensor, " latents"] | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        kernels.require_k(k, n_latents)
        self.k = k
        rows = F.normalize(torch.randn(n_latents, width, generator=generator), dim=1).to(dtype)
        self.W_enc = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents, dtype=dtype))
        self.W_dec = nn.Parameter(rows.clone())
        self.b_dec = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.register_buffer("threshold", threshold)

    @property
    def activation(self) -> Activation:
        """How the SAE chooses active latents."""
        return TopK(self.k) if self.threshold is None else JumpReLU(self.threshold, self.k)

    @property
    def width(self) -> int:
        """The width of the hidden states that the SAE reads."""
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        """The number of latents."""
        return self.W_dec.shape[0]

    def extra_repr(self) -> str:
        """Return the sizes, for `repr`."""
        return f"{self.activation.name}, width={self.width}, n_latents={self.n_latents}, k={self.k}"

    def require_width(self, width: int) -> None:
        """Check that the SAE reads hidden states of this width.

        Raises:
            ValueError: it reads another width.
        """
        if width != self.width:
            raise ValueError(
                f"the SAE reads width {self.width}, the layer's hidden states have width {width}; load the "
                "SAE that was trained on this model, or train one with notebooks/01_train_sae.py"
            )

    def encode(self, x: Float[Tensor, "*tokens width"], k: int | None = None) -> Latents:
        """Return z = TopK(ReLU(W_enc (x - b_dec) + b_enc)), eq. 1, or the same with the SAE's own activation.

        x: cast to the SAE's dtype.
        k: places per token, by default the SAE's. TopK fills so many; other kinds need so many at most.

        Raises:
            ValueError: x has another width than the SAE, k is not from 1 to the number of latents, or a token has more
                active latents than places.
        """
        k = self.k if k is None else k
        self.require_width(x.shape[-1])
        flat = x.reshape(-1, self.width).to(self.W_enc.dtype)
        candidates = partial(self.activation.candidates, places=k)
        latents = _Encode.apply(flat, self.W_enc, self.b_enc, self.b_dec, candidates, None)
        return Latents(*(part.reshape(*x.shape[:-1], k) for part in latents))

    def decode(self, latents: Latents) -> Float[Tensor, "*tokens width"]:
        """Return x_hat = W_dec^T z + b_dec, eq. 2.

        latents: any number per token.
        """
        shape = latents.acts.shape
        flat = Latents(*(part.reshape(-1, shape[-1]) for part in latents))
        return (decode_sparse(flat, self.W_dec) + self.b_dec).reshape(*shape[:-1], self.width)

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """Return the reconstruction of x (eq. 1, then 2), in x's dtype."""
        return self.decode(self.encode(x)).to(x.dtype)

    @torch.no_grad()
    def normalise_rows(self) -> None:
        """Scale every row of W_dec to length 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    @torch.no_grad()
    def drop_parallel_gradient(self) -> None:
        """Remove from W_dec's gradient the part along each unit row, which would only change the row's length."""
        grad = self.W_dec.grad
        grad.sub_((grad * self.W_dec).sum(1, keepdim=True) * self.W_dec)

    def save(self, folder: str | Path, format: str = "") -> None:
        """Write the SAE atomically; errors as `write_sae`.

        format: a name in `formats.FORMATS`; by default that of the published checkpoint, or "saelens" for an SAE with
            a threshold, which the published one cannot hold.
        """
        weights = SAEWeights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.k, self.threshold)
        write_sae(folder, weights, format or weights.usual_format)

    @classmethod
    def load(
        cls, source: str | Path, *, k: int | None = None, k_max: int | None = None, device: torch.device | str = "cpu"
    ) -> SAE:
        """Read an SAE of any known kind and format, in the file's dtype; arguments and errors as `read_sae`."""
        weights = read_sae(source, k=k, k_max=k_max, device=device)
        n_latents, width = weights.W_enc.shape
        with torch.device("meta"):
            sae = cls(width, n_latents, weights.k)
        sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec = map(nn.Parameter, weights[:4])
        sae.threshold = weights.threshold
        sae.hook_name, sae.trained_on = weights.hook, _trained_on(Path(source))
        return sae

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        hookpoint: Hookpoint | None = None,
        *,
        k: int | None = None,
        k_max: int | None = None,
        **where,
    ) -> SAE:
        """Load an SAE from the hub or a folder; arguments and errors as `hub.fetch` and `read_sae`."""
        return cls.load(hub.fetch(name_or_path, hookpoint, **where), k=k, k_max=k_max)

    def push_to_hub(self, repo_id: str, hookpoint: Hookpoint, format: str = "", **about) -> str:
        """Publish the SAE on the hub and return the commit's URL; arguments and errors as `hub.publish`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, format)
            return hub.publish(folder, repo_id, hookpoint, **about)


TopKSAE = SAE  # the paper's kind is what the constructor makes


def _trained_on(folder: Path) -> TrainedOn | None:
    """Read the layer and model that `train_sae` recorded beside the SAE; None if it did not train this SAE."""
    if not (folder / HISTORY).is_file():
        return None
    run = read_json(folder / HISTORY).get("run", {})
    return TrainedOn(run["layer"], run["model"]) if {"layer", "model"} <= run.keys() else None
