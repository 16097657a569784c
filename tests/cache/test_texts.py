"""The text side is what sorting everything would give, one sample at a time."""

import models
import numpy as np
import pytest
from models import noise

from lmm_sae_nb.cache import texts as texting
from lmm_sae_nb.cache.texts import TextCache, Word, cache_texts, text_activations
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE, TrainedOn

LAYER, N_TOP = 1, 4


@pytest.fixture(scope="module")
def samples():
    """Of different lengths, some without an image, two of them the same."""
    rows = [(noise(seed=n) if n % 3 else None, "what " * (1 + n % 4) + "?", f"it is {n % 5} .") for n in range(9)]
    return [dict(zip(("image", "question", "answer"), row, strict=True)) for row in [*rows, rows[3]]]


@pytest.fixture(scope="module")
def dense(lmm, sae, samples):
    """Of each sample alone, by eq. 1: its prompt, and (tokens, latents)."""
    found = []
    for row in samples:
        prompt = lmm.prompt(row["question"], row["image"], answers=row["answer"])
        found.append((prompt, models.dense(sae, lmm.hidden_states(prompt, LAYER)[0])))
    return found


@pytest.fixture(scope="module")
def cache(lmm, sae, samples, tmp_path_factory):
    return cache_texts(
        SAEInPlace(lmm, sae, LAYER), samples, n_top=N_TOP, batch_samples=3, folder=tmp_path_factory.mktemp("texts")
    )


def test_top_texts_and_words_are_those_of_sorting_everything(lmm, cache, dense):
    spoken = [(prompt.spans[0].where("text"), z) for prompt, z in dense]
    for latent in range(cache.n_latents):
        means = [float(z[places, latent].double().mean()) for places, z in spoken]
        order = [n for n in sorted(range(len(means)), key=lambda n: (-means[n], n)) if means[n] > 0][:N_TOP]
        found = cache.top_texts(latent)
        np.testing.assert_allclose([mean for _, mean in found], [means[n] for n in order], rtol=1e-4)
        np.testing.assert_allclose([means[n] for n, _ in found], [means[n] for n in order], rtol=1e-4)

        acts = {
            (n, int(place), int(dense[n][0].inputs["input_ids"][0, place])): float(z[place, latent])
            for n, (places, z) in enumerate(spoken)
            for place in places
        }
        best = sorted((act for act in acts.values() if act > 0), reverse=True)[:N_TOP]
        words = cache.top_words(latent)
        np.testing.assert_allclose([word.act for word in words], best, rtol=1e-4)
        np.testing.assert_allclose([acts[word[:3]] for word in words], best, rtol=1e-4)


def test_of_equal_texts_the_earlier_is_ahead(lmm, sae, samples, tmp_path):
    """Sample 9 is sample 3 again; alone in their batches both have the same bits, whatever the processor."""
    cache = cache_texts(SAEInPlace(lmm, sae, LAYER), samples, n_top=len(samples), batch_samples=1, folder=tmp_path)
    both = 0
    for latent in range(cache.n_latents):
        means = dict(cache.top_texts(latent))
        assert means.get(3) == means.get(9)
        assert list(means) == sorted(means, key=lambda sample: (-means[sample], sample))
        both += 3 in means
    assert both


def test_firings_are_counted_by_kind_of_token(cache, dense):
    for row, kind in enumerate(SAE_KINDS):
        masks = [prompt.spans[0].mask(kind) for prompt, _ in dense]
        assert cache.tokens[kind] == sum(int(mask.sum()) for mask in masks)
        counts = sum((z[mask] > 0).sum(0) for mask, (_, z) in zip(masks, dense, strict=True))
        assert np.abs(cache.fired[row] - counts.numpy()).max() <= 1
    assert cache.samples == 10


def test_the_size_of_the_batches_changes_nothing(lmm, sae, samples, cache, tmp_path):
    other = cache_texts(SAEInPlace(lmm, sae, LAYER), samples, n_top=N_TOP, batch_samples=7, folder=tmp_path)
    assert np.abs(other.fired - cache.fired).max() <= 1
    for latent in range(cache.n_latents):
        for name in ("top_texts", "top_words"):
            acts = [[row[-1] for row in getattr(each, name)(latent)] for each in (cache, other)]
            np.testing.assert_allclose(*acts, rtol=1e-4)


def test_a_text_is_read_with_the_activation_of_each_token(lmm, sae, samples, dense):
    latent = int(dense[4][1].sum(0).argmax())
    pieces, acts = text_activations(SAEInPlace(lmm, sae, LAYER), samples[4], latent)
    prompt, z = dense[4]
    places = prompt.spans[0].where("text")
    np.testing.assert_allclose(acts, z[places, latent], atol=1e-5)
    assert "".join(pieces) == lmm.tokenizer.decode(prompt.inputs["input_ids"][0, places])
    assert "what ?" in "".join(pieces) and "it is 4 ." in "".join(pieces)


# Bad input.


def test_nothing_to_read_or_an_sae_of_another_layer_is_refused(lmm, sae, samples, tmp_path):
    with pytest.raises(ValueError, match="0 samples, n_top 5: there is nothing to rank"):
        cache_texts(SAEInPlace(lmm, sae, LAYER), [], folder=tmp_path)
    other = TopKSAE(lmm.width, 8, 2)
    other.trained_on = TrainedOn(0, lmm.fingerprint(0))
    with pytest.raises(ValueError, match="trained on layer 0, not 1"):
        cache_texts(SAEInPlace(lmm, other, LAYER), samples, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_a_number_is_refused(lmm, sae, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(texting, "BITS", 4)
    with pytest.raises(ValueError, match="both have to be below 16; give shorter texts"):
        cache_texts(SAEInPlace(lmm, sae, LAYER), samples, folder=tmp_path)


def test_a_missing_or_foreign_file_and_a_latent_that_is_not_there(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match="02_cache_activations"):
        TextCache.load(tmp_path)
    (tmp_path / "texts.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"texts\.safetensors"):
        TextCache.load(tmp_path)
    with pytest.raises(ValueError, match="no latent 24: there are latents 0 to 23"):
        cache.top_words(24)
    assert isinstance(next(word for n in range(24) for word in cache.top_words(n)), Word)
