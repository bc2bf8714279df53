"""The mixed mask and the rotary positions: what makes one sequence of text and images mean the same everywhere."""

import torch

SUPPORTED_BACKENDS = ("eager", "sdpa")


def image_blocks(input_ids: torch.Tensor, image_token_id: int, tokens_per_image: int) -> torch.Tensor:
    """Numbers the images of every row: −1 for text, k for the tokens of the row's k-th image.

    Shapes: input_ids [B, L] → [B, L] int64. Every image fills exactly `tokens_per_image` positions, so that images
    with no text between them stay apart.

    Raises:
        ValueError: a row holds a number of image tokens that is no whole number of images.
    """
    is_image = input_ids == image_token_id
    counts = is_image.sum(dim=1)
    if bool((counts % tokens_per_image).any()):
        raise ValueError(
            f"rows hold {counts.tolist()} image tokens, but every image fills {tokens_per_image} positions; "
            "build the inputs with HaploProcessor"
        )
    number = (is_image.cumsum(dim=1) - 1) // tokens_per_image
    return torch.where(is_image, number, -1)


def mixed_mask(
    blocks: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    past_length: int = 0,
) -> torch.Tensor:
    """Which key every query sees: causal, both ways inside one image, never across documents, never padding.

    Shapes: blocks [B, L] (see `image_blocks`), attention_mask [B, past_length + L] with 0 for padding, document_ids
    [B, L] (no cache) → bool [B, 1, L, past_length + L], True where attention is allowed. Every query sees itself,
    padding too, so that no softmax row is empty.

    Raises:
        ValueError: packed documents together with a cache.
    """
    batch, length = blocks.shape
    query = torch.arange(past_length, past_length + length, device=blocks.device)
    key = torch.arange(past_length + length, device=blocks.device)
    own = blocks.new_full((batch, past_length + length), -1)
    own[:, past_length:] = blocks
    same_image = (blocks[:, :, None] == own[:, None, :]) & (blocks >= 0)[:, :, None]
    allowed = (key[None, :] <= query[:, None])[None] | same_image
    if document_ids is not None:
        if past_length:
            raise ValueError("packed documents (document_ids) cannot be combined with a key-value cache")
        allowed = allowed & (document_ids[:, :, None] == document_ids[:, None, :])
    if attention_mask is not None:
        allowed = allowed & attention_mask.to(torch.bool)[:, None, :]
    allowed = allowed | (key[None, :] == query[:, None])[None]
    return allowed[:, None]


def for_backend(allowed: torch.Tensor, backend: str, dtype: torch.dtype) -> torch.Tensor:
    """Turns the boolean mask into what an attention backend takes.

    Raises:
        ValueError: a backend that cannot be given this mask exactly; nothing is ever silently causal.
    """
    if backend == "sdpa":
        return allowed
    if backend == "eager":
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )
    raise ValueError(
        f"attention backend '{backend}' cannot serve the mixed mask; use one of {', '.join(SUPPORTED_BACKENDS)}"
    )


def rotary_positions(
    blocks: torch.Tensor,
    increment: float,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotary position of every token: text advances by 1, tokens inside an image by `increment` (V2PE).

    Shapes: blocks [B, L], attention_mask [B, L], document_ids [B, L] → [B, L], integers when `increment` is 0 or 1.
    Positions start at 0 in every row and in every document; padding does not advance them. The first token of an
    image and the text after an image advance by 1.
    """
    previous = torch.cat([torch.full_like(blocks[:, :1], -2), blocks[:, :-1]], dim=1)
    inside = (blocks >= 0) & (blocks == previous)
    whole = increment in (0.0, 1.0)
    dtype = torch.long if whole else torch.float32
    step = torch.where(inside, torch.tensor(int(increment) if whole else increment, dtype=dtype), 1).to(dtype)
    if attention_mask is not None:
        step = step * attention_mask.to(dtype)
    position = step.cumsum(dim=1) - 1
    if document_ids is not None:
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        # Positions never fall inside a row, so the latest document start is the running maximum of the starts.
        position = position - torch.where(starts, position, 0).cummax(dim=1).values
    return position.clamp(min=0)
