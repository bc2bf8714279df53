"""One form for the ways in which published sets write a conversation.

    {"conversations": [{"from": "human" | "gpt" | "system", "value": text}]}          LLaVA, ShareGPT, ShareGPT4V
    {"messages": [{"role": "user" | "assistant" | "system", "content": text}]}        OpenAI, LLaMA-Factory, TRL
    {"messages": [{"role": …, "content": [{"type": "text", "text": …}, {"type": "image", …}]}]}   with parts

What fits none of them is left as it is: the record's parser names the fault.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from haplovl.records import IMAGE_PLACEHOLDER, RawItem

ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "bing": "gpt",
    "bard": "gpt",
    "system": "system",
}
IDS = ("id", "sample_id", "question_id")
"""Where sets keep a record's id; M4-Instruct says `sample_id`."""


def as_llava(item: RawItem) -> RawItem:
    """The entry with `id`, `image` and `conversations` as LLaVA writes them; other fields but `split` are dropped.

    An entry without an id is named after its place: two runs over the same files agree.
    """
    data = item.data
    if not isinstance(data, dict):
        return item
    conversations, shown = _conversations(data)
    image = next((data[name] for name in ("image", "images") if data.get(name) is not None), shown or None)
    adapted = {"id": id_of(item), "conversations": conversations, **split_of(data)}
    if image is not None:
        adapted["image"] = image
    return replace(item, data=adapted)


def split_of(data: Any) -> dict[str, Any]:
    """The split that an entry names, as a field of a record; nothing where it names none."""
    named = data.get("split") if isinstance(data, dict) else None
    return {} if named is None else {"split": named}


def id_of(item: RawItem) -> Any:
    """The entry's own id, else the name of its file and its position."""
    found = [item.data[name] for name in IDS if item.data.get(name) is not None]
    return found[0] if found else f"{Path(item.file).stem}-{item.position}"


def mark_caption(item: RawItem) -> RawItem:
    """The entry as a caption, where it is one question and one answer about a picture."""
    talk = item.data.get("conversations") if isinstance(item.data, dict) else None
    if not isinstance(talk, list) or not item.data.get("image") or not all(isinstance(m, dict) for m in talk):
        return item
    if [message.get("from") for message in talk] != ["human", "gpt"]:
        return item
    return replace(item, data={**item.data, "conversations": [{**talk[0], "kind": "caption"}, talk[1]]})


def _conversations(data: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The conversation in LLaVA's form, and the images that its parts name."""
    messages = next((data[n] for n in ("conversations", "messages", "conversation") if data.get(n) is not None), None)
    if not isinstance(messages, list):
        return messages, []
    images: list[Any] = []
    return [_message(message, images) for message in messages], images


def _message(message: Any, images: list[Any]) -> Any:
    if not isinstance(message, dict):
        return message
    role = message.get("from", message.get("role"))
    value = message.get("value", message.get("content"))
    if isinstance(value, list):
        value = _joined(value, images)
    adapted = {"from": ROLES.get(role, role) if isinstance(role, str) else role, "value": value}
    return {**adapted, "kind": message["kind"]} if isinstance(message.get("kind"), str) else adapted


def _joined(parts: list[Any], images: list[Any]) -> Any:
    """A message's parts as one text with placeholders; the parts themselves where one is of an unknown type."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            place = part.get("image", part.get("image_url"))
            place = place.get("url") if isinstance(place, dict) else place
            images += [place] if place is not None else []
            texts.append(IMAGE_PLACEHOLDER)
        else:
            return parts
    return "\n".join(texts)
