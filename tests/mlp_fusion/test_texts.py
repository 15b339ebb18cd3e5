"""One reader for `--text`, `--calibration` and `--train`; and all of a long document counts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

import checkpoints as ck
import mlp_fusion
from families import tiny_model
from mlp_fusion import InputError
from mlp_fusion.calibration.text import calibration_batches
from mlp_fusion.finetuning.data import class_names
from mlp_fusion.running.rows import read_rows, read_texts
from mlp_fusion.store.tokenizers import tokenize

TEXTS = ["a cat", "the cat sat"]
FORMS = {
    "plain.txt": "a cat\n\nthe cat sat\n",
    "mark.txt": "\ufeffa cat\r\nthe cat sat",
    "no_suffix": "a cat\n  the cat sat  \n",
    "bare.tsv": "a cat\t1\n\nthe cat sat\t0\n",
    "header.tsv": "\ufefflabel\tsentence\n1\ta cat\n0\tthe cat sat\n",
    "upper.TSV": "Label\tText\n1\ta cat\n0\tthe cat sat\n",
    "one_column.tsv": "text\na cat\nthe cat sat\n",
    "bare.csv": "a cat,1\nthe cat sat,0\n",
    "header.csv": '\ufefflabel,text\r\n1,"a cat"\r\n0,the cat sat\r\n',
    "semicolons.csv": "label;text\n1;a cat\n0;the cat sat\n",
    "rows.jsonl": '{"label": 1, "text": "a cat"}\n\n{"label": 0, "text": "the cat sat"}\n',
    "mark.jsonl": '\ufeff{"text": "a cat"}\n{"text": " "}\n{"text": "the cat sat"}\n',
    "rows.ndjson": '{"Sentence": "a cat"}\n{"Sentence": "the cat sat"}',
    "list.json": '[{"content": "a cat"},\n {"content": "the cat sat"}]',
}


def write(folder: Path, name: str, content: str) -> Path:
    file = folder / name
    file.write_bytes(content.encode())
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = ck.save_tiny(tmp_path_factory.mktemp("model") / "bert")
    return ck.add_tokenizer(folder, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_texts(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, name, FORMS[name])
    assert read_texts(file, limit=9) == TEXTS
    assert read_texts(str(file), limit=1) == TEXTS[:1]


def test_every_form_calibrates_and_measures_alike(model: Path, tmp_path: Path) -> None:
    loaded = transformers.AutoModel.from_pretrained(model)
    expected = calibration_batches(TEXTS, loaded)
    # Eight words are known to the tokenizer: what is no text would be <unk>, 3.
    forms: list[Any] = [write(tmp_path, name, content) for name, content in FORMS.items()]
    records = [{"label": 1, "text": text} for text in TEXTS]
    streamed = type("Streamed", (list,), {"column_names": None})(records)
    for form in [*forms, records, streamed]:
        (batch,) = calibration_batches(form, loaded)
        assert batch["input_ids"].tolist() == expected[0]["input_ids"].tolist()  # type: ignore[index]
        assert int((batch["input_ids"] == 3).sum()) == 0
    table = tmp_path / "header.csv"
    report = mlp_fusion.compress(model, tmp_path / "out", 16, text=table, calibration=table)
    assert report.sample_rows == 5
    assert report.calibration is not None
    assert report.calibration.tokens == 5


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("numbers.tsv", "1\ta cat\n0\tthe cat sat\n", "first column holds labels"),
        ("numbers.tsv", "1\tcat\n0\tsat\n", "first column holds labels"),
        ("numbers.csv", "1,a cat\n", "first column holds labels"),
        ("words.tsv", "good\ta cat\nbad\tsat\n", "first column holds labels"),
        ("words.csv", "good,x,a cat\n", "first column holds labels"),
        ("chat.jsonl", '{"messages": [{"role": "user"}]}', "its columns are messages: it needs one of text"),
        ("chat.jsonl", '{"text": ["a", "b"]}', "row 1: 'text' is a list, no text"),
        ("half.jsonl", '{"text": "a"}\n{"sentence": "b"}', "row 2: no 'text'"),
        ("broken.jsonl", '{"text": "a"}\n{"text', "line 2: not JSON"),
        ("deep.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("broken.json", '[{"text": "a"}', "not JSON"),
        ("strings.json", '["a"]', "not a list of JSON objects"),
        ("open.csv", 'text,label\n"a cat,1\n', "not CSV"),
        ("uneven.csv", "text,label\na,b,1\n", "line 2: 3 fields, where the header has 2"),
        ("blank.tsv", "text\tlabel\n \t1\n", "no text in it"),
        ("only.tsv", "\tonly a label\n", "no text in it"),
    ],
)
def test_what_holds_no_texts_is_refused(name: str, content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_texts(write(tmp_path, name, content), limit=9)
    assert "\n" not in str(caught.value)


def test_numbers_and_single_words_may_be_texts(tmp_path: Path) -> None:
    assert read_texts([{"text": 7}], limit=9) == ["7"]
    assert read_texts(write(tmp_path, "sums.tsv", "12\t1\n7\t0\n"), limit=9) == ["12", "7"]
    assert read_texts(write(tmp_path, "words.tsv", "cat\tgood\nsat\tbad\n"), limit=9) == ["cat", "sat"]


def test_long_fields_and_quoted_line_ends(tmp_path: Path) -> None:
    long = "the cat " * 20_000
    assert read_texts(write(tmp_path, "long.tsv", f"{long}\t1\n"), limit=9) == [long.strip()]
    before = csv.field_size_limit()
    assert read_texts(write(tmp_path, "long.csv", f'text,label\n"{long}, a\ncat",1\n'), limit=9) == [f"{long}, a\ncat"]
    assert csv.field_size_limit() == before
    rows = read_rows(tmp_path / "long.csv", labelled=True)
    assert (rows.texts, rows.labels) == ([f"{long}, a\ncat"], ["1"])


def test_the_rest_of_a_stream_is_not_read() -> None:
    def endless() -> Any:
        while True:
            yield {"text": "a cat"}

    assert read_texts(endless(), limit=3) == ["a cat"] * 3


def test_names_of_a_datasets_classes_are_its_labels() -> None:
    feature = SimpleNamespace(names=["positive", "negative", "neither"])
    data: Any = type("Labelled", (list,), {"column_names": ["text", "label"], "features": {"label": feature}})
    rows = read_rows(data([{"text": "a", "label": 1}, {"text": "b", "label": 0}]), labelled=True)
    assert rows.labels == ["negative", "positive"]
    # In the dataset's order, the one that does not occur included.
    assert class_names(rows) == ["positive", "negative", "neither"]
    with pytest.raises(InputError, match="row 1: label -1 is none of 0 to 2"):
        read_rows(data([{"text": "a", "label": -1}]), labelled=True)


@pytest.mark.parametrize("special", ["around", "none"])
def test_all_of_a_document_on_one_line_counts(special: str, tmp_path: Path) -> None:
    if special == "none":
        folder = ck.add_tokenizer(tmp_path, pad_token="<pad>")
    else:
        # A tokenizer without a fast form, which puts one token behind every text.
        tokenizer = transformers.ByT5Tokenizer()
        tokenizer.save_pretrained(tmp_path)
        folder = tmp_path
    document = "the cat sat a " * 100
    batches = tokenize(folder, ["a cat", document.strip()], 40)
    assert batches is not None
    sequences = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert max(map(len, sequences)) == 38
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    whole = tokenizer(document.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if special == "none" else [tokenizer.eos_token_id]
    assert [i for ids in sequences[1:] for i in ids[: len(ids) - len(end)]] == whole
    assert all(ids[len(ids) - len(end) :] == end for ids in sequences)


def test_a_document_calibrates_with_all_its_tokens(model: Path, tmp_path: Path) -> None:
    document = write(tmp_path, "document.jsonl", json.dumps({"text": "the cat sat a " * 100}))
    report = mlp_fusion.compress(model, tmp_path / "out", 16, calibration=document, text=document)
    assert report.calibration is not None
    assert (report.calibration.tokens, report.sample_rows) == (400, 400)


def test_texts_without_tokens_are_left_out(tmp_path: Path) -> None:
    folder = ck.add_tokenizer(tmp_path, pad_token="<pad>")
    batches = tokenize(folder, ["a cat", " "], 40)
    assert batches is not None
    assert [len(batch["input_ids"]) for batch in batches] == [1]
    with pytest.raises(InputError, match=f"{folder}: the tokenizer makes no token of the text"):
        tokenize(folder, [" "], 40)


def test_positions_begin_at_the_text(tmp_path: Path) -> None:
    """Whatever side a tokenizer pads on by itself."""
    folder = ck.add_tokenizer(tmp_path, pad_token="<pad>", padding_side="left")
    batches = tokenize(folder, ["a cat", "the cat sat"], tiny_model("gpt2").config.n_positions)
    assert batches is not None
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
