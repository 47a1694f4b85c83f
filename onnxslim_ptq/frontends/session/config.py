"""The classes of a session with the names, fields and defaults of msModelSlim's document, whose limits are checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
)

from onnxslim_ptq.core.config import number, problem, show
from onnxslim_ptq.core.match import Pattern
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.export.weight_files import SAVE_TYPES
from onnxslim_ptq.recipes.explain import meant

__all__ = [
    "ACT_METHODS",
    "PROCESSORS",
    "FA3ProcessorConfig",
    "M3ProcessorConfig",
    "M4ProcessorConfig",
    "M6Config",
    "M6ProcessorConfig",
    "SaveProcessorConfig",
    "SessionConfig",
    "SessionFile",
    "W8A8DynamicProcessorConfig",
    "W8A8DynamicQuantConfig",
    "W8A8ProcessorConfig",
    "W8A8QuantConfig",
    "W8A8TimeStepProcessorConfig",
    "W8A8TimeStepQuantConfig",
]

# act_method -> range of a recipe. msModelSlim documents `mixed` for one class and takes only `mix`.
ACT_METHODS = {
    "minmax": "mean_minmax",
    "histogram": "histogram",
    "mixed": "mixed",
    "mix": "mixed",
    "minmax-global": "minmax",
}


class _Config(BaseModel):
    """An unknown or malformed field is a RecipeError of one line that names it and what it takes."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise RecipeError(f"{type(self).__name__}: {_line(error, type(self))}") from None


def _line(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"]) or "session"
    if first["type"] == "missing":
        return f"{path}: is required"
    if first["type"] == "extra_forbidden":
        fields = list(model.model_fields)
        return f"{path}: unknown field{meant(path, fields)}; accepted: {', '.join(fields) or 'none'}"
    if first["type"] == "literal_error":
        return f"{path}: got {show(first['input'])}; use {first['ctx']['expected']}"
    if first["type"] == "value_error":  # a nested class, which has said all of it
        return f"{path}: {first['ctx']['error']}"
    if first["type"] == "recipe":
        return f"{path}: {first['msg']}"
    return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}, got {show(first['input'])}"


def _known_method(method: str) -> str:
    if method not in ACT_METHODS:
        raise problem(
            f"{method!r} is unknown{meant(method, ACT_METHODS)}; use one of {', '.join(ACT_METHODS)}"
        )
    return method


def _name(name: str) -> str:
    try:
        Pattern.parse(name)
    except ValueError as error:
        raise problem(str(error)) from None
    return name


def _known_save_type(kind: str) -> str:
    if kind not in SAVE_TYPES:
        raise problem(f"{kind!r} is unknown; use {', '.join(SAVE_TYPES)}")
    return kind


ActMethod = Annotated[str, AfterValidator(_known_method)]
Names = list[Annotated[str, AfterValidator(_name)]]


class W8A8QuantConfig(_Config):
    """``act_method``: ``minmax`` is the mean of each sample's extremes, ``minmax-global`` those of all samples."""

    act_method: ActMethod = "minmax"


class W8A8ProcessorConfig(_Config):
    """Static W8A8; ``disable_names``: layers that stay float, by module, node or weight name, or pattern."""

    cfg: W8A8QuantConfig
    disable_names: Names


class W8A8DynamicQuantConfig(_Config):
    """``act_method`` is checked and has no effect: activations get their numbers per token while the model runs."""

    act_method: ActMethod = "minmax"


class W8A8DynamicProcessorConfig(_Config):
    """Weights in int8, activations per token at run time."""

    cfg: W8A8DynamicQuantConfig
    disable_names: Names


class W8A8TimeStepQuantConfig(_Config):
    """As `W8A8QuantConfig`, for the steps from ``timestep_sep`` on."""

    act_method: ActMethod = "minmax"


class W8A8TimeStepProcessorConfig(_Config):
    """Dynamic below ``timestep_sep``, static from it on."""

    cfg: W8A8TimeStepQuantConfig
    disable_names: Names
    timestep_sep: Annotated[int, Field(ge=0, strict=True)]


class FA3ProcessorConfig(_Config):
    """int8 queries, keys and values; goes with ``w8a8_dynamic``."""


class SaveProcessorConfig(_Config):
    """Where the graph, the tensors and their description go; ``part_file_size`` in GB."""

    output_path: str
    safetensors_name: str | None = None
    json_name: str | None = None
    save_type: list[Annotated[str, AfterValidator(_known_save_type)]] = Field(
        default_factory=lambda: ["safe_tensor"]
    )
    part_file_size: Annotated[int, Field(ge=1, strict=True)] | None = None


class M3ProcessorConfig(_Config):
    """Outlier suppression m3 (AWQ)."""


class M4ProcessorConfig(_Config):
    """Outlier suppression m4 (iterative smoothing)."""


class M6Config(_Config):
    """Exponents of m6; when either is missing both are searched."""

    alpha: Annotated[float, number(0, 1)] | None = None
    beta: Annotated[float, number(0, 1)] | None = None


class M6ProcessorConfig(_Config):
    """Outlier suppression m6 (flexible smoothing)."""

    cfg: M6Config


PROCESSORS: dict[str, type[_Config]] = {
    "m3": M3ProcessorConfig,
    "m4": M4ProcessorConfig,
    "m6": M6ProcessorConfig,
    "w8a8": W8A8ProcessorConfig,
    "w8a8_dynamic": W8A8DynamicProcessorConfig,
    "w8a8_timestep": W8A8TimeStepProcessorConfig,
    "fa3": FA3ProcessorConfig,
    "save": SaveProcessorConfig,
}


class SessionFile(_Config):
    """What a session file holds beside the fields of `SessionConfig`: arguments of `quant_model`."""

    processor_cfg_map: dict[str, dict[str, Any] | None]
    device: Literal["cpu", "npu"] = "cpu"
    names: dict[str, str] = Field(default_factory=dict)
    disable_last_linear: Annotated[bool, Field(strict=True)] = True
    quantize_conv: Annotated[bool, Field(strict=True)] = False


class SessionConfig(_Config):
    """``calib_data``: samples, each a mapping of inputs or a list in the order of the model's inputs; None: no data."""

    processor_cfg_map: dict[str, SerializeAsAny[BaseModel]] = Field(default_factory=dict)
    calib_data: list[Any] | None = None
    device: Literal["cpu", "npu"] = "cpu"

    @field_validator("processor_cfg_map", mode="before")
    @classmethod
    def _known(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        for name, config in given.items():
            wanted = PROCESSORS.get(name) if isinstance(name, str) else None
            if wanted is None:
                near = meant(name, PROCESSORS) if isinstance(name, str) else ""
                raise problem(f"processor {name!r} is unknown{near}; use {', '.join(PROCESSORS)}")
            if not isinstance(config, wanted):
                raise problem(f"processor '{name}' takes a {wanted.__name__}, got {type(config).__name__}")
        return given
