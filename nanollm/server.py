"""The server: OpenAI's endpoints over the engine, a gate in front of them, and a process that ends without losing what it promised."""

# %%
import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field
from pydantic_core import from_json
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import __version__
from .async_engine import AsyncEngine, Faults, RequestTraces, StepLog, Stream, check_delta, close, merge, unless_gone
from .metrics import EngineMetrics
from .protocol import (ApiError, ChatRequest, ChatWriter, CompletionRequest, CompletionWriter, DetokenizeRequest, SamplingForm,
                              TokenizeRequest, api_error, overloaded, server_error, usage_of)
from .responses import ResponsesApi, ResponsesRequest, ResponseStore
from .sampling import SamplingParams
from .scheduler import RANKS
from .text import encode, encode_chat

logger = logging.getLogger(__name__)

# %%
@dataclass(frozen=True)
class ServerArgs:
    "How the server behaves; the names are vLLM's where it has one."
    served_model_names: tuple[str, ...] # the first is what answers say
    api_keys: tuple[str, ...] = () # none: everybody may ask
    max_queued_requests: int = 1024 # answers beyond those that can run at the same time
    max_output_tokens: int | None = None # of an answer; None: as far as the context goes
    max_body_bytes: int = 4 * 2**20
    shutdown_timeout_s: float = 30.0 # for open requests, once the server is told to end
    max_stored_responses: int = 1024
    log_requests: bool = True # a line for each
    enable_request_traces: bool = False # GET /v1/requests/{id}/trace
    enable_fault_injection: bool = False # POST /debug/faults, GET /debug/check: for tests only

# %%
REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
BODY_TIMEOUT_S = 30.0


def error_response(error: ApiError) -> JSONResponse:
    "Write an error the way the OpenAI client reads it."
    return JSONResponse(error.body, error.status, error.headers)


class Gate:
    "What every request has to pass: a key, a body of bounded size, an id; and the log that says how it went. Pure ASGI."

    def __init__(self, app: Any, args: ServerArgs):
        self.app, self.args = app, args

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start_s, headers = time.perf_counter(), MutableHeaders(scope=scope)
        given = headers.get("x-request-id", "")
        scope["state"] = state = {**scope.get("state", {}), "request_id": given if REQUEST_ID.fullmatch(given) else uuid4().hex, "note": "", "given_id": given}
        status = 499 # if nothing is ever sent: the client is gone

        async def send_with_id(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = state["request_id"]
            await send(message)

        try:
            state["tenant"] = self._check_key(scope, headers)
            body = await asyncio.wait_for(self._read(receive, headers), BODY_TIMEOUT_S) if scope["method"] in ("POST", "PUT", "PATCH") else None
            if body is not None:
                headers["content-type"] = "application/json" # what curl -d calls a form is JSON, too
            await self.app(scope, replay(body, receive), send_with_id)
        except TimeoutError:
            await error_response(ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"))(scope, receive, send_with_id)
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_id)
        finally:
            if self.args.log_requests and scope["path"] not in ("/health", "/metrics"):
                logger.info('%s "%s %s" %d %.3f s %s%s', (scope.get("client") or ["-"])[0], scope["method"], ascii(scope["path"])[1:-1], status,
                            time.perf_counter() - start_s, state["request_id"], state["note"])

    def _check_key(self, scope, headers): # the tenant: who shares a prefix cache and stored responses
        if not self.args.api_keys or scope["path"] == "/health":
            return ""
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not sum(hmac.compare_digest(given, key.encode()) for key in self.args.api_keys):
            raise ApiError(401, "this server needs a valid API key: Authorization: Bearer KEY", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})
        return hashlib.sha256(given).hexdigest()

    async def _read(self, receive, headers):
        if headers.get("origin") and not headers.get("content-type", "").startswith("application/json"):
            raise ApiError(415, "requests of web pages need content-type: application/json") # else any page could send them unasked
        limit, body, size = self.args.max_body_bytes, bytearray(), 0
        too_large = ApiError(413, f"the body is larger than {limit} bytes", headers={"Connection": "close"})
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdecimal() and int(length[:20]) > 8 * limit:
            raise too_large # at once; the client may see a broken connection instead
        more = True
        while more and size <= 8 * limit: # what is a little too large is read to its end, so that the client reads the answer
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client hung up")
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size <= limit:
                body += message.get("body", b"")
        if size > limit:
            raise too_large
        return bytes(body)


