"""Let accelerate use FSDP2 on CPUs, which it ignores there: for comparisons of losses alone."""

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import get_fsdp2_grad_scaler
from torch.distributed.fsdp import CPUOffloadPolicy

_plugins: list = []
_init = AcceleratorState.__init__


def _init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and not _plugins:
        _plugins.append(fsdp_plugin)
        if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # pinning needs a GPU
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
    if _plugins:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, _plugins[0]


AcceleratorState.__init__ = _init_with_fsdp


_make = Accelerator.__init__


def _make_with_scaler(self, *args, **kwargs):
    _make(self, *args, **kwargs)
    if self.mixed_precision == "fp16":  # what accelerate does on a GPU
        self.native_amp, self.scaler = True, get_fsdp2_grad_scaler(device="cpu")


Accelerator.__init__ = _make_with_scaler
