"""`icl keys`: who may use the endpoint."""

from pathlib import Path

import click

from icl_compiler.command_line import OutputFile, WholeNumber, json_option, print_json, say

_file_option = click.option(
    "--file", "path", type=OutputFile(), required=True, help="The file of keys, which `icl serve` takes too."
)


@click.group()
def keys() -> None:
    """Make and revoke the keys of the endpoint.

    A server that runs sees the change by itself.
    """


@keys.command("add")
@click.argument("name")
@_file_option
@click.option(
    "--rights",
    default="query,feedback",
    metavar="LIST",
    help="What the key may do: query, feedback, admin (all of it, and the programs), with commas between them.",
)
@click.option("--per-minute", type=WholeNumber(min=1), show_default="no limit", help="Most requests a minute.")
def keys_add(name: str, path: Path, rights: str, per_minute: int | None) -> None:
    """Make a key for NAME and print it.

    It is shown this once: the file holds its hash.

    \b
      icl keys add ann --file keys.json
      icl keys add operator --file keys.json --rights admin
    """
    from serving.keys import KeyRing

    secret = KeyRing(path).add(name, rights.split(","), per_minute)
    click.echo(secret)
    say(f"the key of {name} ({rights}) is in force, and shown only now")


@keys.command("list")
@_file_option
@json_option
def keys_list(path: Path, as_json: bool) -> None:
    """List the keys: their names, rights and limits."""
    from serving.keys import KeyRing

    found = KeyRing.load(path).keys
    if as_json:
        print_json([{name: value for name, value in key._asdict().items() if name != "hash"} for key in found])
        return
    for key in found:
        limit = "no limit" if key.per_minute is None else f"{key.per_minute:,} a minute"
        click.echo(f"{key.name:<24} {','.join(key.rights):<20} {limit:<16} since {key.created}")


@keys.command("revoke")
@click.argument("name")
@_file_option
def keys_revoke(name: str, path: Path) -> None:
    """Take the key of NAME back."""
    from serving.keys import KeyRing

    KeyRing.load(path).revoke(name)
    say(f"the key of {name} is revoked")
