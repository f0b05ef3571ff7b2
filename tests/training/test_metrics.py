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


def test_only_a_step_with_a_held_out_loss_is_evaluated(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write(1, {"train/loss": 0.1})
    writer.write(2, {"train/loss": 0.1})
    writer.write(2, {"eval/loss": 0.2})
    writer.close()
    assert [metrics.is_evaluated(tmp_path, step) for step in (1, 2, 3)] == [False, True, False]


def test_only_the_first_process_writes(tmp_path):
    bystander = metrics.open_writer(tmp_path, resume_step=0, primary=False)
    bystander.write(1, {"train/loss": 0.1})
    bystander.sync()
    bystander.close()
    assert list(tmp_path.iterdir()) == []
    writer = metrics.open_writer(tmp_path, resume_step=0)
    writer.write(1, {"train/loss": 0.1})
    writer.sync()
    writer.close()
    assert lines_of(tmp_path) == [{"step": 1, "train/loss": 0.1}]


def events(folder):
    """The events of the newest TensorBoard file: records of length, checksum, data, checksum."""
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
