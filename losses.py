"""The distillation loss of DeiT ("Training data-efficient image transformers & distillation through attention")."""
import torch
import torch.nn as nn
import torch.nn.functional as F


class DistillationLoss(nn.Module):
    """A criterion, mixed with the agreement of the distillation head with a teacher.

    Args:
        base_criterion: criterion(logits, labels) for the class head.
        teacher: model of images → logits; not read where `distillation_type` is 'none'.
        distillation_type: 'none'; 'soft', the KL divergence at temperature `tau` averaged over batch and classes;
            'hard', the cross entropy with the teacher's decision.
        alpha: weight of the distillation loss, 1 − alpha that of the base criterion.
        tau: temperature of 'soft'.
    """

    def __init__(self, base_criterion, teacher=None, distillation_type='none', alpha=0.5, tau=1.0):
        super().__init__()
        self.base_criterion = base_criterion
        self.teacher = teacher
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau

    def forward(self, images, outputs, labels):
        """Images as the teacher sees them; outputs (class head, distillation head) of (B, C), or one; → scalar."""
        outputs, outputs_kd = outputs if isinstance(outputs, tuple) else (outputs, None)
        base_loss = self.base_criterion(outputs, labels)
        if self.distillation_type == 'none':
            return base_loss
        with torch.no_grad():
            teacher_outputs = self.teacher(images)
        if self.distillation_type == 'soft':
            distillation_loss = self.tau ** 2 / outputs_kd.numel() * F.kl_div(
                F.log_softmax(outputs_kd / self.tau, dim=1), F.log_softmax(teacher_outputs / self.tau, dim=1),
                reduction='sum', log_target=True)
        else:
            distillation_loss = F.cross_entropy(outputs_kd, teacher_outputs.argmax(dim=1))
        return base_loss * (1 - self.alpha) + distillation_loss * self.alpha
