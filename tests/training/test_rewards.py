"""Rewards: what counts as right, one wrong answer beside each right one; errors; and a judge on a local server."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from vismem.training.rewards import RewardError, extract_answer, load_rewards
from vismem.training.rewards.answers import completion_text, normalise, numbers
from vismem.training.rewards.judge import parse_score


def score(spec, completion, answer=None, prompt="?", **columns):
    """One reward's value for one completion, possibly None."""
    given = {name: [value] for name, value in columns.items()}
    if answer is not None:
        given["answer"] = [answer]
    found = load_rewards(spec).rewards[0].function(prompts=[prompt], completions=[completion], **given)
    return found[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("four", "four"),
        ("", ""),
        ("  \n ", ""),
        ("The answer is 4.", "4."),
        ("The answer is: **B**", "B"),
        ("**Answer:** red cup", "red cup"),
        ("**Final answer**: 7", "7"),
        ("Answer:\n\n  5 apples\nI counted them.", "5 apples"),
        ("The answer is 3.5 m. It is long.", "3.5 m"),
        ("The answer is Mr. Smith. He waves.", "Mr. Smith"),
        ("The answer is B. The red one", "B. The red one"),
        ("The answer is 3. No wait, the answer is 4", "4"),
        (r"so \boxed{4}", "4"),
        (r"\boxed{\frac{3}{4}} and more", r"\frac{3}{4}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{4} no, \boxed{5}", "5"),
        (r"The answer is \boxed{5}.", "5"),
        (r"\boxed{4}. Rather, the answer is 5", "5"),
        ("<answer>7</answer>", "7"),
        ("<answer> \\boxed{7} </answer> done", "7"),
        ("<answer>The answer is 8.</answer>", "8."),
        ("<answer>7</answer> and <ANSWER>9</ANSWER>", "9"),
        ("<answer>7", "7"),
        ("<answer>" * 3000 + "7", "7"),
        (r"\boxed{" * 3000 + "7", "7"),
        ("the answer is " * 3000 + "7", "7"),
        ("<think>the answer is 1</think>It is 2", "It is 2"),
        ("So the answer is", ""),
        (r"\boxed{}", ""),
        (r"\boxed{unclosed", "unclosed"),
        ("To answer: look at the left", "To answer: look at the left"),
        ("answered well", "answered well"),
        ("### The final answer is:\nC: 123", "C: 123"),
    ],
)
def test_answers_are_extracted_from_replies(text, answer):
    assert extract_answer(text) == answer


def test_the_text_of_a_completion_is_found():
    assert completion_text("a") == "a"
    assert completion_text([{"role": "assistant", "content": "b"}]) == "b"
    assert completion_text([{"content": "b"}]) == "b"
    assert completion_text([{"role": "assistant", "content": [{"type": "text", "text": "c"}]}]) == "c"
    turns = [
        {"role": "assistant", "content": "x"},
        {"role": "tool", "content": "y"},
        {"role": "assistant", "content": "z"},
    ]
    assert completion_text(turns) == "z"
    assert completion_text([]) == completion_text([{"role": "assistant", "content": None}]) == ""


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("5", [5]),
        ("1,234.50", [1234.5]),
        ("1,234,567", [1234567]),
        ("1,23", [1, 23]),
        ("1, 2 and 3", [1, 2, 3]),
        ("-3/4", [-0.75]),
        ("\u22123/4", [-0.75]),
        ("\u22125", [-5]),
        ("-5", [-5]),
        ("$-5", [-5]),
        ("-$5", [-5]),
        ("$1,200", [1200]),
        ("10-20", [10, 20]),
        ("x-3", [3]),
        ("- 3 apples", [3]),
        (".5", [0.5]),
        ("3.", [3]),
        ("v1.2.3", []),
        ("H2O", []),
        ("5cm", [5]),
        ("5 m/s", [5]),
        ("1 1/2", [1.5]),
        ("1½ cups", [1.5]),
        ("½", [0.5]),
        (r"\frac{3}{4}", [0.75]),
        (r"-\frac{3}{4}", [-0.75]),
        (r"1\frac{1}{2}", [1.5]),
        (r"\dfrac{1}{2}", [0.5]),
        (r"1{,}234", [1234]),
        (r"\$12", [12]),
        ("3/0", []),
        ("12/25/2020", [12]),
        ("1e3", [1000]),
        ("1.2\u00d710^3", [1200]),
        ("1.2 \u00d7 10³", [1200]),
        (r"1.2 \times 10^{-3}", [0.0012]),
        ("2*10**2", [200]),
        ("1e999", []),
        ("**7**", [7]),
        ("1\u202f234 km", [1234]),
        ("none", []),
    ],
)
def test_numbers_are_found_in_text(text, values):
    assert [number.value for number in numbers(text)] == pytest.approx(values)


