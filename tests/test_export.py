"""export.py: the formats against the model, the operators in the files, the documentation's code, the errors."""
import json
import re
import subprocess
import sys

import pytest
import timm
import torch

import export as program
import main
from conftest import PLAIN, ROOT
from datasets import Digits, build_dataset
from runtime.utils import InputError

onnx = pytest.importorskip('onnx')                     # of requirements-export.txt
SMALL = ['embed_dim=32', 'num_heads=2', 'depth=2', 'patch_size=8']
MODELS = {
    'fused': ['--model', 'deit_tiny_patch16_shrink_base', '--fuse_token', '--drop_loc', '0'],
    'dropped distilled': ['--model', 'deit_tiny_distilled_patch16_shrink_base', '--drop_loc', '1'],
    'merged registers': ['--model', 'vit_small_patch14_reg4_dinov2', '--merge_token'],
    'merged RoPE': ['--model', 'vit_small_patch16_dinov3', '--merge_token', '--base_keep_rate', '0.5',
                    '--drop_loc', '0'],
    'fused RoPE, average': ['--model', 'eva02_base_patch14_224', '--fuse_token'],
    'counts': ['--model', 'vit_tiny_patch16_224', '--token_counts', '9,5'],
    'no EViT': ['--model', 'vit_tiny_patch16_224'],
}


def weights(path, flags, num_classes=5):
    """Write a checkpoint with the weights of the model of main.py's flags, large enough for all parts to matter."""
    torch.manual_seed(0)
    model = main.build_model(main.parse_args(flags), num_classes)
    state = {key: ('norm' in key and key.endswith('weight')) + 0.2 * torch.randn_like(value)
             for key, value in model.state_dict().items()}
    torch.save({'model': state}, path)
    return ['--resume', str(path)]


def run(*flags):
    program.main([str(flag) for flag in flags])


@pytest.mark.parametrize('kind, format', [*((kind, 'pt2') for kind in MODELS), *(
    (kind, 'onnx') for kind in ('fused', 'merged RoPE', 'no EViT')), ('merged RoPE', 'aoti')])
def test_formats(kind, format, tmp_path, capsys):
    flags = [*MODELS[kind], '--input-size', '32', '--model-kwargs', *SMALL]
    if format == 'aoti':
        flags += ['depth=1']                           # half a minute less of compiling
    kept = ['--kept'] if kind != 'no EViT' else []
    file = tmp_path / ('a.onnx' if format == 'onnx' else 'a.pt2')
    run(*flags, *kept, *weights(tmp_path / 'a.pth', flags), '--format', format, '--output', file)
    printed = capsys.readouterr().out.splitlines()[-1]
    assert 'batches of 1 and 3' in printed and 'same class' in printed and ('kept patches' in printed) == bool(kept)
    assert float(re.search('differ by up to (.*?),', printed)[1]) <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['a.pth', file.name])
    if format == 'onnx':
        graph = onnx.load(file).graph
        assert not graph.input[0].type.tensor_type.shape.dim[0].HasField('dim_value')  # any number of images
        operations = {node.op_type: node for node in graph.node}
        assert not operations.keys() & {'If', 'Loop', 'Scan', 'NonZero', 'Unique', 'Compress'}
        assert all(attribute.s == b'none' for name, node in operations.items() if name.startswith('Scatter')
                   for attribute in node.attribute if attribute.name == 'reduction')
        assert (kind == 'no EViT') == ('TopK' not in operations)
    elif format == 'pt2':
        parts = torch.export.load(file).graph_module.modules()              # such as what runs without autocast
        operations = ' '.join(str(node.target) for part in parts for node in part.graph.nodes)
        assert not re.search(r'aten\.(nonzero|unique|item|scatter_add|scatter_reduce|index_add|index_put)', operations)
        assert (kind == 'no EViT') == (not re.search(r'aten\.(topk|sort|argsort)', operations))


@pytest.mark.parametrize('options', [['--normalize'], ['--normalize', 'floats', '--features', '--batch-size', '2'],
                                     ['--dtype', 'float16', '--ema']], ids=' '.join)
