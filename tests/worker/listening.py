"""What tests of the worker share: jobs, and a listener that keeps what it is told."""

import threading
from collections import defaultdict

from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.serving.worker import Failed, Finished

PLAIN = SamplingOptions(max_new_tokens=20, stop="none", seed=3)
FAST = SamplingOptions(max_new_tokens=14, stop="none", seed=4, sampler="threshold", threshold=0.4)
LONG = SamplingOptions(max_new_tokens=100_000, stop="none")


class Heard:
    """A listener that keeps all it is told, by ticket."""

    def __init__(self):
        self.events, self.changed = defaultdict(list), threading.Condition()

    def __call__(self, ticket, event):
        with self.changed:
            self.events[ticket.id].append(event)
            self.changed.notify_all()

    def wait(self, ticket, enough, seconds=20):
        with self.changed:
            assert self.changed.wait_for(lambda: enough(self.events[ticket.id]), seconds)
            return list(self.events[ticket.id])

    def until(self, ticket, kind):
        return self.wait(ticket, lambda events: any(isinstance(one, kind) for one in events))

    def end(self, ticket):
        return self.until(ticket, (Finished, Failed))[-1]


def alone(model, job):
    return generate_tokens(model, [job.prompt], job.options, rows=[job.number])


def replayed(events, count):
    """The tokens that the steps of a row fixed, and how many of them each step says are final."""
    text, finals = [None] * count, []
    for event in events:
        for place, token in zip(event.at, event.tokens, strict=True):
            assert (text[place] is None) != (place in event.edited)
            text[place] = token
        finals.append((event.final, list(text)))
    return text, finals
