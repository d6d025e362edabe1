"""`icl serve`: programs behind an OpenAI-compatible API."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from icl_compiler.command_line import FiniteNumber, WholeNumber, say
from icl_compiler.errors import ICLError, ServingError

if TYPE_CHECKING:
    import uvicorn

    from icl_compiler.predictor import Predictor
    from serving.endpoint import Endpoint

_FOR_THE_ENGINE_S = 60
_BETWEEN_TRIES_S = 2
# oneDNN keeps a compiled kernel, with its buffers, for each shape of a batch: of 1,024 by default, which is 600 MiB of
# the encoder's after some thousand texts. With 16 it is as fast, and the memory stays flat (docs/results.md).
_KERNELS_KEPT = "16"


@click.command()
@click.argument("programs", nargs=-1, required=True, metavar="PROGRAMS...")
@click.option(
    "--upstream", "upstreams", multiple=True, metavar="URL", help="Where vLLM runs; once for each base model."
)
@click.option("--model", metavar="NAME", help="Start vLLM here with this base model, in place of --upstream.")
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Where to listen; for other machines with --keys.")
@click.option("--port", default=8080, type=WholeNumber(1, 65535), help="Where to listen.")
@click.option("--keys", type=click.Path(path_type=Path), metavar="FILE", help="Who may call: keys of `icl keys`.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="~/.local/state/icl-serve",
    help="Keeps corrections and older versions of the programs.",
)
@click.option("--in-flight", default=32, type=WholeNumber(1), help="Most queries that vLLM has at once.")
@click.option("--waiting", default=256, type=WholeNumber(0), help="Most queries that wait for that; others get 429.")
@click.option("--deadline", default=60.0, type=FiniteNumber(0.1), metavar="SECONDS", help="Longest time for a request.")
@click.option("--max-body", default=1 << 20, type=WholeNumber(1000), metavar="BYTES", help="Longest request.")
@click.option(
    "--reference",
    "references",
    multiple=True,
    metavar="NAME=FOLDER",
    help="Measure, beside the serving, how far program NAME is from this fine-tuned model (`icl finetune`).",
)
@click.option(
    "--shadow-rate",
    default=0.01,
    type=FiniteNumber(0, 1),
    metavar="SHARE",
    help="Share of the queries that the reference is asked too.",
)
@click.option("--log-text", is_flag=True, help="Let the log hold what users write.")
def serve(programs: tuple[str, ...], upstreams: tuple[str, ...], model: str | None, **options: Any) -> None:
    """Serve PROGRAMS behind an OpenAI-compatible API.

    Each is a folder that `icl compile` wrote, or NAME=FOLDER; applications say the name as their `model`. The base
    model runs in vLLM, at --upstream or started here (--model). A page to try the programs stands at /. SIGHUP
    loads them again.

    \b
      icl serve program --model smollm2-135m
      icl serve intents=programs/1 mood=programs/2 --upstream http://gpu:8000
    """
    if bool(upstreams) == bool(model):
        raise click.UsageError("Give either --upstream URL, where vLLM runs, or --model MODEL, to start it here.")
    named = _named(programs)
    # uvicorn ends by the signal that it was sent, once all requests are answered; vLLM has to be ended first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        if model:
            with _started(model) as url:
                _run(named, (url,), **options)
        else:
            _run(named, upstreams, **options)
    except KeyboardInterrupt:
        say("stopped")


def _named(programs: tuple[str, ...]) -> dict[str, Path]:
    """The folder of each program by its name."""
    from serving.versions import require_name

    named: dict[str, Path] = {}
    for given in programs:
        name, equals, folder = given.partition("=")
        path = Path(folder if equals else given)
        name = name if equals else path.resolve().name
        require_name(name)
        if name in named:
            raise click.UsageError(f"two programs are named {name!r}: {named[name]} and {path}; say NAME=FOLDER.")
        named[name] = path
    return named


def _references(given: tuple[str, ...], programs: dict[str, Path]) -> "dict[str, Predictor]":
    from evaluation.reference.trainer import load_reference

    found: dict[str, Predictor] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or name not in programs:
            raise click.UsageError(f"--reference is NAME=FOLDER, of a program served here: {', '.join(programs)}.")
        found[name] = load_reference(Path(folder)).predictor()
    return found


@contextmanager
def _started(model: str) -> Iterator[str]:
    from icl_compiler.vllm_launch import free_port, running_server

    say(f"starting vLLM with {model} ...")
    with running_server(model, port=free_port(), notify=say) as url:
        yield url


def _run(programs: dict[str, Path], upstreams: tuple[str, ...], **options: Any) -> None:
    import uvicorn

    from icl_compiler.backends.patient_http import is_this_machine
    from icl_compiler.feedback import FeedbackStore
    from icl_compiler.vllm_launch import reachable, require_free
    from serving.endpoint import Endpoint, Limits
    from serving.gate import LOCAL_NAMES, Gate
    from serving.keys import KeyRing
    from serving.metrics import Metrics
    from serving.server import create_app
    from serving.upstream import Upstream
    from serving.versions import Versions

    host, port, keys = options["host"], options["port"], options["keys"]
    ring = None if keys is None else KeyRing.load(keys)
    if ring is None and not is_this_machine(host):
        raise ServingError(
            f"anybody who reaches this machine could use the programs at {host}; make a key with "
            "`icl keys add NAME --file keys.json`, and give --keys keys.json, or leave --host at 127.0.0.1"
        )
    require_free(host, port)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS_KEPT)
    state = options["state"] or _state_folder()
    metrics = Metrics()
    limits = Limits(options["in_flight"], options["waiting"], options["deadline"], options["max_body"])
    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    servers = [Upstream(url, key=key, observe=partial(metrics.upstream, url)) for url in upstreams]
    with FeedbackStore(state / "corrections.sqlite") as store:
        endpoint = Endpoint(
            programs,
            servers,
            store=store,
            versions=Versions(state / "versions"),
            limits=limits,
            metrics=metrics,
            references=_references(options["references"], programs),
            shadow_rate=options["shadow_rate"],
        )
        gate = Gate(ring, hosts=None if ring else (*LOCAL_NAMES, host))
        app = create_app(endpoint, gate=gate, metrics=metrics, log_text=options["log_text"])
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
        logging.getLogger("icl").setLevel(logging.INFO)
        config = uvicorn.Config(
            app, host=host, port=port, log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=int(limits.deadline_s) + 1,
        )  # fmt: skip
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(endpoint, uvicorn.Server(config), f"http://{reachable(host)}:{port}", state))


async def _serve(endpoint: "Endpoint", server: "uvicorn.Server", url: str, state: Path) -> None:
    """Load, and answer until a signal ends it; SIGHUP loads all programs again."""
    try:
        await _patient_start(endpoint)
        for live in endpoint.live.values():
            edition = live.edition
            note = f"; {edition.note}" if edition.note else ""
            say(f"{edition.name}: version {edition.version}, {edition.corrections} corrections{note}")
        reloads: set[asyncio.Task[None]] = set()

        def reload_all() -> None:
            task = asyncio.create_task(_reload_all(endpoint))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload_all)
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.02)
        if server.started:
            click.echo(f"ready: {url} (state in {state})")
        await serving
    finally:
        await endpoint.stop()


async def _patient_start(endpoint: "Endpoint") -> None:
    from serving.upstream import UnreachableError

    until = time.monotonic() + _FOR_THE_ENGINE_S
    while True:
        try:
            return await endpoint.start()
        except UnreachableError as error:
            if time.monotonic() > until:
                raise
            say(f"{error}; trying again for {until - time.monotonic():.0f} s")
        await asyncio.sleep(_BETWEEN_TRIES_S)


async def _reload_all(endpoint: "Endpoint") -> None:
    for live in endpoint.live.values():
        try:
            await endpoint.reload(live.edition.name, by="SIGHUP")
        except ICLError as error:
            say(f"{live.edition.name} stays as it is: {error}")


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "icl-serve"
