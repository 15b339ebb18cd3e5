"""Training data: every form it comes in, and what is wrong with it in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import checkpoints as ck
from mlp_fusion import InputError
from mlp_fusion.finetuning.data import Rows, class_names, labelled_examples, language_examples, read_rows

RECORDS: list[dict[str, Any]] = [{"text": "a cat", "label": 1}, {"text": "the cat sat", "label": 0}]
EXPECTED = (["a cat", "the cat sat"], None, ["1", "0"])


def parts(rows: Rows) -> tuple[Any, ...]:
    return rows.texts, rows.pairs, rows.labels


def write(folder: Path, name: str, content: str) -> Path:
    file = folder / name
    file.write_text(content, encoding="utf-8")
    return file


class Dataset(list):  # type: ignore[type-arg]
    """What `datasets.Dataset` offers of itself here."""

    column_names = ("text", "label")


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    forms = [
        write(tmp_path, "plain.tsv", "a cat\t1\nthe cat sat\t0\n"),
        write(tmp_path, "header.tsv", "label\ttext\n1\ta cat\n0\tthe cat sat\n"),
        write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, RECORDS))),
        str(tmp_path / "rows.jsonl"),
        RECORDS,
        Dataset(RECORDS),
    ]
    for form in forms:
        assert parts(read_rows(form, labelled=True)) == EXPECTED


def test_pairs_of_texts(tmp_path: Path) -> None:
    expected = (["a"], ["the"], ["yes"])
    assert parts(read_rows(write(tmp_path, "p.tsv", "a\tthe\tyes\n"), labelled=True)) == expected
    glue = [{"sentence1": "a", "sentence2": "the", "label": "yes"}]
    assert parts(read_rows(glue, labelled=True)) == expected
    named = [{"premise": "a", "hypothesis": "the", "label": "yes"}]
    assert parts(read_rows(named, labelled=True, columns=["premise", "hypothesis"])) == expected
    header = write(tmp_path, "h.tsv", "premise\thypothesis\tlabel\na\tthe\tyes\n")
    assert parts(read_rows(header, labelled=True, columns=["premise", "hypothesis"])) == expected


def test_quotes_and_odd_line_ends_are_text(tmp_path: Path) -> None:
    file = write(tmp_path, "q.tsv", 'a "cat\t1\nthe\x0bcat\u2028sat\t0\n')
    assert read_rows(file, labelled=True).texts == ['a "cat', "the\x0bcat\u2028sat"]


def test_text_for_language_models(tmp_path: Path) -> None:
    assert parts(read_rows(write(tmp_path, "t.txt", "a\n\ncat\n"), labelled=False)) == (["a\n\ncat\n"], None, None)
    assert read_rows(write(tmp_path, "t.tsv", "a cat\t1\nthe\t0\n"), labelled=False).texts == ["a cat", "the"]
    assert parts(read_rows(RECORDS, labelled=False)) == (EXPECTED[0], None, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.tsv", None, "no such file"),
        ("empty.tsv", "\n \n", "no text in it"),
        ("bad.jsonl", '{"text": "a", "label": 1}\n{"text"', "line 2: not JSON"),
        ("list.jsonl", "[1]", "line 1: not a JSON object"),
        ("wide.tsv", "a\tb\tc\td\n", "4 fields a line"),
        ("uneven.tsv", "a\t1\nb\n", "line 2: 1 fields, where the first line has 2"),
        ("uneven.tsv", "text\tlabel\nb\n", "line 2: 1 fields, where the header has 2"),
        ("words.txt", "a cat", "labelled data comes as"),
        ("columns.jsonl", '{"words": "a", "label": 1}', "its columns are words, label: it needs one of text"),
        ("unlabelled.jsonl", '{"text": "a"}', "it needs a column named label"),
        ("hole.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": null}', "row 2: no 'label'"),
        ("late.jsonl", '\n\n{"text": "a", "label": 1}\n\n{"text"', "line 5: not JSON"),
        ("late.tsv", "\na\t1\n\nb\n", "line 4: 1 fields"),
        ("late.tsv", "\ntext\tlabel\n\nb\n", "line 4: 1 fields"),
        ("fraction.jsonl", '{"text": "a", "label": 0.5}', "not regression"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    file = tmp_path / name if content is None else write(tmp_path, name, content)
    with pytest.raises(InputError, match=message):
        read_rows(file, labelled=True)


def test_rows_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="no text in it"):
        read_rows([], labelled=True)
    with pytest.raises(InputError, match="3 text columns"):
        read_rows(RECORDS, labelled=True, columns=["a", "b", "c"])
    splits = Dataset(RECORDS)
    splits.column_names = {"train": ["text"], "test": ["text"]}  # type: ignore[assignment]
    with pytest.raises(InputError, match="choose one of its splits"):
        read_rows(splits, labelled=True)


def test_classes_are_sorted() -> None:
    # `01` and `1` are one number, and digits of other kinds are no numbers.
    for _ in range(3):
        assert class_names(Rows("x", [], None, ["1", "001", "01", "0"])) == ["0", "001", "01", "1"]
    assert class_names(Rows("x", [], None, ["\u00b2", "1"])) == ["1", "\u00b2"]
    assert class_names(Rows("x", [], None, ["10", "9", "-1", "9"])) == ["-1", "9", "10"]
    assert class_names(Rows("x", [], None, ["no", "10", "9"])) == ["10", "9", "no"]
    with pytest.raises(InputError, match="only one class"):
        class_names(Rows("x", [], None, ["1", "1"]))
    assert class_names(Rows("x", [], None, ["1.0", "0.0", "v1.5"])) == ["0.0", "1.0", "v1.5"]
    with pytest.raises(InputError, match=r"x: label 0\.25 is a fraction: this is classification, not regression"):
        class_names(Rows("x", [], None, ["1.0", "3.75", "0.25"]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(
        ck.add_tokenizer(tmp_path_factory.mktemp("tokenizer"), pad_token="<pad>", eos_token="</s>")
    )


def test_examples_are_cut_and_labelled(tokenizer: Any) -> None:
    rows = Rows("x", ["the cat sat", "a"], None, ["b", "a"])
    found = labelled_examples(rows, tokenizer, {"a": 0, "b": 1}, 2)
    assert [(e["input_ids"], e["labels"]) for e in found] == [([4, 6], 1), ([5], 0)]
    with pytest.raises(InputError, match="row 1: label 'b' is none of a"):
        labelled_examples(rows, tokenizer, {"a": 0}, 2)


def test_texts_are_put_end_to_end(tokenizer: Any) -> None:
    rows = Rows("x", ["the cat sat", "a", "the the"])
    found = language_examples(rows, tokenizer, 4)
    assert [e["input_ids"].tolist() for e in found] == [[4, 6, 7, 2], [5, 2, 4, 4]]
    assert [e["labels"].tolist() for e in found] == [[4, 6, 7, 2], [5, 2, 4, 4]]
    assert [e["input_ids"].tolist() for e in language_examples(rows, tokenizer, 99)] == [[4, 6, 7, 2, 5, 2, 4, 4, 2]]
    with pytest.raises(InputError, match="fewer than two tokens"):
        language_examples(Rows("x", [""]), tokenizer, 4)


def test_a_text_without_tokens_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="x, row 2: there is no token"):
        labelled_examples(Rows("x", ["a", " "], None, ["a", "a"]), tokenizer, {"a": 0}, 4)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert parts(read_rows(write(tmp_path, "b.tsv", "\ufefflabel\ttext\n1\ta cat\n"), labelled=True)) == (
        ["a cat"], None, ["1"],
    )  # fmt: skip


def test_language_models_read_one_text_a_row() -> None:
    row = {"sentence1": "a", "sentence2": "the"}
    assert parts(read_rows([row], labelled=False)) == (["a"], None, None)
    with pytest.raises(InputError, match="pairs of texts are for classification"):
        read_rows([row], labelled=False, columns=["sentence1", "sentence2"])
