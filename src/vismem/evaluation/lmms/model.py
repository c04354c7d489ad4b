"""The model that lmms-eval calls: chat messages in, answers out, written in one live batch, each with its trace.

lmms-eval keeps of every answer its text and its token counts; the trace - where memory was invoked, and of which
kind - is part of the counts, so it stands in the samples that `--log_samples` writes. Memory itself is the model's.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from vismem.decoding.queue import Answer, Request
from vismem.evaluation.answering import policy_for
from vismem.evaluation.lmms.messages import row_of
from vismem.loading import DTYPES, load_model, silence_libraries
from vismem.model import VisMem
from vismem.training.experience import seed_of
from vismem.training.rows import context_of

AUTOMATIC_BATCH = 16
BLANK_LINE = "\n\n"  # what lmms-eval puts into `until` where a task says nothing
PASSED_ON = ("top_p", "top_k", "min_p", "repetition_penalty")


@dataclass
class Traced(TokenCounts):
    """Token counts of an answer, with what happened in it.

    Args:
        sampled_tokens: how many of the output tokens the model sampled.
        delimiters: places where memory might have been called for: ends of phrases, and sampled invocations.
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
        """What lmms-eval logs."""
        own = {name: getattr(self, name) for name in ("sampled_tokens", "delimiters", "finish", "invocations")}
        return {**super().to_dict(), **own, **({"error": self.error} if self.error else {})}


@dataclass(frozen=True)
class Question:
    """One answer that is wanted.

    Args:
        name: task, sample and repeat; no two questions share it.
        messages: gives the chat messages; called when there is room for the question.
        generation: the task's generation keywords.
    """

    name: str
    messages: Callable[[], Sequence[dict[str, Any]]]
    generation: Mapping[str, Any]


