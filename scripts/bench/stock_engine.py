"""SGLang's own launcher, also on a machine without a GPU: an engine that has nothing to do with us.

python -m scripts.bench.stock_engine SGLANG'S OPTIONS
"""

import runpy
import sys

from engines.sglang import cpu_shim

cpu_shim.install()

if __name__ == "__main__":
    del sys.argv[sys.argv.index("--ready-fd") :]  # it answers over HTTP when it is up
    runpy.run_module("sglang.launch_server", run_name="__main__")
