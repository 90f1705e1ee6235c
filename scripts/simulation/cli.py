"""`stream-rl simulate`."""

import pathlib
import shlex
import time

import click
from click.core import ParameterSource

from stream_rl.errors import ConfigError

_FILE = click.Path(dir_okay=False, path_type=pathlib.Path)


@click.command()
@click.option("--policy", default="all", show_default=True, metavar="all|NAME[,NAME...]")
@click.option("--lengths", default="lognormal:1.0", show_default=True, metavar="KIND:ARGUMENT", help="See above.")
@click.option("--steps", type=click.IntRange(20), help="Optimizer steps.  [200; more for agents]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--engines", type=click.IntRange(1), help="[2]")
@click.option("--learner-speed", type=click.FloatRange(0.01), help="In what full engines sample a second.  [0.9]")
@click.option("--ratio", type=click.FloatRange(1.0), help="Under way at most, where a policy leaves it open.  [3]")
@click.option("--max-token-age", type=click.IntRange(-1), help="Where a policy leaves it open.  [8]")
@click.option("--target-token-age", type=click.FloatRange(0.1), help="Of the steered ones.  [4]")
@click.option("--json", "json_path", type=_FILE, help="Add the figures to this file.")
@click.option("--plot", "plot_path", type=_FILE, default="runs/simulate.png", show_default=True)
@click.option(
    "--replay",
    "run",
    type=click.Path(exists=True, path_type=pathlib.Path),
    metavar="RUN",
    help="Instead: give a fresh queue what a run's journal holds, and compare the batch of every step.",
)
def simulate(
    policy: str,
    lengths: str,
    json_path: pathlib.Path | None,
    plot_path: pathlib.Path,
    run: pathlib.Path | None,
    **given: float | None,
) -> None:
    """The real queue against simulated engines, actor and learner: what a policy does to speed, ages and lengths.

    Lengths are lognormal:SIGMA, agent:VERSIONS (turns with an environment in between, that take so many versions),
    turns:SHARE (the same, as segments that the queue knows, with this share of the time spent in environments) or
    recorded:RUN (drawn from a run's journal).  Ratios are in steps' worth of groups, ages in versions; for agents
    their defaults are in proportion to the versions that an episode takes.
    """
    if run is not None:
        _replay(run)
        return
    from scripts.simulation import lengths as kinds
    from scripts.simulation import report
    from scripts.simulation.claims import claims
    from scripts.simulation.outcome import outcome
    from scripts.simulation.policies import choose
    from scripts.simulation.setting import setting
    from scripts.simulation.world import World

    chosen = setting(lengths, **given)
    drawn = kinds.make(chosen)
    outcomes = []
    for each in choose(chosen, policy):
        began = time.monotonic()
        world = World(chosen, each, drawn)
        world.run()
        outcomes.append(outcome(world))
        click.echo(f"{each.name}: {world.clock.now:,.0f} s in {time.monotonic() - began:.1f} s", err=True)
    found = claims(chosen, {each.policy: each for each in outcomes})
    report.show(outcomes, found)
    report.plot(plot_path, chosen, outcomes)
    click.echo(f"\nplot: {plot_path}")
    if json_path is not None:
        report.write(json_path, _command(), chosen, outcomes, found)
        click.echo(f"figures: {json_path}")


def _command() -> str:
    """What was asked for, without the names of files."""
    context = click.get_current_context()
    words = ["stream-rl", "simulate"]
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in ("json_path", "plot_path"):
            words += [option.opts[0], str(context.params[name])]
    return shlex.join(words)


def _replay(run: pathlib.Path) -> None:
    from scripts.simulation.lengths import journal_of
    from scripts.simulation.replay import replay

    path = journal_of(run)
    done = replay(path)
    if not done.steps:
        raise ConfigError(f"{path} holds no step to compare; name a run that has trained")
    what = f"{done.steps} batches of {done.trajectories} trajectories"
    click.echo(f"{path}: {done.rows} rows give a fresh queue the same {what}")
