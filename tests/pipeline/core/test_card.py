"""Data cards: those that ship are whole, fingerprints follow what stages read, mistakes are named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from eclipse.pipeline.core.card import BUILT_ON, MODELS, STAGES, Card, keys, resolve
from eclipse.pipeline.core.card_file import RENAMED, card_names
from eclipse.pipeline.core.errors import UsageError
from eclipse.pipeline.core.source import ShapesSource, UrlSource
from pydantic import BaseModel

MINIMAL = """
name: mine
source: {kind: urls, urls: list.csv}
encoder: {model: ViT-B-32, pretrained: openai}
decoder: {path: some/decoder}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "card.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["shapes", "coco", "cc3m", "cc12m", "laion_highres"])
def test_shipped_cards_load_and_survive_a_round_trip(name: str, tmp_path: Path):
    assert name in card_names()
    card = Card.load(name)
    assert card.name == name and card.title and card.description and card.licence
    card.dump(tmp_path / "eclipse.yaml")
    again = Card.load(tmp_path / "eclipse.yaml")
    assert again == card and again.fingerprint("evaluate") == card.fingerprint("evaluate")


def test_every_key_is_documented():
    pending: list[type[BaseModel]] = [Card]
    for section in pending:
        for name, field in section.model_fields.items():
            marked = (field.annotation, *getattr(field.annotation, "__args__", ()))
            kinds = [kind for mark in marked if isinstance(kind := getattr(mark, "__origin__", mark), type)]
            inner = [kind for kind in kinds if issubclass(kind, BaseModel)]
            pending.extend(inner)
            assert inner or field.description, f"{section.__name__}.{name}"
    assert len(pending) > 8


def test_a_fingerprint_covers_the_keys_that_decide_a_stage_and_those_before_it(tmp_path: Path):
    base = Card.load(write(tmp_path, MINIMAL))
    titled = Card.load(write(tmp_path, MINIMAL + "title: other words\n"))
    trained = Card.load(write(tmp_path, MINIMAL + "train: {lambda: 0.4}\n"))
    assert all(base.fingerprint(stage) == titled.fingerprint(stage) for stage in STAGES)
    assert [s for s in STAGES if base.fingerprint(s) != trained.fingerprint(s)] == ["train", "render", "evaluate"]
    assert base.differences(trained) == ["train.lambda: 0.2 → 0.4"]


def test_an_option_added_later_and_left_out_changes_no_fingerprint(tmp_path: Path):
    card = Card.load(write(tmp_path, MINIMAL))
    assert card.filter.min_side is None
    known_today = {key: value for key, value in card.filter.model_dump().items() if value is not None}
    canonical = json.dumps({"filter": known_today}, sort_keys=True, separators=(",", ":"))
    assert card.section_fingerprint("filter") == hashlib.sha256(canonical.encode()).hexdigest()


OTHER_VALUES = {
    "wandb": "project", "microbatch": 2, "expected_rows": 5, "contact": "mailto:a@b.org", "allow_hosts": ["10.0.0.0/8"],
}  # fmt: skip


@pytest.mark.parametrize("key", [f"{key.section}.{key.name}" for key in keys() if not key.decides])
def test_a_key_that_decides_nothing_makes_nothing_stale(tmp_path: Path, key: str):
    section, name = key.split(".")
    base = Card.load(write(tmp_path, MINIMAL))
    before = getattr(getattr(base, section), name)
    value = OTHER_VALUES.get(name, not before if isinstance(before, bool) else (before or 0) + 1)
    data = yaml.safe_load(MINIMAL)
    changed = Card.load(write(tmp_path, yaml.safe_dump({**data, section: {**data.get(section, {}), name: value}})))
    assert getattr(getattr(changed, section), name) == value != before
    assert all(base.fingerprint(stage) == changed.fingerprint(stage) for stage in STAGES)


def test_patience_speed_and_records_decide_nothing():
    named = {"timeout_s", "retries", "expected_rows", "microbatch", "resident", "wandb"}
    assert {*named, "checkpoint_every", "validate_every"} <= {key.name for key in keys() if not key.decides}


