"""Ctrl-C during a call that would garble it arrives afterwards, as KeyboardInterrupt."""

import os
import signal
import threading

import pytest
from graphwright.backends.interrupt import deferred_interrupt


def test_an_interrupt_waits_for_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        done.append(1)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_interrupt_nothing_is_raised():
    with deferred_interrupt():
        pass


def test_an_error_of_the_block_comes_through():
    with pytest.raises(ValueError, match="mine"), deferred_interrupt():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_runs_the_block_as_it_is():
    ran = []

    def work():
        with deferred_interrupt():
            ran.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [1]
