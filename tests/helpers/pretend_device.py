"""A pretend accelerator, so that code for GPUs is tested where there is none.

Its tensors lie in the CPU's memory and say that they are on the device `sim:0`, or `sim:1` and so on. Whoever mixes
them with tensors of the CPU, or of another number, gets the error that CUDA gives: see `_check_devices`. The arithmetic
is the CPU's, in every dtype.

    with pretend_device():
        lmm = LMM.load(folder, device="sim")

Models are loaded with eager attention, the only one that this kind of tensor can run.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from lmm_sae_nb.support import devices

NAME = "sim"
aten = torch.ops.aten
_setup_privateuseone_for_python_backend(NAME)
torch.sim.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
torch.sim.get_rng_state = lambda device=None: torch.get_rng_state()  # it draws no numbers of its own
torch.sim.set_rng_state = lambda state, device=None: None
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(torch.library.fallthrough_kernel)  # under autocast the arithmetic stays as it is

INDEXING = {  # as on CUDA, the indices of these may be on the CPU
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
}  # fmt: skip
MAKING = {  # these make a tensor where the argument `device` says, else where their first argument is
    aten._to_copy.default, aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.rand_like.default, aten.randn_like.default, aten.new_zeros.default,
    aten.new_empty.default, aten.new_full.default, aten.new_ones.default, aten.new_empty_strided.default,
}  # fmt: skip


class PretendTensor(torch.Tensor):
    """A tensor that says it is on the pretend device; `held` is the tensor of the CPU that it stands for."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, number: int = 0):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, number), requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def __repr__(self):
        return f"PretendTensor({self.held})"

    def __getitem__(self, index):
        return torch.Tensor.__getitem__(self, _as_tensors(index))

    def __setitem__(self, index, value):
        return torch.Tensor.__setitem__(self, _as_tensors(index), value)

    def tolist(self):
        return self.held.tolist()

    def new_tensor(self, data, dtype=None, device=None, requires_grad=False):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, requires_grad=requires_grad)


def _as_tensors(index):
    """Lists in an index as tensors of the CPU; torch would make them on the device, element by element."""
    if isinstance(index, list):
        return torch.tensor(index, dtype=torch.bool if index and isinstance(index[0], bool) else torch.long)
    return tuple(map(_as_tensors, index)) if isinstance(index, tuple) else index


