"""The command `metr`: its verbs, and errors that end in one message instead of a traceback."""

import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import metr
from metr.cli.complete import complete
from metr.cli.detect import detect
from metr.cli.export import export
from metr.cli.inspect import inspect
from metr.cli.launch import start_processes_of_accelerate, wait_for_main_process
from metr.cli.output import SafeConsole, show_log
from metr.cli.report import report
from metr.cli.serve import serve
from metr.cli.training import finetune, train
from metr.cli.verbs import demo, evaluate, push, transfer
from metr.errors import MetrError
from metr.lost_output import settle_output
from metr.processes import in_main_process, process_index
from metr.training.signals import Stopped, StopSignals

__all__ = ["app", "run"]

_RENAMED_OPTIONS = {
    "--share": "--fraction",
    "--remember": "--rehearse",
    "--remember-share": "--rehearse-fraction",
    "--remember-evaluate": "--rehearse-evaluate",
    "--tell-apart": "--decorrelate-names",
    "--names": "--categories",
}
"""Options that had another name once, and their names now."""
# the base of mistakes on a command line: click's, or that of typer's own copy of click
_COMMAND_LINE_ERROR: Any = typer.BadParameter.__mro__[2]


class _Verb(TyperCommand):
    """A verb, which shows the log when it runs; help comes without it."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb."""
        show_log()
        try:
            return super().invoke(ctx)
        except Stopped as stopped:
            if in_main_process():
                _tell(str(stopped))
            raise typer.Exit(stopped.exit_code) from None


class _Command(TyperGroup):
    """The command itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options. A flag is off by default: to check one that is None, typer imports pydantic, for 0.3 s."""
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_bool_flag", False) and param.default is None:
                param.default = False
        return params


app = typer.Typer(
    name="metr",
    cls=_Command,
    help="One object detector from many isolated datasets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (inspect, train, finetune, evaluate, report, detect, complete, serve, transfer, export, push, demo):
    app.command(cls=_Verb)(verb)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Show the version and stop.")) -> None:
    """One object detector from many isolated datasets."""
    if version:
        SafeConsole().print(f"metr {metr.__version__}")
        raise typer.Exit


def run() -> None:
    """The console script: runs a verb and ends the process.

    A mistake ends in one message: exit code 2 where the command line has it, 1 elsewhere. Ctrl-C ends in 130, SIGTERM
    in 143, SIGHUP in 129; `metr serve` they end in 0. Where nobody reads its output any more, a verb ends in 141, but
    training goes on. With METR_DEBUG=1 in the environment errors show their traceback.
    """
    try:
        _run()
    finally:
        settle_output()


def _run() -> None:
    """The console script, but for what it leaves in the output."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # idle threads of torch sleep sooner: on cores that others use too they took most of the time
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with StopSignals() as signals:
        try:
            start_processes_of_accelerate()
            with signals.leaving_at_once():
                code = app(prog_name="metr", standalone_mode=False)
            sys.exit(code if signals.number is None else 128 + signals.number)
        except _COMMAND_LINE_ERROR as error:
            wait_for_main_process(signals)
            _tell_of_command_line(error)
        except Stopped as stopped:  # before any verb began
            sys.exit(stopped.exit_code)
        except typer.Abort:
            sys.exit(1 if signals.number is None else 128 + signals.number)
        except Exception as error:
            wait_for_main_process(signals)
            told = _told(error)
            if told is None or os.environ.get("METR_DEBUG"):
                raise
            _tell(str(told))
            sys.exit(1)


def _tell(message: str) -> None:
    where = "" if in_main_process() else f"process {process_index()}: "
    console = SafeConsole(stderr=True, soft_wrap=True)
    console.print(f"error: {where}{message}", style="red", markup=False, highlight=False)


def _tell_of_command_line(error: Any) -> None:
    """One line for a mistyped verb or option, and where to read more; without any arguments, the help."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    if new := _renamed(getattr(error, "option_name", None), context):
        message = f"No such option: {error.option_name}. It is called {new} now."
    if len(sys.argv) == 1:
        error.show()
    else:
        command = "metr" if context is None else context.command_path
        end = "" if message.endswith(("?", ".")) else "."
        _tell(f"{message}{end} See {command} --help")
    sys.exit(error.exit_code)


def _renamed(option: str | None, context: Any) -> str | None:
    """What an unknown option of a verb is called today; None if it never was one of this verb."""
    new = _RENAMED_OPTIONS.get(option or "")
    known = [] if context is None else [name for param in context.command.params for name in param.opts]
    return new if new in known else None


def _told(error: Exception) -> MetrError | None:
    """The error in METR's words, if METR, the operating system or the device raised it; None for any other."""
    if isinstance(error, MetrError):
        return error
    if isinstance(error, OSError):
        hint = "check the path, its permissions and the room on the disk"
        return MetrError(error.strerror or str(error), where=error.filename, hint=hint)
    torch = sys.modules.get("torch")  # where it is not imported, it has raised nothing
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        hint = "a smaller batch (loader.batch_size in training, --batch-size otherwise) or smaller images"
        return MetrError(f"out of memory: {(str(error) or 'no more to be had').splitlines()[0]}", hint=hint)
    return None