def replay(body: bytes | None, receive: Callable) -> Callable:
    "Return a `receive` that gives a body which was read already, and then waits for the client to hang up."
    messages = [] if body is None else [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed():
        return messages.pop() if messages else await receive()

    return replayed

# %%
class JsonRequest(Request):
    "A request whose body is JSON, strictly: UTF-8, no NaN, no half of a surrogate pair, not too deep."

    async def json(self) -> Any:
        "Return what the body says. Raises HTTPException if it says nothing."
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is no valid JSON: {error}") from error


class JsonRoute(APIRoute):
    "A route that reads its body so."

    def get_route_handler(self) -> Callable:
        "Return the handler."
        handler = super().get_route_handler()

        async def handle(request):
            return await handler(JsonRequest(request.scope, request.receive))

        return handle

# %%
class EventStream(Response):
    "Server-sent events, until they end, the client hangs up, or the server ends; then `close` is called, whatever happened."

    def __init__(self, source: AsyncIterator[str], close: Callable[[], Any]):
        self.source, self.close, self.background, self.status_code = source, close, None, 200
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope, receive, send) -> None:
        "Send the events."
        async def pump():
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for text in self.source:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            with contextlib.suppress(ApiError): # the client is gone: nobody to tell
                await unless_gone(receive, pump())
        finally:
            await self.source.aclose()
            self.close()

# %%
def data(*objects: BaseModel) -> str:
    "Write objects as server-sent events without a name."
    return "".join(f"data: {one.model_dump_json(exclude_unset=True)}\n\n" for one in objects)


async def with_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    "End a stream of events as clients expect: an error if there was one, then [DONE]."
    try:
        async for text in events:
            yield text
    except ApiError as error:
        yield f"data: {JSONResponse(error.body).body.decode()}\n\n"
    except Exception:
        logger.exception("a stream has failed")
        yield f"data: {JSONResponse(server_error().body).body.decode()}\n\n"
    finally:
        await events.aclose()
    yield "data: [DONE]\n\n"


def json_of(one: BaseModel) -> Response:
    "Write an object of the OpenAI client as a response."
    return Response(one.model_dump_json(exclude_unset=True, warnings=False), media_type="application/json")

