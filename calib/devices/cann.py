"""The CANN execution provider (Ascend NPUs): options that keep statistics right, and what its errors mean.

Source of the options: the provider's page in the ONNX Runtime documentation, and the provider itself
(onnxruntime-cann 1.22.1, 1.23.2 and 1.24.4), which refuses a name it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["explain", "options", "shortened"]

_SPLITS_SINCE = (1, 24)  # before, the provider always split the graph by its list of operators
_TOOLKIT = "source /usr/local/Ascend/ascend-toolkit/set_env.sh, or install the CANN toolkit"


def options(index: int, version: tuple[int, int]) -> tuple[Mapping[str, str], ...]:
    """What a session on NPU ``index`` asks for; the second form is that of builds that renamed the precision option.

    * ``device_id``: the provider checks that the device exists only when it is given.
    * precision: the graph compiler's own default computes float32 models in float16 on many chips, and statistics
      with it; it is also one setting per *process*, which is why a session has a process of its own.
    * ``op_select_impl_mode``: exact implementations rather than fast ones.
    * ``enable_cann_subgraph``: only operators that the provider knows go to the device; without it everything is
      claimed, and one unknown operator fails the whole model at its first run.
    * ``dump_om_model``: no compiled model is left behind. One found in the working folder is loaded *whatever its
      weights were*, so the folder has to be fresh, too.
    """
    common = {
        "device_id": str(index),
        "enable_cann_graph": "1",
        "dump_graphs": "0",
        "dump_om_model": "0",
        "op_select_impl_mode": "high_precision",
    }
    if version >= _SPLITS_SINCE:
        common["enable_cann_subgraph"] = "1"
    return (
        {**common, "precision_mode": "must_keep_origin_dtype"},
        {**common, "precision_mode_v2": "origin"},
    )


def explain(text: str, log: str = "") -> str:
    """Reason and cure for what ONNX Runtime raised; the true reason often stands only in what it logged."""
    both = f"{text}\n{log}"
    missing = re.search(r"(\S+): cannot open shared object file", both)
    if missing:
        return f"the CANN toolkit is not found ({missing[1]} is missing); {_TOOLKIT}"
    identity = re.search(r"Invalid device ID: (\d+), must be between 0 \(inclusive\) and (\d+)", both)
    if identity:
        count = int(identity[2])
        if count == 0:
            return "this host has no NPU that CANN can see; check npu-smi info and the driver"
        return f"NPU {identity[1]} does not exist: this host has {count}, numbered from 0; see npu-smi info"
    symbol = re.search(r"undefined symbol: (\S+)", both)
    if symbol:
        return f"the CANN toolkit lacks {symbol[1][:80]}, it does not fit onnxruntime-cann; install CANN 8.2 or later"
    if "aclgrphParseONNXFromMem" in text or "aclgrphBuildModel" in text:
        return (
            f"CANN's graph compiler refuses the model ({shortened(text)}); calibrate with --device cpu, or see its "
            "log in ~/ascend/log"
        )
    if "create CANN ExecutionProvider fail" in text:
        return f"CANN cannot be started ({shortened(text)}); check npu-smi info, and {_TOOLKIT}"
    return f"{shortened(text)}; check npu-smi info and the logs in ~/ascend/log, or use --device cpu"


def shortened(text: str) -> str:
    """One line of at most 300 characters, without places in ONNX Runtime's sources."""
    line = " ".join(text.split())
    line = re.sub(r"/\S+\.(?:cc|h):\d+ (?:\w+ )?[^\[]*?(?=\[ONNXRuntimeError\]|create )", "", line)
    line = re.sub(r"\[ONNXRuntimeError\] : \d+ : (\w+) : ", "", line)
    return line.rstrip(" .;")[:300] or "no message"
