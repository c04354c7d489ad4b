"""What goes over the wire: OpenAI's chat completions, with one more field, `vismem`, in request and answer.

Requests are checked here as far as that needs no model. Null means "not given", everywhere. A field that nobody here
knows is ignored, with one line in the log; a field that would change the answer and cannot be honoured is refused by
its name.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from vismem.config import Kind
from vismem.decoding.policies import SPELLINGS, Forced, Policy, read_policy

MOST_STOPS = 16
MOST_CHOICES = 128
MOST_TOPS = 20
MOST_PLACED = 64  # invocations of a schedule; each forms a memory, whatever else a request asks for
MOST_NAMES = 100  # unknown fields that get a line in the log; clients can make up any number of them
SHOWN = 64  # characters of a client's own word that are logged or quoted

log = logging.getLogger(__name__)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text with half a surrogate pair is no Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class Ignored:
    """Logs the names of ignored fields, each once, and no more than `most` of them.

    Args:
        most: names that are remembered.
    """

    def __init__(self, most: int = MOST_NAMES) -> None:
        self.most = most
        self.names: set[str] = set()
        self.lock = threading.Lock()

    def note(self, name: str, where: str) -> None:
        """Logs a field of an object called `where`, if it has not been logged yet."""
        shown = name[:SHOWN]
        with self.lock:
            if shown in self.names or len(self.names) > self.most:
                return
            self.names.add(shown)
            full = len(self.names) > self.most
        if full:
            log.warning("ignoring more unknown fields; their names are not logged any more")
        else:
            log.warning("ignoring the unknown field %r of %s", shown, where)


ignored = Ignored()


class Lenient(BaseModel):
    """An object of a client: null counts as not given, unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value.keys() - cls.model_fields.keys():
            ignored.note(str(name), (cls.__doc__ or cls.__name__).partition(".")[0].lower())
        return {name: each for name, each in value.items() if each is not None}


@dataclass(frozen=True, init=False)
class Unsupported:
    """Annotates a field that would change the answer and is not honoured, so that it may only ask for nothing.

    Args:
        *neutral: values that ask for nothing, beside null, false, everything empty, and objects of such values.
    """

    neutral: tuple[Any, ...]

    def __init__(self, *neutral: Any) -> None:
        object.__setattr__(self, "neutral", neutral)

    def check(self, value: Any) -> None:
        """Raises PydanticCustomError for a value that asks for something."""
        if isinstance(value, dict):
            value = {name: each for name, each in value.items() if not _is_empty(each)}
        if not _is_empty(value) and (isinstance(value, bool) or value not in self.neutral):
            raise PydanticCustomError("unsupported", "this server does not support it")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        empty: list[Any] = [None, False, "", [], {}]
        nothing = {"type": "object", "additionalProperties": {"enum": empty}}
        return {"anyOf": [{"enum": [*empty, *self.neutral]}, nothing], "description": "Not supported."}


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


Refused = Annotated[Any, Unsupported()]
Accepted = Annotated[Any, Field(description="Accepted, and without effect.")]


# The request.


class TextPart(Lenient):
    """A text part."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class RefusalPart(Lenient):
    """A refusal part, which stands for its text."""

    type: Literal["refusal"]
    refusal: Text


class ImageUrl(Lenient):
    """An image address: a data URI, or a web address where the server has been told to fetch from that host."""

    url: str = Field(min_length=1, examples=["data:image/png;base64,iVBORw0KGgo..."])
    detail: Accepted = None


class ImagePart(Lenient):
    """An image part."""

    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | Annotated[str, Field(min_length=1)]
    detail: Accepted = None

    @property
    def url(self) -> str:
        """Where the image is."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
PARTS |= {"image_url": "image", "input_image": "image"}


def _kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return PARTS.get(kind) if isinstance(kind, str) else None


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")] | Annotated[ImagePart, Tag("image")],
    Discriminator(
        _kind_of_part,
        custom_error_type="unsupported_part",
        custom_error_message="a part must be of type text or image_url",
    ),
]


def _role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise PydanticCustomError("unsupported_role", "this server does not support tools, so there are no such turns")
    return value


