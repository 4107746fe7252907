"""Whether xformers has kernels at all is found out from its extension, and a missing library is no crash."""

import ctypes
import sys
from types import ModuleType

import pytest
import torch

from tests.attention.conftest import draw
from unsloth_puzzles.attention import xformers
from unsloth_puzzles.attention.pattern import Pattern
from unsloth_puzzles.attention.xformers import Xformers, _not_loaded


@pytest.fixture
def install(monkeypatch):
    """Modules in the place of xformers and CUDA's runtime, and a list of the libraries that are asked for."""
    _not_loaded.cache_clear()

    def installed(built, runtime="there"):
        package, extension = ModuleType("xformers"), ModuleType("xformers._cpp_lib")
        package.__path__, extension._built_with_cuda = [], built
        package._cpp_lib = extension
        nvidia, cuda = ModuleType("nvidia"), ModuleType("nvidia.cuda_runtime")
        nvidia.__path__, cuda.__path__ = [], ["/somewhere/cuda_runtime"]
        nvidia.cuda_runtime = cuda
        modules = {"xformers": package, "xformers._cpp_lib": extension, "nvidia": nvidia, "nvidia.cuda_runtime": cuda}
        if runtime == "no package":
            modules["nvidia.cuda_runtime"] = None  # so Python reports it as not found
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        asked = []

        def load(path, mode):
            asked.append((path, mode))
            if runtime == "no library":
                raise OSError(f"{path}: cannot open shared object file: No such file or directory")

        monkeypatch.setattr(ctypes, "CDLL", load)
        return asked

    yield installed
    _not_loaded.cache_clear()


def test_xformers_gets_scale_mask_and_repeated_key_heads(install, monkeypatch):
    install(built=True)
    given, ops = [], ModuleType("xformers.ops")

    def memory_efficient_attention(query, key, value, **named):
        given.append((key.shape, value.shape, named))
        return query

    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    query, key, value = draw(9)
    assert torch.equal(Xformers().run(query, key, value, Pattern(), "the mask", 0.4), query)
    assert given == [((1, 18, 4, 16), (1, 18, 4, 16), {"attn_bias": "the mask", "scale": 0.4})]


def test_cuda_12_runtime_is_loaded_before_the_extension(install):
    asked = install(built=True)
    assert _not_loaded() is None
    # For all libraries that come later to see: the extension does not know where it lies.
    assert asked == [("/somewhere/cuda_runtime/lib/libcudart.so.12", ctypes.RTLD_GLOBAL)]


def test_missing_extension_is_a_reason(install):
    install(built=False)
    assert _not_loaded().startswith("the extension of xformers does not load here")
    assert "nvidia-cuda-runtime-cu12" in _not_loaded()


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("runtime", ["no library", "no package"])
def test_without_cuda_12s_runtime_the_extension_itself_decides(install, runtime, built):
    asked = install(built, runtime)
    reason = _not_loaded()
    assert reason is None if built else reason.startswith("the extension of xformers")
    assert len(asked) == (runtime == "no library")


def test_extension_is_looked_up_once(install):
    asked = install(built=True)
    assert _not_loaded() is _not_loaded() is None and len(asked) == 1


def test_extension_is_looked_up_for_a_gpu_only(install, monkeypatch):
    asked = install(built=False)
    monkeypatch.setattr(xformers.importlib.util, "find_spec", lambda name: object())
    assert Xformers().missing(torch.device("cpu")) == "it needs a CUDA GPU" and asked == []
    assert Xformers().missing(torch.device("cuda")) == _not_loaded()
    monkeypatch.setattr(xformers.importlib.util, "find_spec", lambda name: None)
    assert Xformers().missing(torch.device("cuda")) == "xformers is not installed here"
