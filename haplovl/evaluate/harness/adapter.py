"""`--model haplovl` of lmms-eval, found by its entry point. Runs only where lmms-eval is installed."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import ImageFile

from haplovl.errors import UserError
from haplovl.evaluate.answer import load_to_evaluate
from haplovl.evaluate.harness.answering import MAX_NEW_TOKENS, Question, generate, log_likelihoods

# The first process tells on standard output; `haplovl harness` reads it there.
PRECISION = "haplovl computes in"
PROGRESS = "haplovl answered"


def manifest() -> ModelManifest:
    """What lmms-eval finds under the entry point."""
    return ModelManifest(model_id="haplovl", simple_class_path=f"{__name__}.HaploVL")


class HaploVL(lmms):
    """A model folder of ours. Every process loads the model on its own GPU and answers its share.

    A prompt is one user message in the model's own chat template, and nothing is added to it or taken from it. Neither
    lmms-eval's `--apply_chat_template` nor a template of the task is needed.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 16,
        max_new_tokens: int = MAX_NEW_TOKENS,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)
        if unknown:
            raise UserError(
                f"--model_args has '{next(iter(unknown))}'; known are pretrained, batch_size, max_new_tokens"
            )
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model, self.processor = load_to_evaluate(Path(pretrained))
        if device is not None:
            self.model.to(device)
        self.batch, self.max_new_tokens = int(batch_size), int(max_new_tokens)
        self._tell(f"{PRECISION} {str(self.model.dtype).removeprefix('torch.')}")
        # lmms-eval lets Pillow fill what a damaged picture lacks with gray: nothing would tell of it.
        ImageFile.LOAD_TRUNCATED_IMAGES = False

    @property
    def device(self) -> Any:
        """Where lmms-eval puts the numbers that it gathers."""
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers; requests that only pad a process's share get an empty one."""
        real = [request for request in requests if not request.metadata.get("__padding_only__")]
        questions = [self._question(request, request.args[1]) for request in real]
        replies = iter(
            generate(self.model, self.processor, questions, self.batch, self.max_new_tokens, self._report(len(real)))
        )
        padding = GenerationResult(text="")
        return [padding if request.metadata.get("__padding_only__") else _result(next(replies)) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(log-likelihood, is greedy) of every continuation, wrapped: lmms-eval 0.7.3 makes a text of a bare pair.

        For tasks of the type multiple_choice, whose continuations are texts, lmms-eval 0.7.3 takes the choice with the
        smallest value: there, the log-likelihood is negated, as its own models' losses are.
        """
        continuations, signs = [], []
        for request in requests:
            given = request.args[1]
            is_choice = isinstance(given, str)
            continuations.append(given if is_choice else str(given(self._document(request))))
            signs.append(-1 if is_choice else 1)
        questions = [self._question(request, {}) for request in requests]
        found = log_likelihoods(self.model, self.processor, questions, continuations, self.batch)
        pairs = [(sign * value, greedy) for sign, (value, greedy) in zip(signs, found, strict=True)]
        return [GenerationResult(text=pair) for pair in pairs]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise UserError("HaploVL's adapter answers in one round; tasks of several rounds are not supported")

    def _question(self, request: Instance, settings: dict[str, Any]) -> Question:
        to_visual = request.args[2]
        pictures = (lambda: to_visual(self._document(request)) or []) if to_visual else list
        return Question(request.args[0], pictures, dict(settings))

    def _document(self, request: Instance) -> Any:
        document, task, split = request.args[3:6]
        return self.task_dict[task][split][document]

    def _report(self, total: int) -> Any:
        return lambda done: self._tell(f"{PROGRESS} {done} of {total}")

    def _tell(self, line: str) -> None:
        if self._rank == 0:
            print(line, flush=True)


def _result(reply: Any) -> GenerationResult:
    counts = TokenCounts(input_tokens=reply.tokens_in, output_tokens=reply.tokens_out)
    return GenerationResult(text=reply.text, token_counts=counts)
