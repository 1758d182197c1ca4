"""What tests of kernels need: cases, the error rule, ISAs, threads, poison.

The cases enumerate each public function with its features and the shapes that break kernels; `run`
computes one of them, gradients included, on any kernel, dtype and memory layout:

    for case in fastattn.testing.cases("attention"):
        inputs = case.inputs(torch.bfloat16, "sliced")
        found = run(case, inputs, kernel="cpu")
        assert_results_close_to_oracle(case, inputs, found, *eager_and_oracle(case, inputs))
"""

from fastattn.testing.case import DTYPES, Case, eager_and_oracle, run
from fastattn.testing.error_rule import (
    assert_case_close_to_oracle,
    assert_close_to_oracle,
    assert_results_close_to_oracle,
    assert_vanishes,
    largest_errors,
)
from fastattn.testing.inputs import LAYOUTS, Draw, laid_out, numbers, widened
from fastattn.testing.machine import poisoned, use_isa, use_threads
from fastattn.testing.rooms import all_cases, cases

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "Case",
    "Draw",
    "all_cases",
    "assert_case_close_to_oracle",
    "assert_close_to_oracle",
    "assert_results_close_to_oracle",
    "assert_vanishes",
    "cases",
    "eager_and_oracle",
    "laid_out",
    "largest_errors",
    "numbers",
    "poisoned",
    "run",
    "use_isa",
    "use_threads",
    "widened",
]