class VisMemChat(lmms):
    """VisMem behind lmms-eval's chat interface.

    Args:
        model: the loaded model.
        invocation: as for `vismem ask --invocation`.
        batch_size: rows decoded together at most.
        max_new_tokens: sampled tokens per answer where the task does not say.
        seed: of sampling and of random invocation; each sample draws for itself, by its name.

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
        self.written: dict[tuple[str, int], GenerationResult] = {}  # by task and sample; of repeats the first
        self._unknown: set[str] = set()
        self.answered = 0  # samples so far, by this model

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str | Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> VisMemChat:
        """The model of `--model_args`; what is said there goes before `--batch_size` and `--device`.

        Args:
            arg_string: `checkpoint`, `base`, `device`, `dtype`, `trust_remote_code` (as for `vismem ask`; the pocket
                model by default), `invocation`, `batch_size`, `max_new_tokens`, `seed`.
            additional_config: lmms-eval's own `batch_size`, `max_batch_size` and `device`.

        Raises:
            ValueError: if an argument is unknown or out of range, or the model cannot be loaded; one line.
        """
        given = {**{name: v for name, v in (additional_config or {}).items() if v is not None}, **_parsed(arg_string)}
        known = [*list(inspect.signature(load_model).parameters)[:-1], *list(inspect.signature(cls).parameters)[1:]]
        for name in given:
            if name not in (*known, "max_batch_size"):
                raise ValueError(f"unknown model argument {name!r}; vismem takes {', '.join(known)}")
        settings = {
            "invocation": str(given.get("invocation", "learned")).strip("\"'"),
            "batch_size": _batch_size(given),
            "max_new_tokens": _whole(given, "max_new_tokens", 1, 1024),
            "seed": _whole(given, "seed", 0, 0),
        }
        read_policy(settings["invocation"])  # before anything is loaded
        dtype = str(given.get("dtype", "auto"))
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; there are {', '.join(DTYPES)}")
        trusted = given.get("trust_remote_code", False)
        if not isinstance(trusted, bool):
            raise ValueError(f"trust_remote_code must be true or false, got {trusted!r}")
        silence_libraries(debug=False)
        names = {name: str(given[name]) for name in ("checkpoint", "base") if given.get(name) not in (None, "")}
        device = _device(str(given.get("device", "auto")))
        loaded = load_model(**names, device=device, dtype=dtype, trust_remote_code=trusted, say=logger.info)
        return cls(loaded.model, **settings)

    # What lmms-eval asks for.

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers to requests, in their order.

        A sample that cannot be read or answered has an empty answer, with the reason in its trace and in the log.

        Raises:
            ValueError: if no sample at all can be answered; names the first.
        """
        questions: dict[int, Question] = {}
        samples: dict[int, tuple[str, int]] = {}
        repeats: Counter[tuple[str, int]] = Counter()
        for index, request in enumerate(requests):
            if (request.metadata or {}).get("__padding_only__"):
                continue  # fills up a process' share, which this model does not need
            _, to_messages, generation, doc_id, task, split = request.args
            repeat = repeats[task, doc_id]
            repeats[task, doc_id] += 1
            name = f"{task}, sample {doc_id}" + (f", repeat {repeat}" if repeat else "")
            questions[index] = Question(name, self._messages(name, to_messages, task, split, doc_id), generation)
            samples[index] = (task, doc_id)
        answers = dict(zip(questions, self._answer(list(questions.values())), strict=True))
        for index, answer in answers.items():
            self.written.setdefault(samples[index], answer)
        return [answers.get(index, GenerationResult("")) for index in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers round by round: of each request a list, one text for each round until its task says stop.

        The rounds of all requests are written together; each sees what was answered before it.
        """
        written: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        going, number = list(range(len(requests))), 0
        while going:
            questions, asked = [], []
            for index in going:
                _, to_messages, generation, doc_id, task, split = requests[index].args
                name = f"{task}, sample {doc_id}, round {number} ({index})"
                messages = self._messages(name, to_messages, task, split, doc_id)
                if number:
                    doc = self.task_dict[task][split][doc_id]
                    found = to_messages(
                        doc, round_idx=number, previous_output=written[index], previous_round_info=notes[index]
                    )
                    if not isinstance(found, tuple) or len(found) != 4 or found[1]:
                        continue
                    messages, notes[index] = (lambda found=found: found[0]), found[3]
                questions.append(Question(name, messages, generation))
                asked.append(index)
            answers = self._answer(questions)
            for index, answer in zip(asked, answers, strict=True):
                written[index].append(answer.text)
            going = [index for index, one in zip(asked, answers, strict=True) if not one.token_counts.error]
            number += 1
        return written

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: with memory an answer has no likelihood apart from the invocations in it."""
        raise NotImplementedError(
            f"{requests[0].task_name} asks for log-likelihoods, which vismem does not give; take a generate_until task"
        )

    # Writing.

    def _messages(
        self, name: str, to_messages: Callable[..., Any], task: str, split: str, doc_id: int
    ) -> Callable[..., Any]:
        """Reads a sample when it is called; what goes wrong names it."""

        def read() -> Sequence[dict[str, Any]]:
            try:
                return to_messages(self.task_dict[task][split][doc_id])
            except Exception as error:  # datasets, Pillow and tasks raise what they like
                raise ValueError(f"{name} cannot be read: {type(error).__name__}: {error}") from error

        return read

    def _answer(self, questions: list[Question]) -> list[GenerationResult]:
        """Answers in the order of the questions."""
        found: dict[str, GenerationResult] = {}
        lengths: dict[str, int] = {}
        stops = {question.name: until(question.generation) for question in questions}
        start = time.perf_counter()
        with tqdm(total=len(questions), disable=self.rank != 0, desc="Model Responding") as bar:

            def failed(name: str, reason: str) -> None:
                logger.warning(f"no answer, which counts as wrong: {name}: {reason}")
                found[name] = GenerationResult("", Traced(0, 0, finish="error", error=reason))
                bar.update()

            for answer in self.vismem.stream_batch(self._requests(questions, lengths, failed), self.batch_size):
                if answer.error is not None:
                    failed(answer.tag, str(answer.error))
                    continue
                found[answer.tag] = self._result(answer, lengths.pop(answer.tag), stops[answer.tag])
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

    def _requests(
        self, questions: list[Question], lengths: dict[str, int], failed: Callable[[str, str], None]
    ) -> Iterator[Request]:
        """A request for each question, made when there is room; notes how long its prompt is, or why it fails."""
        model = self.vismem
        mark = getattr(model.processor, "image_token", None)
        for question in questions:
            try:
                row = row_of(question.name, question.messages(), mark)
                inputs = row_inputs(model.processor, row, context_of(model))
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # the last three of malformed messages
                failed(question.name, str(error).removeprefix(f"{question.name}: "))
                continue
            inputs = {n: t.to(model.device, model.dtype if t.is_floating_point() else None) for n, t in inputs.items()}
            lengths[question.name] = inputs["input_ids"].shape[1]
            policy, seed = policy_for(model, row, self.policy), seed_of(self.seed, question.name)
            yield Request(inputs, policy, seed, self.keywords(question.generation), question.name)

    def _result(self, answer: Answer, prompt: int, stops: list[str]) -> GenerationResult:
        """An answer as lmms-eval takes it."""
        text = self.vismem.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop, 1)[0]
        chosen = sum(not invocation.forced for invocation in answer.invocations)
        counts = Traced(
            input_tokens=prompt,
            output_tokens=len(answer.tokens),
            sampled_tokens=answer.sampled,
            delimiters=sum(token in self.vismem.delimiters for token in answer.tokens) + chosen,
            finish=answer.finish,
            invocations=[invocation.to_dict() for invocation in answer.invocations],
        )
        return GenerationResult(text, counts)

    def keywords(self, generation: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of `generate` for a task's: greedy, unless it says `do_sample` or gives a temperature alone.

        Raises:
            ValueError: if the task wants several beams.
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
            logger.warning(f"vismem does not know the generation keyword {name!r} and leaves it out")
        names = PASSED_ON if sampling else ("repetition_penalty",)
        return found | {name: given[name] for name in names if name in given}


def until(generation: Mapping[str, Any]) -> list[str]:
    """The texts that an answer ends before; without the blank line, which lmms-eval puts in for every task."""
    given = generation.get("until") or []
    return [text for text in ([given] if isinstance(given, str) else given) if text and text != BLANK_LINE]


def _parsed(arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(arguments, Mapping):
        return dict(arguments)
    try:
        return simple_parse_args_string(arguments)
    except ValueError as error:
        raise ValueError(
            f"--model_args {arguments!r} is no list of name=value; put a value with commas in quotes"
        ) from error


def _whole(given: Mapping[str, Any], name: str, low: int, default: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not str(value).lstrip("-").isdigit() or int(value) < low:
        raise ValueError(f"{name} must be a whole number of {low} or more, got {value!r}")
    return int(value)


def _batch_size(given: Mapping[str, Any]) -> int:
    """A number; `auto` is `AUTOMATIC_BATCH`, or `--max_batch_size` where that is less."""
    if str(given.get("batch_size", "auto")).partition(":")[0] != "auto":
        return _whole(given, "batch_size", 1, AUTOMATIC_BATCH)
    return min(AUTOMATIC_BATCH, _whole(given, "max_batch_size", 1, AUTOMATIC_BATCH))


def _device(name: str) -> str:
    """The device of this process: of several, each takes the GPU of its own number."""
    state = Accelerator()
    if state.num_processes > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{state.local_process_index}"
    return name
