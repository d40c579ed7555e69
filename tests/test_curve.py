import csv
import dataclasses
import functools
import json
import math
import shutil

import pytest
import timm
import torch
from PIL import Image

import curve as program
from conftest import PLAIN, run_main
from datasets import build_dataset, build_loader
from engine import evaluate
from main import build_model, main, parse_args
from measuring import knn
from measuring.accuracy_curve import Evaluation, plan_rows, with_way
from measuring.knn import Neighbours, nearest_votes
from models_evit import to_evit
from runtime.utils import InputError
from samplers import EvalSampler

CPU = torch.device('cpu')
WAYS = 'drop', 'fuse', 'merge'
QUIET = ['--num_workers', '0', '--device', 'cpu']
MODEL = ['--model', 'deit_tiny_patch16_shrink_base', '--fuse_token', '--input-size', '32', '--model-kwargs', 'depth=4',
         '--drop_loc', '1,2,3', *QUIET]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = to_evit(timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=4, embed_dim=24, num_heads=2,
                                      depth=4, num_classes=10), 0.7, (1, 2))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def short_windows(monkeypatch):
    measure = functools.partialmethod(Evaluation.measure_speed, windows=1, window_seconds=0.01)
    monkeypatch.setattr(Evaluation, 'measure_speed', measure)


def loader(is_train=False):
    dataset = build_dataset(is_train, data_set='DIGITS', input_size=16, augment=False)
    return build_loader(dataset, EvalSampler(dataset, 1, 0), 16, CPU)


def evaluation(model, file, rates=(1., 0.7, 0.4), ways=WAYS, **settings):
    return Evaluation(model, plan_rows(rates, ways), file, settings, CPU, torch.float32)


def sums(evaluation):
    return {(row.way, row.rate): row.sums for row in evaluation.rows}


def test_rows_equal_evaluations_one_by_one(model, tmp_path):
    curve = evaluation(model, tmp_path / 'curve.json')
    curve.run(loader())
    assert [(row.way, row.rate) for row in curve.rows] == [
        ('full', 1.), *((way, rate) for way in WAYS for rate in (0.7, 0.4))]
    with torch.no_grad():
        full = torch.cat([model(images, keep_rate=1).argmax(1) for images, _ in loader()])
        for row in curve.rows:
            one = to_evit(with_way(model, row.way if row.way in WAYS else 'drop'), row.rate)
            expected = evaluate(one, loader(), device=CPU, amp_dtype=torch.float32)
            top1, top5, loss, images, same = row.sums
            assert images == expected['images'] == 360
            assert (100 * top1 / images, 100 * top5 / images) == (expected['acc1'], expected['acc5'])
            assert loss / images == pytest.approx(expected['loss'], rel=1e-6)
            assert same == sum((one(images).argmax(1) == guess).sum() for (images, _), guess in
                               zip(loader(), full.split(16)))
    assert len({tuple(row.sums) for row in curve.rows}) == 7


def test_interrupted_pass_goes_on(model, tmp_path, monkeypatch):
    expected = evaluation(model, tmp_path / 'whole.json')
    expected.run(loader())
    interrupted, file, seen = evaluation(model, tmp_path / 'curve.json'), tmp_path / 'curve.json', []
    classify = Evaluation.classify

    def stop(self, images, way, rate):
        if way == 'full':
            seen.append(len(images))
            if len(seen) == 22:
                raise KeyboardInterrupt
        return classify(self, images, way, rate)

    monkeypatch.setattr(Evaluation, 'classify', stop)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(loader())
    monkeypatch.setattr(Evaluation, 'classify', classify)
    resumed = evaluation(model, file)
    assert [row.batches for row in resumed.rows] == 7 * [20] and not any(row.complete for row in resumed.rows)
    resumed.run(loader())
    assert all(resumed_sums == pytest.approx(sums(expected)[row]) for row, resumed_sums in sums(resumed).items())
    # Complete rows stay; a new one is evaluated alone, beside the full model
    calls = []
    monkeypatch.setattr(Evaluation, 'classify', lambda self, images, way, rate: calls.append((way, rate)) or
                        classify(self, images, way, rate))
    more = evaluation(model, file, (0.7, 0.5), ['merge'])
    more.run(loader())
    assert set(calls) == {('full', 1.), ('merge', 0.5)}
    assert sums(more)['merge', 0.7] == sums(resumed)['merge', 0.7]
    assert all(row.complete for row in evaluation(model, file).rows)       # rows that `more` did not name stay


@pytest.mark.parametrize('text', ['', 'x', '[1]', '{"rows": []}', '{"settings": {}, "rows": [{"way": "drop"}]}',
                                  'null'])
def test_damaged_state(model, tmp_path, text):
    (tmp_path / 'curve.json').write_text(text)
    with pytest.raises(InputError, match='curve.json is damaged'):
        evaluation(model, tmp_path / 'curve.json')


