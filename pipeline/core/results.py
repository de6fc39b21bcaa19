"""What commands print for people: stage summaries, the run's table, cards, status, doctor. Used by cli.py alone."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from .console import show_summary, table
from .progress import printable


def show_stage(stage: str, summary: dict[str, Any]) -> None:
    """One stage's summary."""
    show_summary(summary, title=stage)


def show_workspace(result: dict[str, Any]) -> None:
    """A workspace that was made, and what to do in it."""
    print(printable(f"workspace for {result['card']} ({result['source']}): {result['workspace']}"))
    print(printable(f"next: cd {shlex.quote(result['workspace'])} && eclipse run"))


def show_export(result: dict[str, Any]) -> None:
    """What was written, and where."""
    show_summary(result, title="export")


def show_story(result: dict[str, Any]) -> None:
    """What `eclipse why` found: each row's stages, one line each."""
    for number, story in enumerate(result["rows"], start=1):
        if len(result["rows"]) > 1:
            print(f"row {number} of {result['found']:,}")
        for stage, facts in story.items():
            shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
            print(printable(f"  {stage:<9} {shown or 'done'}"))


def show_search(result: dict[str, Any]) -> None:
    """The pictures nearest to a text, one line each, and their page."""
    columns = ["cosine", "key", "verdict", "caption"]
    table(columns, [[one[name] for name in columns] for one in result["found"]])
    print(printable(f"{len(result['found'])} of {result['rows']:,} rows; pictures: {result['page']}"))


def show_run(result: dict[str, Any]) -> None:
    """The end of `eclipse run`: what each stage counted, the figures, and where the pictures are."""
    from .status import counts_text

    stages = result["stages"]
    table(
        ["stage", "seconds", "waiting for data", "counts"],
        [
            [stage, f"{summary.get('seconds', 0):,.0f}", _share(summary.get("data_wait_share")), counts_text(summary)]
            for stage, summary in stages.items()
        ],
    )
    print()
    if all(summary.get("already_complete") for summary in stages.values()):
        print("every stage is complete already")
    if "dirt" in result:
        _show_dirt(result["dirt"])
    show_stage("evaluate", stages["evaluate"])
    gallery = stages["render"].get("gallery")
    print(f"\ngallery: {gallery}" if gallery else f"\npictures: {result['workspace']}/renders")
    print(f"everything else: {result['overview']}")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _show_dirt(dirt: dict[str, Any]) -> None:
    """What the filter found of the dirt planted in the shapes world, beside the targets."""
    rows = []
    for name, figures in dirt.items():
        target = figures.get("target")
        wanted = f"{target['precision']:.2f} / {target['recall']:.2f}" if target else ""
        found = f"{figures['found']:,} of {figures['planted']:,}"
        rows.append([name.replace("_", " "), found, f"{figures['precision']:.3f}", f"{figures['recall']:.3f}", wanted])
    table(["planted dirt", "found", "precision", "recall", "target"], rows)


def read_cards(name: str | None, *, keys: bool = False) -> dict[str, Any]:
    """Every shipped card in short, or one in full with its comments; or every key that a card may have."""
    from .card import Card, every_key
    from .card_file import card_names, find_card

    if keys:
        return {"keys": dict(every_key())}
    if name is not None:
        card = Card.load(name)
        return {"card": card.model_dump(mode="json", by_alias=True), "text": find_card(name).read_text("utf-8")}
    loaded = [Card.load(each) for each in card_names()]
    return {"cards": {card.name: _card_row(card) for card in loaded}}


def _card_row(card: Any) -> dict[str, Any]:
    from .source import expected_rows

    rows = expected_rows(card.source)
    encoder = card.encoder.model if card.encoder.pretrained is None else card.encoder.pretrained
    return {
        "title": card.title,
        "rows": rows,
        "encoder": encoder.replace("local-dir:{models}/", "shipped "),
        "prior": card.prior.preset,
        "decoder": card.decoder.kind,
    }


def show_cards(result: dict[str, Any]) -> None:
    """The list of cards, or the text of one: a file to start one's own from."""
    if "keys" in result:
        columns = ["key", "type", "default", "decides", "meaning"]
        table(columns, [[key, *row.values()] for key, row in result["keys"].items()])
        print("A key decides the outputs of the stages named, and of all that are built on them; the others stay good.")
        return
    if "text" in result:
        sys.stdout.write(result["text"])
        return
    table(
        ["card", "what", "rows", "prior", "decoder"],
        [[name, row["title"], row["rows"], row["prior"], row["decoder"]] for name, row in result["cards"].items()],
    )
    print("`eclipse cards NAME` prints one in full; `eclipse init NAME DIR` starts a workspace from it.")


