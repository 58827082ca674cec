"""The entry point: finds the command's file, runs it, and turns errors into messages and exit codes, here only."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from nas.cli.output import Console, typed
from nas.core.errors import InterruptedRunError, NasError, StorageError, did_you_mean

# Read when numpy is imported, later. Its matrices are small here: threads would only spin, beside trainings that need
# the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Order of the help page: as a user meets them.
COMMANDS = (
    *("init", "doctor", "measure", "table", "search", "pareto", "report", "dashboard", "export", "bench"),
    *("deploy", "worker", "storage-proxy"),
)

EXIT_CODES = """\b
Exit codes:
  0    done
  1    a fault of the tool itself (--debug shows where)
  2    a command, option, experiment file or search space that cannot be used
  3    nothing meets the budget (the closest point is named), or a package is not good
  4    a device failed, or is in another state than its table
  5    a data set is missing, unreadable or contradicts itself
  6    a file or folder cannot be read or written, or is in use
  130  interrupted; the same command goes on where it stopped
  141  the reader of the output went away

\b
With --json a command prints one JSON document on stdout, {"error": ...} when it fails;
progress and messages go to stderr. No colours without a terminal or with NO_COLOR set.
"""

# Optional packages and the extra that brings them.
EXTRAS = {
    "tensorrt": "tensorrt",
    "pycuda": "tensorrt",
    "optuna_dashboard": "dashboard",
    "psycopg": "scale",
    "grpc": "scale",
    "boto3": "scale",
    "pytest": "dev",
    "hypothesis": "dev",
}

_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


class LazyGroup(click.Group):
    """A group whose commands are the modules `nas.cli.<name>`, imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"nas.cli.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            ctx.fail(f"no command {name!r}{did_you_mean(name, COMMANDS)} (commands: {', '.join(COMMANDS)})")
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    epilog=EXIT_CODES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="nas", prog_name="nas")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Searches small, fast students of a teacher for a latency budget on a device.

    Latencies are measured on the device, accuracies on images that the search never saw. Start with: nas init
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(args: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        args: what follows `nas`; None takes the process's own arguments.

    Returns:
        The exit code, as documented in `EXIT_CODES`.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a terminal that cannot show a path's letters must not end the run
            reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if args is None else args)  # click consumes it
    # Read here as well as by click, so that an error in the command line itself is shown the way that was asked for.
    console = Console(as_json="--json" in given, debug="--debug" in given)
    try:
        # Not cli.main(), which would turn some errors into exit codes of its own.
        with cli.make_context("nas", given, obj=console) as ctx:
            cli.invoke(ctx)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as e:  # --help, --version
        return e.exit_code
    except BrokenPipeError:
        # What is still buffered would raise again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as e:  # the one border: every error ends as a message and a code
        code, message = explain(e)
        if console.debug:
            traceback.print_exception(e)
        print(f"{'interrupted' if code == 130 else 'error'}: {typed(message)}", file=sys.stderr, flush=True)
        console.result({"error": {"type": type(e).__name__, "message": message, "exit_code": code}})
        return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error that reached the border."""
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx is not None else "nas"
        message = error.format_message().rstrip(".").replace(". Did you mean", "; did you mean")
        stop = "" if message.endswith("?") else "."
        return 2, f"{message[:1].lower()}{message[1:]}{stop} Run: {where} --help"
    if isinstance(error, click.ClickException):
        return 2, error.format_message()
    if isinstance(error, NasError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return InterruptedRunError.exit_code, "the same command goes on where it stopped"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        extra = EXTRAS.get(package)
        fix = f"pip install 'nas[{extra}]'" if extra else "make setup"
        return 2, f"the package {package!r} is not installed. Run: {fix}"
    if isinstance(error, OSError) and error.errno in _FULL_OR_FORBIDDEN:
        return StorageError.exit_code, f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, MemoryError):
        return 1, "out of memory. Use fewer workers (--set search.workers=1) or a smaller resolution"
    name = type(error).__name__
    return 1, f"unexpected {name}: {error}\nThis is a fault of the tool. Run again with --debug to see where"


def main() -> NoReturn:
    """The `nas` script."""
    sys.exit(run())
