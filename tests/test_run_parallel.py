"""A whole run whose learner has two processes, started by torchrun."""

import json
import os
import signal

import psutil
import pytest
from run_command import Command, Launch, alive

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(600)]
TENSOR = ("learner.processes=2", "learner.model.tensor_model_parallel_size=2")
DATA = ("learner.processes=2", "learner.ddp.use_distributed_optimizer=true")


def ranks(command: Command) -> list[psutil.Process]:
    """The learner's processes, in their order; not the one that starts them."""
    found = [process for process in command.tree() if "RANK" in process.environ()]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def test_it_trains_and_the_engine_holds_its_weights(launch: Launch) -> None:
    command = launch(4, *TENSOR)
    command.wait_for_steps(1)
    assert len(ranks(command)) == 2
    code, left = command.finish(400)
    assert code == 0, command.text()
    assert left == []
    summary = json.loads((command.run / "summary.json").read_text())
    assert summary["steps"] == summary["versions"] == 4
    assert summary["weights_hash_engine"] == summary["weights_hash_learner"]
    assert summary["restarts"] == {}


def test_one_that_is_killed_takes_the_others_along_and_all_start_again(launch: Launch) -> None:
    command = launch(6, *DATA, "learner.checkpoint_every=2")
    command.wait_for_steps(3)
    first = ranks(command)
    first[1].send_signal(signal.SIGKILL)
    code, left = command.finish(400)
    assert code == 0, command.text()
    assert left == []
    assert alive(first) == []
    summary = json.loads((command.run / "summary.json").read_text())
    assert summary["restarts"] == {"learner": 1}
    assert summary["steps"] == 6
    assert summary["weights_hash_engine"] == summary["weights_hash_learner"]
    assert summary["conserved"] is True


def test_ctrl_c_ends_every_process(launch: Launch) -> None:
    command = launch(500, *DATA)
    command.wait_for_steps(1)
    tree = command.tree()
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
    assert command.process.wait(60) == 130, command.text()
    assert alive(tree) == []
