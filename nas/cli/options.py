"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from nas.core.units import parse_ms

F = TypeVar("F", bound=Callable[..., Any])


def common_options(function: F) -> F:
    """`--json` and `--debug`, which every command has; `nas.cli.main.run` reads them before the command is found."""
    function = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(
        function
    )
    return click.option(
        "--json", is_flag=True, expose_value=False, help="Print one JSON document for machines on stdout."
    )(function)


def set_option(function: F) -> F:
    """`--set KEY=VALUE`, repeated; the command gets the tuple `sets`."""
    return click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a key of the experiment file, such as budget.ms=5; may be repeated.",
    )(function)


def shared_options(function: F) -> F:
    """`--storage` and `--artifacts` of a search on many machines."""
    function = click.option(
        "--artifacts",
        metavar="PLACE",
        help="Folder that all machines see, or s3://BUCKET/PREFIX [artifacts in the run folder].",
    )(function)
    return click.option(
        "--storage",
        metavar="URL",
        help="postgresql://USER@HOST/DATABASE (password from PGPASSWORD or PGPASSFILE), or grpc://HOST:PORT.",
    )(function)


class Milliseconds(click.ParamType[float]):
    """A time with its unit: `5ms`, `800us`, `0.005s`; milliseconds without one."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ARG002
        """Milliseconds."""
        where = param.opts[-1] if param is not None else "time"
        return value if isinstance(value, float) else parse_ms(str(value), where)
