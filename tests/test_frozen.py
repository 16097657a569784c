"""Linear layers by oneDNN: held against float64, against torch's own, and against what must not change."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lmm_sae_nb.frozen import LEAST_ROWS, frozen, plain_products

OP = "mkldnn::_linear_pointwise"


def operations(run) -> set[str]:
    with torch.profiler.profile() as profile:
        run()
    return {event.key for event in profile.key_averages()}


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return frozen(nn.Linear(24, 40))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, LEAST_ROWS, 24, generator=torch.Generator().manual_seed(1))


@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3), wide=st.integers(1, 70), out=st.integers(1, 70),
    bias=st.booleans(), turned=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_product_and_its_gradient_are_those_of_float64(shape, wide, out, bias, turned, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(wide, out, bias)
    exact, layer = copy.deepcopy(layer).double(), frozen(layer)
    x = torch.randn(*shape, wide)
    if turned and x.dim() > 1:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)  # not in the order of its memory
    x.requires_grad_()
    y, wanted = layer(x), exact(x.double())
    assert y.shape == wanted.shape and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(y)
    (slope,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(slope.double(), (weights.double() @ exact.weight), rtol=1e-4, atol=1e-5)


def test_oneDNN_computes_what_is_frozen_and_torch_what_few_rows_are(layer, x):
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN; its wheels for x86 processors have")
    assert OP in operations(lambda: layer(x))
    assert OP not in operations(lambda: layer(x[:1, :-1]))
    x.requires_grad_()
    assert OP in operations(lambda: layer(x))


def test_there_are_second_derivatives(layer, x):
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    weight = layer.weight.double()
    exact = 2 * torch.ones(*x.shape[:-1], 24, dtype=torch.float64) @ weight.T @ weight
    torch.testing.assert_close(second.double(), exact, rtol=1e-4, atol=1e-4)


def test_plain_products_are_torchs_to_the_bit(layer, x):
    with plain_products():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert OP not in operations(lambda: layer(x))
    with pytest.raises(ZeroDivisionError), plain_products():
        1 / 0  # noqa: B018
    assert operations(lambda: layer(x)) & {OP} == operations(lambda: frozen(nn.Linear(24, 40))(x)) & {OP}


def test_a_layer_that_learns_again_gets_its_gradients(layer, x):
    layer.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum((0, 1)).expand(40, 24))
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer.requires_grad_(False)(x), layer.bias.expand(2, LEAST_ROWS, 40))  # no weights are kept


def test_a_copy_has_its_own_weights(layer, x):
    other = copy.deepcopy(layer)
    other.weight.mul_(2)
    other.bias.zero_()
    torch.testing.assert_close(other(x) / 2 + layer.bias, layer(x), rtol=1e-4, atol=1e-5)


def test_other_types_and_autocast_are_as_ever(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_what_counts_operations_counts_them(layer, x):
    with FlopCounterMode(display=False) as counted:
        layer(x)
    assert counted.get_total_flops() == 2 * x.shape[0] * x.shape[1] * 24 * 40


def test_what_does_not_fit_gets_torchs_own_message(layer, x):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(x[..., :20])


def test_only_plain_linear_layers_are_touched_and_only_once():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = frozen(nn.Sequential(nn.Linear(24, 24), Adapted(24, 24), nn.Dropout(0.5)))
    own = model[0].forward
    assert frozen(model) is model and model[0].forward is own
    assert "forward" not in vars(model[1]) and not model.training
    assert not any(part.requires_grad for part in model.parameters())
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_hooks_are_called(layer, x):
    seen = []
    with layer.register_forward_hook(lambda module, args, output: seen.append(output.shape)):
        layer(x)
    assert seen == [(2, LEAST_ROWS, 40)]
