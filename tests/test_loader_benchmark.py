"""loader_benchmark.py: the compared pipelines, images/s, time per stage, command line."""
import importlib
import sys

import pytest
import torch

import folder2lmdb
import loader_benchmark
import speed_test
from loader_benchmark import LoadingProtocol, loading_rate, pipelines, time_stages
from runtime.utils import InputError

pytestmark = pytest.mark.usefixtures('one_thread')
QUICK = ['--input-size', '32', '--batch-size', '4', '--device', 'cpu', '--num-workers', '1', '--windows', '1',
         '--window-seconds', '0.01']


def protocol(**changes):
    settings = dict(input_size=32, batch_size=4, device=torch.device('cpu'), num_workers=1, windows=2,
                    window_seconds=0.001)
    return LoadingProtocol(**settings | changes)


@pytest.fixture(scope='module')
def both(image_folder, tmp_path_factory):
    """A folder with image files and with databases of the same images."""
    folder = tmp_path_factory.mktemp('both')
    for split in ('train', 'val'):
        (folder / split).symlink_to(image_folder / split)
        folder2lmdb.convert(str(image_folder / split), str(folder / f'{split}.lmdb'))
    return folder


def epoch(pipeline):
    """All batches of one epoch."""
    return list(pipeline.batches(pipeline.dataset, 0))


@pytest.mark.parametrize('is_train, number', [(True, 24), (False, 9)], ids=['train', 'val'])
def test_batches_of_an_epoch(is_train, number, both):
    for pipeline in pipelines(both, is_train, protocol()):
        batches = epoch(pipeline)
        assert [batch.shape[1:] for batch in batches] == len(batches) * [(3, 32, 32)]
        assert sum(map(len, batches)) == number and batches[0].dtype == torch.float32
        assert abs(torch.cat(batches).mean()) < 1.5                                    # normalised


def test_validation_images_of_all_pipelines(both):
    plain, *ours = (torch.cat(epoch(pipeline)) for pipeline in pipelines(both, False, protocol()))
    assert len(ours) == 2
    for images in ours:
        torch.testing.assert_close(images, plain, rtol=0, atol=1e-6)


def test_names_of_pipelines(both, tmp_path):
    """The plain pipeline reads image files, or the database if there are no image files."""
    training = list(pipelines(both, True, protocol()))
    assert [pipeline.name for pipeline in training] == [
        'train, ImageFolder, plain', 'train, ImageFolder', 'train, ImageFolder, --fast-transforms',
        'train, ImageFolderLMDB', 'train, ImageFolderLMDB, --fast-transforms']
    crops = [type(pipeline.dataset.transform.transforms[0]).__name__ for pipeline in training]
    assert [crop == 'DecodedCrop' for crop in crops] == [False, False, True, False, True]
    (tmp_path / 'val.lmdb').symlink_to(both / 'val.lmdb')
    names = [pipeline.name for pipeline in pipelines(tmp_path, False, protocol())]
    assert names == ['val, ImageFolderLMDB, plain', 'val, ImageFolderLMDB']


def test_random_erasing(both, monkeypatch):
    """Our pipelines erase in batches, the plain one in its transform, with the same settings."""
    monkeypatch.setattr(loader_benchmark, 'RandomErasing', lambda **settings: lambda images: images.zero_())
    plain, *ours = pipelines(both, True, protocol())
    assert not any(batch.any() for pipeline in ours for batch in epoch(pipeline))
    assert any(batch.any() for batch in epoch(plain))
    erasing = plain.dataset.transform.transforms[-1]
    assert (erasing.probability, erasing.per_pixel) == (0.25, True)
    assert loader_benchmark.ERASING == {'probability': 0.25, 'mode': 'pixel'}


def test_loading_rate(monkeypatch):
    """One batch of 8 images every 0.01 s."""
    clock = [0.]

    def batches():
        while True:
            clock[0] += 0.01
            yield torch.empty(8, 1)

    monkeypatch.setattr(loader_benchmark.time, 'perf_counter', lambda: clock[0])
    assert loading_rate(batches(), protocol(window_seconds=0.2)) == pytest.approx(800)
    assert 0.2 <= clock[0] < 0.22


def test_stages(both):
    batched = []

    def batches(dataset, num_workers):
        for images in pipeline.batches(dataset, num_workers):
            batched.append(len(images))
            yield images

    pipeline = list(pipelines(both, True, protocol()))[1]
    times = time_stages(pipeline._replace(batches=batches))
    assert batched == 3 * 6 * [4]                                                      # three rounds of 24 images
    steps = ['RandomResizedCropAndInterpolation', 'RandomHorizontalFlip', 'RandAugment', 'MaybePILToTensor']
    assert list(times) == ['read and decode', *steps, 'batch']
    assert all(0 < milliseconds < 100 for milliseconds in times.values())


def test_command_line(both, capsys):
    """speed_test.py --loader passes its flags on to loader_benchmark.py."""
    assert speed_test.main(['--loader', '--data-path', str(both), *QUICK]) == 0
    header, titles, *lines = capsys.readouterr().out.splitlines()
    assert 'batches of 4 of 32×32' in header and '1 windows' in header and '1 workers' in header
    assert titles.count('images/s') == titles.count('ratio') == 2
    assert len(lines) == 8 + 1 + 8 and [line.count('1.000') for line in lines[:8:5]] == [2, 2]


@pytest.mark.parametrize('program', [['loader_benchmark.py'], ['speed_test.py', '--loader']],
                         ids=['loader_benchmark', 'speed_test'])
def test_folder_without_images(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [*program, '--data-path', str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(program[0].removesuffix('.py')).run()
    assert stopped.value.code == 2 and capsys.readouterr() == (
        '', f'{program[0]}: error: --data-path {tmp_path} has no train/ folder and no train.lmdb; '
        'train/<class>/<image> is expected\n')


@pytest.mark.parametrize('arguments, message', [
    ([], '--data-path'),
    (['--data-path', '.', '--plot', 'speed.png'], '--plot'),
    (['--data-path', '.', '--csv', 'speed.csv'], '--csv'),
    (['--data-path', '.', '--compile'], '--compile'),
    (['--data-path', '.', '--models', 'resnet18'], '--models'),
    (['--data-path', '.', '--batch-size', 'auto'], '--batch-size'),
    (['--data-path', '.', '--num-workers', '0'], '--num-workers: must be above 0'),
])
def test_wrong_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed_test.main([*arguments, '--loader'])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ''
    line, = captured.err.splitlines()
    assert message in line


def test_defaults():
    args = loader_benchmark.parse_args(['--data-path', '.', '--device', 'cpu'])
    assert (args.input_size, args.batch_size, args.windows, args.window_seconds) == (224, 16, 5, 1.)
    assert args.device == torch.device('cpu')


def test_missing_split(both, tmp_path):
    (tmp_path / 'train.lmdb').symlink_to(both / 'train.lmdb')
    with pytest.raises(InputError, match='has no val/ folder and no val.lmdb'):
        loader_benchmark.main(['--data-path', str(tmp_path), *QUICK])