def test_options(options, tmp_path, capsys):
    flags = [*MODELS['merged registers'], '--input-size', '32', '--model-kwargs', *SMALL]
    weights(tmp_path / 'a.pth', flags)
    state = torch.load(tmp_path / 'a.pth')['model']
    other = {key: value + 1 for key, value in state.items()}
    torch.save({'model': other, 'model_ema': state} if '--ema' in options else {'model': state}, tmp_path / 'a.pth')
    run(*flags, *options, '--resume', tmp_path / 'a.pth', '--format', 'onnx', '--output', tmp_path / 'a.onnx')
    assert 'same class' in capsys.readouterr().out.splitlines()[-1]
    import onnxruntime
    session = onnxruntime.InferenceSession(tmp_path / 'a.onnx')
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    floats = images.float() / 255
    model = main.build_model(main.parse_args(flags), 5).eval()
    model.load_state_dict(state)
    preprocessing = main.input_of(main.parse_args(flags).model, pretrained=False)[1]
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in preprocessing[:2])
    if '--features' in options:
        model.reset_classifier(0)
    given = images if options == ['--normalize'] else floats if '--normalize' in options else (floats - mean) / std
    with torch.no_grad():
        expected = model((floats - mean) / std)
    output, = session.run(None, {'images': given.numpy()})
    tolerance = 2e-2 if '--dtype' in options else 1e-4
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=tolerance, atol=tolerance)
    assert session.get_inputs()[0].shape[0] == (2 if '--batch-size' in options else session.get_inputs()[0].shape[0])


def blocks(language='python'):
    return re.findall(rf'```{language}\n(.*?)```', (ROOT / 'docs' / 'export.md').read_text(), re.S)


