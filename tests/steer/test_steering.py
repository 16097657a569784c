"""Steering against the dense equations 3-6, as the identity where nothing changes, and under generate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import llava_next, noise
from torch.testing import assert_close

from lmm_sae_nb.attribute.attribution import decision, linear
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.steer.steering import Edit, Scope, answers, compare, set_latents, steer_latents, steered, steered_states
from lmm_sae_nb.support.files import write_json

LAYER = 1
EVERYWHERE = ("base", "tiles", "newline", "text", "special")


def new_sae(width=16, n_latents=24, k=5, seed=0) -> TopKSAE:
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(width, n_latents, k, generator=generator).requires_grad_(False)
    sae.b_enc.normal_(std=0.2, generator=generator)
    sae.b_dec.normal_(std=0.2, generator=generator)
    return sae


def dense(sae, x, edits) -> torch.Tensor:
    """Eq. 3-6 word for word, with a dense z."""
    z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    for edit in edits:
        own = z[:, edit.latent].clone()
        z[:, edit.latent] = {
            "clamp": torch.full_like(own, edit.value),
            "add": (own + edit.value).clamp_min(0),
            "scale": own * edit.value,
        }[edit.mode]
    top = z.topk(sae.k)
    return torch.zeros_like(z).scatter(1, top.indices, top.values)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.integers(1, 24),
    st.lists(
        st.tuples(st.integers(0, 23), st.sampled_from(["clamp", "add", "scale"]), st.floats(0, 8, width=32)),
        min_size=1, max_size=6, unique_by=lambda edit: edit[0],
    ),
)  # fmt: skip
def test_steered_latents_are_those_of_the_dense_equations(seed, k, edits):
    sae, edits = new_sae(k=k, seed=seed), [Edit(j, v, mode) for j, mode, v in edits]
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(seed))
    latents = steer_latents(sae, x, edits)
    assert latents.acts.shape == (7, k)
    found = torch.zeros(7, 24).scatter(1, latents.indices, latents.acts)
    # Equal activations may give way to each other; their sorted values may not.
    expected = dense(sae, x, edits)
    assert_close(found.sort(1).values, expected.sort(1).values, atol=1e-5, rtol=1e-5)
    different = (found - expected).abs() > 1e-4
    assert not different.any() or found[different].max() <= expected.masked_fill(expected == 0, 9e9).min(1).values.max()


def test_set_latents_is_a_clamp_whose_values_have_gradients():
    """Set to the same numbers, the same bits; a value has a gradient at the tokens where it is among the k highest."""
    sae, x = new_sae(), torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    latents, values = torch.tensor([3, 11]), torch.tensor([0.5, 9.0], requires_grad=True)
    highest = sae.encode(x, k=sae.k + 2)
    found = set_latents(highest, latents, values.expand(7, -1), sae.activation)
    clamped = steer_latents(sae, x, [Edit(3, 0.5), Edit(11, 9.0)])
    assert torch.equal(found.indices, clamped.indices) and torch.equal(found.acts, clamped.acts)
    found.acts.sum().backward()
    assert values.grad.tolist() == [float((found.indices == latent).sum()) for latent in (3, 11)]
    assert values.grad[0] < values.grad[1] == 7


def test_a_clamp_above_the_highest_latent_replaces_it():
    """Three latents along the axes, one active: a clamp below it changes nothing, one above takes its place."""
    sae = new_sae(width=3, n_latents=3, k=1)
    for name, value in {"W_enc": torch.eye(3), "W_dec": torch.eye(3), "b_enc": 0.0, "b_dec": 0.0}.items():
        getattr(sae, name).copy_(torch.as_tensor(value))
    x, everywhere = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([True])
    assert steered_states(sae, x, [Edit(2, 1.5)], everywhere, False).tolist() == [[2.0, 0.0, 0.0]]
    assert steered_states(sae, x, [Edit(2, 5.0)], everywhere, False).tolist() == [[0.0, 0.0, 5.0]]
    assert steered_states(sae, x, [Edit(0, 0.0)], everywhere, False).tolist() == [[0.0, 1.0, 0.0]]
    assert steered_states(sae, x, [Edit(2, 5.0)], everywhere, True).tolist() == [[0.0, 1.0, 5.0]]
    assert steered_states(sae, x, [Edit(0, 3.0, "scale")], everywhere, True).tolist() == [[6.0, 1.0, 0.0]]


@pytest.fixture(scope="module")
def lmm():
    torch.manual_seed(0)
    return LMM(*llava_next())


def test_a_clamp_that_changes_nothing_is_the_identity(lmm):
    """A latent that is silent everywhere, clamped to 0 with the error kept: the same logits to the last bit."""
    sae = new_sae(n_latents=24)
    sae.b_enc[3] = -1e6
    prompt = lmm.prompt(["what ?", "and why is it so ?"], [None, noise()])
    plain = lmm.logits(prompt)
    with steered(
        SAEInPlace(lmm, sae, LAYER), prompt, [Edit(3, 0.0)], Scope(EVERYWHERE), keep_error=True, spliced=EVERYWHERE
    ):
        assert torch.equal(lmm.logits(prompt), plain)
    with steered(SAEInPlace(lmm, sae, LAYER), prompt, keep_error=True):
        assert torch.equal(lmm.logits(prompt), plain)
    said = compare(
        SAEInPlace(lmm, sae, LAYER), ["what ?"], [noise()], [Edit(3, 0.0)], keep_error=True, max_new_tokens=6
    )
    assert said.untouched == said.spliced == said.steered


def test_generation_with_a_cache_equals_running_everything_again(lmm):
    """Greedy answers under steering, token by token without a cache, scope by phase included."""
    sae, edits = new_sae(), [Edit(2, 6.0), Edit(5, 0.0)]
    for scope in (Scope(), Scope(phases=("prompt",)), Scope(phases=("generated",)), Scope(("text",))):
        prompt = lmm.prompt(["what ?", "and why is it so ?"], [None, None])
        with steered(SAEInPlace(lmm, sae, LAYER), prompt, edits, scope):
            cached = lmm.model.generate(**prompt.inputs, max_new_tokens=5, do_sample=False, eos_token_id=-1)
        ids, attended = prompt.inputs["input_ids"], prompt.inputs["attention_mask"]
        length, kinds = ids.shape[1], prompt.mask("base", "tiles", "newline", "text")
        in_scope = prompt.mask(*scope.kinds) if "prompt" in scope.phases else torch.zeros_like(kinds)
        for _ in range(5):
            new = ids.shape[1] - length
            spliced = torch.cat([kinds, torch.ones(2, new, dtype=torch.bool)], 1)
            chosen = torch.cat([in_scope, torch.full((2, new), "generated" in scope.phases)], 1)

            def dense_splice(hidden, spliced=spliced, chosen=chosen):
                out = hidden.clone()
                for mask, own in ((spliced & ~chosen, []), (spliced & chosen, edits)):
                    out[mask] = dense(sae, hidden[mask], own) @ sae.W_dec + sae.b_dec
                return out

            with torch.no_grad(), lmm.spliced(LAYER, dense_splice):
                logits = lmm.model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            attended = torch.cat([attended, torch.ones(2, 1, dtype=attended.dtype)], 1)
        assert torch.equal(cached, ids), scope


def test_positions_choose_tokens_after_the_padding(lmm):
    prompt = lmm.prompt(["a", "a longer one"], [None, None])
    mask = Scope(EVERYWHERE, positions=(0, 2)).of_prompt(prompt)
    padding = prompt.mask("pad").sum(1).tolist()
    assert mask.nonzero().tolist() == [[row, pad + p] for row, pad in enumerate(padding) for p in (0, 2)]
    with pytest.raises(ValueError, match=r"no positions \[99\]"):
        Scope(positions=(99,)).of_prompt(prompt)


def test_sampled_answers_repeat_with_a_seed_and_may_be_several(lmm):
    sae = new_sae()
    settings = dict(do_sample=True, max_new_tokens=6, seed=4)
    first = compare(SAEInPlace(lmm, sae, LAYER), "what ?", None, [Edit(1, 9.0)], **settings)
    assert first == compare(SAEInPlace(lmm, sae, LAYER), "what ?", None, [Edit(1, 9.0)], **settings)
    prompt = lmm.prompt("what ?")
    with steered(SAEInPlace(lmm, sae, LAYER), prompt, [Edit(1, 9.0)]):
        several = lmm.generate(prompt, max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert len(several) == 3


def test_hooks_are_gone_after_an_exception(lmm):
    sae, prompt = new_sae(), lmm.prompt("what ?")
    plain = lmm.logits(prompt)
    with pytest.raises(RuntimeError, match="stop here"), steered(SAEInPlace(lmm, sae, LAYER), prompt, [Edit(1, 9.0)]):
        raise RuntimeError("stop here")
    assert torch.equal(lmm.logits(prompt), plain)


def test_an_sae_of_another_layer_or_model_is_refused(lmm, tmp_path):
    """An SAE folder may record the layer and the model; if it does not, only the width is checked."""
    sae, prompt = new_sae(), lmm.prompt("what ?")
    sae.save(tmp_path / "known")
    write_json(
        tmp_path / "known" / "history.json", {"run": {"layer": LAYER, "model": lmm.fingerprint(LAYER)}, "rows": []}
    )
    own = TopKSAE.load(tmp_path / "known").requires_grad_(False)
    with steered(SAEInPlace(lmm, own, LAYER), prompt):
        pass
    with pytest.raises(ValueError, match="trained on layer 1, not 0"), steered(SAEInPlace(lmm, own, 0), prompt):
        pass
    torch.manual_seed(5)
    other = LMM(*llava_next())
    with (
        pytest.raises(ValueError, match="another model than"),
        steered(SAEInPlace(other, own, LAYER), other.prompt("what ?")),
    ):
        pass
    with pytest.raises(ValueError, match="trained on layer 1, not 0"):
        linear(SAEInPlace(lmm, own, 0), decision(lmm, "why ?", None, "y", "n"))
    sae.save(tmp_path / "unrecorded")
    assert TopKSAE.load(tmp_path / "unrecorded").trained_on is None


def test_a_models_fingerprint_does_not_depend_on_the_precision_that_it_is_held_in():
    torch.manual_seed(0)
    model, processor = llava_next()
    half = LMM(model.bfloat16(), processor).fingerprint(LAYER)
    assert half == LMM(model.float(), processor).fingerprint(LAYER) != LMM(model, processor).fingerprint(0)


def test_what_cannot_be_steered_is_refused(lmm):
    sae, prompt = new_sae(), lmm.prompt("what ?")
    x = torch.zeros(2, 16)
    for wrong, message in {
        "value": (lambda: Edit(1, float("nan")), "finite"),
        "below": (lambda: Edit(1, -2.0), "never below 0"),
        "mode": (lambda: Edit(1, 2.0, "push"), "'push'"),
        "latent": (lambda: steer_latents(sae, x, [Edit(24, 1.0)]), "latents 0 to 23"),
        "twice": (lambda: steer_latents(sae, x, [Edit(1, 1.0), Edit(1, 2.0)]), "more than once"),
        "phase": (lambda: Scope(phases=("later",)), "phases"),
    }.values():
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="width 8"), steered(SAEInPlace(lmm, new_sae(width=8), LAYER), prompt):
        pass
    with steered(SAEInPlace(lmm, sae, LAYER), prompt), pytest.raises(ValueError, match="one `steered` for each prompt"):
        lmm.logits(lmm.prompt("another and longer prompt ?"))


def test_each_sample_of_a_batch_has_its_own_edits(lmm):
    """A batch with different edits answers as its samples do alone; so does `answers`, in batches of any size."""
    sae, image = new_sae(), noise()
    each = [[], [Edit(2, 9.0)], [Edit(2, 9.0), Edit(5, 4.0)], [Edit(7, 20.0)], [Edit(2, 9.0)]]
    prompt = lmm.prompt(["what ?"] * 5, [image] * 5)
    with steered(SAEInPlace(lmm, sae, LAYER), prompt, each):
        together = lmm.logits(prompt)[:, -1]
    alone_prompt = lmm.prompt("what ?", image)
    for row, setting in zip(together, each, strict=True):
        with steered(SAEInPlace(lmm, sae, LAYER), alone_prompt, setting):
            torch.testing.assert_close(row, lmm.logits(alone_prompt)[0, -1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[3])
    said = answers(SAEInPlace(lmm, sae, LAYER), "what ?", image, each, batch=2, max_new_tokens=4)
    assert said == answers(SAEInPlace(lmm, sae, LAYER), "what ?", image, each, batch=5, max_new_tokens=4)
    assert said[1] == said[4]
    with (
        pytest.raises(ValueError, match="5 settings for 1 samples"),
        steered(SAEInPlace(lmm, sae, LAYER), alone_prompt, each),
    ):
        pass
