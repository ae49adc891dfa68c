"""Small nets and helpers that several tests share."""

import copy
from contextlib import contextmanager

import timm
import torch
from torch import nn

from growshrink.proofs.probes import randomize_norms_


class ConvNet(nn.Module):
    """stem -> conv -> BN -> ReLU -> pooled classifier; keyword arguments are those of the conv in the middle."""

    def __init__(self, channels=8, out_channels=8, norm=True, head=True, **kwargs):
        super().__init__()
        kwargs = {"kernel_size": 3, "padding": 1, "bias": False, **kwargs}
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(channels, out_channels, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.act = nn.ReLU()
        self.head = nn.Linear(out_channels, 10) if head else nn.Identity()

    def forward_features(self, x):
        return self.act(self.bn(self.conv(torch.tanh(self.stem(x)))))

    def forward(self, x):
        x = self.forward_features(x)
        return x if isinstance(self.head, nn.Identity) else self.head(x.mean((2, 3)))


def net(name="reducenet20", seed=0, **kwargs):
    """A timm model with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("reducenet"):
            kwargs = {"width": 0.25, **kwargs}
        return timm.create_model(name, num_classes=10, **kwargs)


def small(name="reducenet20", **kwargs):
    """`net` with one block a stage: for what the number of blocks has nothing to do with."""
    return net(name, depths=(1, 1, 1), **kwargs)


def randomized(model, seed=1):
    """`model`, in place, with random norms and biases: nothing is at a default that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    randomize_norms_(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.3)
    return model


def images(*size, n=2, dtype=torch.float32, seed=0):
    return torch.randn(n, *(size or (3, 16, 16)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rel(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def train_a_bit(model, *, steps=2, lr=0.1, size=(3, 16, 16)):
    """A few updates of SGD, in train mode, on random labels; leaves the gradients of the last one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    dtype = next(model.parameters()).dtype
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images(*size, n=8, dtype=dtype, seed=step)), torch.arange(8))
        loss.backward()
        optimizer.step()
    return model


@contextmanager
def untouched(*models):
    """Nothing that can be seen of the models changes, nor does the random stream of the process."""
    before = [_picture(m) for m in models]
    rng = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), rng), "the global random stream moved"
    for model, (modules, tensors) in zip(models, before, strict=True):
        now_modules, now_tensors = _picture(model)
        assert now_modules == modules
        assert list(now_tensors) == list(tensors)
        for key, (identity, value, requires_grad) in tensors.items():
            assert now_tensors[key][0] == identity, f"{key} is another object"
            assert now_tensors[key][1].dtype == value.dtype, key
            assert now_tensors[key][2] == requires_grad, key
            assert torch.equal(_bits(now_tensors[key][1]), _bits(value)), f"{key} changed"


def _bits(tensor):
    return tensor.reshape(-1).contiguous().view(torch.uint8)  # so that NaN equals itself


def _picture(model):
    modules = [
        (n, id(m), type(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules(remove_duplicate=False)
    ]
    tensors = {}
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensors[key] = (id(tensor), tensor.detach().clone(), tensor.requires_grad)
    return modules, tensors


def with_conv(conv, **kwargs):
    """A ConvNet around a conv of your own."""
    model = ConvNet(**kwargs)
    model.conv = copy.deepcopy(conv)
    return model


class Batches:
    """Random 8x8 batches as a function of the update, what a Trainer is fed with."""

    updates_per_epoch = 5
    batch_size = 6

    def batch(self, update):
        random = torch.Generator().manual_seed(update)
        images = torch.randn(self.batch_size, 3, 8, 8, generator=random).contiguous(memory_format=torch.channels_last)
        return images, torch.randint(10, (self.batch_size,), generator=random)
