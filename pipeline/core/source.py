"""Where a card's pictures come from: the kinds of its `source` section, one class each. Used by card.py.

Pictures of `shapes` and `urls` are fetched into images/ by `eclipse download`; the other kinds are read where they lie.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from .registry import registered
from .sections import MANY, MAX_IMAGE_SIZE, MAX_SEED, NOTHING, Section


class FetchOptions(Section):
    """How pictures are fetched and stored; the same for every source."""

    decides = ("download",)

    image_size: int = Field(
        256, ge=16, le=MAX_IMAGE_SIZE, description="side in pixels that stored pictures are resized to"
    )
    resize_mode: Literal["no", "border", "keep_ratio", "center_crop"] = Field(
        "keep_ratio", description="img2dataset's resize mode; pictures are never enlarged"
    )
    rows_per_shard: int = Field(10_000, ge=1, le=MANY, description="pictures of the list in one shard")
    timeout_s: Annotated[float, NOTHING] = Field(10.0, gt=0, le=3600, description="seconds allowed for one URL")
    retries: Annotated[int, NOTHING] = Field(2, ge=0, le=100, description="further passes over URLs that failed")
    patience_s: Annotated[float, NOTHING] = Field(
        300.0, gt=0, le=86_400, description="seconds to wait for a network or a server that is out, before giving up"
    )


class ShapesSource(FetchOptions):
    """The closed world of coloured shapes, served over HTTP on the loopback address."""

    kind: Literal["shapes"] = Field("shapes", description="shapes: the world that ships with the installation")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the world's scenes, captions and planted dirt")
    rows: int = Field(8000, ge=1, le=100_000_000, description="pictures of the served list, dirt included")
    captions: int | None = Field(
        None, ge=1, le=5, description="captions of a picture at most, as COCO has five, a row for each; null: one"
    )
    held_out: float = Field(0.15, ge=0, lt=1, description="share of (color, shape) compositions kept out of training")
    patience_s: Annotated[float, NOTHING] = Field(
        20.0, gt=0, le=86_400, description="seconds to wait for the world's own server"
    )


class WebOptions(FetchOptions):
    """How pictures of other people's servers are fetched."""

    expected_rows: Annotated[int | None, NOTHING] = Field(
        None, ge=1, le=1000 * MANY, description="rows expected to arrive; for estimates of cost"
    )
    contact: Annotated[str | None, NOTHING] = Field(
        None, description="whom servers may write to, in the User-Agent: https://… or mailto:…"
    )
    robots_txt: Annotated[bool, NOTHING] = Field(
        False, description="heed each site's robots.txt; opt-out headers always count"
    )
    per_host: Annotated[int, NOTHING] = Field(64, ge=1, le=10_000, description="fetches from one host at a time")
    allow_hosts: Annotated[list[str], NOTHING] = Field(
        default_factory=list, description="names, addresses or networks that may be asked though they are not public"
    )

    @field_validator("contact")
    @classmethod
    def _fits_a_header(cls, contact: str | None) -> str | None:
        if contact is not None and not (contact.isascii() and contact.isprintable()):
            raise ValueError("use plain ASCII on one line")
        return contact


class UrlSource(WebOptions):
    """A list of image URLs and captions that the user has."""

    kind: Literal["urls"] = Field("urls", description="urls: a list of your own")
    urls: str | list[str] = Field(
        description="Parquet, CSV, TSV, JSONL file(s), relative to the card's file; a shipped card's: to the workspace"
    )
    url_column: str = Field("url", description="column with the image URL")
    caption_column: str = Field("caption", description="column with the caption")
    hash_column: str | None = Field(
        None, description="column with MD5, SHA-1, SHA-256 or SHA-512 that the pictures must have"
    )
    quoting: bool | None = Field(
        None, description="fields may stand in double quotes; null: in CSV they may, in TSV quotes are text"
    )
    encoding: str | None = Field(None, description="of text files, such as latin-1; null: UTF-8, or as a mark says")

    @field_validator("urls")
    @classmethod
    def _name_files(cls, urls: str | list[str]) -> str | list[str]:
        return _named(urls)

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str | None) -> str | None:
        try:
            codecs.lookup(encoding or "utf-8")
        except LookupError:
            raise ValueError("use a name that Python knows, such as latin-1, cp1252 or utf-16") from None
        return encoding

    def paths(self, root: Path) -> list[Path]:
        """The list's files, those of wildcards in the order of names; `root` is the workspace's directory."""
        paths = [root / Path(name).expanduser() for name in _several(self.urls)]
        return [
            found for path in paths for found in (sorted(path.parent.glob(path.name)) if _is_wild(path) else [path])
        ]


