"""Linear layers by oneDNN: held against float64, against torch's own, and against what must not change."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import llava_next, noise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lmm_sae_nb.chat.local import LocalChat
from lmm_sae_nb.model import frozen as module
from lmm_sae_nb.model.frozen import LEAST_ROWS, frozen, plain_products
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.samples import KINDS
from lmm_sae_nb.score.segmenters import PromptedSegmenter
from lmm_sae_nb.score.similarity import ImageTextSimilarity
from lmm_sae_nb.train.token_buffer import Stream

HAS = hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(autouse=True, scope="module")
def on_any_processor():
    """Every processor whose torch has oneDNN does here what those do on which it is the faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "onednn_is_faster", lambda: HAS)
        yield


def by_onednn(run) -> bool:
    """Whether oneDNN computed a linear layer."""
    with torch.profiler.profile() as profile:
        run()
    return "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return frozen(nn.Linear(24, 40))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, LEAST_ROWS, 24, generator=torch.Generator().manual_seed(1))


@given(
    shape=st.lists(st.integers(0, 12), max_size=3), wide=st.integers(1, 70), out=st.integers(1, 70),
    bias=st.booleans(), turned=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_product_and_its_gradient_are_those_of_float64(shape, wide, out, bias, turned, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(wide, out, bias)
    exact, layer = copy.deepcopy(layer).double(), frozen(layer)
    x = torch.randn(*shape, wide)
    if turned and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)  # not in the order of its memory
    x.requires_grad_()
    y, wanted = layer(x), exact(x.double())
    assert y.shape == wanted.shape and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(y)
    (slope,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(slope.double(), (weights.double() @ exact.weight), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not HAS, reason="this torch has no oneDNN; its wheels for x86 processors have")
def test_onednn_computes_what_is_frozen_and_torch_what_few_rows_are(layer, x):
    assert by_onednn(lambda: layer(x)) and by_onednn(lambda: layer(input=x.requires_grad_()))
    assert not by_onednn(lambda: layer(x[:1, :-1])) and not by_onednn(lambda: nn.Linear(24, 40)(x))
    torch.backends.mkldnn.enabled = False
    try:
        assert not by_onednn(lambda: layer(x))
    finally:
        torch.backends.mkldnn.enabled = True


def test_the_processor_decides(layer, x, monkeypatch):
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and not by_onednn(lambda: layer(x))


def test_what_follows_may_work_in_place(layer, x):
    y = nn.Sequential(layer, nn.ReLU(inplace=True))(x.requires_grad_())
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, (y > 0).float() @ layer.weight, rtol=1e-4, atol=1e-5)


def test_there_are_second_derivatives(layer, x):
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    weight = layer.weight.double()
    exact = 2 * torch.ones(*x.shape[:-1], 24, dtype=torch.float64) @ weight.T @ weight
    torch.testing.assert_close(second.double(), exact, rtol=1e-4, atol=1e-4)


def test_plain_products_are_torchs_to_the_bit(layer, x):
    assert by_onednn(lambda: layer(x)) == HAS
    with pytest.raises(ZeroDivisionError), plain_products():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert not by_onednn(lambda: layer(x))
        1 / 0  # noqa: B018
    assert by_onednn(lambda: layer(x)) == HAS


def test_a_layer_that_learns_again_gets_its_gradients(layer, x):
    layer.requires_grad_(True)
    assert not by_onednn(lambda: layer(x))
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


def test_weights_that_are_a_part_of_others_or_of_a_type_of_their_own_are_torchs(layer, x):
    class Own(torch.Tensor):
        pass

    assert not by_onednn(lambda: layer(x.as_subclass(Own)))
    layer.weight = nn.Parameter(torch.randn(40, 30)[:, :24], requires_grad=False)
    assert not by_onednn(lambda: layer(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first forward derivative
def test_functions_can_be_transformed(layer, x):
    rows = x.flatten(0, 1)
    (slope,) = torch.func.vjp(layer, rows)[1](torch.ones(len(rows), 40))
    torch.testing.assert_close(slope, layer.weight.sum(0).expand(len(rows), 24), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x), rtol=1e-4, atol=1e-5)
    moved = layer.weight.sum(1).expand(2, LEAST_ROWS, 40)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1], moved, rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, moved, rtol=1e-4, atol=1e-5)


def test_it_can_be_compiled_whole_and_saved(layer, x):
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_what_counts_operations_counts_them(layer, x):
    with FlopCounterMode(display=False) as counted:
        layer(x)
    assert counted.get_total_flops() == 2 * x.shape[0] * x.shape[1] * 24 * 40


def test_what_does_not_fit_gets_torchs_own_message(layer, x):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(x[..., :20])


def test_only_plain_linear_layers_are_touched():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = frozen(frozen(nn.Sequential(nn.Linear(24, 24), Adapted(24, 24), nn.Dropout(0.5))))
    assert [type(part) for part in model] == [module.FrozenLinear, Adapted, nn.Dropout] and not model.training
    assert not any(part.requires_grad for part in model.parameters())
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_model_goes_with_its_last_name(x):
    layer = frozen(nn.Linear(24, 40))
    gone = weakref.ref(layer)
    layer(x)
    del layer
    assert gone() is None  # at once: no circle waits for the garbage collector with gigabytes of weights


def test_hooks_are_called(layer, x):
    seen = []
    with layer.register_forward_hook(lambda module, args, output: seen.append(output.shape)):
        layer(x)
    assert seen == [(2, LEAST_ROWS, 40)]


@pytest.mark.skipif(not HAS, reason="this torch has no oneDNN; its wheels for x86 processors have")
def test_models_are_used_frozen_and_saes_learn_from_plain_products():
    lmm = LMM(*llava_next())
    prompt = lmm.prompt("what", noise(64, 48), answers="that")
    assert by_onednn(lambda: lmm.hidden_states(prompt, 0))
    stream = Stream(lmm, [{"image": noise(64, 48), "question": "what", "answer": "that"}], 0, KINDS, 0, 1)
    assert not by_onednn(lambda: stream(0))
    with plain_products():
        assert torch.equal(stream(0), lmm.hidden_states(prompt, 0)[prompt.mask(*KINDS)])


@pytest.mark.parametrize(
    "loaded, part",
    [(PromptedSegmenter, "clipseg"), (ImageTextSimilarity, "clip"), (LocalChat, "explainer"), (LMM, "llava-next")],
)
def test_no_model_that_is_only_used_keeps_torchs_layers(root, loaded, part):
    used = loaded.load(root / f"data/models/tiny-{part}")
    kinds = {type(layer) for layer in vars(used).get("model", vars(used).get("_model")).modules()}
    assert module.FrozenLinear in kinds and nn.Linear not in kinds
