"""Reading diffusers' weights with errors a user can act on. Called by the decoders."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ..pipeline.core import hub
from ..pipeline.core.errors import EclipseError


def from_pretrained(kind: Any, path: str, *, half: bool = False, **options: Any) -> Any:
    """`kind.from_pretrained(path)`, safetensors only. Raises EclipseError that names the path and what to do.

    half: the caller computes in float16, so that a repository's fp16 files, of half the size, are read where it has
    them. They are read too where there are no others. What a pipeline consists of is written in a file that comes with
    it: it may name models of diffusers and of transformers, and neither other libraries nor Python of its own.
    """
    local = Path(path).is_dir()
    place = contextlib.nullcontext() if local else hub.reaching(path, what="decoder", name_it="decoder.path")
    with place:
        try:
            if hasattr(kind, "download"):
                _require_known_parts(kind, kind.load_config(path))
            if variant := _variant(path, options.get("subfolder", ""), half=half):
                options["variant"] = variant
            return kind.from_pretrained(path, use_safetensors=True, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise EclipseError(
                f"the decoder's weights cannot be loaded: {reason[:300]}",
                where=f"{path}/{options['subfolder']}" if "subfolder" in options else path,
                hint=f"the directory must hold a diffusers {kind.__name__} in safetensors"
                if local
                else "name a local directory, or another hub id (decoder.path in the card)",
            ) from error


def _variant(path: str, subfolder: str, *, half: bool) -> str | None:
    """fp16 where those files are the ones to read."""
    folder = Path(path)
    names = (
        [file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")]
        if folder.is_dir()
        else hub.file_names(path)
    )
    parts = f"{subfolder}/" if subfolder else ""
    weights = [name for name in names if name.endswith(".safetensors") and "/" in name and name.startswith(parts)]
    whole = [name for name in weights if ".fp16." not in name]
    return "fp16" if len(whole) < len(weights) and (half or not whole) else None


def _require_known_parts(kind: Any, config: dict[str, Any]) -> None:
    """Raise ValueError if a pipeline's model_index.json names another pipeline, or parts that are no models."""
    import diffusers
    import transformers

    known = {  # library → what its parts are derived from
        "diffusers": (diffusers, (diffusers.ModelMixin, diffusers.SchedulerMixin)),  # pyright: ignore[reportPrivateImportUsage]
        "transformers": (transformers, (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)),
    }

    if config.get("_class_name") != kind.__name__:
        raise ValueError(f"its model_index.json is of {str(config.get('_class_name'))[:80]}, not of {kind.__name__}")
    for name, part in config.items():
        if name.startswith("_") or not isinstance(part, list):
            continue
        library, bases = known.get(str(part[0]) if len(part) == 2 else "", (None, ()))
        found = getattr(library, str(part[1]), None) if library else None
        if part != [None, None] and not (isinstance(found, type) and issubclass(found, bases)):
            raise ValueError(f"its model_index.json names {str(part)[:80]} as {name}, which is no model known here")


def quiet_diffusers() -> None:
    """Our progress bars stand for diffusers' own; its advice on optional packages is not the user's concern."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
