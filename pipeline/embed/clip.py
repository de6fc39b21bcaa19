"""CLIP through open_clip: image embedding, text embedding and token states. Called by embed.py, trainer and decode."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from ..cache.packed_text import TextFeatures
from ..core import hub
from ..core.card import resolve
from ..core.errors import EclipseError, UsageError
from ..core.files import require_regular
from .preprocess import Preprocessing
from .tokens import CaptionTokenizer

PRESETS = {
    "karlo": ("ViT-L-14", "openai"),
    "kandinsky22": ("ViT-bigG-14", "laion2b_s39b_b160k"),
}
CONFIG = "open_clip_config.json"
WEIGHTS = (  # in open_clip's order of preference
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
REACHING_AT_ALL = ("trust_remote_code", "auto_map")
REACHING = (*REACHING_AT_ALL, "tokenizer_kwargs", "tokenizer_mode", "hf_tokenizer_name", "hf_model_name",
            "timm_model_pretrained")  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Encoder:
    """A CLIP of the published kind: any image tower of open_clip, and a causal text tower pooled at the end token."""

    def __init__(
        self, model: Any, tokenizer: Any, *, precision: str = "fp32", device: str = "cpu", text_only: bool = False
    ) -> None:
        self._text = _text_tower(model)
        self._visual = model.visual
        tokens = CaptionTokenizer.wrap(tokenizer, len(self._text.positional_embedding))
        if tokens is None:
            raise EclipseError(
                "this encoder does not use CLIP's own tokenizer",
                hint="priors are defined on CLIP's token states: choose a CLIP such as ViT-L-14",
            )
        self.fingerprint = _fingerprint(model)
        self.device = torch.device(device)
        # Few CPUs multiply half precision in hardware; the others take fifty times as long over it as over float32.
        self.precision = "fp32" if self.device.type == "cpu" else precision
        self.tokenize_captions = tokens
        self.context_length = tokens.context_length
        self.text_width: int = self._text.ln_final.normalized_shape[0]
        config = PreprocessCfg(**self._visual.preprocess_cfg)
        self.preprocess = Preprocessing(config)
        self.preprocessing = self.preprocess.text
        self.image_size = self.preprocess.size[1]

        if text_only:  # most of a CLIP is its image tower: on a device that trains, its room is wanted for other things
            model.visual = self._visual = nn.Identity()
        dtype = DTYPES[self.precision]
        model.requires_grad_(False).eval().to(self.device, dtype, memory_format=torch.channels_last)
        self._dtype = dtype
        self._mean = torch.tensor(config.mean, device=self.device)
        self._std = torch.tensor(config.std, device=self.device)
        with torch.inference_mode():
            self.embedding_dim: int = self._pool(self._text.ln_final.weight[None]).shape[1]

    @classmethod
    def load(
        cls,
        model: str,
        pretrained: str | None = None,
        *,
        precision: str = "fp32",
        device: str = "cpu",
        text_only: bool = False,
    ) -> Encoder:
        """Load by open_clip's name and tag, `hf-hub:…`, `local-dir:…` ({models} allowed) or a preset's name.

        precision: fp32, bf16 or fp16, of a GPU; a CPU computes in float32 whatever is asked, and `precision` says so.
        text_only: leave the image tower out once the weights are known to be the right ones.
        Raises UsageError for names that open_clip does not know or that come without weights, EclipseError for
        weights that cannot be read or fetched and for towers that are not CLIP's.
        """
        model, pretrained = resolve(model), resolve(pretrained) if pretrained else None
        model, pretrained = PRESETS.get(model, (model, pretrained))
        named = model.startswith(("hf-hub:", "local-dir:"))
        if not named:
            _check_name(model, pretrained)
        try:
            with _source_of(model, pretrained):
                if named:
                    _check_config_of(model)
                loaded = open_clip.create_model(
                    model,
                    pretrained=pretrained,
                    force_quick_gelu=wants_quick_gelu(model, pretrained),
                    require_pretrained=True,
                    pretrained_image=False,
                )
            # Of what is not open_clip's own the config was checked to want CLIP's tokenizer: asking open_clip for it
            # would read the file again, which may be another one by then.
            tokenizer = SimpleTokenizer() if named else open_clip.get_tokenizer(model)
        except EclipseError:
            raise
        except Exception as error:  # open_clip raises whatever its many sources raise
            raise EclipseError(
                f"cannot load the encoder: {error}",
                where=f"{model}" + (f" ({pretrained})" if pretrained else ""),
                hint="weights are fetched once from their hub; offline, use local-dir:PATH with"
                " open_clip_config.json and open_clip_model.safetensors",
            ) from error
        return cls(loaded, tokenizer, precision=precision, device=device, text_only=text_only)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, context) int64 and the number of real tokens (B,) int64, start and end token included."""
        tokens = self.tokenize_captions(captions)
        return tokens.ids, tokens.n_tokens

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor | np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 from `preprocess`, or (B, 3, H, W) floats already normalised → (B, D) float32 raw."""
        pixels = torch.as_tensor(pixels).to(self.device, non_blocking=True)
        if pixels.dtype == torch.uint8:
            pixels = ((pixels.float() / 255 - self._mean) / self._std).permute(0, 3, 1, 2)
        return self._visual(pixels.to(self._dtype, memory_format=torch.channels_last)).float()

    @torch.inference_mode()
    def encode_text(self, tokens: Tensor, n_tokens: Tensor) -> TextFeatures:
        """(B, L) int64 token ids with n_tokens (B,) real ones, both on the CPU → float32 features on the device.

        States are the last hidden ones, after the final layer norm and before the projection. Only the first
        max(n_tokens) positions are computed: attention is causal, so padding after the end token changes nothing
        before it. Sort captions by length to gain from it.
        """
        length = int(n_tokens.max()) if len(n_tokens) else 0
        offsets = torch.cat([n_tokens.new_zeros(1), n_tokens.cumsum(0)])
        real = (torch.arange(length) < n_tokens[:, None]).flatten().nonzero().squeeze(1)
        last = torch.arange(len(tokens)) * length + n_tokens - 1
        # What the host knows goes to the device in one piece, from pinned memory: a copy from other memory waits until
        # everything queued before it is done, and the device then stands still between two batches.
        parts = (tokens[:, :length].flatten(), real, last, offsets)
        packed = torch.cat(parts)
        if self.device.type == "cuda":
            packed = packed.pin_memory()
        ids, real, last, offsets = packed.to(self.device, non_blocking=True).split([len(part) for part in parts])
        tower = self._text
        x = tower.token_embedding(ids.view(len(tokens), length)) + tower.positional_embedding[:length]
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])).flatten(0, 1)
        pooled = self._pool(x.index_select(0, last)).float()
        return TextFeatures(x.index_select(0, real).float(), offsets, embedding=pooled)

    def _pool(self, x: Tensor) -> Tensor:
        projection = self._text.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _text_tower(model: nn.Module) -> Any:
    """The module that holds the text tower's parts; EclipseError if it is not CLIP's kind."""
    tower: Any = getattr(model, "text", model)
    problem = None
    if not hasattr(tower, "token_embedding") or not hasattr(tower, "ln_final"):
        problem = "its text tower is not CLIP's transformer"
    elif getattr(tower, "attn_mask", None) is None or getattr(tower, "cls_emb", None) is not None:
        problem = "its text tower is not causal, so that padding would change the token states"
    elif getattr(tower, "pool_type", getattr(tower, "text_pool_type", "")) not in ("argmax", "eos"):
        problem = "its text embedding is not read at the end token"
    if problem:
        raise EclipseError(f"this encoder cannot feed a prior: {problem}", hint="choose a CLIP such as ViT-L-14")
    return tower


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 over the weights and the activation, the same for every precision and device."""
    digest = hashlib.sha256()
    quick = any(isinstance(module, QuickGELU) for module in model.modules())
    digest.update(b"quick-gelu" if quick else b"gelu")
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()


