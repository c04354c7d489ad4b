"""The command line: its output, and for bad input one line on stderr and the right exit code."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny

import vismem
from vismem import cli, hub, loading
from vismem.cli import ask
from vismem.cli.model_options import load
from vismem.cli.streaming import Streamer, TerminalWriter
from vismem.data import images
from vismem.decoding.policies import Forced, Random, read_policy
from vismem.pocket.world import digit_indices, load_handwriting

QUESTION = "What is on the table?"


@pytest.fixture(scope="session")
def house(tmp_path_factory) -> Path:
    """A folder with a tiny base, a memory for it, and pictures good and bad."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny.equip("idefics3", seed=3, max_invocations=4, min_gap=2)
    model.base.save_pretrained(folder / "base")
    tiny.FAMILIES["idefics3"].processor().save_pretrained(folder / "base")
    model.base.name_or_path = str(folder / "base")
    model.save_pretrained(folder / "memory")
    tiny.picture(0).save(folder / "a.png")
    tiny.picture(1, (48, 32)).save(folder / "b.jpg")
    whole = (folder / "a.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").touch()
    return folder


@pytest.fixture(autouse=True)
def in_house(house, monkeypatch):
    """Short relative names, and none of the developer's colour settings."""
    monkeypatch.chdir(house)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture(scope="session")
def loaded(house):
    """The memory and its base, loaded once; most tests are not about loading."""
    options = types.SimpleNamespace(
        checkpoint=str(house / "memory"),
        base=None,
        device="cpu",
        dtype="auto",
        trust_remote_code=False,
        debug=False,
    )
    return load(options)


