"""Training data read from a bucket: the same bits as from a disk, and every way in which a store fails."""

import contextlib
import os
import random
import re
import threading
import time

import boto3
from helpers import STEPS, arrays, assert_same_bits
from making import make_dataset
from moto.server import ThreadedMotoServer
import numpy as np
import pytest

from topklm.checkpoint import run_folder
from topklm.config import DataConfig
from topklm.data.building.build import prepare
from topklm.data.dataset import Mixture, is_dataset, load_dataset, open_mixture
from topklm.data.records import ShardError
from topklm.data.stream import heldout_batches, train_stream
from topklm.errors import UserError
from topklm.storage import remote

URL = "gs://bucket/data/books"
T, B = 64, 8


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A dataset of ten shards of random letters, of 40 records each."""
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefgh ", k=3000)) for _ in range(270)]
    folder = tmp_path_factory.mktemp("local") / "books"
    return make_dataset(folder, texts, texts[:20], shard_tokens=2048 * 40)


@pytest.fixture
def books(bucket, local):
    """The same dataset in the bucket."""
    upload(bucket, local.path)
    return bucket


def upload(bucket, folder):
    for file in folder.iterdir():
        bucket.put(f"data/books/{file.name}", file.read_bytes())


def stream(mixture, rows=slice(None), batch=0):
    batches = train_stream(mixture, context_length=T, batch_size=B, seed=3, rows=rows)
    batches.set_state({"next_index": batch})
    return batches


def check_same(found, expected, n):
    for _ in range(n):
        one, other = next(found), next(expected)
        for name, values in other.items():
            np.testing.assert_array_equal(one[name], values)


def ranges(bucket):
    """The ranges of shards that were read: (object, first byte, last byte)."""
    asked = [(r.path.rpartition("/")[2], r.range) for r in bucket.requests if r.path.endswith(".arrayrecord")]
    return [(name, *map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", header).groups())) for name, header in asked]


def test_batches_from_a_bucket_are_those_from_a_disk(books, local):
    dataset = load_dataset(URL)
    assert dataset.fingerprint == local.fingerprint
    there, here = Mixture.single(dataset), Mixture.single(local)
    check_same(stream(there), stream(here), 50)
    check_same(stream(there, batch=1234), stream(here, batch=1234), 5)  # a run that goes on
    check_same(
        *(heldout_batches(mixture, context_length=T, batch_size=B) for mixture in (there, here)), n=100
    )


def test_a_mixture_takes_from_buckets_and_disks(books, local):
    both = open_mixture(f"{URL}:0.5, {local.path}:0.5")
    here = Mixture((local, local), (1, 1))
    check_same(stream(both), stream(here), 20)
    with pytest.raises(UserError, match="is there twice"):
        open_mixture(f"{URL}:1,{URL}/:1")


def test_a_setting_names_a_dataset_in_a_bucket(books, local):
    said = []
    (dataset,) = prepare(DataConfig(source=f"{URL}/", cache_gib=0.5), said.append).datasets
    assert (str(dataset.path), dataset.path.name) == (URL, "books")
    assert said == [f"data: {URL}/ ({local})"]
    assert not is_dataset("gs://bucket/data")
    n = len(books.requests)
    assert not is_dataset(f"{URL}/*.jsonl")
    assert not is_dataset(f"{URL}/a.jsonl.gz")
    assert len(books.requests) == n


def test_only_ranges_are_read_and_each_host_reads_its_own(bucket, tmp_path):
    texts = [bytes(random.Random(i).choices(b"abcdefgh", k=50_000)).decode() for i in range(120)]
    dataset = make_dataset(tmp_path / "long", texts)
    upload(bucket, dataset.path)
    (shard,) = dataset.train.shards
    read = []
    for rows in (slice(0, 4), slice(4, 8)):
        monitored = Mixture.single(load_dataset(URL))
        batches = train_stream(monitored, context_length=T, batch_size=B, seed=3, rows=rows, threads=0)
        bucket.requests.clear()
        next(batches)
        read.append({(first, last) for _, first, last in ranges(bucket) if last < 2 * shard.size // 3})
        assert sum(last - first for first, last in read[-1]) < shard.size / 5
        for file in monitored.datasets[0].path.cache.iterdir():
            file.unlink()
    beginning = {(0, 65535)}
    assert read[0] & read[1] == beginning
    assert all(1 <= len(own - beginning) <= 4 for own in read)


def test_windows_of_one_call_are_asked_for_at_the_same_time(books, local):
    books.delay = 0.05
    waiting, most = [0], [0]
    lock = threading.Lock()
    sleep = time.sleep

    def counted(seconds):
        with lock:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
        sleep(seconds)
        with lock:
            waiting[0] -= 1

    tokens = load_dataset(URL).tokens(local.train)
    here = local.tokens(local.train)
    spans = [(start, start + 70) for start in range(0, len(here) - 70, 2048 * 40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcs.time.sleep", counted)
        found = tokens.read_many(spans)
    for one, span in zip(found, spans, strict=True):
        np.testing.assert_array_equal(one, here.read(*span))
    assert most[0] > len(spans) / 2


def test_what_was_read_is_kept_for_other_processes(books, local):
    n = len(local.tokens(local.train))
    load_dataset(URL).tokens(local.train).read(0, n)
    books.requests.clear()
    found = load_dataset(URL).tokens(local.train).read(0, n)
    np.testing.assert_array_equal(found, local.tokens(local.train).read(0, n))
    assert ranges(books) == []


def test_the_cache_stays_within_its_size(books, local, monkeypatch):
    most = 600_000
    dataset = load_dataset(URL, cache_gib=most / 2**30)
    tokens, here = dataset.tokens(local.train), local.tokens(local.train)
    assert sum(shard.size for shard in local.train.shards) > 2 * most
    peak = 0
    for start in random.Random(0).sample(range(0, len(here) - 100), 300):
        np.testing.assert_array_equal(tokens.read(start, start + 100), here.read(start, start + 100))
        used = sum(file.stat().st_blocks * 512 for file in dataset.path.cache.iterdir())
        peak = max(peak, used)
    assert most / 2 < peak < 1.5 * most


def test_damage_in_a_bucket_is_named_and_never_read(books, local):
    shard = local.train.shards[1]
    content = bytearray(books.objects[f"data/books/{shard.name}"].content)
    middle = len(content) // 3
    content[middle : middle + 100] = bytes(100)
    books.put(f"data/books/{shard.name}", content)
    tokens, here = load_dataset(URL).tokens(local.train), local.tokens(local.train)
    first = local.train.shards[0].tokens
    errors = []
    for start in range(first, first + shard.tokens - 2048, 2048):
        try:
            np.testing.assert_array_equal(tokens.read(start, start + 2048), here.read(start, start + 2048))
        except ShardError as e:
            errors.append(str(e))
    assert len(errors) == 1
    assert re.search(rf"^{URL}/{shard.name} is damaged: its record \d+ cannot be read", errors[0])


def test_damage_in_the_cache_is_mended(books, local):
    tokens, here = load_dataset(URL).tokens(local.train), local.tokens(local.train)
    tokens.read(0, len(here))
    dataset = load_dataset(URL)
    for file in dataset.path.cache.glob("*.arrayrecord"):
        content = bytearray(file.read_bytes())
        for at in random.Random(1).sample(range(0, len(content) - 100), 5):
            content[at : at + 100] = os.urandom(100)
        file.write_bytes(content)
    found = dataset.tokens(local.train).read(0, len(here))
    np.testing.assert_array_equal(found, here.read(0, len(here)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b, name: b.objects.pop(name), "is missing"),
        (lambda b, name: b.put(name, b.objects[name].content[:-70_000]), "has fewer bytes than were written"),
        (lambda b, name: b.put(name, b""), "has fewer bytes than were written"),
        (lambda b, name: b.put(name, bytes(len(b.objects[name].content))), "cannot be read"),
    ],
)
def test_a_shard_that_is_not_the_one_that_was_written_is_named(books, local, change, said):
    dataset = load_dataset(URL)
    shard = local.train.shards[2]
    change(books, f"data/books/{shard.name}")
    start = sum(other.tokens for other in local.train.shards[:2])
    with pytest.raises(ShardError, match=rf"^{URL}/{shard.name} ({said})"):
        dataset.tokens(local.train).read(start + 5000, start + 5100)


def test_shards_cannot_change_places(books, local):
    shards = local.train.shards
    pairs = [
        (a, b) for a in shards for b in shards if a is not b and (a.tokens, a.size) == (b.tokens, b.size)
    ]
    one, other = pairs[0]
    books.put(f"data/books/{one.name}", (local.path / other.name).read_bytes())
    start = sum(shard.tokens for shard in shards[: shards.index(one)])
    with pytest.raises(ShardError, match=rf"^{URL}/{one.name} is another shard than was written"):
        load_dataset(URL).tokens(local.train).read(start, start + 10)


def test_a_dataset_that_is_not_whole_is_refused(books, local):
    del books.objects[f"data/books/{local.train.shards[2].name}"]
    with pytest.raises(UserError, match=rf"{local.train.shards[2].name} is missing \(1 of its shards are\)"):
        load_dataset(URL)
    books.put("data/books/tokenizer.json", b"{}")
    with pytest.raises(UserError, match=rf"{URL}/tokenizer\.json is not the tokenizer of this dataset"):
        load_dataset(URL)
    del books.objects["data/books/dataset.json"]
    with pytest.raises(UserError, match=rf"{URL}: no prepared dataset, it has no dataset\.json: check the"):
        load_dataset(URL)
    with pytest.raises(UserError, match="gs://nosuch/books: no prepared dataset"):
        load_dataset("gs://nosuch/books")
    for url in ("gs://", "s3:///books"):
        with pytest.raises(UserError, match=f"{url}: names no bucket; give gs://BUCKET/FOLDER"):
            load_dataset(url)


def test_a_store_that_refuses_says_what_to_set(books):
    books.fail(403, lambda request: True)
    with pytest.raises(UserError, match=r"no access to gs://bucket .*gcloud auth application-default login"):
        load_dataset(URL)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(remote, "_LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(remote, "_ANSWER_SECONDS", 1.0)


@pytest.mark.parametrize("failure", [503, 429, "drop"])
def test_a_store_that_goes_away_is_asked_again_and_said_once(books, local, impatient, capsys, failure):
    tokens = load_dataset(URL).tokens(local.train)
    books.fail(failure, lambda request: True, times=12)
    found = tokens.read_many([(0, 100), (100_000, 100_100)])
    np.testing.assert_array_equal(found[1], local.tokens(local.train).read(100_000, 100_100))
    said = capsys.readouterr().err
    assert re.search(
        rf"^warning: {URL} gives no answer \(.*\): asked again for up to 8 minutes\n", said, re.M
    )
    assert said.count("warning") == said.count(f"{URL} answers again, after ") == 1


def test_a_store_that_stays_away_ends_in_one_line(books, local, impatient, monkeypatch):
    tokens = load_dataset(URL).tokens(local.train)
    monkeypatch.setattr(remote, "_PATIENCE_SECONDS", 1.0)
    books.fail("drop", lambda request: True)
    with pytest.raises(UserError, match=r"gs://bucket gives no answer for 'gs://bucket/data/books'"):
        tokens.read(0, 100)
    with pytest.raises(UserError, match=r"gs://bucket gives no answer"):
        load_dataset(URL)


def test_a_wait_for_a_store_ends_when_the_dataset_is_closed(books, local):
    dataset = load_dataset(URL)
    books.fail("drop", lambda request: True)
    threading.Timer(0.3, dataset.close).start()
    with pytest.raises(UserError, match=r"gs://bucket gives no answer"):
        dataset.tokens(local.train).read(0, 100)


@pytest.fixture
def s3(monkeypatch, tmp_path, local):
    """The dataset as s3://shelf/books."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    with contextlib.ExitStack() as stack:
        server.start()
        stack.callback(server.stop)
        host, port = server.get_host_and_port()
        variables = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "TMPDIR": str(tmp_path),
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        remote._context.cache_clear()
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="shelf")
        for file in local.path.iterdir():
            client.upload_file(str(file), "shelf", f"books/{file.name}")
        yield client


