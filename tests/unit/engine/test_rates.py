"""What the router predicts with."""

import pytest

from disagg.engine.rates import WINDOW_STEPS, StepRates


def test_nothing_is_claimed_before_the_first_step() -> None:
    rates = StepRates()
    assert (rates.prefill_tokens_per_s, rates.decode_step_s) == (0.0, 0.0)


def test_the_decode_step_is_the_median_so_one_hiccup_does_not_count() -> None:
    rates = StepRates()
    for seconds in (0.01, 0.01, 5.0):
        rates.record(0, 3, seconds)
    assert rates.decode_step_s == 0.01


def test_a_mixed_step_charges_prefill_with_what_exceeds_a_decode_step() -> None:
    rates = StepRates()
    rates.record(0, 4, 0.1)
    rates.record(100, 4, 0.6)
    assert rates.prefill_tokens_per_s == pytest.approx(200)
    assert rates.decode_step_s == 0.1


def test_a_mixed_step_charges_prefill_at_least_half() -> None:
    rates = StepRates()
    rates.record(0, 4, 0.1)
    rates.record(100, 4, 0.1)
    assert rates.prefill_tokens_per_s == pytest.approx(2000)


def test_old_steps_are_forgotten() -> None:
    rates = StepRates()
    rates.record(10, 0, 1000.0)
    for _ in range(WINDOW_STEPS):
        rates.record(10, 0, 0.1)
    assert rates.prefill_tokens_per_s == pytest.approx(100)
