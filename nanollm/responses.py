"""The Responses API: input items to messages, an answer as typed events, and a bounded store for background work and conversations."""

# %%
import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any
from uuid import uuid4

from openai.types.responses import (FunctionTool, Response, ResponseCompletedEvent, ResponseContentPartAddedEvent,
                                    ResponseContentPartDoneEvent, ResponseCreatedEvent, ResponseFailedEvent,
                                    ResponseIncompleteEvent, ResponseInProgressEvent, ResponseItemList,
                                    ResponseOutputItemAddedEvent, ResponseOutputItemDoneEvent, ResponseOutputMessage,
                                    ResponseOutputText, ResponseQueuedEvent, ResponseTextDeltaEvent, ResponseTextDoneEvent,
                                    ResponseUsage)
from pydantic import Field, WithJsonSchema

from .async_engine import AsyncEngine, Stream, check_delta
from .protocol import (ApiError, Count, Flag, Metadata, NumLogprobs, SamplingForm, Text, api_error, chat_logprobs,
                              check_format, check_tools, unsupported)
from .sampling import SamplingParams
from .text import encode_chat, read_content

# %%
Input = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": {
    "type": "object", "required": ["role", "content"],
    "properties": {"role": {"enum": ["user", "system", "developer", "assistant"]}, "content": {"type": "string"}}}}]})]


class ResponsesRequest(SamplingForm):
    "`POST /v1/responses`"
    not_served = {"conversation": (), "prompt": (), "reasoning": ({"effort": "none"},), "context_management": (), "service_tier": ("auto", "default"),
                  "structured_outputs": (), "moderation": ()}
    input: Input
    instructions: Annotated[str, Field(max_length=2**20)] | None = None
    max_output_tokens: Annotated[Count, Field(ge=1)] | None = None # None: as far as the context goes
    previous_response_id: Text | None = None
    store: Flag = True
    background: Flag = False
    text: dict[str, Any] = {}
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: Flag = True
    top_logprobs: NumLogprobs = 0
    include: Annotated[list[Text], Field(max_length=32)] = []
    truncation: Text = "disabled"
    metadata: Metadata = {}

    @property
    def wants_logprobs(self) -> bool: return self.top_logprobs > 0 or "message.output_text.logprobs" in self.include

    def check(self) -> None:
        "Raise ApiError for what is understood and not served, or makes no sense."
        super().check()
        if self.n != 1:
            raise unsupported("n", self.n)
        if self.truncation != "disabled":
            raise unsupported("truncation", self.truncation)
        if self.background and not self.store:
            raise ApiError(400, "background needs store=true: how else could the response be fetched?", param="background")
        check_format(self.text.get("format"), "text.format")
        check_tools(self.tools, self.tool_choice)
        for i, tool in enumerate(self.tools):
            try:
                FunctionTool.model_validate(tool)
            except ValueError as error:
                raise api_error(error, f"tools[{i}]") from error

    def sampling_params(self) -> SamplingParams:
        "Return the parameters for the engine."
        return super().sampling_params(max_tokens=self.max_output_tokens, logprobs=self.top_logprobs if self.wants_logprobs else None,
                                       top_logprobs=None)

# %%
def read_items(given: str | Sequence[Mapping]) -> list[dict]: # as `input_items` reports them
    "Bring the input of a request into the long form, with ids. Raises ApiError that names the item."
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"input must be a text or a list of items, not empty, got {given!r:.60}", param="input")
    return [read_item(item, f"input[{i}]") for i, item in enumerate(given)]


