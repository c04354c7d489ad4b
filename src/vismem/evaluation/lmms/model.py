"""The model class for lmms-eval: reads chat messages and writes answers in one live batch, each with its trace.

lmms-eval saves each answer's text and token counts. The trace - where memory was invoked, and of which kind - is part
of the counts, so it appears in the samples that `--log_samples` writes.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from tqdm import tqdm

from vismem.data import row_inputs
from vismem.decoding.policies import read_policy
from vismem.decoding.prepare import context_of
from vismem.decoding.queue import Answer, Request
from vismem.evaluation.answering import policy_for, trace_of
from vismem.evaluation.lmms.messages import row_of
from vismem.loading import DTYPES, load_model, silence_libraries
from vismem.model import VisMem
from vismem.settings import Flag, convert
from vismem.training.rollout import seed_of

AUTOMATIC_BATCH = 16
BLANK_LINE = "\n\n"  # lmms-eval's default for `until`
PASSED_ON = ("top_p", "top_k", "min_p", "repetition_penalty")


@dataclass
class Traced(TokenCounts):
    """An answer's token counts and trace.

    Args:
        sampled_tokens: number of sampled tokens in the output.
        delimiters: number of places where memory could be invoked: ends of phrases, and sampled invocations.
        finish: `"stop"`, `"length"` or `"error"`.
        invocations: `kind`, `position` (index among the output tokens), `length` and `forced` of each, in order.
        error: why there is no answer.
    """

    sampled_tokens: int = 0
    delimiters: int = 0
    finish: str = "stop"
    invocations: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The values that lmms-eval logs."""
        return {name: value for name, value in vars(self).items() if value not in (None, "")}


class Question(NamedTuple):
    """A question to answer."""

    name: str  # task, sample and repeat or round; unique
    messages: Callable[[], Sequence[dict[str, Any]]]  # called when the batch has room
    generation: Mapping[str, Any]  # the task's generation keywords


