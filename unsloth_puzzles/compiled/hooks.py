"""Find hooks on modules, which compiled code does not look for.

Dynamo leaves hooks out of its guards (`torch._dynamo.config.skip_nnmodule_hook_guards`): a hook registered after the
first call would have no effect, and one that is removed would stay. PEFT hands adapters to the rows of a batch by such
hooks (`adapter_names`). So a layer with hooks inside runs uncompiled, and fused modules run as they were before.

The search takes about ten microseconds a layer and call, for 83 modules.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter

import torch
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils import output_capturing

_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked_below(module: torch.nn.Module) -> str | None:
    """Find a hook that compiled code of `module` would miss.

    Hooks on `module` itself do not count: they run around its forward, compiled or not.

    Returns:
        The name of the submodule, such as "mlp.act_fn", or "all modules" for a global hook. None if there is none, and
        while a compiler traces: the caller of compiled code has looked before.
    """
    return None if torch.compiler.is_compiling() else search(module)[0]


def hooked(module: torch.nn.Module) -> bool:
    """Whether `module` itself has hooks, or one below it."""
    return not _idles(module) or hooked_below(module) is not None


def search(module: torch.nn.Module) -> tuple[str | None, list[torch.nn.Module]]:
    """Find a hook as `hooked_below` does.

    Returns:
        Its place, and the modules below whose hooks are all idle (see `hidden`).
    """
    if _has_any_global_hook():
        return "all modules", []
    found, idle = list(module._modules.values()), []
    for below in found:
        if below is None:
            continue
        known = below.__dict__
        if any(_HOOKS(known)):
            if not _idles(below):
                return next(name for name, one in module.named_modules() if one is below), []
            idle.append(below)
        if known["_modules"]:
            found += known["_modules"].values()
    return None, idle


@contextmanager
def hidden(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Keep the forward hooks of `modules` from a compiler, which cannot trace those of transformers."""
    kept = [(module._forward_hooks, dict(module._forward_hooks)) for module in modules]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


def _idles(module: torch.nn.Module) -> bool:
    forward, *others = _HOOKS(module.__dict__)
    return not any(others) and all(map(_is_idle, forward.values()))


def _is_idle(hook: Callable) -> bool:
    """Whether it is one of those by which transformers collects outputs, and does nothing in this call.

    They come with the first call that asks for hidden states, attentions or the like, and stay for good. One that is
    not recognised counts as any other hook.
    """
    if getattr(hook, "__qualname__", "") != "install_output_capuring_hook.<locals>.output_capturing_hook":
        return False
    free = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
    return free["key"].cell_contents not in (output_capturing._active_collector.get() or ())
