"""`stream-rl bench codec`: sizes and rates of the codes of weight updates.

sizes   on successive steps of a language model that is trained here, at two learning rates
rates   on made-up weights up to a gigabyte, against memcpy
"""

import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from typing import Any

import click

from stream_rl.errors import ConfigError

LEARNING_RATES = (1e-6, 3e-6)
MIB = 1 << 20
SIZES = (32 * MIB, 256 * MIB, 1024 * MIB)
SHARES = (0.001, 0.01, 0.05)
TARGETS = {
    "small_bits_per_changed": (7.5, "<="),
    "xor_zstd1_over_small": (2.8, ">="),
    "gap_xor_zstd1_over_small": (1.8, ">="),
    "fast_bits_per_changed": (13.0, "<="),
    "fast_encode_over_memcpy": (0.7, ">="),
    "fast_apply_over_memcpy": (0.9, ">="),
}
"""At 1.4 % changed; the rates at 1 %, the worst of all sizes."""


def run(max_bytes: int, pairs: int, training_steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All measurements as one object; `say` is told what is being done.  Made-up weights take at most `max_bytes`, and
    four times as much memory."""
    from engines.weights.codes import specimens
    from engines.weights.codes.kernels import kernels
    from engines.weights.codes.payload import Code
    from scripts.bench.codec_rates import MOST_PAIRS, rates

    if not 2 <= pairs <= MOST_PAIRS:
        raise ConfigError(f"pairs must be 2 to {MOST_PAIRS}, got {pairs}")
    load = os.getloadavg()[0]
    specimens.use_one_core()
    snapshots = _snapshots(training_steps, say)
    sizes = [size for size in SIZES if size <= max_bytes] or [max_bytes]
    plans = [(Code.FAST, size, 0.01) for size in sizes]
    plans += [(Code.FAST, sizes[0], share) for share in SHARES if share != 0.01] + [(Code.SMALL, sizes[0], 0.01)]
    made_up = []
    for code, size, share in plans:
        say(f"{code.name.lower()} on {size / MIB:.0f} MiB, {100 * share:g} % changed")
        made_up.append(rates(size, share, code, pairs))
    nearest = min(snapshots, key=lambda each: abs(each["changed_share"] - 0.014))
    found = {
        "small_bits_per_changed": nearest["bits_per_changed"]["small"],
        "xor_zstd1_over_small": nearest["small_times_smaller_than"]["xor_zstd1"],
        "gap_xor_zstd1_over_small": nearest["small_times_smaller_than"]["gap_xor_zstd1"],
        "fast_bits_per_changed": nearest["bits_per_changed"]["fast"],
        "fast_encode_over_memcpy": min(each["encode_over_memcpy"]["mean"] for each in made_up[: len(sizes)]),
        "fast_apply_over_memcpy": min(each["apply_over_memcpy"]["mean"] for each in made_up[: len(sizes)]),
    }
    return {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "load_average_before": load},
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "numba", "zstandard")},
        "kernels": kernels().__name__.rsplit(".", 1)[-1],
        "date": time.strftime("%F"),
        "command": f"stream-rl bench codec --max-bytes {max_bytes} --pairs {pairs} --training-steps {training_steps}",
        "snapshots": snapshots,
        "made_up": made_up,
        "targets": {
            name: {"target": f"{sign} {target}", "measured": found[name], "met": _met(found[name], target, sign)}
            for name, (target, sign) in TARGETS.items()
        },
    }


def _snapshots(training_steps: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One entry for each learning rate: the middle one of its updates by share of changed elements."""
    from engines.weights.codes import specimens
    from scripts.bench.codec_sizes import sizes

    training = specimens.Training(first_steps=training_steps)
    say(f"training a model for {training_steps} steps")
    start = specimens.trained(training)
    entries = []
    for lr in LEARNING_RATES:
        say(f"{training.warm_up + training.measured} steps at {lr:g}")
        states = [specimens.bits(weights) for weights in specimens.training_snapshots(lr, start, training)]
        updates = [
            sizes([specimens.change(a, b) for a, b in zip(before, after, strict=True)])
            for before, after in pairwise(states)
        ]
        updates.sort(key=lambda update: update["changed_share"])
        entries.append({"lr": lr} | updates[len(updates) // 2])
    return entries


def _processor() -> str:
    about = pathlib.Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _met(measured: float, target: float, sign: str) -> bool:
    return measured <= target if sign == "<=" else measured >= target


@click.command()
@click.option("--max-bytes", default=SIZES[-1], show_default=True, help="Of made-up weights; larger ones are skipped.")
@click.option("--pairs", default=16, show_default=True, help="Measurements of each rate, each beside one of memcpy.")
@click.option("--training-steps", default=60, show_default=True, help="Of the model, before what is measured.")
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Write the object here too."
)
def codec(max_bytes: int, pairs: int, training_steps: int, path: pathlib.Path | None) -> None:
    """Weight updates: bits per changed element of each code, its baselines and bounds, and rates against memcpy."""
    text = json.dumps(run(max_bytes, pairs, training_steps, lambda line: click.echo(line)), indent=2)
    if path is not None:
        path.write_text(text + "\n")
    click.echo(text)
