"""A program on disk: a folder that reloads, in any process, to identical prompts.

    manifest.json       format, settings, labels, tokenizer, and the SHA-256 of every other file
    template.jinja      the template as it was
    pool.jsonl          the demonstrations
    shots.safetensors   their tokens
    index/              the retriever's own files
    blocks.safetensors  the fixed blocks of shots, of a program that has them
    calibration.safetensors   the calibration's offsets and anchors, where it has some
    reading.jinja, reading.safetensors   how the base model reads a text, where that is a part of the encoder
    voters/             a dense index, where votes are counted and the retriever is another one
    trace.jsonl         what a search tried, where there was one

- A folder is written beside its place and renamed: it is there completely or not at all.
- Nothing in it can run code: no pickle, a sandboxed template, and names of retrievers and calibrations from our tables
  only.
- The same program gives the same bytes: no dates, no paths, no order of hashing.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fcntl import LOCK_EX, flock
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np

from icl_compiler.calibration.storage import arrays_of, calibration_from, numbers_of
from icl_compiler.compile import load_tokenizer, new_retriever
from icl_compiler.data import Dataset
from icl_compiler.encoders import joint_encoder
from icl_compiler.errors import ArtifactError
from icl_compiler.layouts import Blocks, Expected, Layout
from icl_compiler.program import Pool, Program, Settings
from icl_compiler.reading import Reading
from icl_compiler.registry import CALIBRATIONS, RETRIEVERS
from icl_compiler.reranker import FEATURES, Reranker
from icl_compiler.selection import Order
from icl_compiler.templates import EncodedTemplate, Template
from retrievers.retriever import Encoder

FORMAT = 5
"""5: the base model may be a part of the encoder; 4: a calibration may leave a share to "other"; 3: a program may
rerank, and ask several prompts; 2: it may be calibrated. Programs of 1 to 4 load unchanged."""
_MANIFEST = "manifest.json"
_BLOCKS = ("centres", "rows", "offsets")
_RERANKER = "reranker.safetensors"
_TRACE = "trace.jsonl"
_READING = "reading.safetensors"


def save_program(program: Program, folder: Path, *, trace: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write `program` as `folder`, in place of a program that is there, with the `trace` of the search that found it.

    Raises:
        ArtifactError: if `folder` exists and is not a program, or cannot be written, or if the program could not be
            loaded again because its retriever or its calibration stands in no table.
    """
    from safetensors.numpy import save

    require_replaceable(folder, kind="program")
    if program.calibration.method not in CALIBRATIONS:
        raise ArtifactError(
            f"a program on disk names a calibration of the table, and {program.calibration.method!r} stands in none; "
            "add it to CALIBRATIONS in icl_compiler/registry.py"
        )
    if program.settings.retriever not in RETRIEVERS:
        raise ArtifactError(
            f"a program on disk names a retriever of the table, and {program.settings.retriever!r} stands in none; "
            "add it to RETRIEVERS in icl_compiler/registry.py"
        )
    with new_folder(folder) as draft:
        (draft / "template.jinja").write_text(program.template.template.source, encoding="utf-8")
        data = program.pool.data
        rows = zip(data.texts, data.answers, strict=True)
        lines = [json.dumps({"text": text, "answer": answer}, ensure_ascii=False) for text, answer in rows]
        (draft / "pool.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
        arrays = {"tokens": program.pool.tokens, "offsets": program.pool.offsets}
        (draft / "shots.safetensors").write_bytes(save(arrays))  # save_file would hide it from all others
        if program.blocks is not None:
            blocks = {name: getattr(program.blocks, name) for name in _BLOCKS}
            (draft / "blocks.safetensors").write_bytes(save(blocks))
        (draft / "index").mkdir()
        program.retriever.save(draft / "index")
        if (reading := program.reading) is not None:
            (draft / "reading.jinja").write_text(reading.template.template.source, encoding="utf-8")
            (draft / _READING).write_bytes(save({"mean": reading.mean, "scale": reading.scale}))
        if program.voters is not None:
            (draft / "voters").mkdir()
            program.voters.save(draft / "voters")
        if kept := arrays_of(program.calibration):
            (draft / "calibration.safetensors").write_bytes(save(kept))
        if program.reranker is not None:
            (draft / _RERANKER).write_bytes(save({"helpful": program.reranker.helpful}))
        if trace:
            told = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in trace)
            (draft / _TRACE).write_text(told, encoding="utf-8", newline="\n")
        write_manifest(
            draft,
            {
                "kind": "program",
                "task": program.task,
                "labels": list(program.labels),
                "settings": asdict(program.settings),
                "expected": program.expected and program.expected._asdict(),
                "template": program.template.template.name,
                "tokenizer": program.template.tokenizer.fingerprint,
                "pool": {"rows": len(data), "sha256": data.content_hash},
                "calibration": numbers_of(program.calibration),
                "reranker": program.reranker
                and {
                    "candidates": program.reranker.candidates,
                    "weights": dict(zip(FEATURES, program.reranker.weights.tolist(), strict=True)),
                },
            },
        )


