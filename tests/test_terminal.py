"""Answers on a terminal: their order, what goes to stdout and what to stderr."""

import json
from types import SimpleNamespace

import pytest

from nanollm.sampling import SamplingParams
from nanollm.serve.commands import GenerateOptions
from nanollm.serve.terminal import Job, Result, generate_all, print_stats, show

STATS = dict(
    prompt_tokens=3,
    cached_tokens=0,
    new_tokens=2,
    ttft_s=0.25,
    tpot_s=0.5,
    e2e_s=0.75,
    tokens_per_s=2.67,
)


def result(prompt="a", index=0, text="xy", reason="stop", stats=STATS):
    return Result(prompt, index, text, [1, 2], reason, None, None, None, stats)


class Interleaved:
    "Two prompts, the second with two answers, whose pieces come in a wild order."

    def stream(self, prompts, params):
        timing = SimpleNamespace(ttft_s=1, tpot_s=1, e2e_s=2, tokens_per_s=1, num_tokens=2)
        answers = {
            place: SimpleNamespace(
                request=SimpleNamespace(
                    index=place[1], timing=timing, num_prompt_tokens=1, num_cached_tokens=0
                ),
                text="",
                token_ids=[1, 2],
                finish_reason=None,
                stop_reason=None,
                error=None,
                logprobs=[],
            )
            for place in ((0, 0), (1, 0), (1, 1))
        }
        for place, piece, reason in (
            ((1, 1), "c1", None),
            ((1, 0), "b1", "stop"),
            ((0, 0), "a1", None),
            ((1, 1), "c2", "stop"),
            ((0, 0), "a2", "stop"),
        ):
            answer = answers[place]
            answer.text += piece
            answer.finish_reason = reason
            yield place[0], answer, piece


def test_pieces_come_in_the_order_of_the_prompts():
    jobs = [Job("a", [1], SamplingParams()), Job("b", [2], SamplingParams(n=2))]
    items = list(generate_all(Interleaved(), jobs))
    assert [item if isinstance(item, str) else item.text for item in items] == [
        "a1",
        "a2",
        "a1a2",
        "b1",
        "b1",
        "c1",
        "c2",
        "c1c2",
    ]
    assert [(item.prompt, item.index) for item in items if isinstance(item, Result)] == [
        ("a", 0),
        ("b", 0),
        ("b", 1),
    ]


@pytest.mark.parametrize(
    "options, out", [({}, "xy\n"), ({"stream": False}, "xy\n"), ({"quiet": True}, "xy\n")]
)
def test_text_goes_to_stdout(capsys, options, out):
    assert show(["x", "y", result()], GenerateOptions(**options), ["a"]) == [result()]
    assert capsys.readouterr() == (out, "")


def test_headings_and_notes_go_to_stderr(capsys):
    items = [result(reason="length"), result("b")]
    show(items, GenerateOptions(stream=False), ["a", "b"])
    out, err = capsys.readouterr()
    assert out == "xy\nxy\n"
    assert err.splitlines() == [
        "--- 1 of 2: a",
        "(cut after 2 tokens; see --max-new-tokens)",
        "--- 2 of 2: b",
    ]
    show(items, GenerateOptions(stream=False, quiet=True), ["a", "b"])
    assert capsys.readouterr().err == ""


def test_json_is_a_line_per_answer(capsys):
    for more, stats in (({}, None), ({"show_stats": True}, STATS)):
        show(["x", "y", result()], GenerateOptions(json=True, **more), ["a"])
        found = json.loads(capsys.readouterr().out)
        assert (found["text"], found["stats"]) == ("xy", stats)


def test_an_interrupted_line_is_ended(capsys):
    def broken():
        yield "half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show(broken(), GenerateOptions(), ["a"])
    assert capsys.readouterr().out == "half\n"


def test_statistics_of_several_answers_have_a_sum(capsys):
    one_token = STATS | {"tpot_s": None, "new_tokens": 1, "e2e_s": 1.5}
    print_stats([result(), result(stats=one_token)], 1.5, "cpu, float32")
    out, err = capsys.readouterr()
    rows = [line.split() for line in err.splitlines()]
    assert out == "" and rows[1][0] == "1" and rows[2][5] == "-"
    assert rows[3][:4] == ["all", "6", "0", "3"] and rows[3][-2:] == ["1.50", "2.0"]
    assert rows[4][0] == "start:"
