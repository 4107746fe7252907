"""How many rows a chunk has."""

import pytest
import torch

from unsloth_puzzles.backprop import chunks
from unsloth_puzzles.backprop.chunks import chunk_rows, even_rows

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.mark.parametrize(
    ("chunk_size", "rows"),
    [
        (1, 1),
        (1000, 1000),
        ("256MiB", 1048),  # 2**28 / (2 * 128000)
        ("256 MB", 1000),
        ("0.256gb", 1000),
        (" 1GiB ", 4194),
        ("512000B", 2),
        ("256000B", 1),
    ],
)
def test_rows_and_bytes(chunk_size, rows):
    assert chunk_rows(chunk_size, 128000, BF16, CPU) == rows


def test_bytes_are_of_logits_in_their_dtype():
    assert chunk_rows("1MiB", 1024, BF16, CPU) == 512
    assert chunk_rows("1MiB", 1024, torch.float32, CPU) == 256
    assert chunk_rows("1MiB", 1024, torch.float64, CPU, bytes_per_logit=100) == 128


@pytest.mark.parametrize(
    "chunk_size", [0, -1, "12 parsecs", "MiB", "", "-1MiB", "255999", "1.5.2MB", "autos", "1e6", "512000"]
)
def test_bad_chunk_sizes_are_refused(chunk_size):
    with pytest.raises(ValueError, match=r"^chunk_size must be .*, got "):
        chunk_rows(chunk_size, 128000, BF16, CPU)


@pytest.mark.parametrize("chunk_size", [None, 1.5, True, (1,), torch.tensor(4)])
def test_chunk_sizes_of_a_wrong_type_are_refused(chunk_size):
    with pytest.raises(TypeError, match=r"^chunk_size must be .*, got "):
        chunk_rows(chunk_size, 128000, BF16, CPU)


class Machine:
    """A GPU as its driver describes it."""

    def __init__(self, monkeypatch, free, **properties):
        self.free = free
        monkeypatch.setattr(chunks, "_free_bytes", lambda device: self.free)
        described = type("Properties", (), properties)()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
        chunks._auto_rows.cache_clear()


H200 = {
    "major": 9, "minor": 0, "multi_processor_count": 132, "clock_rate": 1980000, "memory_clock_rate": 3201000,
    "memory_bus_width": 6144,
}  # fmt: skip
T4 = {
    "major": 7, "minor": 5, "multi_processor_count": 40, "clock_rate": 1590000, "memory_clock_rate": 5001000,
    "memory_bus_width": 256,
}  # fmt: skip
NAMELESS = {**T4, "memory_bus_width": 0}


@pytest.fixture
def machine(monkeypatch):
    yield lambda free, **properties: Machine(monkeypatch, free, **properties)
    chunks._auto_rows.cache_clear()


def test_auto_is_four_times_the_balance(machine):
    machine(2**37, **H200)
    cuda = torch.device("cuda:0")
    balance = 4096 * 132 * 1.98e9 / (2 * 3.201e9 * 6144 / 8)
    rows = chunk_rows("auto", 128256, BF16, cuda)
    assert rows % 16 == 8 and 4 * balance <= rows < 4 * balance + 16
    assert chunk_rows("auto", 128256, torch.float32, cuda) == 264  # the least, in odd eights: float32 needs fewer
    assert chunk_rows("auto", 8192, BF16, cuda) == 4096  # a small vocabulary: enough logits to outlast the host
    assert chunk_rows("auto", 128256, BF16, cuda, hidden_size=2048) > 1.9 * rows
    machine(2**34, **T4)
    assert 256 <= chunk_rows("auto", 128256, torch.float16, cuda) <= 1024
    machine(2**34, **NAMELESS)
    assert chunk_rows("auto", 128256, BF16, cuda) == 808


def test_auto_takes_a_quarter_of_the_free_memory_at_most(machine):
    machine(2**28, **H200)
    assert chunk_rows("auto", 128256, BF16, torch.device("cuda:0")) == 2**26 // (2 * 128256)
    assert chunk_rows("auto", 128256, BF16, torch.device("cuda:0"), 4.0) == 2**26 // (4 * 128256)
    machine(1000, **H200)
    assert chunk_rows("auto", 128256, BF16, torch.device("cuda:0")) == 1


def test_auto_does_not_change_within_a_process(machine):
    described = machine(2**37, **H200)
    first = chunk_rows("auto", 128256, BF16, torch.device("cuda:0"))
    described.free = 10**6
    assert chunk_rows("auto", 128256, BF16, torch.device("cuda:0")) == first


def test_auto_on_the_cpu():
    assert chunk_rows("auto", 128256, BF16, CPU) == 256


@pytest.mark.parametrize("rows", [256, 904, 1784, 4096])
def test_even_chunks(rows):
    for of in (*range(1, 40), *range(41, 40000, 97), 16384, 10**6):
        even = even_rows(rows, of)
        chunks = -(-of // even)
        assert chunks <= -(-of // rows)
        assert even <= 1.05 * rows + 15
        if even < of and chunks < rows / 32:
            assert of - (chunks - 1) * even > 0.4 * even  # the last pays for the rounding up of all others
    assert even_rows(rows, 0) == rows


@pytest.mark.parametrize("rows", [1, 8, 255])
def test_chunks_that_memory_limits_stay_as_they_are(rows):
    assert {even_rows(rows, of) for of in range(1, 3000)} == {rows}


def test_even_chunks_of_the_puzzles_shape():
    assert even_rows(904, 16384) == 920
    assert even_rows(1784, 16384) == 1832
    assert even_rows(904, 904) == 904
    assert even_rows(904, 940) == 940