class WebdatasetSource(Section):
    """WebDataset tars that exist already: read where they lie, never copied or changed."""

    decides = ("download",)

    kind: Literal["webdataset"] = Field("webdataset", description="webdataset: tars that you have")
    shards: str | list[str] = Field(
        description="tars: paths from the card's file on, URLs of fsspec (s3://, hf://, https://), {0..9}, *, a folder"
    )
    caption_key: str | None = Field(
        None, description="key of a sample's JSON with its caption(s); null: .txt, else caption"
    )
    expected_rows: Annotated[int | None, NOTHING] = Field(
        None, ge=1, le=1000 * MANY, description="pairs expected; for estimates of cost"
    )

    @field_validator("shards")
    @classmethod
    def _name_files(cls, shards: str | list[str]) -> str | list[str]:
        return _named(shards)

    def addresses(self, root: Path) -> list[str]:
        """What the card names, paths made absolute; `root` is the workspace's directory."""
        names = _several(self.shards)
        return [name if "://" in name else str(root / Path(name).expanduser()) for name in names]


class FolderSource(Section):
    """Pictures in a folder of any depth, read where they lie."""

    decides = ("download",)

    kind: Literal["folder"] = Field("folder", description="folder: pictures that you have, with captions beside them")
    folder: str = Field(
        description="the folder, relative to the card's file; captions in .txt, or ImageFolder metadata"
    )
    caption_column: str = Field("text", description="column of metadata.jsonl, .csv or .parquet with the caption(s)")
    rows_per_shard: int = Field(10_000, ge=1, le=MANY, description="pictures in one shard, and so in one part")
    expected_rows: Annotated[int | None, NOTHING] = Field(
        None, ge=1, le=1000 * MANY, description="pairs expected; for estimates of cost"
    )

    @field_validator("folder")
    @classmethod
    def _name_it(cls, folder: str) -> str:
        return _name_one(folder)

    def path(self, root: Path) -> Path:
        """The folder; `root` is the workspace's directory."""
        return root / Path(self.folder).expanduser()


class TableSource(Section):
    """Tables whose rows hold the pictures' bytes, read where they lie."""

    decides = ("download",)

    kind: Literal["table"] = Field("table", description="table: Parquet or Arrow with the pictures in it")
    table: str | list[str] = Field(
        description="files, *, or a Hugging Face dataset's folder, relative to the card's file"
    )
    image_column: str = Field("image", description="column with the bytes, or {bytes, path}")
    caption_column: str = Field("text", description="column with the caption, or a list of them")
    rows_per_shard: int = Field(10_000, ge=1, le=MANY, description="rows in one shard, and so in one part")
    expected_rows: Annotated[int | None, NOTHING] = Field(
        None, ge=1, le=1000 * MANY, description="pairs expected; for estimates of cost"
    )

    @field_validator("table")
    @classmethod
    def _name_files(cls, table: str | list[str]) -> str | list[str]:
        return _named(table)

    def paths(self, root: Path) -> list[Path]:
        """What the card names; `root` is the workspace's directory."""
        return [root / Path(name).expanduser() for name in _several(self.table)]


