"""Compiled functions: found again, compiled anew, and refused with a reason."""

import functools
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanollm import native
from nanollm.native import DEFINES, EXP, FLAGS, PRELUDE, NativeError, build, load, prototypes

COPY = """
void copy(const real *x, real *y, long n) {
    for (long i = 0; i < n; i++) y[i] = store(load(x[i]));
}
"""
ROUND = """
void narrow(const float *x, uint16_t *y, long n) {
    for (long i = 0; i < n; i++) y[i] = to_bf16(x[i]);
}
"""
EXP_ALL = EXP + """
void exp_all(const float *x, float *y, long n) {
    for (long i = 0; i < n; i++) y[i] = exp_of(x[i]);
}
"""
CACHED = native.compiler, native.cpu, native.load, native.scratch


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    "A cache of its own for each test, and nothing remembered from another."
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path))
    forget()
    yield tmp_path / "native"
    forget()


def forget():
    for function in CACHED:
        function.cache_clear()


def libraries(folder):
    return sorted(path.name for path in folder.glob("*"))


def count_compilations(monkeypatch):
    calls, own = [], native.compile_into
    monkeypatch.setattr(native, "compile_into", lambda *a: calls.append(a) or own(*a))
    return calls


def fake_compiler(tmp_path, monkeypatch, text):
    "Put a script in the place of the compiler."
    path = tmp_path / "fakecc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return path


def test_compiled_once_and_found_again(folder, monkeypatch):
    calls = count_compilations(monkeypatch)
    first = build(PRELUDE + COPY.replace("real", "float"))
    assert build(PRELUDE + COPY.replace("real", "float")) == first and len(calls) == 1
    assert libraries(folder) == [first.name] # and nothing temporary beside it


def test_the_key_is_made_of_text_flags_compiler_and_cpu(folder, monkeypatch):
    text = "void f(long n) {}"
    names = {build(text).name, build(text + "\n").name, build(text, (*FLAGS, "-DX")).name}
    monkeypatch.setattr(native, "cpu", lambda: "another CPU")
    names.add(build(text).name)
    path, _ = native.compiler()
    monkeypatch.setattr(native, "compiler", lambda: (path, "version 99"))
    names.add(build(text).name)
    assert len(names) == 5 and libraries(folder) == sorted(names)


def test_flags_reach_the_compiler():
    text = "void f(float *x) { x[0] = VALUE; }"
    found = torch.zeros(1)
    for value in (2, 3):
        load(text, torch.float32, (*FLAGS, f"-DVALUE={value}")).f(found.data_ptr())
        assert found.item() == value


def test_both_dtypes_of_one_text_live_side_by_side(folder):
    for dtype in DEFINES:
        x = torch.tensor([1.5, -0.0, math.inf, math.nan, 1e-30]).to(dtype)
        y = torch.zeros(5, dtype=dtype)
        load(COPY, dtype).copy(x.data_ptr(), y.data_ptr(), 5)
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
    assert len(libraries(folder)) == 2


