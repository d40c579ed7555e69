import numpy as np
import pytest
import torch

from conftest import reference
from losses import DistillationLoss


@pytest.mark.parametrize('case', reference('training.json')['distillation'],
                         ids=lambda case: f'{case["type"]}-{case["alpha"]}')
def test_distillation_of_the_original(case):
    generator = np.random.RandomState(5)
    shapes = (4, 10), (4, 10), (4, 12)
    outputs, outputs_kd, images = (torch.tensor(generator.standard_normal(shape)) for shape in shapes)
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), lambda x: 1.5 * x[:, :10], case['type'], case['alpha'],
                                 case['tau'])
    loss = criterion(images, (outputs, outputs_kd), torch.tensor([1, 2, 3, 4]))
    assert loss.item() == pytest.approx(case['loss'], abs=1e-12)


def test_teacher_gets_no_gradient():
    teacher = torch.nn.Linear(12, 10)
    outputs, outputs_kd = torch.randn(2, 4, 10, requires_grad=True)
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), teacher, 'soft', 0.5, 3.0)
    criterion(torch.randn(4, 12), (outputs, outputs_kd), torch.arange(4)).backward()
    assert teacher.weight.grad is None