def test_curve_of_other_settings(model, tmp_path):
    evaluation(model, tmp_path / 'curve.json', data='a').save()
    with pytest.raises(InputError, match='of data a, this run has b'):
        evaluation(model, tmp_path / 'curve.json', data='b')


def test_ways_share_the_parameters(model):
    twin = with_way(model, 'merge')
    assert all(one is other for one, other in zip(twin.parameters(), model.parameters(), strict=True))
    assert twin.token_settings == dataclasses.replace(model.token_settings, way='merge') != model.token_settings


@pytest.mark.parametrize('chunk', [1000, 7])
def test_votes_against_a_naive_loop(chunk, monkeypatch):
    monkeypatch.setattr(knn, 'CHUNK', chunk)
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=1)
                     for n in (4, 33))
    labels = torch.randint(0, 3, (33,), generator=generator)
    votes = nearest_votes(queries, bank, labels, 6, 3)
    for query, shares in zip(queries, votes):
        cosines = [(query @ feature).item() for feature in bank]
        best = sorted(range(33), key=lambda i: -cosines[i])[:6]
        weights = [sum(math.exp(cosines[i] / 0.07) for i in best if labels[i] == label) for label in range(3)]
        torch.testing.assert_close(shares, torch.tensor(weights, dtype=torch.float64) / sum(weights))
    assert nearest_votes(queries, bank[:2], labels[:2], 6, 3).shape == (4, 3)          # a small bank


@pytest.mark.parametrize('own', [False, True])
def test_neighbours(model, own):
    """The class token's features, of the same rate or of the full model."""
    neighbours, rows = Neighbours(5, own), [('full', 1.), ('merge', 0.5)]
    neighbours.fill({'full': model, 'merge': with_way(model, 'merge')}, rows, loader(True), 10, CPU, torch.float32)
    bank_model = to_evit(with_way(model, 'merge'), 0.5 if own else 1)
    query_model = to_evit(with_way(model, 'merge'), 0.5)
    features = functools.partial(torch.nn.functional.normalize, dim=1)
    with torch.no_grad():
        bank = torch.cat([bank_model.forward_features(images)[:, 0] for images, _ in loader(True)])
        labels = torch.cat([labels for _, labels in loader(True)])
        images, _ = next(iter(loader()))
        queries = query_model.forward_features(images)[:, 0]
        votes = neighbours.vote(queries, 'merge', 0.5).exp()
    expected = nearest_votes(features(queries), features(bank), labels, 5, 10)
    torch.testing.assert_close(votes, expected.clamp(min=1e-8))