@pytest.mark.parametrize("flags", [FLAGS, ("-O1", "-shared", "-fPIC")], ids=["own", "plain"])
def test_rounding_is_that_of_torch(flags):
    bits = torch.randint(0, 2**32, (20_000,), generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0x7f800000, 0xff800000, 0x7f7fffff, 0x7fc00000, 0x7f800001,
                            0xffffffff, 0, 0x80000000, 1, 0x3f808000, 0x3f818000])
    bits = torch.cat([bits, special])
    x = (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)
    y = torch.zeros(len(x), dtype=torch.bfloat16)
    load(ROUND, torch.float32, flags).narrow(x.data_ptr(), y.data_ptr(), len(x))
    expected = x.bfloat16()
    assert torch.equal(y.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(y[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_prototypes():
    found = prototypes("static void hidden(int x) {}\nvoid a(const real *x, long n,\n"
                       "  float f) {\nvoid b(int i, const long *slots) {\n  void c(long n);")
    assert list(found) == ["a", "b"]
    assert [kind.__name__ for kind in found["a"]] == ["c_void_p", "c_long", "c_float"]
    assert [kind.__name__ for kind in found["b"]] == ["c_int", "c_void_p"]


def test_wrong_arguments_are_errors_and_no_crash():
    functions = load(COPY)
    with pytest.raises(TypeError):
        functions.copy(1, 2)
    with pytest.raises(Exception, match="argument 3"):
        functions.copy(0, 0, 0.5)


def test_a_dtype_that_is_not_there():
    with pytest.raises(NativeError, match="float16"):
        load(COPY, torch.float16)


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NativeError, match="no C compiler"):
        load(COPY)


def test_a_compiler_is_found_after_one_was_missing(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("CC", raising=False)
        with pytest.raises(NativeError):
            load(COPY)
    assert load(COPY).copy


def test_a_compiler_that_does_not_run(tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, "exit 0").write_bytes(b"\x7fELF no program")
    with pytest.raises(NativeError, match="does not run"):
        load(COPY)


def test_a_compiler_that_fails_says_why(tmp_path, monkeypatch, folder):
    fake_compiler(tmp_path, monkeypatch, 'echo "out of luck" >&2; [ "$1" = --version ]')
    with pytest.raises(NativeError, match="out of luck"):
        load(COPY)
    assert libraries(folder) == []


def test_a_compiler_that_writes_nothing(tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(NativeError):
        load(COPY)


def test_a_file_that_is_no_library(tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch,
                  'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo no > "$2"; shift; done')
    with pytest.raises(NativeError, match="cannot be loaded"):
        load(COPY)


def test_a_text_with_an_error(folder):
    with pytest.raises(NativeError, match="error"):
        load("void f(long n) { n = ; }")
    assert libraries(folder) == []


@pytest.mark.parametrize("spoil", ["a file is in the way", "it cannot be written"])
def test_a_cache_that_cannot_be_written(folder, monkeypatch, caplog, spoil):
    if spoil == "a file is in the way":
        folder.write_text("")
    else: # root may write everywhere: take the right away where it is asked
        own = native.compile_into

        def refuse(where, *args):
            if Path(where) == folder:
                raise PermissionError(13, "Permission denied", str(where))
            return own(where, *args)
        monkeypatch.setattr(native, "compile_into", refuse)
    with caplog.at_level(logging.WARNING):
        path = build("void f(float *x) { x[0] = 7; }")
        x = torch.zeros(1)
        load("void f(float *x) { x[0] = 7; }").f(x.data_ptr())
    assert x.item() == 7 and path.exists() and folder not in path.parents
    assert "not kept" in caplog.text
    place = Path(native.scratch().name)
    native.scratch().cleanup() # as at the end of the process
    assert not place.exists()


def test_no_room_anywhere(folder, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(native, "compile_into", refuse)
    with pytest.raises(NativeError, match="No space left"):
        build("void f(long n) {}")


SLOW = """
import sys, time, torch
from nanollm import native
own = native.os.replace
native.os.replace = lambda *a: (print("compiled", flush=True), sys.stdin.readline(), own(*a))
x = torch.zeros(1)
native.load("void f(float *x) { x[0] = 5; }").f(x.data_ptr())
print(x.item(), flush=True)
"""


def test_two_processes_at_once(folder):
    root = str(Path(__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    start = functools.partial(subprocess.Popen, [sys.executable, "-c", SLOW], env=env,
                              text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    both = [start(), start()]
    assert [process.stdout.readline() for process in both] == ["compiled\n"] * 2
    for process in both: # only now does either get its name
        out, _ = process.communicate("\n", timeout=120)
        assert out == "5.0\n" and process.returncode == 0
    assert len(libraries(folder)) == 1


@pytest.mark.parametrize("flags", [FLAGS, tuple(f for f in FLAGS if f != "-march=native")])
def test_the_exponential_at_its_ends(flags):
    "NaN stays, what is too small is next to nothing, and nothing becomes infinite."
    x = torch.tensor([math.nan, -math.inf, -1e30, -87.0, -0.0, 0.0, 1.0, 88.0, 1e30, math.inf])
    y = torch.empty_like(x)
    load(EXP_ALL, flags=flags).exp_all(x.data_ptr(), y.data_ptr(), len(x))
    torch.testing.assert_close(y, x.clamp(-87, 88).exp(), rtol=2e-7, atol=0, equal_nan=True)
