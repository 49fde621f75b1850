"""Tables on a terminal."""

from collections.abc import Sequence

from tabulate import tabulate


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Returns the rows below their header, in aligned columns. The columns `left` are aligned to the left."""
    alignment = ["left" if column in left else "right" for column in range(len(header))]
    # The cells are formatted already: tabulate must not take them for numbers and format them again.
    text = tabulate(rows, header, tablefmt="plain", disable_numparse=True, colalign=alignment)
    return "\n".join(line.rstrip() for line in text.splitlines())
