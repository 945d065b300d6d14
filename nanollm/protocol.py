"""What goes over the wire: requests checked field by field, answers built from the OpenAI client's own types, and one shape for every error."""

# %%
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Annotated, Any, ClassVar

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel, ConfigDict, Field, Strict, WithJsonSchema, model_validator
from transformers import PreTrainedTokenizerBase

from .generate import ContextLengthError
from .sampling import Count, Flag, Float, Listed, NumLogprobs, Penalty, SamplingParams, TokenId, TokenLogprobs
from .text import BYTE_TOKEN, ROLES, byte_tokenizer

# %%
class ApiError(Exception):
    "An answer that is an error: an HTTP status, and the body that the OpenAI client reads."

    def __init__(
        self,
        status: int, # of HTTP
        message: str, # for the one who reads the client's log: no traceback, no path
        type: str = "invalid_request_error",
        param: str | None = None, # the field that is wrong
        code: str | None = None, # for programs
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


def overloaded(message: str) -> ApiError:
    "Say that the server takes nothing more for now; clients come again after a second."
    return ApiError(503, message, "overloaded", code="overloaded", headers={"Retry-After": "1"})


def server_error(message: str = "the server could not finish this answer") -> ApiError:
    "Say that something failed which is not the client's fault."
    return ApiError(500, message, "server_error", code="server_error")


def unsupported(name: str, value: Any) -> ApiError:
    "Refuse what this server knows and does not do: an answer without it would be a wrong answer."
    return ApiError(400, f"{name}={value!r:.80} is not supported by this server", param=name, code="unsupported_parameter")

# %%
def api_error(
    error: Exception, # of pydantic, `SamplingParams`, the tokenizer or the engine's door
    param: str | None = None, # the field, if the error does not name it
) -> ApiError:
    "Turn what is wrong with a request into an error that names the field, the limit and the value."
    if isinstance(error, ContextLengthError):
        return ApiError(400, f"the maximum context length is exceeded: {error}", param=param, code="context_length_exceeded")
    if hasattr(error, "errors"): # of pydantic or FastAPI
        first = error.errors()[0]
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"] if part not in ("body", "query"))
        param = param.lstrip(".")[:80] or None
        got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r:.60}"
        return ApiError(400, (f"{param}: " if param else "") + first["msg"].removeprefix("Value error, ") + got, param=param)
    return ApiError(400, str(error), param=param)

# %%
class Form(BaseModel):
    "A request's body. A null is as good as an absent field; unknown fields pass, and known ones that are not served are refused."
    model_config = ConfigDict(frozen=True, extra="allow")
    not_served: ClassVar[Mapping[str, tuple]] = {} # name: values that change nothing

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data):
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    def check(self) -> None:
        "Raise ApiError for what is understood and not served."
        for name, harmless in self.not_served.items():
            value = (self.model_extra or {}).get(name)
            if value not in (None, False, "", [], {}, *harmless):
                raise unsupported(name, value)

# %%
Text = Annotated[str, Strict(), Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Text], Field(max_length=16)]


class StreamOptions(Form):
    "What a stream contains besides the text."
    include_usage: Flag = False # one more chunk at the end
    continuous_usage_stats: Flag = False # in every chunk (vLLM)


