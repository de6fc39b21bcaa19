"""The hub out of reach: what was fetched before is used, anything else is one message, and nobody waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from eclipse.pipeline.core import hub
from eclipse.pipeline.core.errors import EclipseError
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from web import Handler, serving


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with owner/name in it, of which one file was fetched; no hub answers."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    hub._no_answer.cache_clear()
    repo = tmp_path / "models--owner--name"
    (repo / "snapshots" / "0a").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0a")
    (repo / "snapshots" / "0a" / "config.json").write_text("{}")
    yield repo / "snapshots" / "0a"
    hub._no_answer.cache_clear()


def test_what_was_fetched_before_needs_no_network(cache: Path) -> None:
    assert "127.0.0.1:9" in str(hub.unreachable())
    assert hub.fetch("owner/name", ["config.json"], ["eclipse.json"], what="prior", name_it="--prior") == cache
    assert hub.file_names("owner/name") == ["config.json"]
    assert constants.HF_HUB_OFFLINE is False
    with pytest.raises(EclipseError, match="only a part is in the cache"):
        hub.fetch("owner/name", ["weights"], what="prior", name_it="--prior")


def test_what_was_not_is_named_with_its_size_and_folder(cache: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(EclipseError) as caught,
        hub.reaching("kandinsky-community/kandinsky-2-2-decoder", what="decoder", name_it="decoder.path"),
    ):
        pytest.fail("went on")
    said = str(caught.value)
    assert "5.3 GB" in said and str(tmp_path) in said and "decoder.path" in said
    monkey = pytest.MonkeyPatch()
    monkey.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.unreachable() == "HF_HUB_OFFLINE is set"
    monkey.undo()


def test_a_proxy_that_answers_for_the_hub_is_no_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "do_HEAD", lambda handler: handler.send_error(502), raising=False)
    with serving({}) as web:
        monkeypatch.setattr(constants, "ENDPOINT", web.url(""))
        assert hub.unreachable() == f"{web.url('')} answers with HTTP 502"


def test_a_hub_that_stops_answering_is_named_with_size_and_folder(cache: Path, tmp_path: Path) -> None:
    gone = LocalEntryNotFoundError("cannot find the requested files in the cache")
    said = str(hub.explain(gone, "ECLIPSE-Community/ECLIPSE_Karlo_Prior", what="prior"))
    assert "is not on this machine" in said and "133 MB" in said and str(tmp_path) in said
    assert "only a part is in the cache" in str(hub.explain(gone, "owner/name", what="prior"))


@pytest.mark.parametrize(
    ("name", "is_one"), [("owner/name", True), ("a/b.c-d_e", True), ("a/b/c", False), ("name", False), ("../x", False)]
)
def test_ids(name: str, is_one: bool) -> None:
    assert hub.is_hub_id(name) is is_one