def load_program(folder: Path) -> Program:
    """Read a program.

    Raises:
        ArtifactError: if a file was changed, is missing, or is of a newer format; the message names it.
    """
    from safetensors import SafetensorError

    manifest = read_manifest(folder, kind="program")
    try:
        return _read_program(folder, manifest)
    except (KeyError, IndexError, TypeError, ValueError, FileNotFoundError, SafetensorError) as error:
        raise ArtifactError(f"{folder} does not hold what a program holds ({error}); compile it again") from error


def _read_program(folder: Path, manifest: dict[str, Any]) -> Program:
    from safetensors.numpy import load_file

    settings = Settings(**manifest["settings"])
    for name in ("shots", "budget", "seed", "per_label", "clusters", "cache_block", "ensembles"):
        if not isinstance(getattr(settings, name), int):
            raise TypeError(f"{name} should be a whole number")
    if settings.ensembles < 1:
        raise ValueError("ensembles should be 1 or more")
    for name, choice in (("order", Order), ("layout", Layout)):
        if (found := getattr(settings, name)) not in get_args(choice):
            raise ValueError(f"{name} should be one of {', '.join(get_args(choice))}, is {found!r}")
    template = Template(manifest["template"], (folder / "template.jinja").read_text(encoding="utf-8"))
    lines = (folder / "pool.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    texts, answers = tuple(row["text"] for row in rows), tuple(row["answer"] for row in rows)
    data = Dataset(texts, answers, manifest["task"], folder.name)
    tokenizer = load_tokenizer(settings.model)
    if tokenizer.fingerprint != manifest["tokenizer"]:
        raise ArtifactError(
            f"{folder} was compiled for another tokenizer than {settings.model!r} has now; compile it again"
        )
    encoded = EncodedTemplate.build(template, tokenizer, tuple(manifest["labels"]))
    arrays = load_file(folder / "shots.safetensors")
    pool = Pool(data, arrays["tokens"].astype(np.int32), arrays["offsets"].astype(np.int64))
    reading = _read_reading(folder, settings, encoded) if _READING in manifest["files"] else None
    encoder = joint_encoder(settings.encoder, reading)
    retriever = new_retriever(settings.retriever, encoder=encoder, seed=settings.seed, trusted=False)
    retriever.load(folder / "index")
    blocks = _read_blocks(folder, encoder, rows=len(rows)) if settings.layout != "per-query" and rows else None
    expected = Expected(**manifest["expected"]) if manifest.get("expected") else None
    kept = folder / "calibration.safetensors"
    calibration = calibration_from(
        manifest.get("calibration", {"method": "none"}),  # format 1 has none
        load_file(kept) if kept.name in manifest["files"] else {},
        rows=len(data),
        labels=len(encoded.labels),
    )
    voters = None
    if any(name.startswith("voters/") for name in manifest["files"]):
        voters = new_retriever("dense", encoder=encoder, seed=settings.seed)
        voters.load(folder / "voters")
    program = Program(
        settings, manifest["task"], encoded, pool, retriever, blocks, expected, calibration=calibration, voters=voters,
        reading=reading,
        reranker=_read_reranker(folder, manifest["reranker"], rows=len(rows)) if manifest.get("reranker") else None,
    )  # fmt: skip
    if (calibration.neighbours or program.reranker is not None) and program.dense is None:
        raise ValueError("its calibration or its reranker wants neighbours, and there is no index that finds them")
    return program


def _read_reranker(folder: Path, told: dict[str, Any], *, rows: int) -> Reranker:
    from safetensors.numpy import load_file

    weights = np.array([told["weights"][name] for name in FEATURES], dtype=np.float64)
    helpful = load_file(folder / _RERANKER)["helpful"].astype(np.float64)
    known = set(told["weights"]) == set(FEATURES) and isinstance(told["candidates"], int) and told["candidates"] > 0
    if not known or helpful.shape != (rows,) or not (np.isfinite(weights).all() and np.isfinite(helpful).all()):
        raise ValueError("the numbers of the reranker make no sense")
    return Reranker(told["candidates"], weights, helpful)


def _read_reading(folder: Path, settings: Settings, encoded: EncodedTemplate) -> Reading:
    from safetensors.numpy import load_file

    template = Template("reading", (folder / "reading.jinja").read_text(encoding="utf-8"))
    arrays = load_file(folder / _READING)
    mean, scale = arrays["mean"], arrays["scale"]
    if mean.ndim != 1 or mean.shape != scale.shape or not (np.isfinite(mean).all() and (scale > 0).all()):
        raise ValueError("the numbers of the reading make no sense")
    return Reading(settings.model, EncodedTemplate.build(template, encoded.tokenizer, encoded.labels), mean, scale)


def _read_blocks(folder: Path, encoder: Encoder, *, rows: int) -> Blocks:
    from safetensors.numpy import load_file

    arrays = load_file(folder / "blocks.safetensors")
    centres, of_pool, offsets = (arrays[name] for name in _BLOCKS)
    begins_and_ends = [*offsets[:1].tolist(), *offsets[-1:].tolist()] == [0, len(of_pool)]
    if len(offsets) != len(centres) + 1 or not begins_and_ends or (np.diff(offsets) < 0).any():
        raise ValueError("the blocks do not follow one another")
    if len(of_pool) and not 0 <= of_pool.min() <= of_pool.max() < rows:
        raise ValueError(f"a block holds a row that is none of the {rows} of the pool")
    return Blocks(encoder, centres, of_pool, offsets)


def load_trace(folder: Path) -> list[dict[str, Any]]:
    """What the search that found the program tried, a row each; nothing where there was no search.

    Raises:
        ArtifactError: see `load_program`.
    """
    if _TRACE not in read_manifest(folder, kind="program")["files"]:
        return []
    return [json.loads(line) for line in (folder / _TRACE).read_text(encoding="utf-8").splitlines()]


def is_artifact(folder: Path, *, kind: str | None = None) -> bool:
    """Whether `folder` is one of ours, and of this `kind` if one is named: it has a manifest that says so."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    ours = isinstance(manifest, dict) and "icl_compiler" in manifest
    return ours and kind in (None, manifest.get("kind"))


def require_replaceable(folder: Path, *, kind: str) -> None:
    """Check that `folder` may be written: it is not there, it is empty, or it is a `kind` and nothing else.

    Raises:
        ArtifactError: if something would be lost that is not of the `kind`.
    """
    if is_artifact(folder, kind=kind):
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8")).get("files", {})
        found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
        if others := sorted(set(found) - {*files, _MANIFEST}):
            raise ArtifactError(
                f"{folder} holds more than a {kind}, and {others[0]!r} would be lost; move it, or choose another name"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} exists and is not a {kind}; choose another name, or remove it yourself")


class new_folder:
    """Context: an empty folder beside `target` that takes its place at the end.

    If something fails, the new folder vanishes and what stood at `target` stands there still.
    """

    def __init__(self, target: Path) -> None:
        self._name = target
        self._target = target.resolve()

    def __enter__(self) -> Path:
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(dir=self._target.parent, prefix=f".{self._target.name}-"))
        except OSError as error:
            raise ArtifactError(f"{self._name} cannot be written: {error.strerror or error}") from error
        draft = self._scratch / "new"
        draft.mkdir()
        return draft

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        old = self._scratch / "old"
        failure = error
        try:
            if kind is None:
                with _alone_in(self._target.parent):
                    if self._target.exists():
                        self._target.rename(old)
                    (self._scratch / "new").rename(self._target)
        except OSError as refused:
            failure = refused
        finally:
            if old.exists() and not self._target.exists():
                old.rename(self._target)
            shutil.rmtree(self._scratch, ignore_errors=True)
        if isinstance(failure, OSError):
            reason = failure.strerror or failure
            raise ArtifactError(f"{self._name} could not be written: {reason}") from failure


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for other processes that are here for this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks have no locks
            flock(handle, LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of the files in `folder`, with the hash of each and of itself."""
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {"icl_compiler": version("icl-compiler"), "format": FORMAT, **content, "files": files}
    manifest["sha256"] = _digest(manifest)
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (folder / _MANIFEST).write_text(text, encoding="utf-8", newline="\n")


def read_manifest(folder: Path, *, kind: str) -> dict[str, Any]:
    """The manifest of `folder`, after checking every file against it.

    Raises:
        ArtifactError: if there is none, or it is of another kind or a newer format, or any file differs.
    """
    path = folder / _MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"there is no {kind} {str(folder)!r}: expected a folder that {_maker(kind)} wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found, form, files = manifest["kind"], int(manifest["format"]), dict(manifest.get("files", {}))
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} is no {kind}: {_MANIFEST} is missing; {_maker(kind)} writes one") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); make the {kind} again with {_maker(kind)}") from error
    if form > FORMAT:
        raise ArtifactError(
            f"{folder} has format {form}, and this version of icl-compiler reads up to {FORMAT}; upgrade icl-compiler"
        )
    if found != kind:
        raise ArtifactError(f"{folder} is a {found}, not a {kind}")
    claimed = manifest.pop("sha256", None)
    if claimed != _digest(manifest):
        raise ArtifactError(f"{path} was changed after it was written; make the {kind} again with {_maker(kind)}")
    for name, digest in files.items():
        file = folder / name
        if not file.is_file():
            raise ArtifactError(f"{folder}: the file {name} is missing; make the {kind} again with {_maker(kind)}")
        if _sha256(file) != digest:
            raise ArtifactError(
                f"{folder}: the file {name} was changed after it was written; make the {kind} again with {_maker(kind)}"
            )
    result: dict[str, Any] = manifest
    return result


def _maker(kind: str) -> str:
    return {"program": "`icl compile`", "reference": "`icl finetune`"}[kind]


def _digest(manifest: dict[str, Any]) -> str:
    return sha256(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
