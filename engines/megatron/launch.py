"""Start the processes of a learner: `python -m engines.megatron.launch --processes N --module MODULE WORDS...`.

Each is `python -m MODULE WORDS...` under torchrun (torch.distributed.run) on this machine.  When one of them ends badly
the others are ended too, and so is this, with its status; when this is stopped, they are.
"""

import argparse
import logging
import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from stream_rl import runtime

READY_FD = 0
"""torchrun closes what it inherits but the three standard files; of those, nothing reads from the first."""


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--ready-fd", type=int, help="an inherited pipe on which the first says that it is up")
    options, others = parser.parse_known_args(words)
    runtime.die_with_parent()
    if options.ready_fd is not None:
        os.dup2(options.ready_fd, READY_FD)
        os.close(options.ready_fd)
        others += ["--ready-fd", str(READY_FD)]
    os.environ[runtime.PARENT] = str(os.getpid())
    logging.disable(logging.CRITICAL)  # the last words in the log are those of the process that failed
    torchrun = [f"--nproc-per-node={options.processes}", "--local-addr=127.0.0.1", "--max-restarts=0", "--module"]
    try:
        run.run(run.parse_args([*torchrun, options.module, *others]))  # type: ignore[no-untyped-call]
    except SignalException:
        pass  # a stop signal is a clean end
    except ChildFailedError as error:
        sys.exit(_status({rank: failure.exitcode for rank, failure in error.failures.items()}))


def _status(codes: dict[int, int]) -> int | str:
    """Of all, from those of the processes that failed."""
    if runtime.NOT_AGAIN in codes.values():
        return runtime.NOT_AGAIN
    rank, code = next(iter(codes.items()))
    return code if code > 0 else f"learner: process {rank} was killed by signal {-code}"


if __name__ == "__main__":
    main(sys.argv[1:])