class ClipRetrievalSource(Section):
    """Embeddings that somebody made already, read where they lie: no picture is fetched or encoded."""

    decides = ("download",)

    kind: Literal["clip-retrieval"] = Field(
        "clip-retrieval", description="clip-retrieval: CLIP embeddings that you have, made by the encoder of this card"
    )
    folder: str = Field(
        description="clip-retrieval's output (img_emb/, text_emb/, metadata/), or DataComp's .npz beside .parquet"
    )
    caption_column: str = Field("caption", description="column of the metadata with the caption")
    arrays: str = Field("l14", description="of an .npz: l14 reads l14_img and l14_txt")
    image_norm: float | None = Field(
        None, gt=0, description="length of this encoder's image embeddings, where theirs was made 1; null: they kept it"
    )
    pictures: str | None = Field(
        None, description="folder or tar with some of the pictures: the encoder is checked on them"
    )
    rows_per_shard: int = Field(10_000, ge=1, le=MANY, description="rows in one shard, and so in one part")
    expected_rows: Annotated[int | None, NOTHING] = Field(
        None, ge=1, le=1000 * MANY, description="pairs expected; for estimates of cost"
    )

    @field_validator("folder", "pictures")
    @classmethod
    def _name_it(cls, folder: str | None) -> str | None:
        return None if folder is None else _name_one(folder)

    def path(self, root: Path) -> Path:
        """The folder of the embeddings; `root` is the workspace's directory."""
        return root / Path(self.folder).expanduser()

    def pictures_path(self, root: Path) -> Path | None:
        """Where some of the pictures lie."""
        return None if self.pictures is None else root / Path(self.pictures).expanduser()


class OtherSource(WebOptions):
    """A list of image URLs that an installed package serves: see registry.py."""

    kind: str = Field("other", description="the name under which the package registers its list (eclipse.list)")
    options: dict[str, Any] = Field(default_factory=dict, description="whatever the package wants to know")


def _several(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _is_wild(path: Path) -> bool:
    return any(letter in path.name for letter in "*?[") and not path.exists()


def _named(names: str | list[str]) -> str | list[str]:
    """File names as they stand, if they can be such."""
    if not names or not all(name.strip() for name in _several(names)):
        raise ValueError("name a file, or a list of at least one")
    for name in _several(names):
        try:
            Path(name).expanduser()
        except RuntimeError:
            raise ValueError("no home directory is known for the ~ here") from None
    return names


def _name_one(name: str) -> str:
    _named(name)
    return name


SOURCES: dict[str, type[Section]] = {
    "shapes": ShapesSource,
    "urls": UrlSource,
    "webdataset": WebdatasetSource,
    "folder": FolderSource,
    "table": TableSource,
    "clip-retrieval": ClipRetrievalSource,
    "other": OtherSource,
}


def _class_of(source: Any) -> str | None:
    """The key of SOURCES for a section as read: its kind, or `other` where a package registers that kind."""
    kind = source.get("kind") if isinstance(source, dict) else getattr(source, "kind", None)
    if not isinstance(kind, str):
        return None
    if kind in SOURCES and kind != "other":
        return kind
    return "other" if registered("list", kind) else None


Source = Annotated[
    Annotated[ShapesSource, Tag("shapes")]
    | Annotated[UrlSource, Tag("urls")]
    | Annotated[WebdatasetSource, Tag("webdataset")]
    | Annotated[FolderSource, Tag("folder")]
    | Annotated[TableSource, Tag("table")]
    | Annotated[ClipRetrievalSource, Tag("clip-retrieval")]
    | Annotated[OtherSource, Tag("other")],
    Discriminator(
        _class_of,
        custom_error_type="source_kind",
        custom_error_message=f"kind must be one of {', '.join(kind for kind in SOURCES if kind != 'other')}, or a name "
        "that an installed package registers (entry points eclipse.list)",
    ),
]
FetchedSource = ShapesSource | UrlSource | OtherSource  # whose pictures `download` puts into images/
CAPTIONS_GAIN = 0.86  # further captions of a picture of shapes for each one allowed: not every category fits each scene
PLACES = ("urls", "shards", "folder", "table", "pictures")  # keys of a source that name files


def expected_rows(source: Source) -> int | None:
    """Pairs that a source should give, if the card says so."""
    if isinstance(source, ShapesSource):
        return round(source.rows * (1 + CAPTIONS_GAIN * ((source.captions or 1) - 1)))
    return source.expected_rows


def named_files(source: Source, root: Path) -> list[Path]:
    """The local files and folders that a source names, without those of wildcards and braces."""
    if isinstance(source, (ShapesSource, OtherSource)):
        return []
    if isinstance(source, (FolderSource, ClipRetrievalSource)):
        return [source.path(root)]
    if isinstance(source, WebdatasetSource):
        local = [name for name in source.addresses(root) if "://" not in name]
        return [Path(name) for name in local if not any(letter in name for letter in "*?[{")]
    return source.paths(root)