def test_a_bucket_of_s3_gives_the_same_batches(s3, local):
    dataset = load_dataset("s3://shelf/books")
    check_same(stream(Mixture.single(dataset)), stream(Mixture.single(local)), 5)
    s3.delete_object(Bucket="shelf", Key="books/dataset.json")
    with pytest.raises(UserError, match="s3://shelf/books: no prepared dataset, it has no "):
        load_dataset("s3://shelf/books")


@pytest.mark.slow
def test_a_training_survives_an_outage_and_saves_before_it_gives_up(
    bucket, trainer, tmp_path, monkeypatch, impatient
):
    texts = ["".join(random.Random(i).choices("abcdefgh ", k=3000)) for i in range(300)]
    dataset = make_dataset(tmp_path / "letters", texts, texts[:2], shard_tokens=2048)
    upload(bucket, dataset.path)
    undisturbed = trainer.train(tmp_path / "undisturbed", {"data.source": dataset.path})
    assert undisturbed.exit_code == 0, undisturbed.errors
    monkeypatch.setattr(remote, "_PATIENCE_SECONDS", 3.0)
    monkeypatch.setattr(remote, "_ANSWER_SECONDS", 15.0)  # the store shares this process with compilation
    settings = {"data.source": URL, "checkpoint.every_steps": 0}

    def of_later_shards(request):
        read = {r.path for r in bucket.requests if r.path.endswith(".arrayrecord")}
        return len(read) >= 60 and request.path.endswith(".arrayrecord")

    bucket.fail("drop", of_later_shards)
    ended = trainer.train(tmp_path / "run", settings)
    assert ended.exit_code == 2, ended.errors
    assert re.search(
        r"^error: .*gs://bucket gives no answer for 'gs://bucket/data/books'", ended.errors, re.M
    )
    assert "no more data" in ended.output, (ended.output, len(bucket.requests))
    (saved,) = run_folder.complete_steps(tmp_path / "run")
    assert f"no more data: saved step {saved}" in ended.output
    assert 0 < saved < STEPS
    bucket.recover()
    bucket.fail(503, lambda request: request.path.endswith(".arrayrecord"), times=40)  # a short one
    resumed = trainer.train(tmp_path / "run", settings)
    assert resumed.exit_code == 0, resumed.errors
    assert f"continuing {tmp_path / 'run'} from its checkpoint of step {saved}" in resumed.output
    assert_same_bits(
        arrays(tmp_path / "run", STEPS)["params"], arrays(tmp_path / "undisturbed", STEPS)["params"]
    )
