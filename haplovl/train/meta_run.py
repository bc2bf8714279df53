"""Runs an objective forward and backward without weights or memory, and adds up what it would have held.

Weights and activations live on torch's meta device, which knows shapes only. Token ids, masks and positions stay real
and on the CPU, as their values decide shapes (which tokens are learnt, where images stand): every shape check of a
real step is made. What no meta run checks is values, kernels and collectives.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from haplovl.data.loader import Batch

_aten = torch.ops.aten
SMALL = 32 * 2**20
"""Blocks from this size on go back to the system when they are freed (glibc's largest M_MMAP_THRESHOLD)."""
# Their indices are read by value: a boolean mask has no size of its own on the meta device.
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


@dataclass(frozen=True)
class Footprint:
    """Bytes at the fullest moment of a forward and backward pass, weights and optimiser not included.

    `activations` are all tensors but logits (those with the vocabulary as their last dimension) and gradients of
    weights; `with_gradients` is the fullest moment when the gradients of all weights are kept as they come, as in the
    first micro-batch of a step. `small` is the most that blocks under 32 MiB take: on a CPU, glibc keeps those when
    they are freed.
    """

    activations: int
    logits: int
    with_gradients: int
    small: int


class _Ledger(TorchDispatchMode):
    """Counts the bytes of living storages, and lets meta tensors meet the real ones that hold indices."""

    def __init__(self, known: set[int], vocabulary: int) -> None:
        super().__init__()
        self.known, self.vocabulary = known, vocabulary
        self.living: dict[int, tuple[int, bool]] = {}
        self.activations = self.logits = self.gradients = 0
        self.small = 0
        self.peak = self.peak_with_gradients = self.peak_small = 0
        self.at_peak = (0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._to_copy.default and args[0].device.type == "cpu":
            kwargs = {k: v for k, v in kwargs.items() if k != "device"}  # indices stay real wherever they are sent
        if any(x.device.type == "meta" for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)):
            if func in _INDEXED:
                args = tuple(a if place == 1 else _to_meta(a) for place, a in enumerate(args))
            else:
                args, kwargs = _to_meta(args), _to_meta(kwargs)
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._enter(leaf)
        return out

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or key in self.living:
            return
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
        self.living[key] = (storage.nbytes(), is_logits)
        self._add(storage.nbytes(), is_logits)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        size, is_logits = self.living.pop(key, (0, False))
        self._add(-size, is_logits)

    def _add(self, size: int, is_logits: bool) -> None:
        if is_logits:
            self.logits += size
        else:
            self.activations += size
        if abs(size) < SMALL:
            self.small += size
            self.peak_small = max(self.peak_small, self.small)
        total = self.activations + self.logits
        self.peak_with_gradients = max(self.peak_with_gradients, total + self.gradients)
        if total > self.peak:
            self.peak, self.at_peak = total, (self.activations, self.logits)

    def take_gradient(self, parameter: torch.Tensor) -> None:
        """The gradient of a weight is complete: it is counted with the gradients and let go."""
        self.gradients += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None


def _to_meta(values: Any) -> Any:
    """Tensors of the CPU as tensors of the same shape on the meta device; single numbers may stay."""
    return tree_map_only(
        torch.Tensor,
        lambda t: torch.empty_like(t, device="meta") if t.device.type == "cpu" and t.ndim else t,
        values,
    )


class _FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: queries, keys, values, its output and a number per query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _FusedKernels(TorchFunctionMode):
    """On the meta device torch would take sdpa apart into the definition, which keeps all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def checkpointing() -> dict[str, Any]:
    """Arguments of `gradient_checkpointing_enable` for a model on the meta device: layers run again as at first.

    Function modes are off during a backward pass, so the second run gets its own.
    """
    return {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _FusedKernels())}


def run_on_meta(objective: nn.Module, batch: Batch, vocabulary: int, teachers: tuple[nn.Module, ...] = ()) -> Footprint:
    """One forward and backward pass of an objective whose weights are on the meta device.

    `batch` holds real token ids, labels and document ids, and pictures on the meta device; `teachers` are modules that
    the objective uses without having them as parts. Attention by `sdpa` counts as a fused kernel.

    Raises:
        ValueError, RuntimeError: what a real step would raise about shapes.
    """
    modules = (objective, *teachers)
    weights = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    ledger = _Ledger({t.untyped_storage()._cdata for t in weights}, vocabulary)
    with _gradients_to(ledger, objective), _FusedKernels(), ledger:
        sum(objective(batch).values()).backward()
    return Footprint(*ledger.at_peak, ledger.peak_with_gradients, ledger.peak_small)


@contextmanager
def _gradients_to(ledger: _Ledger, objective: nn.Module) -> Iterator[None]:
    handles = [
        p.register_post_accumulate_grad_hook(ledger.take_gradient) for p in objective.parameters() if p.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
