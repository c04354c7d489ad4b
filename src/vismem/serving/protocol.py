"""What goes over the wire: OpenAI's chat completions, with one more field, `vismem`, in request and answer.

Requests are checked here as far as that needs no model. What the server cannot honour is refused, never ignored,
but for fields that change no answer (`user`, `metadata`, ...).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from vismem.config import Kind
from vismem.decoding.invocation import SPELLINGS, Forced, Policy, read_policy

MOST_STOPS = 16
MOST_CHOICES = 128
MOST_TOPS = 20
MOST_PLACED = 64  # invocations of a schedule; each forms a memory, whatever else a request asks for


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text with half a surrogate pair is no Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """Fields that are not known are refused."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


# The request.


class TextPart(Strict):
    """Words."""

    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    """An image: a data URI, or a web address where the server has been told to fetch from that host."""

    url: str = Field(min_length=1, examples=["data:image/png;base64,iVBORw0KGgo..."])
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Strict):
    """An image among the words."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """One turn. Images may stand in user turns only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(min_length=1)] | Text
    name: str | None = Field(default=None, description="Accepted, and without effect.")

    @model_validator(mode="after")
    def _images_are_shown_by_users(self) -> Message:
        shown = isinstance(self.content, list) and any(isinstance(part, ImagePart) for part in self.content)
        if shown and self.role != "user":
            raise ValueError(f"images may stand in user turns only, not in a turn of {self.role}")
        return self


def bounded_policy(text: str, seed: int = 0) -> str | Policy:
    """As `read_policy`, for texts of others. Raises ValueError for schedules of more than `MOST_PLACED` too."""
    policy = read_policy(text, seed)
    if isinstance(policy, Forced) and (placed := len(list(policy.schedule))) > MOST_PLACED:
        raise ValueError(f"a schedule may have {MOST_PLACED} invocations, not {placed}")
    return policy


def _policy(text: str) -> str:
    bounded_policy(text)
    return text


class Memory(Strict):
    """Who invokes memory, and whether the answer tells of it."""

    invocation: Annotated[str, AfterValidator(_policy), Field(max_length=4096)] | None = Field(
        default=None,
        description=f"One of: {SPELLINGS}. By default the server's own, which is learned unless it was started with "
        "another.",
        examples=["learned", "off", "short@0,long@12"],
    )
    trace: bool = Field(default=True, description="Tell of each invocation in the answer's own field `vismem`.")


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool | None = Field(default=None, description="Count tokens in a last chunk.")
    include_obfuscation: bool | None = Field(default=None, description="Accepted, and without effect.")


class ResponseFormat(Strict):
    """Plain text is the only one."""

    type: Literal["text"]


class ChatRequest(Strict):
    """A request for chat completions."""

    model: str = Field(max_length=512)
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(
        None, ge=1, description="Most tokens of each choice: words, and the model's own invocations."
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The same by its newer name.")
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="Not OpenAI's: the likeliest tokens to draw from."
    )
    repetition_penalty: float | None = Field(
        default=None, ge=0.1, le=10, allow_inf_nan=False, description="Not OpenAI's."
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Choice n draws from `seed + n`.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = Field(default=None, description="Of the words, before temperature and truncation.")
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOPS)
    vismem: Memory = Memory()
    # Accepted where they ask for nothing that changes an answer.
    response_format: ResponseFormat | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: Literal[False] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are one setting; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


# The answer.


class InvocationTrace(BaseModel):
    """One invocation of memory.

    Args:
        kind: of the memory.
        position: index of the invocation token among the choice's tokens, memory tokens counted.
        offset: how many characters of the choice's text stand before it.
        length: vectors inserted; 0 where the policy let this kind form nothing.
        forced: whether a policy put it in, rather than the model.
        logprob: of the invocation token, where the model sampled it and log-probabilities were asked for.
    """

    kind: Kind
    position: int
    offset: int
    length: int
    forced: bool
    logprob: float | None = None


class Trace(BaseModel):
    """What memory did in a choice; in a chunk of a stream, what is new."""

    invocations: list[InvocationTrace]


class TopLogprob(BaseModel):
    """A token that might have been written."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """A token that was written."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Of a choice's tokens."""

    content: list[TokenLogprob] | None = None
    refusal: None = None


class AnswerMessage(BaseModel):
    """The turn that was written."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class Choice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason
    vismem: Trace | None = None


class MemoryUsage(BaseModel):
    """Memory, counted apart: none of it is in the other counts.

    Args:
        invocation_tokens: invocation and end tokens.
        short_vectors, long_vectors: memory vectors read.
    """

    invocation_tokens: int = 0
    short_vectors: int = 0
    long_vectors: int = 0


class Usage(BaseModel):
    """Tokens of the prompt, images included, and of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    memory: MemoryUsage


class Provenance(BaseModel):
    """How to get the same answer again."""

    seed: int = Field(description="Of the first choice.")
    invocation: str


class ChatCompletion(BaseModel):
    """An answer as a whole."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    vismem: Provenance


class Delta(BaseModel):
    """What is new in a choice."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A choice in a chunk."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None
    vismem: Trace | None = None


class ChatChunk(BaseModel):
    """A piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    vismem: Provenance | None = None


class Model(BaseModel):
    """A model to ask."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vismem"


class Models(BaseModel):
    """All models to ask."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether requests are answered, and how many rows there are."""

    status: Literal["ok", "stopping", "failed"]
    waiting: int
    writing: int


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorBody
