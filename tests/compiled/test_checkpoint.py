"""Checkpointed inputs: gradients are those of the layer without checkpointing, with dropout, autocast and hooks."""

import copy
import gc
import warnings
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from unsloth_puzzles.compiled.checkpoint import Store, checkpoint_inputs


class Layer(GradientCheckpointingLayer):
    def __init__(self, dropout):
        super().__init__()
        self.frozen, self.trained = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6)
        self.dropout, self.calls = nn.Dropout(dropout), 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        return x + scale * self.trained(self.dropout(torch.tanh(self.frozen(x))))


def make(dropout=0.0, count=3, on=True, cls=Layer):
    torch.manual_seed(0)
    layers = nn.ModuleList(cls(dropout) for _ in range(count)).train()
    for layer in layers:
        layer.gradient_checkpointing = on
    return layers


def step(layers, x, context=torch.enable_grad):
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with context():
        out = x
        for layer in layers:
            out = layer(out, scale=2.0)
    parameters = [p for p in layers.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *parameters])]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("context", [torch.enable_grad, autocast])
def test_checkpointed_gradients_are_bit_identical(dropout, context):
    x = torch.randn(4, 6)
    expected = step(make(dropout, on=False), x, context)
    layers = make(dropout)
    checkpoint_inputs(layers)
    found = step(layers, x, context)
    assert [layer.calls for layer in layers] == [2, 2, 2]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    after = torch.rand(1)
    step(make(dropout, on=False), x, context)
    assert torch.equal(after, torch.rand(1))  # the backward has left the generator as it was


class Noisy(Layer):
    """Draws random numbers itself, not by dropout."""

    def forward(self, x, scale=1.0):
        return x + scale * self.trained(torch.tanh(x) * torch.rand_like(x))


def test_random_numbers_of_a_layer_are_replayed_in_the_backward():
    found = []
    for on in (False, True):
        layers = make(on=on)
        for layer in layers:
            layer.__class__ = Noisy
        if on:
            checkpoint_inputs(layers)
        found.append(step(layers, torch.linspace(-1, 1, 24).view(4, 6)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_gradients_accumulate_for_an_input_without_gradient():
    layers, plain = make(), make(on=False)
    checkpoint_inputs(layers)
    for _ in range(2):
        for each in (layers, plain):
            out = torch.ones(2, 6)
            for layer in each:
                out = layer(out)
            out.sum().backward()
    for one, other in zip(layers.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


def test_layer_runs_once_without_gradients_or_in_eval_mode():
    layers = make()
    checkpoint_inputs(layers)
    with torch.no_grad():
        layers[0](torch.ones(2, 6))
    layers.eval()[1](torch.ones(2, 6)).sum().backward()
    assert [layer.calls for layer in layers] == [1, 1, 0]


def test_second_backward_is_refused():
    layers = make()
    checkpoint_inputs(layers)
    loss = layers[0](torch.ones(2, 6)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^backward must run once for each forward"):
        loss.backward()


def test_backward_after_undo_is_refused():
    layers = make()
    undo = checkpoint_inputs(layers)
    loss = layers[0](torch.ones(2, 6)).sum()
    undo()
    with pytest.raises(RuntimeError, match=r"^backward must run before undo"):
        loss.backward()


def test_keyword_that_requires_gradients_is_refused():
    layers = make()
    checkpoint_inputs(layers)
    with pytest.raises(ValueError, match=r"^scale must not require gradients, got one that does"):
        layers[0](torch.ones(2, 6), scale=torch.ones(6, requires_grad=True))


def gradients(layers, hooked=()):
    """Gradients of a loss of the layers' output and of tensors that hooks on the `hooked` ones keep."""
    kept, out = [], torch.linspace(-1, 1, 12).view(2, 6)
    handles = [layer.trained.register_forward_hook(lambda *call: kept.append(call[2])) for layer in hooked]
    for layer in layers:
        out = layer(out)
    loss = torch.stack([one.square().sum() for one in (out, *kept)]).sum()
    for handle in handles:
        handle.remove()
    loss.backward()
    return [p.grad for p in layers.parameters() if p.requires_grad]


@pytest.mark.parametrize("change", ["exchanged", "frozen"])
def test_parameter_exchanged_or_frozen_before_backward_is_refused(change):
    layers = make()
    checkpoint_inputs(layers)
    loss = layers[0](torch.ones(2, 6, requires_grad=True)).sum()
    if change == "exchanged":  # as sharding frameworks do
        layers[0].trained.bias = nn.Parameter(torch.zeros(6))
    else:
        layers[0].trained.bias.requires_grad_(False)
    with pytest.raises(
        RuntimeError,
        match=r"^parameters must be those of the forward.* got trained\.bias, whose",
    ):
        loss.backward()


@pytest.mark.parametrize("change", ["mode", "mode inside", "scale of adapters", "value"])
def test_layer_changed_before_backward_is_refused(change):
    layers = make()
    layers[0].trained.scaling = {"default": 1.0}  # as PEFT's layers have it
    checkpoint_inputs(layers)
    loss = layers[0](torch.ones(2, 6, requires_grad=True)).sum()
    if change == "mode":
        layers[0].eval()
    elif change == "mode inside":
        layers[0].trained.eval()
    elif change == "scale of adapters":
        layers[0].trained.scaling["default"] = 3.0
    else:
        with torch.no_grad():
            layers[0].trained.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"^Layer must be as in its .* switched between train\(\) and eval\(\)"):
        loss.backward()


def test_trained_tensor_from_outside_the_layer_is_refused():
    shared = torch.ones(6, requires_grad=True)

    class Shared(Layer):
        def forward(self, x):
            return super().forward(x) * (2 * shared)

    layers = make(cls=Shared)
    checkpoint_inputs(layers)
    with pytest.raises(RuntimeError, match=r"^parameters must be .* got a tensor \(6,\) from outside of it, whose"):
        layers[0](torch.ones(2, 6)).sum().backward()


def test_unused_parameters_have_no_gradient():
    layers, plain = make(), make(on=False)
    for each in (layers, plain):
        for layer in each:
            layer.extra = nn.Linear(6, 6)
    checkpoint_inputs(layers)
    for one, other in zip(gradients(layers), gradients(plain), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)

    class Unused(Layer):
        def forward(self, x):
            return x * 2

    (lone,) = make(count=1, cls=Unused)
    checkpoint_inputs([lone])
    lone(torch.ones(2, 6)).sum().backward()
    assert lone.trained.weight.grad is None


def test_gradients_flow_through_tensors_that_hooks_keep():
    layers, plain = make(), make(on=False)
    expected, without = gradients(plain, hooked=plain), gradients(make(on=False))
    checkpoint_inputs(layers)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = gradients(layers, hooked=layers)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [str(one.message)[:23] for one in said] == ["hooks: Layer has hooks;"] * 3
    assert not any(torch.equal(one, other) for one, other in zip(found, without, strict=True))


@pytest.mark.filterwarnings("error:hooks. FSDPLayer has hooks")
@pytest.mark.parametrize("whole", [False, True])
def test_under_fsdp2_gradients_reach_the_shards(whole):
    expected = gradients(make(on=False))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        layers = make()
        checkpoint_inputs(layers)
        sharded = nn.ModuleList([nn.Sequential(*layers)]) if whole else layers
        for one in sharded:
            fully_shard(one, mesh=init_device_mesh("cpu", (1,)))
        found = [gradient.full_tensor() for gradient in gradients(sharded)]
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_dropped_graph_releases_its_inputs():
    store = Store(offload=True)
    first, second = store.put(torch.ones(3)), store.put(torch.ones(3))
    del second
    gc.collect()
    assert torch.equal(store.take(first), torch.ones(3)) and store._waiting == []
    for _ in range(3):
        store.put(torch.ones(3))
    assert len(store._waiting) == 1


def test_checkpointing_settings_are_restored_and_reentrant_warns():
    layers = make()
    theirs = layers[0]._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undo = checkpoint_inputs(layers)
    reentrant = partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    with pytest.warns(UserWarning, match="^use_reentrant: was True; while compiled"):
        layers[1]._gradient_checkpointing_func = reentrant  # as transformers' Trainer does when it starts
    assert layers[1](torch.ones(2, 6)).requires_grad and layers[1].calls == 1
    undo()
    assert type(layers[0]) is Layer
    assert layers[0]._gradient_checkpointing_func is theirs and layers[1]._gradient_checkpointing_func is reentrant
    with pytest.warns(UserWarning, match="^use_reentrant"):
        checkpoint_inputs(layers)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [True, False])
def test_offloaded_inputs_are_bit_identical_and_leave_the_gpu(offload):
    x = torch.randn(4096, 6, device="cuda")
    expected = step(make(0.3, on=False).cuda(), x)
    layers = make(0.3).cuda()
    checkpoint_inputs(layers, offload=offload)
    for _ in range(3):
        for one, other in zip(step(layers, x), expected, strict=True):
            assert torch.equal(one, other)
    wide = torch.randn(1 << 20, 6, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    out = wide
    for layer in layers:
        out = layer(out)
    torch.cuda.synchronize()
    held = (torch.cuda.memory_allocated() - before) / wide.nbytes
    inputs = 1 if offload else 2  # beside the output; the first layer's is there before
    assert abs(held - 1 - inputs) < 0.1


def test_copy_made_before_undo_can_be_trained_afterwards():
    layers, x = make(), torch.randn(4, 6)
    expected = step(make(on=False), x)
    undo = checkpoint_inputs(layers)
    copied = copy.deepcopy(layers)
    undo()
    for ours, theirs in zip(step(copied, x), expected, strict=True):
        assert torch.equal(ours, theirs)
