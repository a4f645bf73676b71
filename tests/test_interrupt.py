"""Ctrl-C during a call that would garble or swallow it arrives afterwards, as KeyboardInterrupt."""

import os
import signal
import threading
import weakref

import pytest
from graphwright.backends.interrupt import deferred_interrupt
from graphwright.tools.interrupt import kept_interrupt, raise_if_interrupted
from graphwright.tools.progress import TerminalProgress


@pytest.fixture(autouse=True)
def handler_is_restored():
    """Whatever stood before: a shell starts background jobs with the signal ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_waits_for_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        done.append(1)
    assert done == [1]


def test_without_an_interrupt_nothing_is_raised():
    with deferred_interrupt():
        pass


def test_an_error_of_the_block_comes_through():
    with pytest.raises(ValueError, match="mine"), deferred_interrupt():
        raise ValueError("mine")


def test_another_thread_runs_the_block_as_it_is():
    ran = []

    def work():
        with deferred_interrupt():
            ran.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [1]


def press_where_it_is_lost():
    """Ctrl-C inside a weak reference's callback: Python prints the exception and goes on."""

    class Value:
        pass

    value = Value()
    watched = weakref.ref(value, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del value
    assert watched() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_swallowed_interrupt_comes_back_with_the_next_step():
    steps = []
    with pytest.raises(KeyboardInterrupt), kept_interrupt(), TerminalProgress() as progress:
        progress(0, 2, "work")
        press_where_it_is_lost()
        steps.append("the exception was lost")
        progress(1, 2, "work")
        steps.append("not reached")
    assert steps == ["the exception was lost"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_swallowed_interrupt_is_not_carried_into_the_next_run():
    with pytest.raises(KeyboardInterrupt), kept_interrupt():
        press_where_it_is_lost()
    with kept_interrupt():
        raise_if_interrupted()


@pytest.mark.parametrize("disguise", [RuntimeError("callback failed"), ImportError("multiarray"), SystemExit(1)])
def test_an_interrupt_that_became_another_error_is_an_interrupt(disguise):
    with pytest.raises(KeyboardInterrupt), kept_interrupt():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise disguise from None
    with pytest.raises(type(disguise)), kept_interrupt():
        raise disguise
