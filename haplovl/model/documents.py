"""Attention inside packed documents, one after the other, for training on a CPU.

Documents of a row never see each other. A dense mask computes and throws away what lies between them: four fifths of
a row of five documents. Here nothing of it is computed, and nothing as large as a score matrix waits for the backward
pass, which computes the weights of a document again. All work is plain matrix products, which on a CPU were measured
faster than torch's fused kernels (docs/training.md, "Speed").
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from haplovl.model.decoder import matmul_attention


class Document(NamedTuple):
    """Positions `start` … `stop` − 1 of a row, and what is added to their scores: mask [length, length]."""

    row: int
    start: int
    stop: int
    mask: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Its part of [B, heads, L, D] → [heads, length, D]."""
        return x[self.row, :, self.start : self.stop]


def document_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    documents: Sequence[Document] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Shapes as in `matmul_attention`, which serves whatever is not packed."""
    if not documents:
        return matmul_attention(module, query, key, value, attention_mask, scaling)
    return _Attention.apply(query, key, value, scaling, documents), None


AttentionInterface.register("documents", document_attention)


class _Attention(torch.autograd.Function):
    """softmax(QKᵀ · scaling + mask)V of every document; [B, heads, L, D] → [B, L, heads, D].

    Softmax adds up in float32 and rounds once, as the definition does. Keys that several heads share are not repeated:
    their queries form one longer product.
    """

    @staticmethod
    def forward(
        context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        documents: Sequence[Document],
    ) -> torch.Tensor:
        batch, heads, length, width = query.shape
        out = query.new_zeros(batch, length, heads, width)
        for document in documents:
            weights = _weights(query, key, scaling, document)
            document.of(out.transpose(1, 2)).copy_((weights @ document.of(value)).view(heads, -1, width))
        context.save_for_backward(query, key, value)
        context.scaling, context.documents = scaling, documents
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = context.saved_tensors
        gradients = [torch.zeros_like(x) for x in (query, key, value)]
        shared = (key.shape[1], -1, query.shape[3])
        for document in context.documents:
            own_query, own_key, own_value = (document.of(x) for x in (query, key, value))
            of_query, of_key, of_value = (document.of(x) for x in gradients)
            weights = _weights(query, key, context.scaling, document)
            of_out = document.of(gradient.transpose(1, 2)).reshape(shared)
            of_value.copy_(weights.transpose(1, 2) @ of_out)
            of_weights = of_out @ own_value.transpose(1, 2)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query.copy_((of_scores @ own_key).view_as(own_query)).mul_(context.scaling)
            of_key.copy_(of_scores.transpose(1, 2) @ own_query.reshape(shared)).mul_(context.scaling)
        return *gradients, None, None


def _weights(query: torch.Tensor, key: torch.Tensor, scaling: float, document: Document) -> torch.Tensor:
    """[key heads, queries of all heads that share one, length]."""
    own_query, own_key = document.of(query), document.of(key)
    length = own_query.shape[1]
    queries = (own_query * scaling).reshape(own_key.shape[0], -1, own_key.shape[2])
    scores = queries @ own_key.transpose(1, 2)
    scores.view(own_query.shape[0], length, length).add_(document.mask)
    return scores.softmax(-1)