class SamplingForm(Form):
    "The fields that all ways of asking share; OpenAI's, then vLLM's."
    model: Text | None = None
    temperature: Annotated[Float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    n: Annotated[Count, Field(ge=1, le=128)] = 1
    stop: Annotated[tuple[Annotated[str, Strict(), Field(min_length=1, max_length=1000)], ...], Field(max_length=4), Listed] = ()
    seed: Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[Float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    stream: Flag = False
    stream_options: StreamOptions = StreamOptions()
    user: Text | None = None
    top_k: Annotated[int, Strict(), Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[Float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Float, Field(ge=0.01, le=100)] = 1.0
    min_tokens: Count = 0
    stop_token_ids: Annotated[tuple[Count, ...], Field(max_length=256), Listed] = ()
    ignore_eos: Flag = False
    skip_special_tokens: Flag = True
    include_stop_str_in_output: Flag = False
    priority: Annotated[int, Strict(), Field(ge=-(2**31), lt=2**31)] = 0 # lower goes first
    cache_salt: Text = "" # cached tokens are shared only with requests of the same salt

    def check(self) -> None:
        "Raise ApiError for what is understood and not served, or fits no stream."
        super().check()
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ApiError(400, "stream_options are for streams: set stream=true", param="stream_options")

    def sampling_params(self, **more) -> SamplingParams:
        "Return the parameters for the engine. Raises ValueError for a combination that makes no sense."
        names = self.model_fields_set & SamplingParams.model_fields.keys()
        return SamplingParams(**{name: getattr(self, name) for name in names} | more)

# %%
NOT_SERVED = {
    "structured_outputs": (), "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "logits_processors": (),
    "prompt_logprobs": (), "bad_words": (), "allowed_token_ids": (), "use_beam_search": (), "best_of": (1,), "service_tier": ("auto", "default"),
}
Message = Annotated[dict[str, Any], WithJsonSchema({
    "type": "object", "required": ["role", "content"],
    "properties": {"role": {"enum": list(ROLES)}, "content": {"type": "string"}}})]


class ChatRequest(SamplingForm):
    "`POST /v1/chat/completions`"
    not_served = NOT_SERVED | {
        "functions": (), "function_call": ("none",), "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
        "reasoning_effort": ("none",), "verbosity": ("medium",), "chat_template": (), "chat_template_kwargs": (), "documents": (),
        "echo": (), "continue_final_message": (), "add_generation_prompt": (True,)}
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[Count, Field(ge=1)] | None = None # None: as far as the context goes
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None # the new name of the same
    logprobs: Flag = False
    top_logprobs: NumLogprobs = 0
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] = []
    tool_choice: Any = None
    parallel_tool_calls: Flag = True
    metadata: Metadata | None = None
    store: Flag = False

    def check(self) -> None:
        "Raise ApiError for what is understood and not served, or makes no sense."
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        check_format(self.response_format, "response_format")
        check_tools(self.tools, self.tool_choice)

    def sampling_params(self) -> SamplingParams:
        "Return the parameters for the engine."
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return super().sampling_params(max_tokens=limit, logprobs=self.top_logprobs if self.logprobs else None, top_logprobs=None)

# %%
def check_format(form: Mapping | None, param: str) -> None:
    "Raise ApiError unless the answer may be any text."
    if form and form.get("type") != "text":
        raise ApiError(400, f"{param} of type {form.get('type')!r:.40} cannot be enforced by this server: only 'text' is served",
                       param=param, code="unsupported_parameter")


def check_tools(tools: Sequence[Mapping], choice: Any) -> None:
    "Raise ApiError for tools that are no functions, or a choice that forces a call."
    for i, tool in enumerate(tools):
        if tool.get("type") != "function" or not isinstance(tool.get("function", tool), Mapping):
            raise ApiError(400, f"tools[{i}] is of type {tool.get('type')!r:.40}: only functions are known", param=f"tools[{i}]")
        name = tool.get("function", tool).get("name")
        if not isinstance(name, str) or not 1 <= len(name) <= 64:
            raise ApiError(400, f"tools[{i}] needs a function name of 1 to 64 characters, got {name!r:.80}", param=f"tools[{i}]")
    if choice not in (None, "none", "auto"):
        raise ApiError(400, f"tool_choice={choice!r:.60} forces a call, which this server cannot enforce: use 'auto' or 'none'",
                       param="tool_choice", code="unsupported_parameter")

# %%
MAX_ANSWERS = 1024 # of one request, over all its prompts
Prompts = Annotated[Any, WithJsonSchema({"anyOf": [
    {"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}, "minItems": 1}]})]


class CompletionRequest(SamplingForm):
    "`POST /v1/completions`"
    not_served = NOT_SERVED | {"suffix": (), "response_format": ({"type": "text"},), "prompt_embeds": ()}
    prompt: Prompts
    max_tokens: Count = 16
    logprobs: Annotated[Count, Field(le=5)] | None = None
    echo: Flag = False # the prompt, in front of the answer
    add_special_tokens: Flag = True # around a prompt that is text

    def prompts(self) -> list[str | list[int]]:
        "Return one or more prompts, each a text or token ids. Raises ApiError if `prompt` is something else."
        given = self.prompt
        many = isinstance(given, list) and given and isinstance(given[0], str | list)
        found = given if many else [given]
        for i, prompt in enumerate(found):
            is_ids = isinstance(prompt, list) and all(type(token_id) is int for token_id in prompt)
            if not prompt or not (isinstance(prompt, str) or is_ids):
                raise ApiError(400, f"prompt{f'[{i}]' if many else ''} must be a text or a list of token ids, not empty, got {prompt!r:.60}",
                               param="prompt")
        if len(found) * self.n > MAX_ANSWERS:
            raise ApiError(400, f"{len(found)} prompts with n={self.n} are more than {MAX_ANSWERS} answers", param="prompt")
        return found

    def sampling_params(self) -> SamplingParams:
        "Return the parameters for the engine, which makes one token at least."
        return super().sampling_params(max_tokens=max(1, self.max_tokens), min_tokens=min(self.min_tokens, max(1, self.max_tokens)),
                                       prompt_logprobs=self.logprobs if self.echo else None)

# %%
class TokenizeRequest(Form):
    "`POST /tokenize`: a prompt, or messages, to token ids."
    model: Text | None = None
    prompt: Annotated[str, Strict()] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: Flag = True # for a prompt
    add_generation_prompt: Flag = True # for messages
    return_token_strs: Flag = False

    def check(self) -> None:
        "Raise ApiError unless there is exactly one thing to tokenize."
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")


class DetokenizeRequest(Form):
    "`POST /detokenize`: token ids to text."
    model: Text | None = None
    tokens: list[Count]

# %%
def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> CompletionUsage:
    "Count what an answer took; `cached_tokens` of the prompt were found in the prefix cache."
    return CompletionUsage(
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0))

# %%
@cache
def byte_alphabet() -> dict[str, int]:
    "Return what byte each character of a byte-level token stands for."
    return {char: byte for char, byte in byte_tokenizer().get_vocab().items() if byte < 256}


@lru_cache(maxsize=2**16)
def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    "Return the bytes of a token, which may be part of a character only."
    token, text = tokenizer.convert_ids_to_tokens(token_id) or "", tokenizer.decode([token_id])
    if BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    if "\ufffd" in text and byte_alphabet().keys() >= set(token):
        return bytes(byte_alphabet()[char] for char in token)
    return text.encode()

# %%
@lru_cache(maxsize=2**16)
def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    "Return the text of a token by itself."
    return tokenizer.decode([token_id])


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, reports: Iterable[TokenLogprobs]) -> list[ChatCompletionTokenLogprob]:
    "Write reports the way chat completions have them."
    def entry(kind, token_id, logprob, **more):
        return kind(token=token_text(tokenizer, token_id), logprob=logprob, bytes=list(token_bytes(tokenizer, token_id)), **more)

    return [entry(ChatCompletionTokenLogprob, report.token_id, report.logprob,
                  top_logprobs=[entry(TopLogprob, token_id, logprob) for token_id, logprob in report.top]) for report in reports]


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    reports: Sequence[TokenLogprobs | None], # one for each; None for the first token of a prompt
    offset: int = 0, # characters in front
) -> Logprobs:
    "Write reports the way completions have them."
    tokens = [token_text(tokenizer, token_id) for token_id in token_ids]
    offsets = list(accumulate(map(len, tokens), initial=offset))[:-1]
    best = [report and {token_text(tokenizer, i): logprob for i, logprob in [(report.token_id, report.logprob), *report.top[::-1]]}
            for report in reports]
    return Logprobs.construct(tokens=tokens, token_logprobs=[report and report.logprob for report in reports],
                              top_logprobs=best, text_offset=offsets)

# %%
class ChatWriter:
    "Writes one chat completion, whole or in chunks."

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str, request_id: str):
        self.tokenizer, self.head = tokenizer, dict(id=request_id, created=int(time.time()), model=model, system_fingerprint=None)
        self._begun: set[int] = set()

    def _logprobs(self, reports):
        return None if reports is None else ChoiceLogprobs(content=chat_logprobs(self.tokenizer, reports), refusal=None)

    def chunks(self, index: int, text: str, reports: Sequence[TokenLogprobs] | None, finish_reason: str | None) -> list[ChatCompletionChunk]:
        "Write what is new in one answer: a first chunk with the role, text, and a last chunk with the reason of the end."
        choices = []
        if index not in self._begun:
            self._begun.add(index)
            choices.append(dict(delta=ChoiceDelta(role="assistant", content=""), finish_reason=None, logprobs=None))
        if text or reports:
            choices.append(dict(delta=ChoiceDelta(content=text), finish_reason=None, logprobs=self._logprobs(reports)))
        if finish_reason is not None:
            choices.append(dict(delta=ChoiceDelta(), finish_reason=finish_reason, logprobs=None))
        return [self._chunk([ChunkChoice.construct(index=index, **choice)]) for choice in choices]

    def usage_chunk(self, usage: CompletionUsage) -> ChatCompletionChunk:
        "Write the chunk after the last, with the usage."
        return self._chunk([]).model_copy(update={"usage": usage})

    def _chunk(self, choices):
        return ChatCompletionChunk.construct(object="chat.completion.chunk", choices=choices, **self.head)

    def whole(self, answers: Sequence[Any], usage: CompletionUsage) -> ChatCompletion: # answers: `llm.Answer`
        "Write the complete object."
        choices = [Choice(index=i, finish_reason=answer.finish_reason, message=ChatCompletionMessage(role="assistant", content=answer.text, refusal=None),
                          logprobs=self._logprobs(None if answer.request.params.logprobs is None else answer.logprobs))
                   for i, answer in enumerate(answers)]
        return ChatCompletion(object="chat.completion", choices=choices, usage=usage, **self.head)

# %%
class CompletionWriter:
    "Writes one completion, whole or in chunks."

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str, request_id: str):
        self.tokenizer, self.head = tokenizer, dict(id=request_id, created=int(time.time()), model=model, system_fingerprint=None)
        self._offsets: dict[int, int] = defaultdict(int) # characters written, by choice

    def choice(self, index: int, text: str, token_ids: Sequence[int], reports: Sequence[TokenLogprobs | None] | None,
               finish_reason: str | None) -> CompletionChoice:
        "Write what is new in one choice, or all of it."
        logprobs = None if reports is None else completion_logprobs(self.tokenizer, token_ids, reports, self._offsets[index])
        self._offsets[index] += len(text)
        return CompletionChoice.construct(index=index, text=text, logprobs=logprobs, finish_reason=finish_reason)

    def whole(self, choices: Sequence[CompletionChoice], **usage: CompletionUsage | None) -> Completion:
        "Write the object around choices."
        return Completion.construct(object="text_completion", choices=list(choices), **usage, **self.head)
