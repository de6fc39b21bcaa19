"""Reading diffusers' weights with errors a user can act on. Called by the decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pipeline.core.errors import EclipseError


def from_pretrained(kind: Any, path: str, **options: Any) -> Any:
    """`kind.from_pretrained(path)`, safetensors only. Raises EclipseError that names the path and what to do."""
    try:
        return kind.from_pretrained(path, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        local = Path(path).is_dir()
        raise EclipseError(
            f"the decoder's weights cannot be loaded: {reason[:300]}",
            where=f"{path}/{options['subfolder']}" if "subfolder" in options else path,
            hint=f"the directory must hold a diffusers {kind.__name__} in safetensors"
            if local
            else "name a local directory, or a hub id that this machine can reach (decoder.path in the card)",
        ) from error


def quiet_diffusers() -> None:
    """Our progress bars stand for diffusers' own; its advice on optional packages is not the user's concern."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