class VisMemChat(lmms):
    """VisMem behind lmms-eval's chat interface.

    Args:
        model: the loaded model.
        invocation: see `vismem ask --invocation`.
        batch_size: maximum number of rows decoded together.
        max_new_tokens: sampled tokens per answer, if the task does not set it.
        seed: of sampling and of random invocation, combined with each sample's name.

    Raises:
        ValueError: if the invocation policy is unknown.
    """

    is_simple = False

    def __init__(
        self,
        model: VisMem,
        invocation: str = "learned",
        batch_size: int = AUTOMATIC_BATCH,
        max_new_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.vismem, self.policy, self.seed = model, read_policy(invocation, seed), seed
        self.batch_size, self.max_new_tokens, self.device = batch_size, max_new_tokens, model.device
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.written: dict[tuple[str, int], GenerationResult] = {}  # by task and sample, the first repeat
        self._unknown: set[str] = set()
        self.answered = 0  # samples so far

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str | Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> VisMemChat:
        """Loads the model that `--model_args` describes.

        Args:
            arg_string: `checkpoint`, `base`, `device`, `dtype`, `trust_remote_code` (see `vismem ask`; by default the
                pocket model), `invocation`, `batch_size`, `max_new_tokens`, `seed`.
            additional_config: lmms-eval's own `batch_size`, `max_batch_size` and `device`; `arg_string` wins.

        Raises:
            ValueError: if an argument is unknown or out of range, or the model cannot be loaded; one line.
        """
        given = {**{name: v for name, v in (additional_config or {}).items() if v is not None}, **_parsed(arg_string)}
        known = [*list(inspect.signature(load_model).parameters)[:-1], *list(inspect.signature(cls).parameters)[1:]]
        for name in given:
            if name not in (*known, "max_batch_size"):
                raise ValueError(f"unknown model argument {name!r}; vismem takes {', '.join(known)}")
        settings: dict[str, Any] = {
            "invocation": str(given.get("invocation", "learned")).strip("\"'"),
            "batch_size": _batch_size(given),
            "max_new_tokens": _whole(given, "max_new_tokens", 1, 1024),
            "seed": _whole(given, "seed", 0, 0),
        }
        read_policy(settings["invocation"])  # before anything is loaded
        dtype = str(given.get("dtype", "auto"))
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; there are {', '.join(DTYPES)}")
        trusted = convert(given.get("trust_remote_code", False), Flag, "trust_remote_code")
        silence_libraries(debug=False)
        names = {name: str(given[name]) for name in ("checkpoint", "base") if given.get(name) not in (None, "")}
        device = _device(str(given.get("device", "auto")))
        loaded = load_model(**names, device=device, dtype=dtype, trust_remote_code=trusted, say=logger.info)
        return cls(loaded.model, **settings)

    # lmms-eval's interface.

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers requests, in order.

        A sample that cannot be read or answered gets an empty answer; its trace and the log have the reason.

        Raises:
            ValueError: if no sample can be answered; names the first.
        """
        found = [GenerationResult("")] * len(requests)
        questions: dict[int, Question] = {}
        repeats: Counter[tuple[str, int]] = Counter()
        for index, request in enumerate(requests):
            if (request.metadata or {}).get("__padding_only__"):
                continue  # padding that balances processes; this model does not need it
            _, _, generation, doc_id, task, _ = request.args
            repeat = f", repeat {repeats[task, doc_id]}" if repeats[task, doc_id] else ""
            repeats[task, doc_id] += 1
            name = f"{task}, sample {doc_id}{repeat}"
            questions[index] = Question(name, partial(self._messages, request), generation)
        for index, answer in zip(questions, self._answer(list(questions.values())), strict=True):
            _, _, _, doc_id, task, _ = requests[index].args
            self.written.setdefault((task, doc_id), answer)
            found[index] = answer
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers requests round by round, each seeing the earlier rounds, until its task stops; one text per round.

        The rounds of all requests are written together.
        """
        written: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        going, number = list(range(len(requests))), 0
        while going:
            questions, asked = [], []
            for index in going:
                _, to_messages, generation, doc_id, task, split = requests[index].args
                name = f"{task}, sample {doc_id}, round {number} ({index})"
                messages: Callable[[], Any] = partial(self._messages, requests[index])
                if number:
                    doc = self.task_dict[task][split][doc_id]
                    found = to_messages(
                        doc, round_idx=number, previous_output=written[index], previous_round_info=notes[index]
                    )
                    if not isinstance(found, tuple) or len(found) != 4 or found[1]:
                        continue
                    messages, notes[index] = partial(itemgetter(0), found), found[3]
                questions.append(Question(name, messages, generation))
                asked.append(index)
            answers = self._answer(questions)
            for index, answer in zip(asked, answers, strict=True):
                written[index].append(answer.text)
            going = [index for index, one in zip(asked, answers, strict=True) if not one.token_counts.error]
            number += 1
        return written

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: with memory the likelihood of an answer depends on its invocations."""
        raise NotImplementedError(
            f"{requests[0].task_name} asks for log-likelihoods, which vismem does not give; take a generate_until task"
        )

    # Answering.

    def _messages(self, request: Instance) -> Sequence[dict[str, Any]]:
        """The messages of a request's sample."""
        _, to_messages, _, doc_id, task, split = request.args
        return to_messages(self.task_dict[task][split][doc_id])

    def _answer(self, questions: list[Question]) -> list[GenerationResult]:
        """Answers questions, in order."""
        found: dict[str, GenerationResult] = {}
        asked = {question.name: question for question in questions}
        start = time.perf_counter()
        with tqdm(total=len(questions), disable=self.rank != 0, desc="Model Responding") as bar:

            def failed(name: str, reason: str) -> None:
                logger.warning(f"no answer, which counts as wrong: {name}: {reason}")
                found[name] = GenerationResult("", Traced(0, 0, finish="error", error=reason))
                bar.update()

            for answer in self.vismem.stream_batch(self._requests(questions, failed), self.batch_size):
                if answer.error is not None:
                    failed(answer.tag, str(answer.error))
                    continue
                found[answer.tag] = self._result(answer, until(asked[answer.tag].generation))
                bar.update()
        errors = {name: result.token_counts.error for name, result in found.items() if result.token_counts.error}
        self.answered += len(found) - len(errors)
        if errors:
            first = "{}: {}".format(*next(iter(errors.items())))
            if not self.answered:
                raise ValueError(f"none of {len(questions)} samples can be answered; the first: {first}")
            logger.warning(f"{len(errors)} of {len(questions)} samples failed and count as wrong; the first: {first}")
        seconds = time.perf_counter() - start
        tokens = sum(result.token_counts.output_tokens for result in found.values())
        if questions:
            log_metrics(seconds, tokens, tokens / seconds, {"num_requests": len(questions)})
        return [found[question.name] for question in questions]

    def _requests(self, questions: list[Question], failed: Callable[[str, str], None]) -> Iterator[Request]:
        """A request for each question, created when the batch has room; `failed` receives name and reason."""
        model = self.vismem
        mark = getattr(model.processor, "image_token", None)
        for question in questions:
            try:
                messages = question.messages()
            except Exception as error:  # datasets, Pillow and tasks may raise anything
                failed(question.name, f"cannot be read: {type(error).__name__}: {error}")
                continue
            try:
                row = row_of(question.name, messages, mark)
                inputs = row_inputs(model.processor, row, context_of(model.base))
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # the last three of malformed messages
                failed(question.name, str(error).removeprefix(f"{question.name}: "))
                continue
            policy, seed = policy_for(model, row, self.policy), seed_of(self.seed, question.name)
            yield Request(model.move_inputs(inputs), policy, seed, self.keywords(question.generation), question.name)

    def _result(self, answer: Answer, stops: list[str]) -> GenerationResult:
        """An answer as lmms-eval's result, cut at the texts that end it."""
        text = self.vismem.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop, 1)[0]
        return GenerationResult(
            text,
            Traced(
                input_tokens=answer.request.inputs["input_ids"].shape[1],
                output_tokens=len(answer.tokens),
                sampled_tokens=answer.sampled,
                **trace_of(self.vismem, answer),
            ),
        )

    def keywords(self, generation: Mapping[str, Any]) -> dict[str, Any]:
        """Converts a task's generation keywords to those of `generate`.

        Samples at the task's temperature (1 if it sets only `do_sample`); else greedy, also with `do_sample=False`.

        Raises:
            ValueError: if the task asks for beam search.
        """
        given = {name: value for name, value in generation.items() if value is not None}
        if given.pop("num_beams", 1) != 1:
            raise ValueError("memory decodes greedily or by sampling; give --gen_kwargs num_beams=1")
        budget = given.pop("max_new_tokens", None) or given.pop("max_gen_toks", None) or self.max_new_tokens
        temperature = float(given.pop("temperature", 1.0 if given.get("do_sample") else 0.0))
        sampling = bool(given.pop("do_sample", True)) and temperature > 0
        found: dict[str, Any] = {"max_new_tokens": int(budget), "do_sample": sampling}
        if sampling:
            found["temperature"] = temperature
        stops = until(given)
        if stops:
            found["stop_strings"] = stops
        for name in sorted(given.keys() - {"until", "max_gen_toks", *PASSED_ON} - self._unknown):
            self._unknown.add(name)
            logger.warning(f"vismem does not know the generation keyword {name!r} and ignores it")
        names = PASSED_ON if sampling else ("repetition_penalty",)
        return found | {name: given[name] for name in names if name in given}


