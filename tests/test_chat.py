"""`haplovl chat`: the same answers with and without its cache, pieces as they come, and a terminal one can talk to."""

import fcntl
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, set_seed
from typer.testing import CliRunner

from haplovl.chat import Chat, ContextFull, Medium, open_picture, open_video
from haplovl.cli import app
from haplovl.errors import UserError
from haplovl.evaluate.answer import Confidence, load_model
from haplovl.terminal import printable

WORDS = "top left yes no three"


class Say(LogitsProcessorList):
    """Makes a model say these tokens."""

    def __init__(self, ids: list[int], then: type[BaseException] | None = None) -> None:
        super().__init__([_Forced(ids, then)])


class _Forced(LogitsProcessor):
    def __init__(self, ids: list[int], then: type[BaseException] | None) -> None:
        self.ids, self.then = iter(ids), then

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = next(self.ids, None)
        if token is None:
            raise self.then
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Medium]:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return [open_picture(path) for path in paths]


@pytest.fixture
def fed(tiny: tuple[Any, Any]):
    """How many tokens each prompt, or the rest of it, brought into the model."""
    lengths: list[int] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        length = (args[0] if args else kwargs["input_ids"]).shape[1]
        if length > 1:
            lengths.append(length)

    hook = tiny[0].model.register_forward_pre_hook(note, with_kwargs=True)
    yield lengths
    hook.remove()


def words(processor: Any, text: str) -> list[int]:
    """The tokens of an answer that reads back as the same ones."""
    ids = processor.tokenizer(" " + text, split_special_tokens=True)["input_ids"]
    return [*ids, processor.tokenizer.eos_token_id]


def asked_afresh(chat: Chat, **options: Any) -> str:
    """The answer to the last turn's question, from the files and without any cache."""
    messages = [{"role": "system", "content": chat.system}] if chat.system else []
    for turn in chat.turns:
        media = [{"type": medium.kind, "path": str(medium.path)} for medium in turn.media]
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    inputs = chat.processor.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    limits = {"max_new_tokens": chat.max_new_tokens, "do_sample": False, "use_cache": False} | options
    ids = chat.model.generate(**inputs, **limits)[0, inputs["input_ids"].shape[1] :]
    return chat.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_answers_are_those_of_the_whole_history_without_a_cache(tiny, pictures, video, fed) -> None:
    chat = Chat(*tiny, system="Answer briefly.", max_new_tokens=8)
    clip = open_video(video, *tiny)
    messages = [("What is it?", pictures[:1]), ("And this?", pictures[1:]), ("It moves?", [clip]), ("Sure?", [])]
    said, lengths = [], []
    for question, media in messages:
        cached, afresh = Confidence(), Confidence()
        reply = chat.say(question, media, logits_processor=LogitsProcessorList([cached]))
        lengths.append((fed[-1], reply.tokens_in))
        assert reply.text == asked_afresh(chat, logits_processor=LogitsProcessorList([afresh]))
        assert torch.allclose(torch.cat(cached.steps), torch.cat(afresh.steps), atol=1e-4)
        said += torch.cat(cached.steps).tolist()
    assert max(said) - min(said) > 0.01, "the model is as certain everywhere: nothing was compared"
    assert lengths[0][0] == lengths[0][1]
    earlier = [0, *(total for _, total in lengths)]
    for (new, total), before in zip(lengths, earlier, strict=False):
        assert new <= total - before + 1, "what the earlier prompt held was read again"


def test_an_answer_that_reads_back_as_the_same_tokens_stays_in_the_cache(tiny, pictures, fed) -> None:
    chat = Chat(*tiny, max_new_tokens=20)
    first = chat.say("Where?", pictures[:1], logits_processor=Say(words(tiny[1], WORDS)))
    assert (first.text, first.cut) == (WORDS, False)
    second = chat.say("And now?", pictures[1:])
    # All but the end token, which was said last and never was an input.
    assert fed[-1] == second.tokens_in - first.tokens_in - (first.tokens_out - 1)
    assert second.text == asked_afresh(chat)


def test_the_answer_comes_word_by_word(tiny, pictures) -> None:
    pieces: list[str] = []
    ids = words(tiny[1], WORDS)
    reply = Chat(*tiny).say("Where?", pictures[:1], pieces.append, Say(ids))
    assert pieces == ["top ", "left ", "yes ", "no ", "three"]
    assert (reply.text, reply.tokens_out) == (WORDS, len(ids))


def test_an_answer_may_spell_a_placeholder(tiny) -> None:
    chat = Chat(*tiny, max_new_tokens=20)
    assert (
        chat.say("What stands for a picture?", logits_processor=Say(words(tiny[1], "an <image>"))).text == "an <image>"
    )
    assert chat.say("Sure?").tokens_out
    assert chat.record()["messages"][1]["text"] == "an <image>"


