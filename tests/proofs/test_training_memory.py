"""What a training step holds, against a sum by hand and against what a step on the CPU keeps."""

import torch
from torch import nn

import growshrink as gs
from growshrink.proofs._profile import training_memory
from nets import ConvNet

SIZE = (3, 8, 8)


def test_sum_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    weights = 8 * 27 + 8 + 16 + 5120 + 10
    image = 3 * 64 + 2 * 8 * 64  # what the convolution and the norm read, and what the ReLU gives
    statistics = 2 * 8  # mean and deviation of the batch
    for batch in (2, 5):
        assert training_memory(net, SIZE, batch) == 4 * (2 * weights + batch * image + statistics)


def test_a_real_step_keeps_as_much():
    torch.manual_seed(0)
    for net in (ConvNet(), gs.grow(ConvNet(), ["bottleneck", "insert"], ratio=2.0, input_size=SIZE)):
        kept, own = {}, {t.untyped_storage().data_ptr() for t in net.state_dict().values()}

        def keep(tensor, kept=kept, own=own):
            if (key := tensor.untyped_storage().data_ptr()) not in own:
                kept[key] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = net.train()(torch.randn(4, *SIZE))
        expected = sum(t.untyped_storage().nbytes() for t in kept.values()) + 8 * sum(
            p.numel() for p in net.parameters()
        )
        lams = 8 * sum(name.endswith("lam") for name in net.state_dict())  # no numbers on the meta device, but tensors
        assert expected <= training_memory(net, SIZE, 4) <= expected + lams and out.requires_grad