def test_percent_is_recorded():
    assert [number.percent for number in numbers(r"45%, 45 \%, 45 percent and 45")] == [True, True, True, False]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Red.", "red", True),
        ("**The red cup**", "red cup", True),
        ("the answer is \u201cred\u201d", "Red", True),
        (r"\boxed{\text{red}}", "red", True),
        ("reddish", "red", False),
        ("red and blue", "red", False),
        ("", "red", False),
        ("A", "a", True),
        ("\u22125", "-5", True),
        ("red", ["blue", "red"], True),
        ("green", ["blue", "red"], False),
        (7, "7", None),
    ],
)
def test_exact_compares_normalised_answers(text, answer, right):
    if right is None:
        assert score("exact", "7", text) == 1.0  # a number as reference
    else:
        assert score("exact", text, answer) == float(right)


def test_normalise_keeps_a_lone_letter():
    assert normalise("A") == "a"
    assert normalise("(B)") == normalise("b.") == "b"


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It is a red cup.", "red", True),
        ("It is a reddish cup", "red", False),
        ("There are **12** of them", "12", True),
        ("There are 120 of them", "12", False),
        ("", "red", False),
    ],
)
def test_contains_finds_the_answer_in_the_reply(text, answer, right):
    assert score("contains", text, answer) == float(right)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Yes", "yes", True),
        ("Yes, there is no dog.", "yes", True),
        ("No.", "yes", False),
        ("no", "No", True),
        ("**No**", "no", True),
        ("There is no cat", "no", True),
        ("I looked twice. The answer is yes.", "Yes", True),
        ("yes or no", "yes", False),
        ("yes/no", "yes", False),
        ("yes no", "no", False),
        ("I know nothing", "no", False),
        ("", "no", False),
        ("True", "yes", True),
        ("false", "no", True),
    ],
)
def test_yes_no_reads_yes_or_no(text, answer, right):
    assert score("yes_no", text, answer) == float(right)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("1,234.50", "1234.5", True),
        ("1,234.50", 1234.5, True),
        ("1234.6", "1234.5", False),
        ("-3/4", "-0.75", True),
        ("3/4", "-0.75", False),
        ("\u22123/4", "-3/4", True),
        ("The answer is \u2212 3", "-3", True),
        ("The answer is 5 because 2 + 4 is not.", "5", True),
        ("2 + 3 = 5", "5", True),
        ("2 + 3 = 5", "3", False),
        ("The answer is 2 + 3 = 5", "5", True),
        ("The answer is 2 + 3 = 5", "2", False),
        ("There are 3 cups and 2 plates", "2", True),
        ("There are 3 cups and 2 plates", "3", False),
        ("5 cm", "5", True),
        ("5 cm", "5 cm", True),
        ("45%", "45", True),
        ("45%", "0.45", True),
        ("0.45", "45%", True),
        ("45", "45%", True),
        ("4.5", "45%", False),
        (r"\boxed{\frac{1}{3}}", "1/3", True),
        (r"\boxed{0.33}", "1/3", False),
        (r"$x = \boxed{12}$", "12", True),
        ("**12**", "12", True),
        ("twelve", "12", False),
        ("", "12", False),
        ("the answer is", "0", False),
        ("12.0", "12", True),
    ],
)
def test_numeric_compares_numbers(text, answer, right):
    assert score("numeric", text, answer) == float(right)


def test_numeric_tolerances():
    assert score({"name": "numeric", "relative": 0.05}, "104", "100") == 1.0
    assert score({"name": "numeric", "relative": 0.05}, "106", "100") == 0.0
    assert score({"name": "numeric", "relative": 0, "absolute": 1}, "0.5", "0") == 1.0
    assert score({"name": "numeric", "relative": 0, "absolute": 0.1}, "0.5", "0") == 0.0


