"""``doctor``: what works on this machine, what does not, and the cure."""

from __future__ import annotations

import typer

from onnxslim_ptq.commands.console import columns, emit_json, say
from onnxslim_ptq.commands.options import Json

__all__ = ["doctor"]

_UNUSABLE = 4


def doctor(json: Json = False) -> None:
    """Show which providers really work here and why others do not, and what the processor offers for int8."""
    from onnxslim_ptq.doctor import collect_facts, devices, diagnose, usable

    facts = collect_facts()
    works = usable(facts)
    if json:
        emit_json({**facts.as_json(), "exit_code": 0 if works else _UNUSABLE})
    else:
        packages = ", ".join(f"{name} {version or 'missing'}" for name, version in facts.packages.items())
        say(f"python {facts.python} on {facts.machine}; {packages}")
        builds = ", ".join(f"{name} {version}" for name, version in facts.builds.items()) or "none"
        say(f"ONNX Runtime: {facts.runtime or 'not usable'} (installed: {builds})")
        rows = [(p.name, "works" if p.works else "no", p.reason) for p in facts.providers]
        for line in columns(rows):
            say(line)
        say(
            f"processor: int8 instructions {', '.join(facts.int8_features) or 'not reported'}; 7-bit weights "
            f"(--reduce-range auto) {'on: its 8-bit products saturate' if facts.reduce_range else 'off'}"
        )
        for kind, reason in devices(facts).items():
            say(f"--device {kind} " + (f"does not work: {reason}" if reason else "works"))
        for problem in diagnose(facts):
            say(f"problem: {problem}")
    if not works:
        raise typer.Exit(_UNUSABLE)
