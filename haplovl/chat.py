"""A conversation with a trained model: its history, its pictures and videos, and the cache that keeps what was read."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, TextStreamer
from transformers.cache_utils import Cache

from haplovl.errors import UserError
from haplovl.evaluate.answer import Confidence, load_model, one_line
from haplovl.model.generation import context_of
from haplovl.model.processing import VIDEO_TOKEN, reserved_words
from haplovl.model.videos import read_frames
from haplovl.pictures import ImageError, open_image


class ContextFull(UserError):
    """The conversation has more tokens than the model reads."""


@dataclass(frozen=True)
class Medium:
    """A picture (`content` is a PIL image) or a video (a list of them), opened; `kind` is `image` or `video`."""

    kind: str
    path: Path
    content: Any


@dataclass(frozen=True)
class Turn:
    """A message with what was attached to it, and the answer."""

    question: str
    media: tuple[Medium, ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class Reply:
    """An answer; `cut` says that it reached the limit of tokens before its end."""

    text: str
    tokens_in: int
    tokens_out: int
    seconds: float
    cut: bool


def open_picture(path: Path) -> Medium:
    """A picture to attach to a message.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        return Medium("image", path, open_image(path))
    except ImageError as error:
        raise UserError(f"{path}: {error}") from None


def open_video(path: Path, model: Any, processor: Any) -> Medium:
    """A video to attach to a message, as the frames that the processor takes of it.

    Raises:
        UserError: it is missing or cannot be read, or the model knows no videos.
    """
    if None in (model.config.video_token_id, processor.video_token_id):
        raise UserError(f"{path}: this model cannot see videos; it has no {VIDEO_TOKEN} token")
    try:
        return Medium("video", path, read_frames(path, processor.num_frames))
    except ImageError as error:
        raise UserError(f"{path}: {error}") from None


