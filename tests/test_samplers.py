import pytest

from conftest import reference
from samplers import EvalSampler, TrainSampler


@pytest.mark.parametrize('case', reference('training.json')['repeated_aug_sampler'],
                         ids=lambda case: f'{case["n"]}-{case["rank"]}of{case["world"]}')
def test_repeated_augmentation_of_the_original(case):
    sampler = TrainSampler(range(case['n']), case['world'], case['rank'], seed=0, repeated_aug=True)
    sampler.set_epoch(case['epoch'])
    indices = [index for index, _ in sampler]
    assert len(sampler) == len(indices) == case['len']
    assert indices[:24] == case['first24']
    assert sum(position * index for position, index in enumerate(indices)) == case['checksum']


@pytest.mark.parametrize('n', [1, 7, 255, 256, 300])
@pytest.mark.parametrize('world', [1, 2, 3])
def test_repeated_augmentation_of_small_data_sets(n, world):
    for rank in range(world):
        sampler = TrainSampler(range(n), world, rank, repeated_aug=True)
        assert len(list(sampler)) == len(sampler) > 0


@pytest.mark.parametrize('repeated_aug', [False, True])
def test_order_by_seed_and_epoch(repeated_aug):
    def order(seed, epoch):
        sampler = TrainSampler(range(300), 1, 0, seed, repeated_aug)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    indices = [tuple(index for index, _ in order(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (7, 0))]
    assert len(set(indices)) == 3                    # also for one process, unlike in the original code


@pytest.mark.parametrize('repeated_aug', [False, True])
def test_rest_of_an_epoch(repeated_aug):
    sampler = TrainSampler(range(30), 2, 1, seed=5, repeated_aug=repeated_aug)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, start=4)
    assert list(sampler) == whole[4:] and len(sampler) == len(whole)
    sampler.set_epoch(4)
    assert len(list(sampler)) == len(whole)


def test_keys_of_all_processes():
    samples = [sample for rank in range(3) for sample in TrainSampler(range(30), 3, rank, seed=5)]
    assert {index for index, _ in samples} == set(range(30))
    assert {key for _, key in samples} == {(5, 0, position) for position in range(30)}


@pytest.mark.parametrize('n', [0, 1, 2, 5, 97])
@pytest.mark.parametrize('world', [1, 2, 3])
def test_evaluation_shares(n, world):
    shares = [list(EvalSampler(range(n), world, rank)) for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(n))
    assert [len(share) for share in shares] == [len(EvalSampler(range(n), world, rank)) for rank in range(world)]
