"""The command line as a user meets it: real processes, their exit codes, and what they leave on the two outputs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from eclipse.cli import app
from eclipse.pipeline.core.card import STAGES, Card
from eclipse.pipeline.core.console import plain
from eclipse.pipeline.core.errors import EclipseError, Terminated
from eclipse.pipeline.core.source import expected_rows
from eclipse.pipeline.core.workspace import Workspace
from records import finish
from typer.testing import CliRunner

COMMANDS = ["run", "init", "cards", "status", "doctor", "why", "search", *STAGES, "export", "push", "lab"]


def eclipse(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eclipse.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def refused(result: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    """One clear message, the right exit code, no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("error:") == 1
    for words in said:
        assert words in result.stderr


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace.create(tmp_path / "ws", Card.load("shapes"))


def complete(ws: Workspace, *stages: str) -> None:
    """Leave what finished stages leave: a state of this card, and the output it stands for."""
    for folder in (ws.images, ws.embeddings, ws.prior, ws.renders):
        folder.mkdir(exist_ok=True)
    ws.selection.touch()
    for stage in stages:
        summary = {"rows": 3, "gallery": "renders/gallery.html"} if stage == "render" else {"rows": 3}
        finish(ws, stage, summary=summary)


def test_help_lists_every_command_and_imports_nothing_heavy(tmp_path: Path):
    code = (
        "import sys; from eclipse.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'rich', 'pyarrow', 'eclipse.pipeline.core.card'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    commands = result.stdout.split("Commands:")[1]
    assert re.findall(r"^  (\w+)  ", commands, flags=re.M) == COMMANDS
    assert "..." not in commands, "a summary is too long for its line"


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--retry-failed"], "all"), (["--retry-failed", "--quiet"], "all"), (["--retry-failed=all", "--json"], "all"),
        (["--retry-failed", "timed_out,http_503"], "timed_out,http_503"), ([], None),
    ],
)  # fmt: skip
def test_retry_failed_alone_means_all(words: list[str], asked: str | None):
    command = typer.main.get_command(app)
    given = command.commands["download"].make_context("download", list(words)).params  # type: ignore[attr-defined]
    assert given["retry_failed"] == asked


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_has_an_example(command: str):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Examples:\n    eclipse {command}" in result.stdout
    if command in ("run", *STAGES):
        for option in ("--card", "--workspace", "-w", "--cluster", "--overwrite", "--quiet", "--json", "--debug"):
            assert option in result.stdout


def test_init_then_status_in_the_current_directory(tmp_path: Path):
    made = eclipse("init", "shapes", "here", "--json", cwd=tmp_path)
    assert json.loads(made.stdout) == {"workspace": str(tmp_path / "here"), "card": "shapes", "source": "shapes"}
    shown = eclipse("status", cwd=tmp_path / "here")
    assert shown.returncode == 0 and "next: eclipse download" in shown.stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_outputs_lead_nowhere(tmp_path: Path, closed: str):
    command = f"exec {sys.executable} -m eclipse.cli init shapes here {closed}"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=120, check=False).returncode == 0
    assert Card.load(str(tmp_path / "here" / "eclipse.yaml")).name == "shapes"


def test_the_next_command_works_where_a_path_has_spaces(tmp_path: Path):
    said = eclipse("init", "shapes", "my work", cwd=tmp_path).stdout
    (following,) = re.findall("next: (.+) && eclipse run", said)
    subprocess.run(["bash", "-c", f"{following} && test -f eclipse.yaml"], cwd=tmp_path, check=True)