class Chat:
    """The turns so far, and the model that answers the next one. A temperature of 0 always takes the likeliest token.

    Every turn goes through the template as if it were asked with its whole history. What the tokens have in common
    with those in the cache is not computed again.
    """

    def __init__(
        self, model: Any, processor: Any, system: str = "", temperature: float = 0.0, max_new_tokens: int = 256
    ) -> None:
        """Raises UserError where the system text holds special tokens."""
        self.model, self.processor = model, processor
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.special = reserved_words(processor.tokenizer)
        self.system = self._plain(system)
        self.reset()

    def reset(self) -> None:
        """Forgets all turns; the system text stays."""
        self.turns: list[Turn] = []
        self._cache: Cache | None = None
        self._cached_ids: list[int] = []

    def say(
        self,
        question: str,
        media: Sequence[Medium] = (),
        show: Callable[[str], None] = lambda piece: None,
        logits_processor: LogitsProcessorList | None = None,
    ) -> Reply:
        """The model's answer to the next message. `show` gets it piece by piece, as words are formed.

        A KeyboardInterrupt stops the answer; what was said by then stays in the history. After any other error the turn
        is not taken.

        Raises:
            UserError: the message is empty or holds special tokens, or the model cannot take it.
            ContextFull: (a UserError) the conversation is too long with it.
        """
        began = time.monotonic()
        turn = Turn(self._plain(question), tuple(media))
        if not turn.question:
            raise UserError("the question is empty")
        streamer = _Pieces(self.processor.tokenizer, show)
        try:
            inputs = self._inputs([*self.turns, turn])
            length = inputs["input_ids"].shape[1]
            said = self._generate(inputs, self._limit(length), streamer, logits_processor)
        except KeyboardInterrupt:
            streamer.end()
            if streamer.said:
                self.turns.append(replace(turn, answer=streamer.said.strip()))
            raise
        except (ValueError, torch.OutOfMemoryError) as error:
            raise UserError(f"the model cannot take this question: {one_line(error)}") from None
        text = self.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
        self.turns.append(replace(turn, answer=text))
        ends = self.model.generation_config.eos_token_id
        cut = said[-1] not in (ends if isinstance(ends, list) else [ends])
        return Reply(text, length, len(said), time.monotonic() - began, cut)

    def record(self) -> dict[str, Any]:
        """The conversation as JSON: messages with role, text, and the files that were attached."""
        messages: list[dict[str, Any]] = [{"role": "system", "text": self.system}] if self.system else []
        for turn in self.turns:
            files = {f"{kind}s": [str(m.path) for m in turn.media if m.kind == kind] for kind in ("image", "video")}
            messages += [{"role": "user", "text": turn.question, **files}, {"role": "assistant", "text": turn.answer}]
        return {"messages": messages}

    def _plain(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode("utf-8").strip()  # bytes of a terminal may be no valid text
        found = next((token for token in self.special if token in text), None)
        if found:
            raise UserError(
                f"'{found}' means something special to this model and cannot be part of a text; write it differently"
            )
        return text

    def _inputs(self, turns: list[Turn]) -> Any:
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            content = [{"type": medium.kind} for medium in turn.media] + [{"type": "text", "text": turn.question}]
            messages.append({"role": "user", "content": content})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": self._harmless(turn.answer)})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        shown = [medium for turn in turns for medium in turn.media]
        images, videos = ([m.content for m in shown if m.kind == kind] for kind in ("image", "video"))
        inputs = self.processor(text=[text], images=[images], videos=[videos], return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def _limit(self, length: int) -> int:
        """The most tokens that an answer to a prompt of this length can have."""
        context = context_of(self.model.config)
        if length >= context:
            raise ContextFull(
                f"there are {length} tokens with this message; the model's context of {context} leaves no room "
                "to answer"
            )
        return int(min(self.max_new_tokens, context - length))

    def _generate(
        self, inputs: Any, limit: int, streamer: TextStreamer, logits_processor: LogitsProcessorList | None
    ) -> list[int]:
        ids = inputs["input_ids"][0].tolist()
        # The cache is taken away while it is written to: whatever interrupts the answer leaves no half-written one.
        cache, self._cache = self._fitting_cache(ids), None
        out = self.model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=limit,
            **({"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}),
            logits_processor=logits_processor,
            streamer=streamer,
            return_dict_in_generate=True,
        )
        sequence = out.sequences[0].tolist()
        self._cache = out.past_key_values
        self._cached_ids = sequence[: self._cache.get_seq_length()]  # the last token was never an input
        return sequence[len(ids) :]

    def _harmless(self, answer: str) -> str:
        """An answer may spell a special token in common letters; read again, it would be one."""
        for token in self.special:
            answer = answer.replace(token, f"{token[0]} {token[1:]}")
        return answer

    def _fitting_cache(self, ids: list[int]) -> Cache | None:
        """The cache of what these tokens share with the cached ones.

        An answer may become other tokens when its text is read again. Pictures are never cut, as the history holds the
        same ones in the same order.
        """
        cached = self._cached_ids
        end = min(len(cached), len(ids) - 1)  # one token at least must be new
        same = next((i for i in range(end) if cached[i] != ids[i]), end)
        if self._cache is None or not same:
            return None
        self._cache.crop(same - len(cached))
        return self._cache


class _Pieces(TextStreamer):
    """Hands over the words of an answer as soon as they are whole."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.said = show, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        piece = text if self.said else text.lstrip()
        self.said += piece
        if piece:
            self.show(piece)


def ask(
    model_dir: Path, question: str, images: list[Path], videos: list[Path], max_new_tokens: int
) -> tuple[Reply, float]:
    """The answer of a trained model to one question about pictures and videos (or about none).

    Also gives the mean log-probability of the answer's tokens (0 is certain).

    Raises:
        UserError: the question is empty, the folder holds no HaploVL model, or a picture is missing or cannot be read.
    """
    if not question.strip():
        raise UserError("the question is empty")
    pictures = [open_picture(path) for path in images]  # before the model, which takes longer
    model, processor = load_model(model_dir)
    media = [*pictures, *(open_video(path, model, processor) for path in videos)]
    noted = Confidence()
    chat = Chat(model, processor, max_new_tokens=max_new_tokens)
    reply = chat.say(question, media, logits_processor=LogitsProcessorList([noted]))
    return reply, torch.cat(noted.steps).mean().item()