def _source_of(model: str, pretrained: str | None) -> AbstractContextManager[None]:
    """Where these weights come from, for the time that they are loaded: the hub may be out of reach."""
    repo = hub_repository(model, pretrained)
    return hub.reaching(repo, what="encoder", name_it="encoder.model: local-dir:PATH") if repo else nullcontext()


def hub_repository(model: str, pretrained: str | None) -> str | None:
    """The hub's repository that these weights come from; None where they come from this machine or another server."""
    if model.startswith("hf-hub:"):
        return model.removeprefix("hf-hub:").partition("@")[0]
    tag = open_clip.get_pretrained_cfg(model.replace("/", "-"), pretrained) if pretrained else None
    return (tag or {}).get("hf_hub", "").strip("/") or None


def wants_quick_gelu(model: str, pretrained: str | None) -> bool:
    """Weights trained with quick-GELU, OpenAI's above all, are wrong with the plain one, which names alone imply."""
    tag = open_clip.get_pretrained_cfg(model.replace("/", "-"), pretrained) if pretrained else None
    return bool(tag and tag.get("quick_gelu"))


def check_directory(folder: Path) -> None:
    """Raise EclipseError that names the file unless `folder` holds a model in open_clip's layout.

    Of the weights only the header is read, which also tells whether the file has its whole length.
    """
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise UsageError("no such model directory", where=f"local-dir:{folder}", hint="check encoder.model in the card")
    hint = f"put {CONFIG} and {WEIGHTS[0]} there, or correct encoder.model in the card"
    path = folder / CONFIG
    try:
        require_regular(path)
        _check_config(json.loads(path.read_text(encoding="utf-8")))
        path = _weights_in(folder)
        require_regular(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
    except OSError as error:
        what = f"cannot load the encoder: {error.strerror or error}"
        raise EclipseError(what, where=str(path), hint=hint) from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise EclipseError(f"cannot load the encoder: {error}", where=str(path), hint=hint) from error


def _check_config(config: Any) -> None:
    towers = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(towers, dict) or not all(isinstance(towers.get(key), dict) for key in ("vision_cfg", "text_cfg")):
        raise ValueError("this is not a model's config: it needs model_cfg with vision_cfg and text_cfg")
    if reaching := next(_reaching_keys(config), None):
        raise ValueError(f"its key {reaching} has further code, models or weights loaded, which no config may do here")


def _reaching_keys(value: Any, path: str = "") -> Iterator[str]:
    """The keys of a config, at any depth, that would have open_clip load more than this one model's weights.

    Tokenizers of the hub can bring Python of their own (trust_remote_code, auto_map), and no prior can use them;
    transformers' and timm's names can lead to any other repository.
    """
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        here = f"{path}.{key}" if path else str(key)
        harmless = inner in (None, "", False, {}) and key not in REACHING_AT_ALL
        if (key in REACHING and not harmless) or (key == "timm_model_name" and ":" in str(inner)):
            yield here
        else:
            yield from _reaching_keys(inner, here)


def _weights_in(folder: Path) -> Path:
    """The file that open_clip loads; one that is missing if there is none."""
    others = [path for kind in ("safetensors", "bin", "pth") for path in sorted(folder.glob(f"*.{kind}"))]
    return next((folder / name for name in WEIGHTS if (folder / name).exists()), (others or [folder / WEIGHTS[0]])[0])


def _check_config_of(model: str) -> None:
    """Raise EclipseError if the config behind `local-dir:…` or `hf-hub:…` is none, or would load more than it."""
    if model.startswith("local-dir:"):
        check_directory(Path(model.removeprefix("local-dir:")))
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = model.removeprefix("hf-hub:").partition("@")
    try:
        path = hf_hub_download(repository, CONFIG, revision=revision or None)
        _check_config(json.loads(Path(path).read_text(encoding="utf-8")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError, RecursionError) as error:
        hint = "weights are fetched once from their hub; offline, use local-dir:PATH"
        raise EclipseError(f"cannot load the encoder: {error}", where=model, hint=hint) from error


def _check_name(model: str, pretrained: str | None) -> None:
    name = model.replace("/", "-")
    if name not in open_clip.list_models():
        import difflib

        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise UsageError(
            f"open_clip knows no model {model!r}",
            hint=f"near: {', '.join(near) or 'none'}; or hf-hub:…, local-dir:…, {', '.join(PRESETS)}",
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise UsageError(f"{model} without weights", hint=f"set encoder.pretrained to one of: {', '.join(tags)}")
    if pretrained not in tags and not Path(pretrained).is_file():
        raise UsageError(f"{model} has no weights {pretrained!r}", hint=f"known: {', '.join(tags)}; or a file")
