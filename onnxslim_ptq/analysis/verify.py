"""Proves a rendered model: it loads, runs, answers like the float model, with optimizations on and off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx

from calib.blocks.blockwise import run_blockwise
from calib.blocks.spool import Spool
from calib.errors import CalibrationError, GraphError
from calib.model import Model
from calib.progress import Listener, Meter
from calib.provider import SIGNED_OPTION, Optimize, SessionOptions
from calib.runner import run_session
from calib.types import Array, Dataset, Feed, Sample, SampleId
from onnxslim_ptq.analysis.metrics import OutputError, worst_sqnr
from onnxslim_ptq.errors import VerificationError
from onnxslim_ptq.export.exchange import Exchange
from onnxslim_ptq.export.mapped import session_of

__all__ = ["Verification", "compare_outputs", "verify"]

_UNOPTIMIZED_SAMPLES = 1
_TOLERANCE_DB = 0.5
_MANY, _WORSE_DB = 1024, 6.0
_NEEDS_SIGNED = (
    f"ONNX Runtime loads this model on x86 only with the session option {SIGNED_OPTION} = 1 (int8 activations, "
    "opset 21 or newer); a float model of opset 20 or lower, or target cpu, does without"
)


@dataclass
class Verification:
    """What was measured: per output, the first sample with the answers to it, and what a user should be told."""

    outputs: list[OutputError]
    samples: int
    first: tuple[Feed, list[Array]]
    warnings: list[str] = field(default_factory=list)

    @property
    def sqnr(self) -> float | None:
        return worst_sqnr(self.outputs)


def verify(
    source: Model,
    quantized: Model,
    data: Dataset,
    *,
    threads: int = 0,
    foreign: bool = False,
    listener: Listener | None = None,
    spool: Spool | None = None,
    twin: Model | None = None,
) -> Verification:
    """Compare on every sample of ``data``; VerificationError when the model does not load or answers NaN or Inf.

    ``twin``: the same plan as QDQ; on the first sample the result may be 6 dB further from the float model than
    it, where an output has 1024 values or more.

    ``foreign``: the model is meant for another runtime, so ONNX Runtime must not quantize its float biases by itself.
    With a ``spool`` memory is short: the float model runs block by block, the quantized one with its weights on disk.
    """
    names = [o.name for o in source.proto.graph.output]
    missing = [n for n in names if n not in {o.name for o in quantized.proto.graph.output}]
    if missing:
        raise VerificationError(
            f"the quantized model lost its output '{missing[0]}'; report this as a defect"
        )
    options = SessionOptions(threads=threads, simulate=foreign, frugal=True)
    first: tuple[Feed, list[Array]] | None = None
    total, few_fast, few_plain = ([OutputError(n) for n in names] for _ in range(3))
    again: list[tuple[Sample, list[Array]]] = []
    exchange = Exchange.of(quantized)
    meter = Meter("verifying", len(data), listener)
    exact, fast = _exact(_with_node_names(source), data, options, spool), None
    for count, (sample, feed, expected) in enumerate(exact, 1):
        fast = fast or _loaded(
            quantized, options, spool
        )  # not before: block-wise, the float model is through by now
        answers = _answer(fast, names, (sample, feed), exchange)
        _add(total, expected, answers, str(sample))
        first = first or (exchange.feed(feed, sample) if exchange.timestep else feed, answers)
        if count <= _UNOPTIMIZED_SAMPLES:
            _add(few_fast, expected, answers, str(sample))
            again.append(((sample, feed), expected))
        meter.at(count)
    if first is None:
        raise CalibrationError("there is no sample to verify the result on; give at least one")
    needs = [_NEEDS_SIGNED] if getattr(fast, "signed", False) else []
    del exact, fast  # the unoptimized session needs the room: it keeps every value of the graph
    items = [item for item, _ in again]
    plain = _plain(quantized, names, items, replace(options, optimize=Optimize.OFF), spool)
    for (item, expected), answers in zip(again, plain, strict=True):
        _add(few_plain, expected, answers, str(item[0]))
    if twin is not None:
        few_twin = [OutputError(n) for n in names]
        for (item, expected), answers in zip(again, _plain(twin, names, items, options, spool), strict=True):
            _add(few_twin, expected, answers, str(item[0]))
        _require_alike(few_fast, few_twin)
    faults = [f for e in (*total, *few_plain) for f in e.faults]
    if faults:
        raise VerificationError(
            f"{faults[0]}; exclude layers or calibrate with more samples"
            + (f" ({len(faults) - 1} more)" if len(faults) > 1 else "")
        )
    return Verification(total, len(data), first, [*needs, *_disagreements(few_fast, few_plain)])


def compare_outputs(exact: Any, seen: Any, names: Sequence[str], data: Dataset) -> list[OutputError]:
    """Errors of session ``seen`` against session ``exact`` for the named outputs."""
    errors = [OutputError(n) for n in names]
    for sample, feed in data:
        _add(
            errors,
            run_session(exact, names, feed, sample),
            run_session(seen, names, feed, sample),
            str(sample),
        )
    return errors


def _with_node_names(model: Model) -> Model:
    """The model with node names removed where several nodes have the same: ONNX Runtime refuses to load that."""
    count = Counter(n.name for n in model.proto.graph.node if n.name)
    if all(n == 1 for n in count.values()):
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for node in proto.graph.node:
        if count[node.name] > 1:
            node.name = ""
    return replace(model, proto=proto)


def _exact(
    model: Model, data: Dataset, options: SessionOptions, spool: Spool | None
) -> Iterator[tuple[SampleId, Feed, list[Any]]]:
    """Every sample with the float model's answers."""
    names = [o.name for o in model.proto.graph.output]
    if spool is None:
        session = session_of(model, options, None)
        for sample, feed in data:
            yield sample, feed, run_session(session, names, feed, sample)
    else:
        blocks = run_blockwise(model, data, names, options=options, folder=spool.folder)
        for (sample, feed), (_, values) in zip(data, blocks, strict=True):
            yield sample, feed, [values[n] for n in names]


