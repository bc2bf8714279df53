"""Chat templates and label spans from one definition: what the model reads and what carries loss."""

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import AddedToken, PreTrainedTokenizerBase

from haplovl.model.processing import IMAGE_TOKEN, VIDEO_TOKEN
from haplovl.records import IMAGE_PLACEHOLDER, Record, RecordError


@dataclass(frozen=True)
class ChatTemplate:
    """The fixed strings around system text, questions and answers.

    `lead` is written before every answer and belongs to its first token, so that a word is the same token there and
    in the middle of a sentence; `stop` ends an answer and carries loss; `after` follows it and does not.
    `user_after_system`, where it is not None, stands before the first question if a system text came before it.
    `special_tokens` are added to a tokenizer that lacks them; every template starts with one of them.
    """

    start: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: str
    stop: str
    lead: str = ""
    after: str = ""
    default_system: str = ""
    user_after_system: str | None = None
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
        before_user = _literal(self.user[0])
        if self.user_after_system is not None:
            first = "{%- if loop.index0 == 1 and messages[0]['role'] == 'system' -%}"
            before_user = f"{first}{_literal(self.user_after_system)}{{%- else -%}}{before_user}{{%- endif -%}}"
        around = {
            "system": (_literal(self.system[0]), _literal(self.system[1])),
            "user": (before_user, _literal(self.user[1])),
            "assistant": (_literal(self.assistant + self.lead), _literal(self.stop + self.after)),
        }
        show = "{{ show(message['content']) }}"
        roles = "".join(
            f"{{%- {'elif' if i else 'if'} message['role'] == '{role}' -%}}{before}{show}{after}"
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
    # FastChat's vicuna_v1.1 (separators " " and "</s>"), which LLaVA-1.5 trained with: nothing stands between </s> and
    # the next USER.
    "vicuna": ChatTemplate(
        start="<s>",
        system=("", " "),
        user=("USER: ", ""),
        assistant=" ASSISTANT:",
        stop="</s>",
        lead=" ",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        special_tokens=("<s>", "</s>"),
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
    # Tokenizer V3 of docs.mistral.ai (Mistral-7B-Instruct-v0.3). The system text opens the first question, as with V1;
    # published V3 moves it to the last one, so that every new turn rewrites what came before it.
    "mistral": ChatTemplate(
        start="<s>",
        system=("[INST] ", "\n\n"),
        user=("[INST] ", "[/INST]"),
        assistant="",
        stop="</s>",
        lead=" ",
        user_after_system="",
        special_tokens=("<s>", "</s>", "[INST]", "[/INST]"),
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
    """The conversation as (kind, text) pieces.

    Kinds: `fixed`, `text` (a system text), `question` (the only kind whose image placeholders stand for pictures),
    `answer` and `stop`; these two carry loss.
    """
    system = record.system or template.default_system
    pieces = [("fixed", template.start)]
    if system:
        pieces += [("fixed", template.system[0]), ("text", system), ("fixed", template.system[1])]
    for number, turn in enumerate(record.turns):
        before = template.user[0]
        if system and not number and template.user_after_system is not None:
            before = template.user_after_system
        pieces += [("fixed", before), ("question", turn.question), ("fixed", template.user[1])]
        pieces += [("fixed", template.assistant), ("answer", template.lead + turn.answer)]
        pieces += [("stop", template.stop), ("fixed", template.after)]
    return [(kind, text) for kind, text in pieces if text]


GUARD = "\ufdd0\ufdd1guard\ufdd1\ufdd0"
"""Stands before every run of text that is encoded, in place of the special token that came before it. Code points
U+FDD0 and U+FDD1 are no characters: no text in Unicode holds them."""


@dataclass
class _Run:
    """A special token (None: the text begins) and the text up to the next one: first what is given, then what is said.

    `loss` tells whether the token carries loss; of the text, what is said does.
    """

    token: int | None = None
    loss: bool = False
    given: str = ""
    said: str = ""


class Encoder:
    """Records → token ids and label spans, for one template and one tokenizer.

    Every answer and its stop token carry loss, nothing else does. Three rules keep labels from lying:

    - Words that look like special tokens are plain text, whoever says them.
    - Text between two special tokens is encoded as a whole, so that the ids are those of the rendered chat template
      also where a tokenizer merges over the seams of the template or writes a space at the start of a text.
    - The tokens before an answer are those of the prompt alone, which is what the model reads when it answers; where a
      merge would reach over that seam, the answer is encoded apart.
    """

    def __init__(self, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template = template
        self._image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._unknown = tokenizer.unk_token_id
        self._control = frozenset(self._special.values()) - {self._unknown}
        longest_first = sorted(self._special, key=lambda token: (-len(token), token))
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._tokenizer = copy.deepcopy(tokenizer)
        # A guard that were special itself would be split with the look-alikes.
        self._tokenizer.add_tokens([AddedToken(GUARD, special=False, normalized=False)])

    def encode(self, record: Record) -> Encoded:
        """Token ids and label spans of a record.

        Raises:
            RecordError: the tokenizer cannot write the text: it has a special token where plain text should be, or no
                token at all for some of an answer.
        """
        return self.encode_many([record])[0]

    def encode_many(self, records: Sequence[Record]) -> list[Encoded]:
        """As `encode`, for many records with one call of the tokenizer."""
        plans = [self._plan(record) for record in records]
        runs = [run for plan in plans for run in plan]
        texts = dict.fromkeys(text for run in runs for text in (run.given, run.given + run.said) if text)
        ids = dict(zip(texts, self._plain(texts), strict=True)) | {"": []}
        return [self._join(plan, ids) for plan in plans]

    def _plan(self, record: Record) -> list[_Run]:
        runs: list[_Run] = []
        for kind, text in segments(record, self.template):
            if GUARD in text:
                raise RecordError("the text holds a mark that is reserved for encoding")
            loss = kind in ("answer", "stop")
            for part in self._parts(kind, text):
                if isinstance(part, int):
                    runs.append(_Run(part, loss))
                    continue
                if not runs or (runs[-1].said and not loss):
                    runs.append(_Run())
                if loss:
                    runs[-1].said += part
                else:
                    runs[-1].given += part
        return runs

    def _parts(self, kind: str, text: str) -> list[int | str]:
        """A piece, cut at the special tokens that it may hold."""
        if kind in ("fixed", "stop"):
            return [self._special.get(part, part) for part in self._cut.split(text) if part]
        if kind == "question":
            return [part for words in text.split(IMAGE_PLACEHOLDER) for part in (self._image_id, words)][1:]
        return [text]

    def _join(self, runs: list[_Run], known: dict[str, list[int]]) -> Encoded:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []

        def add(more: list[int], loss: bool) -> None:
            if loss and more:
                goes_on = spans and spans[-1][1] == len(ids)
                start = spans.pop()[0] if goes_on else len(ids)
                spans.append((start, len(ids) + len(more)))
            ids.extend(more)

        for run in runs:
            given, whole = known[run.given], known[run.given + run.said]
            seam = whole[: len(given)] == given
            add([] if run.token is None else [run.token], run.loss)
            said = whole[len(given) :] if seam else self._apart(run.said)
            self._check(given, said)
            add(given, loss=False)
            add(said, loss=True)
        return Encoded(ids, spans)

    def _check(self, given: list[int], said: list[int]) -> None:
        """Unigram models know special tokens as words, too; and a few vocabularies do not cover all characters."""
        if not self._control.isdisjoint(given) or not self._control.isdisjoint(said):
            raise RecordError("the tokenizer reads words of the text as a special token")
        if self._unknown in said:
            raise RecordError("the tokenizer has no token for some character of an answer")

    def _apart(self, text: str) -> list[int]:
        """A text in the middle of others, if possible without the space that some tokenizers write before a text."""
        for before in ("\n", ":"):
            start, both = self._plain([before, before + text])
            if both[: len(start)] == start:
                return both[len(start) :]
        return self._plain([text])[0]

    def _plain(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of texts as they are after a special token; nothing in them is special."""
        guarded = [GUARD + text for text in texts]
        if not guarded:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        return [ids[1:] for ids in self._tokenizer(guarded, **options, verbose=False)["input_ids"]]


def encode(record: Record, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """As `Encoder.encode`, for one record; an Encoder is cheaper for many."""
    return Encoder(template, tokenizer).encode(record)