def test_what_a_stage_is_built_on_is_decided_before_it():
    decided = {key.section: key.decides for key in keys() if key.decides}
    assert decided["source"] == ("download",) and decided["decoder"] == ("render", "evaluate")
    assert {stage for stages in decided.values() for stage in stages} == set(STAGES)
    assert BUILT_ON["render"] == BUILT_ON["evaluate"] == "train"


def test_a_former_name_of_a_key_is_read_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RENAMED, "train", {"number_of_steps": "steps"})
    card, notes = Card.read(write(tmp_path, MINIMAL + "train: {number_of_steps: 7}\n"))
    assert card.train.steps == 7
    assert notes == ["card.yaml: train.number_of_steps is called train.steps now"]
    with pytest.raises(UsageError, match=r"unknown key train\.number_of_steps"):
        Card.load(write(tmp_path, MINIMAL + "train: {number_of_steps: 7, steps: 8}\n"))


def test_the_url_list_is_found_beside_a_users_card_and_in_the_workspace(tmp_path: Path):
    (tmp_path / "cards").mkdir()
    source = Card.load(write(tmp_path / "cards", MINIMAL)).source
    assert isinstance(source, UrlSource)
    assert source.paths(tmp_path / "ws") == [tmp_path / "cards" / "list.csv"]
    written = Card.load(tmp_path / "cards" / "card.yaml")
    written.dump(tmp_path / "eclipse.yaml")  # what `init` does: the full path travels
    assert Card.load(tmp_path / "eclipse.yaml") == written
    said = UrlSource.model_fields["urls"].description or ""
    assert "relative to the card's file" in said and "a shipped card's: to the workspace" in said
    shipped = Card.load("coco").source
    assert isinstance(shipped, UrlSource)
    assert shipped.paths(tmp_path / "ws") == [tmp_path / "ws" / "mscoco.parquet"]


def test_models_are_those_of_the_installation():
    assert resolve("local-dir:{models}/clip") == f"local-dir:{MODELS}/clip"
    assert (MODELS / "__init__.py").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("train: {stepz: 3}",), ["unknown key train.stepz", "did you mean steps?", "learning_rate"]),
        (("colour: red",), ["unknown key colour", "allowed: name, title"]),
        (("train: {steps: many}",), ["train.steps", "valid integer", "'many'"]),
        (("prior: {preset: huge}",), ["prior.preset", "'tiny', 'small', 'karlo', 'kandinsky22' or 'large'"]),
        (("train: {lambda: -1}",), ["train.lambda", "greater than or equal to 0"]),
        (("kind: urls", "kind: ftp"), ["source", "kind must be one of shapes, urls"]),
        (
            ("urls: list.csv", "uris: list.csv"),
            ["missing key source.urls", "unknown key source.uris", "did you mean urls?"],
        ),
        (("decoder: {path: some/decoder}", ""), ["missing key decoder"]),
        (("name: mine", "name: mine: yours"), ["not valid YAML"]),
        ((MINIMAL, "- a\n- b\n"), ["no mapping"]),
        (("list.csv", "[]"), ["source.urls: name a file, or a list of at least one, not []"]),
        (("list.csv", "''"), ["source.urls: name a file"]),
        (("list.csv", "[a.csv, ' ']"), ["source.urls: name a file"]),
        (("list.csv", "~nobody-of-this-name/a.csv"), ["source.urls: no home directory is known"]),
        (("train: {batch_size: 100000000000000000000, seed: 4294967296}",), ["train.batch_size", "train.seed"]),
        (("train: {steps: 0x" + "f" * 5000 + "}",), ["train.steps", "a number of thousands of digits"]),
        (("decoder: {path: some/decoder}", "decoder: {path: a/b, steps: 5000}"), ["decoder.steps", "equal to 1000"]),
        (("name: mine", "name: 2020-13-45"), ["month must be in 1..12", "line 2"]),
        (("train: {steps: " + "1" * 5000 + "}",), ["Exceeds the limit (4300 digits)", "line 6"]),
        (("title: !!int ''",), ["this is no value", "line 6"]),
        (("title: " + "[" * 20_000,), ["nested too deeply"]),
        (("name: other",), ["the key name stands here a second time", "line 6"]),
        (("train:\n  steps: 3\n  seed: 1\n  steps: 4",), ["the key steps stands here a second time", "line 9"]),
        (("name: mine", 'name: "a\\0b"'), ["cannot be written (U+0000)", "line 2"]),
        (('title: "\\ud800"',), ["cannot be written (U+D800)", "line 6"]),
    ],
)
def test_mistakes_name_file_key_and_what_is_allowed(tmp_path: Path, change: tuple[str, ...], said: list[str]):
    text = MINIMAL.replace(*change) if len(change) == 2 else MINIMAL + change[0] + "\n"
    with pytest.raises(UsageError) as caught:
        Card.load(write(tmp_path, text))
    for words in (*said, str(tmp_path / "card.yaml")):
        assert words in str(caught.value)


