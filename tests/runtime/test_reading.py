import argparse
import collections
import datetime
import hashlib
import http
import io
import os
import pathlib
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from runtime.reading import DamagedCheckpoint, load_checkpoint
from runtime.utils import InputError


def saved(value, **options):
    """The bytes of a checkpoint with one weight."""
    file = io.BytesIO()
    torch.save({'model': {'w': torch.tensor([float(value)])}}, file, **options)
    return file.getvalue()


def weight(source):
    return load_checkpoint(str(source))['model']['w'].item()


# --- By https -------------------------------------------------------------------------------------------------------

class Headers(dict):
    get_all = dict.get


class Response(io.BytesIO):
    def info(self):
        return Headers()


class BrokenResponse(Response):
    def __repr__(self):                                # the name of a test must not be an address
        return type(self).__name__

    def read(self, *_):
        raise ConnectionResetError('the connection broke off')


@pytest.fixture
def internet(tmp_path, monkeypatch):
    """A dict {address: bytes, or a Response} that torch downloads from, into a cache in `tmp_path`."""
    pages = {}

    def urlopen(request):
        page = pages[request.full_url]
        return page if isinstance(page, Response) else Response(page)

    monkeypatch.setattr(torch.hub, 'urlopen', urlopen)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    return pages


def cached(tmp_path):
    return sum(path.is_file() for path in tmp_path.rglob('*'))


def test_addresses_with_the_same_last_part(internet, tmp_path):
    addresses = [f'https://{host}/{path}' for host, path in (
        ('a', 'x/checkpoint.pth'), ('b', 'y/checkpoint.pth'), ('a', 'checkpoint.pth?run=1'),
        ('a', 'checkpoint.pth?run=2'), ('a', 'download/'), ('a', 200 * 'long' + '.pth'))]
    internet.update({address: saved(i) for i, address in enumerate(addresses)})
    assert [weight(address) for address in addresses] == [0, 1, 2, 3, 4, 5]
    internet.clear()                                   # all come from the cache now
    assert [weight(address) for address in addresses] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize('page, named', [
    (b'\n<!DOCTYPE html><title>Sign in</title>', 'a web page'), (saved(1)[:300], 'cut short or damaged'),
    (b'', 'not a checkpoint'), (saved(1).replace(b'weight', b'weigth')[:-40] + bytes(40), 'a.pth'),
    (BrokenResponse(), 'cannot be downloaded: the connection broke off')], ids=str)
def test_what_does_not_load_is_not_cached(page, named, internet, tmp_path):
    internet['https://a/a.pth'] = page
    with pytest.raises(InputError, match=named) as error:
        load_checkpoint('https://a/a.pth')
    assert 'https://a/a.pth' in str(error.value) and '\n' not in str(error.value)
    assert cached(tmp_path) == 0
    internet['https://a/a.pth'] = saved(7)
    assert weight('https://a/a.pth') == 7


@pytest.mark.parametrize('name', [
    'evit-0.7-fuse-img224-deit-s.pth', 'lvvit_s-26M-224-83.3.pth.tar', 'checkpoint-299.pth', 'vit-abc.pth',
    'deit-deadbeef.best.pth', 'DEIT-DEADBEEF.pth', 'model-cafe.safetensors'])
def test_names_without_a_checksum(name, internet):
    internet[f'https://a/{name}'] = saved(3)
    assert weight(f'https://a/{name}') == 3


@pytest.mark.parametrize('digits', [8, 12, 64])
def test_checksum_in_the_name(digits, internet, tmp_path):
    data = saved(3)
    right = f'https://a/deit-{hashlib.sha256(data).hexdigest()[:digits]}.pth'
    wrong = f'https://a/deit-{"5c106cde".ljust(digits, "0")}.pth?download=1'
    internet.update({right: data, wrong: data})
    assert weight(right) == 3
    with pytest.raises(DamagedCheckpoint, match='does not match the checksum in its name, 5c106cde'):
        load_checkpoint(wrong)
    assert cached(tmp_path) == 1


@pytest.mark.parametrize('source, named', [('http://a/b.pth', 'neither a file nor an https address'),
                                           ('https://ü ü/a.pth', 'cannot be downloaded')])
def test_other_addresses(source, named, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(InputError, match=named):
        load_checkpoint(source)


def test_formats_by_their_content(tmp_path, internet):
    """Whatever the file is called."""
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, 'w') as archive:
        archive.writestr('model.pth', saved(5))
    formats = [saved(5), saved(5, _use_new_zipfile_serialization=False), zipped.getvalue(),
               safetensors.torch.save({'w': torch.tensor([5.])})]
    for i, data in enumerate(formats):
        for suffix in 'pth', 'safetensors', 'zip', 'part':
            (tmp_path / f'{i}.{suffix}').write_bytes(data)
            assert weight(tmp_path / f'{i}.{suffix}') == 5
        internet[f'https://a/{i}?download=true'] = data
        assert weight(f'https://a/{i}?download=true') == 5


