"""The command line: which command runs, and which exit code an error becomes (README: "Exit codes")."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from onnxslim_ptq import __version__
from onnxslim_ptq.commands.analyze import analyze
from onnxslim_ptq.commands.calibrate import calibrate
from onnxslim_ptq.commands.compare import compare
from onnxslim_ptq.commands.console import emit_json, note, one_line, program, say
from onnxslim_ptq.commands.convert import convert
from onnxslim_ptq.commands.doctor import doctor
from onnxslim_ptq.commands.export import export
from onnxslim_ptq.commands.inspect import inspect
from onnxslim_ptq.commands.merge_stats import merge_stats
from onnxslim_ptq.commands.quantize import quantize
from onnxslim_ptq.commands.recipes import recipes
from onnxslim_ptq.commands.tune import tune
from onnxslim_ptq.errors import DeviceError, QuantizationError, VerificationError

__all__ = ["app", "main"]

OK, UNEXPECTED, BAD_INPUT, NOT_VERIFIED, NO_DEVICE, GOAL_MISSED = 0, 1, 2, 3, 4, 5
INTERRUPTED, TERMINATED = 130, 143
# Typer's own copy of this class or click's, depending on the version of Typer.
_ClickException = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class _Interrupted(Exception):
    """Ctrl-C, under a name that no version of Typer handles by itself."""


class _Commands(TyperGroup):
    """Runs ``quantize`` when the first argument is no command; a misspelt command is an error."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in _own_options(self, ctx):
            near = get_close_matches(args[0], self.commands, n=1, cutoff=0.7)
            if near and not Path(args[0]).exists():
                raise QuantizationError(f"there is no command '{args[0]}' (did you mean '{near[0]}'?)")
            args = ["quantize", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # in the order they were added, whatever the version of Typer

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None


def _own_options(group: TyperGroup, ctx: Any) -> set[str]:
    return {name for parameter in group.get_params(ctx) for name in parameter.opts}


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"onnxslim_ptq {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Post-training quantization of ONNX models that measures what it wrote.

    Short form of quantize: onnxslim-ptq MODEL OUT --calib SAMPLES
    """


app.command()(quantize)
app.command()(inspect)
app.command()(calibrate)
app.command("merge-stats")(merge_stats)
app.command()(compare)
app.command()(export)
app.command()(analyze)
app.command()(tune)
app.command()(convert)
app.command()(recipes)
app.command()(doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; ``arguments`` without the program's name."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    with _process():
        return _run(args)


def _run(args: list[str]) -> int:
    try:
        if not args:
            app(["--help"], prog_name=program(), standalone_mode=False)
            return BAD_INPUT
        code = app(args, prog_name=program(), standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else OK
    except (_Interrupted, KeyboardInterrupt, typer.Abort):
        return _failed(args, "interrupted; nothing was written", INTERRUPTED)
    except VerificationError as error:
        return _failed(args, error, NOT_VERIFIED)
    except DeviceError as error:
        return _failed(args, f"{error}; see {program()} doctor", NO_DEVICE)
    except QuantizationError as error:
        return _failed(args, error, BAD_INPUT)
    except BrokenPipeError:  # the reader of our output is gone (| head)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # nothing more can be said
        return OK
    except Exception as error:
        if isinstance(error, _ClickException):
            return _failed(args, _usage(error), BAD_INPUT)
        return _unexpected(args, error)


@contextmanager
def _process() -> Iterator[None]:
    """Output that never fails on a character, and a SIGTERM that unwinds, so that nothing half-written stays."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _given(args: Sequence[str], *names: str) -> bool:
    options = args[: args.index("--")] if "--" in args else args
    return any(name in options for name in names)


def _failed(args: Sequence[str], error: object, code: int) -> int:
    text = one_line(error)
    note(text if code == INTERRUPTED else f"error: {text}")
    if _given(args, "--json"):
        emit_json({"error": text, "exit_code": code})
    return code


def _unexpected(args: Sequence[str], error: Exception) -> int:
    what = f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
    if isinstance(error, MemoryError):
        return _failed(
            args, f"out of memory ({what}); use smaller samples or a machine with more", UNEXPECTED
        )
    if isinstance(error, OSError) and error.filename:
        return _failed(
            args, f"'{error.filename}': {error.strerror}; check the path and its permissions", BAD_INPUT
        )
    if _given(args, "-v", "--verbose"):
        _traceback(error)
        return _failed(args, f"unexpected {what}; please report this with the traceback above", UNEXPECTED)
    return _failed(
        args, f"unexpected {what}; run with -v for the traceback, and please report it", UNEXPECTED
    )


def _traceback(error: BaseException) -> None:
    import traceback

    note("".join(traceback.format_exception(error)).rstrip())


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else program()
    return f"{error.format_message().rstrip('.')}; see {command} --help"
