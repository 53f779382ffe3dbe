"""All cases: what `make test` holds the emulated kernels to, and `make test-gpu` those on a GPU."""

from tests.gpu import attention_cases, collective_cases, linear_cases, moe_cases, row_cases
from tests.gpu.case import Case


def all_cases() -> list[Case]:
    """In the order of the families' cost."""
    families = row_cases, linear_cases, moe_cases, attention_cases, collective_cases
    return [case for family in families for case in family.cases()]