OPTIONS = "Which one?\nA. red cup\nB) blue book\n(C) green pen\nD: dark red cup"


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("B", "B", True),
        ("b", "B", True),
        ("(B)", "B", True),
        ("B)", "B", True),
        ("B.", "B", True),
        ("**B**", "B", True),
        (r"\boxed{B}", "B", True),
        (r"\boxed{\text{B}}", "B", True),
        ("option b", "B", True),
        ("Option (B)", "B", True),
        ("B. blue book", "B", True),
        ("The answer is (B) blue book, since it is blue.", "B", True),
        ("blue book", "B", True),
        ("It is the blue book.", "B", True),
        ("B", "blue book", True),
        ("The Blue Book", "blue book", True),
        ("dark red cup", "D", True),
        ("dark red cup", "A", False),
        ("red cup", "A", True),
        ("A blue book", "B", True),
        ("A blue book", "A", False),
        ("B", "A", False),
        ("The answer is B", "C", False),
        ("E", "B", False),
        ("red cup or blue book", "A", False),
        ("The correct option is A", "A", True),
        ("The correct option is D.", "D", True),
        ("The correct option is A", "B", False),
        ("A or B", "A", False),
        ("A, B, C, D", "A", False),
        ("", "A", False),
        ("I cannot see it", "A", False),
    ],
)
def test_choice_reads_the_chosen_option(text, answer, right):
    assert score("choice", text, answer, prompt=OPTIONS) == float(right)
    assert score("choice", text, answer, choices=["red cup", "blue book", "green pen", "dark red cup"]) == float(right)


def test_choice_options():
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": OPTIONS}]}]
    assert score("choice", "green pen", "C", prompt=messages) == 1.0
    assert score("choice", "cat", "B", prompt="What is it? (A) dog (B) cat (C) cow") == 1.0
    assert score("choice", "dog", "B", prompt="What is it? (A) dog (B) cat (C) cow") == 0.0
    assert score("choice", "cat", "B", choices={"A": "dog", "B": "cat"}) == 1.0
    assert score("choice", "cat", "B", choices=["A. dog", "B. cat"]) == 1.0
    assert score("choice", "cat", "B", choices={"text": ["dog", "cat"], "label": ["A", "B"]}) == 1.0
    assert score("choice", "(C)", "C") == 1.0  # no options known
    assert score("choice", "(C)", "D") == 0.0


def test_rewards_that_do_not_apply_give_none():
    assert score("numeric", "5", "red") is None
    for reference in ("1952-09-24", "111-25", "9.00-11.30", "80 % of 3rd graders", "Windows 95", "5 of 6", ""):
        assert score("numeric", "5", reference) is None, reference
    for reference in ("about 5", "US$ 5", "x = 5", "5 cm in all", r"$\frac{10}{2}$", "**5**"):
        assert score("numeric", "5", reference) == 1.0, reference
    assert score("yes_no", "yes", "red") is None
    assert score("choice", "B", "red cup") is None
    assert score("math", "5", "the red cup") is None
    assert score("pocket", "5", "5", task=None) is None
    assert score("contains", "5", "") is None


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"\boxed{\frac{3}{4}}", "0.75", True),
        (r"\boxed{\frac{3}{4}}", r"\frac{6}{8}", True),
        (r"\boxed{\frac{3}{5}}", r"\frac{6}{8}", False),
        (r"The answer is $x^2 + 2x + 1$", "(x+1)^2", True),
        (r"The answer is $x^2 + 2x$", "(x+1)^2", False),
        ("-3/4", "-0.75", True),
        ("1,234.5", "1234.5", True),
        (r"<answer>\sqrt{8}</answer>", r"2\sqrt{2}", True),
        ("", "5", False),
        ("no idea", "5", False),
        (r"\boxed{" + "(" * 2000 + "5", "5", False),
        ("We count and count again. " * 200 + "There are $5$ of them", "5", True),
    ],
)
def test_math_compares_formulas(text, answer, right):
    pytest.importorskip("math_verify")
    assert score("math", text, answer) == float(right)


