"""The pages of the studies: Markdown whose tables and pictures are made from rows, as the comment above each of them says.

    python -m benchmarks.page docs/results/pruning.md [...]       make them again, after rows have come or changed
    python -m benchmarks.page docs/results/pruning.md --check     change nothing; fail if a table is not what the rows give

A comment begins with one of these words, goes on in YAML, and owns what follows it up to `<!-- end -->`:

| word       | what it makes                                                                                             |
|------------|-----------------------------------------------------------------------------------------------------------|
| `table`    | a line for each group of rows (`by`), its columns as `show` formats them, sorted by the means of `sort`; `each`: one table for each value of this key, under its `title`; `points`: the key of a row's list of rows |
| `compare`  | a line for each of `pairs`: the difference of two groups, seed by seed, with its 95 % interval            |
| `dots`     | a picture (`file`): an axis for each of `show`, every row a dot, a line for each group, a colour for each value of `series` |
| `lines`    | a picture (`file`): `y` over `x`, a colour for each group, its dots joined unless `joined: false`; `points`: the key of a row's list of points     |
| `machines` | hardware and versions that the rows were made with                                                        |

`rows` names the file, beside the page.  `where` gives what keys must be: a value, or a list of them, which is an order, too.  In `show`, a
text such as `{kl:.3f}` is filled in with mean ± standard deviation over the rows of a group, `{mean_kl:.3f}` with the mean alone, and
`{parameters:1e-6*.1f}` with a multiple.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import yaml
from matplotlib.figure import Figure

from program.files import write_file
from program.options import Parser
from program.screen import as_command

Row = dict[str, Any]
BLOCK = re.compile(r"(<!-- (\w+)\n(.*?)-->\n)(.*?)(<!-- end -->)", re.DOTALL)
# Student's t at 97.5 % by degrees of freedom, so that a mean over seeds has a 95 % interval.
T_QUANTILES = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


class Figures(list[Any]):
    """The values of one key in a group; formatted as mean ± standard deviation, or as the text that they are."""

    def __format__(self, spec: str) -> str:
        factor, _, digits = spec.rpartition("*")
        if isinstance(self[0], str):
            return str(self[0])
        values = [float(factor or 1) * value for value in self]
        mean, deviation = mean_and_deviation(values)
        return f"{mean:{digits}} ± {deviation:{digits.lstrip('+')}}" if deviation else f"{mean:{digits}}"


class Group(dict[str, Figures]):
    """Rows by key, for `str.format_map`."""

    def __init__(self, rows: Sequence[Row]) -> None:
        keys = dict.fromkeys(key for row in rows for key in row)
        found = {key: Figures(row[key] for row in rows if row.get(key) is not None) for key in keys}
        super().__init__({key: values for key, values in found.items() if values})

    def __missing__(self, key: str) -> Figures:
        if key.startswith("mean_"):
            return Figures([statistics.fmean(self[key.removeprefix("mean_")])])
        raise KeyError(key)

    def fill(self, form: str) -> str:
        """A cell; a dash where the group has nothing for it."""
        try:
            return form.format_map(self)
        except KeyError:
            return "-"


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The mean of several, and half of its 95 % interval (Student's t over seeds)."""
    mean, deviation = mean_and_deviation(differences)
    return mean, T_QUANTILES.get(len(differences) - 1, 2.26) * deviation / sqrt(len(differences))


def refreshed(page: Path, *, draw: bool = True) -> str:
    """The text of a page with its tables made again; pictures are drawn where `draw` says so.

    Raises:
        FileNotFoundError, ValueError: There is no page or no such rows; a comment says what can't be made.
    """

    def block(found: re.Match[str]) -> str:
        comment, word, text, _, end = found.groups()
        if word not in MAKERS:
            raise ValueError(f"expected a comment of {', '.join(MAKERS)} in {page}, found {word!r}; mend it")
        settings = yaml.safe_load(text)
        path = page.parent / settings.pop("rows")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        chosen = _chosen(rows, settings.pop("where", {}))
        if "file" in settings:
            file, title = settings.pop("file"), settings.pop("title")
            if draw:
                save_plot(MAKERS[word](chosen, **settings), page.parent / file)
            return f"{comment}\n![{title}]({file})\n\n{end}"
        return f"{comment}\n{MAKERS[word](chosen, **settings)}\n{end}"

    return BLOCK.sub(block, page.read_text(encoding="utf-8"))


def write_page(page: Path) -> None:
    """Make the tables and pictures of a page again."""
    text = refreshed(page)
    write_file(page, lambda path: path.write_text(text, encoding="utf-8"))


def _chosen(rows: Sequence[Row], where: Mapping[str, Any]) -> list[Row]:
    """The rows that are as they must be, in the order of the lists."""
    wanted = {key: value if isinstance(value, list) else [value] for key, value in where.items()}
    found = [row for row in rows if all(row.get(key) in values for key, values in wanted.items())]
    return sorted(found, key=lambda row: [values.index(row.get(key)) for key, values in wanted.items()])


