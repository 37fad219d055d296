import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import images

from sktransfer.data.images import as_images
from sktransfer.transforms import loader as reading
from sktransfer.transforms.loader import ImageErrors, ImageReader, reading_pool
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError

PREPROCESSING = Preprocessing(resize=16, crop=(16, 16))


class Watched(torch.utils.data.Dataset):
    """A dataset that counts its reads, with broken rows."""

    def __init__(self, n=40, broken=()):
        self.items = images(n)
        self.broken = broken
        self.read = 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        self.read += 1
        return (
            "nowhere.png"
            if row in self.broken
            else torch.from_numpy(self.items[row]).permute(2, 0, 1)
        )


class InlinePool:
    """Stands in for the thread pool: runs each task as soon as it is submitted.

    What is read ahead is then everything that has been submitted, at any speed of the machine.
    """

    def __init__(self, *arguments):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, cancel_futures):
        pass


def reader(dataset, threads=2, on_error="raise"):
    return ImageReader(Views(as_images(dataset), PREPROCESSING), threads, ImageErrors(on_error))


def test_batches_come_in_order_and_hold_prepared_images():
    dataset = Watched()
    got = list(reader(dataset, threads=4).batches([3, 1, 2, 30, 4], 2))
    assert [rows for rows, _ in got] == [[3, 1], [2, 30], [4]]
    expected = [PREPROCESSING.prepare(np.ascontiguousarray(dataset.items[row])) for row in (2, 30)]
    assert torch.equal(got[1][1], torch.stack(expected))
    assert got[1][1].is_contiguous(memory_format=torch.channels_last)


def test_only_a_few_batches_are_read_ahead(monkeypatch):
    monkeypatch.setattr(reading, "ThreadPoolExecutor", InlinePool)
    dataset = Watched()
    batches = reader(dataset).batches(range(40), 4)
    for consumed in range(1, 11):
        next(batches)
        assert dataset.read == min(40, 4 * (consumed + reading._BATCHES_AHEAD - 1))
    assert next(batches, None) is None


def test_threads_end_with_the_batches():
    def readers():
        return [thread for thread in threading.enumerate() if "sktransfer" in thread.name]

    batches = reader(Watched()).batches(range(40), 4)
    next(batches)
    assert readers()
    batches.close()
    assert not readers()


def test_broken_image_raises_after_the_batches_before_it():
    batches = reader(Watched(broken=[5])).batches(range(12), 4)
    assert next(batches)[0] == [0, 1, 2, 3]
    with pytest.raises(ImageError, match=r"Image in row 5 \(nowhere\.png\)"):
        next(batches)


@pytest.mark.parametrize("broken", [[5], [0, 11], [3, 4, 7, 8], [11], list(range(12))])
def test_one_error_names_all_broken_images(broken):
    dataset = Watched(broken=broken)
    with pytest.raises(ImageError) as caught:
        list(reader(dataset).batches(range(12), 4))
    assert [error.row for error in caught.value.errors] == broken
    with pytest.raises(ImageError) as caught:
        list(
            reader(dataset).map(
                lambda pixels: pixels.numpy(), [[0, 1], [2, 3, 4, 5], [*range(6, 12)]]
            )
        )
    assert [error.row for error in caught.value.errors] == broken


def test_images_after_a_broken_one_are_read_but_not_yielded():
    dataset = Watched(broken=[5])
    batches = reader(dataset).batches(range(12), 4)
    assert next(batches)[0] == [0, 1, 2, 3]
    with pytest.raises(ImageError):
        next(batches)
    assert dataset.read == 12


def test_broken_images_are_left_out_and_recorded():
    image_errors = ImageErrors("nan")
    dataset = as_images(Watched(broken=[5, 8, 9, 10, 11]))
    batches = list(
        ImageReader(Views(dataset, PREPROCESSING), 2, image_errors).batches(range(12), 4)
    )
    assert [rows for rows, _ in batches] == [[0, 1, 2, 3], [4, 6, 7]]
    assert batches[1][1].shape == (3, 3, 16, 16)
    assert [error.row for error in image_errors.sorted()] == [5, 8, 9, 10, 11]


def test_dataset_error_names_the_row():
    class Failing(Watched):
        def __getitem__(self, row):
            raise KeyError("label")

    with pytest.raises(ImageError, match=r"row 0 .*cannot read it: KeyError\('label'\)"):
        list(reader(Failing()).batches(range(4), 2))


def test_map_returns_results_in_order_with_one_torch_thread_each():
    dataset, of_torch, seen = Watched(), torch.get_num_threads(), set()
    expected = {
        row: float(PREPROCESSING.prepare(np.ascontiguousarray(dataset.items[row])).double().sum())
        for row in range(40)
    }
    both_threads, later_batch_done = threading.Barrier(2, timeout=20), threading.Event()

    def total(pixels):
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        values = pixels.double().sum((1, 2, 3)).numpy()
        if values[0] in (expected[3], expected[2]):  # the first two batches
            both_threads.wait()  # one on each thread
        if values[0] == expected[3]:
            assert later_batch_done.wait(20)
        else:
            later_batch_done.set()
        return values

    mapped = list(reader(dataset, threads=2).map(total, [[3, 1], [2, 30], [4], [7, 5], [6]]))
    assert [rows for rows, _ in mapped] == [[3, 1], [2, 30], [4], [7, 5], [6]]
    for rows, values in mapped:
        assert values.tolist() == [expected[row] for row in rows]
    assert {threads for _, threads in seen} == {1}
    assert len(seen) == 2
    assert torch.get_num_threads() == of_torch