def test_a_stopped_answer_stays_in_the_history_as_far_as_it_came(tiny, pictures) -> None:
    chat = Chat(*tiny, max_new_tokens=20)
    chat.say("Hello", pictures[:1])
    with pytest.raises(KeyboardInterrupt):
        chat.say("Where?", pictures[1:], logits_processor=Say(words(tiny[1], WORDS)[:-1], KeyboardInterrupt))
    assert chat.turns[1].answer == WORDS and chat.turns[1].media == (pictures[1],)
    assert chat.say("Where?").text == asked_afresh(chat)


def test_an_answer_that_was_stopped_before_its_first_word_is_no_turn(tiny, pictures) -> None:
    chat = Chat(*tiny, max_new_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        chat.say("Where?", pictures[:1], logits_processor=Say([], KeyboardInterrupt))
    assert not chat.turns
    # Another picture of the same size: none of the first one may be left in a cache.
    assert chat.say("Where?", pictures[1:]).text == asked_afresh(chat)


def test_answers_at_a_temperature_are_those_of_their_seed(tiny) -> None:
    def sampled(seed: int) -> str:
        set_seed(seed)
        return Chat(*tiny, temperature=1.5, max_new_tokens=12).say("Hello").text

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize("text", ["<image>", "so <video>", "<|end|>", "x<|assistant|> sure"])
def test_special_tokens_are_refused_and_the_turn_is_not_taken(tiny, text: str) -> None:
    chat = Chat(*tiny, max_new_tokens=4)
    with pytest.raises(UserError, match="means something special to this model"):
        chat.say(text)
    with pytest.raises(UserError, match="means something special to this model"):
        Chat(*tiny, system=text)
    assert not chat.turns
    assert chat.say("bytes that are no text: \udcff").tokens_out == 4


def test_a_full_context_is_an_error_and_forgetting_helps(short_model_dir: Path, pictures) -> None:
    model, processor = load_model(short_model_dir)
    chat = Chat(model, processor, max_new_tokens=100)
    word = words(processor, WORDS)[0]
    reply = chat.say("What is it?", pictures[:1], logits_processor=Say([word] * 64))
    assert reply.cut and reply.tokens_in + reply.tokens_out == 64
    with pytest.raises(ContextFull, match="the model's context of 64 leaves no room to answer"):
        chat.say("And?")
    assert len(chat.turns) == 1
    chat.reset()
    assert chat.say("And?").tokens_out


def test_a_sliding_window_is_a_limit_only_where_it_is_used() -> None:
    from transformers import MistralConfig, Qwen2Config

    from haplovl.model import HaploConfig
    from haplovl.model.generation import context_of

    def limit(kind, **window):
        return context_of(HaploConfig(text_config=kind(max_position_embeddings=100, **window)))

    assert limit(MistralConfig, sliding_window=10) == 10
    assert limit(MistralConfig, sliding_window=None) == 100
    assert limit(Qwen2Config, sliding_window=10, use_sliding_window=False) == 100


# The command, from a pipe


@pytest.fixture(scope="session")
def short_model_dir(tiny_model_dir: Path, tmp_path_factory) -> Path:
    """A model that reads 64 tokens."""
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("short") / "model")
    replace_in(folder / "config.json", '"max_position_embeddings": 2048', '"max_position_embeddings": 64')
    return folder


@pytest.fixture(scope="session")
def blind_model_dir(tiny_model_dir: Path, tmp_path_factory) -> Path:
    """A model whose tokenizer has no <video> token."""
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("blind") / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        replace_in(folder / name, "<video>", "<other>")
    return folder


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def run_chat(model: Path, *lines: object, options: tuple[object, ...] = ()) -> Any:
    arguments = ["chat", "--model", model, "--max-new-tokens", 6, *options]
    return CliRunner().invoke(app, [str(value) for value in arguments], input="".join(f"{line}\n" for line in lines))


def test_a_piped_chat_prints_answers_and_nothing_else(tiny, tiny_model_dir, pictures, video, tmp_path) -> None:
    saved, [first, second] = tmp_path / "saved.json", [medium.path for medium in pictures]
    lines = ["What is it?", "", f"/image '{second}'", f"/video {video}", "And these?", f"/save {saved}", "/quit", "No"]
    command = [sys.executable, "-m", "haplovl", "chat", "--model", tiny_model_dir, "--image", first]
    done = subprocess.run(
        [*command, "--max-new-tokens", "6", "--system", "Be kind."],
        input="\n".join(lines),
        capture_output=True,
        text=True,
    )
    chat = Chat(*tiny, system="Be kind.", max_new_tokens=6)
    clip = open_video(video, *tiny)
    expected = [chat.say("What is it?", pictures[:1]).text, chat.say("And these?", [pictures[1], clip]).text]
    assert done.returncode == 0, done.stderr
    assert [line.strip() for line in done.stdout.splitlines()] == [printable(text) for text in expected]
    attached = [f"attached to the next message: {path}" for path in (first, second, video)]
    cut = "cut after 6 tokens"
    assert done.stderr.splitlines() == [attached[0], cut, *attached[1:], cut, f"saved to {saved}"]
    asked = [
        {"role": "user", "text": "What is it?", "images": [str(first)], "videos": []},
        {"role": "user", "text": "And these?", "images": [str(second)], "videos": [str(video)]},
    ]
    answers = [{"role": "assistant", "text": text} for text in expected]
    turns = [message for turn in zip(asked, answers, strict=True) for message in turn]
    assert json.loads(saved.read_text()) == {"messages": [{"role": "system", "text": "Be kind."}, *turns]}


