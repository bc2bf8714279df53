"""Chat templates and label spans from one definition: what the model reads and what carries loss."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from haplovl.model.processing import IMAGE_TOKEN, VIDEO_TOKEN
from haplovl.records import IMAGE_PLACEHOLDER, Record


@dataclass(frozen=True)
class ChatTemplate:
    """The fixed strings around system text, questions and answers.

    `lead` is written before every answer and belongs to its first token, so that a word is the same token there and
    in the middle of a sentence; `stop` ends an answer and carries loss; `after` follows it and does not.
    """

    start: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: str
    stop: str
    lead: str = ""
    after: str = ""
    default_system: str = ""
    special_tokens: tuple[str, ...] = ()

    def jinja(self) -> str:
        """The same template for `apply_chat_template`; contents are strings or lists of image and text parts."""
        macro = (
            "{%- macro show(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
            "{%- for part in content -%}{%- if part['type'] == 'image' -%}IMAGE"
            "{%- elif part['type'] == 'video' -%}VIDEO{%- endif -%}{%- endfor -%}"
            "{%- if content | rejectattr('type', 'equalto', 'text') | list -%}{{ '\\n' }}{%- endif -%}"
            "{%- for part in content -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}"
            "{%- endif -%}{%- endmacro -%}"
        )
        macro = macro.replace("IMAGE", IMAGE_TOKEN).replace("VIDEO", VIDEO_TOKEN)
        system = self.system[0] + self.default_system + self.system[1]
        default = ""
        if self.default_system:
            default = "{%- if messages[0]['role'] != 'system' -%}" + _literal(system) + "{%- endif -%}"
        around = {
            "system": self.system,
            "user": self.user,
            "assistant": (self.assistant + self.lead, self.stop + self.after),
        }
        show = "{{ show(message['content']) }}"
        roles = "".join(
            f"{{%- {'elif' if i else 'if'} message['role'] == '{role}' -%}}{_literal(before)}{show}{_literal(after)}"
            for i, (role, (before, after)) in enumerate(around.items())
        )
        unknown = "{%- else -%}{{ raise_exception('unknown role: ' + message['role']) }}{%- endif -%}"
        prompt = "{%- if add_generation_prompt -%}" + _literal(self.assistant) + "{%- endif -%}"
        loop = "{%- for message in messages -%}" + roles + unknown + "{%- endfor -%}"
        return macro + _literal(self.start) + default + loop + prompt


def _literal(text: str) -> str:
    # repr() of a Python string is a valid Jinja string literal for the characters that templates use.
    return "{{ " + repr(text) + " }}" if text else ""


TEMPLATES = {
    "plain": ChatTemplate(
        start="",
        system=("<|system|>", ""),
        user=("<|user|>", ""),
        assistant="<|assistant|>",
        stop="<|end|>",
        lead=" ",
        special_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "vicuna": ChatTemplate(
        start="<s>",
        system=("", ""),
        user=(" USER: ", ""),
        assistant=" ASSISTANT: ",
        stop="</s>",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    "llama-3": ChatTemplate(
        start="<|begin_of_text|>",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop="<|eot_id|>",
        special_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "chatml": ChatTemplate(
        start="",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant="<|im_start|>assistant\n",
        stop="<|im_end|>",
        after="\n",
        special_tokens=("<|im_start|>", "<|im_end|>"),
    ),
}


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids with one placeholder per image, and the spans [start, stop) that carry loss."""

    input_ids: list[int]
    spans: list[tuple[int, int]]

    @property
    def supervised(self) -> int:
        """Number of tokens that carry loss."""
        return sum(stop - start for start, stop in self.spans)


def segments(record: Record, template: ChatTemplate) -> list[tuple[str, str]]:
    """The conversation as (kind, text) pieces; kind is `fixed`, `text` (somebody's words) or `answer`."""
    system = record.system or template.default_system
    pieces = [("fixed", template.start)]
    if system:
        pieces += [("fixed", template.system[0]), ("text", system), ("fixed", template.system[1])]
    for turn in record.turns:
        pieces += [("fixed", template.user[0]), ("text", turn.question), ("fixed", template.user[1])]
        pieces += [("fixed", template.assistant), ("answer", template.lead + turn.answer)]
        pieces += [("fixed", template.after)]
    return [(kind, text) for kind, text in pieces if text]


def encode(record: Record, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Token ids and label spans of a record; every answer and its stop token carry loss, nothing else does.

    Words of users and assistants that look like special tokens are encoded as plain text; only image placeholders
    of questions become the image token.
    """
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for kind, text in segments(record, template):
        if kind == "fixed":
            ids += _fixed(text, tokenizer)
        elif kind == "text":
            for i, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
                ids += ([image_id] if i else []) + _words(part, tokenizer)
        else:
            start = len(ids)
            ids += _words(text, tokenizer) + _fixed(template.stop, tokenizer)
            spans.append((start, len(ids)))
    return Encoded(ids, spans)


def _fixed(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _words(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []
