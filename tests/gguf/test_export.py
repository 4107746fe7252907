"""The files hold the merged weights in the engine's layout; what the engine cannot hold is refused before a file is."""

import copy
import os
import signal
import subprocess
import sys
import warnings

import gguf
import numpy as np
import pytest
import torch
from transformers import BitNetQuantConfig
from transformers.integrations.bitnet import replace_with_bitnet_linear

from benchmarks.gguf.models import FAMILIES, LLAMA3_ROPE, tiny
from tests.gguf.models import lora, qlora
from unsloth_puzzles.gguf import writer
from unsloth_puzzles.gguf.export import export_gguf
from unsloth_puzzles.gguf.merge import merged_state_dict


def read(path):
    """Fields and tensors of a file, the tensors in float32."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    return fields, {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}


def halves(rows, heads):
    """Rows as transformers has them, of rows whose rotated pairs are neighbours."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_float32_file_holds_the_merged_weights(tmp_path, options):
    model, tokenizer = lora(text={"rope_parameters": LLAMA3_ROPE, "attention_bias": True}, **options)
    path, projector = export_gguf(model, tokenizer, tmp_path, "f32", progress=False)
    fields, tensors = read(path)
    merged = merged_state_dict(model)
    assert projector is None and sorted(one.name for one in tmp_path.iterdir()) == ["Modelfile", "model-f32.gguf"]
    inner = "model.layers.1."
    for name, own, heads in (
        ("attn_q.weight", "self_attn.q_proj.weight", 4), ("attn_k.weight", "self_attn.k_proj.weight", 2),
        ("attn_q.bias", "self_attn.q_proj.bias", 4), ("attn_v.weight", "self_attn.v_proj.weight", None),
        ("ffn_down.weight", "mlp.down_proj.weight", None), ("ffn_norm.weight", "post_attention_layernorm.weight", None),
    ):  # fmt: skip
        found = tensors[f"blk.1.{name}"]
        assert torch.equal(halves(found, heads) if heads else found, merged[inner + own]), name
    assert torch.equal(tensors["token_embd.weight"], merged["model.embed_tokens.weight"])
    assert "output.weight" not in tensors and len(tensors) == 2 * 13 + 2 + 1
    assert fields["llama.feed_forward_length"] == 96 and fields["llama.attention.head_count_kv"] == 2
    inverse = model.get_base_model().model.rotary_emb.inv_freq
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / tensors["rope_freqs.weight"], inverse, rtol=1e-6)
    assert tensors["rope_freqs.weight"].min() == 1 and tensors["rope_freqs.weight"].max() == 8


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_projector_file_has_each_parameter_of_tower_and_projector(tmp_path, family):
    model, processor = tiny(family)
    _, path = export_gguf(model, processor, tmp_path, "f16", "f32", progress=False)
    fields, tensors = read(path)
    merged = merged_state_dict(model)
    parts = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.")
    seen = [name for name in merged if name.startswith(parts)]
    if "llava" in family:  # the last layer is not computed, nor what is behind it
        seen = [name for name in seen if ".layers.2." not in name and "post_layernorm" not in name]
        assert fields["clip.vision.block_count"] == 2 and fields["clip.vision.feature_layer"] == [2]
    assert sum(value.numel() for value in tensors.values()) == sum(merged[name].numel() for name in seen)
    if family.startswith("qwen"):
        kernel = merged["model.visual.patch_embed.proj.weight"]
        assert torch.equal(tensors["v.patch_embd.weight.1"], kernel[:, :, 1])
        assert not torch.equal(kernel[:, :, 1], kernel[:, :, 0])
    if family == "qwen2_5_vl":
        assert fields["clip.vision.n_wa_pattern"] == 2 and fields["clip.use_silu"]
        qkv = merged["model.visual.blocks.3.attn.qkv.bias"]
        assert torch.equal(torch.cat([tensors[f"v.blk.3.attn_{one}.bias"] for one in "qkv"]), qkv)


def test_four_bit_model_is_written_from_its_own_weights(tmp_path):
    from benchmarks.gguf.models import tokenizer

    model = qlora()
    made = tokenizer("smollm")
    model.get_base_model().resize_token_embeddings(len(made) + 5)
    path, _ = export_gguf(model, made, tmp_path, "f32", progress=False)
    fields, tensors = read(path)
    merged = merged_state_dict(model)
    assert torch.equal(tensors["blk.0.attn_v.weight"], merged["model.layers.0.self_attn.v_proj.weight"])
    assert tensors["token_embd.weight"].shape[0] == fields["llama.vocab_size"] == len(made) + 5
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{len(made) + 4}]"


