"""params.yaml and compute profiles as strict typed models.

Every section of params.yaml is named after the DVC stage that reads it; `model` and `seed` are read by several.
Unknown keys, mistyped keys and wrong types are errors that name the key and the nearest valid one.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from haplovl.data_settings import CollectSettings, PositiveFloat, PositiveInt, PrepareSettings, Share, ValidateSettings
from haplovl.model_settings import ModelSettings
from haplovl.strict import SettingsError, Strict, load_strict
from haplovl.training_settings import (  # noqa: F401  (settings of all rooms are imported from here)
    ALL_LOSSES,
    BatchSettings,
    CurriculumPhase,
    DistillationLosses,
    DistillationSettings,
    LoraSettings,
    NoStageSettings,
    OptimizerSettings,
    Part,
    PretrainingSettings,
    Stage1Settings,
    Stage2Settings,
    StageMixture,
    StageSettings,
)

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

    @model_validator(mode="after")
    def _a_batch_holds_a_group(self) -> "TrainedVisionTeacher":
        if self.group > self.batch:
            raise ValueError(f"group {self.group} is more than a batch of {self.batch}")
        return self


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
    """Most questions, and pictures of as many, that are computed at once."""
    batch_tokens: PositiveInt = 16384
    """Most tokens, with padding, that are computed at once; long prompts make smaller batches."""
    samples_in_report: PositiveInt = 30


class RegisterSettings(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$", max_length=64)] = "haplovl"
    """Of the model in git's tags, which GTO writes."""
    min_accuracy: Share = 0.0
    """Gate: overall exact match that a candidate needs."""
    min_margin: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.0
    """Gate: accuracy that every question type needs above the better of its two baselines."""
    wandb_registry: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=64)] | None = "model"
    """W&B's registry that versions are linked to while W&B is online; every organisation starts with `model`."""


