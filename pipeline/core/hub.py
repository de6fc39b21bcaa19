"""The Hugging Face hub: asks once whether it answers, so that nothing waits in vain; fetches priors, sends exports.

Called by everything that takes a hub id: the prior, the encoder, the decoders, `eclipse push`. The hub's own client
tries an unreachable host for half a minute and more, file by file, and some libraries then blame a missing file.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import EclipseError, UsageError

ANSWER_SECONDS = 5.0
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)
# What a first fetch takes, for a message that is written when nobody can be asked: parameters × bytes (float32).
SIZES = {
    "ECLIPSE-Community/ECLIPSE_KandinskyV22_Prior": 137e6,
    "ECLIPSE-Community/ECLIPSE_Karlo_Prior": 133e6,
    "ECLIPSE-Community/Lambda-ECLIPSE-Prior-v1.0": 139e6,
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": 10.2e9,
    "timm/vit_large_patch14_clip_224.openai": 1.7e9,
    "kandinsky-community/kandinsky-2-2-decoder": 5.3e9,
    "kakaobrain/karlo-v1-alpha": 9.2e9,
}


def is_hub_id(name: str) -> bool:
    """Whether `name` can be the id of a repository: owner/name."""
    return bool(HUB_ID.fullmatch(name)) and ".." not in name


@contextmanager
def reaching(repo: str, *, what: str, name_it: str) -> Iterator[None]:
    """Let a library load `repo` in this block: from the cache alone where the hub cannot be reached.

    what: what the repository holds, such as "decoder"; name_it: where another is named, such as `decoder.path`.

    Raises:
        EclipseError: it cannot be reached and nothing of `repo` is in the cache; names id, size and folder.
    """
    from huggingface_hub import constants

    problem = unreachable()
    if problem is not None and snapshot(repo) is None:
        raise _absent(repo, problem, what=what, name_it=name_it)
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or problem is not None  # the client looks here before every request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _absent(repo: str, problem: str, *, what: str, name_it: str) -> EclipseError:
    from huggingface_hub import constants

    size = f"about {size_text(SIZES[repo])}" if repo in SIZES else "of unknown size"
    return EclipseError(
        f"the {what} {repo} is not on this machine, and the hub cannot be reached: {problem}",
        where=f"it would be fetched once, {size}, into {constants.HF_HUB_CACHE}",
        hint=f"run the same command with a network, or fetch it elsewhere and name its directory ({name_it})",
    )


def unreachable() -> str | None:
    """Why the hub cannot be asked, or None if it answers. Found out once a process, in at most five seconds."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _no_answer()


@functools.cache
def _no_answer() -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answer: list[str | None] = [f"{constants.ENDPOINT} did not answer within {ANSWER_SECONDS:.0f} seconds"]

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS).status_code
            # Any answer will do, a 404 too; with these a proxy says that there is none, or a hub that it is down.
            answer[0] = f"{constants.ENDPOINT} answers with HTTP {status}" if status in (502, 503, 504) else None
        except Exception as error:  # whatever this client, its proxy and its certificates raise
            answer[0] = f"{constants.ENDPOINT}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"

    # A name that cannot be resolved is outside the client's own time limit, hence a thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answer[0]


def snapshot(repo: str) -> Path | None:
    """The newest folder of `repo` in the cache, or None."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.strip('/').replace('/', '--')}" / "snapshots"
    found = [path for path in folder.iterdir() if any(path.iterdir())] if repo and folder.is_dir() else []
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def fetch(repo: str, needed: Sequence[str], wanted: Sequence[str] = (), *, what: str, name_it: str) -> Path:
    """The cache's folder with the `needed` files of `repo`, and those of the `wanted` ones that it has.

    Raises:
        EclipseError: what `reaching` raises; there is no such repository, or a needed file is not in it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with reaching(repo, what=what, name_it=name_it):
        try:
            paths = [hf_hub_download(repo, name) for name in needed]
            for name in wanted:
                with suppress(EntryNotFoundError):  # not there, or, offline, never fetched
                    hf_hub_download(repo, name)
        except Exception as error:  # the client's own, the transport's, the disk's
            raise explain(error, repo, what=what, name_it=name_it) from error
    return Path(paths[0]).parent


def file_names(repo: str) -> list[str]:
    """The files of `repo`, by path: as the hub lists them, or, where it cannot be reached, those in the cache."""
    if unreachable() is None:
        from huggingface_hub import HfApi

        return HfApi().list_repo_files(repo)
    folder = snapshot(repo)
    return [] if folder is None else [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def explain(error: Exception, repo: str, *, what: str, name_it: str = "") -> EclipseError:
    """The message behind what the hub's client raises."""
    from huggingface_hub import errors

    other = f"name another, or a directory ({name_it})" if name_it else "name another"
    if isinstance(error, errors.GatedRepoError):
        return EclipseError(
            f"the {what} is behind a form that you have not accepted", where=repo, hint="accept it on its page"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"the hub has no such {what}, or it is private",
            where=repo,
            hint=f"check the id, log in with `hf auth login`, or {other}",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        if snapshot(repo) is None:
            return _absent(repo, "it does not answer any more", what=what, name_it=name_it or "in place of the id")
        return EclipseError(
            f"the hub cannot be reached, and of this {what} only a part is in the cache",
            where=repo,
            hint=f"run the same command with a network, or {other}",
        )
    if isinstance(error, errors.EntryNotFoundError):
        missing = re.search(r"/resolve/[^/]+/(\S+?)[.'\"]*(\s|$)", str(error))
        which = missing.group(1) if missing else "a file"
        return EclipseError(f"this is no {what}: it has no {which}", where=repo, hint=other)
    if isinstance(error, errors.HfHubHTTPError) and getattr(error.response, "status_code", 0) in (401, 403):
        return EclipseError(
            "the hub refuses: no token, or one without the right to do this",
            where=repo,
            hint="log in with `hf auth login`, or set HF_TOKEN",
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return EclipseError(f"the hub did not give the {what}: {first[:300]}", where=repo, hint=f"try again, or {other}")


def send(repo: str, folder: Path, *, private: bool, overwrite: bool, mark: str) -> str:
    """Upload the files of `folder` to the model repository `repo`, made where there is none; its address.

    mark: the file that tells a repository of ours. One that holds other things is refused unless `overwrite`.

    Raises:
        EclipseError, UsageError: the hub cannot be reached or refuses; the repository holds something else.
    """
    from huggingface_hub import HfApi

    if (problem := unreachable()) is not None:
        raise EclipseError(
            f"the hub cannot be reached: {problem}", where=repo, hint="try again with a network; --dry-run needs none"
        )
    api: Any = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = set(api.list_repo_files(repo)) - {".gitattributes"}
        if there and mark not in there and not overwrite:
            raise UsageError(
                f"this repository holds {len(there)} files that `eclipse push` did not send, {min(there)} among them",
                where=repo,
                hint="name another, or replace files of the same names with --overwrite",
            )
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Prior trained with eclipse")
    except EclipseError:
        raise
    except Exception as error:
        raise explain(error, repo, what="repository") from error
    return str(getattr(commit, "repo_url", None) or f"{api.endpoint}/{repo}")


def size_text(size: float) -> str:
    """Bytes in the unit that reads best, decimal."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
