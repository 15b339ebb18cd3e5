"""Training data in the forms that people have it in: `.tsv`, `.jsonl`, plain text, or a `datasets` dataset."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.calibration.text import TEXT_COLUMNS
from mlp_fusion.errors import InputError

Data = str | Path | Iterable[Mapping[str, Any]]

LABEL_COLUMNS = ("label", "labels")
_PAIR_COLUMNS = ("sentence2", "text_pair")


@dataclass(frozen=True)
class Rows:
    """Texts as read, nothing tokenised.

    Attributes:
        source: where they come from, for messages.
        texts: one per row.
        pairs: second texts, or None.
        labels: one per row as text, or None where none were asked for.
    """

    source: str
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[str] | None = None


def read_rows(data: Data, *, labelled: bool, columns: Sequence[str] | None = None) -> Rows:
    """Read training or evaluation data.

    Args:
        data: a file, or rows. `.jsonl`: one object a line. `.tsv`: with a header that names a label column, or without,
            its fields then being text and label, or text, second text and label (without labels: the text alone). Any
            other file, for language modelling only: plain text. Rows: a dataset of the `datasets` library, or any
            iterable of mappings.
        labelled: whether rows have to have a label.
        columns: names of the text's column, or, of labelled data, of both texts' columns; None to look for `text`,
            `sentence` or `content`, and, in labelled data, for a second text in `sentence2` or `text_pair`.

    Raises:
        InputError: it cannot be read, a column is missing, or there is no text in it.
    """
    if not isinstance(data, (str, Path)):
        names = getattr(data, "column_names", None)
        if isinstance(names, Mapping):
            raise InputError(f"the data is a dictionary of datasets: choose one of its splits ({', '.join(names)})")
        return _from_records("the dataset", list(data), labelled, columns)
    file = Path(data).expanduser()
    try:
        # Not `splitlines`: texts may hold other characters that it takes for the end of a line.
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    numbered = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    numbers, lines = [n for n, _ in numbered], [line for _, line in numbered]
    if not lines:
        raise InputError(f"{file}: no text in it")
    if file.suffix == ".jsonl":
        return _from_records(str(file), [_parse(file, n, line) for n, line in numbered], labelled, columns)
    if file.suffix == ".tsv":
        fields = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        if set(fields[0]) & {*LABEL_COLUMNS, *(columns or ())}:
            width = len(fields[0])
            for number, row in zip(numbers[1:], fields[1:], strict=True):
                if len(row) != width:
                    raise InputError(f"{file}, line {number}: {len(row)} fields, where the header has {width}")
            records = [dict(zip(fields[0], row, strict=True)) for row in fields[1:]]
            return _from_records(str(file), records, labelled, columns)
        return _from_fields(file, numbers, fields, labelled)
    if labelled:
        raise InputError(f"{file}: labelled data comes as .tsv or .jsonl")
    return Rows(str(file), [content])


def _parse(file: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{file}, line {number}: not a JSON object")
    return record


def _from_fields(file: Path, numbers: list[int], fields: list[list[str]], labelled: bool) -> Rows:
    if not labelled:
        return Rows(str(file), [row[0] for row in fields])
    width = len(fields[0])
    if width not in (2, 3):
        raise InputError(f"{file}: {width} fields a line: give text and label, or two texts and label, or a header")
    for number, row in zip(numbers, fields, strict=True):
        if len(row) != width:
            raise InputError(f"{file}, line {number}: {len(row)} fields, where the first line has {width}")
    pairs = [row[1] for row in fields] if width == 3 else None
    return Rows(str(file), [row[0] for row in fields], pairs, [row[-1].strip() for row in fields])


def _from_records(
    source: str, records: Sequence[Mapping[str, Any]], labelled: bool, columns: Sequence[str] | None
) -> Rows:
    if not records:
        raise InputError(f"{source}: no text in it")
    present = records[0].keys()
    if columns is None:
        found = [name for name in TEXT_COLUMNS if name in present][:1]
        # GLUE's pairs: sentence1 with sentence2.
        found = found or [name for name in ("sentence1",) if name in present]
        found += [name for name in _PAIR_COLUMNS if name in present][:1] if found and labelled else []
        if not found:
            raise InputError(
                f"{source}: its columns are {', '.join(present)}: it needs one of {', '.join(TEXT_COLUMNS)}, or say "
                "which column holds the text"
            )
    else:
        found = list(columns)
        if not 1 <= len(found) <= 2:
            raise InputError(f"{len(found)} text columns: name one or two")
        if len(found) == 2 and not labelled:
            raise InputError("2 text columns: pairs of texts are for classification; name one")
    label = next((name for name in LABEL_COLUMNS if name in present), None)
    if labelled and label is None:
        raise InputError(f"{source}: its columns are {', '.join(present)}: it needs a column named label")
    wanted = [*found, *([label] if labelled and label is not None else [])]
    for number, record in enumerate(records, 1):
        for name in wanted:
            if record.get(name) is None:
                raise InputError(f"{source}, row {number}: no {name!r}")
    texts, *rest = [[str(record[name]) for record in records] for name in found]
    labels = None if label is None or not labelled else [_label(source, record[label]) for record in records]
    return Rows(source, texts, rest[0] if rest else None, labels)


def _label(source: str, value: Any) -> str:
    if isinstance(value, float):
        raise InputError(f"{source}: label {value} is a fraction: this is classification, not regression")
    return str(value).strip()


def class_names(rows: Rows) -> list[str]:
    """The classes that occur, in numeric order where all are numbers.

    Raises:
        InputError: there are fewer than two.
    """
    names = set(rows.labels or ())
    if len(names) < 2:
        raise InputError(f"{rows.source}: only one class ({', '.join(names)}): there is nothing to learn")
    numeric = all(re.fullmatch(r"-?\d+", name) for name in names)
    # `1` and `01` are two names of one number: their order must not be that of a set.
    return sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names)


def labelled_examples(
    rows: Rows, tokenizer: Any, classes: Mapping[str, int], max_length: int
) -> list[dict[str, list[int] | int]]:
    """Tokenised rows with their class, unpadded.

    Raises:
        InputError: a label is none of `classes`, or there is no token in a text.
    """
    assert rows.labels is not None
    for number, label in enumerate(rows.labels, 1):
        if label not in classes:
            raise InputError(f"{rows.source}, row {number}: label {label!r} is none of {', '.join(classes)}")
    encoded = tokenizer(rows.texts, rows.pairs, truncation=True, max_length=max_length)
    for number, ids in enumerate(encoded["input_ids"], 1):
        if not ids:
            raise InputError(f"{rows.source}, row {number}: there is no token in its text")
    names = list(encoded)
    return [
        {**{name: encoded[name][i] for name in names}, "labels": classes[label]} for i, label in enumerate(rows.labels)
    ]


def language_examples(rows: Rows, tokenizer: Any, block: int) -> list[dict[str, Tensor]]:
    """Texts end to end, the tokenizer's end-of-text between them, cut into blocks of `block` tokens.

    What does not fill a block at the end is left out; text shorter than one block is one shorter block.

    Raises:
        InputError: there are fewer than two tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Long documents are meant here: the tokenizer's warning about its model's length would mislead.
    encoded = tokenizer(rows.texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = [token for ids in encoded for token in [*ids, *end]]
    if len(stream) < 2:
        raise InputError(f"{rows.source}: fewer than two tokens: there is nothing to predict")
    block = min(block, len(stream))
    ids = torch.tensor(stream[: len(stream) // block * block]).view(-1, block)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