# %%
class Api:
    "The handlers, and what they share."

    def __init__(self, engine: AsyncEngine, args: ServerArgs):
        self.engine, self.args, self.tokenizer, self.started_s = engine, args, engine.tokenizer, int(time.time())
        self.metrics = EngineMetrics(args.served_model_names[0])
        self.traces = RequestTraces() if args.enable_request_traces else None
        self.faults = Faults(engine.engine) if args.enable_fault_injection else None
        self.responses = ResponsesApi(engine, ResponseStore(args.max_stored_responses))
        engine.engine.listeners += [self.metrics, StepLog(), *([self.traces] if self.traces else [])]

    def check(self, form: Any) -> str: # the name of the model
        "Raise ApiError for another model than ours, and for what is not served."
        names = self.args.served_model_names
        if form.model is not None and form.model not in names:
            raise ApiError(404, f"there is no model {form.model!r:.80}; this server has {', '.join(names)}", param="model", code="model_not_found")
        form.check()
        return form.model or names[0]

    def limit(self, params: SamplingParams, num_prompt: int) -> SamplingParams:
        "Hold the server's own limit on the length of an answer. Raises ApiError for more."
        most = self.args.max_output_tokens
        if most is None:
            return params
        if params.max_tokens is None:
            room = max(1, min(most, self.engine.engine.max_model_len - num_prompt))
            return params.model_copy(update={"max_tokens": room})
        if params.max_tokens > most:
            raise ApiError(400, f"this server makes at most {most} tokens in an answer, got {params.max_tokens}", param="max_tokens")
        return params

    def options(self, request: Request, form: SamplingForm) -> dict:
        "Return what the engine has to know besides prompt and parameters."
        if form.priority and self.engine.engine.scheduler.rank is not RANKS["priority"]:
            raise ApiError(400, f"priority={form.priority} needs a server with --scheduling-policy priority", param="priority", code="unsupported_parameter")
        return dict(priority=form.priority, cache_salt=f"{request.state.tenant}/{form.cache_salt}" if request.state.tenant else form.cache_salt)

    def new_id(self, request: Request, kind: str) -> str:
        "Name a response; the client's own name for the request is part of it."
        own = f"{request.state.request_id}-" if request.state.given_id == request.state.request_id else ""
        return f"{kind}{own}{uuid4().hex}"

    def note(self, request: Request, request_id: str, streams: Sequence[Stream]) -> None:
        "Say in the log what a request took."
        answers = [answer for stream in streams for answer in stream.answers]
        prompts = [stream.answers[0].request for stream in streams if stream.answers]
        request.state.note = (f" {request_id} prompt {sum(r.num_prompt_tokens for r in prompts)} (cached {sum(r.num_cached_tokens for r in prompts)}) "
                              f"output {sum(len(answer.token_ids) for answer in answers)} "
                              f"{'/'.join(sorted({str(answer.finish_reason or 'abort') for answer in answers}))}")

    def usage(self, streams: Sequence[Stream], num_output: int | None = None) -> Any:
        "Count the tokens of all answers so far."
        leaders = [stream.answers[0].request for stream in streams if stream.answers]
        made = sum(len(answer.token_ids) for stream in streams for answer in stream.answers)
        return usage_of(sum(r.num_prompt_tokens for r in leaders), made if num_output is None else num_output, sum(r.num_cached_tokens for r in leaders))

    def submit(self, request: Request, form: SamplingForm, prompts: Sequence[Sequence[int]], request_id: str, param: str) -> list[Stream]:
        "Queue a request for each prompt, or none at all. Raises ApiError."
        streams = []
        try:
            for i, prompt_ids in enumerate(prompts):
                params = self.limit(form.sampling_params(), len(prompt_ids))
                own_id = request_id if len(prompts) == 1 else f"{request_id}-{i}"
                streams.append(self.engine.submit(prompt_ids, params, own_id, **self.options(request, form)))
        except (ValueError, ApiError) as error:
            close(streams)
            raise error if isinstance(error, ApiError) else api_error(error, param) from error
        return streams

    async def answer(self, request: Request, form: SamplingForm, streams: list[Stream], request_id: str, events: Callable, whole: Callable) -> Response:
        "Send what the streams bring, as events or as one object, and abort them if the client hangs up."
        def end():
            self.note(request, request_id, streams)
            close(streams)

        if form.stream:
            return EventStream(with_errors(events()), end)
        try:
            for stream in streams:
                await stream.finished()
            return json_of(whole())
        finally:
            end()

    async def chat(self, form: ChatRequest, request: Request) -> Response:
        "`POST /v1/chat/completions`"
        model, request_id = self.check(form), self.new_id(request, "chatcmpl-")
        try:
            prompt_ids = await self.engine.run(encode_chat, self.tokenizer, form.messages, form.tools if form.tool_choice != "none" else None)
        except ValueError as error:
            raise api_error(error, "messages") from error
        [stream] = streams = self.submit(request, form, [prompt_ids], request_id, "messages")
        writer, options = ChatWriter(self.tokenizer, model, request_id), form.stream_options

        async def events():
            async for delta in stream:
                check_delta(delta)
                chunks = writer.chunks(delta.index, delta.text, delta.logprobs if form.logprobs else None, delta.finish_reason)
                if options.include_usage:
                    so_far = self.usage(streams) if options.continuous_usage_stats else None
                    chunks = [chunk.model_copy(update={"usage": so_far}) for chunk in chunks]
                if chunks:
                    yield data(*chunks)
            if options.include_usage:
                yield data(writer.usage_chunk(self.usage(streams)))

        return await self.answer(request, form, streams, request_id, events, lambda: writer.whole(stream.answers, self.usage(streams)))

    async def completions(self, form: CompletionRequest, request: Request) -> Response:
        "`POST /v1/completions`"
        model, prompts, request_id = self.check(form), form.prompts(), self.new_id(request, "cmpl-")
        try:
            all_ids = await self.engine.run(lambda: [encode(self.tokenizer, prompt, form.add_special_tokens) if isinstance(prompt, str) else prompt
                                                     for prompt in prompts])
        except ValueError as error:
            raise api_error(error, "prompt") from error
        streams = self.submit(request, form, all_ids, request_id, "prompt")
        writer, options, begun = CompletionWriter(self.tokenizer, model, request_id), form.stream_options, set()
        num_output = 0 if form.max_tokens == 0 else None # the one token that the engine made was not asked for

        def choice(i, index, text, token_ids, reports, finish_reason):
            place = i * form.n + index
            if form.max_tokens == 0:
                text, token_ids, reports, finish_reason = "", [], [], finish_reason and "length"
            if form.echo and place not in begun:
                leader = streams[i].answers[0].request
                text = (prompts[i] if isinstance(prompts[i], str) else self.tokenizer.decode(all_ids[i])) + text
                reports = [leader.prompt_logprobs.get(k) for k in range(len(all_ids[i]))] + reports
                token_ids = all_ids[i] + token_ids
            begun.add(place)
            return writer.choice(place, text, token_ids, reports if form.logprobs is not None else None, finish_reason)

        async def events():
            async for i, delta in merge(streams):
                check_delta(delta)
                if delta.text or delta.logprobs or delta.finish_reason or form.echo:
                    one = choice(i, delta.index, delta.text, delta.token_ids, delta.logprobs, delta.finish_reason)
                    usage = {"usage": self.usage(streams, num_output) if options.continuous_usage_stats else None} if options.include_usage else {}
                    yield data(writer.whole([one], **usage))
            if options.include_usage:
                yield data(writer.whole([], usage=self.usage(streams, num_output)))

        def whole():
            choices = [choice(i, j, answer.text, answer.token_ids, answer.logprobs, answer.finish_reason)
                       for i, stream in enumerate(streams) for j, answer in enumerate(stream.answers)]
            return writer.whole(choices, usage=self.usage(streams, num_output))

        return await self.answer(request, form, streams, request_id, events, whole)

    async def response(self, form: ResponsesRequest, request: Request) -> Response:
        "`POST /v1/responses`"
        model, tenant = self.check(form), request.state.tenant
        try:
            run = await self.responses.create(form, tenant, model, self.new_id(request, "resp_"), self.limit, **self.options(request, form))
        except ValueError as error:
            raise api_error(error, "input") from error

        def end():
            self.note(request, run.id, [run.stream])
            if not form.background:
                run.task.cancel()
                run.events.clear()

        if form.stream:
            return EventStream(run.follow(), end)
        if form.background:
            return json_of(run.response)
        try:
            return json_of(await run.finished())
        finally:
            end()

    async def retrieve(self, request: Request, response_id: str, stream: bool, starting_after: int) -> Response:
        "`GET /v1/responses/{id}`"
        run = self.responses.store.get(request.state.tenant, response_id)
        if not stream:
            return json_of(run.response)
        if not (run.form.background and run.form.stream):
            raise ApiError(400, "only background responses that were created with stream=true can be streamed again", param="stream")
        return EventStream(run.follow(starting_after), lambda: None)

    async def tokenize(self, form: TokenizeRequest) -> dict:
        "`POST /tokenize`"
        self.check(form)
        try:
            if form.messages is None:
                ids = await self.engine.run(encode, self.tokenizer, form.prompt, form.add_special_tokens)
            else:
                ids = await self.engine.run(encode_chat, self.tokenizer, form.messages, None, form.add_generation_prompt)
        except ValueError as error:
            raise api_error(error, "prompt" if form.messages is None else "messages") from error
        texts = self.tokenizer.convert_ids_to_tokens(ids) if form.return_token_strs else None
        return {"count": len(ids), "max_model_len": self.engine.engine.max_model_len, "tokens": ids, "token_strs": texts}

    async def detokenize(self, form: DetokenizeRequest) -> dict:
        "`POST /detokenize`"
        self.check(form)
        for token_id in form.tokens:
            if token_id >= len(self.tokenizer):
                raise ApiError(400, f"tokens: ids go from 0 to {len(self.tokenizer) - 1}, got {token_id}", param="tokens")
        return {"prompt": await self.engine.run(self.tokenizer.decode, form.tokens)}

    def self_check(self) -> dict:
        "Let the engine check its memory; on its own thread. Raises RuntimeError if something leaks."
        engine = self.engine.engine
        engine.check()
        return {"ok": True, "num_requests": len(engine.requests), "kv_cache_usage": engine.scheduler.cache.usage,
                "num_running": len(engine.scheduler.running), "num_waiting": len(engine.scheduler.waiting)}

    def model(self, name: str) -> Model:
        "Describe a model. Raises ApiError if it is not ours."
        if name not in self.args.served_model_names:
            raise ApiError(404, f"there is no model {name!r:.80}", param="model", code="model_not_found")
        return Model(id=name, object="model", created=self.started_s, owned_by="nanollm", max_model_len=self.engine.engine.max_model_len)

