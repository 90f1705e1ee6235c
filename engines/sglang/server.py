"""Start a stock SGLang server, with our plugin in it unless --plain says otherwise.

    python -m engines.sglang.server RECIPE --run-id R --name engine-0 --incarnation 1 --queue A --publisher A [--plain]

Options of `[sglang]` go to SGLang under their own names.  On a machine without a GPU this module brings the import
shim: SGLang starts its processes by *spawn*, which imports the main module again, so the shim must be installed by
importing this file and before anything of SGLang's.
"""

import argparse
import contextlib
import difflib
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from engines.sglang import cpu_shim
from stream_rl import config, runtime
from stream_rl.errors import ConfigError, StreamRLError

cpu_shim.install()


HIGHEST_PORT = 65535 - 10_000
"""SGLang 0.5.15 puts its gRPC server 10,000 ports above the other, and ends if there is no such port."""


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago; SGLang wants a number and not a socket."""
    with contextlib.ExitStack() as held:  # so that none is offered twice
        for _ in range(64):
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            if (port := int(probe.getsockname()[1])) <= HIGHEST_PORT:
                break
    return port


def arguments(options: Mapping[str, Any], model_path: str, port: int) -> list[str]:
    """SGLang's command line.  Raises ConfigError for an option that SGLang does not have."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = {word.removeprefix("--").replace("-", "_") for word in parser._option_string_actions}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 3)
            raise ConfigError(f"[sglang] {name}: SGLang has no such server argument; near it are {near}")
    words = ["--model-path", model_path, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in options.items():
        if name == "port" or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, list):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return words


def main() -> None:
    parser = runtime.arguments(__doc__, "queue", "publisher")
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="only see whether SGLang has the options of [sglang]")
    parser.add_argument("--plain", action="store_true", help="without the plugin, to compare with")
    options = parser.parse_args()
    runtime.die_with_parent()
    try:
        recipe = config.load(options.recipe)
        if options.check:
            arguments(recipe.sglang, recipe.model.path, 0)
        else:
            _serve(recipe, options)
    except StreamRLError as error:
        sys.exit(f"{options.name}: {error}")


def _serve(recipe: config.Recipe, options: argparse.Namespace) -> None:
    port = options.port or free_port()
    address = f"http://127.0.0.1:{port}"
    if not options.plain:
        _tell_plugin(recipe, options, address)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for diagnostics in ("PYSPY_DUMP", "CUDA_COREDUMP"):
        # when one of its processes died SGLang would take seconds to a minute for these before it ends
        os.environ.setdefault(f"SGLANG_{diagnostics}_BEFORE_CRASH", "0")
    if recipe.sglang.get("device") == "cpu":
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than free cores spin against each other
        if (ranks := recipe.sglang.get("tp_size", 1)) > 1:
            cpus = sorted(os.sched_getaffinity(0))  # SGLang wants to be told, and would give each rank a whole socket
            bound = [str(cpus[rank % len(cpus)]) for rank in range(ranks)]
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(bound))

    words = arguments(recipe.sglang, recipe.model.path, port)
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(words)
    if hasattr(server_args, "resolve_once"):  # 0.5.20 resolves defaults late, 0.5.15 when it is made
        server_args.resolve_once()
    try:
        launch_server(
            server_args,
            launch_callback=lambda: runtime.report_ready(options.ready_fd, address=address),
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            kill_process_tree(os.getpid(), include_parent=False)


def _tell_plugin(recipe: config.Recipe, options: argparse.Namespace, address: str) -> None:
    from engines.sglang.plugin import PluginSettings

    PluginSettings(
        run=options.run_id,
        engine=options.name,
        incarnation=options.incarnation,
        http_address=address,
        queue_address=options.queue,
        publisher_address=options.publisher,
        chunk_tokens=recipe.engine.chunk_tokens,
        chunk_seconds=recipe.engine.chunk_seconds,
        buffer_bytes=recipe.engine.buffer_bytes,
        resend_seconds=recipe.engine.resend_seconds,
        max_kv_age=recipe.rollout.max_kv_age,
        launcher_pid=os.getpid(),
    ).export()


if __name__ == "__main__":
    main()
