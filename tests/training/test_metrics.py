import json
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from topklm.errors import UserError
from topklm.training import metrics
from topklm.training.metrics import MetricsWriter


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(folder, resume_step, steps):
    writer = MetricsWriter(folder, resume_step)
    for step in steps:
        writer.write(step, {"train/loss": step / 7})
    writer.close()


def test_each_call_writes_one_line(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write(1, {"train/loss": 0.1, "tokens_seen": 128})
    writer.write(1, {"eval/dead_neurons": [0.5, 0.25], "eval/sample": "The å"})
    writer.close()
    assert lines_of(tmp_path) == [
        {"step": 1, "train/loss": 0.1, "tokens_seen": 128},
        {"step": 1, "eval/dead_neurons": [0.5, 0.25], "eval/sample": "The å"},
    ]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write(1, {"train/loss": 0.1})
    assert len(lines_of(tmp_path)) == 1
    writer.close()


def test_continuing_drops_the_lines_of_later_steps(tmp_path):
    write_steps(tmp_path, 0, [1, 2, 3, 3, 4, 5])
    write_steps(tmp_path, 3, [4])
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 3, 4]


def test_starting_over_drops_every_line(tmp_path):
    write_steps(tmp_path, 0, [1, 2])
    write_steps(tmp_path, 0, [1])
    assert [line["step"] for line in lines_of(tmp_path)] == [1]


@pytest.mark.parametrize("cut", range(2, 12))
def test_half_a_last_line_is_dropped(tmp_path, cut):
    write_steps(tmp_path, 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    write_steps(tmp_path, 3, [4])
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 4]


def test_complete_lines_are_read_back_and_none_where_there_is_no_file(tmp_path):
    assert metrics.read(tmp_path) == []
    write_steps(tmp_path, 0, [7, 14])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "tra')
    assert metrics.read(tmp_path) == [{"step": 7, "train/loss": 1.0}, {"step": 14, "train/loss": 2.0}]


NO_METRICS = [
    b"\n",
    b"<<<<<<< HEAD\n",
    b"# a note\n",
    b"\0\0\0\0\n",
    b"{}\n",
    b"[]\n",
    b"7\n",
    b'{"step": []}\n',
    b'{"step": "7", "train/loss": 1.0}\n',
    b'{"step": 7, "train/loss": null}\n',
    b'{"step": 7, "train/loss": {"a": 1}}\n',
    b'{"step": 7, "train/loss": 0.\xa01}\n',
    b'{"step": 7, "trai{"step": 8}\n',
    b'{"step": 1' + b"1" * 5000 + b"}\n",
    b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("line", NO_METRICS)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_line_that_is_no_metric_is_set_aside_and_said(tmp_path, line, place):
    write_steps(tmp_path, 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:place], line, *lines[place:]]))
    found, said = path.read_bytes(), []
    assert [values["step"] for values in metrics.read(tmp_path)] == [1, 2, 3]
    writer = MetricsWriter(tmp_path, 3, None, said.append)
    writer.write(4, {"train/loss": 0.5})
    writer.close()
    assert [values["step"] for values in lines_of(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == found
    assert len(said) == 1
    assert "1 lines are no metrics and were left out" in said[0]


def synced_steps(folder, steps):
    writer = MetricsWriter(folder, 0)
    for step in steps:
        writer.write(step, {"train/loss": step / 7})
    synced = writer.sync()
    writer.write(steps[-1] + 1, {"train/loss": 0.0})
    writer.close()
    return synced


def test_lines_as_they_were_written_are_kept_in_silence(tmp_path):
    synced, said = synced_steps(tmp_path, [1, 2, 3]), []
    writer = MetricsWriter(tmp_path, 3, synced, said.append)
    assert writer.sync() == synced
    writer.close()
    assert said == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("left", [0.0, 0.2, 0.5, 0.7])
def test_lines_that_are_missing_are_said(tmp_path, left):
    synced, said = synced_steps(tmp_path, [1, 2, 3]), []
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    MetricsWriter(tmp_path, 3, synced, said.append).close()
    assert len(said) == 1
    assert "of 3 lines are missing or cannot be read" in said[0]


def test_every_changed_byte_of_a_line_is_said(tmp_path):
    synced = synced_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    end = whole.index(b'{"step": 3')
    for place in range(end):
        said = []
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        MetricsWriter(tmp_path, 2, synced, said.append).close()
        assert len(said) == 1, place


def test_only_a_step_with_a_held_out_loss_is_evaluated(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write(1, {"train/loss": 0.1})
    writer.write(2, {"train/loss": 0.1})
    writer.write(2, {"eval/loss": 0.2})
    writer.close()
    assert [metrics.is_evaluated(tmp_path, step) for step in (1, 2, 3)] == [False, True, False]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bystander = metrics.NoWriter()
    bystander.write(1, {"train/loss": 0.1})
    bystander.sync()
    bystander.close()
    assert list(tmp_path.iterdir()) == []
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write(1, {"train/loss": 0.1})
    writer.sync()
    writer.close()
    assert lines_of(tmp_path) == [{"step": 1, "train/loss": 0.1}]


def events(folder):
    """Returns the events of the newest TensorBoard file: records of length, checksum, data, checksum."""
    raw = max((folder / "tensorboard").iterdir()).read_bytes()
    found = []
    while raw:
        size = int.from_bytes(raw[:8], "little")
        found.append(Event.FromString(raw[12 : 12 + size]))
        raw = raw[16 + size :]
    return found


def test_tensorboard_gets_every_number_and_text(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=6)
    writer.write(7, {"train/loss": 0.5, "eval/dead_neurons": [0.5, 0.25], "eval/sample": "The end"})
    writer.close()
    header, start, *rest = events(tmp_path)
    assert header.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (7, SessionLog.START)  # forgets step 7 and later
    values = {value.tag: value for event in rest for value in event.summary.value}
    assert {event.step for event in rest} == {7}
    assert values["train/loss"].simple_value == 0.5
    assert values["eval/dead_neurons/0"].simple_value == 0.5
    assert values["eval/dead_neurons/1"].simple_value == 0.25
    assert values["eval/sample/text_summary"].tensor.string_val == [b"The end"]


def test_a_folder_in_the_way_is_a_user_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        MetricsWriter(tmp_path, resume_step=0)


def test_the_trainer_does_not_import_torch():
    # It takes seconds, and tensorboardX would.
    program = "import sys, topklm.commands.train; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    torch_after = "import topklm.training.metrics, torch; torch.zeros(1)"
    subprocess.run([sys.executable, "-c", torch_after], check=True, timeout=300)