def show_push(result: dict[str, Any]) -> None:
    """What was sent, or would be, and where it is now."""
    table(["file", "bytes"], list(result["files"].items()))
    if result["sent"]:
        print(f"\nsent to {result['address']}")
    else:
        print(f"\nnothing was sent; this would go to {result['repository']}, with this model card:\n")
        print(result["model_card"])


def show_experiment(result: dict[str, Any]) -> None:
    """An experiment's setting, its tables, what follows from them, and where the page is."""
    show = {"separation": _show_separation, "reduction": _show_reduction, "sweep": _show_sweep}
    if result["experiment"] not in show:
        show_summary(result, title="lab world")
        return
    setting = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in result["setting"].items())
    print(f"lab {result['experiment']}: {setting}\n")
    show[result["experiment"]](result)
    print(f"\nreport: {result['report']}\njson: {result['json']}")


def _show_separation(result: dict[str, Any]) -> None:
    for split in ("seen", "unseen"):
        accuracy = {arm: splits[split] for arm, splits in result["accuracy"].items()}
        categories = list(next(iter(accuracy.values())))
        rows = [
            [arm, *(_spread(row[category]) for category in categories), _spread(result["cosine"][arm][split])]
            for arm, row in accuracy.items()
        ]
        table([f"{split} compositions", *categories, "cosine"], rows)
        print()
    rows = [
        [f"{pair['better']} over {pair['worse']}", _spread(pair["difference"]), "yes" if pair["clear"] else "no"]
        for pair in result["told_apart"]
    ]
    table(["unseen compositions", "difference", "clear"], rows)
    ratio = _spread(result["projection_of_oracle"])
    print(f"\nprojection prior, of the oracle: {ratio}" + ("; this setting is too easy" if result["too_easy"] else ""))


def _show_reduction(result: dict[str, Any]) -> None:
    for split in ("seen", "unseen"):
        tables = {name: splits[split] for name, splits in result["embedding"].items()}
        figures = list(next(iter(tables.values())))
        rows = [[name, *(_spread(row[figure]) for figure in figures)] for name, row in tables.items()]
        differences = result["sum_less_mean"][split]
        rows.append(
            ["sum − mean", *(_spread(differences[figure]) if figure in differences else "" for figure in figures)]
        )
        table([f"{split} compositions", *(figure.replace("_", " ") for figure in figures)], rows)
        print()


def _show_sweep(result: dict[str, Any]) -> None:
    columns = ("cosine_unseen", "recall_1_unseen", "oracle_unseen", "projection_unseen", "of_oracle_unseen")
    rows = [
        [row["held_out"], row["pairs"], *(f"{row[column]:.3f}" for column in columns), "yes" if row["too_easy"] else ""]
        for row in result["grid"]
    ]
    table(["held out", "pairs", *(column.replace("_", " ") for column in columns), "too easy"], rows)


def _spread(value: dict[str, float | None]) -> str:
    deviation = "" if value["sd"] is None else f" ± {value['sd']:.3f}"
    return f"{value['mean']:.3f}{deviation}"


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def show_status(result: dict[str, Any]) -> None:
    """The table of stages, who is at work, and what is next."""
    rows = [[s["stage"], s["state"], s["counts"], s["finished_at"]] for s in result["stages"]]
    table(["stage", "state", "counts", "finished"], rows, title=f"{result['card']} in {result['workspace']}")
    if result["holder"]:
        print(printable(f"at work: {result['holder']}"))
    print(f"next: {result['next']}" if result["next"] else "every stage is complete")


def show_doctor(result: dict[str, Any]) -> None:
    """One line a check, what is missing for which card, and what text states cost."""
    marks = {"ok": "ok", "note": "–", "missing": "missing", "broken": "BROKEN"}
    for title, checks in result["checks"].items():
        rows = [[marks[c["state"]], c["name"], c["found"], c["to_do"]] for c in checks]
        table(["", "check", "found", "what to do"], rows, title=title)
    print(printable(result["verdict"]))