def test_map_runs_batches_in_parallel():
    together = threading.Barrier(2, timeout=20)

    def meet(pixels):
        together.wait()
        return np.zeros(len(pixels))

    assert len(list(reader(Watched(), threads=2).map(meet, [[0], [1], [2], [3]]))) == 4


def test_map_reads_only_a_few_batches_ahead(monkeypatch):
    monkeypatch.setattr(reading, "ThreadPoolExecutor", InlinePool)
    dataset = Watched()
    mapped = reader(dataset).map(lambda pixels: np.zeros(len(pixels)), [[n] for n in range(40)])
    for consumed in range(1, 11):
        next(mapped)
        assert dataset.read == consumed - 1 + 2 * 2


def test_map_leaves_no_threads():
    dataset = Watched()
    mapped = reader(dataset).map(lambda pixels: np.zeros(len(pixels)), [[n] for n in range(40)])
    next(mapped)
    mapped.close()
    assert not [thread for thread in threading.enumerate() if "sktransfer" in thread.name]


def test_map_leaves_out_broken_images_or_raises():
    image_errors, sizes = ImageErrors("nan"), []

    def measure(pixels):
        sizes.append(len(pixels))
        return np.zeros(len(pixels))

    dataset = as_images(Watched(broken=[5, 8, 9]))
    mapped = ImageReader(Views(dataset, PREPROCESSING), 1, image_errors).map(
        measure, [[4, 5, 6], [8, 9], [10]]
    )
    assert [rows for rows, _ in mapped] == [[4, 6], [10]]
    assert sizes == [2, 1]
    assert [error.row for error in image_errors.sorted()] == [5, 8, 9]
    ending = reader(Watched(broken=[5])).map(measure, [[0, 1], [4, 5], [6]])
    assert next(ending)[0] == [0, 1]
    with pytest.raises(ImageError, match=r"Image in row 5 \(nowhere\.png\)"):
        next(ending)


def test_single_image_is_read_on_the_calling_thread(monkeypatch):
    monkeypatch.setattr(reading, "ThreadPoolExecutor", None)
    ((rows, pixels),) = reader(images(1)).batches([0], 4)
    assert rows == [0]
    expected = reader(images(2)).batches
    monkeypatch.undo()
    assert torch.equal(pixels, next(iter(expected([0], 4)))[1])


def test_single_broken_image_raises_its_error(monkeypatch):
    monkeypatch.setattr(reading, "ThreadPoolExecutor", None)
    with pytest.raises(ImageError, match=r"nowhere\.png"):
        list(reader(Watched(1, broken=[0])).batches([0], 4))
    assert not list(reader(Watched(1, broken=[0]), on_error="nan").batches([0], 4))


def test_pools_at_the_same_time_leave_torch_its_threads():
    """As when a server reads the images of several requests, each on a new thread."""

    def on_new_thread(function):
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(function).result()

    def read():
        with reading_pool(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with reading_pool(1) as pool:
            pool.submit(read).result()
            on_new_thread(read)
        on_new_thread(read)
        assert on_new_thread(torch.get_num_threads) == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork_while_images_are_read_has_its_own_threads():
    with reading_pool(1):
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            with reading_pool(1) as pool:
                pool.submit(int).result()
            os._exit(torch.get_num_threads())
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1


def test_new_thread_does_not_keep_the_number_of_readers():
    before, reader_done, seen = torch.get_num_threads(), threading.Event(), []
    one = ImageReader(Views(as_images(images(1)), PREPROCESSING), 1, ImageErrors("raise"))

    def request():
        list(one.read([[0]]))  # a single image, without a pool
        seen.append(torch.get_num_threads())
        reader_done.set()

    torch.set_num_threads(3)
    try:
        with reading_pool(1) as pool:
            pool.submit(int).result()
            threading.Thread(target=request).start()
            assert reader_done.wait(30)
        assert seen == [3]
    finally:
        torch.set_num_threads(before)


def test_threads_keep_their_own_number():
    def own(number):
        torch.set_num_threads(number)
        with reading_pool(1) as pool:
            pool.submit(int).result()
            with ThreadPoolExecutor(1) as other:
                other.submit(nested).result()
        return torch.get_num_threads()

    def nested():
        with reading_pool(1) as pool:
            return pool.submit(read_within).result()

    def read_within():
        with reading_pool(1) as pool:
            pool.submit(int).result()
        assert torch.get_num_threads() == 1, "this is a reader"

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as executor:
            assert [executor.submit(own, number).result() for number in (1, 3, 2)] == [1, 3, 2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork_that_ends_the_reading_of_its_parent_has_its_own_threads():
    def reading():
        with reading_pool(1):
            yield

    generator = reading()
    next(generator)
    child = os.fork()
    if not child:
        generator.close()
        torch.set_num_threads(2)
        with reading_pool(1) as pool:
            pool.submit(int).result()
        os._exit(torch.get_num_threads())
    generator.close()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2
