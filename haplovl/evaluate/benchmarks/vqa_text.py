"""The text form in which VQA answers are compared: punctuation, number words, articles and contractions.

Three public programs normalise alike but for two patterns, which are arguments here:
lmms-eval 0.7.3 `tasks/_task_utils/vqa_eval_metric.py: EvalAIAnswerProcessor`, the official
GT-Vision-Lab/VQA@a013f00 `vqaEvaluation/vqaEval.py: VQAEval`, and VLMEvalKit@e8e78f0 `dataset/utils/vqa_eval.py`.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(value) for value, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, sign in enumerate(word) if sign == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # so in all three tables

THOUSANDS = re.compile(r"\d,\d")
THOUSANDS_REPEATED = re.compile(r"\d,+\d")
"""lmms-eval also sees a thousands separator in '1,,000'."""
PERIODS = re.compile(r"\.(?!\d)")
"""What the official pattern does: it means to spare periods after a digit as well, but a typo undoes that."""
PERIODS_BETWEEN_WORDS = re.compile(r"(?<!\d)\.(?!\d)")
"""The pattern as it was meant, which VLMEvalKit uses: the period of '2.' stays."""
_MOST_PERIODS = 32
"""The official program hands the flag re.UNICODE, 32, to the argument that limits the replacements."""


def one_line(text: str) -> str:
    """An answer without line breaks and tabs, trimmed: the first step of all three programs."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(
    text: str, thousands: re.Pattern = THOUSANDS_REPEATED, periods: re.Pattern = PERIODS, limit: int = _MOST_PERIODS
) -> str:
    """Punctuation deleted where it stands beside a blank, or the text holds a number like 1,000; else a blank."""
    number, plain = thousands.search(text) is not None, text
    for sign in _PUNCTUATION:
        plain = plain.replace(sign, "" if number or f"{sign} " in text or f" {sign}" in text else " ")
    return periods.sub("", plain, count=limit)


def plain_words(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes put back into contractions."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
