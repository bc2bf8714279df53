"""Small teachers for the embedded data: a CLIP on captions and a Llama with its own tokenizer on the training text."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from haplovl.data.conversation import TEMPLATES, ChatTemplate, Encoder, segments
from haplovl.data.media import Media
from haplovl.data.validated import ValidatedRecord, read_validated
from haplovl.errors import UserError
from haplovl.files import RAW
from haplovl.model import HaploImageProcessor
from haplovl.model.processing import IMAGE_TOKEN, VIDEO_TOKEN
from haplovl.progress import reporter
from haplovl.records import IMAGE_PLACEHOLDER, Record
from haplovl.settings import Params
from haplovl.teachers import PAD_TOKEN, prepare_tokenizer, seed_everything

LANGUAGE_WINDOW = 128
"""Tokens per row of the language teacher's training."""
POSITION_STD = 1.0
"""Initial deviation of the vision teacher's position embeddings; its patch embeddings have about 2.3 on the scenes."""


def train_language(params: Params, data: Path, target: Path) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Trains the tokenizer and the small causal language model on the text of the training records."""
    settings = params.teachers.language
    seed_everything(params.seed)
    records = [item.record for item in read_validated(data, split="train")]
    if not records:
        raise UserError("there is no training record to train the language teacher on")
    template = TEMPLATES[params.prepare.chat_template]
    texts = [_words(record, template) for record in records]
    tokenizer = train_tokenizer(texts, settings.vocabulary, params.prepare.chat_template)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    encoder = Encoder(template, tokenizer)
    stream: list[int] = []
    for record in Random(params.seed).sample(records, len(records)):
        stream += [token for token in encoder.encode(record).input_ids if token != image_id]
    rows = torch.tensor(stream[: len(stream) // LANGUAGE_WINDOW * LANGUAGE_WINDOW]).view(-1, LANGUAGE_WINDOW)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=settings.max_positions,
            # 0.02 suits widths of thousands. At 192, look-ups in text scored 0.33 with it and 0.46 with this.
            initializer_range=settings.hidden_size**-0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        return model(input_ids=rows[chosen], labels=rows[chosen], use_cache=False).loss

    final, flops = _train("language teacher", model, settings, len(rows), loss, params.seed)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    size = {"parameters": model.num_parameters(), "training_flops": flops}
    return tokenizer, {"kind": "train", **size, "final_loss": round(final, 4)}


def _words(record: Record, template: ChatTemplate) -> str:
    """What a tokenizer learns from: everything but stop tokens and pictures."""
    text = "".join(text for kind, text in segments(record, template) if kind != "stop")
    return text.replace(IMAGE_PLACEHOLDER, "")


def train_tokenizer(texts: list[str], vocabulary: int, template: str) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer: no text is ever out of vocabulary, and decoding gives back every byte."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    stop = TEMPLATES[template].stop
    special = [PAD_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN, *TEMPLATES[template].special_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*special, *([] if stop in special else [stop])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD_TOKEN, eos_token=stop, clean_up_tokenization_spaces=False
    )
    return prepare_tokenizer(tokenizer, template)


def train_vision(params: Params, data: Path, tokenizer: PreTrainedTokenizerBase, target: Path) -> dict[str, Any]:
    """Trains a small CLIP on pairs of a training picture and its caption and saves it whole, with its tokenizer."""
    settings = params.teachers.vision
    seed_everything(params.seed + 1)
    pairs = list(_captioned(data))
    if len(pairs) < settings.batch:
        raise UserError(f"the vision teacher needs at least {settings.batch} captioned pictures, found {len(pairs)}")
    pixels, ids, mask = _encode_pairs(pairs, tokenizer, params.model.image_size)
    model = CLIPModel(_clip_config(params, tokenizer, ids.shape[1]))
    # The scenes' patch embeddings are a hundred times longer than CLIP's fresh positions: places would drown in them.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=POSITION_STD)

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        longest = int(mask[chosen].sum(dim=1).max())
        return model(
            input_ids=ids[chosen, :longest],
            attention_mask=mask[chosen, :longest],
            pixel_values=pixels[chosen],
            return_loss=True,
        ).loss

    final, flops = _train("vision teacher", model, settings, len(pairs), loss, params.seed, settings.group)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return {
        "kind": "train",
        "parameters": model.vision_model.num_parameters(),
        "training_flops": flops,
        "pairs": len(pairs),
        "final_loss": round(final, 4),
    }


def _captioned(data: Path) -> Iterator[tuple[ValidatedRecord, str]]:
    """Training records with one picture, each with its caption turn, or its first answer where no turn is one."""
    for item in read_validated(data, split="train"):
        if len(item.images) == 1:
            turns = item.record.turns
            yield item, next((turn.answer for turn in turns if turn.kind == "caption"), turns[0].answer)


def _encode_pairs(
    pairs: list[tuple[ValidatedRecord, str]], tokenizer: PreTrainedTokenizerBase, image_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    processor = HaploImageProcessor(image_size, image_size)  # one patch: only the pixels matter here
    media = Media(RAW)
    pictures = [media.open(item.source, item.images[0].path) for item, _ in pairs]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"][:, 0]  # one tile each
    captions = [caption + tokenizer.eos_token for _, caption in pairs]
    text = tokenizer(captions, padding=True, return_tensors="pt", add_special_tokens=False, padding_side="right")
    return pixels, text["input_ids"], text["attention_mask"]


def _clip_config(params: Params, tokenizer: PreTrainedTokenizerBase, caption_tokens: int) -> CLIPConfig:
    settings = params.teachers.vision
    return CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": settings.hidden_size // 2,
            "intermediate_size": settings.intermediate_size // 2,
            "num_hidden_layers": 2,
            "num_attention_heads": settings.heads,
            "max_position_embeddings": caption_tokens,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": settings.hidden_size,
            "intermediate_size": settings.intermediate_size,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": settings.heads,
            "image_size": params.model.image_size,
            "patch_size": settings.patch_size,
        },
        projection_dim=settings.hidden_size // 2,
    )


def _train(
    name: str,
    model: torch.nn.Module,
    settings: Any,
    examples: int,
    loss: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
    group: int = 1,
) -> tuple[float, int]:
    """AdamW with linear warm-up and cosine decay over random batches of groups of neighbours.

    Returns the mean loss of the last 20 steps, and the floating-point operations of all of them as torch counts them
    in the first one.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    warmup = max(1, settings.steps // 20)
    losses, flops = [], 0
    with reporter(name, settings.steps) as report:
        for step in range(settings.steps):
            progress = min(1.0, max(0.0, (step - warmup) / max(1, settings.steps - warmup)))
            rate = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
            for parameters in optimizer.param_groups:
                parameters["lr"] = settings.learning_rate * rate
            first = torch.randperm(examples // group, generator=generator)[: settings.batch // group] * group
            with FlopCounterMode(display=False) if step == 0 else nullcontext() as counter:
                value = loss((first[:, None] + torch.arange(group)).flatten())
                value.backward()
            flops = flops or counter.get_total_flops() * settings.steps
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise UserError(f"the {name} diverged at step {step + 1}; lower its learning_rate")
            report.update(step + 1, f"loss {losses[-1]:.3f}")
    model.eval()
    return sum(losses[-20:]) / len(losses[-20:]), flops
