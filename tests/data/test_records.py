from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import errno
import os
from pathlib import Path
import pickle
import resource

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.data import records
from topklm.data.records import (
    RECORD_TOKENS,
    TokenStream,
    check_shards,
    missing_shards,
    shard_bounds,
    shard_name,
    token_dtype,
    write_shard,
)
from topklm.errors import UserError

VOCAB = 4096


def random_ids(n, vocab=VOCAB, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.int32)


def write(folder, ids, *, vocab=VOCAB, shard_records=2, pieces=7):
    """A stream's shards; each is written from `pieces` blocks."""
    bounds = shard_bounds(len(ids), shard_records * RECORD_TOKENS)
    return [
        write_shard(
            folder / shard_name("train", i, len(bounds)),
            iter(np.array_split(ids[start:stop], pieces)),
            vocab,
        )
        for i, (start, stop) in enumerate(bounds)
    ]


def open_files(folder):
    """Names of the files in `folder` that this process has open."""
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    paths = [Path(os.readlink(link)) for link in links if os.path.islink(link)]
    return sorted(path.name for path in paths if path.parent == folder)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    ids = random_ids(5 * RECORD_TOKENS + 100)
    return folder, write(folder, ids), ids


@given(st.integers(0, 100 * RECORD_TOKENS), st.integers(1, 20 * RECORD_TOKENS))
def test_shards_are_few_near_equal_and_cover_the_stream(n_tokens, shard_tokens):
    bounds = shard_bounds(n_tokens, shard_tokens)
    covered = [edge for start_and_stop in bounds for edge in start_and_stop]
    assert covered == sorted(covered)
    assert covered[1:-1:2] == covered[2::2]
    assert (covered[:1], covered[-1:]) == ([0][: len(bounds)], [n_tokens][: len(bounds)])
    n_records = [-(-(stop - start) // RECORD_TOKENS) for start, stop in bounds]
    assert all(start % RECORD_TOKENS == 0 for start, _ in bounds)
    assert max(n_records, default=0) - min(n_records, default=0) <= 1
    # One shard fewer could not hold the records.
    fit = max(1, shard_tokens // RECORD_TOKENS)
    assert fit * (len(bounds) - 1) < sum(n_records) <= fit * len(bounds) or not bounds
    assert sum(n_records) == -(-n_tokens // RECORD_TOKENS)


@given(st.data())
def test_any_range_is_read_back_as_written(stored, data):
    folder, shards, ids = stored
    start = data.draw(st.integers(0, ids.size))
    stop = data.draw(st.integers(start, ids.size))
    tokens = TokenStream(folder, shards, VOCAB).read(start, stop)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, ids[start:stop])


def test_shards_are_named_with_their_number_and_hold_the_tokens_asked_for(stored):
    folder, shards, ids = stored
    assert [s.name for s in shards] == [f"train-0000{i}-of-00003.arrayrecord" for i in range(3)]
    assert [s.tokens for s in shards] == [2 * RECORD_TOKENS, 2 * RECORD_TOKENS, RECORD_TOKENS + 100]
    assert [s.size for s in shards] == [(folder / s.name).stat().st_size for s in shards]
    assert len(TokenStream(folder, shards, VOCAB)) == ids.size
    assert sorted(p.name for p in folder.iterdir()) == [s.name for s in shards]


@pytest.mark.parametrize("n", [0, 1, RECORD_TOKENS - 1, RECORD_TOKENS, 2 * RECORD_TOKENS])
def test_a_stream_may_end_anywhere(tmp_path, n):
    ids = random_ids(n)
    stream = TokenStream(tmp_path, write(tmp_path, ids), VOCAB)
    assert len(stream) == n
    np.testing.assert_array_equal(stream.read(0, n), ids)


def test_an_empty_stream_has_no_shards():
    assert shard_bounds(0) == []


@pytest.mark.parametrize("pieces", [1, 3, 1000, 3 * RECORD_TOKENS])
def test_the_same_ids_give_the_same_bytes_however_they_were_cut(tmp_path, stored, pieces):
    _, shards, ids = stored
    assert write(tmp_path, ids, pieces=pieces) == shards


def test_a_shard_replaces_one_of_its_name(tmp_path):
    write(tmp_path, random_ids(100, seed=1))
    stream = TokenStream(tmp_path, write(tmp_path, random_ids(5000)), VOCAB)
    np.testing.assert_array_equal(stream.read(0, 5000), random_ids(5000))


@pytest.mark.parametrize(("vocab", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_the_largest_id_of_a_vocabulary_is_kept(tmp_path, vocab, dtype):
    assert token_dtype(vocab).str == dtype
    shards = write(tmp_path, np.array([0, vocab - 1]), vocab=vocab)
    assert TokenStream(tmp_path, shards, vocab).read(0, 2).tolist() == [0, vocab - 1]


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, token):
    with pytest.raises(ValueError, match="token ids must be from 0 to 4095"):
        write(tmp_path, np.array([*range(10_000 // 3), token]), pieces=1)
    assert list(tmp_path.iterdir()) == []


def test_a_range_outside_the_stream_is_refused(stored):
    folder, shards, ids = stored
    with pytest.raises(IndexError):
        TokenStream(folder, shards, VOCAB).read(0, ids.size + 1)


def test_only_the_shards_that_are_read_are_opened(tmp_path, stored):
    _, _, ids = stored
    shards = write(tmp_path, ids)
    (tmp_path / shards[0].name).unlink()
    (tmp_path / shards[2].name).unlink()
    stream = TokenStream(tmp_path, shards, VOCAB)
    part = slice(2 * RECORD_TOKENS, 4 * RECORD_TOKENS)
    np.testing.assert_array_equal(stream.read(part.start, part.stop), ids[part])
    with pytest.raises(UserError, match=r"train-00000-of-00003\.arrayrecord is missing"):
        stream.read(0, 1)


def test_a_stream_of_ten_thousand_shards_opens_those_that_it_reads(tmp_path):
    ids = random_ids(300)
    (written,) = write(tmp_path, ids)
    names = [shard_name("heldout", i, 10_000) for i in range(10_000)]
    wanted = [0, 4321, 9999]
    for i, name in enumerate(names):
        if i in wanted:
            os.link(tmp_path / written.name, tmp_path / name)
        else:
            (tmp_path / name).touch()  # empty: opening it would be an error
    shards = [records.Shard(name, written.tokens, written.size, written.sha256) for name in names]
    assert missing_shards(tmp_path, shards) == []
    stream = TokenStream(tmp_path, shards, VOCAB)
    assert len(stream) == 3_000_000
    assert open_files(tmp_path) == []
    for i in wanted:
        np.testing.assert_array_equal(stream.read(300 * i, 300 * i + 300), ids)
    assert open_files(tmp_path) == [names[i] for i in wanted]
    with pytest.raises(UserError, match="heldout-00001-of-10000"):
        stream.read(299, 301)


@pytest.fixture
def many_shards(tmp_path):
    ids = random_ids(20 * RECORD_TOKENS)
    return tmp_path, write(tmp_path, ids, shard_records=1, pieces=1), ids


def test_the_shards_that_were_not_read_for_longest_are_closed(many_shards, monkeypatch):
    monkeypatch.setattr(records, "MAX_OPEN_SHARDS", 3)
    folder, shards, _ = many_shards
    stream = TokenStream(folder, shards, VOCAB)
    for number in [0, 1, 2, 0, 3]:
        stream.read(number * RECORD_TOKENS, number * RECORD_TOKENS + 1)
    assert open_files(folder) == [shards[i].name for i in (0, 2, 3)]
    stream.read(0, len(stream))
    assert open_files(folder) == [shards[i].name for i in (17, 18, 19)]


def test_a_shard_may_be_closed_while_another_thread_reads_from_it(many_shards, monkeypatch):
    monkeypatch.setattr(records, "MAX_OPEN_SHARDS", 2)
    folder, shards, ids = many_shards
    stream = TokenStream(folder, shards, VOCAB)
    starts = np.random.default_rng(1).integers(0, ids.size - 5000, 600).tolist()
    with ThreadPoolExecutor(8) as pool:
        for start, tokens in zip(starts, pool.map(lambda s: stream.read(s, s + 5000), starts), strict=True):
            np.testing.assert_array_equal(tokens, ids[start : start + 5000])
    assert len(open_files(folder)) <= 2


def test_missing_shards_are_named(many_shards):
    folder, shards, _ = many_shards
    assert missing_shards(folder, shards) == []
    for number in (3, 11):
        (folder / shards[number].name).unlink()
    assert missing_shards(folder, shards) == [shards[3].name, shards[11].name]


def test_a_stream_can_be_pickled_after_it_was_read(stored):
    folder, shards, ids = stored
    stream = TokenStream(folder, shards, VOCAB)
    stream.read(0, 10)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(stream)).read(5, 5000), ids[5:5000])


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def not_a_shard(path):
    path.write_bytes(b"x" * path.stat().st_size)


def one_bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, not_a_shard, one_bit_flipped])
def test_a_damaged_shard_is_named(tmp_path, damage):
    shards = write(tmp_path, random_ids(2 * RECORD_TOKENS))
    damage(tmp_path / shards[0].name)
    with pytest.raises(UserError, match=r"00000-of-00001\.arrayrecord .*prepare the data"):
        TokenStream(tmp_path, shards, VOCAB).read(0, 2 * RECORD_TOKENS)
    with pytest.raises(UserError, match=r"train-00000-of-00001\.arrayrecord"):
        check_shards(tmp_path, shards, contents=True)


def test_what_lies_before_and_behind_a_damaged_record_can_be_read_and_it_is_named(tmp_path):
    ids = random_ids(10 * RECORD_TOKENS)
    (shard,) = write(tmp_path, ids, shard_records=10)
    path = tmp_path / shard.name
    content = bytearray(path.read_bytes())
    content[15_000] ^= 1
    path.write_bytes(content)
    stream, damaged = TokenStream(tmp_path, [shard], VOCAB), []
    for number in range(10):
        part = slice(number * RECORD_TOKENS, (number + 1) * RECORD_TOKENS)
        try:
            np.testing.assert_array_equal(stream.read(part.start, part.stop), ids[part])
        except UserError as e:
            assert f"record {number} cannot be read" in str(e)
            damaged.append(number)
    assert len(damaged) == 1
    with pytest.raises(UserError, match=f"record {damaged[0]} cannot be read"):
        stream.read(0, len(stream))


def test_a_shard_of_another_stream_is_found_when_contents_are_checked(tmp_path):
    shards = write(tmp_path, random_ids(RECORD_TOKENS))
    check_shards(tmp_path, shards, contents=True)
    write(tmp_path, random_ids(RECORD_TOKENS, seed=1))
    with pytest.raises(UserError, match=r"train-00000-of-00001\.arrayrecord"):
        check_shards(tmp_path, shards, contents=True)


def test_a_shard_of_another_stream_with_the_same_size_is_found_by_its_records(tmp_path):
    shards = write(tmp_path, np.zeros(RECORD_TOKENS, np.int32))
    other = tmp_path / "other"
    other.mkdir()
    write(other, np.zeros(3 * RECORD_TOKENS, np.int32), shard_records=3)
    path = tmp_path / shards[0].name
    content = (other / path.name).read_bytes()
    path.write_bytes(content)
    shard = records.Shard(path.name, RECORD_TOKENS, len(content), shards[0].sha256)
    with pytest.raises(UserError, match=r"train-00000-of-00001\.arrayrecord holds 3 records"):
        TokenStream(tmp_path, [shard], VOCAB).read(0, 10)


def test_a_shard_with_another_number_of_tokens_is_named(tmp_path):
    (longer,) = write(tmp_path, random_ids(100))
    shard = records.Shard(longer.name, 99, longer.size, longer.sha256)
    with pytest.raises(UserError, match=r"train-00000-of-00001\.arrayrecord"):
        TokenStream(tmp_path, [shard], VOCAB).read(0, 10)


def test_a_disk_that_refuses_is_an_os_error_and_leaves_nothing_behind(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="train-00000") as info:
            write(tmp_path, random_ids(200 * RECORD_TOKENS), shard_records=200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert info.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_caller_leaves_the_shard_of_before(tmp_path):
    shards = write(tmp_path, random_ids(100))

    def blocks() -> Iterator[np.ndarray]:
        yield random_ids(3 * RECORD_TOKENS)
        raise KeyError

    with pytest.raises(KeyError):
        write_shard(tmp_path / shards[0].name, blocks(), VOCAB)
    assert [path.name for path in tmp_path.iterdir()] == [shards[0].name]
    check_shards(tmp_path, shards, contents=True)