def grouped(rows: Sequence[Row], by: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by what they have under some keys, groups in the order of their first row; one row has only its own group."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in by), []).append(row)
    return groups


def table(
    rows: Sequence[Row],
    by: Mapping[str, str],
    show: Mapping[str, str],
    sort: Sequence[str] = (),
    each: str | None = None,
    points: str | None = None,
    title: str = "",
) -> str:
    """See the table at the top."""
    if points is not None:
        rows = [point for row in rows for point in row[points]]
    if each is not None:
        parts = grouped(rows, [each]).values()
        return "\n".join(f"{title.format_map(Group(part))}\n\n{table(part, by, show, sort)}" for part in parts)
    groups = [(key, Group(some)) for key, some in grouped(rows, list(by.values())).items()]
    for name in reversed(sort):
        sign = -1 if name.startswith("-") else 1
        groups.sort(key=lambda group: sign * statistics.fmean(group[1][name.removeprefix("-")]))
    lines = [[*map(str, key), *(group.fill(form) for form in show.values())] for key, group in groups]
    return markdown_table([*by, *show], lines, text_columns=len(by))


def compare(rows: Sequence[Row], pairs: Sequence[Mapping[str, Any]]) -> str:
    """See the table at the top.

    Args:
        rows: Those of all pairs.
        pairs: Each with the `title` of what is compared, its key (`of`), what rows are `ours` and `theirs`, what is `expected`, and,
            if they are not 1, the multiple that is shown (`scale`) and that of theirs that is taken off (`times`).
    """
    lines = []
    for pair in pairs:
        ours, theirs = (
            {row["seed"]: row[pair["of"]] for row in _chosen(rows, pair[side])} for side in ("ours", "theirs")
        )
        seeds, scale = sorted(ours.keys() & theirs.keys()), pair.get("scale", 1)
        if not seeds:
            raise ValueError(
                f"expected rows of both sides of {pair['title']!r}, found no seed that both have; run them, or drop the pair"
            )
        mean, half = interval([scale * (ours[seed] - pair.get("times", 1) * theirs[seed]) for seed in seeds])
        side = "open" if abs(mean) <= half or len(seeds) < 2 else "higher" if mean > 0 else "lower"
        digits = ".2f" if scale != 1 else ".3f"
        shown = f"{mean:+{digits}} ({mean - half:+{digits}} to {mean + half:+{digits}})"
        lines.append([pair["title"], pair["expected"], shown, side])
    return markdown_table(["comparison", "expected", "difference (95 % interval)", "came out"], lines, text_columns=2)


def machines(rows: Sequence[Row]) -> str:
    """A line for each machine."""
    found = sorted({", ".join(f"{key} {value}" for key, value in row["machine"].items()) for row in rows})
    return "".join(f"- {line}.\n" for line in found)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """A table; the first columns are text, the others are figures."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines]) + "\n"


def dots(rows: Sequence[Row], by: str, show: Mapping[str, str], series: str | None = None) -> Figure:
    """See the table at the top; diamonds are means, bars their standard deviation."""
    names = list(dict.fromkeys(row[by] for row in rows))
    size = (4 * len(show) + 1.5, 0.45 * len(names) + 1.6)
    figure, axes = plt.subplots(1, len(show), figsize=size, sharey=True, layout="constrained", squeeze=False)
    colours = grouped(rows, [series]) if series else {("",): list(rows)}
    for axis, (label, key) in zip(axes[0], show.items(), strict=True):
        for number, ((colour,), some) in enumerate(colours.items()):
            shift = 0.22 * (number - (len(colours) - 1) / 2)
            for (name,), of_name in grouped(some, [by]).items():
                values, height = [row[key] for row in of_name], names.index(name) + shift
                mean, deviation = mean_and_deviation(values)
                axis.errorbar(mean, height, xerr=deviation, fmt="D", capsize=3, color=f"C{number}")
                axis.scatter(values, [height] * len(values), s=10, alpha=0.5, color=f"C{number}")
            axis.plot([], [], "D", color=f"C{number}", label=colour)
        axis.set(xlabel=label, yticks=range(len(names)), yticklabels=names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
    if series:
        axes[0][0].legend(fontsize="small")
    return figure


def lines(
    rows: Sequence[Row],
    by: str,
    x: Mapping[str, str],
    y: Mapping[str, str],
    points: str | None = None,
    joined: bool = True,
) -> Figure:
    """See the table at the top; y is logarithmic, and a colour's rows are one line, or one line each if they have points of their own."""
    ((x_label, x_key),), ((y_label, y_key),) = x.items(), y.items()
    figure, axis = plt.subplots(figsize=(11, 6), layout="constrained")
    for number, ((name,), some) in enumerate(grouped(rows, [by]).items()):
        for at, points_of in enumerate([row[points] for row in some] if points else [some]):
            axis.plot(
                [point[x_key] for point in points_of],
                [point[y_key] for point in points_of],
                linestyle="-" if joined else "",
                marker="os^Dv"[number // 10 % 5],
                markersize=4,
                alpha=0.8,
                color=f"C{number % 10}",
                label=name if at == 0 else None,
            )
    axis.set(xlabel=x_label, ylabel=y_label, yscale="log")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def save_plot(figure: Figure, file: Path) -> None:
    """Write a picture at once or not at all, and free it."""
    write_file(file, lambda path: figure.savefig(path, dpi=110))
    plt.close(figure)


MAKERS: dict[str, Any] = {"table": table, "compare": compare, "machines": machines, "dots": dots, "lines": lines}


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Make pages again, or check them."""
    layout = argparse.RawDescriptionHelpFormatter
    options = Parser("python -m benchmarks.page", description=__doc__, formatter_class=layout)
    options.add_argument("pages", type=Path, nargs="+", metavar="PAGE.md")
    text = "change nothing; fail if a table is not what the rows give"
    options.add_argument("--check", action="store_true", help=text)
    given = options.parse_args(arguments)
    stale = []
    for page in given.pages:
        if not given.check:
            write_page(page)
        elif refreshed(page, draw=False) != page.read_text(encoding="utf-8"):
            stale.append(page.name)
    if stale:
        raise ValueError(
            f"expected tables as the rows give them, found others in {', '.join(stale)}; run it without --check"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