def until(generation: Mapping[str, Any]) -> list[str]:
    """The texts that end an answer, without the blank line that lmms-eval adds to every task."""
    given = generation.get("until") or []
    return [text for text in ([given] if isinstance(given, str) else given) if text and text != BLANK_LINE]


def _parsed(arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(arguments, Mapping):
        return dict(arguments)
    try:
        return simple_parse_args_string(arguments)
    except ValueError as error:
        raise ValueError(
            f"--model_args {arguments!r} is not a list of name=value; put a value with commas in quotes"
        ) from error


def _whole(given: Mapping[str, Any], name: str, low: int, default: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not str(value).lstrip("-").isdigit() or int(value) < low:
        raise ValueError(f"{name} must be a whole number, {low} or more, got {value!r}")
    return int(value)


def _batch_size(given: Mapping[str, Any]) -> int:
    """The batch size; `auto` is `AUTOMATIC_BATCH`, capped by `--max_batch_size`."""
    if str(given.get("batch_size", "auto")).partition(":")[0] != "auto":
        return _whole(given, "batch_size", 1, AUTOMATIC_BATCH)
    return min(AUTOMATIC_BATCH, _whole(given, "max_batch_size", 1, AUTOMATIC_BATCH))


def _device(name: str) -> str:
    """The device of this process; with several processes, the GPU with its local index."""
    state = Accelerator()
    if state.num_processes > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{state.local_process_index}"
    return name
