"""HaploProcessor: the one place where texts, pictures and videos become tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from haplovl.model.layout import ImageGrid, single_tile, video_blocks
from haplovl.pictures import ImageError, local_path

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"
ROLES = ("system", "user", "assistant")
PARTS = ("image", "video", "text")


class HaploProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; texts hold one `<image>` per picture and one `<video>` per video.

    `num_frames` is how many frames are taken, evenly, from a video file. `add_special_tokens` is what calls leave to
    the tokenizer (off: the chat templates write their own beginning of sequence).
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        class_token: bool = True,
        image_newline: bool = True,
        frame_newlines: bool = True,
        num_frames: int = 8,
        add_special_tokens: bool = False,
        **kwargs: Any,
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        if IMAGE_TOKEN not in vocabulary:
            raise ValueError(f"the tokenizer has no '{IMAGE_TOKEN}' token; add it as a special token first")
        _check_num_frames(num_frames)
        self.class_token = class_token
        self.image_newline = image_newline
        self.frame_newlines = frame_newlines
        self.num_frames = num_frames
        self.add_special_tokens = add_special_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        tokenizer.padding_side = "left"  # as generation needs it, for whoever pads with the tokenizer alone
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id = vocabulary[IMAGE_TOKEN]
        self.video_token_id = vocabulary.get(VIDEO_TOKEN)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As ProcessorMixin.from_pretrained; code that comes with a model never runs, whoever would allow it."""
        kwargs["trust_remote_code"] = False
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def image_tokens(self, height: int, width: int) -> int:
        """Sequence positions that a picture of this size in pixels fills."""
        return self.grid_tokens(self.image_processor.place(height, width).grid)

    def grid_tokens(self, grid: ImageGrid) -> int:
        """Sequence positions of a picture that is laid out like this."""
        return grid.tokens(self.class_token, self.image_newline)

    def video_tokens(self, frames: int) -> int:
        """Sequence positions of a video of this many frames."""
        side = self.image_processor.image_size // self.image_processor.patch_size
        grid = single_tile(side, side)
        return sum(video_blocks(frames, grid, self.class_token, self.image_newline, self.frame_newlines))

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        padding: bool | str = False,
        return_tensors: str | None = None,
        num_frames: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts, their pictures and their videos → what the model takes.

        `images` is a picture, a flat list in the order of the placeholders, or one list per text; a picture is a PIL
        image, a file's path, or an array of 8-bit pixels. `videos` likewise; a video is a list of frames, an array
        [F, H, W, 3], or a file's path, of which `num_frames` are taken. None stands for no picture or video. Padding is
        on the left, as generation needs it.

        Shapes: input_ids and attention_mask [B, L], pixel_values [N, T, 3, s, s], image_grids [N, 8],
        pixel_values_videos [V, F, 3, s, s], video_frames [V].

        Raises:
            ValueError: no text, placeholders that do not match, a picture or video that cannot be used, or a truncation
                that would cut one.
        """
        if text is None:
            raise ValueError("text is missing; a picture alone needs at least the text '<image>'")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(entry, str) for entry in texts):
            raise ValueError("text must be a string or a list of strings, at least one")
        kwargs.pop("audio", None)
        if isinstance(kwargs.get("text_pair"), str):
            kwargs["text_pair"] = [kwargs["text_pair"]]
        pictures = _match(texts, images, IMAGE_TOKEN, "images", is_video=False)
        clips = _match(texts, videos, VIDEO_TOKEN, "videos", is_video=True)
        media: dict[str, Any] = {}
        counts: dict[str, list[int]] = {IMAGE_TOKEN: [], VIDEO_TOKEN: []}
        if pictures:
            media |= self.image_processor(pictures, return_tensors=return_tensors)
            counts[IMAGE_TOKEN] = [self.grid_tokens(ImageGrid(*map(int, grid))) for grid in media["image_grids"]]
        if clips:
            if self.video_token_id is None:
                raise ValueError(f"this processor's tokenizer has no '{VIDEO_TOKEN}' token, but videos were given")
            wanted = self.num_frames if num_frames is None else _check_num_frames(num_frames)
            frames = [self._frames(clip, f"video {i + 1} of {len(clips)}", wanted) for i, clip in enumerate(clips)]
            media |= self.image_processor.preprocess_videos(frames, return_tensors=return_tensors)
            counts[VIDEO_TOKEN] = [self.video_tokens(int(count)) for count in media["video_frames"]]
        for token, sizes in counts.items():
            texts = _expand(texts, token, sizes)
        kwargs.setdefault("add_special_tokens", self.add_special_tokens)
        kwargs.setdefault("padding_side", "left")
        data = dict(self.tokenizer(texts, padding=padding, return_tensors=return_tensors, **kwargs))
        data.pop("token_type_ids", None)
        if media or "text_pair" in kwargs:
            self._check_whole(texts, data["input_ids"])
        return BatchFeature(data | media)

    def _check_whole(self, texts: list[str], input_ids: Any) -> None:
        """Refuses rows of tokens that do not hold all tokens of their text's pictures and videos, and no others."""
        if len(input_ids) != len(texts):
            raise ValueError(f"{len(texts)} texts gave {len(input_ids)} rows of tokens; that cannot be with pictures")
        for number, (text, row) in enumerate(zip(texts, input_ids, strict=True)):
            for token, token_id in ((IMAGE_TOKEN, self.image_token_id), (VIDEO_TOKEN, self.video_token_id)):
                wanted, found = text.count(token), int((np.asarray(row) == token_id).sum())
                if found != wanted:
                    raise ValueError(
                        f"text {number + 1} of {len(texts)} needs {wanted} '{token}' tokens, but {found} are left of "
                        f"it; a picture or video is never cut: give it a larger max_length or no truncation, and no "
                        f"'{token}' in a text_pair"
                    )

    def _frames(self, clip: Any, name: str, count: int) -> Any:
        """The frames of a video's file; anything else as it is."""
        if not isinstance(clip, (str, Path)):
            return clip
        from haplovl.model.videos import read_frames

        try:
            return read_frames(local_path(clip), count)
        except ImageError as error:
            raise ImageError(f"{name}: {str(clip):.200}: {error}") from None

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As ProcessorMixin.apply_chat_template, on one conversation or a list of them.

        Raises:
            ValueError: no messages, an unknown role, or a message without role or content, or with one that is neither
                a text nor a list of parts.
        """
        batched = _is_list(conversation) and bool(conversation) and all(map(_is_list, conversation))
        for messages in conversation if batched else [conversation]:
            _check_messages(messages)
        if kwargs.get("tokenize"):
            conversation, media = _take_media(conversation if batched else [conversation])
            conversation = conversation if batched else conversation[0]
            return self._tokenized(conversation, chat_template, media, **kwargs)
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _tokenized(self, conversation: Any, chat_template: str | None, media: dict[str, Any], **kwargs: Any) -> Any:
        """The template's text through `__call__`, so that files are opened by our own careful reader."""
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask is not supported; `haplovl prepare` makes labels of answers")
        for name in ("tokenize", "load_audio_from_video"):
            kwargs.pop(name, None)
        as_dict, tensors = kwargs.pop("return_dict", False), kwargs.pop("return_tensors", None)
        options = dict(kwargs.pop("processor_kwargs", None) or {})
        for name in ("padding", "truncation", "max_length", "num_frames"):
            if name in kwargs:
                options.setdefault(name, kwargs.pop(name))
        texts = super().apply_chat_template(conversation, chat_template, tokenize=False, **kwargs)
        options.setdefault("return_tensors", None if tensors == "auto" else tensors)
        options.setdefault("add_special_tokens", False)
        single = isinstance(texts, str)
        out = self(text=[texts] if single else texts, **(media | options))
        return out if as_dict else out["input_ids"]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]


