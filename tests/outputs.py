"""What a run leaves in its output folder, and the comparison of what two runs leave."""
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
    """What must not depend on what happened to a run on its way.

    The last and the best checkpoint, and but for times what log.txt and TensorBoard show.
    """
    checkpoints = [checkpoint(folder, name) for name in ('checkpoint.pth', 'best_checkpoint.pth')]
    for state in checkpoints:
        del state['args']                                                  # which name the folder
    timeless = [{key: value for key, value in line.items() if not is_time(key)} for line in log_lines(folder)]
    return [*checkpoints, timeless, {tag: points for tag, points in tensorboard(folder).items() if not is_time(tag)}]


def is_time(name):
    return name.endswith('per_second')


def tensorboard(folder):
    """tag → list of (step, value) as TensorBoard shows them: a run that begins again at a step hides what was there."""
    points = {}
    for event in events(folder):
        if event.session_log.status == event_pb2.SessionLog.START:
            for tag, old in points.items():
                points[tag] = [point for point in old if point[0] < event.step]
        for value in event.summary.value:
            shown = value.image.encoded_image_string or value.simple_value
            points.setdefault(value.tag, []).append((event.step, shown))
    return points


def events(folder):
    """The events of TensorBoard's files, each of which may have been cut off."""
    for path in sorted(Path(folder).glob('events.out.tfevents*'), key=lambda path: int(path.name.split('.')[3])):
        data = path.read_bytes()
        while len(data) >= 12:                                             # length, its sum, event, its sum
            length, = struct.unpack_from('<Q', data)
            if len(data) < 16 + length:
                break
            yield event_pb2.Event.FromString(data[12:12 + length])
            data = data[16 + length:]


def assert_same(a, b, where=''):
    """Bit for bit, through dicts and sequences."""
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
