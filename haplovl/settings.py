"""params.yaml and compute profiles as strict typed models.

Every section of params.yaml is named after the DVC stage that reads it; `model` and `seed` are read by several.
Unknown keys, mistyped keys and wrong types are errors that name the key and the nearest valid one.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from haplovl.data_settings import CollectSettings, PositiveFloat, PositiveInt, PrepareSettings, Share, ValidateSettings
from haplovl.strict import SettingsError, Strict, load_strict

PARAMS_FILE = Path("params.yaml")
COMPUTE_FOLDER = Path("infra/compute")


# --- teachers ------------------------------------------------------------------------------------------------------
class HubTeacher(Strict):
    """A published model at a pinned revision."""

    kind: Literal["hub"]
    id: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class FolderTeacher(Strict):
    """A transformers folder on this machine."""

    kind: Literal["folder"]
    path: str


class TrainedVisionTeacher(Strict):
    """A small CLIP trained here on the captions of the training scenes."""

    kind: Literal["train"]
    patch_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    steps: PositiveInt
    batch: PositiveInt
    group: PositiveInt = 1
    """Neighbouring records that enter a batch together: hard negatives, where a source puts similar ones in a row."""
    learning_rate: PositiveFloat


class TrainedLanguageTeacher(Strict):
    """A small Llama with its own byte-level BPE tokenizer trained here on the training text."""

    kind: Literal["train"]
    vocabulary: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    max_positions: PositiveInt
    steps: PositiveInt
    batch: PositiveInt
    learning_rate: PositiveFloat


class TeachersSettings(Strict):
    vision: HubTeacher | FolderTeacher | TrainedVisionTeacher = Field(discriminator="kind")
    language: HubTeacher | FolderTeacher | TrainedLanguageTeacher = Field(discriminator="kind")


# --- model ---------------------------------------------------------------------------------------------------------
class ModelSettings(Strict):
    """What the single transformer is made of; see docs/model.md."""

    image_size: PositiveInt
    """Side in pixels that images are padded to square and resized to; a multiple of the teacher's patch size."""
    class_token: bool = True
    """Keep the vision teacher's class token inside every image block."""
    image_newline: bool = True
    """End every row of patches with a learned newline token."""
    pre_rotary_increment: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Rotary step between the tokens of one image in the pre-decoder: 0 all equal, 1 sequential (V2PE)."""
    post_rotary_increment: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    pre_decoder: Literal["inherit", "random"] = "inherit"
    pre_decoder_layers: PositiveInt | None = None
    """First layers of the vision teacher to keep; all by default."""
    post_mask: Literal["mixed", "causal"] = "mixed"
    """Mask of the language model: tokens of one image see each other both ways, or causal throughout."""
    max_tiles: PositiveInt = 1
    """Most tiles of `image_size` pixels that show one picture; 1 gives every picture one tile, padded to a square."""
    released_layout: bool = False
    """Build what a checkpoint of the authors' layout can hold (docs/model.md), so that export-released can write it."""
    connector: Literal["text_head", "random"] = "text_head"
    """Start of the connector: stage 1's text head, or random."""

    @model_validator(mode="after")
    def _fit_the_released_layout(self) -> "ModelSettings":
        needed = {
            "class_token": False,
            "image_newline": True,
            "pre_rotary_increment": 1.0,
            "post_rotary_increment": 1.0,
            "post_mask": "mixed",
        }
        wrong = [f"{name}: {value}" for name, value in needed.items() if getattr(self, name) != value]
        if self.released_layout and wrong:
            raise ValueError(f"released_layout needs {', '.join(wrong)}")
        return self


# --- train ---------------------------------------------------------------------------------------------------------
class OptimizerSettings(Strict):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: PositiveFloat
    min_learning_rate_share: Share = 0.0
    """Learning rate at the last step as a share of the peak."""
    warmup_share: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: PositiveFloat = 1.0

    @model_validator(mode="before")
    @classmethod
    def _yaml_lists_are_tuples(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("betas"), list):
            data = {**data, "betas": tuple(float(beta) for beta in data["betas"])}
        return data


