import pytest

from blockdiff.serving.worker import Worker
from helpers import tiny_model


@pytest.fixture
def working():
    """Makes workers that are ended after the test."""
    made = []

    def make(model=None, start=True, **settings):
        worker = Worker(model or tiny_model(vocab_size=9), **settings)
        made.append(worker)
        if start:
            worker.start()
        return worker

    yield make
    for worker in made:
        worker.drain(0)
