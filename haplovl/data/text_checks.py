"""What is wrong with a text, whatever it says: damaged encoding, answers that teach nothing; and questions compared."""

import hashlib
import re
import unicodedata

from haplovl.records import IMAGE_PLACEHOLDER

# Tab, line feed, vertical tab, form feed and carriage return are blanks; the rest of C0 and DEL belongs in no text.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_LOST = re.compile("[\ufffd\ufffe\uffff]")
_WORDS = re.compile(r"\w+")


def encoding_damage(text: str) -> str | None:
    """What went wrong with the text's encoding, or None.

    Control characters, replacement characters (a decoder gave up), and UTF-8 that was read as another encoding
    (mojibake: "cafÃ©"), where the ftfy library can tell for sure, which is where reading it back gives sense.
    """
    if found := _CONTROL.search(text):
        return f"the control character U+{ord(found[0]):04X}"
    if text.isascii():
        return None
    if _LOST.search(text):
        return "the replacement character U+FFFD, which stands for lost text"
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    if is_bad(text) and fix_encoding(text) != text:
        return f"UTF-8 that was read as another encoding: {_around_damage(text)}"
    return None


def _around_damage(text: str) -> str:
    """The first words that are damaged, for the reason."""
    from ftfy.badness import is_bad

    return next((word for word in text.split() if is_bad(word)), text)[:40]


def degenerate(answer: str, repeats: int) -> str | None:
    """Why an answer teaches nothing though it is not blank, or None.

    It holds punctuation only, one word said `repeats` times or more and nothing else, or one character alone, more
    than four times as often. Symbols are content (a sign "+", an emoji); text that repeats among other text is, too.
    """
    if not answer.strip():
        return None
    if not any(character.isalnum() for character in answer) and not any(
        unicodedata.category(character)[0] in "SM" for character in answer
    ):
        return "only punctuation"
    words = answer.casefold().split()
    if len(words) >= repeats and all(word == words[0] for word in words):
        return "one word repeated"
    if len(words) == 1 and len(answer) > 4 * repeats and len(set(words[0])) == 1:
        return "one character repeated"
    return None


def question_key(question: str, least_words: int) -> int | None:
    """64 bits that agree for questions of the same words, whatever their case, accents' spelling and punctuation.

    None for questions of fewer than `least_words` words: "What is this?" is asked everywhere.
    """
    text = question.replace(IMAGE_PLACEHOLDER, " ")
    words = _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(words) < least_words:
        return None
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "big")
