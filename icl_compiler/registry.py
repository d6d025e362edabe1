"""Plug-in points as tables of `"module:Class"` strings, read on demand.

- Adding an entry is one file and one line in a table; nothing imports it until it is asked for.
- On the command line a dotted path `my_package.mine:MyRetriever` works in place of a name. A file that
  was downloaded may name table entries only (`trusted=False`): a path read from it would run foreign code.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from icl_compiler.errors import MissingDependencyError, RegistryError

RETRIEVERS: Mapping[str, str] = {
    "uniform": "retrievers.uniform:Uniform",
    "bm25": "retrievers.bm25:BM25",
    "dense": "retrievers.dense:Dense",
    "hybrid": "retrievers.hybrid:Hybrid",
    "mmr": "retrievers.mmr:MMR",
    "dpp": "retrievers.dpp:DPP",
    "coverage": "retrievers.coverage:Coverage",
    "cluster": "retrievers.cluster:Cluster",
    "votek": "retrievers.votek:VoteK",
    "static": "retrievers.static:Static",
}
CALIBRATIONS: Mapping[str, str] = {  # the simplest first: of those that are equally good, it is chosen
    "none": "icl_compiler.calibration.methods:none",
    "normalise": "icl_compiler.calibration.methods:normalise",
    "temperature": "icl_compiler.calibration.methods:temperature",
    "batch": "icl_compiler.calibration.methods:batch",
    "pmi": "icl_compiler.calibration.methods:pmi",
    "contextual": "icl_compiler.calibration.methods:contextual",
    "domain-context": "icl_compiler.calibration.methods:domain_context",
    "bias": "icl_compiler.calibration.methods:bias",
    "mixture": "icl_compiler.calibration.methods:mixture",
    "product": "icl_compiler.calibration.methods:product",
    "knn": "icl_compiler.calibration.methods:knn",
}
BACKENDS: Mapping[str, str] = {
    "transformers": "icl_compiler.backends.hf_transformers:TransformersBackend",
    "vllm_offline": "icl_compiler.backends.vllm_offline:VLLMOfflineBackend",
    "vllm_server": "icl_compiler.backends.vllm_server:VLLMServerBackend",
    "echo": "icl_compiler.backends.echo:EchoBackend",
}
METHODS: Mapping[str, str] = {
    "rsr": "evaluation.reference.rsr.rsr:RSR",
    "loreft": "evaluation.reference.loreft:LoReFT",
    "lora": "evaluation.reference.peft_methods:LoRA",
    "shira": "evaluation.reference.peft_methods:SHiRA",
    "full": "evaluation.reference.full:Full",
    "head": "evaluation.reference.head:Head",
}
REFERENCES: Mapping[str, str] = {
    "folder": "evaluation.reference.trainer:load_reference",
}
COMMANDS: Mapping[str, str] = {
    "demo": "evaluation.cli:demo",
    "compile": "icl_compiler.compile_cli:compile_command",
    "explain": "icl_compiler.explain_cli:explain",
    "diff": "icl_compiler.explain_cli:diff",
    "predict": "icl_compiler.cli:predict",
    "finetune": "evaluation.reference_cli:finetune",
    "merge": "evaluation.reference_cli:merge",
    "cascade": "evaluation.cascade_cli:cascade",
    "evaluate": "evaluation.cli:evaluate",
    "compare": "evaluation.comparison_cli:compare",
    "sweep": "evaluation.sweep_cli:sweep",
    "report": "evaluation.sweep_cli:report",
    "bounds": "evaluation.bounds_cli:bounds",
    "decide": "evaluation.decide_cli:decide",
    "messages": "icl_compiler.cli:messages",
    "models": "icl_compiler.cli:models",
    "serve": "serving.cli:serve",
    "vllm": "icl_compiler.vllm_cli:vllm",
    "keys": "serving.keys_cli:keys",
    "doctor": "icl_compiler.cli:doctor",
}


def resolve(kind: str, table: Mapping[str, str], name: str, *, trusted: bool = True) -> Any:
    """The object that `name` stands for: an entry of `table`, or, if `trusted`, any `"module:attribute"`.

    Raises:
        RegistryError: if the name is in no table, or leads nowhere.
        MissingDependencyError: if the module needs a package that is not installed.

    >>> resolve("retriever", RETRIEVERS, "uniform").__name__
    'Uniform'
    """
    if name in table:
        path = table[name]
    elif trusted and ":" in name:
        path = name
    else:
        raise RegistryError(f"unknown {kind} {name!r}. {did_you_mean(name, table)}")
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise RegistryError(f"{kind} {name!r} should look like 'my_package.my_module:MyClass'")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise RegistryError(f"{kind} {name!r}: there is no module {error.name!r}") from error
        raise MissingDependencyError(
            f"{kind} {name!r} needs the package {error.name!r}: pip install {error.name}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise RegistryError(f"{kind} {name!r}: module {module_name!r} has no {attribute!r}") from error


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that is none of `names`.

    >>> did_you_mean("bm52", ["bm25", "dense"])
    "Did you mean 'bm25'? Available: bm25, dense."
    """
    known = list(names)
    close = get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Available: {', '.join(known)}."
