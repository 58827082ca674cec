"""`nas storage-proxy`: stands between hundreds of workers and one database."""

from __future__ import annotations

import click

from nas.cli.options import common_options
from nas.cli.output import Console


@click.command("storage-proxy", short_help="Serve a database to hundreds of workers.")
@click.option(
    "--storage", required=True, metavar="URL", help="postgresql://USER@HOST/DATABASE (password from PGPASSWORD)."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=13000, show_default=True)
@click.option("--connections", type=click.IntRange(min=1), default=10, show_default=True, help="To the database.")
@common_options
@click.pass_obj
def command(console: Console, storage: str, host: str, port: int, connections: int) -> None:
    """Runs Optuna's gRPC storage proxy in front of a database, until Ctrl-C.

    Searches and workers name it by --storage grpc://HOST:PORT and need no access to the database themselves. It knows
    no passwords and no encryption: whoever reaches the port can read and change every study, so listen on other
    addresses than 127.0.0.1 only inside a network that you trust.
    """
    from nas.search.shared_storage import redacted, serve_proxy

    if host not in ("127.0.0.1", "localhost", "::1"):
        console.warn(f"{host}: whoever reaches port {port} can read and change every study of {redacted(storage)}")

    def tell() -> None:
        console.say(f"serving {redacted(storage)} at grpc://{host}:{port}; Ctrl-C ends it")

    serve_proxy(storage, host, port, connections, tell)
    console.say("ended")
    console.result({"host": host, "port": port})
