"""Settings of the two training stages: what is learnt from which records, and how it is optimised."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from haplovl.data_settings import PositiveFloat, PositiveInt, Share
from haplovl.errors import UserError
from haplovl.strict import Strict

Weight = Annotated[float, Field(ge=0.0)]
Part = Literal["image_embedding", "tower", "text_projection", "pre_decoder", "connector", "language_model"]
"""Parts of the model that may have a learning rate of their own; the head belongs to the language model."""


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerSettings(Strict):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: PositiveFloat
    min_learning_rate_share: Share = 0.0
    """Learning rate that the cosine ends at, as a share of the peak."""
    rate_factors: dict[Part, Weight] = {}
    """Factors on the learning rate of single parts of the model; 0 freezes a part, 1 is the default."""
    warmup_share: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.98)
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

    instruction: Weight = 1.0
    caption: Weight = 0.0
    text: Weight = 1.0
    interleaved: Share = 0.0
    """Share of the documents that are built from several records."""
    sources: dict[str, Weight] = {}
    """Factors by source's name; `collect.sources` gives those that are not set here (`weight`)."""


class CurriculumPhase(Strict):
    """`epochs` passes over the `share` of the records with the fewest tokens: short ones first."""

    share: Share
    epochs: PositiveInt
    mixture: StageMixture | None = None
    """Mixture of this phase; the stage's by default."""


class StageSettings(Strict):
    """What all stages that train have in common."""

    steps: PositiveInt
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: BatchSettings
    optimizer: OptimizerSettings
    mixture: StageMixture = StageMixture()
    curriculum: list[CurriculumPhase] = []
    """What comes before the passes over all records, in this order."""
    checkpoint_every: PositiveInt = 50


class DistillationLosses(Strict):
    """Weights of stage 1's three losses; 0 leaves one out, and what only it needs."""

    vision: Weight = 1.0
    feature: Weight = 1.0
    current_token: Weight = 1.0

    @model_validator(mode="after")
    def _something_is_learnt(self) -> "DistillationLosses":
        if not (self.vision or self.feature or self.current_token):
            raise ValueError("all three losses have weight 0; for no stage 1 at all, set stage1.objective: none")
        return self


ALL_LOSSES = DistillationLosses()


class DistillationSettings(StageSettings):
    """Stage 1 of HaploVL: distillation of the pre-decoder from the two frozen teachers."""

    objective: Literal["distillation"]
    vision_layer: int = -1
    """Hidden state of the vision teacher that the image tokens must match (index into its hidden states)."""
    temperature: PositiveFloat = 1.0
    """tau of the current-token prediction."""
    losses: DistillationLosses = ALL_LOSSES

    def taught_state(self, states: int) -> int:
        """Which of the vision teacher's hidden states `vision_layer` names, counted from the embeddings' 0.

        Raises:
            UserError: it has no such state.
        """
        layer = self.vision_layer
        if not -states <= layer < states:
            raise UserError(f"stage1.vision_layer is {layer}, but the vision teacher has {states} hidden states")
        return layer % states


class PretrainingSettings(StageSettings):
    """Stage 1 of other recipes: next-token prediction, by parts of the model (LLaVA) or all of it (SOLO)."""

    objective: Literal["next_token"]


class NoStageSettings(Strict):
    """No stage 1: stage 2 starts from what the teachers give."""

    objective: Literal["none"]


Stage1Settings = Annotated[
    DistillationSettings | PretrainingSettings | NoStageSettings, Field(discriminator="objective")
]


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
