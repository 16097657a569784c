"""hooks: read, rewrite, stop and share, for layers that return a tensor and layers that return a tuple."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lmm_sae_nb.model import hooks


class Layer(nn.Module):
    """Adds one; returns a bare tensor or a (hidden, attention, cache) tuple, as transformers' layers did."""

    def __init__(self, as_tuple: bool):
        super().__init__()
        self.as_tuple, self.calls = as_tuple, 0

    def forward(self, hidden):
        self.calls += 1
        return (hidden + 1, "attention", "cache") if self.as_tuple else hidden + 1


class Stack(nn.Module):
    def __init__(self, as_tuple: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(as_tuple) for _ in range(3))

    def forward(self, hidden):
        for layer in self.layers:
            output = layer(hidden)
            if layer.as_tuple:
                assert output[1:] == ("attention", "cache")  # a hook must leave the rest of the tuple alone
            hidden = output[0] if layer.as_tuple else output
        return hidden


@pytest.fixture(params=[False, True], ids=["tensor", "tuple"])
def stack(request):
    return Stack(request.param)


X = torch.zeros(2, 3, 4)


def n_hooks(stack) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in stack.layers)


def test_read_holds_the_latest_output(stack):
    with hooks.read(stack.layers[1]) as captured:
        assert captured.value is None
        assert torch.equal(stack(X), X + 3)
        assert torch.equal(captured.value, X + 2)
        stack(X + 10)
        assert torch.equal(captured.value, X + 12)
    assert n_hooks(stack) == 0
    stack(X)
    assert torch.equal(captured.value, X + 12)  # no longer read


def test_read_keeps_the_batch_axis(stack):
    with hooks.read(stack.layers[0]) as captured:
        stack(X)
    assert captured.value.shape == X.shape


def test_rewrite_feeds_the_next_layer(stack):
    with hooks.rewrite(stack.layers[0], lambda hidden: hidden * 10):
        assert torch.equal(stack(X), X + 12)
    assert n_hooks(stack) == 0
    assert torch.equal(stack(X), X + 3)


def test_rewrites_of_one_layer_nest_and_reads_see_them(stack):
    layer = stack.layers[0]
    with (
        hooks.rewrite(layer, lambda hidden: hidden * 10),
        hooks.read(layer) as between,
        hooks.rewrite(layer, lambda hidden: hidden + 5),
        hooks.read(layer) as after,
    ):
        stack(X)
    assert torch.equal(between.value, X + 10)
    assert torch.equal(after.value, X + 15)


def test_rewrite_lets_gradients_through(stack):
    push = torch.ones(4, requires_grad=True)
    with hooks.rewrite(stack.layers[1], lambda hidden: hidden + push):
        stack(X).sum().backward()
    assert torch.equal(push.grad, torch.full((4,), 6.0))  # 2 x 3 tokens


def test_rewrite_keeps_the_dtype_of_the_model(stack):
    with hooks.rewrite(stack.layers[1], lambda hidden: hidden.float()):
        assert stack(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [lambda hidden: hidden[0], lambda hidden: None])
def test_rewrite_refuses_another_shape_and_is_removed(stack, bad):
    refused = pytest.raises(ValueError, match=r"\(2, 3, 4\).*return a tensor of that same shape")
    with refused, hooks.rewrite(stack.layers[1], bad):
        stack(X)
    assert n_hooks(stack) == 0


def test_stop_runs_nothing_further(stack):
    reached = False
    with hooks.stop(stack.layers[1]) as captured:
        stack(X)
        reached = True
    assert not reached
    assert torch.equal(captured.value, X + 2)
    assert [layer.calls for layer in stack.layers] == [1, 1, 0]
    assert n_hooks(stack) == 0


def test_stop_of_a_module_that_never_runs(stack):
    with hooks.stop(Layer(False)) as captured:
        assert torch.equal(stack(X), X + 3)
    assert captured.value is None