@pytest.fixture
def run_whole(capsys):
    """Runs a command line and returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([*map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run(run_whole, monkeypatch, loaded):
    """As `run_whole`, but `ask` uses the model that is loaded already."""
    monkeypatch.setattr(ask, "load", lambda options: loaded)
    return run_whole


def refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    """Asserts that a command failed with this code and one line that contains these words."""
    got, out, err = result
    assert got == code, err
    assert out == ""
    assert err.startswith("vismem: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


def answer_of(out: str) -> str:
    """The text of a streamed answer, without markers and trace."""
    text = out[: out.rindex("\n\n")]
    return text.replace("[◆short]", "").replace("[●long]", "")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


# Output.


@pytest.mark.parametrize("invocation", ["learned", "off", "long@0,short@3,long@9", "random:0.5@anywhere"])
@pytest.mark.parametrize("sampling", [[], ["--temperature", "1.5", "--seed", "7"]], ids=["greedy", "sampled"])
def test_streamed_text_is_the_decoded_answer(run, invocation, sampling):
    line = ["ask", "a.png", QUESTION, "--invocation", invocation, "--max-new-tokens", "24", *sampling]
    code, out, err = run(*line)
    assert (code, err) == (0, "")
    facts = json.loads(run(*line, "--json")[1])
    assert len(facts["answer"]) > 5
    assert answer_of(out) == facts["answer"].removesuffix("\n")
    marks = [found for found in ("short", "long") for _ in range(out.count(f"{found}]"))]
    assert sorted(marks) == sorted(one["kind"] for one in facts["invocations"])


def test_json_has_everything(run, loaded):
    code, out, err = run(
        "ask", "a.png", "b.jpg", QUESTION, "--invocation", "short@0,long@5", "--json", "--max-new-tokens", 12
    )
    assert (code, err) == (0, "")
    facts = json.loads(out)
    seconds = facts.pop("seconds")
    assert isinstance(seconds, float) and seconds > 0
    assert isinstance(facts.pop("answer"), str)
    assert facts == {
        "question": QUESTION,
        "images": ["a.png", "b.jpg"],
        "invocations": [
            {"kind": "short", "position": 0, "length": 4, "forced": True},
            {"kind": "long", "position": 7, "length": 4, "forced": True},
        ],
        "tokens": 12,
        "base": loaded.base,
        "checkpoint": loaded.checkpoint,
    }


def test_trace_lists_every_invocation(run):
    _, out, _ = run("ask", "a.png", QUESTION, "--invocation", "short@0,long@5,long@90", "--max-new-tokens", 12)
    lines = out[out.rindex("\n\n") :].strip("\n").splitlines()
    assert lines[0].split() == ["◆short", "at", "token", "0", "4", "vectors", "forced"]
    assert lines[1].split() == ["●long", "at", "token", "7", "4", "vectors", "forced"]
    assert lines[2].split()[:2] == ["1", "scheduled"]
    assert lines[3].strip().startswith("12 tokens in ") and len(lines) == 4


def test_learned_invocations_are_shown_as_chosen(run, loaded, monkeypatch):
    """With larger rows of the invocation tokens, the model samples them."""
    monkeypatch.setattr(loaded.model.tokens.invocation, "data", loaded.model.tokens.invocation.data * 30)
    _, out, _ = run("ask", "a.png", QUESTION, "--max-new-tokens", 24)
    facts = json.loads(run("ask", "a.png", QUESTION, "--max-new-tokens", 24, "--json")[1])
    assert facts["invocations"] and not any(one["forced"] for one in facts["invocations"])
    assert facts["tokens"] == 24
    assert out.count("chosen") == len(facts["invocations"])


def test_images_reach_the_model_in_order(run):
    def answer(*names):
        return json.loads(run("ask", *names, QUESTION, "--json", "--max-new-tokens", 16)[1])["answer"]

    answers = {answer("a.png", "b.jpg"), answer("b.jpg", "a.png"), answer("a.png"), answer()}
    assert len(answers) == 4


def test_image_on_standard_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("a.png").read_bytes())))
    piped = json.loads(run("ask", "-", QUESTION, "--json", "--max-new-tokens", 8)[1])
    named = json.loads(run("ask", "a.png", QUESTION, "--json", "--max-new-tokens", 8)[1])
    assert piped["images"] == ["-"] and piped["answer"] == named["answer"]


def test_options_may_come_between_images_and_question(run):
    code, out, _ = run("ask", "--json", "a.png", "--max-new-tokens", 3, "b.jpg", "--", "-1 or 1?")
    assert code == 0
    assert (json.loads(out)["question"], json.loads(out)["images"]) == ("-1 or 1?", ["a.png", "b.jpg"])


def test_the_seed_decides_what_is_sampled(run):
    def answer(seed):
        line = ["ask", "a.png", QUESTION, "--json", "--max-new-tokens", 16, "--temperature", 2, "--seed", seed]
        return json.loads(run(*line)[1])["answer"]

    assert answer(1) == answer(1) != answer(2)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("learned", "learned"),
        ("off", "off"),
        ("random:0.25", Random(0.25, "delimiter", 5)),
        ("random:1@anywhere", Random(1.0, "anywhere", 5)),
        ("short@0", Forced([(0, 0, "short")])),
        ("short@0, long@12,long@12", Forced([(0, 0, "short"), (0, 12, "long"), (0, 12, "long")])),
    ],
)
def test_invocation_strings_become_policies(text, wanted):
    assert read_policy(text, seed=5) == wanted


# Markers and streaming, without a model.


def test_markers_have_colour_only_on_a_terminal(monkeypatch):
    def markers(out):
        TerminalWriter(out).marker("short")
        TerminalWriter(out).marker("long")
        return out.getvalue()

    assert markers(Terminal()) == "\x1b[1;36m[◆short]\x1b[0m\x1b[1;35m[●long]\x1b[0m"
    assert markers(io.StringIO()) == "[◆short][●long]"
    monkeypatch.setenv("NO_COLOR", "1")
    assert markers(Terminal()) == "[◆short][●long]"


def test_markers_omit_shapes_that_the_encoding_lacks():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    TerminalWriter(out).marker("long")
    assert out.buffer.getvalue() == b"[long]"


def test_answers_cannot_control_the_terminal():
    out = Terminal()
    TerminalWriter(out).text("a\x1b[2Jb\tc\n")
    assert out.getvalue() == "a\\x1b[2Jb\tc\n"


@pytest.mark.parametrize(
    "words",
    [
        ("ask", "\x1b[31m\x07\nvismem: error: fake\r\x9b\u202e.png", "hi"),
        ("ask", "a.png", "hi", "--base", "\x1b]0;x\x07\n/b"),
        ("train", "stage1", "\x1b[31m\n\x9b=1"),
        ("train", "stage1", "preset=\n\x9b"),
        ("eval", "tables", "\x1b[31m\n\u2028"),
        ("\x1b[2J\n",),
    ],
)
def test_errors_cannot_control_the_terminal(run_whole, words):
    _, _, err = run_whole(*words)
    assert err.startswith("vismem: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert not set(err) & set("\x1b\x07\r\x9b\u202e\u2028")


def test_log_lines_cannot_control_the_terminal(capsys):
    import logging

    from vismem.cli import parsing

    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    root.handlers = []
    try:
        parsing.log_to_stderr(logging.WARNING)
        logging.getLogger("vismem").warning("row %s is bad", "\x1b[2J\x9b.png")
    finally:
        root.handlers = before
    assert capsys.readouterr().err == "row \\x1b[2J\\x9b.png is bad\n"


def test_results_are_escaped_only_on_a_terminal(monkeypatch):
    from vismem.cli import parsing

    for out, expected in ((Terminal(), "a\\x1b[2J\nb\n"), (io.StringIO(), "a\x1b[2J\nb\n")):
        monkeypatch.setattr(sys, "stdout", out)
        parsing.echo("a\x1b[2J\nb")
        assert out.getvalue() == expected


def test_an_error_starts_below_a_progress_bar(run_whole, monkeypatch):
    from tqdm import tqdm

    def fails(options):
        tqdm(total=3, mininterval=0).update()
        raise ValueError("gone")

    monkeypatch.setattr(ask, "run", fails)
    code, _, err = run_whole("ask", "hi")
    assert code == 1 and err.endswith("\nvismem: error: gone\n") and "1/3" in err


def test_a_question_longer_than_the_context_is_one_line(run, monkeypatch):
    monkeypatch.setattr(loading, "load_model", None)
    refused(run("ask", "a.png", "word " * 5000), 1, "the base takes 2048 at most")


def test_streamer_waits_for_whole_characters():
    import torch

    tokenizer = tiny.FAMILIES["idefics3"].processor().tokenizer
    tokens = types.SimpleNamespace(kind_of={9001: "short"}, end_ids={"short": 9002})
    ids = tokenizer.encode("A é 漢字 b", add_special_tokens=False)
    seen, out = [], io.StringIO()
    streamer = Streamer(tokenizer, tokens, TerminalWriter(out))
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for index in [*ids[:2], 9001, 9002, *ids[2:]]:
        streamer.put(torch.tensor([index]))
        seen.append(out.getvalue())
    streamer.end()
    assert out.getvalue().replace("[◆short]", "") == "A é 漢字 b"
    assert not any("\ufffd" in text for text in seen)
    assert len(set(seen)) > 4  # it comes in pieces


# Usage errors: exit code 2, before anything is loaded.


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "no command"),
        ("look", "unknown command 'look'"),
        ("--nonsense", "--nonsense"),
        ("ask", "nothing asked"),
        ("ask a.png ''", "question is empty"),
        ("ask a.png ' '", "question is empty"),
        ("ask a.png b.jpg", "b.jpg, is an image"),
        ("ask -", "is an image"),
        ("ask nowhere.png what?", "no such image: nowhere.png"),
        ("ask base what?", "base is a folder"),
        ("ask - - what?", "once only"),
        ("ask a.png what? --invocation sometimes", "unknown policy 'sometimes'"),
        ("ask a.png what? --invocation random:2", "random:2"),
        ("ask a.png what? --invocation random:x", "random:x"),
        ("ask a.png what? --invocation random:nan", "random:nan"),
        ("ask a.png what? --invocation random:0.5@nowhere", "@nowhere"),
        ("ask a.png what? --invocation short@-1", "short@-1"),
        ("ask a.png what? --invocation mid@1", "mid@1"),
        ("ask a.png what? --invocation short@0,", "short@0,"),
        ("ask what? --invocation short@0", "needs an image"),
        ("ask a.png what? --max-new-tokens 0", "--max-new-tokens"),
        ("ask a.png what? --max-new-tokens -3", "--max-new-tokens"),
        ("ask a.png what? --max-new-tokens many", "'many'"),
        ("ask a.png what? --temperature -1", "--temperature"),
        ("ask a.png what? --temperature nan", "'nan'"),
        ("ask a.png what? --seed -1", "--seed"),
        ("ask a.png what? --dtype int8", "int8"),
        ("ask a.png what? --checkpoint", "--checkpoint"),
        ("ask a.png what? --bogus", "--bogus"),
        ("info extra", "extra"),
        ("pocket", "STEP"),
        ("pocket bake", "bake"),
        ("pocket sample", "--out"),
        ("pocket sample --out x --n 0", "--n"),
        ("bench nothing", "nothing"),
    ],
)
def test_usage_errors_load_nothing(run_whole, monkeypatch, line, words):
    monkeypatch.setattr(ask, "load", lambda options: pytest.fail("nothing should be loaded"))
    refused(run_whole(*shlex.split(line)), 2, words)


def test_unknown_and_missing_devices_are_told_apart(run_whole):
    refused(run_whole("info", "--checkpoint", "memory", "--device", "abacus"), 2, "abacus")
    refused(run_whole("info", "--checkpoint", "memory", "--device", "meta"), 2, "meta")
    refused(run_whole("info", "--checkpoint", "memory", "--device", "cuda:99"), 1, "cuda:99 is not available")


@pytest.mark.parametrize("mark", ["<image>", "<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>"])
def test_special_tokens_in_a_question_are_a_usage_error(run, mark):
    refused(run("ask", "a.png", f"What do I pay{mark}?"), 2, mark)


# Failures: exit code 1.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken.png", "image broken.png is broken: "),
        ("text.png", "image text.png is not an image, or has a format that Pillow does not know"),
        ("empty.png", "image empty.png is empty"),
    ],
)
def test_bad_images_are_refused(run, name, words):
    refused(run("ask", name, QUESTION), 1, words)


def test_an_unreadable_image_is_named(run, monkeypatch):
    def deny(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(images, "open", deny, raising=False)  # permissions do not bind root, who may run the tests
    refused(run("ask", "a.png", QUESTION), 1, "cannot read image a.png", "Permission denied")


def test_only_regular_files_up_to_a_size_are_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_BYTES", 2**20)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**20 + 1)
    refused(run("ask", "/dev/zero", QUESTION), 2, "image /dev/zero is a device, not a regular file")
    refused(run("ask", tmp_path, QUESTION), 2, "is a folder")
    refused(run("ask", tmp_path / "large.png", QUESTION), 1, "large.png is larger than 1 MiB, the limit")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(2**20 + 1))))
    refused(run("ask", "-", QUESTION), 1, "standard input is larger than 1 MiB, the limit")


def test_empty_standard_input_is_refused(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    refused(run("ask", "-", QUESTION), 1, "standard input is empty")
    monkeypatch.setattr(sys, "stdin", Terminal())
    refused(run("ask", "-", QUESTION), 2, "standard input")


def test_images_that_do_not_fit_the_prompt(run, loaded, monkeypatch):
    """A chat template that drops one image placeholder leaves an image without one."""
    template = loaded.model.processor.chat_template.replace("== 'image' %}", "== 'image' and not loop.first %}")
    monkeypatch.setattr(loaded.model.processor, "chat_template", template)
    refused(run("ask", "a.png", "b.jpg", QUESTION), 1, "image")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "./nowhere"], "no checkpoint ./nowhere"),
        (["--checkpoint", "nowhere"], "no checkpoint nowhere"),
        (["--checkpoint", "base"], "no vismem_config.json"),
        (["--checkpoint", "a.png"], "no checkpoint a.png"),
        (["--base", "nowhere"], "no base nowhere"),
        (["--base", "memory"], "no config.json"),
    ],
)
def test_unknown_names_are_refused(run_whole, options, words):
    refused(run_whole("info", *options), 1, words)
    refused(run_whole("ask", "a.png", QUESTION, *options), 1, words)


@pytest.mark.parametrize("option", ["--base", "--checkpoint"])
def test_a_hub_name_without_a_network_fails_at_once(run_whole, monkeypatch, option):
    import huggingface_hub

    calls = []

    def unreachable(url, token, timeout):
        calls.append(timeout)
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    refused(run_whole("info", option, "someone/nothing"), 1, "someone/nothing", "cannot be reached")
    assert calls == [hub.NETWORK_TIMEOUT]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(run_whole("info", option, "someone/nothing"), 1, "offline")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("file", "place", "words"),
    [
        ("vismem.safetensors", -5, "checksum"),
        ("vismem_config.json", 0, "damaged"),
    ],
)
def test_a_checkpoint_damaged_by_one_byte_is_refused(run_whole, house, tmp_path, file, place, words):
    shutil.copytree(house / "memory", tmp_path / "memory")
    content = bytearray((tmp_path / "memory" / file).read_bytes())
    content[place] ^= 1
    (tmp_path / "memory" / file).write_bytes(content)
    refused(run_whole("ask", "a.png", QUESTION, "--checkpoint", tmp_path / "memory"), 1, file, words)


def test_damaged_and_unsupported_bases_are_refused(run_whole, house, tmp_path):
    shutil.copytree(house / "base", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(run_whole("info", "--base", tmp_path / "base"), 1, "cannot load base")

    shutil.copy(house / "base" / "model.safetensors", weights)
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    state.pop(next(name for name in state if "k_proj" in name))
    save_file(state, weights, metadata={"format": "pt"})
    refused(run_whole("info", "--base", tmp_path / "base"), 1, "lack 1 weights", "k_proj")

    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    refused(run_whole("info", "--base", tmp_path / "base"), 1, "'llama'", "supported")


def test_a_memory_of_another_base_is_refused(run_whole, house, tmp_path):
    model, processor = tiny.base_and_processor("qwen2_5_vl")
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    refused(run_whole("info", "--checkpoint", "memory", "--base", tmp_path / "other"), 1, "idefics3", "qwen2_5_vl")


def test_a_missing_pocket_says_how_to_build_it(run_whole, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "BASE_PATH", tmp_path / "vismem" / "pocket" / "weights" / "base")
    refused(run_whole("ask", "a.png", QUESTION), 1, "vismem pocket build")


def test_a_missing_pocket_extra_is_named(run_whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "vismem.pocket.sample", None)  # makes the import fail
    monkeypatch.setattr("vismem.cli.pocket.EXTRA", ("vismem",))
    refused(run_whole("pocket", "sample", "--out", "x"), 1, 'pip install "vismem[pocket]"')


def test_samples_that_cannot_be_drawn_leave_no_folder(run_whole, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    load_handwriting.cache_clear()
    digit_indices.cache_clear()
    refused(run_whole("pocket", "sample", "--out", tmp_path / "x"), 1, "pip install 'vismem[pocket]'")
    assert not (tmp_path / "x").exists()


def test_commands_that_need_a_source_checkout(run_whole, monkeypatch, tmp_path):
    monkeypatch.setattr("vismem.cli.checkout.CHECKOUT", tmp_path)
    refused(run_whole("bench", "decode"), 1, "source checkout")
    refused(run_whole("pocket", "build", "--out", "x"), 1, "source checkout")
    refused(run_whole("pocket", "evaluate"), 1, "source checkout")


# Other commands.


def test_the_default_is_the_pocket_model_with_its_memory(run_whole, house, monkeypatch):
    """Tiny stand-ins for the pocket: its memory is used if it is there, otherwise an untrained one."""
    monkeypatch.setattr(loading, "BASE_PATH", house / "base")
    monkeypatch.setattr(loading, "MEMORY_PATH", house / "memory")
    code, out, err = run_whole("info", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["base"]["name"], facts["memory"]["checkpoint"], facts["memory"]["trained"]) == (
        "pocket",
        "pocket",
        True,
    )

    monkeypatch.setattr(loading, "MEMORY_PATH", house / "nowhere")
    lines = [run_whole("ask", "a.png", QUESTION, "--json", "--invocation", "short@0,long@2") for _ in range(2)]
    for code, _, err in lines:
        assert code == 0
        assert err.startswith("vismem: note: ") and "untrained" in err and err.count("\n") == 1
    one, two = (json.loads(out) for _, out, _ in lines)
    assert one["checkpoint"] is None and one["base"] == "pocket"
    assert one["answer"] == two["answer"]
    assert [found["length"] for found in one["invocations"]] == [16, 16]  # the pocket's preset


def test_a_pocket_base_is_known_by_its_place_on_any_machine():
    assert loading.is_pocket("/home/someone/lib/python3.12/site-packages/vismem/pocket/weights/base")
    assert not loading.is_pocket("/home/someone/weights/base")


def test_info_adds_up(run_whole, loaded):
    code, out, err = run_whole("info", "--checkpoint", "memory", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    memory, base = facts["memory"], facts["base"]
    parts = {name: number for name, number in memory["parameters"].items() if name != "total"}
    assert set(parts) == {"builder", "short", "long", "tokens"}
    trainable = [p for name, p in loaded.model.named_parameters() if not name.startswith("base.")]
    assert sum(parts.values()) == memory["parameters"]["total"] == sum(p.numel() for p in trainable)
    assert base["parameters"] == sum(p.numel() for p in loaded.model.base.parameters())
    assert base["bytes"] == 4 * base["parameters"] and memory["bytes"] == 4 * memory["parameters"]["total"]
    assert memory["share"] == pytest.approx(memory["parameters"]["total"] / base["parameters"])
    assert memory["lengths"] == {"query": 4, "short": 4, "long": 4}
    tokenizer = loaded.model.processor.tokenizer
    assert facts["tokens"] == {t: tokenizer.convert_tokens_to_ids(t) for t in ("<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>")}
    assert (base["family"], facts["dtype"], facts["device"]) == ("idefics3", "float32", "cpu")
    for number in parts.values():
        assert f"{number:,}" in run_whole("info", "--checkpoint", "memory")[1]


def test_dtype_is_honoured(run_whole):
    facts = json.loads(run_whole("info", "--checkpoint", "memory", "--dtype", "bfloat16", "--json")[1])
    assert facts["dtype"] == "bfloat16" and facts["memory"]["bytes"] == 2 * facts["memory"]["parameters"]["total"]
    code, _, err = run_whole(
        "ask", "a.png", QUESTION, "--checkpoint", "memory", "--dtype", "bfloat16", "--max-new-tokens", 4
    )
    assert (code, err) == (0, "")


def test_pocket_steps_call_their_functions(run_whole, monkeypatch):
    calls = []
    for step, package in (("build", "pocket_base"), ("sample", "vismem.pocket"), ("evaluate", "pocket_base")):
        module = types.ModuleType(f"{package}.{step}")
        setattr(module, step, lambda *args, step=step, **kwargs: calls.append((step, args, kwargs)))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert run_whole("pocket", "sample", "--out", "x", "--n", "3")[0] == 0
    assert run_whole("pocket", "build", "--out", "y", "--fresh", "--vision-steps", "2")[0] == 0
    assert run_whole("pocket", "eval", "--n", "5", "--out", "z.json")[0] == 0
    base = vismem.pocket.BASE_PATH
    assert calls == [
        ("sample", (Path("x"),), {"n": 3, "seed": 0, "enlarge": 1}),
        (
            "build",
            (),
            {
                "out": Path("y"),
                "resume": False,
                "work": None,
                "vision_steps": 2,
                "language_steps": None,
                "threads": None,
                "start": None,
            },
        ),
        ("evaluate", (base, Path("z.json"), None), {"n": 5, "seed": 0, "only": ""}),
    ]


def test_bench_passes_everything_on(run_whole, monkeypatch, tmp_path):
    program = "def main(argv):\n    print(argv)\n    return 1 if '--bad' in argv else None\n"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "speed.py").write_text(program)
    monkeypatch.setattr("vismem.cli.checkout.CHECKOUT", tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert run_whole("bench", "speed", "--help", "-n", "3") == (0, "['--help', '-n', '3']\n", "")
    assert run_whole("bench", "speed", "--bad")[0] == 1


@pytest.mark.parametrize(
    "command", ["", "ask", "info", "pocket", "pocket build", "pocket sample", "pocket evaluate", "bench"]
)
def test_help_has_an_example(run_whole, command):
    code, out, err = run_whole(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert "xample:\n  vismem " in out


def test_ctrl_c_exits_with_130(run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "generate", interrupt)
    assert run("ask", "a.png", QUESTION) == (130, "", "vismem: interrupted\n")


def test_ctrl_c_during_an_answer_ends_its_line(run, monkeypatch):
    seen = []

    def interrupt(self, value, put=Streamer.put):
        put(self, value)
        seen.append(value)
        if len(seen) > 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Streamer, "put", interrupt)
    code, out, err = run("ask", "a.png", QUESTION)
    assert (code, err) == (130, "vismem: interrupted\n")
    assert out.endswith("\n") and len(out) > 1


def test_unexpected_errors_are_one_line_and_debug_shows_more(run, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(ask, "generate", fail)
    refused(run("ask", "a.png", QUESTION), 1, "RuntimeError: first second")
    code, _, err = run("ask", "a.png", QUESTION, "--debug")
    assert code == 1
    assert "Traceback" in err and err.endswith("vismem: error: RuntimeError: first second (--debug shows where)\n")


# In its own process.


def process(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "vismem.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **kwargs)


def test_help_does_not_import_torch():
    program = (
        "import sys, vismem, vismem.cli\n"
        "for line in ('--help', 'ask --help', 'info --help', 'pocket build --help', 'ask x --seed -1'):\n"
        "    vismem.cli.main(line.split())\n"
        "heavy = {'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_real_process_is_quiet_on_stderr(house):
    done = process("ask", "a.png", QUESTION, "--checkpoint", "memory", "--max-new-tokens", "8", cwd=house)
    assert (done.returncode, done.stderr) == (0, "")
    assert "8 tokens in " in done.stdout and "\x1b" not in done.stdout


def test_a_closed_pipe_is_quiet(house):
    reader, writer = os.pipe()
    os.close(reader)  # gone before a word is written
    # Unbuffered, argparse would swallow the error itself.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "vismem.cli", "info", "--help"]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=house, env=environment, timeout=120
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_reader_that_leaves_early_exits_with_141(run, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    assert cli.main(["ask", "a.png", QUESTION, "--max-new-tokens", "4"]) == 141
