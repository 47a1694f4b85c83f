"""msModelSlim's quantization session on ONNX models: keep the script, change the import and the model."""

from onnxslim_ptq.frontends.session.config import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6Config,
    M6ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    W8A8DynamicProcessorConfig,
    W8A8DynamicQuantConfig,
    W8A8ProcessorConfig,
    W8A8QuantConfig,
    W8A8TimeStepProcessorConfig,
    W8A8TimeStepQuantConfig,
)
from onnxslim_ptq.frontends.session.run import quant_model
from onnxslim_ptq.frontends.session.timestep import TimestepManager

__all__ = [
    "FA3ProcessorConfig",
    "M3ProcessorConfig",
    "M4ProcessorConfig",
    "M6Config",
    "M6ProcessorConfig",
    "SaveProcessorConfig",
    "SessionConfig",
    "TimestepManager",
    "W8A8DynamicProcessorConfig",
    "W8A8DynamicQuantConfig",
    "W8A8ProcessorConfig",
    "W8A8QuantConfig",
    "W8A8TimeStepProcessorConfig",
    "W8A8TimeStepQuantConfig",
    "quant_model",
]
