"""Read the output folder of a run, and compare the outputs of two runs."""
import json
import struct
from pathlib import Path

import torch
from tensorboardX.proto import event_pb2


def checkpoint(folder, name='checkpoint.pth'):
    return torch.load(Path(folder) / name, weights_only=True)


def log_lines(folder):
    return [json.loads(line) for line in (Path(folder) / 'log.txt').read_text().splitlines()]


def result(folder):
    """The outputs that must be the same for an undisturbed run and for an interrupted and resumed one.

    The last and the best checkpoint, and all values except times in log.txt and TensorBoard.
    """
    checkpoints = [checkpoint(folder, name) for name in ('checkpoint.pth', 'best_checkpoint.pth')]
    for state in checkpoints:
        del state['args']                                                  # args contain the output folder
    return [*checkpoints, [timeless(line) for line in log_lines(folder)],
            *(timeless(tensorboard(run)) for run in (folder, Path(folder) / 'steps'))]


def timeless(values):
    """A dict without what depends on the clock."""
    return {name: value for name, value in values.items() if not is_time(name)}


def is_time(name):
    return name.endswith(('per_second', 'loader_wait'))


def tensorboard(folder):
    """Map each tag to its list of (step, value), as TensorBoard shows it.

    A resumed run hides the earlier values from its first step on.
    """
    points = {}
    for event in events(folder):
        if event.session_log.status == event_pb2.SessionLog.START:
            for tag, old in points.items():
                points[tag] = [point for point in old if point[0] < event.step]
        for value in event.summary.value:
            if value.HasField('tensor'):                                   # the flags, which contain the output folder
                continue
            shown = value.image.encoded_image_string or value.simple_value
            points.setdefault(value.tag, []).append((event.step, shown))
    return points


def events(folder):
    """Yield the events of all TensorBoard files. A file may end with a truncated event."""
    for path in sorted(Path(folder).glob('events.out.tfevents*')):
        data = path.read_bytes()
        while len(data) >= 12:                                             # length, its CRC, event, its CRC
            length, = struct.unpack_from('<Q', data)
            if len(data) < 16 + length:
                break
            yield event_pb2.Event.FromString(data[12:12 + length])
            data = data[16 + length:]


def assert_same(a, b, where=''):
    """Assert that nested dicts and sequences of tensors and other values are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{where}[{i}]')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where
