"""HaploProcessor: the one place where texts, pictures and videos become tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from haplovl.model.layout import ImageGrid, single_tile
from haplovl.pictures import ImageError

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"
ROLES = ("system", "user", "assistant")


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
        self.class_token = class_token
        self.image_newline = image_newline
        self.frame_newlines = frame_newlines
        self.num_frames = num_frames
        self.add_special_tokens = add_special_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        known = VIDEO_TOKEN in tokenizer.get_vocab()
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN) if known else None

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
        if self.frame_newlines:
            return frames * self.grid_tokens(grid)
        return frames * grid.tokens(self.class_token, False) + int(self.image_newline)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        padding: bool | str = False,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts, their pictures and their videos → what the model takes.

        `images` is a picture, a flat list in the order of the placeholders, or one list per text; a picture is a PIL
        image, a file's path, or an array of 8-bit pixels. `videos` likewise; a video is a list of frames, an array
        [F, H, W, 3], or a file's path. Padding is on the left, as generation needs it.

        Shapes: input_ids and attention_mask [B, L], pixel_values [N, T, 3, s, s], image_grids [N, 8],
        pixel_values_videos [V, F, 3, s, s], video_frames [V].

        Raises:
            ValueError: no text, placeholders that do not match, or a picture or video that cannot be used.
        """
        if text is None:
            raise ValueError("text is missing; a picture alone needs at least the text '<image>'")
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(entry, str) for entry in texts):
            raise ValueError("text must be a string or a list of strings")
        kwargs.pop("audio", None)
        pictures = _match(texts, images, IMAGE_TOKEN, "images", is_video=False)
        clips = _match(texts, videos, VIDEO_TOKEN, "videos", is_video=True)
        media: dict[str, Any] = {}
        counts: dict[str, list[int]] = {IMAGE_TOKEN: [], VIDEO_TOKEN: []}
        if pictures:
            media |= self.image_processor(pictures, return_tensors=return_tensors)
            counts[IMAGE_TOKEN] = [self.grid_tokens(ImageGrid(*map(int, grid))) for grid in media["image_grids"]]
        if clips:
            if self.video_token_id is None:
                raise ValueError("this processor's tokenizer has no '<video>' token, but videos were given")
            frames = [self._frames(clip, i + 1) for i, clip in enumerate(clips)]
            media |= self.image_processor.preprocess_videos(frames, return_tensors=return_tensors)
            counts[VIDEO_TOKEN] = [self.video_tokens(len(clip)) for clip in frames]
        for token, sizes in counts.items():
            texts = _expand(texts, token, sizes)
        kwargs.setdefault("add_special_tokens", self.add_special_tokens)
        data = dict(
            self.tokenizer(texts, padding=padding, padding_side="left", return_tensors=return_tensors, **kwargs)
        )
        data.pop("token_type_ids", None)
        return BatchFeature(data | media)

    def _frames(self, clip: Any, number: int) -> Sequence[Any]:
        if not isinstance(clip, (str, Path)):
            return clip
        from haplovl.model.videos import read_frames

        try:
            return read_frames(Path(clip), self.num_frames)
        except ImageError as error:
            raise ImageError(f"video {number}: {clip}: {error}") from None

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As ProcessorMixin.apply_chat_template, on one conversation or a list of them.

        Raises:
            ValueError: an unknown role, or a message without role or content.
        """
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        for messages in conversation if batched else [conversation]:
            _check_messages(messages)
        if kwargs.get("tokenize"):
            conversation, media = _take_media(conversation if batched else [conversation])
            conversation = conversation if batched else conversation[0]
            return self._tokenized(conversation, chat_template, media, **kwargs)
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _tokenized(self, conversation: Any, chat_template: str | None, media: dict[str, Any], **kwargs: Any) -> Any:
        """The template's text through `__call__`, so that files are opened by our own careful reader."""
        for name in ("tokenize", "load_audio_from_video", "return_assistant_tokens_mask"):
            kwargs.pop(name, None)
        as_dict, tensors = kwargs.pop("return_dict", False), kwargs.pop("return_tensors", None)
        options = dict(kwargs.pop("processor_kwargs", None) or {})
        for name in ("padding", "truncation", "max_length"):
            if name in kwargs:
                options.setdefault(name, kwargs.pop(name))
        texts = super().apply_chat_template(conversation, chat_template, tokenize=False, **kwargs)
        options.setdefault("return_tensors", None if tensors == "auto" else tensors)
        options.setdefault("add_special_tokens", False)
        single = isinstance(texts, str)
        out = self(text=[texts] if single else texts, **media, **options)
        return out if as_dict else out["input_ids"]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]