def read_item(item: Any, where: str) -> dict:
    "Bring one item of the input into the long form."
    kind = item.get("type", "message") if isinstance(item, Mapping) else None
    fields = {"message": ("role",), "function_call": ("call_id", "name", "arguments"), "function_call_output": ("call_id",)}
    if kind not in fields:
        raise ApiError(400, f"{where} must be a message, function_call or function_call_output, got {kind or item!r:.60}", param=where)
    for name in fields[kind]:
        if not isinstance(item.get(name), str):
            raise ApiError(400, f"{where}.{name} must be a text, got {item.get(name)!r:.60}", param=f"{where}.{name}")
    own_id = item.get("id")
    head = {"id": own_id if isinstance(own_id, str) and own_id else new_id("msg" if kind == "message" else "fc"), "type": kind, "status": "completed"}
    try:
        if kind == "function_call":
            return head | {name: item[name] for name in fields[kind]}
        if kind == "function_call_output":
            return head | {"call_id": item["call_id"], "output": read_content({"role": "tool", "content": item.get("output")}, where)}
        if item["role"] not in ("user", "system", "developer", "assistant"):
            raise ValueError(f"{where}.role is {item['role']!r:.60}: use user, system, developer or assistant")
        text = read_content(item, where)
    except ValueError as error:
        raise api_error(error, where) from error
    part = {"type": "output_text", "text": text, "annotations": []} if item["role"] == "assistant" else {"type": "input_text", "text": text}
    return head | {"role": item["role"], "content": [part]}


def new_id(kind: str) -> str:
    "Make a name that nobody has, such as `resp_4f...`."
    return f"{kind}_{uuid4().hex}"

