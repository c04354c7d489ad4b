"""The request and response schemas: OpenAI's chat completions, with an extra field `vismem` in both.

Requests are validated here as far as possible without a model. Null means "not given". Unknown fields are ignored and
logged once; fields that would change the answer but are not supported are refused by name.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from vismem.config import Kind
from vismem.decoding.policies import SPELLINGS, Forced, Policy, read_policy

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_SCHEDULED = 64  # invocations in a schedule, each of which forms a memory
MAX_UNKNOWN_FIELDS = 100  # that are logged; clients can make up any number
MAX_NAME = 64  # characters of a client's field name that are logged or quoted

log = logging.getLogger(__name__)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text with an unpaired surrogate is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


unknown_fields: set[str] = set()  # names that were logged


def log_unknown_field(name: str, where: str) -> None:
    """Logs a field of the object described by `where`, unless its name was logged before or there are too many."""
    name = name[:MAX_NAME]
    if name in unknown_fields or len(unknown_fields) > MAX_UNKNOWN_FIELDS:
        return
    unknown_fields.add(name)
    if len(unknown_fields) > MAX_UNKNOWN_FIELDS:
        log.warning("ignoring more unknown fields; their names are no longer logged")
    else:
        log.warning("ignoring the unknown field %r of %s", name, where)


def _allow_null(schema: dict[str, Any]) -> None:
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            notes = {key: field.pop(key) for key in ("title", "description", "default", "examples") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **notes}


class Lenient(BaseModel):
    """Base of the request objects: null counts as not given, unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True, json_schema_extra=_allow_null)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_unknown(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value.keys() - cls.model_fields.keys():
            log_unknown_field(str(name), (cls.__doc__ or cls.__name__).partition(".")[0].lower())
        return {name: item for name, item in value.items() if item is not None}


class Unsupported:
    """Annotates an unsupported field: only values without effect are accepted.

    Args:
        *neutral: values without effect, besides null, false, empty values, and objects of such values.
    """

    def __init__(self, *neutral: Any) -> None:
        self.neutral = neutral

    def check(self, value: Any) -> None:
        """Raises PydanticCustomError for a value that would have an effect."""
        if isinstance(value, dict):
            value = {name: item for name, item in value.items() if not _is_empty(item)}
        if not _is_empty(value) and (isinstance(value, bool) or value not in self.neutral):
            raise PydanticCustomError("unsupported", "this server does not support it")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        empty: list[Any] = [None, False, "", [], {}]
        without_effect = {"type": "object", "additionalProperties": {"enum": empty}}
        return {"anyOf": [{"enum": [*empty, *self.neutral]}, without_effect], "description": "Not supported."}


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


Refused = Annotated[Any, Unsupported()]
Accepted = Annotated[Any, Field(description="Accepted, but has no effect.")]


# The request.


class TextPart(Lenient):
    """A text part."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class RefusalPart(Lenient):
    """A refusal part, read as text."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        return self.refusal


class ImageUrl(Lenient):
    """An image URL: a data URI, or a web address on a host that the server may fetch from."""

    url: str = Field(min_length=1, examples=["data:image/png;base64,iVBORw0KGgo..."])
    detail: Accepted = None


class ImagePart(Lenient):
    """An image part."""

    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | Annotated[str, Field(min_length=1)]
    detail: Accepted = None

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


Part = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type")]


def _role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise PydanticCustomError("unsupported_role", "this server does not support tools, nor messages of this role")
    return value


class Message(Lenient):
    """A message. Only user messages may contain images. A message from an answer can be sent back unchanged."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]
    content: list[Part | Text] | Text | None = Field(
        default=None,
        validate_default=True,
        description="May be missing or empty in an assistant message.",
    )
    refusal: Text | None = Field(default=None, description="Used as the content of an assistant message without one.")
    tool_calls: Refused = None
    function_call: Refused = None
    audio: Refused = None
    images: Refused = None
    videos: Refused = None
    # Fields of answers that are not part of a prompt.
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
    def _require_content(cls, content: Any, info: ValidationInfo) -> Any:
        if info.data.get("role") != "assistant":
            if content is None:
                raise PydanticCustomError("no_content", "must be a string or a list of parts")
            if content == []:
                raise PydanticCustomError("no_content", "is empty")
        return content

    @model_validator(mode="after")
    def _images_only_from_users(self) -> Message:
        shown = isinstance(self.content, list) and any(isinstance(part, ImagePart) for part in self.content)
        if shown and self.role != "user":
            raise ValueError(f"only user messages may contain images, not a message of role {self.role}")
        return self

    @property
    def parts(self) -> list[dict[str, str]]:
        """The content as chat templates take it, with URLs in place of images. An assistant's parts become one text."""
        content = self.content or self.refusal or ""
        found = [
            {"type": "image", "url": part.url}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": part if isinstance(part, str) else part.text}
            for part in ([content] if isinstance(content, str) else content)
        ]
        if self.role == "assistant":
            return [{"type": "text", "text": "".join(part["text"] for part in found)}]
        return found


def bounded_policy(text: str, seed: int = 0) -> str | Policy:
    """As `read_policy` for untrusted text: also raises ValueError for schedules longer than `MAX_SCHEDULED`."""
    policy = read_policy(text, seed)
    if isinstance(policy, Forced) and (count := len(list(policy.schedule))) > MAX_SCHEDULED:
        raise ValueError(f"a schedule may have at most {MAX_SCHEDULED} invocations, not {count}")
    return policy


def _check_policy(text: str) -> str:
    bounded_policy(text)
    return text


class Memory(Lenient):
    """The field vismem: when memory is invoked, and whether the answer lists the invocations."""

    invocation: Annotated[str, AfterValidator(_check_policy), Field(max_length=4096)] | None = Field(
        default=None,
        description=f"One of: {SPELLINGS}. The default is set with the server's --invocation.",
        examples=["learned", "off", "short@0,long@12"],
    )
    trace: bool = Field(default=True, description="Whether each choice's field `vismem` lists its invocations.")


class StreamOptions(Lenient):
    """Stream options."""

    include_usage: bool = Field(default=False, description="Send the token counts in a last chunk.")
    include_obfuscation: Accepted = None


class ChatRequest(Lenient):
    """A request for chat completions."""

    model: str = Field(max_length=512)
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(
        None, ge=1, description="Maximum tokens per choice: text, and invocations sampled by the model."
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The newer name of max_tokens.")
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False, description="0 is greedy.")
    top_k: int | None = Field(
        default=None,
        ge=-1,
        le=2**31 - 1,
        description="Not OpenAI's: sample from this many likeliest tokens; -1 and 0 mean all.",
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Not OpenAI's: drop tokens less likely than this fraction of the likeliest one.",
    )
    repetition_penalty: float | None = Field(
        default=None, ge=0.1, le=10, allow_inf_nan=False, description="Not OpenAI's."
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="Choice n is sampled with `seed + n`. If missing or -1, the server picks it.",
    )
    stop: Stop | Annotated[list[Stop | None], Field(max_length=MAX_STOPS)] = Field(default_factory=list)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    logprobs: bool = Field(
        default=False, description="Return log-probabilities of the text tokens, before temperature and truncation."
    )
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    ignore_eos: bool = Field(default=False, description="vLLM's: ignore the end token and generate until max_tokens.")
    add_generation_prompt: bool = Field(
        default=True, description="vLLM's: start an assistant message after the given ones."
    )
    continue_final_message: bool = Field(
        default=False, description="vLLM's: continue the last message, which must be the assistant's."
    )
    vismem: Memory = Field(default_factory=Memory)
    # Fields that would change the answer.
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
    # Fields that do not affect the answer.
    parallel_tool_calls: Accepted = None
    metadata: Accepted = None
    prediction: Accepted = None
    prompt_cache_key: Accepted = None
    safety_identifier: Accepted = None
    service_tier: Accepted = None
    store: Accepted = None
    user: Accepted = None

    @field_validator("top_k")
    @classmethod
    def _zero_is_all(cls, top_k: int | None) -> int | None:
        return 0 if top_k == -1 else top_k

    @field_validator("seed")
    @classmethod
    def _server_picks(cls, seed: int | None) -> int | None:
        return None if seed == -1 else seed

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give only one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.continue_final_message:
            if self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
                raise ValueError(
                    "continue_final_message needs add_generation_prompt: false, because it starts no new message"
                )
            if self.messages[-1].role != "assistant":
                raise ValueError(
                    f"continue_final_message needs an assistant message last, not one of role {self.messages[-1].role}"
                )
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else [stop for stop in self.stop if stop is not None]

    @property
    def top(self) -> int | None:
        """The number of likeliest tokens to report beside each log-probability; None reports no log-probabilities."""
        return self.top_logprobs if self.logprobs else None

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message. An empty one has nothing to continue."""
        return self.continue_final_message and self.messages[-1].parts[0]["text"] != ""

    @property
    def image_urls(self) -> list[str]:
        """The URLs of all images, in order."""
        return [part["url"] for message in self.messages for part in message.parts if part["type"] == "image"]


# The answer.


class InvocationTrace(BaseModel):
    """One invocation of memory.

    Args:
        kind: "short" or "long".
        position: index of the invocation token among the choice's tokens, including memory tokens.
        offset: number of characters of the choice's text before it.
        length: number of vectors inserted; 0 if the policy does not let this kind form memory.
        forced: whether a policy inserted it, rather than the model sampling it.
        logprob: of the invocation token, if the model sampled it and log-probabilities were requested.
    """

    kind: Kind
    position: int
    offset: int
    length: int
    forced: bool
    logprob: float | None = None


class Trace(BaseModel):
    """The memory invocations of a choice; in a stream, the new ones."""

    invocations: list[InvocationTrace]


class TopLogprob(BaseModel):
    """An alternative token."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """A sampled token and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of a choice's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class Choice(BaseModel):
    """One of the n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason
    vismem: Trace | None = None


class MemoryUsage(BaseModel):
    """What memory used; not included in the other counts.

    Args:
        invocation_tokens: number of invocation and end tokens.
        short_vectors, long_vectors: number of memory vectors inserted.
    """

    invocation_tokens: int = 0
    short_vectors: int = 0
    long_vectors: int = 0


class Usage(BaseModel):
    """Tokens of the prompt, including images, and of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    memory: MemoryUsage


class Provenance(BaseModel):
    """What reproduces the answer."""

    seed: int = Field(description="The first choice's seed.")
    invocation: str


class ChatCompletion(BaseModel):
    """A complete answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    vismem: Provenance


class Delta(BaseModel):
    """New content of a choice."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A choice in a stream chunk."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None
    vismem: Trace | None = None


class ChatChunk(BaseModel):
    """A chunk of a streamed answer: what is new in some choices.

    Args:
        usage: of the request so far; sent to the client in a last chunk, if it asked for it.
        vismem: in the first chunk only.
    """

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage
    vismem: Provenance | None = None


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vismem"


class Models(BaseModel):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether the server accepts requests, and how many rows are waiting and being decoded."""

    status: Literal["ok", "stopping", "failed"]
    waiting: int
    writing: int


class ErrorBody(BaseModel):
    """The error itself."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """An error in OpenAI's format."""

    error: ErrorBody