def test_trained_head_is_written_beside_the_embedding(tmp_path):
    model, tokenizer = lora(target_modules=["lm_head", "q_proj"])
    _, tensors = read(export_gguf(model, tokenizer, tmp_path, "f32", progress=False)[0])
    assert torch.equal(tensors["output.weight"], merged_state_dict(model)["lm_head.weight"])
    assert not torch.equal(tensors["output.weight"], tensors["token_embd.weight"])


def test_rows_that_blocks_do_not_divide_are_counted(tmp_path):
    model, tokenizer = tiny("llama", hidden_size=80, head_dim=20)
    with pytest.warns(UserWarning, match=r"that q8_0 does not fit are kept in other types: 13 with rows of 80 in F16"):
        path, _ = export_gguf(model, tokenizer, tmp_path, progress=False)
    types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == "F16" and types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"


@pytest.mark.parametrize("quantization", ["bf16", "q4_0", "q5_1", "q4_k_m", "q6_k"])
def test_types_of_the_file(tmp_path, quantization):
    model, tokenizer = tiny("llama", hidden_size=256, head_dim=64, intermediate_size=512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path, _ = export_gguf(model, tokenizer, tmp_path, quantization, progress=False)
    reader = gguf.GGUFReader(path)
    types = {one.tensor_type.name for one in reader.tensors if len(one.shape) > 1}
    expected = {"bf16": {"BF16"}, "q4_0": {"Q4_0"}, "q5_1": {"Q5_1"}, "q6_k": {"Q6_K"}, "q4_k_m": {"Q4_K", "Q6_K"}}
    assert types == expected[quantization]
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{quantization.upper()}"]


def test_export_that_fails_leaves_no_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    model, tokenizer = tiny("llama")
    (tmp_path / "model-f32.gguf").write_bytes(b"old")
    monkeypatch.setattr(writer, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_gguf(model, tokenizer, tmp_path, "f32", progress=False)
    assert [one.name for one in tmp_path.iterdir()] == ["model-f32.gguf"]
    assert (tmp_path / "model-f32.gguf").read_bytes() == b"old"


def _old_files(folder):
    old = {name: name.encode() for name in ("model-f32.gguf", "mmproj-f32.gguf", "Modelfile")}
    for name, content in old.items():
        (folder / name).write_bytes(content)
    return old


def _files(folder):
    return {one.name: one.read_bytes() for one in folder.iterdir()}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_projector_that_fails_keeps_the_old_text_model(error, tmp_path, monkeypatch):
    model, processor = tiny("qwen2_vl")
    old, encode, seen = _old_files(tmp_path), writer.encode, []

    def failing(chunk, kind, name):
        seen.append(name)
        if name.startswith("v.blk.3"):
            raise error
        return encode(chunk, kind, name)

    monkeypatch.setattr(writer, "encode", failing)
    with pytest.raises(error):
        export_gguf(model, processor, tmp_path, "f32", "f32", progress=False)
    assert "token_embd.weight" in seen and _files(tmp_path) == old


def test_files_get_their_names_when_all_are_whole(tmp_path, monkeypatch):
    model, processor = tiny("qwen2_vl")
    export_gguf(model, processor, tmp_path / "whole", "f32", "f32", progress=False)
    whole, out, replace, renamed = _files(tmp_path / "whole"), tmp_path / "out", os.replace, []
    out.mkdir()
    old = _old_files(out)

    def watched(source, target):
        if not renamed:  # whoever is killed before this has the files of the earlier export
            unfinished = {
                f"{name}.{writer._host()}.{os.getpid()}.unfinished": content for name, content in whole.items()
            }
            assert _files(out) == {**old, **unfinished}
        renamed.append(target.name)
        replace(source, target)

    monkeypatch.setattr(writer.os, "replace", watched)
    export_gguf(model, processor, out, "f32", "f32", progress=False)
    assert renamed == [*old] and _files(out) == whole


KILLED = """
import os, signal, sys
from benchmarks.gguf.models import tiny
from unsloth_puzzles.gguf import writer
from unsloth_puzzles.gguf.export import export_gguf

encode, seen = writer.encode, []
def killed(chunk, kind, name):
    seen.append(name)
    if len(seen) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(chunk, kind, name)

writer.encode = killed
export_gguf(*tiny("llama"), sys.argv[1], "f32", progress=False)
"""


@pytest.mark.slow  # a process that imports transformers
def test_export_that_is_killed_leaves_no_file_under_a_final_name(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [one.name for one in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith("model-f32.gguf.") and left[0].endswith(".unfinished")
    path, _ = export_gguf(*tiny("llama"), tmp_path, "q8_0", progress=False)
    assert {*_files(tmp_path)} == {"model-q8_0.gguf", "Modelfile"} and read(path)


def test_files_of_other_processes_that_run_are_kept(tmp_path):
    """A process of which only the number is left is told from one that runs, such as the parent of this one."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    here = writer._host()
    kept = {
        f"model-f32.gguf.{here}.{os.getppid()}.unfinished",
        f"model-f32.gguf.another-{here}.{ended.pid}.unfinished",
        "model-f32.gguf.unfinished",
        f"own.{here}.{ended.pid}.unfinished",
    }
    for name in (*kept, f"model-f16.gguf.{here}.{ended.pid}.unfinished", f"Modelfile.{here}.{ended.pid}.unfinished"):
        (tmp_path / name).touch()
    with writer.named_at_the_end([tmp_path / "model-f32.gguf"]) as (unfinished,):
        unfinished.write_bytes(b"whole")
    assert {*_files(tmp_path)} == {*kept, "model-f32.gguf"}


@pytest.mark.parametrize(
    "room",
    [
        lambda path: 64, lambda path: gguf.GGUFReader(path).data_offset - 1,  # the padding before the data is buffered
        *(lambda path, missing=missing: path.stat().st_size - missing for missing in (200_000, 5000, 40, 1)),
    ],
    ids=["metadata", "padding", "200000", "5000", "40", "1"],
)  # fmt: skip
def test_disk_that_is_full_is_an_error_and_leaves_no_file(room, tmp_path):
    resource = pytest.importorskip("resource")
    model, tokenizer = tiny("llama")
    path, _ = export_gguf(model, tokenizer, tmp_path / "whole", "f32", progress=False)
    out = tmp_path / "out"
    out.mkdir()
    old = _old_files(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room(path), hard))
    try:
        with pytest.raises(OSError, match="too large"):
            export_gguf(model, tokenizer, out, "f32", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _files(out) == old


def test_chunks_change_no_byte(tmp_path, monkeypatch):
    model, tokenizer = tiny("llama")
    whole = export_gguf(model, tokenizer, tmp_path / "whole", progress=False)[0].read_bytes()
    monkeypatch.setattr(writer.Weight.chunks, "__defaults__", (1, 200))
    cut = export_gguf(model, tokenizer, tmp_path / "cut", progress=False)[0].read_bytes()
    assert cut == whole


def test_modelfile_names_both_files(tmp_path):
    model, processor = tiny("qwen2_vl")
    export_gguf(model, processor, tmp_path, "q8_0", "q8_0", progress=False)
    expected = 'FROM ./model-q8_0.gguf\nFROM ./mmproj-q8_0.gguf\nPARAMETER stop "<|im_end|>"\n'
    assert (tmp_path / "Modelfile").read_text() == expected


def test_tokens_that_end_a_generation(tmp_path):
    """The file has room for three. The Modelfile has the added ones of all, an ordinary token is text to it."""
    model, tokenizer = tiny("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    call, start, eos = map(tokenizer.convert_tokens_to_ids, ("<|call|>", "<|im_start|>", "<|im_end|>"))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config.eos_token_id = [start, eos, 70, call]
    warning = rf"room for 3 tokens .* llama\.cpp does not stop at {call} \('<\|call\|>'\); give it their text as stop"
    with pytest.warns(UserWarning, match=warning) as caught:
        path, _ = export_gguf(model, tokenizer, tmp_path, "f32", progress=False)
    assert caught[0].filename == __file__
    fields, _ = read(path)
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [eos, start, 70]
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[1:] == [f'PARAMETER stop "{token}"' for token in ("<|im_end|>", "<|im_start|>", "<|call|>")]


def test_quotes_of_a_stop_token_are_kept_in_the_modelfile(tmp_path):
    model, tokenizer = tiny("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ['<"end">']})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids('<"end">')]
    export_gguf(model, tokenizer, tmp_path, "f32", progress=False)
    assert (tmp_path / "Modelfile").read_text().splitlines()[-1] == 'PARAMETER stop """<"end">"""'


def _changed(family, where, **settings):
    """A model whose configuration says something else than it has."""

    def make():
        model, processor = tiny(family)
        for name, value in settings.items():
            target = {"text": model.config.get_text_config(), "vision": getattr(model.config, "vision_config", None)}
            setattr(target.get(where, model.config), name, value)
        return model, processor

    return make


def _broken(value):
    def make():
        model, tokenizer = tiny("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 3] = value
        return model, tokenizer

    return make


def _other_architecture():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=64, num_key_value_heads=1, **small)), tiny("llama")[1]


def _without_images():
    model, processor = tiny("qwen2_vl")
    return model, processor.tokenizer


def _with_another_weight():
    model, tokenizer = tiny("llama")
    model.model.layers[0].extra = torch.nn.Linear(4, 4)
    return model, tokenizer


def _qwen3(**settings):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from benchmarks.gguf.models import tokenizer

    made = tokenizer("qwen2")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(made), head_dim=16, num_key_value_heads=1, **small, **settings)
    return Qwen3ForCausalLM(config), made


def _qwen2(head_dim):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from benchmarks.gguf.models import tokenizer

    made = tokenizer("qwen2")
    small = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(made), head_dim=head_dim, num_key_value_heads=2, **small)
    return Qwen2ForCausalLM(config), made


def _llava_of_qwen2():
    from transformers import LlavaForConditionalGeneration

    model, processor = tiny("llava_siglip")
    config = copy.deepcopy(model.config)
    config.text_config = _qwen2(32)[0].config
    return LlavaForConditionalGeneration(config), processor


@pytest.mark.parametrize("make", [lambda: _qwen2(16), lambda: _qwen3()])
def test_sizes_of_heads_that_the_engine_loads(make, tmp_path):
    """16 is hidden_size / heads of this Qwen2; Qwen3 has a size of its own."""
    model, made = make()
    fields, tensors = read(export_gguf(model, made, tmp_path, "f32", progress=False)[0])
    attention = model.model.layers[0].self_attn
    assert tensors["blk.0.attn_q.weight"].shape == attention.q_proj.weight.shape
    assert fields[f"{model.config.model_type}.attention.key_length"] == attention.head_dim == 16


def _with_an_output_bias(family):
    model, processor = tiny(family)
    attention = model.model.language_model.layers[1].self_attn
    attention.o_proj.bias = torch.nn.Parameter(torch.ones(attention.o_proj.out_features))
    return model, processor


@pytest.mark.parametrize("make", [_qwen3, lambda: tiny("qwen3_vl")])
def test_qwen3_without_biases_is_exported(make, tmp_path):
    _, tensors = read(export_gguf(*make(), tmp_path, "f32", progress=False)[0])
    assert not any(name.endswith(".bias") for name in tensors) and "blk.1.attn_output.weight" in tensors


def _bitnet():
    model, processor = tiny("llama")
    config = BitNetQuantConfig()
    return replace_with_bitnet_linear(model, modules_to_not_convert=["lm_head"], quantization_config=config), processor


def _without_a_matrix():
    model, processor = tiny("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    return model, processor


def _with_weight_norm():
    model, processor = tiny("llama")
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    return model, processor


def _images(family, **settings):
    def make():
        model, processor = tiny(family)
        for name, value in settings.items():
            setattr(processor.image_processor, name, value)
        return model, processor

    return make


ROPE = {"rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    "make, message",
    [
        (_other_architecture, "model must be one of llama, .* got 'gemma2'"),
        (lambda: (torch.nn.Linear(2, 2), None), "model must be one of .* got 'Linear'"),
        (_without_images, "processor must have an image processor for qwen2_vl, got"),
        (_with_another_weight, r"only weights that the engine has, got model\.layers\.0\.extra\.weight"),
        (_changed("llama", "text", hidden_act="gelu"), "hidden_act 'silu', got 'gelu'"),
        (_changed("llama", "text", rope_parameters={"rope_type": "yarn", **ROPE}), "rope_type .* got 'yarn'"),
        (_changed("qwen2_vl", "text", layer_types=["sliding_attention"] * 2), "got a sliding window"),
        (_changed("llava_clip", "", vision_feature_layer=[-2, -1]), r"one vision_feature_layer, got \[-2, -1\]"),
        (_changed("llava_clip", "", vision_feature_layer=0), "vision_feature_layer between 1 and 3, got 0"),
        (
            _changed("llava_clip", "", vision_feature_select_strategy="full"),
            "'default' with clip_vision_model, got 'full'",
        ),
        (_changed("llava_siglip", "vision", image_size=70), "processor must give images of 70 x 70, .* got"),
        (
            _changed("qwen2_5_vl", "vision", fullatt_block_indexes=[1, 2]),
            r"at equal distances of 2 or more, got \[1, 2\]",
        ),
        (_changed("qwen2_5_vl", "vision", fullatt_block_indexes=[0, 1, 2, 3]), "at equal distances of 2 or more"),
        (_changed("qwen2_5_vl", "vision", window_size=56), "window_size 112, got 56"),
        (_changed("qwen2_vl", "vision", hidden_act="gelu"), "hidden_act 'quick_gelu' in its tower, got 'gelu'"),
        (_changed("qwen3_vl", "text", num_hidden_layers=2), "more text layers than deepstack_visual_indexes"),
        (
            lambda: _qwen3(attention_bias=True),
            r"no bias that the engine's qwen3 lacks, got model\.layers\.0\.self_attn\.q_pr",
        ),
        (
            lambda: tiny("qwen3_vl", attention_bias=True),
            r"qwen3vl lacks, got model\.language_model\.layers\.0\.self_attn\.",
        ),
        (
            lambda: _with_an_output_bias("qwen2_vl"),
            r"qwen2vl lacks, got .*\.layers\.1\.self_attn\.o_proj\.bias; take a",
        ),
        (
            lambda: _qwen2(32),
            r"num_attention_heads \* head_dim = hidden_size \(64\) for the engine's qwen2, got 4 \* 32; take a base",
        ),
        (_llava_of_qwen2, r"hidden_size \(64\) for the engine's qwen2, got 4 \* 32"),
        (_changed("qwen2_vl", "text", head_dim=32), r"hidden_size \(64\) for the engine's qwen2vl, got 4 \* 32"),
        (_bitnet, r"weights in parameters, got the buffer model\.layers\.0\.self_attn\.q_proj\.weight"),
        (_without_a_matrix, r"a weight for each part of a layer, got none for blk\.1\.ffn_up\.weight"),
        (
            _with_weight_norm,
            r"only weights that the engine has, got model\.layers\.0\.mlp\.down_proj\.para",
        ),
        (_images("llava_clip", do_normalize=False), "processor must have do_normalize=True, as the engine computes"),
        (_images("qwen2_vl", do_rescale=False), "processor must have do_rescale=True, as the engine computes"),
        (_images("qwen3_vl", do_resize=False), "processor must have do_resize=True, as the engine computes"),
        (
            _images("llava_siglip", rescale_factor=1 / 127.5),
            r"rescale_factor 1/255, .* got 0\.0078",
        ),
        (_broken(float("nan")), r"finite weights, got NaN or infinity in blk\.1\.ffn_up\.weight"),
        (_broken(1e6), r"hold the values of blk\.1\.ffn_up\.weight, .* got Q8_0; take bf16 or f32"),
    ],
)
def test_models_that_cannot_be_exported_are_refused_and_leave_no_file(make, message, tmp_path):
    model, processor = make()
    with pytest.raises(ValueError, match=message):
        export_gguf(model, processor, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out/*"))


def test_model_is_left_as_it_is(tmp_path):
    model, tokenizer = lora(use_dora=True)
    before = copy.deepcopy(model.state_dict())
    export_gguf(model, tokenizer, tmp_path, "q4_0", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_names_of_types_in_upper_case(tmp_path):
    model, tokenizer = tiny("llama")
    path, _ = export_gguf(model, tokenizer, tmp_path, "BF16", "F16", progress=False)
    assert path == tmp_path / "model-bf16.gguf"