class Message(Lenient):
    """A message. Images may stand in user turns only; what an answer of this server has in it is taken back."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]
    content: list[Part | Text] | Text | None = Field(
        default=None,
        validate_default=True,
        description="Of an assistant's turn it may be missing or empty, which is a turn without words.",
    )
    refusal: Text | None = Field(default=None, description="Stands in for the content of an assistant's turn.")
    tool_calls: Refused = None
    function_call: Refused = None
    audio: Refused = None
    images: Refused = None
    videos: Refused = None
    # What answers have beside their words: nothing of it goes into a prompt.
    name: Accepted = None
    annotations: Accepted = None
    parsed: Accepted = None
    provider_specific_fields: Accepted = None
    reasoning: Accepted = None
    reasoning_content: Accepted = None
    thinking_blocks: Accepted = None
    vismem: Accepted = None

    @field_validator("content")
    @classmethod
    def _only_assistants_are_silent(cls, content: Any, info: ValidationInfo) -> Any:
        if info.data.get("role") != "assistant":
            if content is None:
                raise PydanticCustomError("no_content", "must be a text or a list of parts")
            if content == []:
                raise PydanticCustomError("no_content", "is empty")
        return content

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


class Memory(Lenient):
    """The field vismem: who invokes memory, and whether the answer tells of it."""

    invocation: Annotated[str, AfterValidator(_policy), Field(max_length=4096)] | None = Field(
        default=None,
        description=f"One of: {SPELLINGS}. By default the server's own, which is learned unless it was started with "
        "another.",
        examples=["learned", "off", "short@0,long@12"],
    )
    trace: bool | None = Field(
        default=None, description="Whether the answer's own field `vismem` lists each invocation; true by default."
    )


class StreamOptions(Lenient):
    """Stream options."""

    include_usage: bool | None = Field(default=None, description="Count tokens in a last chunk.")
    include_obfuscation: Accepted = None


class ChatRequest(Lenient):
    """A request for chat completions."""

    model: str = Field(max_length=512)
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(
        None, ge=1, description="Most tokens of each choice: words, and the model's own invocations."
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The same by its newer name.")
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False, description="0 is greedy.")
    top_k: int | None = Field(
        default=None,
        ge=-1,
        le=2**31 - 1,
        description="Not OpenAI's: the likeliest tokens to draw from; -1 and 0 are all of them.",
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Not OpenAI's: tokens less likely than this part of the likeliest one are not drawn.",
    )
    repetition_penalty: float | None = Field(
        default=None, ge=0.1, le=10, allow_inf_nan=False, description="Not OpenAI's."
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="Choice n draws from `seed + n`. Without one, and with -1, one is drawn and told in the answer.",
    )
    stop: Stop | Annotated[list[Stop | None], Field(max_length=MOST_STOPS)] | None = None
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = Field(default=None, description="Of the words, before temperature and truncation.")
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOPS)
    ignore_eos: bool | None = Field(default=None, description="vLLM's: write up to the most tokens there may be.")
    add_generation_prompt: bool | None = Field(
        default=None, description="vLLM's: begin an assistant's turn after the messages; true by default."
    )
    continue_final_message: bool | None = Field(
        default=None, description="vLLM's: continue the last message, an assistant's, instead of a new turn."
    )
    vismem: Memory | None = None
    # What would change the answer.
    tools: Refused = None
    functions: Refused = None
    tool_choice: Annotated[Any, Unsupported("none", "auto")] = None
    function_call: Annotated[Any, Unsupported("none", "auto")] = None
    response_format: Annotated[Any, Unsupported({"type": "text"})] = None
    modalities: Annotated[Any, Unsupported(["text"])] = None
    audio: Refused = None
    web_search_options: Refused = None
    logit_bias: Refused = None
    frequency_penalty: Annotated[Any, Unsupported(0)] = None
    presence_penalty: Annotated[Any, Unsupported(0)] = None
    best_of: Annotated[Any, Unsupported(1)] = None
    use_beam_search: Refused = None
    min_tokens: Annotated[Any, Unsupported(0)] = None
    stop_token_ids: Refused = None
    include_stop_str_in_output: Refused = None
    bad_words: Refused = None
    allowed_token_ids: Refused = None
    echo: Refused = None
    prompt_logprobs: Refused = None
    truncate_prompt_tokens: Refused = None
    chat_template: Refused = None
    documents: Refused = None
    structured_outputs: Refused = None
    guided_json: Refused = None
    guided_regex: Refused = None
    guided_choice: Refused = None
    guided_grammar: Refused = None
    guided_decoding: Refused = None
    json_schema: Refused = None
    regex: Refused = None
    ebnf: Refused = None
    grammar: Refused = None
    # What changes no answer.
    parallel_tool_calls: Accepted = None
    metadata: Accepted = None
    prediction: Accepted = None
    prompt_cache_key: Accepted = None
    safety_identifier: Accepted = None
    service_tier: Accepted = None
    store: Accepted = None
    user: Accepted = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are one setting; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ValueError("continue_final_message needs add_generation_prompt: false, as no new turn begins")
            if self.messages[-1].role != "assistant":
                raise ValueError(
                    "continue_final_message needs a last message of the assistant, and this one is of "
                    f"{self.messages[-1].role}"
                )
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else [stop for stop in self.stop or [] if stop is not None]

    @property
    def invocation(self) -> str | None:
        """The policy that was asked for."""
        return None if self.vismem is None else self.vismem.invocation

    @property
    def traced(self) -> bool:
        """Whether the answer lists the invocations."""
        return self.vismem is None or self.vismem.trace is not False


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
