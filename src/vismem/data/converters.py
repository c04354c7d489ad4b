"""Converts Visual-CoT and Mulberry-SFT, as their authors published them, to our JSON Lines.

    python -m vismem.data.converters visual-cot viscot_363k.json out.jsonl --image-root DIR

Images stay where they are; the output refers to them by paths relative to itself. It is written atomically.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from vismem import files, jsonl
from vismem.data.dataset import BadRowLog, check_limits
from vismem.data.layouts import OWN_COLUMNS, read_messages, split_placeholders
from vismem.data.rows import BadDataError, BadRowError, check_files, read_row
from vismem.data.sources import JsonArray, JsonLines, find_source
from vismem.escaping import visible

_REGION_REQUEST = re.compile(
    r"\s*Please (?:think step by step and )?provide the bounding box coordinate of the region.*", re.S
)
_REGION = re.compile(r"###\s*\[(-?[\d.]+),\s*(-?[\d.]+),\s*(-?[\d.]+),\s*(-?[\d.]+)\]\s*$")
_FINAL = re.compile(r"the final answer is\s*:?", re.IGNORECASE)


def convert_visual_cot(
    source: str | Path,
    out_jsonl: str | Path,
    image_root: str | Path,
    *,
    strict: bool = False,
    max_bad_rows: int | None = 10,
    limit: int | None = None,
) -> int:
    """Converts Visual-CoT (`viscot_363k.json`, or a file of its benchmark) to rows with the plain question.

    Drops the request for a bounding box and the turns about the region; the regions go to the column `bboxes`, a list
    of [x1, y1, x2, y2] in pixels. Rows without a region (LLaVA's, as in `viscot_mixed_2m.json`) keep their turns, and
    their last reply is the answer.

    Args:
        source: the JSON or JSON Lines file.
        out_jsonl: the file to write.
        image_root: the folder that the image paths start from (the one that contains `cot/`).
        strict, max_bad_rows, limit: as in `load_dataset_rows`. A row whose image file is missing is bad.

    Returns:
        The number of rows written.

    Raises:
        BadDataError: if the source cannot be read, has no good row, or more than `max_bad_rows` bad ones.
        ValueError: if `limit` is below 1 or `max_bad_rows` below 0.
    """
    log = BadRowLog(Path(source).name, strict, max_bad_rows)
    return _convert(_visual_cot, Path(source), Path(out_jsonl), Path(image_root), log, limit)


def convert_mulberry(
    source: str | Path,
    out_jsonl: str | Path,
    image_root: str | Path,
    *,
    strict: bool = False,
    max_bad_rows: int | None = 10,
    limit: int | None = None,
) -> int:
    """Converts Mulberry-SFT (`mulberry_sft.json`): the completion is the full reasoning, the answer its final answer.

    Arguments, return value and errors as for `convert_visual_cot`; `image_root` is the folder unpacked from
    `mulberry_images.tar`.
    """
    log = BadRowLog(Path(source).name, strict, max_bad_rows)
    return _convert(_mulberry, Path(source), Path(out_jsonl), Path(image_root), log, limit)


def _visual_cot(record: dict[str, Any]) -> dict[str, Any]:
    """{"image": [path, path###[x1, y1, x2, y2]], "conversations": [question + request, box, "<image>", answer], ...}"""
    images = _paths(record.get("image"))
    messages = _messages(record, "conversations")
    regions = [image for image in images if "###" in image]
    bboxes = []
    for region in regions:
        match = _REGION.search(region)
        if match is None:
            raise BadRowError(f"no region [x1, y1, x2, y2] after ### in {region[-100:]!r}")
        try:
            bboxes.append([float(number) if "." in number else int(number) for number in match.groups()])
        except ValueError as error:
            raise BadRowError(f"the region must hold numbers, got {region[-100:]!r}") from error
    *prompt, reply = messages
    if regions:
        question = next((message for message in messages if message["role"] == "user"), None)
        if question is None:
            raise BadRowError("no human turn")
        prompt = [{**question, "content": _REGION_REQUEST.sub("", question["content"])}]
    whole = [image for image in images if "###" not in image]
    return _row({**record, "bboxes": bboxes}, prompt, reply, reply["content"], whole)


def _mulberry(record: dict[str, Any]) -> dict[str, Any]:
    """{"messages": [user with <image>, assistant ending in "### The final answer is:"], "images": path or paths}"""
    messages = _messages(record, "messages")
    *prompt, reply = messages
    found = list(_FINAL.finditer(reply["content"]))
    answer = reply["content"][found[-1].end() :].strip() if found else ""
    if len(answer) > 1 and answer[0] == answer[-1] and answer[0] in "'\"":
        answer = answer[1:-1].strip()
    if not answer:
        raise BadRowError("the assistant's text has no final answer after 'The final answer is:'")
    return _row(record, prompt, reply, answer, _paths(record.get("images")))


def _row(
    record: dict[str, Any], prompt: list[dict[str, Any]], reply: dict[str, Any], answer: str, images: list[str]
) -> dict[str, Any]:
    """The row, with all columns of the record that are not read."""
    if reply.get("role") != "assistant":
        raise BadRowError("the last turn is not the assistant's")
    content = [{**message, "content": split_placeholders(message["content"])} for message in prompt]
    read = (*OWN_COLUMNS, "conversations", "messages")
    others = {name: value for name, value in record.items() if name not in read}
    return {"prompt": content, "images": images, "answer": answer.strip(), "completion": reply["content"], **others}


def _messages(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A record's turns: at least two, each with one text."""
    turns = record.get(name)
    if not isinstance(turns, list) or len(turns) < 2:
        raise BadRowError(f"`{name}` must be a list of at least two turns")
    messages = read_messages(turns, name)
    if not all(len(message["content"]) == 1 and message["content"][0]["type"] == "text" for message in messages):
        raise BadRowError(f"each turn of `{name}` must have one text")
    return [{"role": message["role"], "content": message["content"][0]["text"]} for message in messages]


def _paths(value: Any) -> list[str]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise BadRowError("the images must be a path or a list of paths")
    return paths


def _convert(
    convert: Callable[[dict[str, Any]], dict[str, Any]],
    source: Path,
    out: Path,
    root: Path,
    log: BadRowLog,
    limit: int | None,
) -> int:
    check_limits(log.max_bad_rows, limit)
    if not root.is_dir():
        raise BadDataError(f"no such image folder: {root}")
    if not source.is_file():
        raise BadDataError(f"no such file: {source}")
    records = find_source(source, "train", streaming=True)
    if not isinstance(records, JsonLines) and not isinstance(records.rows, JsonArray):
        raise BadDataError(f"{source} is neither a JSON array nor JSON Lines")
    base = os.path.relpath(root.absolute(), out.absolute().parent)
    title = visible(f"converting {source.name}")
    written = 0
    with files.replacing(out) as partial:
        with partial.open("wb") as file:
            for _, number, record in tqdm(records.scan(), desc=title, unit=" rows", delay=2):
                try:
                    if isinstance(record, BadRowError):
                        raise record
                    if not isinstance(record, dict):
                        raise BadRowError(f"a record must be an object, not {type(record).__name__}")
                    row = convert(record)
                    row["images"] = [image.lstrip("/") for image in row["images"]]
                    check_files(read_row(row)[1], root)
                    row["images"] = [Path(base, image).as_posix() for image in row["images"]]
                    line = jsonl.dumps([row])
                except (BadRowError, RecursionError) as error:
                    problem = str(error) if isinstance(error, BadRowError) else "nested too deeply to be written"
                    log.add(records.row_id(number), problem)
                    continue
                file.write(line)
                written += 1
                if written == limit:
                    break
        if not written:
            raise log.no_good_row()
    return written


CONVERTERS = {"visual-cot": convert_visual_cot, "mulberry": convert_mulberry}


def main(arguments: list[str] | None = None) -> int:
    """`python -m vismem.data.converters LAYOUT SOURCE OUT --image-root DIR`"""
    parser = argparse.ArgumentParser(prog="python -m vismem.data.converters", description=__doc__.split("\n")[0])
    parser.add_argument("layout", choices=CONVERTERS)
    parser.add_argument("source", help="the published JSON or JSON Lines file")
    parser.add_argument("out", help="the JSON Lines file to write")
    parser.add_argument("--image-root", required=True, metavar="DIR", help="folder that image paths are relative to")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    parser.add_argument("--max-bad-rows", type=int, default=10, metavar="N", help="bad rows to skip; -1 for no limit")
    parser.add_argument("--limit", type=int, metavar="N", help="write at most N rows, 1 or more")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be 1 or more, got {options.limit}; omit it for all rows")
    most = None if options.max_bad_rows < 0 else options.max_bad_rows
    try:
        written = CONVERTERS[options.layout](
            options.source,
            options.out,
            options.image_root,
            strict=options.strict,
            max_bad_rows=most,
            limit=options.limit,
        )
    except (BadDataError, OSError) as error:
        parser.exit(1, f"error: {visible(str(error))}\n")
    print(visible(f"{written} rows written to {options.out}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