def _is_pretend(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def _held(value):
    """An argument as the CPU's operator takes it."""
    if isinstance(value, PretendTensor):
        return value.held
    return type(value)(map(_held, value)) if type(value) in (list, tuple) else value


def _wrapped(value, number: int):
    """What an operator of the CPU returned, on the pretend device of this number."""
    if isinstance(value, torch.Tensor):
        return PretendTensor(value, number)
    return type(value)(_wrapped(each, number) for each in value) if type(value) in (list, tuple) else value


def _tensors(values) -> Iterator[torch.Tensor]:
    """The tensors among arguments, those in lists too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value)


def _check_devices(function, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError where CUDA would: a tensor of the CPU that is no single number meets one of the device."""
    home = next(tensor.device for tensor in tensors if isinstance(tensor, PretendTensor))
    foreign = [tensor for tensor in tensors if tensor.device != home]
    if function is not aten.equal.default:
        foreign = [tensor for tensor in foreign if tensor.dim() > 0 or isinstance(tensor, PretendTensor)]
    if function in INDEXING:
        if not isinstance(args[0], PretendTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        free = [index for index in args[1] if not isinstance(index, PretendTensor)]
        foreign = [tensor for tensor in foreign if not any(tensor is index for index in free)]
    if foreign:
        shapes = [tuple(tensor.shape) for tensor in foreign]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{home} and {foreign[0].device}! ({function.name()}, on the second: {shapes})"
        )


@cache
def _outputs(function) -> tuple[tuple[int, str], ...]:
    """The place and name of each argument that an operator writes to."""
    named = enumerate(function._schema.arguments)
    return tuple((n, each.name) for n, each in named if each.alias_info is not None and each.alias_info.is_write)


def _run(function, args: tuple, kwargs: dict):
    """Run an operator on what the tensors hold, and wrap what it returns."""
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    pretend = any(isinstance(tensor, PretendTensor) for tensor in tensors)
    device = kwargs.get("device")
    onto = _is_pretend(device)
    home = torch.device(device) if onto else next((t.device for t in tensors if isinstance(t, PretendTensor)), None)
    number = (home and home.index) or 0
    if kwargs.get("generator") is not None and (onto or pretend):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    held = {name: _held(value) for name, value in kwargs.items()}
    if onto:
        held["device"] = torch.device("cpu")
    held |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
    if function in MAKING:
        made = function(*_held(args), **held)
        if any(made is _held(tensor) for tensor in tensors):
            made = made.clone()
        return _wrapped(made, number) if onto or (pretend and device is None) else made
    if function is aten.copy_.default:
        function(*_held(args), **held)
        return args[0]
    if pretend:
        _check_devices(function, args, tensors)
    out = function(*_held(args), **held)
    if function is aten._local_scalar_dense.default or not (pretend or onto):
        return out
    if not (written := _outputs(function)):
        return _wrapped(out, number)
    given = list(_tensors(args[n] if n < len(args) else kwargs.get(name) for n, name in written))
    known = {id(_held(tensor)): tensor for tensor in given}
    several = out if isinstance(out, list | tuple) else [out]
    back = [known[id(value)] if id(value) in known else _wrapped(value, number) for value in several]
    return type(out)(back) if isinstance(out, list | tuple) else back[0]


class _Mode(TorchDispatchMode):
    """Sends what makes tensors on the pretend device, which no pretend tensor is an argument of, to `_run`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = (*_tensors(args), *_tensors(kwargs.values()))
        if any(isinstance(tensor, PretendTensor) for tensor in tensors) or _is_pretend(kwargs.get("device")):
            return _run(function, args, kwargs)
        return function(*args, **kwargs)


class _Constructors(TorchFunctionMode):
    """Does `torch.tensor` and `torch.as_tensor` for the pretend device: no dispatch mode sees them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function not in (torch.tensor, torch.as_tensor):
            return function(*args, **kwargs)
        if isinstance(args[0], torch.Tensor) and function is torch.as_tensor:
            return args[0].to(device=kwargs.get("device", args[0].device), dtype=kwargs.get("dtype", args[0].dtype))
        if isinstance(args[0], PretendTensor):
            return args[0].detach().clone()
        if not _is_pretend(kwargs.get("device")):
            return function(*args, **kwargs)
        needs_gradient = kwargs.pop("requires_grad", False)
        number = torch.device(kwargs["device"]).index or 0
        made = _wrapped(function(*args, **kwargs | {"device": "cpu"}), number)
        return made.requires_grad_() if needs_gradient else made


_from_pretrained = PreTrainedModel.from_pretrained.__func__


def _load(cls, *args, **settings):
    """Load a model as usual, before it is moved to the device: its buffers are not made under a mode."""
    with _disable_current_modes():
        return _from_pretrained(cls, *args, attn_implementation="eager", **settings)


_submit = ThreadPoolExecutor.submit


def _submit_with_modes(pool, function, *args, **kwargs):
    """Give a task to a thread that works on the device, too; a mode holds for one thread."""

    def task():
        with _Mode(), _Constructors():
            return function(*args, **kwargs)

    return _submit(pool, task)


@contextmanager
def pretend_device(*, chosen: bool = True) -> Iterator[None]:
    """Switch the pretend device on.

    chosen: whether it is taken where no device is named, as a GPU would be.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(PreTrainedModel, "from_pretrained", classmethod(_load)))
        stack.enter_context(patch.object(ThreadPoolExecutor, "submit", _submit_with_modes))
        if chosen:
            stack.enter_context(patch.object(devices, "DEFAULT", NAME))
        # a cast makes new parameters; what a tensor holds cannot be exchanged in place
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(_Mode())
        stack.enter_context(_Constructors())
        yield
