"""The two frozen teachers: fetched at a pinned revision, taken from a folder, or small ones trained here.

Whatever their origin, they end as `models/teachers/vision` and `models/teachers/language` (safetensors), with the
processor that the model will use in `models/teachers/processor` and their lineage in `teachers.json`. A CLIP is kept
whole, with its text tower and its tokenizer: `haplovl probe` classifies with them.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)
from transformers.utils import cached_file

from haplovl.data.conversation import TEMPLATES
from haplovl.errors import TemporaryError, UserError
from haplovl.files import TEACHERS, VALIDATED, read_json, require, sha256_of_folder, whole_folder, write_json
from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.model.inherit import vision_part
from haplovl.model.layout import tile_shapes
from haplovl.model.processing import IMAGE_TOKEN, VIDEO_TOKEN
from haplovl.settings import FolderTeacher, HubTeacher, Params

PAD_TOKEN = "<pad>"
NO_REVISION = "0" * 40
PIXELS = "preprocessor_config.json"
"""Where models of the hub say how their pixels are normalised, and where `models/teachers/vision` keeps that."""
NO_CODE = {"trust_remote_code": False}
"""Unless told so, transformers asks on the terminal whether code that comes with a model shall run."""


def make_teachers(params: Params) -> None:
    """Writes models/teachers/.

    Raises:
        UserError: a teacher cannot be found or fetched, or does not fit the model settings.
    """
    settings = params.teachers
    if "train" in (settings.language.kind, settings.vision.kind):
        require(VALIDATED, "validate")
    with whole_folder(TEACHERS) as folder:
        lineage: dict[str, Any] = {}
        if settings.language.kind == "train":
            from haplovl.teacher_training import train_language

            tokenizer, lineage["language"] = train_language(params, VALIDATED, folder / "language")
        else:
            tokenizer, lineage["language"] = _take_language(settings.language, params, folder / "language")
        if settings.vision.kind == "train":
            from haplovl.teacher_training import train_vision

            lineage["vision"] = train_vision(params, VALIDATED, tokenizer, folder / "vision")
        else:
            lineage["vision"] = _take_vision(settings.vision, folder / "vision")
        make_processor(folder, tokenizer, params).save_pretrained(folder / "processor")
        for name in ("vision", "language"):
            lineage[name]["sha256"] = sha256_of_folder(folder / name)
        write_json(folder / "teachers.json", lineage)
    print(f"teachers: vision {lineage['vision']['kind']}, language {lineage['language']['kind']} -> {TEACHERS}")


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Adds the placeholders, a padding token and the chat template's special tokens where they are missing."""
    extra = [IMAGE_TOKEN, VIDEO_TOKEN, *TEMPLATES[template].special_tokens]
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.add_special_tokens({"additional_special_tokens": extra}, replace_extra_special_tokens=False)
    # Generation must end where training ended its answers.
    tokenizer.eos_token = TEMPLATES[template].stop
    return tokenizer


def make_processor(folder: Path, tokenizer: PreTrainedTokenizerBase, params: Params) -> HaploProcessor:
    """The processor of the model that will inherit from the teachers in `folder`; follows from `params.model`."""
    vision = vision_part(AutoConfig.from_pretrained(folder / "vision"))
    normalise: dict[str, Any] = _normalisation(folder / "vision", vision.model_type)
    size, released = params.model.image_size, params.model.released_layout
    if params.model.fusion == "patches":
        normalise["tiling"] = "native"
    if released:
        points = [(rows * size, columns * size) for rows, columns in tile_shapes(params.model.max_tiles)]
        normalise |= {"tiling": "released", "image_grid_pinpoints": points}
    return HaploProcessor(
        image_processor=HaploImageProcessor(
            size, params.model.patch_size or vision.patch_size, params.model.max_tiles, **normalise
        ),
        tokenizer=tokenizer,
        chat_template=TEMPLATES[params.prepare.chat_template].jinja(),
        class_token=params.model.class_token,
        image_newline=params.model.image_newline,
        frame_newlines=not released,
    )


def _normalisation(folder: Path, kind: str) -> dict[str, Any]:
    """Mean and deviation of the pixels that the vision teacher knows; those of its kind where it does not tell."""
    if (folder / PIXELS).is_file():
        return read_json(folder / PIXELS)
    return {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3} if kind == "siglip_vision_model" else {}


def recipe_processor(params: Params) -> HaploProcessor:
    """The processor of this recipe's model, with the teachers' tokenizer.

    Prepared records hold one placeholder per picture, so that recipes with other models can share them and the
    teachers: `models/teachers/processor` is that of the recipe which made both.

    Raises:
        UserError: there are no teachers yet.
    """
    folder = require(TEACHERS, "teachers")
    return make_processor(folder, AutoTokenizer.from_pretrained(folder / "processor", **NO_CODE), params)


def load_vision(folder: Path) -> PreTrainedModel:
    """The vision teacher of `models/teachers` in eval mode, in float32 whatever it was saved in."""
    kind = vision_part(AutoConfig.from_pretrained(folder)).model_type
    cls = CLIPVisionModel if kind == "clip_vision_model" else SiglipVisionModel
    return cls.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()


