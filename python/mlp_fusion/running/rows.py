"""Text in the forms that people have it in: `.tsv`, `.csv`, `.jsonl`, plain text, or a `datasets` dataset.

The one reader for what is calibrated on, measured on and trained on.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mlp_fusion.errors import InputError

Data = str | Path | Iterable[Mapping[str, Any]]

TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels")
#: GLUE's pairs: sentence1 with sentence2.
_FIRST_COLUMN = "sentence1"
_PAIR_COLUMNS = ("sentence2", "text_pair")
_FORMS = "give UTF-8 text as .tsv, .csv, .jsonl, or plain, one a line"
#: Characters that a field of a .csv may have; Python's own limit of 131,072 is below what documents have.
_FIELD_CHARACTERS = 2**31 - 1


@dataclass(frozen=True)
class Rows:
    """Texts as read, nothing tokenised.

    Attributes:
        source: where they come from, for messages.
        texts: one per row.
        pairs: second texts, or None.
        labels: one per row as text, or None where none were asked for.
        classes: every label by its number, where the dataset says (a `ClassLabel` of the `datasets` library).
    """

    source: str
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[str] | None = None
    classes: list[str] | None = None


def read_rows(
    data: Data, *, labelled: bool, columns: Sequence[str] | None = None, limit: int | None = None
) -> Rows:  # fmt: skip
    """Read training, evaluation or calibration data.

    Args:
        data: a file, or rows. `.jsonl` (or `.ndjson`): one object a line; `.json`: a list of objects. `.tsv` and
            `.csv`: with a header that names a column of texts or labels, or without, its fields then being text and
            label, or text, second text and label (without labels: the text alone). Any other file, for unlabelled data
            only: plain text, all of it in one row. Rows: a dataset of the `datasets` library, or any iterable of
            mappings. Names of columns may be in upper or lower case.
        labelled: whether rows have to have a label.
        columns: names of the text's column, or, of labelled data, of both texts' columns; None to look for `text`,
            `sentence` or `content`, and, in labelled data, for a second text in `sentence2` or `text_pair`.
        limit: read the first rows only.

    Raises:
        InputError: it cannot be read, a column is missing or holds no texts, or there is no text in it.
    """
    if not isinstance(data, (str, Path)):
        names = getattr(data, "column_names", None)
        if isinstance(names, Mapping):
            raise InputError(f"the data is a dictionary of datasets: choose one of its splits ({', '.join(names)})")
        records = list(islice(data, limit))
        return _from_records("the dataset", records, labelled, columns, getattr(data, "features", None))
    file = Path(data).expanduser()
    content = _read(file)
    kind = file.suffix.lower()
    if kind in (".jsonl", ".ndjson", ".json"):
        return _from_records(str(file), _json_records(file, content, limit), labelled, columns)
    if kind in (".tsv", ".csv"):
        return _from_table(file, kind, content, labelled, columns, limit)
    if labelled:
        raise InputError(f"{file}: labelled data comes as .tsv, .csv or .jsonl")
    return Rows(str(file), [content])


def read_texts(data: Data, *, limit: int) -> list[str]:
    """The first `limit` texts of a file or dataset, blank ones left out: rows of a table, or lines of plain text.

    Raises:
        InputError: as :func:`read_rows`.
    """
    file = Path(data).expanduser() if isinstance(data, (str, Path)) else None
    if file is not None and file.suffix.lower() not in (".tsv", ".csv", ".json", ".jsonl", ".ndjson"):
        texts = _read(file).split("\n")
    else:
        texts = read_rows(data, labelled=False, limit=None if file is not None else limit).texts
    found = list(islice((text.strip() for text in texts if text.strip()), limit))
    if not found:
        raise InputError(f"{'the dataset' if file is None else file}: no text in it")
    return found


def _read(file: Path) -> str:
    try:
        # A byte-order mark is no text.
        content = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{file.absolute()} is a folder: name a file of texts") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error}): {_FORMS}") from error
    if not content.strip():
        raise InputError(f"{file}: no text in it")
    return content


def _json_records(file: Path, content: str, limit: int | None) -> list[Mapping[str, Any]]:
    if file.suffix.lower() == ".json" and content.lstrip().startswith("["):
        try:
            records = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}: not JSON ({error})") from error
        if not all(isinstance(record, dict) for record in records):
            raise InputError(f"{file}: not a list of JSON objects")
        return list(records[:limit])
    # Not `splitlines`: texts may hold other characters that it takes for the end of a line.
    lines = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [_parse(file, n, line) for n, line in lines[:limit]]


def _parse(file: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{file}, line {number}: not a JSON object")
    return record


def _from_table(
    file: Path, kind: str, content: str, labelled: bool, columns: Sequence[str] | None, limit: int | None
) -> Rows:
    known = {*TEXT_COLUMNS, *LABEL_COLUMNS, _FIRST_COLUMN, *_PAIR_COLUMNS, *(name.casefold() for name in columns or ())}
    for delimiter in ",;\t" if kind == ".csv" else "\t":
        numbers, fields = _fields(file, content, delimiter, quoted=kind == ".csv")
        if known & {name.strip().casefold() for name in fields[0]}:
            header = [name.strip() for name in fields[0]]
            for number, row in zip(numbers[1:], fields[1:], strict=True):
                if len(row) != len(header):
                    raise InputError(f"{file}, line {number}: {len(row)} fields, where the header has {len(header)}")
            records = [dict(zip(header, row, strict=True)) for row in fields[1:][:limit]]
            return _from_records(str(file), records, labelled, columns)
    numbers, fields = _fields(file, content, "," if kind == ".csv" else "\t", quoted=kind == ".csv")
    return _from_fields(file, numbers[:limit], fields[:limit], labelled)


def _fields(file: Path, content: str, delimiter: str, *, quoted: bool) -> tuple[list[int], list[list[str]]]:
    """Numbers of lines, and their fields; blank lines are left out."""
    if not quoted:
        lines = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
        return [n for n, _ in lines], [line.split(delimiter) for _, line in lines]
    numbers, fields = [], []
    with _long_fields():
        reader = csv.reader(io.StringIO(content), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if any(field.strip() for field in row):
                    numbers.append(reader.line_num)
                    fields.append(row)
        except csv.Error as error:
            raise InputError(f"{file}, line {reader.line_num}: not CSV ({error})") from error
    return numbers, fields


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_FIELD_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _from_fields(file: Path, numbers: list[int], fields: list[list[str]], labelled: bool) -> Rows:
    width = len(fields[0])
    if width > 1 and _labels_first([row[0] for row in fields], [row[-1] for row in fields]):
        raise InputError(
            f"{file}: its first column holds labels, it seems, and texts come first where there is no header: "
            f"give a header with the names {TEXT_COLUMNS[0]} and {LABEL_COLUMNS[0]}"
        )
    if not labelled:
        return Rows(str(file), [row[0] for row in fields])
    if width not in (2, 3):
        raise InputError(f"{file}: {width} fields a line: give text and label, or two texts and label, or a header")
    for number, row in zip(numbers, fields, strict=True):
        if len(row) != width:
            raise InputError(f"{file}, line {number}: {len(row)} fields, where the first line has {width}")
    pairs = [row[1] for row in fields] if width == 3 else None
    return Rows(str(file), [row[0] for row in fields], pairs, [row[-1].strip() for row in fields])


def _labels_first(first: Sequence[str], last: Sequence[str]) -> bool:
    """Whether the first of a table's columns holds numbers or single words, and the last one what is neither."""
    words = all(len(field.split()) == 1 for field in first) and any(len(field.split()) > 1 for field in last)
    return words or (_numbers(first) and not _numbers(last))


