"""The mixed mask and the rotary positions: what makes one sequence of text and images mean the same everywhere."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

from haplovl.model.documents import Document

FLASH_BACKENDS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
BACKENDS = ("eager", "matmul", "documents", "sdpa", "flex_attention", *FLASH_BACKENDS)


def number_blocks(is_media: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Numbers the image blocks of a batch: −1 for text, k for the tokens of the batch's k-th block.

    Shapes: is_media [B, L] bool, `sizes` the tokens of every block in the order of the rows → [B, L] int64. As sizes
    are known, blocks with no text between them stay apart.

    Raises:
        ValueError: the blocks do not fill the marked positions exactly, or a block is torn apart.
    """
    slots = int(is_media.sum())
    if slots != sum(sizes):
        raise ValueError(
            f"the sequence has room for {slots} image tokens, but {len(sizes)} images or frames of together "
            f"{sum(sizes)} tokens were given; build the inputs with HaploProcessor"
        )
    number = torch.full_like(is_media, -1, dtype=torch.long)
    if not slots:
        return number
    place = is_media.flatten().nonzero()[:, 0]
    size = torch.tensor(sizes, device=place.device)
    last = size.cumsum(0) - 1
    first = last - size + 1
    row = place // is_media.shape[1]
    if bool(((place[last] - place[first] != size - 1) | (row[last] != row[first])).any()):
        raise ValueError("the tokens of an image are torn apart by text or by the end of a row")
    number.view(-1)[place] = torch.repeat_interleave(torch.arange(len(sizes), device=place.device), size)
    return number


