"""The book on LLM serving that is also the engine."""

__version__ = "0.1.0"

from importlib import import_module

# The public names and the modules that hold them. They are imported on first use: torch takes
# seconds, and `nanollm-generate --help` should not.
_PUBLIC = {
    "LLM": "llm",
    "EngineArgs": "args",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Engine": "engine",
    "ModelError": "model",
    "load_model": "model",
    "eos_token_ids": "model",
    "load_tokenizer": "text",
    "encode": "text",
    "encode_chat": "chat",
    "TextStream": "text",
    "SamplingParams": "sampling",
    "StructuredOutputsParams": "structured_output",
    "LoRARequest": "lora",
    "Sampler": "sampling",
    "generate_cached": "kv_cache",
    "generate_batch": "static_batching",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_PUBLIC})