def load_language(folder: Path) -> PreTrainedModel:
    """The language teacher of `models/teachers` in eval mode, in float32 whatever it was saved in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **NO_CODE).eval()


def _take_vision(source: HubTeacher | FolderTeacher, target: Path) -> dict[str, Any]:
    place, options, lineage = _place(source, "vision")
    config = _load(lambda: AutoConfig.from_pretrained(place, **options), place)
    try:
        kind = vision_part(config).model_type
    except ValueError as error:
        raise UserError(f"teachers.vision: {error}") from None
    cls = CLIPVisionModel if kind == "clip_vision_model" else SiglipVisionModel
    teacher = _load_whole(cls, place, options)
    if config.model_type == "clip":
        teacher = _with_text_tower(place, options) or teacher
        _take_clip_tokenizer(place, options, target)
    teacher.save_pretrained(target)
    _take_normalisation(place, options, target)
    return lineage


def _with_text_tower(place: str, options: dict[str, Any]) -> CLIPModel | None:
    """The CLIP with both towers and projections; None where the file holds no more than its vision tower."""
    model, info = _load(lambda: CLIPModel.from_pretrained(place, output_loading_info=True, **options), place)
    return None if info["missing_keys"] else model


def _take_clip_tokenizer(place: str, options: dict[str, Any], target: Path) -> None:
    """Saves the CLIP's own tokenizer, where it comes with one; that of the language teacher knows other words."""
    asked = {**options, "_raise_exceptions_for_missing_entries": False}
    if _load(lambda: cached_file(place, "tokenizer_config.json", **asked), place) is not None:
        _load(lambda: AutoTokenizer.from_pretrained(place, **options), place).save_pretrained(target)


def _take_normalisation(place: str, options: dict[str, Any], target: Path) -> None:
    """Keeps mean and deviation of the teacher's pixels where it comes with them: not every CLIP has OpenAI's."""
    asked = {**options, "_raise_exceptions_for_missing_entries": False}
    for name in (PIXELS, "processor_config.json"):
        path = _load(lambda name=name: cached_file(place, name, **asked), place)
        told = read_json(Path(path)) if path is not None else {}
        told = told.get("image_processor", told) if isinstance(told, dict) else {}
        if not {"image_mean", "image_std", "do_normalize"} & set(told):
            continue
        plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3} if told.get("do_normalize") is False else told
        found = {key: plain.get(key) for key in ("image_mean", "image_std")}
        for key, values in found.items():
            good = (
                isinstance(values, list) and len(values) == 3 and all(type(value) in (int, float) for value in values)
            )
            if not good or (key == "image_std" and min(values) <= 0):
                raise UserError(f"teachers.vision: '{key}' in {name} of '{place}' is {values!r:.60}, not three numbers")
        write_json(target / PIXELS, found)
        return


def _take_language(
    source: HubTeacher | FolderTeacher, params: Params, target: Path
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    place, options, lineage = _place(source, "language")
    tokenizer = _load(lambda: AutoTokenizer.from_pretrained(place, **options), place)
    model = _load_whole(AutoModelForCausalLM, place, options | {"dtype": "auto"})
    tokenizer = prepare_tokenizer(tokenizer, params.prepare.chat_template)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return tokenizer, lineage


def _place(source: HubTeacher | FolderTeacher, role: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Where to load a teacher from, with which options, and what its lineage says."""
    if isinstance(source, FolderTeacher):
        path = Path(os.path.expanduser(source.path))
        if not (path / "config.json").is_file():
            raise UserError(f"teachers.{role}: '{source.path}' is not a model folder (it has no config.json)")
        return str(path), dict(NO_CODE), {"kind": "folder", "path": source.path}
    if source.revision == NO_REVISION:
        raise UserError(
            f"teachers.{role}: pin the revision of '{source.id}' "
            f"(git ls-remote https://huggingface.co/{source.id} HEAD shows the newest)"
        )
    return (
        source.id,
        {**NO_CODE, "revision": source.revision},
        {"kind": "hub", "id": source.id, "revision": source.revision},
    )


def _load_whole(cls: Any, place: str, options: dict[str, Any]) -> PreTrainedModel:
    """A teacher with all its weights; transformers would draw those that a file lacks, and go on.

    Files ending in .bin are read as tensors alone (torch's weights_only); saving converts them to safetensors, once.
    """
    # transformers would ask a service of the hub to convert a .bin file.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    options = options | {"weights_only": True, "output_loading_info": True}
    model, info = _load(lambda: cls.from_pretrained(place, **options), place)
    missing = sorted(info["missing_keys"])
    if missing:
        some = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise UserError(f"the teacher '{place}' is incomplete: {len(missing)} missing weights ({some})")
    return model


def _load(load: Callable[[], Any], place: str) -> Any:
    """Runs a transformers loader and turns what can go wrong outside this project into one sentence."""
    try:
        return load()
    except pickle.UnpicklingError:
        raise UserError(
            f"the teacher '{place}' cannot be loaded: its weight file holds more than tensors, and could run code when "
            "opened; ask for a safetensors file"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise UserError(
                f"the teacher '{place}' comes with code of its own, which is never run here; take a model that "
                "transformers itself knows"
            ) from None
        if "mismatched_sizes" in reason:
            reason = "its weights have other shapes than its config.json says"
        offline = isinstance(error, (ConnectionError, TimeoutError)) or "couldn't connect" in reason
        kind = TemporaryError if offline else UserError
        raise kind(f"the teacher '{place}' cannot be loaded: {reason[:300]}") from None


def seed_everything(seed: int) -> None:
    """Seeds torch and asks for deterministic kernels, so that the same inputs give the same bytes."""
    # cuBLAS is deterministic with a fixed workspace only, and reads this when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