def test_math_works_in_a_thread():
    pytest.importorskip("math_verify")
    found = []
    thread = threading.Thread(target=lambda: found.append(score("math", r"\boxed{\frac{1}{2}}", "0.5")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_format_checks_the_form_of_a_reply():
    assert score("boxed", r"so \boxed{5}") == 1.0
    assert score("boxed", "so 5") == score("boxed", r"\boxed{ }") == score("boxed", "<answer>5</answer>") == 0.0
    assert score("format", "<answer>5</answer>") == score("format", r"\boxed{5}") == 1.0
    assert score("format", "5") == score("format", "<answer> </answer>") == score("format", "<answer>5") == 0.0
    assert score("format", "<answer>5</answer><answer>6</answer>") == 0.0
    tagged = {"name": "format", "pattern": r"<think>.+</think>\s*<answer>.+</answer>", "whole": True}
    assert score(tagged, "<think>a\nb</think>\n<answer>5</answer>") == 1.0
    assert score(tagged, "well <think>a</think><answer>5</answer>") == 0.0
    with pytest.raises(ValueError, match="not a regular expression"):
        load_rewards({"name": "format", "pattern": "("})


def test_pocket_scores_by_task():
    assert score("pocket", "3 and 4. So 7.", "7", task="sum") == 1.0
    assert score("pocket", "3 and 4. So 8.", "7", task="sum") == 0.0
    assert score("pocket", "Row 1: 1 2. Row 2: 3 4.", "Row 1: 1 2. Row 2: 3 5", task="describe_prices") == 0.5


def messages(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_totals_are_weighted_sums():
    rewards = load_rewards(["numeric", {"name": "exact", "weight": 0.5}, {"name": "boxed", "weight": 0}])
    result = rewards(["?"] * 3, messages("5", "red", r"\boxed{blue}"), {"answer": ["5", "red", "red"]})
    assert result.names == rewards.names == ["numeric", "exact", "boxed"]
    assert result.total.tolist() == [1.5, 0.5, 0.0]
    assert result.total.dtype == result.parts.dtype == torch.float32
    assert result.parts.shape == (3, 3)
    assert result.parts[:, 0].isnan().tolist() == [False, True, True]
    assert result.parts[:, 2].tolist() == [0.0, 0.0, 1.0]  # not weighted


def test_a_row_without_any_reward_is_an_error():
    rewards = load_rewards(["numeric", "yes_no"])
    with pytest.raises(RewardError, match=r"no reward for row b: numeric, yes_no all gave None"):
        rewards(["?"] * 2, ["5", "5"], {"answer": ["5", "red"], "id": ["a", "b"]})


def test_no_rows_give_no_rewards():
    result = load_rewards(["exact"])([], [], {"answer": []})
    assert result.total.shape == (0,) and result.parts.shape == (0, 1)


def test_functions_get_columns_and_state():
    seen = {}

    def mine(prompts, completions, trainer_state=None, completion_ids=None, **columns):
        seen.update(columns, state=trainer_state, ids=completion_ids)
        return [1, 2.5]

    def short(completions, level):  # no **kwargs: gets what it names
        return torch.tensor([float(level[0]), float(level[1])])

    state = object()
    columns = {"answer": ["1", "2"], "level": [3, 4], "trainer_state": state, "completion_ids": [[1], [2]]}
    result = load_rewards([mine, short])(["a", "b"], ["x", "y"], columns)
    assert seen == {"answer": ["1", "2"], "level": [3, 4], "state": state, "ids": [[1], [2]]}
    assert result.total.tolist() == [4.0, 6.5]
    assert result.names == ["mine", "short"]


def test_rewards_load_from_import_paths(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def length(completions, scale=1.0, **kwargs):\n    return [scale * len(text) for text in completions]\n"
        "number = 3\n"
    )
    path = f"{tmp_path / 'mine.py'}:length"
    assert load_rewards(path)(["?"], ["abc"], {}).total.tolist() == [3.0]
    options = {"path": path, "scale": 2.0, "weight": 0.5, "name": "long"}
    assert load_rewards(options)(["?"], ["abc"], {"scale": [9.0]}).parts.tolist() == [[6.0]]  # the option stands
    result = load_rewards([options, path, path])(["?"], ["abc"], {})
    assert result.names == ["long", "length", "length_2"]
    assert result.parts.tolist() == [[6.0, 3.0, 3.0]]
    monkeypatch.syspath_prepend(tmp_path)
    assert load_rewards("mine:length")(["?"], ["abcd"], {}).total.tolist() == [4.0]
    for bad, message in [
        (f"{tmp_path / 'mine.py'}:none", "has no 'none'"),
        (f"{tmp_path / 'mine.py'}:number", "is not a function"),
        (f"{tmp_path / 'gone.py'}:f", "no such file"),
        ("no_such_module_here:f", "cannot import no_such_module_here"),
        (":f", "import path"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_rewards(bad)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exakt", "no reward 'exakt'; choose from exact, choice"),
        ([], "non-empty list"),
        (None, "non-empty list"),
        ([5], "must be a name"),
        ({"weight": 2}, "needs 'name' or 'path'"),
        ({"name": "exact", "weight": "2"}, "weight must be a finite number"),
        ({"name": "exact", "weight": math.nan}, "weight must be a finite number"),
        ({"name": "numeric", "tolerence": 1}, "no option 'tolerence'; it has relative, absolute"),
        ({"name": "numeric", "relative": -1}, "'relative' must be 0 or more"),
        ("judge", "either a function or the url"),
        ({"name": "judge", "url": "localhost", "model": "m"}, "must start with http"),
        ({"name": "judge", "url": "http://localhost"}, "name of a model"),
        ({"name": "judge", "url": "http://x", "model": "m", "key_env": "NO_SUCH_KEY_HERE"}, "NO_SUCH_KEY_HERE"),
        ({"name": "judge", "url": "http://x", "model": "m", "template": "grade"}, "no {completion}"),
        ({"name": "judge", "function": "no_such_module_here:f"}, "cannot import"),
    ],
)
def test_wrong_specifications_raise(spec, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(spec)


def bad_at_second(completions, **columns):
    if "y" in completions:
        raise KeyError("colour")
    return [1.0] * len(completions)


async def later(completions, **columns):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


class Later:
    async def __call__(self, completions):
        return [2.0 for _ in completions]


def test_asynchronous_rewards_are_awaited_together():
    """Functions and callable objects, next to synchronous ones, also inside a running loop; clients keep one loop."""
    here, there, loops = asyncio.Event(), asyncio.Event(), set()

    async def waits(completions):
        loops.add(asyncio.get_running_loop())
        here.set()
        await asyncio.wait_for(there.wait(), 60)
        return [1.0 for _ in completions]

    async def comes(completions):
        there.set()
        await asyncio.wait_for(here.wait(), 60)
        return [1.0 for _ in completions]

    rewards = load_rewards([later, Later(), waits, comes, lambda completions: [0.5 for _ in completions]])
    for _ in range(2):
        found = rewards(["?", "?"], ["a", "abc"], {})
        assert found.parts.tolist() == [[1.0, 2.0, 1.0, 1.0, 0.5], [3.0, 2.0, 1.0, 1.0, 0.5]]
    assert len(loops) == 1

    async def notebook():
        return rewards(["?"], ["abc"], {}).total.tolist()

    assert asyncio.run(notebook()) == [7.5]


async def late_failure(completions):
    await asyncio.sleep(0)
    if "bad" in completions:
        raise OSError("no answer")
    return [1.0 for _ in completions]


async def late_exit(completions):
    sys.exit(0)


async def late_interrupt(completions):
    raise KeyboardInterrupt


async def late_text(completions):
    return "good"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (late_failure, "the reward 'late_failure' failed at row b: OSError: no answer"),
        (late_exit, "failed at row a: RuntimeError: SystemExit: 0"),
        (late_interrupt, "failed at row a: RuntimeError: KeyboardInterrupt"),  # not Ctrl-C, and it does not hang
        (late_text, "must return a list of 2 numbers, not str"),
    ],
)
def test_a_failing_asynchronous_reward_is_named(function, said):
    for _ in range(2):  # the loop outlives a failure
        with pytest.raises(RewardError, match=said):
            load_rewards([later, function])(["?", "?"], ["good", "bad"], {"id": ["a", "b"]})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (bad_at_second, r"'bad_at_second' failed at row t:2: KeyError: 'colour'"),
        (lambda completions, **c: [1.0], "gave 1 rewards for 3 completions"),
        (lambda completions, **c: [1.0, math.nan, 1.0], "gave nan for row t:2"),
        (lambda completions, **c: [1.0, math.inf, 1.0], "gave inf for row t:2"),
        (lambda completions, **c: [1.0, "1", 1.0], "gave '1' for row t:2"),
        (lambda completions, **c: 1.0, "must return a list of 3 numbers, not float"),
        (lambda completions, **c: None, "must return a list of 3 numbers, not NoneType"),
    ],
)
def test_a_failing_function_is_named(function, message):
    with pytest.raises(RewardError, match=message):
        load_rewards(function)(["?"] * 3, ["x", "y", "z"], {"id": ["t:1", "t:2", "t:3"]})


