"""The options of every command that reads labelled data: which of its columns and rows are meant."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from icl_compiler.command_line import counted, options

if TYPE_CHECKING:
    from icl_compiler.data import Dataset

text_column_option = click.option("--text-column", metavar="NAME", help="Column of the texts; guessed by its name.")
label_column_option = click.option("--label-column", metavar="NAME", help="Column of the labels; guessed by its name.")
target_column_option = click.option(
    "--target-column", metavar="NAME", help="Column of the texts to generate, in place of labels."
)
where_option = click.option(
    "--where",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="Use only rows of DATA where VALUE stands in COLUMN, or does not: COLUMN!=VALUE. Given again: both.",
)
test_option = click.option(
    "--test", metavar="DATA", help="Test data: rows with a text that stands there too are left out."
)


class Columns(NamedTuple):
    """What `column_options` were given."""

    text: str | None
    label: str | None
    target: str | None
    where: tuple[str, ...]

    def load(self, source: str) -> "Dataset":
        """The rows of `source` that are meant.

        Raises:
            DataError: as `load_dataset`.
        """
        from icl_compiler.data import load_dataset

        return load_dataset(
            source, text_column=self.text, label_column=self.label, target_column=self.target, where=self.where
        )

    def without_test(self, dataset: "Dataset", test: str) -> "tuple[Dataset, list[str]]":
        """The rows whose text does not stand in the data `test`, and warnings about what is gone.

        Raises:
            DataError: if no row is left.
            LabelError: if one label is left.
        """
        from icl_compiler.errors import LabelError

        kept, warnings = self.apart_from(dataset, test)
        if dataset.task == "classification" and (lost := sorted(set(dataset.labels) - set(kept.labels))):
            warnings.append(f"that leaves no row of the label {lost[0]!r}, so it will not be known")
            if len(kept.labels) < 2:
                raise LabelError(f"{warnings[0]}; that leaves the label {kept.labels[0]!r} only, expected two or more")
        return kept, warnings

    def apart_from(self, dataset: "Dataset", test: str) -> "tuple[Dataset, list[str]]":
        """As `without_test`, of data that are not learned from: whatever labels are left.

        Raises:
            DataError: if no row is left.
        """
        from icl_compiler.data import load_texts
        from icl_compiler.errors import DataError

        kept, dropped = dataset.without_texts(load_texts(test, text_column=self.text))
        if not dropped:
            return dataset, []
        if not len(kept):
            raise DataError(
                f"all {len(dataset)} rows of {dataset.source} stand in {test} too, so none is left; "
                "test on texts that are not learned from"
            )
        return kept, [f"{counted(dropped, 'row')} of {dataset.source} left out: in {test} too"]


def column_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--where`, `--text-column`, `--label-column` and `--target-column`, handed to the command as one `columns`."""

    @wraps(command)
    def collected(
        *args: Any,
        where: tuple[str, ...],
        text_column: str | None,
        label_column: str | None,
        target_column: str | None,
        **more: Any,
    ) -> Any:
        return command(*args, columns=Columns(text_column, label_column, target_column, where), **more)

    return options(where_option, text_column_option, label_column_option, target_column_option)(collected)