def test_lines_of_the_documentation(digits_run, tmp_path, capsys):
    """A folder of pictures is classified, without torch, as main.py evaluates it; the other files load."""
    _, folder = digits_run
    digits = Digits(train=False)
    for i, (image, label) in enumerate(digits):
        (tmp_path / 'pictures' / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / 'pictures' / str(label) / f'{i}.png')
    run('--resume', folder / 'checkpoint.pth', '--normalize', '--format', 'onnx', '--output', tmp_path / 'digits.onnx')
    flags = [*MODELS['fused'], '--input-size', '32', '--model-kwargs', *SMALL, 'depth=1']      # which is soon compiled
    flags += ['--normalize', *weights(tmp_path / 'a.pth', flags, 10), '--output']
    run(*flags, tmp_path / 'digits.pt2', '--format', 'pt2')
    run(*flags, tmp_path / 'digits_aoti.pt2', '--format', 'aoti')
    classify, load, _ = blocks()
    (tmp_path / 'pictures' / 'notes.txt').write_text('no image')
    (tmp_path / 'classify.py').write_text(f'{classify}\nassert "torch" not in sys.modules')
    (tmp_path / 'load.py').write_text(load)
    command = [sys.executable, 'classify.py', 'digits.onnx', 'pictures']
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    printed.remove('pictures/notes.txt is no image')
    right = sum(line.split()[0].split('/')[1] == line.split()[1] for line in printed)
    capsys.readouterr()
    main.main(main.parse_args([*PLAIN, '--eval', '--no-model-ema', '--resume', str(folder / 'checkpoint.pth')]))
    assert len(printed) == 360 and f'Accuracy of the network on the 360 test images: {100 * right / 360:.2f}%' in (
        capsys.readouterr().out)
    done = subprocess.run([sys.executable, 'load.py'], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == 2 * ['torch.Size([5, 10]) deit_tiny_patch16_shrink_base']


def test_int8(digits_run, tmp_path):
    """Linear layers are quantised, the classes of the digits stay."""
    import onnxruntime
    digits = build_dataset(False, input_size=32)
    images, classes = torch.stack([image for image, _ in digits]).numpy(), []
    for dtype in 'float32', 'int8':
        file = tmp_path / f'{dtype}.onnx'
        run('--resume', digits_run[1] / 'checkpoint.pth', '--normalize', '--format', 'onnx', '--dtype', dtype,
            '--output', file)
        classes.append(onnxruntime.InferenceSession(file).run(None, {'images': images})[0].argmax(1))
    assert (classes[0] == classes[1]).mean() > 0.97
    assert 'MatMulInteger' in {node.op_type for node in onnx.load(tmp_path / 'int8.onnx').graph.node}


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'int8'])
def test_weights_in_a_second_file(dtype, tmp_path, monkeypatch, capsys):
    """As torch writes above 1.5 GiB: both are there, are named, and load where they stand. int8 is one file again."""
    import onnxruntime
    from torch.onnx._internal.exporter import _onnx_program
    monkeypatch.setattr(_onnx_program, '_LARGE_MODEL_THRESHOLD', 1000)
    monkeypatch.chdir(tmp_path)
    flags = [*MODELS['fused'], '--input-size', '32', '--model-kwargs', *SMALL, 'embed_dim=64']
    flags += [*weights(tmp_path / 'a.pth', flags), '--format', 'onnx', '--dtype', dtype, '--output']
    names = ['a.onnx'] if dtype == 'int8' else ['a.onnx', 'a.onnx.data']
    for _ in range(2 if dtype == 'float32' else 1):    # also in the place of an earlier export
        run(*flags, 'a.onnx')
        printed = capsys.readouterr().out.splitlines()[-1]
        assert all(f'{name}: ' in printed for name in names) and ('be kept together' in printed) == (len(names) > 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == [*names, 'a.pth']
    assert (tmp_path / names[-1]).stat().st_size > 50_000
    (tmp_path / 'moved').mkdir()
    for name in names:
        (tmp_path / name).rename(tmp_path / 'moved' / name)
    monkeypatch.chdir('/')
    images = torch.randn(2, 3, 32, 32)
    model = main.build_model(main.parse_args(flags[:flags.index('--resume')]), 5).eval()
    model.load_state_dict(torch.load(tmp_path / 'a.pth')['model'])
    session = onnxruntime.InferenceSession(tmp_path / 'moved' / 'a.onnx')
    output = torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
    with torch.no_grad():
        expected = model(images)
    assert (output - expected).abs().max() / expected.abs().max() <= program.TOLERANCE[dtype]
    assert json.loads(session.get_modelmeta().custom_metadata_map['input_size']) == 32


def test_second_file_that_does_not_load(tmp_path, monkeypatch):
    from torch.onnx._internal.exporter import _onnx_program
    monkeypatch.setattr(_onnx_program, '_LARGE_MODEL_THRESHOLD', 1000)
    move = program.move_files
    monkeypatch.setattr(program, 'move_files',
                        lambda *paths: [open(path, 'w').close() or path for path in move(*paths)])
    flags = [*MODELS['no EViT'], '--input-size', '32', '--model-kwargs', *SMALL]
    with pytest.raises(InputError, match='b.onnx does not load with b.onnx.data beside it'):
        run(*flags, *weights(tmp_path / 'a.pth', flags), '--format', 'onnx', '--output', tmp_path / 'b.onnx')
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


def test_openvino(tmp_path):
    openvino = pytest.importorskip('openvino')
    flags = [*MODELS['merged registers'], '--input-size', '32', '--model-kwargs', *SMALL]
    run(*flags, '--kept', *weights(tmp_path / 'a.pth', flags), '--format', 'onnx', '--output', tmp_path / 'a.onnx')
    core = openvino.Core()                             # whose default precision is bfloat16 on some CPUs
    compiled = core.compile_model(tmp_path / 'a.onnx', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    model = main.build_model(main.parse_args(flags), 5).eval()
    model.load_state_dict(torch.load(tmp_path / 'a.pth')['model'])
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(compiled(images.numpy())[0]), model(images), rtol=1e-4, atol=1e-4)


def test_model_in_a_runtime():
    """For measurements: the outputs of the model, which is not changed."""
    torch.manual_seed(0)
    flags = [*MODELS['fused'], '--input-size', '32', '--model-kwargs', *SMALL]
    model, images = main.build_model(main.parse_args(flags), 5).eval(), torch.randn(2, 3, 32, 32)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        run = program.InRuntime(model, 'onnx', images, dtype)
        with torch.inference_mode():
            torch.testing.assert_close(run(images), model(images), rtol=tolerance, atol=tolerance)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_flags_of_the_checkpoint(tmp_path):
    """Those that are not given are taken over; --token-counts stands for all of a schedule."""
    trained = {'model': 'vit_tiny_patch16_224', 'model_kwargs': {'depth': 4}, 'input_size': 48, 'base_keep_rate': 0.6,
               'drop_loc': (1, 2), 'keep_schedule': 'stages', 'fuse_token': True, 'merge_token': False,
               'token_counts': None, 'pretrained': False, 'data_set': 'DIGITS'}
    weights = {'w': torch.zeros(1)}
    torch.save({'model': weights, 'args': trained}, tmp_path / 'a.pth')
    flags = ['--resume', str(tmp_path / 'a.pth'), '--format', 'pt2', '--output', str(tmp_path / 'b.pt2')]

    def taken(*given):
        args, _ = program.parse_args([*flags, *given])
        return args.base_keep_rate, args.drop_loc, args.fuse_token, args.merge_token, args.token_counts

    args, _ = program.parse_args(flags)
    assert {name: getattr(args, name) for name in trained if name != 'data_set'} == {
        name: value for name, value in trained.items() if name != 'data_set'} and args.is_digits
    assert taken('--base-keep-rate', '0.3', '--merge-token') == (0.3, (1, 2), False, True, None)
    assert taken('--no-fuse-token') == (0.6, (1, 2), False, False, None)
    assert taken('--token-counts', '9,9,9,5')[4] == (9, 9, 9, 5)
    torch.save({'model': weights, 'args': {**trained, 'token_counts': (9, 9, 5, 5)}}, tmp_path / 'a.pth')
    assert taken()[4] == (9, 9, 5, 5) and taken('--base-keep-rate', '0.5')[:5:4] == (0.5, None)


@pytest.mark.parametrize('flags, named', [
    ([], '--resume CHECKPOINT or --pretrained'), (['--resume', 'no.pth'], 'no.pth does not exist'),
    (['--pretrained', '--ema'], '--ema needs --resume'),
    (['--resume', 'a.pth', '--output', 'no/b.onnx'], 'no folder no'),
    (['--resume', 'a.pth', '--output', 'b'], 'must end in .onnx'),
    (['--resume', 'a.pth', '--dtype', 'int8', '--format', 'pt2', '--output', 'b.pt2'], '--dtype int8 goes with'),
    (['--resume', 'a.pth', '--kept'], 'vit_tiny_patch16_224 does not reorganise'),
    (['--resume', 'a.pth', '--ema'], 'a.pth has no moving average'), (['--resume', 'a.pth', '--format', 'x'], "'x'"),
    (['--resume', 'a.pth', '--model-kwargs', 'depth=3'], 'a.pth'),
    (['--resume', 'a.pth', '--dtype', 'bfloat16'], 'cannot be exported'),
    (['--resume', 'a.pth', '--device', 'abacus'], 'abacus')], ids=str)
def test_wrong_input(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ['--model', 'vit_tiny_patch16_224', '--input-size', '32', '--model-kwargs', *SMALL]
    weights(tmp_path / 'a.pth', model)
    with pytest.raises((SystemExit, InputError)) as error:
        run(*model, '--format', 'onnx', '--output', 'b.onnx', *flags)
    message = str(error.value) if error.type is not SystemExit else capsys.readouterr().err
    assert named in message and '\n' not in message.rstrip('\n')
    assert error.type is not SystemExit or error.value.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.pth']


@pytest.mark.parametrize('change', [lambda logits, *kept: [logits + 1e-3, *kept],
                                    lambda logits, *kept: [logits, kept[0] + 1, *kept[1:]]])
def test_exported_model_that_differs(change, tmp_path, monkeypatch):
    """Nothing is written, nor left."""
    def write(exported, path, names, metadata):
        path.touch()
        return lambda images: change(*exported.module()(images)), 'a runtime'

    monkeypatch.setitem(program.WRITERS, 'pt2', write)
    flags = [*MODELS['fused'], '--input-size', '32', '--model-kwargs', *SMALL]
    with pytest.raises(InputError, match='the exported model differs'):
        run(*flags, '--kept', *weights(tmp_path / 'a.pth', flags), '--format', 'pt2', '--output', tmp_path / 'c.pt2')
    assert [one.name for one in tmp_path.iterdir()] == ['a.pth']


def test_format_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    flags = [*MODELS['no EViT'], '--input-size', '32', '--model-kwargs', *SMALL]
    with pytest.raises(InputError, match='pip install -r requirements-export.txt'):
        run(*flags, *weights(tmp_path / 'a.pth', flags), '--format', 'onnx', '--output', tmp_path / 'b.onnx')


def test_hub(tmp_path):
    options = dict(base_keep_rate=0.4, num_classes=3)
    model = torch.hub.load(str(ROOT), 'deit_tiny_patch16_shrink_base', source='local', **options)
    assert type(model).__name__ == 'EViT' and model.token_settings.base_keep_rate == 0.4 and model.num_classes == 3
    assert timm.is_model('deit_tiny_patch16_shrink_base')


def test_metadata(digits_run, tmp_path):
    run('--resume', digits_run[1] / 'checkpoint.pth', '--format', 'pt2', '--output', tmp_path / 'a.pt2')
    extra = {'metadata.json': ''}
    torch.export.load(tmp_path / 'a.pt2', extra_files=extra)
    data = json.loads(extra['metadata.json'])
    assert json.loads(data['classes']) == Digits.classes and (data['crop_pct'], data['normalize']) == ('1.0', 'outside')