def _match(texts: list[str], given: Any, token: str, what: str, is_video: bool) -> list[Any]:
    """Flattens the pictures or videos, after checking them against the placeholders of every text."""
    wanted = [text.count(token) for text in texts]
    flat, per_text = _flatten(given, len(texts), wanted, is_video)
    if per_text is not None and per_text != wanted:
        raise ValueError(f"the texts hold {wanted} '{token}' placeholders, but {per_text} {what} were given")
    if len(flat) != sum(wanted):
        raise ValueError(f"the texts hold {sum(wanted)} '{token}' placeholders, but {len(flat)} {what} were given")
    return flat


def _flatten(given: Any, texts: int, wanted: list[int], is_video: bool) -> tuple[list[Any], list[int] | None]:
    """A flat list, and how many belong to each text where that is said."""

    def is_list(value: Any) -> bool:
        return isinstance(value, (list, tuple))

    if given is None:
        return [], None
    if not is_list(given):
        return [given], None
    entries = [entry for entry in given if entry is not None]
    if not is_video:
        if entries and all(map(is_list, entries)):
            return [picture for entry in entries for picture in entry], [len(entry) for entry in entries]
        return list(entries), None
    # A video may itself be a list of frames, so the depth tells one video, several, and lists per text apart.
    if entries and not any(map(is_list, entries)) and not any(_is_whole_video(entry) for entry in entries):
        return [entries], None
    nested = all(map(is_list, entries)) and all(
        len(entry) == 0 or is_list(entry[0]) or _is_whole_video(entry[0]) for entry in entries
    )
    if entries and nested:
        return [video for entry in entries for video in entry], [len(entry) for entry in entries]
    return list(entries), None


def _is_whole_video(value: Any) -> bool:
    return isinstance(value, (str, Path)) or getattr(value, "ndim", 0) == 4


def _expand(texts: list[str], token: str, sizes: list[int]) -> list[str]:
    """Repeats every placeholder once per token of its picture or video."""
    remaining = iter(sizes)
    expanded = []
    for text in texts:
        first, *others = text.split(token)
        expanded.append(first + "".join(token * next(remaining) + part for part in others))
    return expanded


def _check_messages(messages: Any) -> None:
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {number + 1} must be a dictionary with 'role' and 'content', found {message!r}")
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {number + 1} has an unknown role '{message['role']}'; expected one of {', '.join(ROLES)}"
            )


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
    return bare, {name: lists if any(lists) else None for name, lists in media.items()}


def _bare(part: dict[str, Any], media: dict[str, list[list[Any]]]) -> dict[str, Any]:
    kind = part.get("type")
    if kind not in ("image", "video"):
        return part
    for key in (kind, "path", "url"):
        if part.get(key) is not None:
            value = part[key]
            if isinstance(value, str) and value.startswith(("http://", "https://", "data:")):
                raise ValueError(f"'{value[:60]}' is no local file; download the {kind} and give its path")
            media[f"{kind}s"][-1].append(value)
            return {"type": kind}
    raise ValueError(f"a part of type '{kind}' names no {kind}; give it under '{kind}' or 'path'")
