"""Gradient checkpointing (arXiv:1604.06174) of decoder layers whose inputs wait for the backward in CPU memory.

    forward    the last layer's x -> CPU, on a stream of its own      y = layer(x), no graph
    backward   the next layer's x -> GPU                              y = layer(x) with a graph, and its gradients
                                                                      (`unread`: without what only y depends on)

Of a layer nothing stays on the GPU between the two, not even its input, but for the last one, which is wanted first:
copying 32 MiB (8192 tokens, hidden size 2048, 16 bits) takes less than a millisecond, a layer's forward about two.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from unsloth_puzzles.backprop.rng import RandomStates
from unsloth_puzzles.backprop.switches import switches
from unsloth_puzzles.compiled.hooks import hooked
from unsloth_puzzles.compiled.offload import Store
from unsloth_puzzles.compiled.unread import output_unread
from unsloth_puzzles.exchange import exchange_classes, subclass

_FUNCTION = "_gradient_checkpointing_func"  # what transformers calls, and sets in `gradient_checkpointing_enable`


def checkpoint_inputs(layers: Iterable[torch.nn.Module], *, offload: bool = True) -> Callable[[], None]:
    """Let `layers` of transformers checkpoint as above whenever gradient checkpointing is on, now or later.

    The settings of transformers' own checkpointing have no effect until undo. A warning says so if it was to be
    reentrant. A layer with hooks, on itself or inside, is checkpointed by PyTorch's function without reentrance, with a
    warning: what hooks record has a graph there, and hooks that exchange the parameters (FSDP2's) run before these are
    read.

    Args:
        layers: changed in place; those that are not `GradientCheckpointingLayer` stay as they are.
        offload: False leaves the inputs on the GPU.

    Returns:
        A function that undoes it.

    Raises:
        RuntimeError: in the backward, of the same forward for a second time (`retain_graph=True`), after undo, of a
            layer that was changed since, or if it reaches a tensor that is neither the hidden states nor a parameter
            that the layer had in its forward.
    """
    store, chosen = Store(offload), [layer for layer in layers if isinstance(layer, GradientCheckpointingLayer)]
    for layer in chosen:
        _say_if_reentrant(vars(layer).get(_FUNCTION))
    # One for each class, not for each layer: compiled code is kept by the class.
    classes = {cls: _checkpointed_class(cls, store) for cls in map(type, chosen)}
    undo_classes = exchange_classes((layer, classes[type(layer)]) for layer in chosen)

    def undo() -> None:
        undo_classes()
        store.closed = True

    return undo


def _checkpointed_class(cls: type, store: Store) -> type:
    """`cls` with the function that transformers looks up replaced, also for who sets it later (`Trainer` does)."""

    def function(self):
        return partial(_checkpointed, self, store)

    def set_function(self, given):
        _say_if_reentrant(given)
        vars(self)[_FUNCTION] = given

    # accelerate, FSDP and PEFT look for decoder layers by the name of their class.
    return subclass(cls, cls.__name__, **{_FUNCTION: property(function, set_function)})


def _say_if_reentrant(function: Callable | None) -> None:
    if getattr(function, "keywords", {}).get("use_reentrant", False):
        warnings.warn(
            "use_reentrant: was True; while compiled, layers are checkpointed by compile_qlora's own function, which "
            "returns the gradients instead of writing them",
            stacklevel=3,
        )


def _checkpointed(layer, store: Store, run: Callable, hidden_states: torch.Tensor, *others: object) -> torch.Tensor:
    if others:
        raise ValueError(f"args must be the hidden states alone, got {len(others)} more; pass them by keyword")
    if not torch.is_grad_enabled():
        return run(hidden_states)
    if store.closed or isinstance(layer, FSDPModule):  # a copy made before undo; weights that hooks gather again
        return checkpoint(run, hidden_states, use_reentrant=False)
    if hooked(layer):
        text = "has hooks; meanwhile torch.utils.checkpoint checkpoints it, and its inputs are not offloaded"
        warnings.warn(f"hooks: {type(layer).__name__} {text}", stacklevel=2)
        return checkpoint(run, hidden_states, use_reentrant=False)
    for name, given in getattr(run, "keywords", {}).items():
        if any(tensor.requires_grad for tensor in _tensors(given)):
            raise ValueError(
                f"{name} must not require gradients, got one that does: only the hidden states get gradients"
            )
    found = (parameter for module in _modules(layer) for parameter in module._parameters.values())
    # A parameter that is there twice gets its gradient once.
    parameters = dict.fromkeys(parameter for parameter in found if parameter is not None and parameter.requires_grad)
    return _Checkpoint.apply(run, layer, store, hidden_states, *parameters)


def _modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """`module` and all below it, as `modules()` would give them, in a tenth of the time."""
    found = [module]
    for below in found:
        found += [one for one in below._modules.values() if one is not None]
    return found


def _tensors(given: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, layer, store, hidden_states, *parameters):
        ctx.run, ctx.layer, ctx.store, ctx.parameters = run, layer, store, parameters
        ctx.autocast = _autocast(hidden_states.device.type)
        ctx.state = _state(layer, parameters)
        ctx.kept = store.put(hidden_states)
        states = RandomStates(hidden_states.device)
        states.record("forward")
        output = run(hidden_states)
        ctx.random_states = states if states.moved("forward") else None
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"layer must return a tensor to be checkpointed, got a {type(output).__name__}")
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        if ctx.store.closed:
            raise RuntimeError(
                "backward must run before undo(), got one after it: the layers have changed since the forward"
            )
        if _state(ctx.layer, ctx.parameters) != ctx.state:
            raise RuntimeError(
                f"{type(ctx.layer).__name__} must be as in its forward, which the backward repeats, got one that was "
                "switched between train() and eval() or to other adapters or scales, or whose parameters were changed "
                "in place"
            )
        needs = ctx.needs_input_grad[3:]
        hidden_states = ctx.store.take(ctx.kept).requires_grad_(needs[0])
        seen = "forward" in vars(ctx.layer) or hooked(ctx.layer)  # by a forward around the layer's own, or by hooks
        unread = output_unread(None if seen else ctx.layer)
        with torch.enable_grad(), ctx.autocast(), _as_before(ctx.random_states), unread:
            output = ctx.run(hidden_states)  # of which only the graph is used
        inputs = (hidden_states, *ctx.parameters)
        reached, given = _leaves(output), set(map(id, inputs))
        frozen = [one for one, need in zip(inputs, needs, strict=True) if need and not one.requires_grad]
        if lost := [*frozen, *(one for one in reached if id(one) not in given)]:
            raise RuntimeError(
                f"parameters must be those of the forward, trained as then, got {_named(lost, ctx.layer)}, whose "
                "gradients would be lost"
            )
        gradients = torch.autograd.grad(output, reached, gradient) if reached else ()
        found = dict(zip(reached, gradients, strict=True))
        return None, None, None, *map(found.get, inputs)  # None: of an adapter that is not active, for one


def _state(layer: torch.nn.Module, parameters: tuple[torch.nn.Parameter, ...]) -> tuple[list, list]:
    """Return the switches and versions that, once changed, make another run of the layer compute something else."""
    return switches(_modules(layer)), [parameter._version for parameter in parameters]


def _leaves(output: torch.Tensor) -> list[torch.Tensor]:
    """The leaves that a backward of `output` reaches."""
    nodes, leaves = [] if output.grad_fn is None else [output.grad_fn], []
    seen = set(nodes)  # of Python's objects for nodes, which last as long as `nodes` holds them
    for node in nodes:
        if isinstance(node, torch._C._functions.AccumulateGrad):
            leaves.append(node.variable)
            continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                nodes.append(below)
    return leaves


def _named(tensors: Iterable[torch.Tensor], layer: torch.nn.Module) -> str:
    names = {parameter: name for name, parameter in layer.named_parameters()}
    return ", ".join(names.get(one, f"a tensor {tuple(one.shape)} from outside of it") for one in tensors)


def _autocast(kind: str) -> Callable:
    """Return a maker of autocast as it is now: the backward runs outside of the forward's."""
    return partial(
        torch.autocast,
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


@contextlib.contextmanager
def _as_before(states: RandomStates | None) -> Iterator[None]:
    """The generators as they were before the forward, if it has drawn any numbers."""
    if states is None:
        yield
        return
    with states.replay() as at:
        at("forward")
        yield
