"""An SGLang server as others run it: without our plugin.  Run as a script this is SGLang's own launcher."""

import asyncio
import contextlib
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time
from typing import Any

import aiohttp

from engines.sglang import cpu_shim
from engines.sglang.server import free_port

cpu_shim.install()
START_TIMEOUT_S = 180.0
CPU = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "max_total_tokens": 20000,
    "max_running_requests": 16,
}


class StockSGLang:
    """A context manager."""

    def __init__(self, directory: pathlib.Path, model: pathlib.Path, sglang: str = "", **options: Any) -> None:
        """sglang: a folder with another version of it, that goes before the installed one."""
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._log = directory / "sglang.log"
        words = ["--model-path", str(model), "--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init"]
        for name, value in options.items():
            words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SGLANG_PLUGINS": "none"}
        if options.get("device") == "cpu":
            environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [sglang, environment.get("PYTHONPATH", "")]))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *words],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
            )  # fmt: skip

    def __enter__(self) -> "StockSGLang":
        try:
            asyncio.run(self._started())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def log(self) -> str:
        return self._log.read_text()[-3000:]

    async def _started(self) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        async with aiohttp.ClientSession() as http:
            while True:
                assert self._process.poll() is None and time.monotonic() < end, self.log()
                try:
                    async with http.get(f"{self.url}/health_generate") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.2)

    async def get(self, path: str) -> dict[str, Any]:
        async with aiohttp.ClientSession() as http, http.get(self.url + path) as response:
            answer: dict[str, Any] = await response.json()
            return answer

    async def generate(self, prompt: list[int], max_new_tokens: int, **sampling: Any) -> dict[str, Any]:
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 1.0, "ignore_eos": True, **sampling},
            "return_logprob": True,
        }
        timeout = aiohttp.ClientTimeout(total=120)
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.post(f"{self.url}/generate", json=body) as response,
        ):
            answer: dict[str, Any] = await response.json()
            return answer


if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