class BatchSettings(Strict):
    """One optimiser step sees `rows` packed rows of at most `row_tokens` tokens."""

    rows: PositiveInt
    row_tokens: PositiveInt
    row_images: PositiveInt | None = None
    """Most pictures in a row, which bounds the memory of their pixels; no bound by default."""
    lookahead: PositiveInt = 4096
    """Documents that packing may choose from, to fill the gaps of long ones with short ones."""


class StageMixture(Strict):
    """Relative weights of record kinds; `interleaved` joins several records into one document."""

    instruction: Annotated[float, Field(ge=0.0)] = 1.0
    caption: Annotated[float, Field(ge=0.0)] = 0.0
    text: Annotated[float, Field(ge=0.0)] = 1.0
    interleaved: Share = 0.0
    """Share of the documents that are built from several records (stage 1)."""
    sources: dict[str, Annotated[float, Field(ge=0.0)]] = {}
    """Factors by source's name; `collect.sources` gives those that are not set here (`weight`)."""


class CurriculumPhase(Strict):
    """Short records first: `epochs` passes over the `share` of the records with the fewest tokens."""

    share: Share
    epochs: PositiveInt


class StageSettings(Strict):
    """What both training stages have in common."""

    steps: PositiveInt
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: BatchSettings
    optimizer: OptimizerSettings
    mixture: StageMixture = StageMixture()
    curriculum: list[CurriculumPhase] = []
    """What comes before the passes over all records, in this order."""
    checkpoint_every: PositiveInt = 50


class Stage1Settings(StageSettings):
    """Distillation of the pre-decoder from the two frozen teachers."""

    objective: Literal["distillation"] = "distillation"
    vision_layer: int = -1
    """Hidden state of the vision teacher that the image tokens must match (index into its hidden states)."""
    temperature: PositiveFloat = 1.0
    """tau of the current-token prediction."""


class LoraSettings(Strict):
    """Low-rank adapters on the language model's linear layers instead of tuning its weights (arXiv 2106.09685)."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    """Scale: adapters are added with the factor alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class Stage2Settings(StageSettings):
    """Full instruction tuning."""

    objective: Literal["instruction"] = "instruction"
    lora: LoraSettings | None = None
    """Adapters on the post-decoder, merged into it at the end; by default all its weights are tuned."""


# --- probe, evaluate, register --------------------------------------------------------------------------------------
class ProbeSettings(Strict):
    """How stage 1 is measured on its own; see docs/probe.md."""

    records: PositiveInt = 400
    """Held-out records that are read, and held-out pictures that are compared with the teacher."""
    zero_shot_pictures: PositiveInt = 960
    """Pictures that are classified, spread evenly over their classes."""
    fit_pictures: PositiveInt = 2000
    """Training pictures on which a linear map from our class tokens to the teacher's is fitted."""
    imagenet: str | None = None
    """A folder with `val/CLASS/*.JPEG` and the classes' names, to classify as well."""
    batch: PositiveInt = 64


class EvaluateSettings(Strict):
    questions_per_type: PositiveInt = 200
    max_new_tokens: PositiveInt = 8
    batch: PositiveInt = 128
    samples_in_report: PositiveInt = 30


class RegisterSettings(Strict):
    name: str = "haplovl"
    min_accuracy: Share = 0.0
    """Gate: overall exact match that a candidate needs."""
    min_margin: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.0
    """Gate: accuracy that every question type needs above the better of its two baselines."""


