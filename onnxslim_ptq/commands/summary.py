"""What ``quantize`` tells about its result: about ten lines for a person, or everything as JSON."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onnxslim_ptq.asked import Asked, reduced
from onnxslim_ptq.commands.console import db, emit_json, program, say, size
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.cpu import int8_features

if TYPE_CHECKING:
    from onnxslim_ptq.api import Result
    from onnxslim_ptq.commands.samples import Again
    from onnxslim_ptq.export.files import OutputPaths
    from onnxslim_ptq.recipe import Recipe

__all__ = ["MEASURED_ON", "Summary", "cache_line", "cpu_line", "float_lines"]

_FEW, _FEW_OF_EACH = 8, 3
_GOOD_DB = 60.0  # of the worst output: float16 is about as far from float32
MEASURED_ON = {
    "held-out": "held-out samples",
    "eval": "--eval samples",
    "calibration": "the calibration samples themselves",
    "synthetic": "synthetic samples, not real data",
}


@dataclass
class Summary:
    """A result and the files it went to; ``again``: the options for the commands that it suggests."""

    result: Result
    paths: OutputPaths
    asked: Asked
    again: Again
    worst: list[tuple[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, Path]:
        paths = self.paths
        named = {"model": paths.model, "data": paths.data, "json": paths.json, "params": paths.params}
        return {kind: path for kind, path in named.items() if path is not None}

    @property
    def nbytes(self) -> tuple[int, int]:
        """Of the float model and of the quantized one, each with all its weights."""
        written = [path for kind, path in self.files.items() if kind in ("model", "data")]
        return self.result.source.nbytes, sum(path.stat().st_size for path in written)

    @property
    def reduced(self) -> bool:
        """Whether weights were limited to 7 bits."""
        return reduced(TARGETS[self.result.context.target], self.asked.reduce_range)

    @property
    def worst_output(self) -> str | None:
        known = {
            n: e["sqnr_db"]
            for n, e in self.result.metrics["per_output"].items()
            if e.get("sqnr_db") is not None
        }
        return min(known, key=lambda n: known[n]) if known else None

    def show(self, verbose: bool) -> None:
        before, after = self.nbytes
        ratio = before / max(after, 1)
        say(f"wrote {self.paths.model}  {size(before)} float -> {size(after)} int8 ({ratio:.1f} x smaller)")
        for kind, path in self.files.items():
            if kind != "model":
                say(f"      {path}  {size(path.stat().st_size)}")
        for line in self._layer_lines(verbose):
            say(line)
        for line in self._metric_lines(verbose):
            say(line)
        for line in self._worst_lines():
            say(line)
        say(cpu_line(self.reduced))
        notes = [text for text in self.result.notes if text not in self.warnings]
        for text in notes if verbose else notes[:_FEW]:
            say(f"note: {text}")
        if len(notes) > _FEW and not verbose:
            say(f"note: and {len(notes) - _FEW} more; -v shows them")
        say(f"next: {self.next()}")

    def _layer_lines(self, verbose: bool) -> list[str]:
        quantized = len(self.result.plan.weights)
        head = f"layers: {quantized} quantized, {len(self.result.skipped)} float"
        cache = cache_line([change.pair.past for change in self.result.plan.io], self.result.recipe)
        return [head, *float_lines(self.result.skipped, verbose), *cache]

    def _metric_lines(self, verbose: bool) -> list[str]:
        metrics, worst = self.result.metrics, self.worst_output
        count = metrics["samples"]
        where = f"{count} {MEASURED_ON.get(metrics['measured_on'], metrics['measured_on'])}"
        if worst is None:
            lines = [f"quality: no float output to compare, on {where}"]
        else:
            cosine = metrics["cosine"]
            lines = [
                f"quality: worst output '{worst}' {db(metrics['sqnr_db'])} SQNR, cosine "
                f"{'n/a' if cosine is None else format(cosine, '.5f')}, on {where}; speed was not measured"
            ]
        integer = {n: e["equal"] for n, e in metrics["per_output"].items() if e.get("equal") is not None}
        lines += [f"  output '{n}' (integer): {equal:.2%} equal" for n, equal in integer.items()]
        if verbose:
            lines += [
                f"  output '{n}': {db(e['sqnr_db'])}, max abs error {e['max_abs_error']:.4g}"
                for n, e in metrics["per_output"].items()
                if "sqnr_db" in e
            ]
        return lines

    def _worst_lines(self) -> list[str]:
        """The layers with the largest error of their own, and what leaves them float."""
        if not self.worst:
            return []
        from onnxslim_ptq.core.match import literal

        named = ", ".join(f"{node} {db(sqnr)}" for node, sqnr in self.worst)
        options = " ".join(
            f"--exclude {shlex.quote(text)}" for text in (literal(name) for name, _ in self.worst)
        )
        return [f"worst layers alone: {named}", f"  to leave them float, add {options}"]

    def improve(self) -> str:
        """The command that finds a result 3 dB better; where there is nothing to gain, the one that looks closer."""
        sqnr = self.result.metrics["sqnr_db"]
        if sqnr is None or sqnr >= _GOOD_DB:
            return self.next()
        form = self.again.form
        if self.asked.reduce_range != "auto":
            form += f" --reduce-range {self.asked.reduce_range}"
        goal = f'--goal "sqnr>={math.ceil(sqnr + 3)}"'
        return f"{program()} tune {self._models()}{self._calib()}{self._eval()}{self._stacked()}{form} {goal}"

    def _models(self) -> str:
        return " ".join(shlex.quote(str(p)) for p in (self.result.source.path, self.paths.model))

    def _calib(self) -> str:
        given = self.asked.calib_data or (() if self.result.recipe.data.sets else ("SAMPLES",))
        first = f" --samples {self.asked.samples}" if self.asked.samples and given else ""
        return "".join(f" --calib {shlex.quote(str(p))}" for p in given) + first

    def _eval(self) -> str:
        return f" --eval {shlex.quote(str(self.asked.eval_data))}" if self.asked.eval_data else ""

    def _stacked(self) -> str:
        return " --stacked" if self.asked.stacked else ""

    def next(self) -> str:
        """The command that looks closer, on the same samples."""
        samples = (self._eval() or self._calib()) + self._stacked() + self.again.data
        return f"{program()} compare {self._models()}{samples}  (error of each layer, speed)"

    def show_json(self) -> None:
        before, after = self.nbytes
        emit_json(
            {
                "files": {kind: str(path) for kind, path in self.files.items()},
                "bytes": {"float": before, "quantized": after},
                "target": self.result.context.target,
                "device": self.result.context.calibration.device,
                "layers": {
                    "quantized": sorted({use.node for use in self.result.plan.weights}),
                    "float": self.result.skipped,
                },
                "kv_cache": [change.pair.past for change in self.result.plan.io],
                "metrics": {**self.result.metrics, "worst_output": self.worst_output},
                "cpu": {"int8_features": int8_features(), "reduce_range": self.reduced},
                "notes": self.result.notes,
                "warnings": self.warnings,
                "exit_code": 0,
            }
        )


def cpu_line(reduce_range: bool) -> str:
    features = ", ".join(int8_features()) or "none reported"
    return (
        f"cpu: int8 instructions {features}; 7-bit weights (reduce-range) {'on' if reduce_range else 'off'}"
    )


def cache_line(pasts: Sequence[str], recipe: Recipe) -> list[str]:
    """What becomes of the KV cache, where the recipe speaks of it."""
    per = " and ".join(dict.fromkeys(f"per {step.per}" for step in recipe.caches))
    return [f"KV cache: {len(pasts)} inputs and as many outputs are int8, {per}"] if recipe.caches else []


def float_lines(skipped: Mapping[str, str], verbose: bool) -> list[str]:
    """Every float layer with its reason, or the first of each reason."""
    if verbose:
        return [f"  {name}: {reason}" for name, reason in skipped.items()]
    groups: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        groups.setdefault(reason, []).append(name)
    each = _FEW if len(groups) == 1 else _FEW_OF_EACH
    lines = []
    for reason, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        more = f" and {len(names) - each} more" if len(names) > each else ""
        lines.append(f"  {len(names)} float: {reason}: {', '.join(names[:each])}{more}")
    if len(lines) > _FEW:
        lines = [*lines[:_FEW], f"  and {len(lines) - _FEW} more reasons"]
    return [*lines, "  (-v lists every one)"] if any(" more" in line for line in lines) else lines
