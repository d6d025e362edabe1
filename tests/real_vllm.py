"""A real vLLM server on this machine, with SmolLM2-135M, which can be killed and started again on its port."""

from pathlib import Path

from icl_compiler.vllm_launch import ServerProcess, free_port

MODEL = "smollm2-135m"


class RealVLLM:
    """A real server, which can be killed and started again on its port."""

    def __init__(self) -> None:
        self.port = free_port()
        self._logs: list[Path] = []
        self.start()

    def start(self) -> None:
        self.process = ServerProcess(MODEL, port=self.port)
        self._logs.append(self.process.log)
        self.process.wait_until_ready()

    def stop(self) -> None:
        self.process.stop()
        for log in self._logs:
            log.unlink(missing_ok=True)