# %%
def to_messages(items: Sequence[Mapping], instructions: str | None) -> list[dict]:
    "Write items the way chat templates read them."
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for item in items:
        if item["type"] == "message":
            messages.append({"role": item["role"], "content": item["content"][0]["text"]})
        elif item["type"] == "function_call":
            call = {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        else:
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    return messages

# %%
class ResponseObject(Response):
    "A response with its time in whole seconds, as OpenAI sends it."
    created_at: int


class Run:
    "One response in the making: its state, and its events so far."

    def __init__(self, form: ResponsesRequest, model: str, tokenizer: Any, items: list[dict], stream: Stream):
        self.id, self.form, self.tokenizer, self.items, self.stream = stream.request_id, form, tokenizer, items, stream
        self.events: list[str] = [] # as they go over the wire
        self.output: list[ResponseOutputMessage] = []
        self.num_bytes = 0 # when it has ended
        self._changed = asyncio.Event()
        tools = [FunctionTool.model_validate(tool) for tool in form.tools]
        self._state: dict[str, Any] = dict(
            id=self.id, object="response", created_at=int(time.time()), status="queued" if form.background else "in_progress",
            error=None, incomplete_details=None, instructions=form.instructions, metadata=form.metadata, model=model, output=[],
            parallel_tool_calls=form.parallel_tool_calls, temperature=form.temperature, top_p=form.top_p,
            max_output_tokens=form.max_output_tokens, previous_response_id=form.previous_response_id, background=form.background,
            store=form.store, text={"format": {"type": "text"}}, tools=tools, tool_choice=form.tool_choice,
            truncation="disabled", top_logprobs=form.top_logprobs, reasoning={"effort": None, "summary": None},
            service_tier="default", user=form.user, usage=None)
        self.task = asyncio.create_task(self._work())

    @property
    def done(self) -> bool: return self._state["status"] not in ("queued", "in_progress")

    @property
    def response(self) -> Response: return ResponseObject(**self._state) # as it is now

    async def finished(self) -> Response:
        "Wait for the end. Raises ApiError if the answer has failed."
        await asyncio.wait([self.task])
        if self._state["error"] is not None:
            raise ApiError(500, self._state["error"]["message"], "server_error", code="server_error")
        return self.response

    async def follow(self, after: int = -1) -> AsyncIterator[str]:
        "Yield the events with numbers above `after`, those that are still to come included."
        while True:
            while after + 1 < len(self.events):
                after += 1
                yield self.events[after]
            if self.done:
                return
            await self._changed.wait()

    async def cancel(self) -> None:
        "Abort the request, if it has not ended, and wait until that is noted."
        self.task.cancel()
        await asyncio.wait([self.task])
        if not self.done: # the task was cancelled before it began
            self.stream.close()
            self._end("cancelled", None, "", [], None)

    def _emit(self, kind, **fields):
        if self.form.stream:
            event = kind(type=EVENTS[kind], sequence_number=len(self.events), **fields)
            self.events.append(f"event: {event.type}\ndata: {event.model_dump_json(exclude_unset=True, serialize_as_any=True)}\n\n")
        self._changed.set()
        self._changed = asyncio.Event()

    async def _work(self):
        text, reports, message, error = [], [], None, None
        try:
            self._emit(ResponseCreatedEvent, response=self.response)
            if self.form.background:
                self._emit(ResponseQueuedEvent, response=self.response)
            else:
                self._emit(ResponseInProgressEvent, response=self.response)
            async for delta in self.stream:
                if self._state["status"] == "queued":
                    self._state["status"] = "in_progress"
                    self._emit(ResponseInProgressEvent, response=self.response)
                if message is None:
                    message = self._begin()
                text.append(delta.text)
                reports += delta.logprobs
                if delta.text or delta.logprobs:
                    self._emit(ResponseTextDeltaEvent, delta=delta.text, logprobs=self._logprobs(delta.logprobs), **self._place(message))
                check_delta(delta)
            status = "incomplete" if delta.finish_reason == "length" else "completed"
        except asyncio.CancelledError:
            status = "cancelled"
        except Exception as caught:
            status, error = "failed", str(caught) if isinstance(caught, ApiError) else "the server could not finish this answer"
        finally:
            self.stream.close()
        self._end(status, message, "".join(text), reports, error)

    def _place(self, message):
        return dict(item_id=message.id, output_index=0, content_index=0)

    def _logprobs(self, reports):
        return [report.model_dump() for report in chat_logprobs(self.tokenizer, reports)]

    def _begin(self):
        message = ResponseOutputMessage(id=new_id("msg"), type="message", role="assistant", status="in_progress", content=[])
        part = ResponseOutputText(type="output_text", text="", annotations=[], logprobs=[])
        self._emit(ResponseOutputItemAddedEvent, item=message, output_index=0)
        self._emit(ResponseContentPartAddedEvent, part=part, **self._place(message))
        return message

    def _end(self, status, message, text, reports, error):
        if message is not None:
            part = ResponseOutputText(type="output_text", text=text, annotations=[], logprobs=self._logprobs(reports))
            message.content, message.status = [part], "completed" if status == "completed" else "incomplete"
            self.output = [message]
            self._emit(ResponseTextDoneEvent, text=text, logprobs=part.to_dict()["logprobs"], **self._place(message))
            self._emit(ResponseContentPartDoneEvent, part=part, **self._place(message))
            self._emit(ResponseOutputItemDoneEvent, item=message, output_index=0)
            request, answer = self.stream.answers[0].request, self.stream.answers[0]
            n, new = request.num_prompt_tokens, len(answer.token_ids)
            self._state["usage"] = ResponseUsage(
                input_tokens=n, input_tokens_details=dict(cached_tokens=request.num_cached_tokens, cache_write_tokens=0),
                output_tokens=new, output_tokens_details=dict(reasoning_tokens=0), total_tokens=n + new)
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        self._state |= dict(status=status, output=self.output, incomplete_details=details,
                            error=error and {"code": "server_error", "message": error})
        last = {"completed": ResponseCompletedEvent, "failed": ResponseFailedEvent}.get(status, ResponseIncompleteEvent)
        self._emit(last, response=self.response)
        self.num_bytes = sum(map(len, self.events)) + sum(len(str(item)) for item in [*self.items, *self.output])

# %%
EVENTS = { # the `type` of every event
    ResponseCreatedEvent: "response.created", ResponseQueuedEvent: "response.queued", ResponseInProgressEvent: "response.in_progress",
    ResponseOutputItemAddedEvent: "response.output_item.added", ResponseContentPartAddedEvent: "response.content_part.added",
    ResponseTextDeltaEvent: "response.output_text.delta", ResponseTextDoneEvent: "response.output_text.done",
    ResponseContentPartDoneEvent: "response.content_part.done", ResponseOutputItemDoneEvent: "response.output_item.done",
    ResponseCompletedEvent: "response.completed", ResponseIncompleteEvent: "response.incomplete", ResponseFailedEvent: "response.failed"}

# %%
class ResponseStore:
    "Responses by tenant and id. When it is full, the oldest that have ended go."

    def __init__(self, max_responses: int = 1024, max_bytes: int = 2**26):
        self.max_responses, self.max_bytes = max_responses, max_bytes
        self._runs: OrderedDict[tuple[str, str], Run] = OrderedDict()

    def put(self, tenant: str, run: Run) -> None:
        "Keep a response; it counts with the bytes that it has."
        self._runs[tenant, run.id] = run
        run.task.add_done_callback(lambda _: self._trim())
        self._trim()

    def get(self, tenant: str, response_id: str) -> Run:
        "Return a response. Raises ApiError if this tenant has none of that id."
        try:
            return self._runs[tenant, response_id]
        except KeyError:
            raise ApiError(404, f"there is no response {response_id!r:.80}", param="response_id", code="response_not_found") from None

    def delete(self, tenant: str, response_id: str) -> Run:
        "Forget a response and return it."
        run = self.get(tenant, response_id)
        del self._runs[tenant, response_id]
        return run

    def _trim(self):
        ended = [key for key, run in self._runs.items() if run.done] # oldest first
        excess, num_bytes = len(self._runs) - self.max_responses, sum(run.num_bytes for run in self._runs.values())
        for key in ended:
            if excess <= 0 and num_bytes <= self.max_bytes:
                break
            num_bytes -= self._runs.pop(key).num_bytes
            excess -= 1

# %%
class ResponsesApi:
    "What the routes under `/v1/responses` do, without HTTP."

    def __init__(self, engine: AsyncEngine, store: ResponseStore):
        self.engine, self.store = engine, store

    async def prompt(self, form: ResponsesRequest, tenant: str) -> tuple[list[dict], list[int]]: # all items, token ids
        "Put together what the model reads: instructions, the earlier conversation, and the new input."
        items = read_items(form.input)
        if form.previous_response_id is not None:
            previous = self.store.get(tenant, form.previous_response_id)
            if not previous.done or not previous.output:
                raise ApiError(400, f"response {previous.id} is {previous.response.status} and cannot be continued", param="previous_response_id")
            items = [*previous.items, *(message.to_dict() for message in previous.output), *items]
        tools = [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in form.tools]
        messages = to_messages(items, form.instructions)
        return items, await self.engine.run(encode_chat, self.engine.tokenizer, messages, tools if form.tool_choice == "auto" else None)

    async def create(self, form: ResponsesRequest, tenant: str, model: str, request_id: str, limit_params: Any, **options) -> Run:
        "Start a response."
        items, prompt_ids = await self.prompt(form, tenant)
        stream = self.engine.submit(prompt_ids, limit_params(form.sampling_params(), len(prompt_ids)), request_id, **options)
        run = Run(form, model, self.engine.tokenizer, items, stream)
        if form.store:
            self.store.put(tenant, run)
        return run

    async def cancel(self, tenant: str, response_id: str) -> Response:
        "Stop a background response. Raises ApiError for one that is not in the background."
        run = self.store.get(tenant, response_id)
        if not run.form.background:
            raise ApiError(400, "only background responses can be cancelled; hang up instead", param="response_id")
        await run.cancel()
        return run.response

    async def delete(self, tenant: str, response_id: str) -> dict:
        "Forget a response; one that still runs is stopped."
        run = self.store.delete(tenant, response_id)
        await run.cancel()
        return {"id": response_id, "object": "response", "deleted": True}

    def input_items(self, tenant: str, response_id: str, limit: int, order: str, after: str | None) -> ResponseItemList:
        "Return a page of what the model was given."
        items = self.store.get(tenant, response_id).items[::1 if order == "asc" else -1]
        ids = [item["id"] for item in items]
        if after is not None and after not in ids:
            raise ApiError(400, f"there is no item {after!r:.80} to continue after", param="after")
        first = ids.index(after) + 1 if after is not None else 0
        page = items[first:first + limit]
        return ResponseItemList.construct(object="list", data=page, first_id=page[0]["id"] if page else "",
                                          last_id=page[-1]["id"] if page else "", has_more=first + limit < len(items))