class Params(Strict):
    """The whole of params.yaml."""

    recipe: str
    seed: int
    model: ModelSettings
    collect: CollectSettings
    validate_: ValidateSettings = Field(default=ValidateSettings(), alias="validate")
    teachers: TeachersSettings
    prepare: PrepareSettings
    stage1: Stage1Settings
    stage2: Stage2Settings
    probe: ProbeSettings = ProbeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    register_: RegisterSettings = Field(default=RegisterSettings(), alias="register")

    @model_validator(mode="after")
    def _mixtures_know_the_sources(self) -> "Params":
        """Gives the stages the weights of the sources, so that no prepared shard depends on them."""
        weights = {source.name: source.weight for source in self.collect.sources if source.weight != 1.0}
        names = {source.name for source in self.collect.sources}
        for name in ("stage1", "stage2"):
            stage = getattr(self, name)
            if unknown := sorted(set(stage.mixture.sources) - names):
                raise ValueError(f"{name}.mixture.sources names '{unknown[0]}', which is not in collect.sources")
            mixture = stage.mixture.model_copy(update={"sources": weights | stage.mixture.sources})
            object.__setattr__(self, name, stage.model_copy(update={"mixture": mixture}))  # settings are frozen
        return self

    @model_validator(mode="after")
    def _rows_hold_every_record(self) -> "Params":
        for name in ("stage1", "stage2"):
            if getattr(self, name).batch.row_tokens < self.prepare.max_tokens:
                raise ValueError(f"{name}.batch.row_tokens must be at least prepare.max_tokens")
        return self


class ComputeProfile(Strict):
    """Where and how a job runs; never part of a result's identity."""

    name: str
    launcher: Literal["local"] = "local"
    device: Literal["cpu", "cuda"] = "cpu"
    processes: PositiveInt = 1
    threads: PositiveInt | None = None
    """CPU threads per process; all cores by default."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed splits over the processes: 1 optimiser states, 2 also gradients, 3 also weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What rests in the memory of the CPU: optimiser states (ZeRO 1 to 3), or also the weights (ZeRO 3)."""
    activation_checkpointing: bool = False
    """Recompute every layer in the backward pass: a quarter more work for a fraction of the memory."""
    micro_batch_rows: PositiveInt
    """Rows per forward pass on one process; the rest of a step's rows is gradient accumulation."""
    attention: Literal["sdpa", "eager", "documents", "flex_attention"] = "sdpa"
    """Attention backend of training: flex_attention on GPUs; on CPUs, documents for rows of long documents."""
    loader_workers: PositiveInt = 2
    """Threads per process that decode pictures and pack rows beside the training step."""
    accelerator: str | None = None
    """Name of one device as its maker calls it, for people."""
    memory_gib: PositiveFloat | None = None
    """Memory of one device, which `haplovl plan` measures its estimate against."""
    peak_tflops: PositiveFloat | None = None
    """Dense bfloat16 peak of one device, in 10^12 operations a second: what model FLOPs utilisation (MFU) refers to."""
    price_per_hour: PositiveFloat | None = None
    """Price of one device for an hour, in US dollars."""

    @model_validator(mode="after")
    def _offload_what_is_split(self) -> "ComputeProfile":
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload: {self.offload} needs zero_stage {least} or more, found {self.zero_stage}")
        return self


def load_params(path: Path | str = PARAMS_FILE) -> Params:
    """Reads and checks a params file.

    Raises:
        SettingsError: the file is missing, is no YAML mapping, or a key or value is wrong (all of them are named).
    """
    return load_strict(Path(path), Params)


def load_compute(name: str | None = None) -> ComputeProfile:
    """Reads a compute profile: by name, else from HAPLOVL_COMPUTE, else `laptop`.

    Raises:
        SettingsError: no such profile, or it is wrong.
    """
    name = name or os.environ.get("HAPLOVL_COMPUTE") or "laptop"
    path = COMPUTE_FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in COMPUTE_FOLDER.glob("*.yaml"))
        raise SettingsError(f"no compute profile '{name}' in {COMPUTE_FOLDER}/; there is: {', '.join(known) or 'none'}")
    profile = load_strict(path, ComputeProfile)
    if profile.name != name:
        raise SettingsError(f"{path}: 'name' must be '{name}' like the file, found '{profile.name}'")
    return profile


def fingerprint(value: Any) -> str:
    """sha256 of a JSON-able value or a settings model, independent of key order."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", by_alias=True)
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