# --- What is beside the weights -------------------------------------------------------------------------------------

BESIDE = {
    'numpy scalars': [np.float64(81.5), np.int32(7), np.bool_(True), np.complex64(1 + 2j), np.str_('deit')],
    'numpy arrays': [np.arange(6.).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.arange(3, dtype='>i4'),
                     np.zeros((0, 3)), np.array(['a', 'bc']), np.random.RandomState(0).get_state()[1]],
    'collections': [collections.defaultdict(list, a=[1]), collections.OrderedDict(a=1), collections.Counter('aab'),
                    frozenset([1, 2]), {1, 2}, argparse.Namespace(lr=np.float32(0.5)), types.SimpleNamespace(a=1)],
    'paths': [pathlib.PurePosixPath('/runs/a'), pathlib.PureWindowsPath('C:/runs')],
    'dates': [datetime.datetime(2026, 11, 27, tzinfo=datetime.timezone.utc), datetime.date(2026, 11, 27),
              datetime.timedelta(1)],
    'plain values': [b'', b'a', bytearray(b'a'), range(3), slice(1, 2), 1j, 10 ** 30, float]}


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('kind', BESIDE)
def test_harmless_values_beside_the_weights(kind, zipped, tmp_path):
    state = {'model': {'w': torch.ones(1)}, 'beside': BESIDE[kind]}
    torch.save(state, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    for found, value in zip(load_checkpoint(str(tmp_path / 'a.pth'))['beside'], BESIDE[kind], strict=True):
        np.testing.assert_array_equal(found, value)
        assert np.asarray(found).dtype.str[1:] == np.asarray(value).dtype.str[1:]            # but for the byte order


def test_paths_and_queues(tmp_path):
    torch.save({'model': {'w': torch.ones(1)}, 'path': pathlib.Path('a/b'), 'queue': collections.deque([1, 2], 5)},
               tmp_path / 'a.pth')
    found = load_checkpoint(str(tmp_path / 'a.pth'))
    assert (str(found['path']), found['queue']) == ('a/b', [1, 2])


@pytest.mark.parametrize('value, name', [
    (np.random.default_rng(0), 'numpy.random'), (http.HTTPStatus.OK, 'http.HTTPStatus'),
    (np.array([None]), 'numpy.object'), (np.zeros(2, 'i4,f4'), 'numpy.void'), (torch.nn.GELU(), 'GELU'),
    (print, 'print'), (os.system, 'system')], ids=str)
def test_refused_classes_are_named(value, name, tmp_path):
    torch.save({'model': {'w': torch.ones(1)}, 'beside': value}, tmp_path / 'a.pth')
    with pytest.raises(DamagedCheckpoint, match=f'it holds .*{name}.*save the weights alone') as error:
        load_checkpoint(str(tmp_path / 'a.pth'))
    assert '\n' not in str(error.value)


def test_torchscript_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), tmp_path / 'a.pt')
    with pytest.raises(DamagedCheckpoint, match='it holds a program of TorchScript, which could run code'):
        load_checkpoint(str(tmp_path / 'a.pt'))


def test_crafted_array(tmp_path):
    """The pickled state of numpy's own dtype could make objects of arbitrary bytes; the stand-in ignores it."""
    reduce, arguments, state = np.arange(2, dtype='u8').__reduce__()

    class Array:
        def __reduce__(self):
            return reduce, arguments, (1, (2,), Dtype(), False, bytes(16))

    class Dtype:
        def __reduce__(self):
            return np.dtype, ('u8',), (3, '<', None, None, None, 8, 8, 63)

    torch.save({'model': {'w': torch.ones(1)}, 'beside': Array()}, tmp_path / 'a.pth')
    found = load_checkpoint(str(tmp_path / 'a.pth'))['beside']
    assert found.tolist() == [0, 0] and not found.dtype.hasobject
    for state in ((1, (10 ** 6,), Dtype(), False, bytes(16)), (1, (2,), 3, False, bytes(16)), (1, (2,))):
        Array.__reduce__ = lambda self, state=state: (reduce, arguments, state)
        torch.save({'model': {'w': torch.ones(1)}, 'beside': Array()}, tmp_path / 'a.pth')
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(str(tmp_path / 'a.pth'))