def _plain(
    model: Model, names: Sequence[str], items: Sequence[Sample], options: SessionOptions, spool: Spool | None
) -> Iterator[list[Any]]:
    """The quantized model's answers without optimizations: weights become float, so in blocks where memory is short."""
    exchange = Exchange.of(model)
    if spool is None:
        session = _loaded(model, options, None)
        for item in items:
            yield _answer(session, names, item, exchange)
        return
    every = exchange.names(names)
    fed = [(sample, exchange.feed(feed, sample)) for sample, feed in items]
    try:
        for _, values in run_blockwise(model, fed, every, options=options, folder=spool.folder):
            yield exchange.read(every, [values[n] for n in every])[: len(names)]
    except (GraphError, CalibrationError) as error:
        raise VerificationError(
            f"the quantized model fails without optimizations: {error}; exclude the node it names"
        ) from None


def _loaded(model: Model, options: SessionOptions, spool: Spool | None) -> Any:
    try:
        return session_of(model, options, spool)
    except GraphError as error:
        raise VerificationError(
            f"the quantized model does not load: {error}; exclude the node it names and report this "
            "as a defect"
        ) from None


def _answer(session: Any, names: Sequence[str], item: Sample, exchange: Exchange) -> list[Any]:
    sample, feed = item
    try:
        return exchange.run(session, names, feed, sample)
    except Exception as error:
        raise VerificationError(
            f"the quantized model fails to run: {error}; exclude the node it names"
        ) from None


def _add(errors: list[OutputError], exact: Sequence[Any], seen: Sequence[Any], sample: str) -> None:
    for error, y, z in zip(errors, exact, seen, strict=True):
        error.add(y, z, sample)


def _require_alike(fast: list[OutputError], twin: list[OutputError]) -> None:
    """VerificationError where the target's form is much further from the float model than the same plan as QDQ.

    Two runtimes that sum in another order round some values to neighbouring codes, and layers behind multiply that: on
    real models ONNX Runtime's own answers, with and without optimizations, differ by up to 3 dB. A wrong zero point,
    scale or bias costs far more. Outputs of few values say nothing: a single code decides.
    """
    for on, off in _apart(fast, twin):
        a, b = on.sqnr or 0.0, off.sqnr or 0.0
        if on.count >= _MANY and b - a > _WORSE_DB:
            raise VerificationError(
                f"output '{on.name}': {a:.1f} dB in the form of the target, {b:.1f} dB as QDQ; "
                "report this as a defect of the quantizer"
            )


def _disagreements(fast: list[OutputError], plain: list[OutputError]) -> list[str]:
    """Outputs whose SQNR with ONNX Runtime's optimizations differs from that without."""
    return [
        f"output '{on.name}': {on.sqnr:.1f} dB with ONNX Runtime's optimizations, {off.sqnr:.1f} dB without"
        for on, off in _apart(fast, plain)
    ]


def _apart(these: list[OutputError], those: list[OutputError]) -> list[tuple[OutputError, OutputError]]:
    """Outputs whose SQNR differs; above 60 dB it says nothing."""
    pairs = []
    for one, other in zip(these, those, strict=True):
        a, b = one.sqnr, other.sqnr
        if a is not None and b is not None and max(a, b) <= 60.0 and abs(a - b) > _TOLERANCE_DB:
            pairs.append((one, other))
    return pairs
