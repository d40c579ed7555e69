import hashlib
import io
import zipfile

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
