from array_record.python import array_record_module
import numpy as np
import pytest

from topklm.data.records import RECORD_TOKENS, NoIndexError, record_offsets, write_shard

OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def write(path, n_records, vocab_size=1000, seed=0):
    ids = np.random.default_rng(seed).integers(0, vocab_size, n_records * RECORD_TOKENS - 7)
    write_shard(path, [ids.astype(np.int32)], vocab_size)
    return path.read_bytes()


def offsets_of(content):
    return record_offsets(lambda start, stop: content[start:stop], len(content))


@pytest.mark.parametrize("n_records", [1, 2, 40, 300])
def test_a_record_is_readable_from_its_own_bytes_and_the_index_alone(tmp_path, n_records):
    content = write(tmp_path / "whole", n_records)
    offsets = offsets_of(content)
    assert offsets.size == n_records + 1
    whole = array_record_module.ArrayRecordReader(str(tmp_path / "whole"), OPTIONS).read_all()
    for record in {0, n_records // 2, n_records - 1}:
        start, stop = offsets[record : record + 2]
        alone = bytearray(len(content))
        alone[start:stop] = content[start:stop]
        alone[offsets[-1] :] = content[offsets[-1] :]
        (tmp_path / "part").write_bytes(alone)
        reader = array_record_module.ArrayRecordReader(str(tmp_path / "part"), OPTIONS)
        assert reader.read([record]) == [whole[record]]
        for other in {0, n_records // 3, n_records - 1} - {record}:
            with pytest.raises(RuntimeError):
                reader.read([other])
        alone[start:stop] = bytes(stop - start)
        (tmp_path / "none").write_bytes(alone)
        with pytest.raises(RuntimeError):
            array_record_module.ArrayRecordReader(str(tmp_path / "none"), OPTIONS).read([record])


def test_an_index_that_crosses_blocks_is_found(tmp_path):
    options = "group_size:1,uncompressed"  # an index of some 100,000 bytes
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "many"), options)
    lengths = np.random.default_rng(0).integers(1, 60, 9000)
    for length in lengths:
        writer.write(b"x" * int(length))
    writer.close()
    content = (tmp_path / "many").read_bytes()
    offsets = offsets_of(content)
    # A chunk holds 40 bytes of header, the codec, two sizes and the record; a block begins with 24 bytes.
    overhead = np.diff(offsets) - lengths
    headers = np.diff(-(-offsets // 65536)) * 24
    assert set(overhead - headers) == {43}


@pytest.mark.parametrize("seed", range(30))
def test_no_bytes_but_those_of_an_index_are_taken_for_one(tmp_path, seed):
    content = bytearray(write(tmp_path / "whole", 20, seed=1))
    random = np.random.default_rng(seed)
    found = offsets_of(bytes(content))
    for _ in range(20):
        damaged = bytearray(content)
        at = int(random.integers(found[-1], len(content)))
        damaged[at : at + 8] = random.bytes(min(8, len(content) - at))
        try:
            offsets = offsets_of(bytes(damaged))
        except NoIndexError as e:
            assert 0 <= e.start < e.stop <= len(content)
        else:  # of the padding, or what the library's checksums are for
            assert (np.diff(offsets) > 0).all()
    for nothing in (b"", bytes(100), bytes(len(content)), content[:-1], content[: len(content) // 2]):
        with pytest.raises(NoIndexError):
            offsets_of(bytes(nothing))
