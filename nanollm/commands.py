"""Serve a model, and measure a server, from a terminal: `nanollm-serve` and `nanollm-bench`."""

# %%
import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any

import typer

from .cli import EngineOptions, ModelOptions, UsageError, leave, load, print_version

_server = partial(typer.Option, rich_help_panel="Server")
logger = logging.getLogger("nanollm")
DEFAULT_NAME = "SmolLM2-135M-Instruct"

# %%
@dataclass(frozen=True)
class ServeOptions(EngineOptions, ModelOptions):
    "Serve a model over HTTP, with the API of OpenAI: /v1/chat/completions, /v1/completions, /v1/responses and more."
    host: Annotated[str, _server(metavar="ADDRESS", help="Where to listen; 0.0.0.0: everywhere.")] = "127.0.0.1"
    port: Annotated[int, _server(min=0, max=65535, metavar="N", help="0: a free one.")] = 8000
    served_model_name: Annotated[list[str] | None, _server(metavar="NAME", show_default="the model's", help="What clients call the model. May be repeated.")] = None
    api_key: Annotated[list[str] | None, _server(metavar="KEY", envvar="NANOLLM_API_KEY", show_envvar=True, help="Serve only those who have it. May be repeated.")] = None
    max_queued_requests: Annotated[int, _server(min=0, metavar="N", help="Answers that may wait; beyond that: 503.")] = 1024
    max_output_tokens: Annotated[int | None, _server(min=1, metavar="N", show_default="the context", help="Longest answer that clients may ask for.")] = None
    max_body_bytes: Annotated[int, _server(min=1, metavar="N", help="Largest body of a request.")] = 4 * 2**20
    max_stored_responses: Annotated[int, _server(min=1, metavar="N", help="Responses kept for retrieval and continuation.")] = 1024
    shutdown_timeout: Annotated[float, _server(min=0, metavar="SECONDS", help="How long open requests may go on after SIGTERM.")] = 30.0
    scheduling_policy: Annotated[str, _server(metavar="POLICY", help="fcfs, or priority (the field of a request; lower goes first).")] = "fcfs"
    log_requests: Annotated[bool, _server(help="Log a line for each request.")] = True
    enable_request_traces: Annotated[bool, _server("--enable-request-traces", help="GET /v1/requests/ID/trace: why was this slow?")] = False
    enable_fault_injection: Annotated[bool, _server("--enable-fault-injection", help="For tests only: POST /debug/faults, GET /debug/check.")] = False
    quiet: Annotated[bool, _server("--quiet", help="No progress on stderr, and of the log warnings only.")] = False
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, expose_value=False, help="Show the version.")] = False


SERVE_EXAMPLES = """[bold]Examples[/bold]
nanollm-serve
nanollm-serve --model Qwen/Qwen3-1.7B --served-model-name Qwen3-1.7B --port 8000
nanollm-serve --host 0.0.0.0 --api-key secret --max-num-seqs 32
curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'

Ctrl-C or SIGTERM lets open requests finish; a second one ends at once.
Exit codes: 0 everything promised was delivered, 1 not so, 2 bad usage."""
serve_app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
serve_app.command(epilog=SERVE_EXAMPLES)(ServeOptions)

# %%
def model_names(options: ServeOptions) -> tuple[str, ...]:
    "Return what clients may call the model: as asked, or its own name, without the way to its directory."
    if options.served_model_name:
        return tuple(options.served_model_name)
    if options.model is None:
        return (DEFAULT_NAME,)
    is_path = os.path.exists(options.model)
    return (os.path.basename(os.path.normpath(options.model)),) if is_path else (options.model,)


def bind(host: str, port: int) -> socket.socket:
    "Reserve the address, before a model is loaded in vain. Raises UsageError if that fails."
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return found

# %%
async def serve_on(sock: socket.socket, engine: Any, tokenizer: Any, args: Any) -> bool: # whether everything promised was delivered
    "Serve until a signal comes, and to the end of what is open then; a second signal ends the process at once."
    import uvicorn

    from .async_engine import AsyncEngine
    from .server import Api, Gate, create_app
    done, delivered = asyncio.Event(), True
    api = Api(AsyncEngine(engine, tokenizer, args.max_queued_requests, on_death=done.set), args)
    config = uvicorn.Config(Gate(create_app(api), args), http="h11", ws="none", lifespan="on", log_config=None, access_log=False,
                            server_header=False, h11_max_incomplete_event_size=2**16, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext # the signals are ours

    def stop(number):
        if done.is_set():
            logger.warning("second signal: ending at once")
            os._exit(128 + number)
        logger.info("signal %d: no new requests; %d answers have %g s to finish", number, api.engine.num_unfinished, args.shutdown_timeout_s)
        done.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    serving = asyncio.create_task(server.serve([sock]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    host, port = sock.getsockname()[:2]
    logger.info("serving %s on http://%s:%d (context %d tokens, KV cache %d tokens, %d answers at a time)", ", ".join(args.served_model_names),
                f"[{host}]" if ":" in host else host, port, engine.max_model_len, engine.scheduler.cache.max_tokens, engine.scheduler.max_num_seqs)
    waiting = asyncio.create_task(done.wait())
    await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        delivered = await api.engine.drain(0 if api.engine.dead else args.shutdown_timeout_s) and not api.engine.dead
        server.should_exit = True
        await serving
    logger.info("ended, %s", "everything promised was delivered" if delivered else "answers were cut off")
    return delivered

# %%
def serve(options: ServeOptions) -> int: # exit code
    "Load the model and serve it. Raises UsageError for anything that is wrong with the options."
    logging.basicConfig(format="%(levelname)s %(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.WARNING if options.quiet else logging.INFO)
    sock = bind(options.host, options.port)
    names = model_names(options)
    try:
        llm = load(options, scheduling_policy=options.scheduling_policy)
        from .server import ServerArgs
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    same = {field.name: getattr(options, field.name) for field in fields(ServerArgs) if hasattr(options, field.name)}
    args = ServerArgs(names, tuple(options.api_key or ()), shutdown_timeout_s=options.shutdown_timeout, **same)
    host = sock.getsockname()[0]
    if not options.api_key and not host.startswith("127.") and host != "::1":
        logger.warning("anybody who reaches %s can use this server: think of --api-key", host)
    return 0 if asyncio.run(serve_on(sock, llm.engine, llm.tokenizer, args)) else 1


def serve_main(arguments: Sequence[str] | None = None) -> None:
    "Run `nanollm-serve` with `arguments`, by default those of the process."
    leave("nanollm-serve", serve_app, serve, arguments)
