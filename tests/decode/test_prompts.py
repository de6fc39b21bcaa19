"""Prompts files of every kind, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eclipse.decode.prompts import GENERAL_PROMPTS, default_prompts, prompts_of, read_prompts, typed
from eclipse.lab.shapes import CATEGORIES
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import UsageError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_lines_with_byte_order_mark_and_any_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", b"\xef\xbb\xbfa dog\r\n  eine K\xc3\xb6nigin \nlast\n\n\n")
    prompts = read_prompts(path)
    assert [p.text for p in prompts] == ["a dog", "eine Königin", "last"]
    assert [p.name for p in prompts] == ["00000", "00001", "00002"]


def test_geneval_metadata_comes_back_whole(tmp_path: Path) -> None:
    entry = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", json.dumps(entry) + "\n"))
    assert (prompt.text, prompt.category, prompt.metadata) == ("two dogs", "counting", entry)


def test_parti_prompts_with_bare_quotation_marks(tmp_path: Path) -> None:
    table = 'Prompt\tCategory\tNote\na sign that says "Hi\tArts\t\n"so it goes" in red\tWorld\t\n'
    prompts = read_prompts(write(tmp_path / "p.tsv", table))
    assert [p.text for p in prompts] == ['a sign that says "Hi', '"so it goes" in red']
    assert [p.category for p in prompts] == ["Arts", "World"]


def test_csv_with_quoted_commas(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "p.csv", 'level,prompt\n1,"a cat, a dog"\n2,one\n'))
    assert [p.text for p in prompts] == ["a cat, a dog", "one"]


def test_a_folder_of_one_prompt_files_keeps_their_names(tmp_path: Path) -> None:
    write(tmp_path / "beta.txt", "second line one\nline two\n")
    write(tmp_path / "alpha.txt", "first")
    prompts = read_prompts(tmp_path)
    assert [(p.name, p.text) for p in prompts] == [("alpha", "first"), ("beta", "second line one line two")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", b"a\r\n\r\n \t\r\nb\r\n"),
        ("p.jsonl", b'{"prompt": "a"}\n\n  \n{"prompt": "b"}\n'),
        ("p.csv", b"\nPrompt,Level\na,1\n\n  \nb,2\n"),
        ("p.tsv", b"Prompt\na\n\n\nb\n"),
    ],
)
def test_blank_lines_are_skipped_and_names_keep_the_lines_number(tmp_path: Path, name: str, content: bytes) -> None:
    prompts = read_prompts(write(tmp_path / name, content))
    assert [(p.text, p.name) for p in prompts] == [("a", "00000"), ("b", "00003")]


def test_a_surrogate_pair_in_json_is_one_character(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", '{"prompt": "\\ud83d\\ude00 smiles"}\n'))
    assert prompt.text == "😀 smiles"


@pytest.mark.parametrize(
    ("name", "content", "what", "line"),
    [
        ("p.txt", b"fine\nbr\xfcken\n", "not UTF-8", 2),
        ("p.txt", "fine\n" + "x" * 2001 + "\n", "2,001 characters", 2),
        ("p.txt", "a\x00b\n", r"control character \(U\+0000\)", 1),
        ("p.txt", "fine\na\u0085b\n", r"control character \(U\+0085\)", 2),
        ("p.txt", "fine\na\u2028b\n", r"line separator \(U\+2028\)", 2),
        ("p.jsonl", '{"prompt": "a \\ud800"}\n', r"lone surrogate, U\+D800", 1),
        ("p.jsonl", '{"prompt": "a", "tag": "\\udc00"}\n', r"lone surrogate, U\+DC00", 1),
        ("p.jsonl", '{"prompt": "a"}\n' + "[" * 100_000 + "\n", "nested too deeply", 2),
        ("p.jsonl", '{"prompt": "a", "n": ' + "1" * 5000 + "}\n", "too many digits", 1),
        ("p.csv", "prompt," + "x" * 200_000 + "\n", "not a table", 1),
        ("p.csv", "\n\nlevel\n1\n", "no column 'Prompt'", 3),
        ("p.csv", "prompt,level\na,1\n\n,\n", "an empty prompt", 4),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "not JSON", 2),
        ("p.jsonl", '{"prompt": "a"}\n["b"]\n', 'no "prompt" text', 2),
        ("p.jsonl", '{"prompt": 7}\n', 'no "prompt" text', 1),
        ("p.tsv", "Text\tCategory\na\tb\n", "no column 'Prompt'", 1),
        ("p.tsv", "Category\tPrompt\nArts\ta\nWorld\n", "1 fields, the header has 2", 3),
    ],
)
def test_a_line_that_is_no_prompt_is_named(
    tmp_path: Path, name: str, content: str | bytes, what: str, line: int
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError, match=what) as error:
        read_prompts(path)
    assert error.value.where == f"{path}:{line}"
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("name", "what"), [("none.txt", "no such"), ("p.docx", "unknown kind"), ("e.txt", "no p")])
def test_a_file_that_holds_no_prompts_is_named(tmp_path: Path, name: str, what: str) -> None:
    write(tmp_path / "p.docx", "x")
    write(tmp_path / "e.txt", "\n\n")
    with pytest.raises(UsageError, match=what) as error:
        read_prompts(tmp_path / name)
    assert error.value.where == str(tmp_path / name)


def test_texts_are_checked_too() -> None:
    assert [p.text for p in prompts_of(["a dog"])] == ["a dog"]
    with pytest.raises(UsageError, match="empty") as error:
        prompts_of(["a dog", " "])
    assert error.value.where == "prompt 1"


def test_default_prompts_of_the_shapes_world_cover_every_category_and_split() -> None:
    card = Card.load("shapes")
    prompts = default_prompts(card, 2)
    assert {(p.category, p.split) for p in prompts} == {(c, s) for c in CATEGORIES for s in ("seen", "unseen")}
    assert len(prompts) == 24
    assert all(p.wanted is not None and p.wanted.text == p.text for p in prompts)
    other = card.model_copy(update={"source": Card.load("coco").source})
    assert [p.text for p in default_prompts(other, 2)] == list(GENERAL_PROMPTS)


def test_a_column_by_name_as_in_hrs(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "level,synthetic_prompt\n1,a red dog\n")
    assert [p.text for p in read_prompts(path, column="synthetic_prompt")] == ["a red dog"]
    with pytest.raises(UsageError) as caught:
        read_prompts(path)
    assert "--prompt-column: level, synthetic_prompt" in str(caught.value.hint)
    with pytest.raises(UsageError, match="has columns"):
        read_prompts(write(tmp_path / "p.txt", "a dog"), column="x")


def test_what_is_typed_is_a_file_or_one_prompt(tmp_path: Path) -> None:
    assert typed([]) is None
    assert typed(["a red cube"]) == ["a red cube"]
    assert typed(["x" * 300]) == ["x" * 300]  # longer than any file's name
    path = write(tmp_path / "p.txt", "a dog")
    assert typed([str(path)]) == path and typed([str(tmp_path)]) == tmp_path
    with pytest.raises(UsageError, match="no such prompts file"):
        typed(["promts.txt"])
    with pytest.raises(UsageError) as caught:
        typed(["a", "red", "cube"])
    assert 'eclipse render "a red cube"' in str(caught.value.hint)
