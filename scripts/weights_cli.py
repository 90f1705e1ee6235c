"""`stream-rl weights`: updates in files, and the relay that serves them at another site."""

import asyncio
import contextlib
import json
import pathlib
import time

import click
from rich.console import Console
from rich.table import Table

from stream_rl import config, runtime
from stream_rl.types import Version


@click.group()
def weights() -> None:
    """Weight updates in files."""


@weights.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
@click.option("--tensors", default=10, show_default=True, help="How many of them to list, the largest first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with all tensors.")
def inspect(file: pathlib.Path, tensors: int, as_json: bool) -> None:
    """What an update FILE holds: from which version to which, how much changed, in how many bits."""
    from engines.weights import directory
    from engines.weights.inspection import examine

    about, parts = directory.load(file)
    found = examine(about, parts)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    console, table = Console(), Table(show_header=False, box=None)
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about.seconds))
    base, target = (str(Version(*version)) for version in (about.base, about.target))
    rows = {
        "run": about.run,
        "version": f"{target}, all weights" if about.anchor else f"{base} -> {target}",
        "fingerprint": about.target_hash,
        "written": written,
        "code": f"{about.code}, {found['parts']} parts",
        "payload": f"{found['payload_bytes']:,} bytes; all weights are {found['full_bytes']:,}",
        "changed": f"{about.changed:,} of {about.elements:,} elements ({found['changed_share']:.3%})",
        "bits per changed element": f"{found['bits_per_changed']:.2f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    sizes = sorted(found["tensors"].items(), key=lambda item: -item[1]["elements"])
    listed = Table("tensor", "dtype", "elements", "slices", "dense", box=None)
    for name, tensor in sizes[:tensors]:
        listed.add_row(name, tensor["dtype"], f"{tensor['elements']:,}", str(tensor["slices"]), str(tensor["dense"]))
    console.print(listed)
    if len(sizes) > tensors:
        console.print(f"... and {len(sizes) - tensors} more; --tensors {len(sizes)} or --json lists them")


@weights.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=pathlib.Path))
@click.option("--run-id", required=True, help="Of the run that writes the directory; engines must belong to it.")
@click.option("--bind", default="tcp://127.0.0.1:0", show_default=True, help="Where engines connect.")
def relay(directory: pathlib.Path, run_id: str, bind: str) -> None:
    """Bring engines here up to date from a DIRECTORY that a publisher writes (weights.directory in its recipe).

    Prints one JSON line for each version that an engine has taken.
    """
    from engines.weights.codes import payload
    from engines.weights.relay import Relay
    from stream_rl.transport import Router

    async def serve() -> None:
        async with Router.bind(bind) as router:
            click.echo(json.dumps({"kind": "ready", "address": router.address, "directory": str(directory)}))
            await runtime.supervise(relay=Relay(directory, run_id, router, config.Weights()).run())

    runtime.log_to_stderr("relay")
    payload.prepare()
    with contextlib.suppress(runtime.Stopped):
        asyncio.run(serve())
