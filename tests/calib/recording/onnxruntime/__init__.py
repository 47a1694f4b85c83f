"""Stands before the real onnxruntime on PYTHONPATH of a child process: records every session, and fails on demand.

The mathematics is the real CPU's. RECORDING is a file for one JSON line per session; FAULT names what goes wrong on the
device: load, silent, unplaced, partly, ignored, renamed, first_run, second_run, wrong, exit, hang, old.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from types import SimpleNamespace

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FAULT = os.environ.get("FAULT", "")
DEVICES = ("CANNExecutionProvider", "CUDAExecutionProvider")
CPU = "CPUExecutionProvider"

sys.path = [folder for folder in sys.path if os.path.abspath(folder or ".") != HERE]
del sys.modules["onnxruntime"]
real = importlib.import_module("onnxruntime")  # what the import statement that led here will return


class Session(real.InferenceSession):  # type: ignore[misc]
    def __init__(self, source, settings, providers=None, **options):  # type: ignore[no-untyped-def]
        name, passed = providers[0] if isinstance(providers[0], tuple) else (providers[0], {})
        self.claimed, self.passed, self.runs = name, passed, 0
        if name in DEVICES:
            self._fail_to_load(passed)
        super().__init__(source, settings, providers=[CPU], **options)
        entry = {
            "provider": name,
            "options": passed,
            "level": settings.graph_optimization_level.name,
            "threads": settings.intra_op_num_threads,
            "profiling": settings.enable_profiling,
            "source": type(source).__name__,
            "folder": os.getcwd(),
            "files": sorted(os.listdir()),
            "process": os.getpid(),
            "inputs": {i.name: i.shape for i in self.get_inputs()},
            "keywords": options,
        }
        with open(os.environ["RECORDING"], "a") as file:
            file.write(json.dumps(entry) + "\n")

    def _fail_to_load(self, passed):  # type: ignore[no-untyped-def]
        if FAULT == "load":
            library = "libascendcl.so: cannot open shared object file: No such file or directory"
            sys.stderr.write(
                f"[E:onnxruntime:Default] Failed to load library providers_cann.so with error: {library}\n"
            )
            raise RuntimeError("/b/x.cc:1189 f(const A&) create CANN ExecutionProvider fail")
        if FAULT == "renamed" and "precision_mode" in passed:
            raise RuntimeError('FAIL : x.h:187 Parse Unknown provider option: "precision_mode".')
        if FAULT == "exit":
            sys.stderr.write("driver: assertion failed\n")
            sys.stderr.flush()
            os._exit(7)
        if FAULT == "hang":
            time.sleep(60)

    def get_providers(self):  # type: ignore[no-untyped-def]
        return [CPU] if FAULT == "silent" or self.claimed == CPU else [self.claimed, CPU]

    def get_provider_options(self):  # type: ignore[no-untyped-def]
        effective = {k: v for k, v in self.passed.items() if not (FAULT == "ignored" and "precision" in k)}
        return {self.claimed: effective, CPU: {}}

    def get_provider_graph_assignment_info(self):  # type: ignore[no-untyped-def]
        nodes = [n for part in super().get_provider_graph_assignment_info() for n in part.get_nodes()]
        here = {"unplaced": 0, "partly": 1}.get(FAULT, len(nodes))
        parts = ((self.claimed, nodes[:here]), (CPU, nodes[here:]))
        return [SimpleNamespace(ep_name=name, get_nodes=lambda n=n: n) for name, n in parts if n]

    def run(self, outputs, feed, *rest):  # type: ignore[no-untyped-def]
        self.runs += 1
        on_device = self.claimed in DEVICES
        if on_device and {1: "first_run", 2: "second_run"}.get(self.runs) == FAULT:
            raise RuntimeError(
                "Non-zero status code: CANN Graph error executing ge::aclgrphParseONNXFromMem(a, b)"
            )
        found = super().run(outputs, feed, *rest)
        return [y * 1.05 for y in found] if on_device and FAULT == "wrong" else found


real.InferenceSession = Session
real.get_available_providers = lambda: [*DEVICES, CPU]
if FAULT == "old":  # what ONNX Runtime before 1.24 lacks
    real.__version__ = "1.22.1"
    del Session.get_provider_graph_assignment_info
    for owner in Session.__mro__:
        if "get_provider_graph_assignment_info" in vars(owner):
            del owner.get_provider_graph_assignment_info

    def end_profiling(self):  # type: ignore[no-untyped-def]
        path = super(Session, self).end_profiling()
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(text.replace(f'"{CPU}"', f'"{self.claimed}"'))
        return path

    Session.end_profiling = end_profiling