def _numbers(values: Iterable[str]) -> bool:
    return all(re.fullmatch(r"\s*[-+]?\d+(\.\d+)?\s*", value) for value in values)


def _from_records(
    source: str,
    records: Sequence[Mapping[str, Any]],
    labelled: bool,
    columns: Sequence[str] | None,
    features: Any = None,
) -> Rows:
    if not records:
        raise InputError(f"{source}: no text in it")
    # Whatever the case of a name, it is looked up as it is written.
    present = {str(name).strip().casefold(): name for name in records[0]}
    found = _text_columns(source, present, labelled, columns)
    label = next((present[name] for name in LABEL_COLUMNS if name in present), None)
    if labelled and label is None:
        raise InputError(f"{source}: its columns are {', '.join(present.values())}: it needs a column named label")
    wanted = [*found, *([label] if labelled and label is not None else [])]
    for number, record in enumerate(records, 1):
        for name in wanted:
            if record.get(name) is None:
                raise InputError(f"{source}, row {number}: no {name!r}")
            if name != label and not isinstance(record[name], (str, int, float)):
                kind = type(record[name]).__name__
                raise InputError(f"{source}, row {number}: {name!r} is a {kind}, no text: give a column of texts")
    texts, *rest = [[str(record[name]) for record in records] for name in found]
    pairs = rest[0] if rest else None
    if label is None or not labelled:
        return Rows(source, texts, pairs)
    classes = _class_names(features, label)
    labels = [_label(source, number, record[label], classes) for number, record in enumerate(records, 1)]
    return Rows(source, texts, pairs, labels, classes)


def _text_columns(
    source: str, present: Mapping[str, str], labelled: bool, columns: Sequence[str] | None
) -> list[str]:  # fmt: skip
    if columns is not None:
        if not 1 <= len(columns) <= 2:
            raise InputError(f"{len(columns)} text columns: name one or two")
        if len(columns) == 2 and not labelled:
            raise InputError("2 text columns: pairs of texts are for classification; name one")
        return [present.get(name.strip().casefold(), name) for name in columns]
    found = [present[name] for name in (*TEXT_COLUMNS, _FIRST_COLUMN) if name in present][:1]
    found += [present[name] for name in _PAIR_COLUMNS if name in present][:1] if found and labelled else []
    if not found:
        raise InputError(
            f"{source}: its columns are {', '.join(present.values())}: it needs one of "
            f"{', '.join(TEXT_COLUMNS)} for the text"
        )
    return found


def _class_names(features: Any, label: str) -> list[str] | None:
    """The names that a `ClassLabel` of the `datasets` library gives the numbers in a column."""
    feature = features.get(label) if isinstance(features, Mapping) else None
    names = getattr(feature, "names", None)
    return None if names is None else [str(name) for name in names]


def _label(source: str, number: int, value: Any, classes: Sequence[str] | None) -> str:
    if isinstance(value, float):
        raise InputError(f"{source}: label {value} is a fraction: this is classification, not regression")
    if classes is None or isinstance(value, str):
        return str(value).strip()
    if not 0 <= int(value) < len(classes):
        raise InputError(
            f"{source}, row {number}: label {value} is none of 0 to {len(classes) - 1}: leave unlabelled rows out"
        )
    return classes[int(value)]
