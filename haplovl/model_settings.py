"""The section `model` of params.yaml: what the model is made of."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from haplovl.data_settings import PositiveInt
from haplovl.strict import Strict

_NO_PRE_DECODER: dict[str, Any] = {
    "class_token": False,
    "pre_rotary_increment": 0.0,
    "pre_decoder": "inherit",
    "pre_decoder_layers": None,
    "released_layout": False,
    "connector": "random",
    "text_path": "connector",
}
_WITHOUT: dict[str, dict[str, Any]] = {
    "early": {"tower_layer": -2, "patch_size": None},
    "tower": {**_NO_PRE_DECODER, "image_newline": False, "patch_size": None},
    "patches": {**_NO_PRE_DECODER, "max_tiles": 1, "tower_layer": -2},
}
"""Values of the settings that mean nothing to a fusion: any other is a mistake."""


class ModelSettings(Strict):
    """What the model is made of; see docs/model.md.

    With `fusion` tower or patches, what only early fusion has is off, and the language model's mask is causal unless
    `post_mask` says otherwise.
    """

    fusion: Literal["early", "tower", "patches"] = "early"
    """Where pictures meet text: in a pre-decoder (HaploVL), in the language model after a vision tower and an MLP
    (LLaVA), or in the language model as raw patches (SOLO)."""
    image_size: PositiveInt
    """Side in pixels that images are padded to square and resized to; a multiple of the teacher's patch size. With
    fusion patches, the longest side that a picture may have; a multiple of `patch_size`."""
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
    text_path: Literal["connector", "residual", "gated", "direct"] = "connector"
    """How text enters the language model: through pre-decoder and connector, that plus the language model's own
    embedding of the token, the same behind a gate that starts closed, or as that embedding alone (pictures still meet
    it in the pre-decoder)."""
    tower_layer: int = -2
    """Hidden state of the vision teacher that enters the MLP (fusion tower); later layers are left out."""
    patch_size: PositiveInt | None = None
    """Side of a patch in pixels (fusion patches); the others have the vision teacher's."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_fusion(cls, data: Any) -> Any:
        fusion = data.get("fusion") if isinstance(data, dict) else None
        if fusion not in ("tower", "patches"):
            return data
        own = {"class_token": False, "image_newline": fusion == "patches", "connector": "random", "post_mask": "causal"}
        return own | data

    @model_validator(mode="after")
    def _fit_the_fusion(self) -> "ModelSettings":
        wrong = [name for name, value in _WITHOUT[self.fusion].items() if getattr(self, name) != value]
        if wrong:
            named = ", ".join(f"{name}: {getattr(self, name)}" for name in wrong)
            raise ValueError(f"fusion: {self.fusion} does not go with {named}")
        if self.fusion == "patches" and self.patch_size is None:
            raise ValueError("fusion: patches needs patch_size, the side of a patch in pixels")
        if self.patch_size and self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        return self

    @model_validator(mode="after")
    def _fit_the_released_layout(self) -> "ModelSettings":
        needed = {
            "class_token": False,
            "image_newline": True,
            "pre_rotary_increment": 1.0,
            "post_rotary_increment": 1.0,
            "post_mask": "mixed",
            "text_path": "connector",
        }
        wrong = [f"{name}: {value}" for name, value in needed.items() if getattr(self, name) != value]
        if self.released_layout and wrong:
            raise ValueError(f"released_layout needs {', '.join(wrong)}")
        return self
