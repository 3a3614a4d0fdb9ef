import asyncio
import threading

import numpy as np
import pytest

from detkit.serve.batching import Batcher
from detkit.serve.settings import Problem


def image(number):
    return np.array([number])


class Network:
    """Says of an image its number, notes what came together, and can be held up."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, images):
        assert self.go.wait(30)
        self.batches.append([int(one[0]) for one in images])
        if self.batches[-1] == [666]:
            raise RuntimeError("out of memory")
        return [(one, one, one) for one in images]


def run(job, **options):
    network = Network()

    async def main():
        batcher = Batcher(network, **{"most": 4, "delay": 0.05, "capacity": 100} | options)
        try:
            await job(batcher, network)
        finally:
            network.go.set()
            await batcher.close()

    asyncio.run(asyncio.wait_for(main(), 30))
    return network.batches


async def ask(batcher, number, ready=None):
    with batcher.room(1) as submit:
        if ready:
            await ready.wait()
        row = await submit(image(number))
        assert int(row[0][0]) == number


def test_each_gets_its_own_row_and_no_batch_is_too_large():
    async def job(batcher, network):
        network.go.clear()
        tasks = [asyncio.create_task(ask(batcher, number)) for number in range(11)]
        await asyncio.sleep(0.1)
        network.go.set()
        await asyncio.gather(*tasks)

    batches = run(job)
    assert sorted(number for batch in batches for number in batch) == list(range(11))
    assert max(map(len, batches)) == 4
    assert len(batches) == 3


def test_one_alone_is_not_delayed():
    async def job(batcher, network):
        await asyncio.wait_for(ask(batcher, 1), 5)

    assert run(job, delay=1000.0) == [[1]]


def test_it_waits_for_those_that_are_on_their_way_but_not_for_ever():
    async def job(batcher, network):
        ready = asyncio.Event()
        first = asyncio.create_task(ask(batcher, 1))
        late = asyncio.create_task(ask(batcher, 2, ready))
        await asyncio.sleep(0)
        ready.set()
        await asyncio.gather(first, late)
        never = asyncio.create_task(ask(batcher, 3, asyncio.Event()))
        await asyncio.sleep(0)
        await ask(batcher, 4)
        never.cancel()

    assert run(job) == [[1, 2], [4]]


def test_more_than_there_is_room_for_is_told_when_to_come_back():
    async def job(batcher, network):
        network.go.clear()
        tasks = [asyncio.create_task(ask(batcher, number)) for number in range(3)]
        await asyncio.sleep(0.1)
        with pytest.raises(Problem) as error, batcher.room(1):
            pass
        assert (error.value.status, error.value.retry_after) == (429, 1)
        with pytest.raises(Problem) as error, batcher.room(4):
            pass
        assert error.value.status == 413  # never
        network.go.set()
        await asyncio.gather(*tasks)
        await ask(batcher, 9)
        assert batcher.held == 0

    run(job, capacity=3)


def test_a_failure_reaches_those_who_wait_and_the_others_go_on():
    async def job(batcher, network):
        with pytest.raises(RuntimeError, match="out of memory"):
            await ask(batcher, 666)
        await ask(batcher, 1)
        assert batcher.held == 0

    assert run(job) == [[666], [1]]


def test_who_gives_up_leaves_no_trace():
    async def job(batcher, network):
        network.go.clear()
        tasks = [asyncio.create_task(ask(batcher, number)) for number in range(6)]
        await asyncio.sleep(0.1)  # 0 to 3 are in the network
        tasks[4].cancel()
        network.go.set()
        await asyncio.gather(*tasks[:4], tasks[5])
        assert batcher.held == batcher._coming == 0

    assert sorted(run(job)[1:]) == [[5]]


def test_closing_waits_for_what_was_accepted():
    async def job(batcher, network):
        network.go.clear()
        task = asyncio.create_task(ask(batcher, 1))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        network.go.set()
        await task
        await closing

    assert run(job) == [[1]]
