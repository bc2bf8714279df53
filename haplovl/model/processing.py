"""HaploProcessor: the one place where pictures become tokens."""

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from haplovl.model.configuration import image_token_count

IMAGE_TOKEN = "<image>"


def expand_placeholders(input_ids: Sequence[int], image_token_id: int, tokens_per_image: int) -> list[int]:
    """Repeats every image placeholder once per token that its picture fills."""
    expanded: list[int] = []
    for token in input_ids:
        expanded.extend([token] * (tokens_per_image if token == image_token_id else 1))
    return expanded


class HaploProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; texts hold one `<image>` per picture."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        patch_size: int = 14,
        class_token: bool = True,
        image_newline: bool = True,
        **kwargs: Any,
    ) -> None:
        self.patch_size = patch_size
        self.class_token = class_token
        self.image_newline = image_newline
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @property
    def tokens_per_image(self) -> int:
        """Sequence positions that one picture fills."""
        return image_token_count(self.image_processor.image_size, self.patch_size, self.class_token, self.image_newline)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        padding: bool | str = False,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts and their pictures → input_ids, attention_mask and pixel_values [N, 3, H, W].

        `images` is a picture, a flat list in the order of the placeholders, or one list per text. Padding is on the
        left, as generation needs it.

        Raises:
            ValueError: no text, or a text whose placeholders do not match its pictures.
        """
        if text is None:
            raise ValueError("text is missing; a picture alone needs at least the text '<image>'")
        texts = [text] if isinstance(text, str) else list(text)
        flat = self._match(texts, images)
        texts = [t.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.tokens_per_image) for t in texts]
        # The chat templates write their own beginning of sequence.
        kwargs.setdefault("add_special_tokens", False)
        data = dict(
            self.tokenizer(texts, padding=padding, padding_side="left", return_tensors=return_tensors, **kwargs)
        )
        data.pop("token_type_ids", None)
        if flat:
            data.update(self.image_processor(flat, return_tensors=return_tensors))
        return BatchFeature(data)

    @staticmethod
    def _match(texts: list[str], images: Any) -> list[Any]:
        """Flattens the pictures, after checking them against the placeholders of every text."""
        wanted = [t.count(IMAGE_TOKEN) for t in texts]
        if images is None:
            images = []
        elif not isinstance(images, (list, tuple)):
            images = [images]
        if images and all(isinstance(entry, (list, tuple)) for entry in images):
            given = [len(entry) for entry in images]
            if given != wanted:
                raise ValueError(f"the texts hold {wanted} '{IMAGE_TOKEN}' placeholders, but {given} images were given")
            return [picture for entry in images for picture in entry]
        if len(images) != sum(wanted):
            raise ValueError(
                f"the texts hold {sum(wanted)} '{IMAGE_TOKEN}' placeholders, but {len(images)} images were given"
            )
        return list(images)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]