def test_a_failure_of_the_whole_batch_names_the_rows():
    def whole(completions, **columns):
        if len(completions) > 1:
            raise ValueError("too many")
        return [0.0]

    with pytest.raises(RewardError, match=r"one of the rows t:1, t:2: ValueError: too many") as caught:
        load_rewards(whole)(["?"] * 2, ["x", "y"], {"id": ["t:1", "t:2"]})
    assert isinstance(caught.value.__cause__, ValueError)


def test_built_in_failures_name_the_row_and_missing_columns():
    with pytest.raises(RewardError, match=r"'exact' failed .* needs a column 'answer'"):
        load_rewards("exact")(["?"], ["5"], {"id": ["t:1"]})
    with pytest.raises(RewardError, match=r"'pocket' failed at row t:2: .*nope"):

        class Nope:
            def startswith(self, text):
                raise RuntimeError("nope")

        load_rewards("pocket")(
            ["?"] * 2, ["5"] * 2, {"id": ["t:1", "t:2"], "answer": ["5"] * 2, "task": ["sum", Nope()]}
        )
    with pytest.raises(ValueError, match="answer has 1 values for 2 completions"):
        load_rewards("exact")(["?"] * 2, ["5"] * 2, {"answer": ["5"]})


def test_a_judge_may_be_a_function():
    def likes(question, completion, answer):
        return 1.0 if answer in completion else 0.25

    rewards = load_rewards([{"name": "judge", "function": likes}])
    assert rewards(["q", "q"], messages("a red cup", "blue"), {"answer": ["red", "red"]}).total.tolist() == [1.0, 0.25]

    def fails(question, completion, answer):
        if completion == "y":
            raise RuntimeError("broken")
        return 1.0

    with pytest.raises(RewardError, match="'judge' failed at row t:2: RuntimeError: broken"):
        load_rewards({"name": "judge", "function": fails})(["q"] * 2, ["x", "y"], {"id": ["t:1", "t:2"]})
    kept = load_rewards({"name": "judge", "function": fails, "on_failure": "none"}).rewards[0].function
    assert kept(prompts=["q"] * 2, completions=["x", "y"]) == [1.0, None]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.8", 0.8),
        ("1", 1.0),
        (".5", 0.5),
        ("Score: 0.8", 0.8),
        ("**Score:** 0.8", 0.8),
        ('{"score": 0.8}', 0.8),
        ('```json\n{"reason": "2 of 3 are right", "score": 0.6}\n```', 0.6),
        ("4/5", 0.8),
        ("80%", 0.8),
        ("Between 0 and 1 I give it 0.7.", 0.7),
        ("<think>Score: 1</think>0.2", 0.2),
    ],
)
def test_scores_are_parsed_from_replies(text, value):
    assert parse_score(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "good", "8", "-1", "Score: 7", "5/0", "1.5"])