def reserved_words(tokenizer: Any) -> list[str]:
    """What no text may hold: strings that the tokenizer reads as one special token, and the placeholders."""
    own = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(own | {IMAGE_TOKEN, VIDEO_TOKEN})


def _match(texts: list[str], given: Any, token: str, what: str, is_video: bool) -> list[Any]:
    """Flattens the pictures or videos, after checking them against the placeholders of every text."""
    wanted = [text.count(token) for text in texts]
    flat, per_text = _flatten(given, len(texts), is_video)
    if per_text is not None and per_text != wanted:
        raise ValueError(f"the texts hold {wanted} '{token}' placeholders, but {per_text} {what} were given")
    if len(flat) != sum(wanted):
        raise ValueError(f"the texts hold {sum(wanted)} '{token}' placeholders, but {len(flat)} {what} were given")
    return flat


def _flatten(given: Any, texts: int, is_video: bool) -> tuple[list[Any], list[int] | None]:
    """A flat list, and how many belong to each text where that is said."""
    if given is None:
        return [], None
    if not _is_list(given):
        return [given], None
    entries = [entry for entry in given if entry is not None]
    # A video may itself be a list of frames, so the depth tells one video, several, and lists per text apart.
    if is_video and entries and not any(_is_list(entry) or _is_whole_video(entry) for entry in entries):
        return [entries], None
    lists = [[part for part in entry if part is not None] for entry in entries if _is_list(entry)]
    of_texts = (not is_video or not part or _is_list(part[0]) or _is_whole_video(part[0]) for part in lists)
    if lists and len(lists) == len(entries) and all(of_texts):
        remaining = iter(lists)
        per_text = [[] if entry is None else next(remaining) for entry in given]
        return [picture for part in per_text for picture in part], [len(part) for part in per_text]
    one_each = len(entries) < len(given) == texts
    return entries, [int(entry is not None) for entry in given] if one_each else None


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_whole_video(value: Any) -> bool:
    return isinstance(value, (str, Path)) or getattr(value, "ndim", 0) == 4


