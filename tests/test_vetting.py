"""A grammar that hangs or crashes its compiler is refused, and the next one is served."""

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import psutil
import pytest

llguidance = pytest.importorskip("llguidance")

from nanollm import vetting  # noqa: E402
from nanollm.vetting import Vetter, compile_grammar, on_large_stack, small_tokenizer  # noqa: E402

LLMatcher = llguidance.LLMatcher


def schema(**keywords):
    text = json.dumps(keywords)
    return LLMatcher.grammar_from_json_schema(text, overrides={"lenient": False})


def lark(*rules):
    return LLMatcher.grammar_from_lark("\n".join(rules))


def chain_of_references(length):
    defs = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    last = {f"d{length}": {"type": "integer"}}
    return schema(**{"$defs": defs | last, "$ref": "#/$defs/d0"})


def chain_of_rules(length):
    rules = [f'r{i}: "a" r{i + 1}' for i in range(length)]
    return lark("start: r0", *rules, f'r{length}: "b"')


HEALTHY = schema(type="object", properties={"city": {"type": "string"}}, required=["city"])
BOMB = schema(type="integer", multipleOf=9999991)
SLOW = "took more than 0.3 s of processor time"
DANGERS = {
    "multipleOf": (lambda: BOMB, SLOW),
    "patternProperties": (lambda: schema(type="object", patternProperties={
        f"^a{i}x": {"type": "null"} for i in range(1000)}), SLOW),
    "optional properties": (lambda: schema(type="object", properties={
        f"a{i}": {"type": "null"} for i in range(10_000)}), SLOW),
    "repeated repetition": (lambda: LLMatcher.grammar_from_regex("(a{1000}){1000}"), SLOW),
    "a bomb within Lark": (
        lambda: lark('start: %json {"type": "integer", "multipleOf": 9999991}'), SLOW),
    "chained rules": (lambda: chain_of_rules(60_000), None), # time or the stack ends it
    "chained references": (lambda: chain_of_references(40_000), None),
    "a reference to itself": (lambda: schema(**{"$ref": "#"}), "nothing can satisfy it"),
    "a circle": (lambda: schema(**{"$defs": {"a": {"$ref": "#/$defs/b"},
                                             "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
                 "nothing can satisfy it"),
    "deep parentheses": (lambda: LLMatcher.grammar_from_regex("(" * 9999 + "a" + ")" * 9999),
                         None),
    "no grammar": (lambda: "nothing", None),
    "half a character": (lambda: '{"grammars": [{"lark_grammar": "start: \ud800"}]}', None),
}


@pytest.fixture(scope="module")
def vetter():
    with closing(Vetter({"<think>": 300}, timeout_s=60, max_cpu_s=0.3)) as one:
        yield one


@pytest.mark.parametrize("name", DANGERS)
def test_a_danger_is_refused_and_the_next_grammar_is_served(vetter, name):
    make, expected = DANGERS[name]
    fault = vetter.check(make())
    assert fault and fault.count("\n") == 0 and len(fault) <= vetting.MAX_REASON
    assert fault == expected or expected is None
    assert vetter.check(HEALTHY) is None


def test_a_stack_that_overflows_is_a_crash_that_is_told(monkeypatch):
    monkeypatch.setattr(vetting, "STACK_BYTES", 2**20)
    with closing(Vetter()) as one:
        for make in (chain_of_rules, chain_of_references):
            assert one.check(make(3000)) == "crashed the compiler"
            assert one.check(make(30)) is None


def with_compiler(function, **options):
    "A vetter whose children compile grammars by another function."
    one = Vetter(**options)
    one._source += f"\n{inspect.getsource(function)}\ncompile_grammar = {function.__name__}"
    return closing(one)


def sleepy(vocab, grammar):
    import time
    time.sleep(60)


def noisy(vocab, grammar):
    os.write(1, b'"noise"\n')
    os.write(2, b"noise\n")
    print('"noise"', flush=True)
    if "bad" in grammar:
        raise ValueError("a fault\nand its details")


def fragile(vocab, grammar):
    if grammar == "raises":
        raise KeyError(grammar)
    if grammar == "aborts":
        os.abort()
    if grammar == "exits":
        os._exit(3)
    if grammar == "eats memory":
        print(len(bytearray(2**34)))


def test_the_limit_on_time_holds_where_no_processor_is_used():
    with with_compiler(sleepy, timeout_s=0.2) as one:
        assert one.check(HEALTHY) == "took longer than 0.2 s"


def test_what_the_library_prints_is_no_answer():
    with with_compiler(noisy) as one:
        found = [one.check(text) for text in ("good", "bad", "good")]
    assert found == [None, "a fault\nand its details", None]


@pytest.mark.parametrize("how", ["raises", "aborts", "exits", "eats memory"])
def test_however_a_copy_ends_it_is_an_answer(how):
    with with_compiler(fragile) as one:
        assert one.check(how) == "crashed the compiler"
        assert one.check("good") is None


def test_two_checks_at_once(vetter):
    with closing(Vetter(timeout_s=60, max_cpu_s=1)) as one, ThreadPoolExecutor(8) as pool:
        assert one.check(HEALTHY) is None
        hang = pool.submit(one.check, BOMB)
        while one._children.qsize() == vetting.MAX_CHILDREN:
            time.sleep(0.001)
        healthy = [pool.submit(one.check, HEALTHY) for _ in range(5)]
        assert [each.result() for each in healthy] == [None] * 5
        assert not hang.done()
        assert hang.result() == "took more than 1 s of processor time"


def test_many_threads_share_two_children(vetter):
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(vetter.check, [HEALTHY, "nothing", HEALTHY] * 20))
    assert [fault is None for fault in found] == [True, False, True] * 20
    assert vetter._children.qsize() == vetting.MAX_CHILDREN


def test_added_tokens_are_known_by_name_and_id(vetter):
    assert vetter.check(lark('start: <[300]> "a" <think>')) is None
    assert "9999" in vetter.check(lark('start: <[9999]> "a"'))
    assert "unknown special token" in vetter.check(lark('start: <nothing> "a"'))


def test_the_fault_names_the_keyword(vetter):
    for word, value in {"not": {}, "contains": {}, "dependentRequired": {"a": ["b"]}}.items():
        assert word in vetter.check(schema(**{word: value}))


def test_a_child_that_was_killed_is_replaced(vetter):
    assert vetter.check(HEALTHY) is None
    [*_, child] = vetter._children.queue
    child.kill()
    assert vetter.check(HEALTHY) is None


def test_a_child_that_is_idle_ends_and_is_replaced(monkeypatch):
    monkeypatch.setattr(vetting, "MAX_IDLE_S", 1)
    with closing(Vetter()) as one:
        assert one.check(HEALTHY) is None
        [*_, child] = one._children.queue
        assert child.wait(timeout=60) == -signal.SIGALRM
        assert one.check(HEALTHY) is None
        assert one._children.queue[-1] is not child


def test_a_child_that_is_killed_at_work_is_asked_again():
    with closing(Vetter(timeout_s=60, max_cpu_s=0.5)) as one, ThreadPoolExecutor(1) as pool:
        assert one.check(HEALTHY) is None
        [*_, child] = one._children.queue
        hang = pool.submit(one.check, BOMB)
        while not copy_at_work(psutil.Process(child.pid)):
            time.sleep(0.01)
        child.kill()
        assert hang.result() == "took more than 0.5 s of processor time"


def test_children_that_cannot_start_are_an_error_and_no_verdict():
    with closing(Vetter()) as one:
        one._source = "raise SystemExit(7)"
        for _ in range(3):
            with pytest.raises(RuntimeError, match="ended twice .7."):
                one.check(HEALTHY)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(vetting, "find_spec", lambda name: None)
    with closing(Vetter()) as one, pytest.raises(ValueError, match="pip install"):
        one.check(HEALTHY)


def test_nothing_is_left_after_close():
    one = Vetter()
    files = psutil.Process().num_fds()
    assert one.check(HEALTHY) is None and one.check("nothing")
    [*_, child] = one._children.queue
    one.close()
    one.close()
    assert child.poll() == 0 and psutil.Process().num_fds() == files
    with pytest.raises(RuntimeError, match="closed"):
        one.check(HEALTHY)


PARENT = """
from nanollm.vetting import Vetter
vetter = Vetter()
assert vetter.check({healthy!r}) is None
print(vetter._children.queue[-1].pid, flush=True)
{then}
"""


def copy_at_work(child):
    "The copy of a child that tries a grammar for long, or None."
    for copy in child.children():
        with suppress(psutil.NoSuchProcess):
            if copy.cpu_times().user > 0.05:
                return copy


@pytest.mark.parametrize("busy", [True, False])
def test_children_end_with_a_parent_that_is_killed(busy):
    then = f"while True: vetter.check({BOMB!r})" if busy else "input()"
    program = PARENT.format(healthy=HEALTHY, then=then)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                              stdin=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    while busy and not copy_at_work(child):
        time.sleep(0.01)
    family = [child, *child.children()]
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_the_childs_timers_work_where_the_parent_ignores_and_blocks_signals():
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    try:
        with closing(Vetter(timeout_s=60, max_cpu_s=0.2)) as one:
            assert one.check(BOMB) == "took more than 0.2 s of processor time"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        signal.signal(signal.SIGPROF, before)


def test_modules_of_the_folder_are_not_the_childs(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with closing(Vetter()) as one:
        assert one.check(HEALTHY) is None


def test_what_passes_compiles_here_too(vetter):
    tokenizer = small_tokenizer({"<think>": 300})
    for grammar in (HEALTHY, chain_of_references(5000), chain_of_rules(5000)):
        assert vetter.check(grammar) is None
        assert not compile_grammar(tokenizer, grammar).is_error()


def test_a_large_stack_is_nobody_elses():
    before = threading.stack_size()
    with ThreadPoolExecutor(8) as pool:
        grammars = [chain_of_references(5000)] * 16
        tokenizer = small_tokenizer({})
        work = [pool.submit(compile_grammar, tokenizer, grammar) for grammar in grammars]
        assert not any(each.result().is_error() for each in work)
    assert threading.stack_size() == before
    with pytest.raises(ZeroDivisionError):
        on_large_stack(lambda: 1 // 0)
    assert os.getpriority(os.PRIO_PROCESS, 0) == os.getpriority(os.PRIO_PROCESS, os.getpid())