def test_curve_from_the_command_line(digits_run, tmp_path, capsys, short_windows):
    flags = ['--resume', str(digits_run[1] / 'checkpoint.pth'), '--output_dir', str(tmp_path), *QUIET]
    flags += ['--keep-rates', '0.5', '--token-ways', 'fuse', 'merge', '--drop_loc', '1,2']
    program.main(program.parse_args(flags))
    printed = capsys.readouterr().out
    with open(tmp_path / 'curve.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(row['way'], row['rate']) for row in rows] == [('full', '1.0'), ('fuse', '0.5'), ('merge', '0.5')]
    assert rows[0]['ratio'] == '1.0' and rows[0]['same'] == '100.0'
    assert float(rows[1]['gmacs']) < float(rows[0]['gmacs'])
    assert ' fuse   0.5' in printed and '360 images; batch 64 of 32×32' in printed
    with Image.open(tmp_path / 'curve.png') as picture:
        assert picture.width > 500
    with pytest.raises(InputError, match='of knn None, this run has 3'):
        program.main(program.parse_args([*flags, '--keep-rates', '0.5', '--drop_loc', '1,2', '--knn', '3']))


def test_neighbours_of_other_classes(image_folder, tmp_path):
    torch.save({'model': build_model(parse_args(PLAIN), 3).state_dict()}, tmp_path / 'a.pth')
    shutil.copytree(image_folder, tmp_path / 'data')
    (tmp_path / 'data' / 'train' / 'red').rename(tmp_path / 'data' / 'train' / 'rot')
    with pytest.raises(InputError, match='differ in their classes'):
        program.main(program.parse_args([*MODEL, '--resume', str(tmp_path / 'a.pth'), '--knn', '5', '--data-path',
                                         str(tmp_path / 'data'), '--output_dir', str(tmp_path)]))


@pytest.mark.parametrize('k', [1, 3])
def test_top5_of_few_neighbours(k, model, tmp_path):
    """At most k classes get votes; the others are no answers, though there are fewer than five."""
    neighbours, rows = Neighbours(k, False), plan_rows([0.5], ['drop'])
    evaluation = Evaluation(model, rows, tmp_path / 'curve.json', {}, CPU, torch.float32, neighbours=neighbours)
    neighbours.fill(evaluation.models, [(row.way, row.rate) for row in rows], loader(True), 10, CPU, torch.float32)
    evaluation.run(loader())
    correct = {row.way: torch.zeros(2) for row in rows}
    for images, labels in loader():
        for row in rows:
            votes = evaluation.classify(images, row.way, row.rate)
            assert (votes > -math.inf).sum(dim=1).max() <= k
            for vote, label in zip(votes, labels):
                answers = [i for i in vote.argsort(descending=True)[:5].tolist() if vote[i] > -math.inf]
                correct[row.way] += torch.tensor([float(answers[0] == label), float(label in answers)])
    for row in rows:
        assert row.sums[:2] == correct[row.way].tolist() and (k > 1 or row.sums[0] == row.sums[1])
        assert math.isfinite(row.sums[2])


def test_classes_of_the_checkpoint(image_folder, tmp_path, short_windows):
    """Other names of the classes are an error in each mode that uses the head; the neighbours' names are the data's."""
    def write(classes):
        state = {'model': build_model(parse_args(PLAIN), len(classes)).state_dict(), 'classes': classes}
        torch.save(state, tmp_path / 'a.pth')

    flags = [*MODEL, '--data-path', str(image_folder), '--resume', str(tmp_path / 'a.pth'), '--batch-size', '2',
             '--device', 'cpu', '--output_dir', str(tmp_path / 'run')]
    write(['c0', 'green', 'red'])
    runs = [lambda mode=mode: main(parse_args([*flags, *mode])) for mode in (['--eval'], ['--visualize-mask'], [])]
    for run in *runs, lambda: program.main(program.parse_args([*flags, '--keep-rates', '0.5'])):
        with pytest.raises(InputError, match='c0 is in the checkpoint only, blue is in the data only'):
            run()
        assert not (tmp_path / 'run').exists() or not [*(tmp_path / 'run').iterdir()]
    program.main(program.parse_args([*flags, '--knn', '5']))
    write([*'abcdefg'])                                # whose head has another size, too
    program.main(program.parse_args([*flags[:-1], str(tmp_path / 'other'), '--knn', '5']))
    assert (tmp_path / 'other' / 'curve.csv').exists()


def test_default_rates_of_neighbours():
    flags = ['--pretrained', '--knn', '5']
    for given, rates in (([], [0.7]), (['--model', 'deit_small_patch16_224_shrink05'], [0.5]),
                         (['--model', 'deit_small_patch16_224'], [1.]),
                         (['--model', 'deit_small_patch16_224', '--fuse-token'], [0.7])):
        args = program.parse_args([*flags, *given])
        assert args.keep_rates == rates and not args.measure_speed


@pytest.mark.parametrize('flags, named', [
    ([], 'give --resume CHECKPOINT or --pretrained'), (['--pretrained'], 'give --keep-rates, --knn or both'),
    (['--pretrained', '--keep-rates', '1.5'], '(0, 1]'),
    (['--pretrained', '--keep-rates', '0.5', '--token-ways', 'keep'], 'invalid choice'),
    (['--pretrained', '--keep-rates', '0.5', '--knn-bank', 'own'], 'needs --knn'),
    (['--pretrained', '--knn', '3', '--token-counts', '5,4'], 'takes no --keep-rates and no --knn'),
    (['--resume', 'absent.pth', '--knn', '3'], 'absent.pth does not exist')])
def test_wrong_input(flags, named, capsys):
    with pytest.raises(SystemExit) as error:
        program.run(flags)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and err.count('\n') == 1 and named in err and not out


def test_curve_of_two_processes(image_folder, tmp_path, short_windows):
    """With 24 and 9 images, of which the processes have different numbers."""
    flags = [*MODEL, '--data-path', str(image_folder), '--batch-size', '2', '--resume', str(tmp_path / 'a.pth'),
             '--base_keep_rate', '0.6', '--knn', '5', '--knn-bank', 'own', '--dist-eval', '--output_dir']
    torch.save({'model': build_model(parse_args(PLAIN), 3).state_dict()}, tmp_path / 'a.pth')
    program.main(program.parse_args([*flags, str(tmp_path / 'one')]))
    assert ' fuse   0.6' in run_main(*flags, tmp_path / 'two', processes=2, program='curve.py').stdout
    assert sorted(path.name for path in (tmp_path / 'two').iterdir()) == ['curve.csv', 'curve.json']
    one, two = (json.loads((tmp_path / folder / 'curve.json').read_text())['rows'] for folder in ('one', 'two'))
    for a, b in zip(one, two, strict=True):
        assert a['sums'] == pytest.approx(b['sums'], rel=1e-5) and a['sums'][3] == 9 and b['complete']