@dataclass(frozen=True)
class MixedMask:
    """Which key every query sees: causal, both ways inside one image, never across documents, never padding.

    Shapes: blocks [B, L] (see `number_blocks`; None without images), attention_mask [B, past + L] with 0 for padding
    (None without padding), document_ids [B, L] (None unless packed; no cache). `keys` is past + L, or the size of a
    static cache. A query that is padding itself sees nothing; eager and sdpa then weigh all keys alike.

    Raises:
        ValueError: packed documents together with a cache.
    """

    batch: int
    length: int
    device: torch.device
    blocks: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    past: int = 0
    keys: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", self.keys or self.past + self.length)
        if self.document_ids is not None and self.past:
            raise ValueError("packed documents (document_ids) cannot be combined with a key-value cache")
        if self.attention_mask is not None:
            missing = self.keys - self.attention_mask.shape[1]  # slots of a static cache that nothing fills yet
            object.__setattr__(self, "attention_mask", functional.pad(self.attention_mask.bool(), (0, missing)))

    def causal(self) -> "MixedMask":
        """The same mask without sight of later tokens of the same image."""
        return MixedMask(
            self.batch, self.length, self.device, None, self.attention_mask, self.document_ids, self.past, self.keys
        )

    def dense(self) -> torch.Tensor:
        """True where attention is allowed: [B or 1, 1, L, keys]."""
        query = torch.arange(self.past, self.past + self.length, device=self.device)[:, None]
        key = torch.arange(self.keys, device=self.device)[None, :]
        allowed = (key <= query)[None]
        if self.blocks is not None:
            same = (self.blocks[:, :, None] == self._key_blocks()[:, None, :]) & (self.blocks >= 0)[:, :, None]
            allowed = allowed | same
        if self.document_ids is not None:
            allowed = allowed & (self.document_ids[:, :, None] == self.document_ids[:, None, :])
        if self.attention_mask is not None:
            allowed = allowed & self.attention_mask[:, None, :]
        return allowed[:, None]

    def additive(self, dtype: torch.dtype) -> torch.Tensor:
        """The mask as values added to the scores: 0 where attention is allowed, else the lowest number."""
        allowed = self.dense()
        mask = torch.zeros(allowed.shape, dtype=dtype, device=self.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)

    def block_sparse(self) -> Any:
        """The mask as FlexAttention's BlockMask."""
        blocks, own, documents, real = self.blocks, self._key_blocks(), self.document_ids, self.attention_mask
        past = self.past

        def allowed(b: torch.Tensor, _: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            seen = k <= q + past
            if blocks is not None:
                seen = seen | ((blocks[b, q] == own[b, k]) & (blocks[b, q] >= 0))
            if documents is not None:
                seen = seen & (documents[b, q] == documents[b, k])
            if real is not None:
                seen = seen & real[b, k]
            return seen | (k == q + past)  # padding too sees something, as an empty row is undefined

        return create_block_mask(allowed, self.batch, None, self.length, self.keys, device=self.device)

    def _key_blocks(self) -> torch.Tensor | None:
        if self.blocks is None:
            return None
        return functional.pad(self.blocks, (self.past, self.keys - self.past - self.length), value=-1)

    @property
    def plain(self) -> bool:
        """Whether the mask is the causal one and nothing else, so that a kernel's own causal mask can serve it."""
        no_exception = self.blocks is None and self.document_ids is None and self.attention_mask is None
        fits = self.past == 0 or self.length == 1
        return no_exception and fits and self.keys == self.past + self.length

    def check(self, backend: str) -> None:
        """Asks whether a backend can serve this mask exactly, before anything is computed.

        Raises:
            ValueError: it cannot; nothing is ever silently causal or full.
        """
        if backend not in BACKENDS:
            raise ValueError(f"unknown attention backend '{backend}'; use one of {', '.join(BACKENDS)}")
        if backend == "flex_attention" and self.device.type == "cpu" and torch.is_grad_enabled():
            raise ValueError(
                "flex_attention has no backward on a CPU; train with attn_implementation='sdpa', or run under "
                "torch.inference_mode()"
            )
        if backend == "documents" and self.document_ids is not None:
            self._check_side_by_side(backend)
        if backend not in FLASH_BACKENDS:
            return
        if self.blocks is not None and self.length > 1:
            raise ValueError(
                f"'{backend}' is causal inside images, so it cannot serve the mixed mask; use sdpa or flex_attention "
                "for sequences with images (it serves text, cached decoding and a post-decoder with post_mask 'causal')"
            )
        if self.keys != self.past + self.length:
            raise ValueError(f"'{backend}' cannot serve a static cache; use the dynamic one")
        if self.document_ids is None:
            return
        if self.attention_mask is not None:
            raise ValueError(f"'{backend}' takes packed documents or padding, not both; give padding document_ids too")
        self._check_side_by_side(backend)

    def _check_side_by_side(self, backend: str) -> None:
        found = self.document_ids.sort(dim=1).values
        if int(_document_starts(self.document_ids).sum()) != int(_document_starts(found).sum()):
            raise ValueError(f"'{backend}' needs the tokens of a packed document side by side")

    def for_backend(self, backend: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """The mask as a backend takes it, and further arguments of its attention function.

        Raises:
            ValueError: see `check`.
        """
        self.check(backend)
        if backend == "documents" and self.document_ids is not None:
            return None, {"documents": self._documents(dtype)}
        if backend == "eager" or (backend in ("matmul", "documents") and not (self.plain and self.length == 1)):
            return self.additive(dtype), {}
        if backend == "flex_attention":
            return self.block_sparse(), {}
        if backend in FLASH_BACKENDS:
            return self.attention_mask, self._flash_lengths()
        if self.plain:
            return None, {}
        # An empty row of a boolean mask, as padding has, is undefined for sdpa.
        return self.dense() if self.attention_mask is None else self.additive(dtype), {}

    def _documents(self, dtype: torch.dtype) -> list[Document]:
        """Every packed document with its own additive mask; padding that `document_ids` numbers is one too."""
        found = []
        for row, starts in enumerate(_document_starts(self.document_ids)):
            edges = [*starts.nonzero()[:, 0].tolist(), self.length]
            for start, stop in pairwise(edges):
                part = (slice(row, row + 1), slice(start, stop))
                blocks = None if self.blocks is None else self.blocks[part]
                padding = None if self.attention_mask is None else self.attention_mask[part]
                own = MixedMask(1, stop - start, self.device, blocks, padding)
                found.append(Document(row, start, stop, own.additive(dtype)[0, 0]))
        return found

    def _flash_lengths(self) -> dict[str, Any]:
        """Where documents start and end, for flash-attn's causal kernels."""
        if self.document_ids is not None:
            starts = _document_starts(self.document_ids).flatten().nonzero()[:, 0]
            starts = functional.pad(starts, (0, 1), value=self.document_ids.numel()).int()
            longest = int(starts.diff().max())
            ends, longests = (starts, starts), (longest, longest)
        elif self.batch == 1 and self.length > 1 and self.attention_mask is None:
            # Else transformers would read packed documents out of the positions of an image.
            longests = (self.length, self.keys)
            ends = tuple(torch.tensor([0, end], dtype=torch.int, device=self.device) for end in longests)
        else:
            return {}
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return dict(zip(names, (*ends, *longests), strict=True))


def exact_kernels(mask: MixedMask, backend: str) -> Any:
    """A context in which a backend uses kernels that are right for this mask.

    The gradient of sdpa's fused kernels is undefined in rows of padding. FlexAttention's CPU kernel runs unfused, as
    torch 2.13 cannot compile it for a second shape (two of its C++ names clash).
    """
    if backend == "flex_attention" and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.compiler.set_stance("force_eager")
    needed = backend == "sdpa" and mask.attention_mask is not None and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if needed else nullcontext()


def keep_exact_kernels(checkpoint: Callable) -> Callable:
    """Makes gradient checkpointing run a layer again in the `exact_kernels` of its first run."""
    fused = (
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.cudnn_sdp_enabled,
    )

    def checkpoint_exactly(run: Callable, *args: Any, **kwargs: Any) -> Any:
        def run_exactly(*inputs: Any) -> Any:
            with sdpa_kernel(SDPBackend.MATH):
                return run(*inputs)

        return checkpoint(run if any(enabled() for enabled in fused) else run_exactly, *args, **kwargs)

    return checkpoint_exactly


def _document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """True for the first token of every document; every row begins one. [B, L]."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def rotary_positions(
    blocks: torch.Tensor,
    increment: float,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotary position of every token: text advances by 1, tokens inside an image by `increment` (V2PE).

    Shapes: blocks [B, L], attention_mask [B, L], document_ids [B, L] → [B, L], integers when `increment` is 0 or 1.
    Positions start at 0 in every row and in every document, and count down to the left of the first real token where
    a row is padded. The first token of an image and the text after an image advance by 1.
    """
    previous = torch.cat([torch.full_like(blocks[:, :1], -2), blocks[:, :-1]], dim=1)
    inside = (blocks >= 0) & (blocks == previous)
    dtype = torch.long if increment in (0.0, 1.0) else torch.float32
    taken = torch.ones_like(blocks) if attention_mask is None else attention_mask.long()
    # Integers are added up: they do not round, and sums of floats are not deterministic on a GPU.
    within, outside = (taken * inside).cumsum(dim=1), (taken * ~inside).cumsum(dim=1)
    position = outside - 1 + (within * int(increment) if dtype is torch.long else within.to(dtype) * increment)
    if document_ids is not None:
        starts = _document_starts(document_ids)
        # Positions never fall inside a row, so the latest document start is the running maximum of the starts.
        position = position - torch.where(starts, position, 0).cummax(dim=1).values
    if attention_mask is not None:
        padding = (attention_mask != 0).long().cumsum(dim=1) == 0
        left = torch.arange(blocks.shape[1], device=blocks.device) - padding.sum(dim=1, keepdim=True)
        position = torch.where(padding, left.to(dtype), position)
    return position
