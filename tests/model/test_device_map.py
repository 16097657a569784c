"""A model whose layers accelerate lays out, with hooks that fetch weights, gives what the whole model gives."""

import pytest
import torch
from accelerate import dispatch_model
from models import make, noise
from torch.testing import assert_close

from lmm_sae_nb.attribute.attribution import decision, exact, integrated, linear
from lmm_sae_nb.model.found_layouts import FoundLayout
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.steer.steering import Edit, steered
from lmm_sae_nb.train.evaluate import evaluate_sae

LAYER = 1
IMAGE = noise()
ROWS = [{"image": IMAGE, "question": "why ?", "answer": "so"}, {"image": None, "question": "how ?", "answer": "thus"}]


def place(lmm: LMM) -> SAEInPlace:
    sae = TopKSAE(lmm.width, 24, 3, generator=torch.Generator().manual_seed(1))
    return SAEInPlace(lmm, sae.requires_grad_(False), LAYER)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The model whole, and with the layers beside the SAE's on the disk: hooks bring their weights for each forward."""
    whole, spread = (LMM(*make("picture_world")) for _ in range(2))
    spread.model.load_state_dict(whole.model.state_dict())
    model, decoder = spread.model, "model.language_model"
    parts = ["model.vision_tower", "model.multi_modal_projector", f"{decoder}.embed_tokens", f"{decoder}.rotary_emb"]
    where = dict.fromkeys([*parts, "model.image_newline", f"{decoder}.norm", "lm_head"], "cpu")
    where |= {f"{decoder}.layers.{n}": "cpu" if n == LAYER else "disk" for n in range(spread.n_layers)}
    with pytest.warns(UserWarning, match="image_newline"):  # it is a parameter, not a module
        dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path_factory.mktemp("offload"))
    assert any(weights.is_meta for weights in model.parameters()), "some weights are on the disk"
    return place(whole), place(spread)


def ordered(values):
    return values.nan_to_num().sort(-1).values


def choice_of(place):
    return decision(place.lmm, "so ?", IMAGE, "y", "n")


def of_few_tokens(place):
    choice = choice_of(place)
    tokens = torch.arange(choice.prompt.inputs["input_ids"].shape[1]) % 50 == 49
    return ordered(exact(place, choice, tokens[:, None].expand(-1, place.sae.k)))


def steered_logits(place):
    prompt = place.lmm.prompt(["so ?", "why so ?"], [IMAGE, None])
    with torch.no_grad(), steered(place, prompt, [Edit(2, 5.0)]):
        return place.lmm.last_logits(prompt)


CALLS = {
    "linear": lambda place: ordered(linear(place, choice_of(place)).values),
    "integrated": lambda place: ordered(integrated(place, choice_of(place), steps=2).values),
    "exact": of_few_tokens,
    "steered": steered_logits,
    "evaluate": lambda place: torch.tensor(list(evaluate_sae(place, ROWS).values())),
}


@pytest.mark.parametrize("name", CALLS)
def test_hooks_that_fetch_weights_change_nothing(places, name):
    whole, spread = (CALLS[name](each) for each in places)
    assert_close(spread, whole)


def test_copies_for_threads_have_a_processor_each_and_make_the_same_prompts():
    lmm = LMM(*make("qwen2_5_vl"))
    lmm.layout = FoundLayout(lmm.tokenizer, merge=2)  # as of a family that is not registered; it reads with a tokenizer
    one, other = lmm.copies(2)
    assert one.model is other.model is lmm.model
    assert len({id(each.tokenizer) for each in (lmm, one, other)}) == 3 and one.tokenizer is one.processor.tokenizer
    for each in (one, other):
        assert each.layout.tokenizer is each.tokenizer
        assert_close(each.prompt("so ?", IMAGE).inputs["input_ids"], lmm.prompt("so ?", IMAGE).inputs["input_ids"])
