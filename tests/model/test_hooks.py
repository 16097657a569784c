"""Hooks read, rewrite and stop, for layers that return a tensor and layers that return a tuple."""

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("verb", [hooks.read, hooks.stop, lambda module: hooks.rewrite(module, lambda hidden: hidden)])
def test_hooks_go_after_an_error(stack, verb):
    with pytest.raises(RuntimeError, match="elsewhere"), verb(stack.layers[1]):
        raise RuntimeError("elsewhere")
    assert n_hooks(stack) == 0
