"""All cases: what `make test` holds the emulated kernels to, and `make test-gpu` those on a GPU."""

from tests.gpu import attention_cases, linear_cases, moe_cases, row_cases
from tests.gpu.case import Case


def all_cases() -> list[Case]:
    """In the order of the families' cost."""
    return [*row_cases.cases(), *linear_cases.cases(), *moe_cases.cases(), *attention_cases.cases()]
