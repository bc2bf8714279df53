"""Loading that refuses what transformers would fill with random numbers."""

from typing import Any


class StrictLoading:
    """`from_pretrained` from safetensors only, and only of whole checkpoints."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As PreTrainedModel.from_pretrained.

        Raises:
            ValueError: weights are missing or have another shape than the configuration says.
        """
        kwargs.setdefault("use_safetensors", True)
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} do not fit its configuration: {error}"
            ) from None
        missing = sorted(info["missing_keys"])
        if missing:
            some = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} are incomplete: {len(missing)} missing ({some})"
            )
        return (model, info) if wants_info else model
