"""Control SAEs of the same size as a trained one: random and classical dictionaries, and a model that learned nothing.

Two more controls are trained: `Recipe(..., frozen="encoder")` and `frozen="decoder"` of `train.state`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.losses import geometric_median
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.train.token_buffer import Stream, mixed

States = Float[Tensor, "tokens width"]


def tied_sae(rows: Float[Tensor, "latents width"], b_dec: Float[Tensor, " width"], k: int) -> TopKSAE:
    """Return an SAE whose encoder and decoder are the same rows, scaled to length 1, with b_enc = 0.

    rows: directions.
    b_dec: is subtracted before the encoder and added behind the decoder.
    k: active latents per token.

    Raises:
        ValueError: a row is zero, or k is out of range.
    """
    if empty := (torch.linalg.vector_norm(rows, dim=1) == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"rows {empty[:5]} of the dictionary are zero, so they have no direction; leave them out")
    sae = TopKSAE(rows.shape[1], len(rows), k)
    unit = F.normalize(rows.float(), dim=1)
    for weights, value in ((sae.W_enc, unit), (sae.W_dec, unit), (sae.b_dec, b_dec)):
        weights.data.copy_(value)
    return sae.requires_grad_(False)


def random_dictionary(like: TopKSAE, seed: int, k: int | None = None) -> TopKSAE:
    """Return a random dictionary of the same size, k and `b_dec` as an SAE; the encoder is tied to it.

    like: a trained SAE.
    seed: of the rows, which are uniform on the sphere.
    k: active latents per token; by default those of a TopK SAE.

    Raises:
        ValueError: the SAE has thresholds, and no k is given.
    """
    if k is None and like.threshold is not None:
        raise ValueError("an SAE with thresholds has no k; give its mean number of active latents (metric l0)")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(like.n_latents, like.width, generator=generator)
    return tied_sae(rows, like.b_dec.detach().cpu(), k or like.k)


# ---- a model that learned nothing -----------------------------------------------------------------------------------


def untrained(lmm: LMM, seed: int, *, keep_eye: bool = False) -> LMM:
    """Return a model of the same architecture and processor with new weights, as transformers initialises them.

    An SAE that is trained on this model, cached, and explained shows how many latents get a right name though the
    model has learned nothing. The model cannot answer, so steering, losses and attribution say nothing about it.

    seed: of the new weights.
    keep_eye: keep everything but the language model's layers and its last norm. The vision tower, the projector and
        the token embeddings stay as trained. Then what the SAE finds was in the trained eye.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(lmm.model)(lmm.model.config)
    if keep_eye:
        new = {f"{_name_of_decoder(model)}.{name}" for name, _ in _layers_and_norm(model)}
        trained = lmm.model.state_dict()
        model.load_state_dict({name: trained[name] for name in trained.keys() - new}, strict=False)
    model.generation_config = lmm.model.generation_config
    dtype = next(lmm.model.parameters()).dtype
    name = f"{lmm.name}, untrained" + (" behind the eye" if keep_eye else "")
    return LMM(model.to(lmm.device, dtype), lmm.processor, name, image_size=lmm.image_size)


def _name_of_decoder(model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_decoder())


def _layers_and_norm(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The decoder's tensors, all but its token embeddings."""
    embeddings = {tensor.data_ptr() for tensor in model.get_input_embeddings().state_dict().values()}
    state = model.get_decoder().state_dict()
    return [(name, tensor) for name, tensor in state.items() if tensor.data_ptr() not in embeddings]


# ---- classical dictionaries -----------------------------------------------------------------------------------------


def sample_states(
    lmm: LMM,
    samples: Sequence[Mapping],
    layer: Hookpoint,
    tokens: int,
    *,
    kinds: Sequence[str] = SAE_KINDS,
    seed: int = 0,
) -> States:
    """Return the hidden states of random tokens, drawn as for the training of an SAE.

    samples: rows with `image` (PIL or None), `question` and `answer`.
    layer: 0-based, or another hookpoint.
    tokens: how many.
    kinds: kinds of token to draw from.
    seed: of the draw.

    Raises:
        ValueError: as `token_buffer.mixed`.
    """
    stream = Stream(lmm, samples, [layer], kinds, seed, 16)
    process = Accelerator(cpu=lmm.device.type == "cpu")
    states, _ = next(
        mixed(stream, stream.parts_an_epoch, process, buffer_tokens=tokens, batch_tokens=tokens, seed=seed)
    )
    return states.float().cpu()


def principal_components(states: States, n_latents: int, k: int) -> TopKSAE:
    """Return the principal components of states, each with both signs, as an SAE with a tied encoder.

    A latent is never negative, so a component needs two: row 2i is component i, row 2i + 1 its opposite. There are at
    most 2 x width rows. `b_dec` is the mean of the states.

    n_latents: rows; an odd one out, and those beyond 2 x width, are left out.
    k: active latents per token, at most the number of rows.

    Raises:
        ValueError: there are fewer than two rows, or the states do not vary in so many directions.
    """
    components = min(n_latents // 2, states.shape[1])
    mean = states.double().mean(0)
    _, scales, rows = torch.linalg.svd(states.double() - mean, full_matrices=False)
    varies = int((scales > scales.max() * max(states.shape) * torch.finfo(torch.float64).eps).sum())
    if not 1 <= components <= varies:
        raise ValueError(
            f"{n_latents} latents are {components} components with both signs, and {len(states)} states vary in "
            f"{varies} directions; give from 2 to {2 * varies} latents, or more states"
        )
    both = torch.stack([rows[:components], -rows[:components]], 1).flatten(0, 1)
    return tied_sae(both.float(), mean.float(), min(k, len(both)))


def nmf_dictionary(states: States, n_latents: int, k: int, *, seed: int = 0, passes: int = 20) -> TopKSAE:
    """Return a dictionary by non-negative matrix factorisation (scikit-learn) as an SAE with a tied encoder.

    States have both signs, so the factorisation gets the positive and the negative parts of x - b_dec side by side.
    A row of the dictionary is the positive part of a factor less its negative part. `b_dec` is the geometric median.
    The activations of the factorisation are not used: the SAE encodes with the rows, by ReLU and TopK.

    n_latents: factors. Those that end as zero are replaced by random rows, so that the size is right.
    k: active latents per token.
    seed: of the first factors.
    passes: over the states.
    """
    from sklearn.decomposition import MiniBatchNMF

    centre = geometric_median(states)
    parts = torch.cat([(states - centre).clamp_min(0), (centre - states).clamp_min(0)], 1).numpy()
    factors = MiniBatchNMF(
        n_latents, init="random", batch_size=1024, max_iter=passes, max_no_improvement=None, tol=0, random_state=seed,
    ).fit(parts).components_  # fmt: skip
    positive, negative = np.split(factors, 2, axis=1)
    rows = torch.from_numpy(positive - negative).float()
    empty = torch.linalg.vector_norm(rows, dim=1) == 0
    rows[empty] = torch.randn(int(empty.sum()), rows.shape[1], generator=torch.Generator().manual_seed(seed))
    return tied_sae(rows, centre, k)
