"""What the pages do with a model, in small: train, cache, interpret, steer, attribute; each checked independently."""

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from models import dense, noise
from PIL import Image
from torch.testing import assert_close

from lmm_sae_nb.attribute.attribution import difference, exact, greedy_decision, integrated, linear
from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.interpret.exemplars import exemplars
from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import SAE
from lmm_sae_nb.steer.steering import Edit, compare, steered
from lmm_sae_nb.train.training import train_sae

LAYER = 1
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def pictures(n: int = 3) -> list[Image.Image]:
    """Pictures of several shapes; the second is wide, so that families with tiles cut it."""
    shapes = [(90, 80), (160, 70), (70, 100)]
    return [noise(*shapes[number % 3], seed=number) for number in range(n)]


def train(lmm: LMM, folder: Path, layer: Hookpoint = LAYER, **more) -> SAEInPlace:
    """Train a few steps on samples with answers; the loss is finite and the SAE has moved."""
    samples = [{"image": image, "question": "what is it ?", "answer": "that"} for image in pictures()]
    settings = dict(n_latents=32, k=4, steps=2, batch_tokens=32, batch_samples=2) | more
    result = train_sae(lmm, samples, layer, **settings, folder=folder / "sae")
    assert all(math.isfinite(row["loss"]) for row in result.history)
    return SAEInPlace(lmm, result.sae.requires_grad_(False), layer)


def a_place(lmm: LMM, layer: Hookpoint = LAYER) -> SAEInPlace:
    """A random SAE whose latents see the layer's states."""
    sae = SAE(lmm.width_at(layer), 32, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    return SAEInPlace(lmm, sae, layer)


@torch.no_grad()
def states(lmm: LMM, prompt, layer: Hookpoint = LAYER) -> torch.Tensor:
    """The layer's output as the model computes it of the whole prompt, in the plainest way."""
    seen = []
    handle = lmm.layer(layer).register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    lmm.model(**prompt.inputs, use_cache=False)
    handle.remove()
    return seen[0].view(*prompt.inputs["input_ids"].shape, -1)


def cache(place: SAEInPlace, folder: Path) -> None:
    """Cache pictures of several shapes: means and maps are those of the whole forward pass."""
    images, lmm = pictures(), place.lmm
    cached = cache_activations(place, images, n_top=3, batch_size=2, folder=folder / "cache")
    expected = []
    for image in images:
        prompt = lmm.prompt("", image)
        expected.append(dense(place.sae, states(lmm, prompt, place.layer)[prompt.mask("base")]))
    means = torch.stack([z.mean(0) for z in expected])
    assert_close(cached.top_means, means.sort(0, descending=True).values.T, **CLOSE)
    assert cached.grid == lmm.grid
    latent = int(cached.top_means[:, 0].argmax())
    first = exemplars(cached, images, latent, n_top=1)[0]
    if lmm.grid is None:
        assert first.masked is None or first.masked.size == first.image.size
    else:
        best = int(means[:, latent].argmax())
        found = torch.as_tensor(first.activation).flatten()
        assert first.activation.shape == lmm.grid
        assert_close(found.float(), expected[best][:, latent], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def steer(place: SAEInPlace) -> None:
    """Clamp a latent: the logits are those of a hook written here, and text is generated with the clamp."""
    lmm, sae, layer = place.lmm, place.sae, place.layer
    prompt = lmm.prompt(["what ?", "and what is this ?"], pictures(1) * 2)  # one picture twice
    mask = prompt.mask(*SAE_KINDS)

    def clamp(module, args, output):
        plain = output[0] if isinstance(output, tuple) else output
        hidden = plain.view(*mask.shape, -1)
        z = torch.relu((hidden[mask] - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        z[:, 3] = 5.0
        kept = z.topk(sae.k)
        z = torch.zeros_like(z).scatter(-1, kept.indices, kept.values)
        new = hidden.clone()
        new[mask] = (z @ sae.W_dec + sae.b_dec).to(hidden.dtype)
        new = new.view_as(plain)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with steered(place, prompt, [Edit(3, 5.0)]):
        found = lmm.last_logits(prompt)
    handle = lmm.layer(layer).register_forward_hook(clamp)
    expected = lmm.model(**prompt.inputs, use_cache=False).logits[:, -1].float()
    handle.remove()
    assert_close(found, expected, **CLOSE)
    answers = compare(place, ["what ?", "and what is this ?"], pictures(1) * 2, [Edit(3, 5.0)], max_new_tokens=3)
    assert all(len(each) == 2 for each in answers)


def attribute(place: SAEInPlace) -> None:
    """Attribute: linear is the slope, exact the effect of silencing, integrated sums to the difference."""
    lmm, sae = place.lmm, place.sae
    choice = greedy_decision(lmm, "what is it ?", pictures(1)[0])
    mask = place.mask(choice.prompt)[0]
    first = linear(place, choice)
    active = first.latents.acts > 0
    chosen = active & (torch.rand(active.shape, generator=torch.Generator().manual_seed(0)) < 6 / active.sum())
    chosen.view(-1)[first.values.abs().where(active, 0).argmax()] = True
    one_by_one = exact(place, choice, chosen)

    def d_without(token: int, slot: int, fraction: float) -> float:
        part = first.latents.acts[token, slot] * sae.W_dec[first.latents.indices[token, slot]]

        def silence(hidden):
            hidden = hidden.clone()
            hidden[0, token] -= fraction * part
            return hidden

        with torch.no_grad(), lmm.spliced(place.layer, silence) if fraction else nullcontext():
            return float(difference(lmm, choice)[0])

    clean = d_without(0, 0, 0.0)
    assert math.isclose(clean, first.clean, rel_tol=1e-3, abs_tol=1e-3)
    for token, slot in chosen.nonzero().tolist():
        expected = clean - d_without(token, slot, 1.0)
        assert math.isclose(float(one_by_one[token, slot]), expected, rel_tol=1e-2, abs_tol=2e-3)
        slope = (d_without(token, slot, -0.01) - d_without(token, slot, 0.01)) / 0.02
        assert math.isclose(float(first.values[token, slot]), slope, rel_tol=5e-2, abs_tol=2e-2)

    def d_on_path(position: float) -> float:
        def grow(hidden):
            bias = sae.b_dec.to(hidden)
            return torch.where(mask[None, :, None], bias + position * (hidden - bias), hidden)

        with torch.no_grad(), lmm.spliced(place.layer, grow):
            return float(difference(lmm, choice)[0])

    middle = integrated(place, choice, steps=1)
    slope = (d_on_path(0.502) - d_on_path(0.498)) / 0.004
    assert math.isclose(float(middle.values.sum() + middle.error.sum()), slope, rel_tol=5e-2, abs_tol=5e-2)
