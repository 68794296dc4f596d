"""One thread computes for many; each row is what it is alone."""

import threading
import time
from dataclasses import replace

import pytest

from blockdiff.errors import InputError
from blockdiff.serving.worker import Draining, Full, Job, Progress
from worker.listening import FAST, LONG, PLAIN, Heard, alone, replayed


def test_jobs_that_come_later_are_what_they_are_alone(working):
    worker, heard = working(), Heard()
    jobs = [Job([1, 2, 3], PLAIN, 0), Job([1, 2, 3], PLAIN, 1), Job([5], FAST, 2)]
    tickets = worker.submit(jobs[:2], heard)
    heard.until(tickets[0], Progress)
    tickets += worker.submit(jobs[2:], heard)
    for job, ticket in zip(jobs, tickets, strict=True):
        end, expected = heard.end(ticket), alone(worker.model, job)
        assert end.tokens == expected.tokens[0] and end.nfe == expected.nfe[0]
        assert (end.finish, end.stopped, end.logprobs) == ("length", False, None)
        assert 0 <= end.wait <= end.first_seconds <= end.seconds
        assert ticket.state == "finished"
        *steps, last = heard.events[ticket.id]
        nfe = [step.nfe for step in steps]
        assert last is end and nfe == sorted(set(nfe)) and nfe[-1] <= end.nfe
        assert all(step.at for step in steps)
        text, finals = replayed(steps, len(end.tokens))
        assert text == end.tokens and finals[-1][0] == len(text)
        assert all(known[:final] == text[:final] for final, known in finals)
        assert any(0 < final < len(text) for final, _ in finals)
    stats = worker.stats()
    assert (stats.rows, stats.queued, stats.finished) == (0, 0, 3)
    assert stats.tokens == sum(job.options.max_new_tokens for job in jobs)


def test_the_end_alone_where_nobody_watches(working):
    worker, heard = working(), Heard()
    options = replace(PLAIN, logprobs=True)
    job = Job([1, 2], options, progress=False)
    (ticket,) = worker.submit([job], heard)
    expected = alone(worker.model, job)
    assert heard.end(ticket).logprobs == pytest.approx(expected.path_logprobs[0])
    assert len(heard.events[ticket.id]) == 1


def test_a_cancelled_row_leaves_and_is_heard_no_more(working):
    worker, heard = working(rows=1), Heard()
    running, waiting = worker.submit([Job([1], LONG), Job([2], LONG)], heard)
    (last,) = worker.submit([Job([1, 2, 3], PLAIN)], heard)
    heard.until(running, Progress)
    assert (running.state, waiting.state) == ("running", "queued")
    worker.cancel(waiting)
    worker.cancel(running)
    assert heard.end(last).tokens == alone(worker.model, last.job).tokens[0]
    assert not heard.events[waiting.id]
    assert all(isinstance(event, Progress) for event in heard.events[running.id])
    told = len(heard.events[running.id])
    worker.cancel(running)
    worker.cancel(last)
    assert (running.state, waiting.state, last.state) == ("cancelled", "cancelled", "finished")
    assert told == len(heard.events[running.id]) and worker.stats().cancelled == 2


def test_draining_finishes_what_runs(working):
    """What waits is told so at once, in the thread that tells everything."""
    worker, heard = working(rows=1), Heard()
    running, waiting = worker.submit([Job([1, 2], PLAIN), Job([3], FAST)], heard)
    heard.until(running, Progress)
    assert worker.drain(20) and worker.draining
    assert heard.end(running).tokens == alone(worker.model, running.job).tokens[0]
    assert isinstance(heard.end(waiting).error, Draining)
    with pytest.raises(Draining):
        worker.submit([Job([1], PLAIN)], heard)
    with pytest.raises(Draining):
        worker.call(lambda: 1)


def test_what_does_not_finish_in_time_is_told_so(working):
    worker, heard = working(rows=1), Heard()
    tickets = worker.submit([Job([1], LONG), Job([2], LONG)], heard)
    heard.until(tickets[0], Progress)
    assert not worker.drain(0.05)
    assert all(isinstance(heard.end(ticket).error, Draining) for ticket in tickets)
    assert {ticket.state for ticket in tickets} == {"failed"} and not worker._thread.is_alive()


def test_other_work_between_evaluations(working):
    worker, heard = working(), Heard()
    (ticket,) = worker.submit([Job([1], LONG)], heard)
    heard.until(ticket, Progress)
    thread = worker.call(threading.get_ident).result(20)
    assert thread == worker._thread.ident != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0).result(20)
    before = len(heard.events[ticket.id])
    heard.wait(ticket, lambda events: len(events) > before + 2)


def test_what_cannot_be_taken_is_said_at_once(working):
    worker, heard = working(start=False, rows=1, queue=2), Heard()
    for job in (Job([], PLAIN), Job([99], PLAIN), Job([1], replace(PLAIN, block_size=5))):
        with pytest.raises(InputError):
            worker.submit([Job([1], PLAIN), job], heard)
    worker.submit([Job([1], PLAIN)] * 2, heard)
    with pytest.raises(Full):
        worker.submit([Job([1], PLAIN)] * 2, heard)
    assert worker.stats().queued == 2
    worker.submit([Job([1], PLAIN)], heard)


def test_a_listener_that_fails_takes_only_its_own_row(working, caplog):
    worker, heard = working(), Heard()

    def deaf(ticket, event):
        raise RuntimeError("the loop is closed")

    (gone,) = worker.submit([Job([1], LONG)], deaf)
    (stays,) = worker.submit([Job([1, 2], PLAIN)], heard)
    assert heard.end(stays).tokens == alone(worker.model, stays.job).tokens[0]
    until = time.monotonic() + 20
    while worker.stats().rows and time.monotonic() < until:
        time.sleep(0.01)
    assert gone.state == "cancelled" and worker.stats().rows == 0


def test_a_row_that_is_cancelled_as_its_end_is_told_has_finished(working):
    """It is counted once: what hears of the last end of a request may close it at once."""
    worker, heard = working(), Heard()

    def closes(ticket, event):
        worker.cancel(ticket)
        heard(ticket, event)

    (ticket,) = worker.submit([Job([1, 2], PLAIN, progress=False)], closes)
    heard.end(ticket)
    assert ticket.state == "finished"
    assert (worker.stats().finished, worker.stats().cancelled) == (1, 0)
