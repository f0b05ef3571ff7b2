from concurrent.futures import ThreadPoolExecutor
import errno
import pickle
import resource

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.data.records import (
    RECORD_TOKENS,
    StreamWriter,
    TokenStream,
    check_shards,
    token_dtype,
)
from topklm.errors import UserError

VOCAB = 4096


def random_ids(n, vocab=VOCAB, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.int32)


def write(folder, ids, *, vocab=VOCAB, shard_records=2, pieces=7):
    with StreamWriter(folder, "train", vocab, shard_records * RECORD_TOKENS) as writer:
        for piece in np.array_split(ids, pieces):
            writer.append(piece)
    return writer.shards


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    ids = random_ids(5 * RECORD_TOKENS + 100)
    return folder, write(folder, ids), ids


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
    assert len(TokenStream(folder, shards, VOCAB)) == ids.size
    assert sorted(p.name for p in folder.iterdir()) == [s.name for s in shards]


@pytest.mark.parametrize("n", [0, 1, RECORD_TOKENS - 1, RECORD_TOKENS, 2 * RECORD_TOKENS])
def test_a_stream_may_end_anywhere(tmp_path, n):
    ids = random_ids(n)
    stream = TokenStream(tmp_path, write(tmp_path, ids), VOCAB)
    assert len(stream) == n
    np.testing.assert_array_equal(stream.read(0, n), ids)


def test_the_same_ids_give_the_same_bytes_however_they_were_cut(tmp_path, stored):
    _, shards, ids = stored
    assert write(tmp_path, ids, pieces=1000) == shards


@pytest.mark.parametrize(("vocab", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_the_largest_id_of_a_vocabulary_is_kept(tmp_path, vocab, dtype):
    assert token_dtype(vocab).str == dtype
    shards = write(tmp_path, np.array([0, vocab - 1]), vocab=vocab)
    assert TokenStream(tmp_path, shards, vocab).read(0, 2).tolist() == [0, vocab - 1]


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, token):
    with pytest.raises(ValueError, match="token ids must be from 0 to 4095"):
        write(tmp_path, np.array([token]))


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


def test_a_stream_can_be_pickled_after_it_was_read(stored):
    folder, shards, ids = stored
    stream = TokenStream(folder, shards, VOCAB)
    stream.read(0, 10)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(stream)).read(5, 5000), ids[5:5000])


def test_threads_read_the_same_stream(stored):
    folder, shards, ids = stored
    stream = TokenStream(folder, shards, VOCAB)
    starts = np.random.default_rng(1).integers(0, ids.size - 300, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        for start, tokens in zip(starts, pool.map(lambda s: stream.read(s, s + 300), starts), strict=True):
            np.testing.assert_array_equal(tokens, ids[start : start + 300])


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


def test_a_shard_of_another_stream_is_found_when_contents_are_checked(tmp_path):
    shards = write(tmp_path, random_ids(RECORD_TOKENS))
    check_shards(tmp_path, shards, contents=True)
    write(tmp_path, random_ids(RECORD_TOKENS, seed=1))
    with pytest.raises(UserError, match=r"train-00000-of-00001\.arrayrecord"):
        check_shards(tmp_path, shards, contents=True)


def test_a_shard_with_another_number_of_tokens_is_named(tmp_path):
    write(tmp_path, random_ids(100))
    other = tmp_path / "other"
    other.mkdir()
    (shard,) = write(other, random_ids(99))
    (other / shard.name).write_bytes((tmp_path / shard.name).read_bytes())
    with pytest.raises(UserError, match=r"train-00000-of-00001\.arrayrecord"):
        TokenStream(other, [shard], VOCAB).read(0, 10)


def test_a_disk_that_refuses_is_an_os_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="train-00000") as info:
            write(tmp_path, random_ids(200 * RECORD_TOKENS), shard_records=200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert info.value.errno == errno.EFBIG


def test_an_error_of_the_caller_leaves_the_stream_without_shards(tmp_path):
    with pytest.raises(KeyError), StreamWriter(tmp_path, "train", VOCAB) as writer:
        writer.append(random_ids(3 * RECORD_TOKENS))
        raise KeyError
    assert writer.shards == ()