def test_replies_without_a_valid_score_are_refused(text):
    with pytest.raises(RuntimeError, match="no score"):
        parse_score(text)


class Endpoint(BaseHTTPRequestHandler):
    """Plays the server's `script`, a list of (status, body or text of the reply, headers), then repeats its last."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            script = self.server.script
            status, reply, headers = script.pop(0) if len(script) > 1 else script[0]
        if callable(reply):
            reply = reply(body)
        if reply == "sleep":
            time.sleep(0.6)
            return
        if reply == "hang up":
            return
        content = (
            reply if isinstance(reply, bytes) else json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        )
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    found.lock, found.seen, found.script = threading.Lock(), [], [(200, "1", {})]
    found.url = f"http://127.0.0.1:{found.server_port}/v1"
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def judged(server, completions=("x",), **options):
    spec = {"name": "judge", "url": server.url, "model": "m", "backoff": 0.01, "timeout": 5, **options}
    count = len(completions)
    columns = {"answer": ["red"] * count, "id": [f"t:{row}" for row in range(count)]}
    return load_rewards(spec)(
        [[{"role": "user", "content": "Which {answer}?"}]] * count, messages(*completions), columns
    )


def test_judge_asks_an_endpoint(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server.script = [(200, lambda body: "0.75" if "good" in body["messages"][0]["content"] else "0", {})]
    assert judged(server, ["good", "bad", "good"], key_env="MY_KEY", workers=2).total.tolist() == [0.75, 0.0, 0.75]
    path, key, body = server.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["model"] == "m" and body["temperature"] == 0
    assert "Which {answer}?" in body["messages"][0]["content"]  # the question's braces are not filled in
    assert "Reference answer:\nred" in body["messages"][0]["content"]


@pytest.mark.parametrize("key", ["top\nsecret", "top\u2011secret"])
def test_judge_never_prints_its_key(server, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ValueError, match="MY_KEY must hold the judge's key in printable ASCII") as error:
        judged(server, key_env="MY_KEY")
    assert "secret" not in str(error.value)
    monkeypatch.setenv("MY_KEY", "topsecret")
    for status in (401, 500):
        server.script = [(status, b"no", {})]
        with pytest.raises(RewardError) as failure:
            judged(server, key_env="MY_KEY", retries=0)
        assert "secret" not in "".join(traceback.format_exception(failure.value))


def test_judge_template_and_whole_path(server):
    server.url += "/chat/completions/"
    judged(server, template="Q {question} C {completion}")
    path, key, body = server.seen[0]
    assert path == "/v1/chat/completions" and key is None
    assert body["messages"][0]["content"] == "Q Which {answer}? C x"


TROUBLES = [
    (500, "x", {}),
    (429, "x", {"Retry-After": "0"}),
    (200, "great!", {}),
    (200, b"{}", {}),
    (200, b"<html>", {}),
    (200, "hang up", {}),
    (200, b'{"choices": [{"message": {"content": null}}]}', {}),
]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_judge_retries(server, trouble):
    server.script = [trouble, trouble, (200, "0.5", {})]
    assert judged(server, retries=2).total.tolist() == [0.5]
    assert len(server.seen) == 3
    server.script = [trouble]
    with pytest.raises(RewardError, match=r"'judge' failed at row t:0: JudgeError: .*after 2 attempts"):
        judged(server, retries=1)


def test_judge_times_out(server):
    server.script = [(200, "sleep", {}), (200, "1", {})]
    assert judged(server, timeout=0.1, retries=1).total.tolist() == [1.0]
    server.script = [(200, "sleep", {})]
    with pytest.raises(RewardError, match="timed out"):
        judged(server, timeout=0.1, retries=0)


def test_judge_does_not_retry_permanent_errors(server):
    server.script = [(401, b"bad key", {})]
    with pytest.raises(RewardError, match="status 401: bad key"):
        judged(server, retries=5)
    assert len(server.seen) == 1


def test_judge_may_skip_a_row(server, caplog):
    server.script = [(200, "nice", {})]
    spec = [{"name": "judge", "url": server.url, "model": "m", "retries": 0, "on_failure": "none"}, "exact"]
    result = load_rewards(spec)(["q"], ["red"], {"answer": ["red"]})
    assert result.total.tolist() == [1.0] and result.parts[0, 0].isnan()
    assert "gave no score for row 0" in caplog.text


def test_judge_backs_off(server, monkeypatch):
    waits = []
    monkeypatch.setattr("vismem.training.rewards.judge.time.sleep", waits.append)
    server.script = [(503, "x", {}), (503, "x", {}), (503, "x", {"Retry-After": "7"}), (200, "1", {})]
    judged(server, backoff=0.5, retries=3)
    assert waits == [0.5, 1.0, 7.0]
