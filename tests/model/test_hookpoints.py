"""Other hookpoints than decoder layers: the same calls, against hooks and finite differences written here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import capabilities
import families
import pytest
import torch
from models import LARGE, dense, noise, params
from torch.testing import assert_close

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.cache.texts import cache_texts
from lmm_sae_nb.model.hookpoints import in_order, parsed, plain, published_as
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.upper_layers import above, above_each
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import SAE
from lmm_sae_nb.steer.steering import Edit, compare, steered
from lmm_sae_nb.train.evaluate import evaluate_sae

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # PaliGemma's processor
    pytest.mark.filterwarnings("ignore:the processor of Llava:UserWarning"),
]
INNER = ["decoder.1.attention", "decoder.1.mlp"]


def lmm_of(family: str) -> LMM:
    return LMM(*families.make(family))


def entering(lmm: LMM, prompt, layer: int) -> torch.Tensor:
    """The states that enter a decoder layer, by a hook on the layer."""
    seen = []
    handle = lmm.layer(layer).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    lmm.model(**prompt.inputs, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.fixture(scope="module")
def lmm() -> LMM:
    return lmm_of("picture_world")


def test_a_decoder_layer_has_one_plain_form():
    assert [plain("decoder.24"), plain(24), plain("decoder.24.mlp")] == [24, 24, "decoder.24.mlp"]


def test_hookpoints_are_ordered_as_a_forward_pass_computes_them():
    expected = ["vision.2", "vision.10", "projector", 1, "decoder.2.attention", "decoder.2.mlp", 2, 10]
    assert in_order([*reversed(expected), "decoder.1"]) == expected


@pytest.mark.parametrize("name", ["", "decoder.x", "decoder.-1", "decoder.1.", "decoder.1.ffn", "24", -1, "vision"])
def test_other_forms_name_nothing(name):
    assert parsed(name) is None


@pytest.mark.parametrize("name", ["mlp.1", "decoder.3", "decoder.9.mlp", "vision.2", 3])
def test_an_unknown_hookpoint_is_refused_with_those_that_the_model_has(lmm, name):
    with pytest.raises(ValueError, match=rf"{name}.*layers 0 to 2.*vision.0 to vision.1, projector.*decoder.2.*\.mlp"):
        lmm.hidden_states(lmm.prompt("what ?"), name)


@torch.no_grad()
@pytest.mark.parametrize("family", params(families.FAMILIES))
def test_attention_and_mlp_are_read_and_replaced_where_a_layer_adds_them(family):
    lmm = lmm_of(family)
    prompt = lmm.prompt(["what ?", "and what ?"], [noise(60, 50)] * 2)
    found = lmm.hidden_states(prompt, [*INNER, 1])
    clean = lmm.last_logits(prompt)
    for place in INNER:
        assert_close(found[place], capabilities.states(lmm, prompt, place), rtol=1e-4, atol=1e-4)
        with lmm.spliced(place, lambda hidden: hidden.clone()):
            assert_close(lmm.last_logits(prompt), clean)
        upper = above(lmm, prompt, place)
        assert_close(lmm.head(upper.run(upper.hidden)[:, -1]), clean, rtol=1e-3, atol=1e-3)

        def constant(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            return (torch.full_like(hidden, 0.3), *output[1:]) if isinstance(output, tuple) else hidden * 0 + 0.3

        handle = lmm.layer(place).register_forward_hook(constant)
        expected = lmm.model(**prompt.inputs, use_cache=False).logits[:, -1].float()
        handle.remove()
        with lmm.spliced(place, lambda hidden: torch.full_like(hidden, 0.3)):
            assert_close(lmm.last_logits(prompt), expected, rtol=1e-4, atol=1e-4)
        changed = lmm.head(upper.run(torch.full_like(upper.hidden, 0.3))[:, -1])
        assert_close(changed, expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(expected, clean, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name not in LARGE])
def test_attention_and_mlp_are_all_that_a_layer_adds(family):
    lmm = lmm_of(family)
    prompt = lmm.prompt("what ?", noise(60, 50))
    entered, left = entering(lmm, prompt, 1), capabilities.states(lmm, prompt, 1)
    attention, mlp = (lmm.hidden_states(prompt, place) for place in INNER)
    assert_close(left - entered.view_as(left), attention + mlp, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("hook", "normed_behind"), [("layers.1.mlp", True), ("model.layers.1.self_attn", True), ("layers.1.mlp", False)]
)
def test_an_sae_that_reads_before_a_norm_is_refused_where_the_family_has_one(hook, normed_behind):
    lmm = lmm_of("gemma3" if normed_behind else "llava")
    sae = SAE(lmm.width, 8, 2)
    sae.hook_name = hook
    place = "decoder.1.attention" if "attn" in hook else "decoder.1.mlp"
    if normed_behind:
        with pytest.raises(ValueError, match="normalises it once more"):
            SAEInPlace(lmm, sae, place)
        sae.hook_name = f"blocks.1.hook_{'attn' if 'attn' in hook else 'mlp'}_out"  # TransformerLens: what is added
    assert SAEInPlace(lmm, sae, place).layer == place


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("inner", ["attention", "mlp"])
def test_nothing_below_the_layer_runs_again_and_late_tokens_continue(lmm, layer, inner):
    place = f"decoder.{layer}.{inner}"
    prompt = lmm.prompt(["what ?", "now what ?"], [noise(60, 50)] * 2)
    upper = above(lmm, prompt, place)
    runs = []
    handles = [
        lmm.layer(n).mlp.register_forward_hook(lambda module, args, output, n=n: runs.append(n))
        for n in range(lmm.n_layers)
    ]
    states = upper.hidden + 0.1
    whole = upper.remember(states)
    late = upper.resume(states[:, -5:], states.shape[1] - 5)
    for handle in handles:
        handle.remove()
    assert runs == [*range(layer, lmm.n_layers)] * 2
    assert_close(late, whole[:, -5:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hookpoints_of_one_layer_are_read_in_one_pass(lmm):
    prompt = lmm.prompt("what ?", noise())
    uppers = above_each(lmm, prompt, [1, "decoder.0", *INNER])
    assert list(uppers) == [0, *INNER, 1]
    added = sum(uppers[place].hidden for place in INNER)
    assert_close(uppers[0].hidden + added, uppers[1].hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", INNER)
def test_an_sae_of_an_attention_or_mlp_is_trained_cached_steered_and_attributed(lmm, place, tmp_path):
    trained = capabilities.train(lmm, tmp_path, place)
    assert SAE.load(tmp_path / "sae").trained_on.layer == place
    capabilities.cache(trained, tmp_path)
    random = capabilities.a_place(lmm, place)
    capabilities.steer(random)
    capabilities.attribute(random)


# ---- before the decoder ---------------------------------------------------------------------------------------------

EYE = ["vision.0", "projector"]  # these models read the features of layer 0
PATCHES = {"picture_world": 1, "llava": 1, "llava_onevision": 0, "paligemma": 0}  # class tokens before the patches


@contextmanager
def plainly(lmm: LMM, place: str, family: str, change: Callable | None = None) -> Iterator[list[torch.Tensor]]:
    """Read, or change, the patches of a prompt's first crop, behind a layer of the tower or behind the projector."""
    seen = []

    def patches(module, args, output):
        crop = slice(PATCHES[family] if place == "vision.0" else 0, None)
        seen.append(output[0, crop])
        if change:
            new = output.clone()
            new[0, crop] = change(output[0, crop])
            return new

    tower = lmm.model.model.vision_tower.encoder.layers[0]
    module = tower if place == "vision.0" else lmm.model.model.multi_modal_projector
    handle = module.register_forward_hook(patches, prepend=True)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("place", EYE)
