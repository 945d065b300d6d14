"""Tokenizers built in memory, one for each family."""

import pytest
from chat_templates import CALLERS, FAMILIES, TOKENS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanollm.model import ModelError
from nanollm.text import byte_tokenizer, load_tokenizer

LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)


def llama_like(kind):
    "A small SentencePiece-like tokenizer: `prepend` as Llama 2 has it, or a Metaspace scheme."
    words = [*"▁abhelowrd\ufffdé日", "▁▁", "▁h", "▁w", "▁\ufffd", "he", "ll"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *byte_pieces, *words]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("h", "e"), ("l", "l"), ("▁", "h"), ("▁", "w"), ("▁", "▁")]
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True,
                                unk_token="<unk>"))
    if kind == "prepend":
        fast.normalizer = normalizers.Sequence([
            normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    if kind == "always":
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=kind),
                 decoders.Fuse()]
    else:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                 decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False)
                             for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", chat_template=LLAMA2_TEMPLATE)


def unigram():
    "A small SentencePiece Unigram tokenizer without byte tokens, as T5; <unk> is special."
    words = ["▁The", "▁model", "▁returns", "▁the", "▁token", "token", "▁", "▁hello", "▁world"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((word, -2.0) for word in words),
              *((char, -5.0) for char in "abcdefghijklmnopqrstuvwxyz🚀é[]/INST")]
    fast = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast.decoder = decoders.Metaspace(prepend_scheme="always")
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False)
                             for name in ("<unk>", "</s>")])
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>",
                                   chat_template=template)


def wordpiece():
    "A small BERT-like tokenizer: its decoder joins, and cleans up before punctuation."
    words = ["[UNK]", "[CLS]", "[SEP]", "hello", "##ing", "##s", "do", "n", "'", "t", ".", ",",
             "not", "we"]
    vocab = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.decoder = decoders.WordPiece()
    fast.add_special_tokens(["[CLS]", "[SEP]", "[UNK]"])
    return PreTrainedTokenizerFast(tokenizer_object=fast)


def smollm2():
    try:
        return load_tokenizer(None, local_files_only=True, progress=False)
    except ModelError as error:
        pytest.skip(f"no default model here: {error}")


BUILD = {
    "byte": byte_tokenizer,
    "prepend": lambda: llama_like("prepend"),
    "first": lambda: llama_like("first"),
    "always": lambda: llama_like("always"),
    "unigram": unigram,
    "wordpiece": wordpiece,
    "smollm2": smollm2,
}
BUILT = {}


def get(name):
    if name not in BUILT:
        BUILT[name] = BUILD[name]()
    return BUILT[name]


def full(tokenizer, ids, skip=True):
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def special_ids(tokenizer, ids):
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in ids if i in special]


def family(name):
    "A byte tokenizer with the chat template and the control tokens of a model family."
    tokenizer = byte_tokenizer()
    special, plain = TOKENS.get(name, ((), ()))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)
                          for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)
                          for token in plain])
    if special:
        tokenizer.bos_token, tokenizer.eos_token = special[0], special[-1]
    tokenizer.chat_template = (FAMILIES | CALLERS)[name]
    return tokenizer
