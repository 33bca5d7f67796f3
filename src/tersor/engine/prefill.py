"""How a prompt is cut into parts that go through the layers together."""

from __future__ import annotations

from tersor.models.decoder import STEP_ROWS


def chunks(n: int, size: int) -> list[slice]:
    """Returns n > 0 tokens cut into parts of at most size > 2 * STEP_ROWS, none of 1 to STEP_ROWS unless all together are so few.

    So few have finer activations (ops.linear): the results would depend on where the cuts are.
    """
    ends = [*range(size, n, size), n]
    if len(ends) > 1 and ends[-1] - ends[-2] <= STEP_ROWS:
        ends[-2] = n - STEP_ROWS - 1
    return [slice(begin, end) for begin, end in zip([0, *ends], ends)]