class CompareSettings(Strict):
    """`make compare`: recipes of recipes/ on equal terms; see docs/comparison.md.

    No key has a default: comparison/dvc.yaml reads them too, and finds what the file says only.
    """

    changes: dict[str, Any]
    """Changes to the settings of this file that all runs share, below those of their recipes: a size that many runs
    can afford."""
    recipe_changes: dict[str, dict[str, Any]]
    """Changes to single recipes, by name, on top of what their files say: sizes that follow from this file's."""
    recipes: Annotated[list[str], Field(min_length=2)]
    """The first one's compute is everybody's budget."""
    samples: list[str]
    """Recipes that are also trained on as many records as the first one."""
    ablations: list[str]
    """Recipes of `make ablations`: the first one with a single switch changed, at the same compute."""
    seeds: Annotated[list[int], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_nothing_twice(self) -> "CompareSettings":
        for name in ("recipes", "samples", "ablations", "seeds"):
            if twice := [value for value, times in Counter(getattr(self, name)).items() if times > 1]:
                raise ValueError(f"compare.{name} names {twice[0]} twice")
        return self


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
    compare: CompareSettings | None = None

    @property
    def training(self) -> dict[str, StageSettings]:
        """The stages that train, by name."""
        stages = {"stage1": self.stage1, "stage2": self.stage2}
        return {name: stage for name, stage in stages.items() if isinstance(stage, StageSettings)}

    @model_validator(mode="after")
    def _mixtures_know_the_sources(self) -> "Params":
        """Gives the stages the weights of the sources, so that no prepared shard depends on them."""
        weights = {source.name: source.weight for source in self.collect.sources if source.weight != 1.0}
        names = {source.name for source in self.collect.sources}

        def weighted(mixture: StageMixture, where: str) -> StageMixture:
            if unknown := sorted(set(mixture.sources) - names):
                raise ValueError(f"{where}.sources names '{unknown[0]}', which is not in collect.sources")
            return mixture.model_copy(update={"sources": weights | mixture.sources})

        for name, stage in self.training.items():
            phases = [
                phase.model_copy(update={"mixture": weighted(phase.mixture, f"{name}.curriculum.{number}.mixture")})
                if phase.mixture
                else phase
                for number, phase in enumerate(stage.curriculum)
            ]
            own = {"mixture": weighted(stage.mixture, f"{name}.mixture"), "curriculum": phases}
            object.__setattr__(self, name, stage.model_copy(update=own))  # settings are frozen
        return self

    @model_validator(mode="after")
    def _rows_hold_every_record(self) -> "Params":
        for name, stage in self.training.items():
            if stage.batch.row_tokens < self.prepare.max_tokens:
                raise ValueError(f"{name}.batch.row_tokens must be at least prepare.max_tokens")
        return self

    @model_validator(mode="after")
    def _stage1_fits_the_model(self) -> "Params":
        if isinstance(self.stage1, DistillationSettings):
            if self.model.fusion != "early":
                raise ValueError(
                    f"stage1.objective: distillation trains a pre-decoder, which model.fusion: {self.model.fusion} has "
                    "not; choose next_token or none"
                )
            losses = self.stage1.losses
            if self.model.connector == "text_head" and not (losses.feature or losses.current_token):
                raise ValueError(
                    "model.connector: text_head is learnt by stage 1's losses feature and current_token, which both "
                    "have weight 0; set it to random"
                )
            vision, layer = self.teachers.vision, self.stage1.vision_layer
            if vision.kind == "train" and not -vision.layers - 1 <= layer <= vision.layers:
                raise ValueError(f"stage1.vision_layer is {layer}, but the vision teacher has {vision.layers} layers")
            return self
        if self.model.connector == "text_head":
            raise ValueError(
                "model.connector: text_head is a head of the distillation, which this stage 1 is not; set it to random"
            )
        return self


class SlurmSettings(Strict):
    """What a job asks of Slurm; what is not set is left to the cluster's defaults."""

    nodes: PositiveInt = 1
    """Nodes that the profile's processes are spread over, as many on each."""
    partition: str | None = None
    account: str | None = None
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d{2}){0,2}$")] | None = None
    """As sbatch takes it: minutes, `hours:minutes:seconds` or `days-hours`."""
    stop_seconds: PositiveInt = 120
    """How long before the time limit training is told to write a checkpoint; the job then queues again."""
    most_requeues: PositiveInt = 100
    """How often a job that was stopped so may queue again."""
    options: list[Annotated[str, Field(pattern=r"^--\S")]] = []
    """Further options of sbatch, such as `--qos=long` or `--exclusive`."""

    @field_validator("time_limit", mode="before")
    @classmethod
    def _is_in_quotes(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError("time_limit belongs in quotes: without them YAML reads 24:00:00 as the number 86400")
        return value


class SkySettings(Strict):
    """How SkyPilot rents the nodes of a training stage; see infra/sky/README.md."""

    task: str = "infra/sky/train.yaml"
    """SkyPilot task: devices, storage, and what a node does."""
    nodes: PositiveInt = 1
    """Nodes that share the profile's processes evenly."""
    state_bucket: str
    """Bucket in which checkpoints outlive the nodes."""
    secrets: list[str] = []
    """Names of environment variables that go to the nodes as secrets, where they are set."""


class ComputeProfile(Strict):
    """Where and how a job runs; never part of a result's identity."""

    name: str
    launcher: Literal["local", "slurm", "sky"] = "local"
    """Who starts the training stages' processes; everything else runs where the command runs."""
    slurm: SlurmSettings | None = None
    sky: SkySettings | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    processes: PositiveInt = 1
    threads: PositiveInt | None = None
    """CPU threads per process; all cores by default."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed splits over the processes: 1 optimiser states, 2 also gradients, 3 also weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What rests in the memory of the CPU: optimiser states (ZeRO 1 to 3), or also the weights (ZeRO 3)."""
    activation_checkpointing: bool = False
    """Recompute every layer in the backward pass: a third more operations for a fraction of the memory."""
    micro_batch_rows: PositiveInt
    """Rows per forward pass on one process; the rest of a step's rows is gradient accumulation."""
    attention: Literal["sdpa", "eager", "documents", "flex_attention"] = "sdpa"
    """Attention backend of training: flex_attention on GPUs; on CPUs, documents for rows of long documents."""
    loader_workers: PositiveInt = 2
    """Threads per process that decode pictures beside the training step; one more packs rows."""
    accelerator: str | None = None
    """Name of one device as its maker calls it, for people."""
    memory_gib: PositiveFloat | None = None
    """Memory of one device, which `haplovl plan` measures its estimate against."""
    peak_tflops: PositiveFloat | None = None
    """Dense bfloat16 peak of one device, in 10^12 operations a second: what model FLOPs utilisation (MFU) refers to."""
    price_per_hour: PositiveFloat | None = None
    """Price of one device for an hour, in US dollars."""

    @model_validator(mode="after")
    def _launcher_has_its_section(self) -> "ComputeProfile":
        if (self.launcher == "slurm") != (self.slurm is not None):
            raise ValueError("launcher: slurm and a section slurm need each other")
        if self.slurm is not None and self.processes % self.slurm.nodes:
            raise ValueError(f"processes: {self.processes} cannot be spread evenly over {self.slurm.nodes} nodes")
        return self

    @model_validator(mode="after")
    def _offload_what_is_split(self) -> "ComputeProfile":
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload: {self.offload} needs zero_stage {least} or more, found {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _sky_shares_the_processes(self) -> "ComputeProfile":
        if (self.launcher == "sky") != (self.sky is not None):
            raise ValueError("launcher: sky and a section sky need each other; infra/sky/README.md shows one")
        if self.sky and self.processes % self.sky.nodes:
            raise ValueError(f"sky.nodes: {self.sky.nodes} nodes cannot share {self.processes} processes evenly")
        return self


def load_params(path: Path | str = PARAMS_FILE) -> Params:
    """Reads and checks a params file.

    Raises:
        SettingsError: the file is missing, is no YAML mapping, or a key or value is wrong (all of them are named).
    """
    return load_strict(Path(path), Params)


def load_compare() -> CompareSettings:
    """The section `compare` of params.yaml.

    Raises:
        SettingsError: there is none.
    """
    settings = load_params().compare
    if settings is None:
        raise SettingsError("params.yaml has no section 'compare': it names the recipes and seeds to be compared")
    return settings


def load_compute(name: str | None = None) -> ComputeProfile:
    """Reads a compute profile: by name, else from HAPLOVL_COMPUTE, else `laptop`.

    Raises:
        SettingsError: no such profile, or it is wrong.
    """
    name = name or os.environ.get("HAPLOVL_COMPUTE") or "laptop"
    path = COMPUTE_FOLDER / f"{name}.yaml"
    known = sorted(p.stem for p in COMPUTE_FOLDER.glob("*.yaml"))
    if name not in known:
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
