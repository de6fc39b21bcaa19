"""File names of every layout, as the public scorers read them; seeds that depend on the prompt alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from eclipse.decode.layouts import plan
from eclipse.decode.prompts import Prompt, prompts_of
from eclipse.pipeline.core.errors import UsageError

PROMPTS = prompts_of(["a red dog", "a cat / a hat"])


def paths(layout: str, samples: int) -> list[str]:
    prompts = [replace(p, metadata={"prompt": p.text, "tag": "colors", "include": []}) for p in PROMPTS]
    return [picture.path.as_posix() for picture in plan(layout, prompts, samples, seed=0)]


def test_geneval() -> None:
    assert paths("geneval", 2) == [
        "00000/samples/0000.png",
        "00000/samples/0001.png",
        "00001/samples/0000.png",
        "00001/samples/0001.png",
    ]


def test_t2i_compbench_numbers_run_on_and_prompts_make_safe_names() -> None:
    assert paths("t2i-compbench", 2) == [
        "samples/a red dog_000000.png",
        "samples/a red dog_000001.png",
        "samples/a cat   a hat_000002.png",
        "samples/a cat   a hat_000003.png",
    ]


@pytest.mark.parametrize("text", ["../../etc/passwd", ".hidden", "日本" * 400, "é" * 400, "x\\y"])
def test_no_prompt_escapes_its_folder_or_is_too_long(text: str) -> None:
    for layout in ("flat", "t2i-compbench") if len(text) < 400 else ("flat",):
        (picture,) = plan(layout, prompts_of([text]), 1, seed=0)
        name = picture.path.name
        assert picture.path.parts == ("samples", name)
        assert len(name.encode()) < 240
        assert not name.startswith(".")


def test_dpg_is_one_grid_of_four_a_prompt() -> None:
    prompts = [Prompt("a", "partiprompts1", own_file=True), Prompt("b", "drawtext2", own_file=True)]
    pictures = plan("dpg", prompts, 4, seed=0)
    assert [p.path.as_posix() for p in pictures] == ["samples/partiprompts1.png", "samples/drawtext2.png"]
    assert [len(p.seeds) for p in pictures] == [4, 4]
    with pytest.raises(UsageError, match="2×2 grid"):
        plan("dpg", prompts, 1, seed=0)
    with pytest.raises(UsageError, match=r"written to same\.png"):
        plan("dpg", [Prompt("a", "same", own_file=True), Prompt("b", "same", own_file=True)], 4, seed=0)


@pytest.mark.parametrize(
    ("layout", "text", "said"),
    [
        ("geneval", "a dog", "needs `tag` and `include`"),
        ("t2i-compbench", "a snake_case dog", "up to the first '_'"),
        ("t2i-compbench", "é" * 400, "holds 220 bytes"),
        ("dpg", "a dog", "prompts of a list have none"),
    ],
)
def test_what_a_scorer_cannot_read_is_refused(layout: str, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        plan(layout, prompts_of(["a cat", text][layout != "t2i-compbench" :]), 4, seed=0)
    assert text[:20] in str(caught.value.where)


def test_hrs_and_flat() -> None:
    assert paths("hrs", 1) == ["samples/00000_00.png", "samples/00001_00.png"]
    assert paths("flat", 1) == ["samples/00000_00_a-red-dog.png", "samples/00001_00_a-cat-a-hat.png"]


def test_seeds_depend_on_prompt_sample_and_seed_not_on_place() -> None:
    def seeds(texts: list[str], samples: int = 2, seed: int = 0) -> list[int]:
        return [s for picture in plan("flat", prompts_of(texts), samples, seed) for s in picture.seeds]

    assert seeds(["a", "b"]) == [*seeds(["a"]), *seeds(["b"])]
    assert seeds(["b", "a"]) == [*seeds(["b"]), *seeds(["a"])]
    assert seeds(["a"], samples=3)[:2] == seeds(["a"])
    assert seeds(["a"], seed=1) != seeds(["a"])
    assert len(set(seeds(["a", "a", "b"]))) == 6
    assert all(0 <= s < 2**32 for s in seeds(["a", "b"]))


def test_what_cannot_be_laid_out_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown layout 'grid'"):
        plan("grid", PROMPTS, 1, seed=0)
    with pytest.raises(UsageError, match="0 samples"):
        plan("flat", PROMPTS, 0, seed=0)
