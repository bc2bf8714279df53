"""Option letters in free answers, by the rules of lmms-eval and of VLMEvalKit."""

import re
from collections.abc import Callable, Mapping, Sequence

from haplovl.evaluate.benchmarks.rules import Judgement, Record, Reference, hit

# ---- lmms-eval 0.7.3, lmms_eval/tasks/_task_utils/mcq_extract.py: extract_mcq_answer

_ENDS = (",", ".", "!", "?", ";", ":", "'", '"')
_PHRASES = (
    *(f"{start} {what} is" for what in ("answer", "choice") for start in ("the", "the correct", "correct")),
    *(f"{start} option is" for start in ("the correct", "correct", "the best", "best")),
    *("answer is", "choice is", "the best answer is", "best answer is", "my answer is", "my choice is"),
    *("i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_START, _END, _PHRASE, _FALLBACK = 10, 9, 7, 0
_MARKED = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))
"""Rank and form of a letter that punctuation or a blank marks; the last place of each form counts."""


def last_marked_letter(answer: str, letters: Sequence[str]) -> str | None:
    """The option letter that an answer names most clearly, as lmms-eval's `extract_mcq_answer` finds it.

    Every way to write a letter has a rank: alone at the start, alone at the end, somewhere after a phrase like 'the
    answer is', in brackets, before a period, a colon, a bracket, a blank. The best rank wins; within it, the later
    place. Only if there is none of these, any occurrence counts. Case matters: 'a' is no option.
    """
    if not answer.strip():
        return None
    text = answer.strip()
    for mark in _ENDS:
        text = text.strip(mark)
    text = f" {text} "
    found: list[tuple[int, int, str]] = []
    for rank, form in _MARKED:
        found += [(rank, text.rfind(form.format(x)), x) for x in letters if form.format(x) in text]
    found += _after_phrases(text, letters)
    bare = text.strip()
    found += [(_START, 0, x) for x in letters if bare.startswith(x) and not bare[1:2].isalpha()]
    found += [(_END, len(text) - 1, x) for x in letters if bare.endswith(x) and not bare[-2:-1].isalpha()]
    if not found:
        found = [(_FALLBACK, text.rfind(x), x) for x in letters if x in text]
    return max(found)[2] if found else None


def _after_phrases(text: str, letters: Sequence[str]) -> list[tuple[int, int, str]]:
    lowered, found = text.lower(), []
    for phrase in _PHRASES:
        start = lowered.find(phrase)
        if start < 0:
            continue
        places = ((text.find(letter, start + len(phrase)), letter) for letter in letters)
        found += [(_PHRASE, place, letter) for place, letter in places if place >= 0]
    return found


# ---- VLMEvalKit@e8e78f0, vlmeval/utils/matching_util.py: can_infer, without a judge model

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_NO_OPTION = "Z"
_SAID = re.compile(r"(?i:answer\s+is)\s+\W*([A-Z])\b")


def inferred_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that VLMEvalKit infers from an answer without asking a judge: by its letter, else by its text.

    A letter counts if it is the only one and stands among the last five words, or follows 'answer is'. An option's text
    counts if it is the only one inside the answer (case aside), and the answer is at most twice as long as all options.
    """
    by_letter = _by_letter(answer, options)
    if by_letter:
        return None if by_letter == _NO_OPTION else by_letter
    lowered = answer.lower()
    if len(lowered) > 2 * sum(map(len, options.values())):
        return None
    inside = [letter for letter, option in options.items() if option.lower() in lowered]
    return inside[0] if len(inside) == 1 else None


def _by_letter(answer: str, options: Mapping[str, str]) -> str | None:
    if any(refusal in answer for refusal in _REFUSALS):
        return _NO_OPTION
    words = answer.translate(_BLANKED).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and _NO_OPTION in words:
        return _NO_OPTION
    said = _SAID.search(answer)
    return said[1] if said and said[1] in options else None


def vlmevalkit(options: Callable[[Record], Mapping[str, str]], gold: Callable[[Record], str]) -> Reference:
    """VLMEvalKit's rule for multiple choice; undefined for records without options."""

    def rule(record: Record, answer: str) -> Judgement:
        among = options(record)
        if not among:
            return Judgement(None)
        letter = inferred_option(answer, among)
        return hit(letter == gold(record), letter)

    return Reference(rule, "VLMEvalKit@e8e78f0 vlmeval/utils/matching_util.py can_infer, no judge model")
