"""Settings of the data rooms: where data comes from, how it is judged, how it is prepared."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from haplovl.strict import Strict

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Split = Literal["train", "validation", "test"]


class SplitShares(Strict):
    """Shares of records held out when a source names no split; decided by image content."""

    validation: Share = 0.01
    test: Share = 0.02

    @model_validator(mode="after")
    def _leave_training_data(self) -> "SplitShares":
        if self.validation + self.test >= 1.0:
            raise ValueError("validation and test leave nothing to train on")
        return self


# --- collect -------------------------------------------------------------------------------------------------------
class SourceSettings(Strict):
    """What every source has in common."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]
    """Folder of the source below data/raw, and its name in every table."""
    license: Annotated[str, Field(min_length=1)]
    """Terms that the data comes under, for people."""
    split: Split | SplitShares | None = None
    """One split for all records, or shares for those that name none; `validate.splits` by default."""
    sample: PositiveInt | None = None
    """Most records taken: those with the smallest hash of their id, so that a larger sample holds the smaller one."""
    weight: PositiveFloat = 1.0
    """Factor on the stages' mixture weights for this source's records."""
    near_duplicates: Annotated[int, Field(ge=0, le=16)] | None = None
    """Largest distance of two perceptual hashes, in bits, that counts as one picture; not looked for by default."""
    damaged_files: Literal["refuse", "keep"] = "refuse"
    """What becomes of a file that cannot be read to its end: `keep` takes the entries before the damage."""


class ScenesSource(SourceSettings):
    """The embedded data set: scenes of real handwritten digits from scikit-learn."""

    format: Literal["scenes"]
    license: str = "CC BY 4.0 (UCI Optical Recognition of Handwritten Digits, by way of scikit-learn)"
    image_size: PositiveInt = 32
    """Side of the square canvas in pixels; it holds 2x2 cells."""
    train_records: PositiveInt
    validation_records: PositiveInt
    test_records: PositiveInt
    questions_per_record: PositiveInt = 6
    """Most questions about one picture; scenes with few digits give fewer."""
    text_only_share: Share = 0.1
    two_image_share: Share = 0.15
    caption_share: Share = 0.4
    """Share of the training records that hold a caption alone, half of them of one digit. The other shares are of the
    rest."""


class AnnotatedSource(SourceSettings):
    """A source with annotation files of its own."""

    annotations: list[str] = Field(min_length=1)
    """Annotation files (.json or .jsonl)."""


Places = str | dict[str, str] | None
"""Folder, .tar or .zip that image paths are relative to; or several, by the first parts of the path."""


class LlavaSource(AnnotatedSource):
    """LLaVA-style annotations and the images that they name; also ShareGPT4V, M4-Instruct and `messages`."""

    format: Literal["llava"]
    images: Places = None
    captions: bool = False
    """Records of one question and one answer are captions, as in LLaVA-558K: the stages' mixtures weigh them so."""


class ShareGptSource(AnnotatedSource):
    """Conversations without pictures."""

    format: Literal["sharegpt"]


class AlpacaSource(AnnotatedSource):
    """Text of `instruction`, `input` and `output`; also Dolphin."""

    format: Literal["alpaca"]
    instruction: Literal["question", "system"] = "question"
    """What `instruction` is: the question, to which `input` adds, or the system prompt before it (Dolphin)."""


class InterleavedSource(AnnotatedSource):
    """Documents of pictures and texts: MMC4, OBELICS."""

    format: Literal["interleaved"]
    annotations: list[str] = Field(min_length=1)
    """Annotation files (.json, .jsonl or .parquet)."""
    images: Places = None


class WebdatasetSource(SourceSettings):
    """Tars of pictures with captions or conversations beside them."""

    format: Literal["webdataset"]
    files: list[str] = Field(min_length=1)
    """Shards (.tar), or patterns of their names."""
    prompt: str = ""
    """What a caption answers; the picture alone by default."""


Role = Literal["id", "image", "conversations", "texts", "question", "answer", "caption", "split"]
EVERY = ["**/*.parquet"]
"""Files that a source of the Hub takes where it names none."""


class TableSource(SourceSettings):
    """Tables with pictures inside."""

    columns: dict[Role, str] = {}
    """Columns by what they are, where their names do not say it."""
    prompt: str = ""
    """What a caption answers; the picture alone by default."""

    @model_validator(mode="after")
    def _columns_can_be_named(self) -> "TableSource":
        odd = [name for name in self.columns.values() if "!" in name or "." in name]
        if odd:
            raise ValueError(f"the column name '{odd[0]}' holds a '!' or '.'")
        return self


