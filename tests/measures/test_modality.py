"""The modality score, against dense means over the tokens of each kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from lmm_sae_nb.measures.modality import mean_by_side, modality, modality_scores
from lmm_sae_nb.model.token_kinds import KINDS
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score.scores import Explained


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return [
        {"image": Image.fromarray(rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)), "question": "what is it ?",
         "answer": f"number {n} ."}
        for n in range(4)
    ]  # fmt: skip


def test_means_are_over_the_tokens_of_each_side(lmm, sae, samples):
    place = SAEInPlace(lmm, sae, 1)
    held = {"image": [], "text": []}
    for row in samples:  # one by one, without padding
        prompt = lmm.prompt(row["question"], row["image"], answers=[row["answer"]])
        acts, indices = sae.encode(lmm.hidden_states(prompt, 1)[0])
        dense = torch.zeros(len(acts), sae.n_latents).scatter(-1, indices.long(), acts.float()).detach().numpy()
        kinds = prompt.spans[0].kinds.numpy()
        held["image"].append(dense[np.isin(kinds, [KINDS.index("base"), KINDS.index("tiles")])])
        held["text"].append(dense[kinds == KINDS.index("text")])
    found = mean_by_side(place, samples, batch_samples=3)
    for side, parts in held.items():
        assert found[side] == pytest.approx(np.concatenate(parts).mean(0), abs=1e-5)


def test_a_score_is_the_part_of_the_images_and_a_dead_latent_has_none():
    scores = modality_scores({"image": np.array([1.0, 0, 3, 0]), "text": np.array([0.0, 2, 1, 0])})
    assert scores[:3].tolist() == [1, 0, 0.75] and np.isnan(scores[3])


def test_fractions_of_sides_and_of_bins_sum_to_one(lmm, sae, samples):
    explained = {n: Explained("cat", "object") for n in range(sae.n_latents)}
    found = modality(SAEInPlace(lmm, sae, 1), samples, explained)
    assert found["modality"] == found["modality_object"]
    assert sum(found[f"modality_{name}"] for name in ("image", "text", "both")) == pytest.approx(1)
    assert sum(found[f"modality_bin_{n}"] for n in range(10)) == pytest.approx(1)


def test_samples_without_images_are_refused(lmm, sae):
    rows = [{"image": None, "question": "what is it ?", "answer": "it ."}]
    with pytest.raises(ValueError, match="0 image and"):
        modality(SAEInPlace(lmm, sae, 1), rows)