@pytest.mark.parametrize("family", ["picture_world", "llava", "llava_onevision"])
def test_patches_are_read_and_replaced_at_their_base_tokens(family, place):
    lmm = lmm_of(family)
    prompt = lmm.prompt("what ?", noise(60, 50))
    base, clean = prompt.mask("base"), lmm.last_logits(prompt)
    with plainly(lmm, place, family) as seen:
        lmm.model(**prompt.inputs, use_cache=False)
    states = lmm.hidden_states(prompt, place)
    assert_close(states[base], seen[0])
    assert place == "projector" or not states[~base].any()
    assert states.shape[-1] == lmm.width_at(place)
    pair = lmm.prompt(["what ?", "and now what ?"], [noise(200, 50, seed=1), noise(60, 50)])
    second = lmm.hidden_states(pair, [place, 1])[place][1]
    assert_close(second[pair.spans[1].mask("base")], seen[0], rtol=1e-4, atol=1e-4)

    with lmm.spliced(place, lambda hidden: hidden.clone()):
        assert_close(lmm.last_logits(prompt), clean)
    with plainly(lmm, place, family, lambda hidden: hidden * 0 + 0.3):
        expected = lmm.model(**prompt.inputs, use_cache=False).logits[:, -1].float()
    assert not torch.allclose(expected, clean, atol=1e-2)
    constant = base[..., None].expand_as(states)
    with lmm.spliced(place, lambda hidden: hidden.masked_fill(constant, 0.3)):
        assert_close(lmm.last_logits(prompt), expected)
    upper = above(lmm, prompt, place)
    for fill, logits in ((None, clean), (0.3, expected)):
        states = upper.hidden if fill is None else upper.hidden.masked_fill(constant, fill)
        assert_close(lmm.head(upper.run(states)[:, -1]), logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name not in LARGE])