class ParquetSource(TableSource):
    """Parquet files on this machine."""

    format: Literal["parquet"]
    files: list[str] = Field(min_length=1)
    """Files (.parquet), or patterns of their names."""


class HubSource(TableSource):
    """Parquet files of a data set on the Hugging Face Hub, or of a folder in its layout."""

    format: Literal["hub"]
    id: str | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Full commit hash: what is collected must not change."""
    folder: str | None = None
    files: list[str] = Field(default=EVERY, min_length=1)
    """Patterns of the files inside; must be named where some are of a validation or test split."""

    @model_validator(mode="after")
    def _one_place(self) -> "HubSource":
        if (self.id is None) == (self.folder is None) or (self.id is None) != (self.revision is None):
            raise ValueError("give either 'id' and 'revision', or 'folder'")
        return self


class VideoSource(AnnotatedSource):
    """Videos with LLaVA-style annotations."""

    format: Literal["video"]
    videos: str
    """Folder that the records' `video` is relative to."""
    frames: PositiveInt = 8
    """Frames that stand for a video, evenly spread."""


Source = Annotated[
    ScenesSource
    | LlavaSource
    | ShareGptSource
    | AlpacaSource
    | InterleavedSource
    | WebdatasetSource
    | ParquetSource
    | HubSource
    | VideoSource,
    Field(discriminator="format"),
]


class CollectSettings(Strict):
    sources: list[Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> "CollectSettings":
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources have the name '{twice[0]}'")
        return self


# --- validate ------------------------------------------------------------------------------------------------------
class DriftSettings(Strict):
    """How far the data may be from the last accepted version (`haplovl data accept`): the largest share that would have
    to change for the two to be alike; null does not look."""

    sources: Share | None = 0.1
    kinds: Share | None = 0.1
    lengths: Share | None = 0.15
    """Characters of questions and answers, turns and pictures of a record: the one that moved most."""
    image_sizes: Share | None = 0.15
    vocabulary: Share | None = 0.2
    """Words of the answers."""


class ValidateSettings(Strict):
    max_quarantined_share: Share = 0.02
    """The stage fails when more than this share of the records is bad."""
    max_image_pixels: PositiveInt = 50_000_000
    """Larger images are refused from their header, before decoding."""
    min_image_side: PositiveInt = 4
    """Shorter side in pixels that an image must have at least."""
    max_aspect_ratio: Annotated[float, Field(ge=1.0)] = 30.0
    """Longer side over shorter side that an image may have at most."""
    max_characters: PositiveInt = 1_000_000
    """Longest text of a record, all turns together."""
    degenerate_repeats: Annotated[int, Field(ge=2)] = 8
    """Times that a word, being the whole answer, is repeated in an answer that teaches nothing."""
    repeated_ids: Literal["refuse", "number"] = "refuse"
    """What becomes of a record whose id an earlier one of its source has: it is quarantined or, unless it says the
    same, named ID~2, ID~3 and so on, for sets that give one id to all records of a picture, as LLaVA's do."""
    splits: SplitShares = SplitShares()
    benchmarks: list[str] = []
    """Folders of evaluation sets (pictures, JSON, JSONL, Parquet): what they show and ask is kept out of training."""
    benchmark_question_words: PositiveInt = 8
    """Shorter questions are not compared with those of evaluation sets: they are asked everywhere."""
    drift: DriftSettings = DriftSettings()


# --- prepare -------------------------------------------------------------------------------------------------------
class PrepareSettings(Strict):
    chat_template: Literal["plain", "vicuna", "llama-3", "chatml", "mistral"]
    max_tokens: PositiveInt
    """Longest record in tokens, image tokens included. No answer is ever cut."""
    too_long: Literal["quarantine", "drop_last_turns"] = "quarantine"
    """What happens to a longer record: it is refused, or whole turns are left out from its end until it fits."""
    max_image_side: PositiveInt | None = None
    """Pictures with a longer side are scaled down to this many pixels and stored as JPEG; by default all are copied as
    they are."""
    records_per_shard: PositiveInt = 2048
    """Most records in a shard. Where shards end is decided by the records, so that new ones change few shards."""