def _check_num_frames(count: int) -> int:
    if count < 1:
        raise ValueError(f"num_frames is {count}; expected at least 1")
    return count


def _expand(texts: list[str], token: str, sizes: list[int]) -> list[str]:
    """Repeats every placeholder once per token of its picture or video."""
    remaining = iter(sizes)
    expanded = []
    for text in texts:
        first, *others = text.split(token)
        expanded.append(first + "".join(token * next(remaining) + part for part in others))
    return expanded


def _check_messages(messages: Any) -> None:
    if not _is_list(messages) or not messages:
        raise ValueError(f"expected a list of messages, found {messages!r:.80}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {number} must be a dictionary with 'role' and 'content', found {message!r:.80}")
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {number} has an unknown role '{message['role']}'; expected one of {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], (str, list, tuple)):
            found = type(message["content"]).__name__
            raise ValueError(f"the content of message {number} must be a text or a list of parts, found {found}")
        for i, part in enumerate([] if isinstance(message["content"], str) else message["content"], 1):
            _check_part(part, f"part {i} of message {number}")


def _check_part(part: Any, name: str) -> None:
    if not isinstance(part, dict) or part.get("type") not in PARTS:
        raise ValueError(f"{name} must be a dictionary with a 'type' of {', '.join(PARTS)}, found {part!r:.80}")
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{name} is a text, but its 'text' is {part.get('text')!r:.80}")


def _take_media(conversations: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Copies of the conversations with bare placeholders, and their pictures and videos, one list per conversation."""
    media: dict[str, list[list[Any]]] = {"images": [], "videos": []}
    bare = []
    for messages in conversations:
        for kind in media.values():
            kind.append([])
        messages = [dict(message) for message in messages]
        for message in messages:
            if not isinstance(message["content"], str):
                message["content"] = [_bare(part, media) for part in message["content"]]
        bare.append(messages)
    return bare, {name: lists for name, lists in media.items() if any(lists)}


def _bare(part: dict[str, Any], media: dict[str, list[list[Any]]]) -> dict[str, Any]:
    kind = part.get("type")
    if kind not in ("image", "video"):
        return part
    for key in (kind, "path", "url"):
        if part.get(key) is not None:
            media[f"{kind}s"][-1].append(part[key])
            return {"type": kind}
    raise ValueError(f"a part of type '{kind}' names no {kind}; give it under '{kind}' or 'path'")