def test_the_projector_is_what_enters_the_decoder_and_patches_without_a_token_are_refused(family):
    lmm = lmm_of(family)
    prompt = lmm.prompt("what ?", noise(60, 50))
    entered = entering(lmm, prompt, 0)
    base, states = prompt.mask("base"), lmm.hidden_states(prompt, "projector")
    scale = (entered[base] / states[base]).nanmedian()  # Gemma's decoder multiplies all embeddings
    assert_close(states[base] * scale, entered[base], rtol=1e-4, atol=1e-4)
    if family in PATCHES:
        assert lmm.hidden_states(prompt, "vision.1")[base].any(-1).all()
    else:
        with pytest.raises(ValueError, match=r"vision.1 has no state for .*; use the hookpoint projector, or"):
            lmm.hidden_states(prompt, "vision.1")


@pytest.mark.parametrize("place", EYE)
def test_an_sae_of_patches_is_trained_evaluated_cached_steered_and_attributed(lmm, place, tmp_path):
    with pytest.raises(ValueError, match=rf"{place} has no states of the tokens .*text; give kinds: \[base"):
        capabilities.train(lmm, tmp_path, place)
    trained = capabilities.train(lmm, tmp_path, place, kinds=["base"])
    samples = [{"image": picture, "question": "what ?", "answer": "that"} for picture in capabilities.pictures(2)]
    metrics = evaluate_sae(trained, samples, kinds=["base"])
    assert metrics["tokens"] == 2 * lmm.grid[0] * lmm.grid[1] and metrics["loss_clean"] != metrics["loss_zero"]
    assert cache_texts(trained, samples, folder=tmp_path / "texts").tokens["text"] == 0

    random = capabilities.a_place(lmm, place)
    images, means = capabilities.pictures(), []
    for image in images:
        with plainly(lmm, place, "picture_world") as seen, torch.no_grad():
            lmm.model(**lmm.prompt("", image).inputs, use_cache=False)
        means.append(dense(random.sae, seen[0]).mean(0))
    cached = cache_activations(random, images, n_top=3, batch_size=2, folder=tmp_path / "cache")
    assert_close(cached.top_means, torch.stack(means).sort(0, descending=True).values.T, rtol=1e-3, atol=1e-3)
    assert (cached.layer, cached.grid) == (place, lmm.grid)

    prompt, sae = lmm.prompt("what ?", images[1]), random.sae

    def clamp(hidden):
        z = torch.relu((hidden - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        z[..., 3] = 5.0
        kept = z.topk(sae.k)
        return torch.zeros_like(z).scatter(-1, kept.indices, kept.values) @ sae.W_dec + sae.b_dec

    with steered(random, prompt, [Edit(3, 5.0)], spliced=["base"]), torch.no_grad():
        found = lmm.last_logits(prompt)
    with plainly(lmm, place, "picture_world", clamp), torch.no_grad():
        expected = lmm.model(**prompt.inputs, use_cache=False).logits[:, -1].float()
    assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert len(compare(random, "what ?", images[0], [Edit(3, 5.0)], max_new_tokens=3).steered) == 1
    capabilities.attribute(random)


def test_a_layer_of_the_eye_is_rewritten_for_a_known_prompt_only(lmm):
    prompt = lmm.prompt("what ?", noise(60, 50))
    with (
        lmm.spliced("vision.0", lambda hidden: hidden),
        pytest.raises(ValueError, match="run the model by run, logits"),
    ):
        lmm.model(**prompt.inputs)


def test_saes_are_published_under_the_names_of_sparsify():
    places = [24, "decoder.24", "decoder.24.mlp", "decoder.24.attention", "vision.5", "model.layers.24"]
    expected = ["layers.24", "layers.24", "layers.24.mlp", "layers.24.self_attn", "vision.5", "model.layers.24"]
    assert [published_as(place) for place in places] == expected
