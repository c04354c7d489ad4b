"""Public data sets into our JSON Lines: Visual-CoT and Mulberry-SFT, from the files that their authors published.

    python -m vismem.data.converters visual-cot viscot_363k.json out.jsonl --image-root DIR

The images stay where they are; the output names them by paths relative to itself. It is written whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from vismem import files, jsonl
from vismem.data.dataset import Reports
from vismem.data.rows import BadDataError, BadRow, read_row
from vismem.data.sources import JsonArray, JsonLines, find_source

IMAGE_MARK = "<image>"
_REGION_REQUEST = re.compile(
    r"\s*Please (?:think step by step and )?provide the bounding box coordinate of the region.*", re.S
)
_REGION = re.compile(r"###\s*\[(-?[\d.]+),\s*(-?[\d.]+),\s*(-?[\d.]+),\s*(-?[\d.]+)\]\s*$")
_FINAL = re.compile(r"the final answer is\s*:?", re.IGNORECASE)
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def convert_visual_cot(
    source: str | Path,
    out_jsonl: str | Path,
    image_root: str | Path,
    *,
    strict: bool = False,
    max_bad_rows: int | None = 10,
    limit: int | None = None,
) -> int:
    """Visual-CoT (`viscot_363k.json`, or a file of its benchmark) as rows with the question alone.

    The request for a bounding box and the turns about the region are left out; the regions go to the column
    `bboxes`, a list of [x1, y1, x2, y2] in pixels. Rows without a region (LLaVA's own, as in `viscot_mixed_2m.json`)
    keep their turns; the last reply is the answer.

    Args:
        source: the JSON or JSON Lines file.
        out_jsonl: the file to write; its folder must exist.
        image_root: the folder that the file's image paths start from (the one that holds `cot/`).
        strict, max_bad_rows, limit: as in `load_dataset_rows`. A row whose image file is not there is bad.

    Returns:
        the number of rows written.

    Raises:
        BadDataError: if the source cannot be read, has no good row, or more bad ones than allowed.
    """
    return _convert(source, out_jsonl, image_root, _visual_cot, strict, max_bad_rows, limit)


def convert_mulberry(
    source: str | Path,
    out_jsonl: str | Path,
    image_root: str | Path,
    *,
    strict: bool = False,
    max_bad_rows: int | None = 10,
    limit: int | None = None,
) -> int:
    """Mulberry-SFT (`mulberry_sft.json`) as rows: the whole reasoning is the completion, its final answer the answer.

    Args, returns and raises as `convert_visual_cot`; `image_root` is the folder unpacked from `mulberry_images.tar`.
    """
    return _convert(source, out_jsonl, image_root, _mulberry, strict, max_bad_rows, limit)


def _visual_cot(record: dict[str, Any]) -> dict[str, Any]:
    """{"image": [path, path###[x1, y1, x2, y2]], "conversations": [question + request, box, "<image>", answer], ...}"""
    images = _paths(record.get("image"))
    turns = record.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("`conversations` must be a list of at least two turns")
    messages = []
    for turn in turns:
        if turn.get("from") not in _LLAVA_ROLES or not isinstance(turn.get("value"), str):
            raise BadRow("a turn must have `from` (human or gpt) and a text `value`")
        messages.append({"role": _LLAVA_ROLES[turn["from"]], "content": turn["value"]})
    regions = [image for image in images if "###" in image]
    bboxes = []
    for region in regions:
        match = _REGION.search(region)
        if match is None:
            raise BadRow(f"no region [x1, y1, x2, y2] after ### in {region!r}")
        bboxes.append([float(number) if "." in number else int(number) for number in match.groups()])
    *prompt, reply = messages
    if regions:
        question = next((message for message in messages if message["role"] == "user"), None)
        if question is None:
            raise BadRow("no turn of the human")
        prompt = [{**question, "content": _REGION_REQUEST.sub("", question["content"])}]
    others = {name: value for name, value in record.items() if name not in ("image", "conversations")}
    whole = [image for image in images if "###" not in image]
    return _row(prompt, reply, reply["content"], whole, {**others, "bboxes": bboxes})


def _mulberry(record: dict[str, Any]) -> dict[str, Any]:
    """{"messages": [user with <image>, assistant ending in "### The final answer is:"], "images": path or paths}"""
    messages = record.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadRow("`messages` must be a list of at least two messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow("a message must have `role` and a text `content`")
    *prompt, reply = messages
    found = list(_FINAL.finditer(reply["content"]))
    answer = reply["content"][found[-1].end() :].strip() if found else ""
    if len(answer) > 1 and answer[0] == answer[-1] and answer[0] in "'\"":
        answer = answer[1:-1].strip()
    if not answer:
        raise BadRow("the assistant's text has no final answer after 'The final answer is:'")
    others = {name: value for name, value in record.items() if name not in ("messages", "images")}
    return _row(prompt, reply, answer, _paths(record.get("images")), others)


def _row(
    prompt: list[dict[str, Any]], reply: dict[str, Any], answer: str, images: list[str], columns: dict[str, Any]
) -> dict[str, Any]:
    if reply.get("role") != "assistant":
        raise BadRow("the last turn is not the model's")
    content = [{**message, "content": _parts(message["content"])} for message in prompt]
    return {"prompt": content, "images": images, "answer": answer.strip(), "completion": reply["content"], **columns}


def _paths(value: Any) -> list[str]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise BadRow("the images must be a path or a list of paths")
    return paths


def _parts(text: str) -> list[dict[str, Any]]:
    """Text with <image> marks as parts, without the line break that follows a mark."""
    first, *rest = text.split(IMAGE_MARK)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first.strip() else []
    for piece in rest:
        parts.append({"type": "image"})
        piece = piece.removeprefix("\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def _records(source: Path) -> Iterator[tuple[str, Any]]:
    """Each record's id and content, or a BadRow in its place."""
    found = find_source(source, "train", streaming=True)
    if not isinstance(found, JsonLines) and not isinstance(getattr(found, "rows", None), JsonArray):
        raise BadDataError(f"{source} is neither a JSON array nor JSON Lines, the layouts that are converted")
    for number, record in found.stream():
        yield found.row_id(number), record


def _convert(
    source: str | Path,
    out_jsonl: str | Path,
    image_root: str | Path,
    convert: Callable[[dict[str, Any]], dict[str, Any]],
    strict: bool,
    max_bad_rows: int | None,
    limit: int | None,
) -> int:
    source, out, root = Path(source), Path(out_jsonl), Path(image_root)
    if not root.is_dir():
        raise BadDataError(f"no such folder of images: {root}")
    if not source.is_file():
        raise BadDataError(f"no such file: {source}")
    base = os.path.relpath(root.absolute(), out.absolute().parent)
    reports = Reports(source.name, strict, max_bad_rows)
    written = 0
    with files.replacing(out) as partial:
        with partial.open("wb") as file:
            for row_id, record in tqdm(_records(source), desc=f"converting {source.name}", unit=" rows", delay=2):
                try:
                    if isinstance(record, BadRow):
                        raise record
                    if not isinstance(record, dict):
                        raise BadRow(f"a record must be an object, not {type(record).__name__}")
                    row = convert(record)
                    for image in row["images"]:
                        if not (root / image.lstrip("/")).is_file():
                            raise BadRow(f"no such image: {root / image.lstrip('/')}")
                    row["images"] = [Path(base, image.lstrip("/")).as_posix() for image in row["images"]]
                    read_row(row)
                except BadRow as error:
                    reports.add(row_id, str(error))
                    continue
                file.write(jsonl.dumps([row]))
                written += 1
                if written == limit:
                    break
        if not written:
            raise BadDataError(f"{source.name} has no good row ({reports.count} bad)")
    return written


CONVERTERS = {"visual-cot": convert_visual_cot, "mulberry": convert_mulberry}


def main(arguments: list[str] | None = None) -> int:
    """`python -m vismem.data.converters LAYOUT SOURCE OUT --image-root DIR`"""
    parser = argparse.ArgumentParser(prog="python -m vismem.data.converters", description=__doc__.split("\n")[0])
    parser.add_argument("layout", choices=CONVERTERS)
    parser.add_argument("source", help="the published JSON or JSON Lines file")
    parser.add_argument("out", help="the JSON Lines file to write")
    parser.add_argument("--image-root", required=True, metavar="DIR", help="the folder that image paths start from")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    parser.add_argument(
        "--max-bad-rows", type=int, default=10, metavar="N", help="how many are skipped; -1 for any number"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="write at most N rows")
    options = parser.parse_args(arguments)
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
        parser.exit(1, f"error: {error}\n")
    print(f"{written} rows written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