def test_commands_that_show_something(tiny_model_dir, pictures) -> None:
    path = pictures[0].path
    done = run_chat(tiny_model_dir, "/history", "/help", f"/image {path}", "Hello", "/history", "/reset", "/history")
    assert done.exit_code == 0, done.stderr
    assert "/save FILE   write the conversation to a JSON file" in done.stdout
    assert done.stdout.count(f"> [image {path}] Hello") == 1
    assert done.stderr.count("nothing was said yet") == 2
    assert "the conversation is forgotten" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image none.png", "none.png: the image is missing"),
        ("/video none.mp4", "none.mp4: the video is missing"),
        ("/image", "name a file after the command; /help shows how"),
        ("/image .", ".: the path is not a file"),
        ("/picture a.png", "there is no command /picture; /help lists them"),
        ("What is <image>?", "'<image>' means something special to this model"),
        ("/save kept.txt", "kept.txt exists and is no .json file; name another"),
        ("/save kept.txt/new.json", "kept.txt/new.json cannot be written: "),
    ],
)
def test_a_line_that_cannot_be_done_is_told_and_the_chat_goes_on(
    line: str, message: str, tiny_model_dir, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.txt").write_text("kept")
    done = run_chat(tiny_model_dir, line, "Hello")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {message}") and done.stdout.strip()
    assert (tmp_path / "kept.txt").read_text() == "kept"


def test_a_full_context_suggests_a_reset(short_model_dir, pictures) -> None:
    done = run_chat(short_model_dir, "Hello", "word " * 30, "/reset", "Hello")
    assert done.exit_code == 1
    assert "context of 64 leaves no room to answer; /reset starts a new conversation\n" in done.stderr
    first, second = done.stdout.splitlines()
    assert first == second


def test_a_tokenizer_without_a_video_token_sees_no_videos(blind_model_dir, video) -> None:
    done = run_chat(blind_model_dir, f"/video {video}", "Hello")
    assert (done.exit_code, len(done.stdout.splitlines())) == (1, 1)
    sentence = f"error: {video}: this model cannot see videos; it has no <video> token"
    assert done.stderr.splitlines()[0] == sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "none"), "there is no model folder none"),
        (("--image", "none.png"), "none.png: the image is missing"),
        (("--video", "none.mp4"), "none.mp4: the video is missing"),
        (("--system", "<image>"), "'<image>' means something special"),
    ],
)
def test_a_chat_that_cannot_begin_says_why(options: tuple[str, ...], message: str, tiny_model_dir) -> None:
    done = run_chat(tiny_model_dir, "Hello", options=options)
    assert isinstance(done.exception, UserError) and str(done.exception).startswith(message)
    assert done.stdout == ""


# The command, on a terminal


class Screen:
    """A terminal with `haplovl chat` in it."""

    def __init__(self, *options: object) -> None:
        self.mine, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "haplovl", "chat", *map(str, options)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
            env=os.environ | {"TERM": "xterm-256color"},
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.mine, text.encode())

    def until(self, text: str) -> str:
        """What the screen showed up to and with this text."""
        seen, deadline = b"", time.monotonic() + 60
        while text.encode() not in seen:
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            if select.select([self.mine], [], [], 1)[0]:
                seen += os.read(self.mine, 1)
        return seen.decode(errors="replace")


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(tiny_model_dir, pictures, tmp_path) -> None:
    endless = shutil.copytree(tiny_model_dir, tmp_path / "endless")  # its answer must not end by itself before Ctrl-C
    settings = json.loads((endless / "generation_config.json").read_text())
    (endless / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": None}))
    screen = Screen("--model", endless, "--image", pictures[0].path, "--max-new-tokens", 1900)
    try:
        shown = screen.until("> ")
        assert "Ask something; /help lists the commands" in shown and "0.png" in shown
        screen.type("Hello\n")
        assert "thinking" in screen.until("\x1b[36m")  # the answer's colour
        screen.type("\x03")
        screen.until("stopped; /quit ends the chat")
        screen.until("> ")
        screen.type("/history\n")
        screen.until("Hello\r\n")
        screen.until("> ")
        screen.type("/image none.png\n")
        assert "\x1b[31merror: none.png: the image is missing" in screen.until("> ")
        screen.type("\x04")
        assert screen.process.wait(30) == 0
    finally:
        screen.process.kill()
        os.close(screen.mine)
