"""k-sparse probing, against scikit-learn's own scores and latents planted by hand."""

import numpy as np
import patchwork
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from lmm_sae_nb.measures.image_latents import images_showing
from lmm_sae_nb.measures.probing import best_latents, fit_probe, fit_probes, frequent_concepts, probing


def test_a_probe_has_the_scores_of_scikit_learn():
    rng = np.random.default_rng(0)
    acts, unseen = rng.random((200, 3)).astype(np.float32), rng.random((80, 3)).astype(np.float32)
    shows, unseen_shows = acts[:, 0] + 0.3 * rng.random(200) > 0.9, unseen[:, 0] + 0.3 * rng.random(80) > 0.9
    found = fit_probe(acts * [1, 10, 100], shows, unseen * [1, 10, 100], unseen_shows)
    model = LogisticRegression(class_weight="balanced").fit(acts / acts.max(0), shows)
    says, chances = model.predict(unseen / acts.max(0)), model.predict_proba(unseen / acts.max(0))[:, 1]
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(unseen_shows, says))
    assert found["f1"] == pytest.approx(f1_score(unseen_shows, says))
    assert found["auroc"] == pytest.approx(roc_auc_score(unseen_shows, chances), abs=1e-3)


def test_latents_are_ranked_by_the_difference_of_their_means():
    acts = np.array([[1, 0, 5, 0], [1, 0, 5, 2], [0, 3, 4, 1], [0, 3, 4, 1]], np.float32)
    assert best_latents(acts, np.array([True, True, False, False])) == [1, 0, 2, 3]


@pytest.fixture(scope="module")
def sets():
    """Latent 2 n + 1 fires on one patch of each image with the n-th concept; latents of even number at random.

    Half of the grids are empty, so that no kind is on all images.
    """
    rng = np.random.default_rng(0)

    def some(images):
        grids = [
            {kind: grid * (rng.random() < 0.5) for kind, grid in each.items()}
            for each in patchwork.random_grids(rng, images)
        ]
        truth = patchwork.maps(grids)
        shows = images_showing(truth, images, (6, 6))
        dense = patchwork.random_acts(rng, images, 2 * len(truth.names), 0.02)
        dense[:, :, 1::2] = 0
        dense[:, 0, 1::2] = shows * rng.uniform(1, 2, shows.shape)
        return patchwork.latents(dense), truth

    return (*some(80), *some(40))


def test_the_planted_latent_of_each_concept_is_found_and_predicts_it(sets):
    probes = fit_probes(*sets, (1, 2))
    names = sets[1].names
    for probe in probes[1]:
        # concepts of a kind are on nearly the same images here, so their latents serve alike
        same = [2 * n + 1 for n, (kind, _) in enumerate(names) if kind == probe.kind]
        assert probe.latents[0] in same
        assert (probe.balanced_accuracy, probe.f1, probe.auroc) == (1, 1, 1)
    found = probing(*sets, (1, 2))
    assert found["probe_concepts"] == len(names)
    assert found["probe_1_auroc"] == found["probe_2_f1_object"] == 1
    assert found["probe_1_auroc_random_high"] < 1


def test_concepts_that_few_images_show_or_lack_take_no_part():
    shows = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1]], bool)
    assert frequent_concepts(shows, shows, 2, 2) == [0, 3]
    assert frequent_concepts(shows, shows, 2, 1) == [0, 3]
    with pytest.raises(ValueError, match="0 concepts are on 3 of 4 cached"):
        frequent_concepts(shows, shows, 3, 1)


def test_more_latents_than_are_live_are_refused(sets):
    with pytest.raises(ValueError, match="14 latents are live, and a probe takes 50"):
        probing(*sets, (1, 50))