def test_cards_lists_and_prints(tmp_path: Path):
    listed = json.loads(eclipse("cards", "--json", cwd=tmp_path).stdout)["cards"]
    assert (
        listed["shapes"]["rows"] == expected_rows(Card.load("shapes").source)
        and listed["cc12m"]["prior"] == "kandinsky22"
    )
    keys = json.loads(eclipse("cards", "--keys", "--json", cwd=tmp_path).stdout)["keys"]
    assert keys["train.steps"]["decides"] == "train" and keys["train.microbatch"]["decides"] == "nothing"
    assert keys["decoder.steps"] == {**keys["decoder.steps"], "type": "int", "decides": "render, evaluate"}
    printed = eclipse("cards", "coco", cwd=tmp_path)
    (tmp_path / "mine.yaml").write_text(printed.stdout)
    assert Card.load(tmp_path / "mine.yaml").name == "coco"


def test_nothing_named_and_no_workspace(tmp_path: Path):
    refused(eclipse("filter", cwd=tmp_path), 2, "no workspace here", "eclipse init shapes DIR")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_card_suggests_the_nearest_and_makes_nothing(tmp_path: Path):
    refused(eclipse("run", "--card", "shaps", cwd=tmp_path), 2, "unknown card 'shaps'", "did you mean shapes?")
    refused(eclipse("init", "no/such.yaml", "ws", cwd=tmp_path), 2, "no such card file")
    assert list(tmp_path.iterdir()) == []


def test_a_named_card_makes_its_workspace_where_it_is_told_or_beside(tmp_path: Path):
    refused(eclipse("filter", "--card", "coco", cwd=tmp_path), 1)  # nothing embedded yet
    assert Workspace.open(tmp_path / "eclipse-coco").card == Card.load("coco")
    refused(eclipse("filter", "--card", "coco", "-w", "other", cwd=tmp_path), 1)
    assert Workspace.open(tmp_path / "other").card == Card.load("coco")


def test_a_card_that_differs_from_the_workspaces_is_named(ws: Workspace):
    result = eclipse("filter", "--card", "coco", "-w", ws.root, cwd=ws.root)
    refused(result, 2, "differs from this workspace's", "source.kind: shapes → urls", str(ws.card_path))
    assert Workspace.open(ws.root).card.name == "shapes"


def test_a_broken_workspace_card_is_named(ws: Workspace):
    ws.card_path.write_text(ws.card_path.read_text().replace("preset: tiny", "preset: tin"))
    refused(eclipse("status", cwd=ws.root), 2, "prior.preset", "'tiny'", str(ws.card_path))