def test_nested_stops_end_at_the_nearest_layer_only(stack):
    after_inner = False
    with hooks.stop(stack.layers[2]) as outer:
        with hooks.stop(stack.layers[0]) as inner:
            stack(X)
        after_inner = True
        stack(X)
    assert after_inner
    assert torch.equal(inner.value, X + 1)
    assert torch.equal(outer.value, X + 3)


def test_an_outer_stop_passes_through_an_inner_one(stack):
    after_inner = False
    with hooks.stop(stack.layers[0]) as outer:
        with hooks.stop(stack.layers[2]) as inner:
            stack(X)
        after_inner = True
    assert not after_inner
    assert inner.value is None
    assert torch.equal(outer.value, X + 1)
    assert n_hooks(stack) == 0


@pytest.mark.parametrize(
    "verb", [hooks.read, hooks.stop, hooks.distinct, lambda module: hooks.rewrite(module, lambda hidden: hidden)]
)
def test_hooks_go_after_an_error(stack, verb):
    with pytest.raises(RuntimeError, match="elsewhere"), verb(stack.layers[1]):
        raise RuntimeError("elsewhere")
    assert n_hooks(stack) == 0


class Encoder(nn.Module):
    """Counts the pictures that it sees, and puts out what only each one's own numbers can give."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixel_values, other=None, as_tuple=False, as_one_row=False):
        self.seen.append(len(pixel_values))
        if as_one_row:
            return [pixel_values.flatten()[None]]
        states = pixel_values.flatten(2).transpose(1, 2) * 2
        if as_tuple:
            return states, "attention", None
        seen = {"last_hidden_state": states, "pooler_output": states.sum(1), "hidden_states": (states, states + 1)}
        return BaseModelOutputWithPooling(**seen)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_equal_pictures_are_seen_once_and_each_gets_its_own(numbers):
    pictures = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0))[numbers]
    encoder, plain = Encoder(), Encoder()
    with hooks.distinct(encoder):
        found, again = encoder(pictures), encoder(pixel_values=pictures, as_tuple=True)
    assert encoder.seen == 2 * [len(set(numbers))]
    wanted = plain(pictures)
    for name in ("last_hidden_state", "pooler_output"):
        assert torch.equal(found[name], wanted[name])
    assert all(map(torch.equal, found.hidden_states, wanted.hidden_states))
    assert torch.equal(again[0], wanted.last_hidden_state)
    assert again[1:] == ("attention", None)


def test_pictures_that_differ_in_one_number_are_both_seen():
    pictures = torch.zeros(2, 3, 64, 64)
    pictures[1, 2, 63, 62] = 1e-7
    encoder = Encoder()
    with hooks.distinct(encoder):
        assert torch.equal(encoder(pictures).last_hidden_state, Encoder()(pictures).last_hidden_state)
    assert encoder.seen == [2]


def test_who_listens_too_gets_a_row_for_each_picture():
    encoder, pictures, heard = Encoder(), torch.zeros(3, 1, 2, 2), []
    handle = encoder.register_forward_hook(lambda module, args, output: heard.append(len(output.last_hidden_state)))
    with hooks.distinct(encoder):
        encoder(pictures)
    handle.remove()
    assert (encoder.seen, heard) == ([1], [3])


def test_an_output_without_a_row_for_each_picture_is_refused():
    encoder = Encoder()
    refused = pytest.raises(ValueError, match=r"saw 2 different pictures and put out \(1, 8\)")
    with refused, hooks.distinct(encoder):
        encoder(torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 2)]), as_one_row=True)
    assert not encoder._forward_hooks


def test_what_is_no_batch_of_pictures_alone_is_left_as_it_is():
    encoder, twice = Encoder(), torch.zeros(2, 3, 2, 2)
    with hooks.distinct(encoder):
        encoder(twice, other=torch.zeros(2))  # a mask of its own may differ for each
        encoder(twice[:, :, 0])
    assert encoder.seen == [2, 2]
    encoder(twice)
    assert encoder.seen == [2, 2, 2]
    assert not encoder._forward_hooks
    assert not encoder._forward_pre_hooks
