"""Loading that refuses what transformers would fill with random numbers."""

from typing import Any

from safetensors import SafetensorError


class StrictLoading:
    """`from_pretrained` of whole checkpoints only, and from safetensors unless told otherwise."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As PreTrainedModel.from_pretrained.

        Raises:
            ValueError: weights are missing or damaged, have another shape than the configuration says, or are no
                safetensors.
        """
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ValueError(
                "ignore_mismatched_sizes would fill tensors with random numbers, which HaploVL refuses; load the "
                "checkpoint with its own configuration and change the model afterwards"
            )
        kwargs.setdefault("use_safetensors", True)
        kwargs["trust_remote_code"] = False
        wants_info = kwargs.pop("output_loading_info", False)
        place = f"the weights in {pretrained_model_name_or_path}"
        try:
            # With sizes ignored transformers names the tensors that do not fit, instead of raising without names.
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"{place} are damaged: {error}") from None
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            raise ValueError(f"{place} cannot be loaded; HaploVL loads safetensors only: {error}") from None
        shapes = info["mismatched_keys"]
        mismatched = [f"{key}: {list(found)} in the file, {list(own)} here" for key, found, own in shapes]
        if mismatched:
            raise ValueError(f"{place} do not fit its configuration: {_some(mismatched)}")
        if info["missing_keys"]:
            raise ValueError(
                f"{place} are incomplete: {len(info['missing_keys'])} missing ({_some(info['missing_keys'])})"
            )
        return (model, info) if wants_info else model


def _some(names: Any) -> str:
    return ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