def test_stages_that_are_complete_answer_from_their_states_without_torch(ws: Workspace):
    complete(ws, *STAGES)
    code = (
        "import sys; from eclipse.cli import app\n"
        "try: app(['run'])\n"
        "except SystemExit as stop: status = stop.code\n"
        "sys.exit(f'imported torch, {status}' if 'torch' in sys.modules or status else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ws.root, check=False)
    assert result.returncode == 0, result.stderr
    assert "every stage is complete already" in result.stdout and "renders/gallery.html" in result.stdout
    assert result.stderr.count("complete already") == len(STAGES)


def test_json_is_one_object_and_the_only_thing_on_stdout(ws: Workspace):
    complete(ws, *STAGES)
    whole = json.loads(eclipse("run", "--json", cwd=ws.root).stdout)
    assert whole["workspace"] == str(ws.root) and list(whole["stages"]) == list(STAGES)
    alone = json.loads(eclipse("train", "--json", cwd=ws.root).stdout)
    assert alone["rows"] == 3 and alone["already_complete"]
    failed = eclipse("filter", "--json", "-w", "nowhere", cwd=ws.root)
    assert failed.returncode == 2 and json.loads(failed.stdout)["error"] == "no workspace here"


def test_quiet_says_nothing_but_the_result(ws: Workspace):
    complete(ws, *STAGES)
    result = eclipse("run", "--quiet", cwd=ws.root)
    assert result.returncode == 0 and result.stderr == "" and "gallery" in result.stdout


def test_run_makes_the_shapes_workspace_and_stops_at_the_first_failure(tmp_path: Path):
    (tmp_path / "eclipse-shapes").write_text("a file in the way")
    refused(eclipse("run", cwd=tmp_path), 2, "not a directory", "eclipse-shapes")


def test_clusters_are_checked_before_anything_starts(ws: Workspace):
    refused(eclipse("embed", "--cluster", "slurm", cwd=ws.root), 2, "unknown cluster", "ray://HOST:PORT")
    refused(eclipse("train", "--cluster", "ray", cwd=ws.root), 2, "this machine only", "torchrun")


def test_export_needs_a_prior_and_spares_what_is_there(ws: Workspace, tmp_path: Path):
    refused(eclipse("export", "out", cwd=ws.root), 1, "no trained prior", "eclipse train")
    (ws.prior / "final").mkdir(parents=True)
    (ws.prior / "final" / "config.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt", ws.root):
        refused(eclipse("export", path, "--overwrite", cwd=ws.root), 2, "something already", "another directory")
    assert ws.card_path.is_file() and (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_second_process_is_told_who_holds_the_workspace(ws: Workspace):
    with ws.lock("embed"):
        refused(eclipse("filter", cwd=ws.root), 1, f"in use by embed, pid {os.getpid()}")
        assert f"at work: embed, pid {os.getpid()}" in eclipse("status", cwd=ws.root).stdout


def test_under_torchrun_only_the_first_process_takes_the_lock(ws: Workspace, monkeypatch: pytest.MonkeyPatch):
    with ws.lock("train"):
        monkeypatch.setenv("RANK", "1")
        refused(eclipse("filter", cwd=ws.root), 1, "nothing to filter yet")
        monkeypatch.setenv("RANK", "0")
        refused(eclipse("filter", cwd=ws.root), 1, "in use by train")


WORKING = """
import sys, time
import multiprocessing
from eclipse.pipeline.core import console
import typer

app = typer.Typer()

def work(progress):
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    print("noise of a library")
    progress.say(f"child {child.pid}")
    time.sleep(60)

@app.command()
def main():
    console.present(work, print, as_json=True)

if __name__ == "__main__":
    app()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_children_and_give_their_own_exit_codes(tmp_path: Path, number: int, code: int):
    script = tmp_path / "working.py"
    script.write_text(WORKING)
    process = subprocess.Popen([sys.executable, script], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stderr is not None
    lines = [process.stderr.readline(), process.stderr.readline()]
    child = int(lines[1].removeprefix("child "))
    assert Path(f"/proc/{child}").exists()
    process.send_signal(number)
    out, rest = process.communicate(timeout=60)
    assert process.returncode == code
    assert not Path(f"/proc/{child}").exists()
    assert "Traceback" not in rest and "run the same command again" in rest
    assert json.loads(out)["exit_code"] == code and lines[0] == "noise of a library\n"


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (OSError(28, "No space left on device", "/ws/part"), ["the disk is full", "/ws/part", "again"], 1),
        (RuntimeError("write failed: No space left on device"), ["the disk is full"], 1),
        (PermissionError(13, "Permission denied", "/ws/x"), ["Permission denied", "/ws/x"], 1),
        (MemoryError(), ["out of memory", "batch"], 1),
        (ValueError("odd"), ["unexpected ValueError: odd", "--debug"], 1),
        (Terminated("stopped by SIGTERM"), ["stopped by SIGTERM"], 143),
        (EclipseError("bad row", where="list.csv:3", hint="mend it"), ["bad row", "list.csv:3", "mend it"], 1),
    ],
)
def test_whatever_a_stage_raises_becomes_one_message(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, error: Exception, said: list[str], code: int
):
    def fail(*_: object, **__: object) -> dict:
        raise error

    monkeypatch.setattr("eclipse.pipeline.filter.stage.filter_cache", fail)
    result = CliRunner().invoke(app, ["filter", "-w", str(ws.root)])
    assert result.exit_code == code
    for words in said:
        assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in CliRunner().invoke(app, ["filter", "-w", str(ws.root), "--debug"]).stderr


def test_the_traceback_of_a_defect_is_kept_for_later(ws: Workspace, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> dict:
        raise ZeroDivisionError

    complete(ws, "embed")
    monkeypatch.setattr("eclipse.pipeline.cache.store.Store.open", fail)
    CliRunner().invoke(app, ["filter", "-w", str(ws.root)])
    assert "ZeroDivisionError" in (ws.logs / "tracebacks.txt").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_of_which_a_library_makes_its_own_error_is_the_stop(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, number: int, code: int
):
    """As matplotlib does: what is raised while its C calls Python is dropped, and a matrix is said to be invalid."""

    def fail(*_: object, **__: object) -> dict:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), number)
            time.sleep(5)
        raise ValueError("Invalid affine transformation matrix")

    complete(ws, "embed")
    monkeypatch.setattr("eclipse.pipeline.cache.store.Store.open", fail)
    before = signal.getsignal(number)
    try:
        result = CliRunner().invoke(app, ["filter", "-w", str(ws.root)])
    finally:
        signal.signal(number, before)
    assert result.exit_code == code and "matrix" not in result.stderr and "again" in result.stderr
    assert not (ws.logs / "tracebacks.txt").exists()


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path):
    command = f"{sys.executable} -m eclipse.cli cards --keys | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 141 and result.stderr == ""


def test_a_full_output_device_is_an_error_not_a_traceback(tmp_path: Path):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "eclipse.cli", "cards"]
        result = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=-1, text=True, check=False)
    refused(result, 1, "the disk is full")


def test_a_write_that_fails_leaves_no_half_made_workspace(tmp_path: Path):
    code = (
        "import sys, resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "from eclipse.cli import app; app(['init', 'shapes', 'ws'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    refused(result, 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["ws"]


def test_plain_is_valid_json_for_whatever_a_summary_holds():
    import numpy as np

    value = {"a": np.float32(0.5), "b": float("nan"), "c": Path("x"), "d": (np.int64(3), True, None), "e": np.arange(2)}
    assert plain(value) == {"a": 0.5, "b": None, "c": "x", "d": [3, True, None], "e": [0, 1]}


STUBBORN = """
import sys, time
import typer
from eclipse.pipeline.core import console

app = typer.Typer()

def work(progress):
    try:
        progress.say("working")
        time.sleep(60)
    finally:
        time.sleep(float(sys.argv[1]))  # as libraries' threads take their time
        progress.say("cleaned up")

@app.command()
def main(seconds: float):
    console.present(work, print)

app()
"""


@pytest.mark.parametrize(("cleaning", "pause", "cleaned"), [(1.0, 0.1, True), (30.0, 0.7, False)])
def test_interrupts_in_a_row_are_one_and_a_late_one_ends_at_once(
    tmp_path: Path, cleaning: float, pause: float, cleaned: bool
):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    process = subprocess.Popen([sys.executable, script, str(cleaning)], stderr=-1, text=True)
    assert process.stderr is not None and process.stderr.readline() == "working\n"
    for _ in range(4):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    _, rest = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in rest and "run the same command again" in rest
    assert ("cleaned up" in rest) == cleaned and ("ended at once" in rest) != cleaned


def test_ctrl_c_at_once_is_no_traceback(tmp_path: Path):
    code = """
import sys
class Pressed:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Pressed())
from eclipse.__main__ import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 130 and result.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands(shell: str, tmp_path: Path):
    asked = {"bash": {"COMP_WORDS": "eclipse ren", "COMP_CWORD": "1"}}.get(
        shell, {"_TYPER_COMPLETE_ARGS": "eclipse ren"}
    )
    fish = {"_TYPER_COMPLETE_FISH_ACTION": "get-args"} if shell == "fish" else {}
    environment = {**os.environ, "_ECLIPSE_COMPLETE": f"complete_{shell}", **asked, **fish}
    command = [sys.executable, "-c", "from eclipse.cli import app; app(prog_name='eclipse')"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "render" in result.stdout and "download" not in result.stdout, result.stderr