def floats() -> list[str]:
    """section.key of every number that may have a fraction."""
    sections = {**{n: f.annotation for n, f in Card.model_fields.items()}, "source": UrlSource}
    return [
        f"{section}.{field.alias or key}"
        for section, model in sections.items()
        if isinstance(model, type) and issubclass(model, BaseModel)
        for key, field in model.model_fields.items()
        if field.annotation in (float, float | None)
    ]


@pytest.mark.parametrize("key", floats())
def test_a_number_that_is_not_finite_is_refused_everywhere(tmp_path: Path, key: str):
    assert {"source.timeout_s", "train.lambda", "decoder.guidance_scale", "filter.min_aesthetic_score"} <= {*floats()}
    data = yaml.safe_load(MINIMAL)
    section, name = key.split(".")
    for value in (float("inf"), float("-inf"), float("nan")):
        changed = {**data, section: {**data.get(section, {}), name: value}}
        with pytest.raises(UsageError, match=f"{key}: Input should be a finite number"):
            Card.load(write(tmp_path, yaml.safe_dump(changed)))


def test_every_whole_number_is_bounded():
    sections = [ShapesSource, UrlSource, *(field.annotation for field in Card.model_fields.values())]
    for model in sections:
        for key, field in model.model_fields.items() if isinstance(model, type) and model is not str else ():
            if field.annotation in (int, int | None):
                assert any(hasattr(bound, "le") for bound in field.metadata), f"{model.__name__}.{key}"


def test_a_merged_key_is_no_second_one(tmp_path: Path):
    text = MINIMAL.replace("source: {", "source: &list {") + "evaluate: &a {seed: 1, rows: 9}\nrender: {seed: 2}\n"
    merged = text.replace("render: {seed: 2}", "x: &x {seed: 3}\nrender: {<<: *x, seed: 2}")
    with pytest.raises(UsageError, match="unknown key x"):  # and nothing else: `seed` overrides what is merged
        Card.load(write(tmp_path, merged))


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"(?s)unknown card 'shpes'.*did you mean shapes\?.*cc12m"):
        Card.load("shpes")
    with pytest.raises(UsageError, match="no such card file"):
        Card.load("here/none.yaml")


def bomb(levels: int, line: str) -> str:
    """A few hundred bytes of YAML whose aliases stand for 9 to the power of `levels` values."""
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{n}: &a{n} {line.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("line", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_multiply_are_refused_before_they_do(tmp_path: Path, line: str):
    text = MINIMAL + bomb(9, line).replace("a0: &a0 [1,1,1,1,1,1,1,1,1]", "a0: &a0 {b: 1, c: 2}")
    with pytest.raises(UsageError, match="aliases multiply") as caught:
        Card.load(write(tmp_path, text))
    assert len(str(caught.value)) < 1000
    with pytest.raises(UsageError, match="aliases multiply"):
        Card.load(write(tmp_path, MINIMAL + "title: &a [*a]\n"))


def test_hundreds_of_wrong_keys_make_a_short_message(tmp_path: Path):
    many = "".join(f"wrong{n}: {n}\n" for n in range(500))
    with pytest.raises(UsageError, match="500 keys are wrong") as caught:
        Card.load(write(tmp_path, MINIMAL + many))
    assert len(str(caught.value)) < 4000 and "and 488 more" in str(caught.value)


def test_a_file_of_megabytes_is_no_card(tmp_path: Path):
    with pytest.raises(UsageError, match="larger than"):
        Card.load(write(tmp_path, MINIMAL + "# " + "x" * 2_000_000))
