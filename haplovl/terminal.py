"""`haplovl ask` and `haplovl chat` as people and scripts see them: lines in, answers and plain sentences out."""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import set_seed

from haplovl import chat
from haplovl.chat import Chat, ContextFull, Medium, open_picture, open_video
from haplovl.errors import UserError, printable
from haplovl.evaluate.answer import load_model
from haplovl.files import write_json

PROMPT = "> "
COMMANDS = {
    "/image FILE": "attach a picture to the next message; again for several",
    "/video FILE": "attach a video to the next message",
    "/history": "show the conversation so far",
    "/reset": "forget the conversation and what is attached",
    "/save FILE": "write the conversation to a JSON file",
    "/help": "show this list",
    "/quit": "end the chat; Ctrl-D does too. Ctrl-C stops an answer.",
}


def ask(model: Path, question: str, images: list[Path], videos: list[Path], max_new_tokens: int, as_json: bool) -> None:
    """Prints the answer to one question, alone or as one JSON object. The question `-` stands for standard input.

    Raises:
        UserError: as `haplovl.chat.ask`.
    """
    if question == "-":
        _forgive_input()
        question = sys.stdin.read()
    reply, confidence = chat.ask(model, question, images, videos, max_new_tokens)
    if not as_json:
        print(printable(reply.text))
        return
    result = {
        "question": question.strip(),
        "answer": reply.text,
        "confidence": round(confidence, 3),
        "images": [str(path) for path in images],
        "videos": [str(path) for path in videos],
        "model": str(model),
        "tokens_in": reply.tokens_in,
        "tokens_out": reply.tokens_out,
        "seconds": round(reply.seconds, 3),
    }
    print(json.dumps(result))


def talk(
    model_dir: Path,
    images: list[Path],
    videos: list[Path],
    system: str,
    temperature: float,
    max_new_tokens: int,
    seed: int | None,
) -> bool:
    """Chats until the end of the input. False where a line from a pipe could not be done.

    Raises:
        UserError: the folder holds no HaploVL model, or a picture or video given at the start cannot be read.
    """
    terminal = Terminal()
    pictures = [open_picture(path) for path in images]  # before the model, which takes longer
    with terminal.waiting("loading the model"):
        model, processor = load_model(model_dir)
    clips = [open_video(path, model, processor) for path in videos]
    if seed is not None:
        set_seed(seed)
    terminal.chat = Chat(model, processor, system, temperature, max_new_tokens)
    terminal.greet(model_dir)
    for medium in [*pictures, *clips]:
        terminal.attach(medium)
    terminal.run()
    return terminal.interactive or not terminal.failed


class Terminal:
    """The chat's lines. Answers, and what was asked for, go to stdout; notes and errors to stderr.

    Prompts, colours and Ctrl-C that stops only the answer are for people. From a pipe every line is a message or a
    command; an error does not stop the rest, but is remembered in `failed`.
    """

    chat: Chat

    def __init__(self) -> None:
        _forgive_input()
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(highlight=False, soft_wrap=True, stderr=True)
        self.attached: list[Medium] = []
        self.failed = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": lambda file: self.attach(open_picture(_path(file))),
            "/video": lambda file: self.attach(open_video(_path(file), self.chat.model, self.chat.processor)),
            "/history": self._history,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }

    def greet(self, model_dir: Path) -> None:
        """The first line a person sees."""
        if self.interactive:
            device = self.chat.model.device.type
            self.note(f"{model_dir} on {device}. Ask something; /help lists the commands, /quit ends the chat.")
            with suppress(ImportError):  # gives input() its editing keys; Windows has none
                import readline  # noqa: F401

    def run(self) -> None:
        """Reads and answers lines until /quit or the end of the input."""
        while True:
            try:
                line = self._read()
                if line is None or line.strip() == "/quit":
                    return
                if line.strip():
                    self._do(line.strip())
            except ContextFull as error:
                self._error(f"{error}; /reset starts a new conversation")
            except UserError as error:
                self._error(str(error))
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.out.print()
                self.note("stopped; /quit ends the chat")

    def attach(self, medium: Medium) -> None:
        """Keeps a picture or video for the next message."""
        self.attached.append(medium)
        self.note(f"attached to the next message: {medium.path}")

    def note(self, text: str) -> None:
        """Something worth knowing that is no answer."""
        self.err.out(printable(text), style="dim")

    def waiting(self, what: str) -> AbstractContextManager:
        """A sign of life, for people."""
        return self.out.status(what, spinner_style="dim") if self.interactive else nullcontext()

    def _read(self) -> str | None:
        if not self.interactive:
            return sys.stdin.readline() or None
        try:
            return input(PROMPT)
        except EOFError:
            self.out.print()
            return None

    def _do(self, line: str) -> None:
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            raise UserError(f"there is no command {name}; /help lists them")
        self.commands[name](rest.strip())

    def _answer(self, question: str) -> None:
        before = len(self.chat.turns)
        try:
            with self.waiting("thinking") as status:

                def show(piece: str) -> None:
                    if status is not None:
                        status.stop()
                    self.out.out(printable(piece), end="", style="cyan", highlight=False)

                reply = self.chat.say(question, self.attached, show)
        finally:
            if len(self.chat.turns) > before:  # also where the answer was stopped half-way
                self.attached = []
        self.out.print()
        if reply.cut:
            self.note(f"cut after {reply.tokens_out} tokens")

    def _history(self, _: str) -> None:
        for turn in self.chat.turns:
            media = "".join(f"[{medium.kind} {medium.path}] " for medium in turn.media)
            self.out.out(printable(f"{PROMPT}{media}{turn.question}"), highlight=False)
            self.out.out(printable(turn.answer or ""), style="cyan", highlight=False)
        if not self.chat.turns:
            self.note("nothing was said yet")

    def _reset(self, _: str) -> None:
        self.chat.reset()
        self.attached = []
        self.note("the conversation is forgotten")

    def _save(self, file: str) -> None:
        path = _path(file)
        if path.exists() and path.suffix != ".json":
            raise UserError(f"{path} exists and is no .json file; name another")
        try:
            write_json(path, self.chat.record())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        self.note(f"saved to {path}")

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for command, meaning in COMMANDS.items():
            table.add_row(command, meaning)
        self.out.print(table)

    def _error(self, text: str) -> None:
        self.failed = True
        self.err.out(printable(f"error: {text}"), style="red")


def _forgive_input() -> None:
    """Bytes that are no text become replacement characters; the rest of the line is still worth an answer."""
    sys.stdin.reconfigure(errors="replace")


def _path(text: str) -> Path:
    """A file's name as people type it, or as a terminal writes a file that is dropped on it."""
    if not text:
        raise UserError("name a file after the command; /help shows how")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return Path(text[1:-1] if quoted else text).expanduser()
