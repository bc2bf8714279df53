"""What stage 1 left and what it learnt from: the model, its two heads and the vision teacher; and how they are run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)
from transformers.utils.logging import disable_progress_bar

from haplovl.errors import UserError
from haplovl.evaluate.answer import one_line
from haplovl.files import HEADS, STAGE1, TEACHERS, require
from haplovl.model import HaploForConditionalGeneration, HaploModel, HaploProcessor
from haplovl.model.embedding import merge_tiles
from haplovl.model.layout import ImageGrid

PADDING = 0


@dataclass(frozen=True)
class Subject:
    """The parts of stage 1. A head is None where its loss had no weight, `clip` where the teacher has no text tower."""

    core: HaploModel
    processor: HaploProcessor
    teacher: PreTrainedModel
    vision_head: nn.Linear | None
    text_head: nn.Linear | None
    clip: CLIPModel | None
    tokenizer: PreTrainedTokenizerBase | None
    """The teacher's own, for its text tower."""
    device: torch.device
    taught: int | None
    """`stage1.vision_layer` that it was trained with; None where an older version did not write it down."""

    @property
    def words(self) -> torch.Tensor:
        """The language model's embedding matrix W: [V, H]."""
        return self.core.get_input_embeddings().weight

    @property
    def layers(self) -> tuple[int, int]:
        """Hidden states of the pre-decoder and of the teacher: one more than they have layers."""
        return len(self.core.pre_decoder.layers) + 1, len(self.teacher.encoder.layers) + 1


def load_subject(root: Path) -> Subject:
    """Reads models/stage1 and models/teachers below `root`; what stage 1 trains in float32, onto a GPU if there is one.

    The language model takes no part, and stays in memory as it was saved.

    Raises:
        UserError: one of them is missing or damaged.
    """
    stage1, teachers = require(root / STAGE1, "train stage1"), require(root / TEACHERS, "teachers")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vision = teachers / "vision"
    disable_progress_bar()
    try:
        model = HaploForConditionalGeneration.from_pretrained(stage1, dtype="auto").eval()
        processor = HaploProcessor.from_pretrained(stage1)
        heads = load_file(require(stage1 / HEADS, "train stage1"), device=str(device))
        with safe_open(stage1 / HEADS, "pt") as file:
            taught = (file.metadata() or {}).get("vision_layer")  # text, as all metadata are
        teacher, clip = _load_teacher(vision, device)
        own_tokenizer = (vision / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(vision, trust_remote_code=False) if own_tokenizer else None
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"stage 1 or its teacher cannot be loaded: {one_line(error)}") from None
    core = model.model
    for part in (core.image_embedding, core.text_projection, core.pre_decoder, core.get_input_embeddings()):
        part.to(device, torch.float32)
    return Subject(
        core, processor, teacher, _head(heads, "vision_head"), _head(heads, "text_head"), clip, tokenizer, device,
        None if taught is None else int(taught),
    )  # fmt: skip


def _load_teacher(folder: Path, device: torch.device) -> tuple[PreTrainedModel, CLIPModel | None]:
    """The vision tower, and the whole CLIP where `folder` holds both towers."""
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind == "clip":
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        return clip.vision_model, clip
    cls = CLIPVisionModel if kind == "clip_vision_model" else SiglipVisionModel
    return cls.from_pretrained(folder, dtype=torch.float32).eval().to(device), None


def _head(weights: dict[str, torch.Tensor], name: str) -> nn.Linear | None:
    """A linear layer from its saved weight and, where it has one, bias."""
    weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
    if weight is None:
        return None
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    head.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return head.eval()


@dataclass(frozen=True)
class Pass:
    """Rows that went through the pre-decoder.

    Shapes: input_ids [B, L]; real [B, L], false for padding; output [B, L, H], after the final norm; `states` as
    `HaploModel.pre_decode` collects them: [B, L, H] each.
    """

    input_ids: torch.Tensor
    real: torch.Tensor
    output: torch.Tensor
    states: list[torch.Tensor]


def run(
    subject: Subject, rows: Sequence[Sequence[int]], pixels: torch.Tensor | None, grids: Sequence[ImageGrid]
) -> Pass:
    """Rows of token ids with their pictures' tiles [T, C, h, w] through the pre-decoder; one document per row."""
    shape = (len(rows), max(map(len, rows)))
    input_ids, documents = torch.full(shape, PADDING), torch.full(shape, -1)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)], documents[number, : len(row)] = torch.tensor(row), 0
    input_ids, documents = input_ids.to(subject.device), documents.to(subject.device)
    pixels = None if pixels is None else pixels.to(subject.device)
    states: list[torch.Tensor] = []
    output = subject.core.pre_decode(input_ids, pixels, documents, list(grids), states)
    return Pass(input_ids, documents >= 0, output, states)


def run_pictures(subject: Subject, pixels: torch.Tensor, grids: Sequence[ImageGrid]) -> Pass:
    """Pictures alone, one per row: nothing stands before them, as nothing does in the teacher."""
    image_id = subject.core.config.image_token_id
    return run(subject, [[image_id] * subject.processor.grid_tokens(grid) for grid in grids], pixels, grids)


def patches_of(
    subject: Subject, hidden: torch.Tensor, input_ids: torch.Tensor, grids: Sequence[ImageGrid]
) -> torch.Tensor:
    """The patches of all pictures, without class and newline tokens: hidden [B, L, H] → [patches, H]."""
    is_patch = subject.core.image_embedding.is_patch(grids).to(hidden.device)
    return hidden[input_ids == subject.core.config.image_token_id][is_patch]


def teacher_states(subject: Subject, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The teacher's hidden states of tiles, its positions interpolated where they are of another size: [T, n, H] each.

    State 0 is the first layer's input, the last one the last layer's output before any final norm.
    """
    seen = subject.teacher(pixels.to(subject.device), output_hidden_states=True, interpolate_pos_encoding=True)
    return seen.hidden_states


def teacher_patches(
    subject: Subject, state: torch.Tensor, pixels: torch.Tensor, grids: Sequence[ImageGrid]
) -> torch.Tensor:
    """The patches of a hidden state, tiles put together as the model does it: [T, n, H] → [patches, H]."""
    rows, columns = (side // subject.core.config.pre_config.patch_size for side in pixels.shape[-2:])
    # The class token, where the teacher has one, comes first.
    tiles = state[:, -rows * columns :].unflatten(1, (rows, columns))
    parts = zip(tiles.split([grid.tiles for grid in grids]), grids, strict=True)
    return torch.cat([merge_tiles(part, grid).flatten(0, 1) for part, grid in parts])