# %%
class ErrorBody(BaseModel):
    "What every error looks like."
    error: dict[str, str | None]


def answer_with(read: Callable[[Any], ApiError]) -> Callable:
    "Return a handler that answers with the error that `read` makes of an exception."
    async def handle(request, error):
        return error_response(read(error))

    return handle


ERRORS = {kind: answer_with(read) for kind, read in {
    ApiError: lambda error: error,
    RequestValidationError: api_error,
    HTTPException: lambda error: ApiError(error.status_code, str(error.detail), headers=error.headers),
    Exception: lambda error: server_error(),
}.items()}


class FaultsForm(BaseModel):
    "`POST /debug/faults`; what is not given is off."
    preempt_every: Annotated[int, Field(ge=0)] = 0
    fail_forwards: Annotated[int, Field(ge=0)] = 0
    fail_request: str = ""
    step_delay_s: Annotated[float, Field(ge=0, le=60)] = 0.0


def create_app(api: Api) -> FastAPI:
    "Put the routes together."
    @contextlib.asynccontextmanager
    async def lifespan(app):
        await api.engine.start()
        yield
        await api.engine.stop()

    app = FastAPI(title="nanollm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    router = APIRouter(route_class=JsonRoute, responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})

    @router.post("/v1/chat/completions", responses={200: {"model": ChatCompletion}})
    async def chat(form: ChatRequest, request: Request):
        return await unless_gone(request.receive, api.chat(form, request))

    @router.post("/v1/completions", responses={200: {"model": Completion}})
    async def completions(form: CompletionRequest, request: Request):
        return await unless_gone(request.receive, api.completions(form, request))

    @router.post("/v1/responses")
    async def responses(form: ResponsesRequest, request: Request):
        return await unless_gone(request.receive, api.response(form, request))

    @router.post("/v1/responses/input_tokens")
    async def input_tokens(form: ResponsesRequest, request: Request):
        api.check(form)
        try:
            _, prompt_ids = await unless_gone(request.receive, api.responses.prompt(form, request.state.tenant))
        except ValueError as error:
            raise api_error(error, "input") from error
        return {"object": "response.input_tokens", "input_tokens": len(prompt_ids)}

    @router.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str, request: Request, stream: bool = False, starting_after: Annotated[int, Query(ge=-1, lt=2**31)] = -1):
        return await api.retrieve(request, response_id, stream, starting_after)

    @router.delete("/v1/responses/{response_id}")
    async def delete(response_id: str, request: Request):
        return await api.responses.delete(request.state.tenant, response_id)

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str, request: Request):
        return json_of(await api.responses.cancel(request.state.tenant, response_id))

    @router.get("/v1/responses/{response_id}/input_items")
    async def input_items(response_id: str, request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20,
                          order: Literal["asc", "desc"] = "desc", after: str | None = None):
        return json_of(api.responses.input_items(request.state.tenant, response_id, limit, order, after))

    @router.post("/tokenize")
    async def tokenize(form: TokenizeRequest): return await api.tokenize(form)

    @router.post("/detokenize")
    async def detokenize(form: DetokenizeRequest): return await api.detokenize(form)

    @router.get("/v1/models")
    async def models(): return {"object": "list", "data": [api.model(name).to_dict() for name in api.args.served_model_names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str): return api.model(name).to_dict()

    @router.get("/health")
    async def health():
        if api.engine.dead or api.engine.draining:
            raise overloaded("the engine has failed" if api.engine.dead else "the server is shutting down")
        return {"status": "ok"}

    @router.get("/version")
    async def version(): return {"version": __version__}

    @router.get("/metrics")
    async def metrics(): return Response(api.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if api.traces is not None:
        @router.get("/v1/requests/{request_id}/trace")
        async def trace(request_id: str):
            if (story := api.traces.get(request_id)) is None:
                raise ApiError(404, f"there is no trace of request {request_id!r:.80}", param="request_id")
            return {"request_id": request_id, "events": list(story)}
    if api.faults is not None:
        @router.post("/debug/faults")
        async def faults(form: FaultsForm): return await api.engine.call(lambda: api.faults.set(**form.model_dump()))

        @router.get("/debug/check")
        async def check(): return await api.engine.call(api.self_check)

    app.include_router(router)
    for kind, read in ERRORS.items():
        app.add_exception_handler(kind, read)
    return app
