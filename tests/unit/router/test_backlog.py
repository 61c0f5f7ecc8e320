from disagg.router.backlog import Backlog


def test_what_was_sent_counts_until_it_is_answered() -> None:
    backlog = Backlog()
    backlog.on_sent(100)
    assert backlog.tokens(0.0) == 100
    backlog.on_answered(100, 60, 0.0)
    assert backlog.tokens(0.0) == 60
    backlog.on_sent(50)
    backlog.on_refused(50)
    assert backlog.tokens(0.0) == 60


def test_it_shrinks_at_the_measured_rate() -> None:
    backlog = Backlog()
    backlog.on_load(1000, 100.0, 0.0)
    assert backlog.tokens(0.5) == 950
    backlog.on_sent(10)
    backlog.on_answered(10, 10, 0.5)
    assert backlog.tokens(0.5) == 960


def test_a_worker_that_has_fallen_silent_is_credited_for_no_more_than_a_second() -> None:
    backlog = Backlog()
    backlog.on_load(1000, 100.0, 0.0)
    assert backlog.tokens(5.0) == 900


def test_without_a_rate_first_tokens_tell_that_it_is_done() -> None:
    """A worker's first prompts would else keep it busy until its next Load."""
    backlog = Backlog()
    for _ in range(2):
        backlog.on_sent(100)
        backlog.on_answered(100, 100, 0.0)
    backlog.on_computed(100)
    assert backlog.tokens(0.0) == 100
    backlog.on_computed(100)
    assert backlog.tokens(0.0) == 0


def test_prompts_of_other_routers_stay_counted_when_ours_are_done() -> None:
    backlog = Backlog()
    backlog.on_sent(100)
    backlog.on_answered(100, 100, 0.0)
    backlog.on_load(400, 0.0, 0.0)
    backlog.on_computed(100)
    assert backlog.tokens(0.0) == 300
