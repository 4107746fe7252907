"""Kernels by kind, their scale, and the record of GPU time, without a GPU."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.rehearsal import time_model as model
from tools.rehearsal.section import HOOK

HARDWARE = {"copy_bandwidth": 2.7e12, "matmul_flops": {"float16": 500e12, "float32": 60e12}}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", model.PRODUCT_16),
        ("nvjet_sm90_ssh_64x8_64x16_1x2_h_bz_TNT", model.PRODUCT_32),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_execute", model.PRODUCT_16),
        ("ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_64x3_nn", model.PRODUCT_16),
        ("ampere_sgemm_128x64_nn", model.PRODUCT_32),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize32x32x8_stage3", model.PRODUCT_32),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize128x128", model.PRODUCT_TF32),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x2_tn_align8>", model.PRODUCT_16),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __half, float, __half>", model.PRODUCT_16),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::half_t>>", model.PRODUCT_16),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::Params)", model.PRODUCT_32),
        ("void gemv2T_kernel_val<int, int, __half, __half, float, 128>", model.BYTES),
        ("kDequantizeBlockwise<__half, 512, 64, 8, 2>", model.BYTES),
        ("triton_poi_fused_add_0", model.BYTES),
        ("triton_tem_fused_flex_attention_0", model.DOT_16),
        ("own_dot", model.DOT_TF32),
        ("own_copy", model.BYTES),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", model.BYTES),
        ("Memcpy HtoD (Pageable -> Device)", model.TRANSFER),
        ("Memcpy DtoD (Device -> Device)", model.BYTES),
    ],
)
def test_kernels_by_kind(name: str, kind: str) -> None:
    assert model.kind(name, {"own_dot": "tf32", "own_copy": ""}) == kind


def test_time_beyond_the_floor_is_scaled() -> None:
    windows = [{"kernels": {"nvjet_sm90_hsh_1_": [1, 102.0, 100.0], "copy": [2, 24.0, 20.0]}, "busy": 1.0, "hook": 0.5}]
    windows[0]["kernels"]["Memcpy DtoH (Device -> Pageable)"] = [1, 1000.0, 998.0]
    found = model.predict(10.0, windows, 2.0, {}, HARDWARE)
    assert found["host seconds here"] == pytest.approx(10 - 1 - 0.5 - 2)
    gpu = (2 + 100 * 20) + (4 + 20 * 10) + 2 * 1000  # microseconds: 500 over 25 TFLOP/s, 2.7 over 0.27 TB/s, the bus
    assert found["predicted T4 GPU seconds"] == pytest.approx(gpu / 1e6)
    assert found["predicted T4 seconds"] == pytest.approx(2 * 6.5 + gpu / 1e6)


def test_unmeasured_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="rates"):
        model.scales({"copy_bandwidth": None, "matmul_flops": {}})


def test_overlapping_kernels_are_busy_once() -> None:
    hook = _hook()
    found = hook.summary([("a", 0, 10_000), ("b", 5_000, 10_000), ("a", 30_000, 1_000)])
    assert found["busy"] == pytest.approx(16e-6)
    assert found["kernels"] == {"a": [2, 11.0, 8.0], "b": [1, 10.0, 8.0]}


def test_our_window_makes_way_and_its_failure_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_PUZZLES_RECORD", str(tmp_path))
    hook, torch, log = _hook(), *_fake_torch()
    hook.install(torch)
    other = torch.autograd.profiler.profile(use_cpu=True)
    other._prepare_trace()
    other._start_trace()
    other.__exit__(None, None, None)
    hook._close()
    assert log == ["start ours", "stop ours", "start other", "stop other", "start ours", "stop ours"]
    torch.autograd.profiler.profile.broken = True
    hook._open()
    lines = [json.loads(line) for path in (tmp_path / "gpu_time").iterdir() for line in path.read_text().splitlines()]
    closed = [line for line in lines if "window" in line]
    assert [line["kernels"] for line in closed] == [{"kernel": [1, 5.0, 3.0]}] * 3
    assert [line["launches"] for line in closed] == [1, 1, 1]
    assert "no profiler" in lines[-1]["failed"]


def _hook():
    spec = importlib.util.spec_from_file_location("hook_of_gpu_time", HOOK / "_rehearsal_gpu_time.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.atexit = SimpleNamespace(register=lambda *_: None)
    return module


def _fake_torch():
    log: list[str] = []

    def event(name: str, kind: str):
        of = {"name": name, "device_type": kind, "start_ns": 0, "duration_ns": 5000, "is_user_annotation": False}
        return SimpleNamespace(**{key: (lambda value=value: value) for key, value in of.items()})

    class Profile:
        broken = False

        def __init__(self, use_cpu: bool, use_device: str = "cuda", use_kineto: bool = True) -> None:
            assert use_cpu or use_kineto, "Device-only events supported only with Kineto"
            self.who, self.kineto_activities = "other" if use_cpu else "ours", {"CUDA"}

        def _prepare_trace(self) -> None:
            if self.broken:
                raise RuntimeError("no profiler")

        def _start_trace(self) -> None:
            log.append(f"start {self.who}")

        def __exit__(self, *_) -> None:
            log.append(f"stop {self.who}")
            events = [event("kernel", "CUDA"), event("cudaLaunchKernel", "CPU"), event("Stream Sync", "CUDA")]
            self.kineto_results = SimpleNamespace(events=lambda: events)

    profiler = SimpleNamespace(profile=Profile, _set_is_profiler_enabled=lambda _: None)
    torch = SimpleNamespace(
        autograd=SimpleNamespace(profiler=profiler, DeviceType=SimpleNamespace(CUDA="CUDA")),
        cuda=SimpleNamespace(_lazy_call=lambda call: call(), synchronize=lambda: None),
        profiler=SimpleNamespace(ProfilerActivity=SimpleNamespace(CUDA="CUDA")),
    )
    return torch, log
