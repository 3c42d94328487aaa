"""Writes a DeepSeek-V3 checkpoint (safetensors, BF16) as a GGUF file that llama.cpp and ik_llama.cpp load.

    python gguf_model.py CHECKPOINT OUT.gguf bf16|q8_0

Needs the `gguf` package; `llama.py` beside this file installs it and calls this. Names, shapes and metadata are those
of llama.cpp's own converter: attention with the latent absorbed (k_b transposed and v_b instead of kv_b), the experts
of a layer stacked, norms and the router in F32. The words of a synthetic tokenizer only have to be counted, so they are
written as a SentencePiece vocabulary without bytes.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import gguf
import numpy as np

Type = gguf.GGMLQuantizationType

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
OF_THE_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Checkpoint:
    """Tensors of a folder's safetensors files, mapped: BF16 as 16-bit integers, F32 as floats."""

    def __init__(self, folder: pathlib.Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        self.tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            data = np.memmap(path, np.uint8, "r", 8 + length)
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if entry["dtype"] not in ("BF16", "F32"):
                    sys.exit(f"{name} in {path} is {entry['dtype']}; expected a checkpoint in BF16")
                kind = np.uint16 if entry["dtype"] == "BF16" else np.float32
                self.tensors[name] = data[slice(*entry["data_offsets"])].view(kind).reshape(entry["shape"])

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            sys.exit(f"the checkpoint has no tensor {name}")
        return self.tensors[name]


def tensors(checkpoint: Checkpoint) -> Iterator[Tensor]:
    def same(old: str, new: str) -> Tensor:
        data = checkpoint[old]
        return Tensor(new, data.shape, lambda: data)

    for old, new in WHOLE.items():
        yield same(f"{old}.weight", f"{new}.weight")
    for layer in range(checkpoint.config["num_hidden_layers"]):
        old_layer, new_layer = f"model.layers.{layer}", f"blk.{layer}"
        for old, new in OF_A_LAYER.items():
            if f"{old_layer}.{old}.weight" in checkpoint.tensors:
                yield same(f"{old_layer}.{old}.weight", f"{new_layer}.{new}.weight")
        yield from absorbed(checkpoint, old_layer, new_layer)
        if f"{old_layer}.mlp.gate.weight" in checkpoint.tensors:
            yield from experts(checkpoint, old_layer, new_layer)
            bias = f"{old_layer}.mlp.gate.e_score_correction_bias"
            if bias in checkpoint.tensors:
                yield same(bias, f"{new_layer}.exp_probs_b.bias")


def absorbed(checkpoint: Checkpoint, old_layer: str, new_layer: str) -> Iterator[Tensor]:
    config = checkpoint.config
    heads, nope, value = (config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    rank = config["kv_lora_rank"]
    kv_b = checkpoint[f"{old_layer}.self_attn.kv_b_proj.weight"].reshape(heads, nope + value, rank)
    yield Tensor(f"{new_layer}.attn_k_b.weight", (heads, rank, nope), lambda: kv_b[:, :nope].transpose(0, 2, 1))
    yield Tensor(f"{new_layer}.attn_v_b.weight", (heads, value, rank), lambda: kv_b[:, nope:])


def experts(checkpoint: Checkpoint, old_layer: str, new_layer: str) -> Iterator[Tensor]:
    for old, new in OF_THE_EXPERTS.items():
        count = checkpoint.config["n_routed_experts"]
        each = [checkpoint[f"{old_layer}.mlp.experts.{expert}.{old}.weight"] for expert in range(count)]
        yield Tensor(f"{new_layer}.{new}.weight", (count, *each[0].shape), lambda each=each: np.stack(each))


def type_of(tensor: Tensor, matrices: Type) -> Type:
    in_f32 = len(tensor.shape) == 1 or tensor.name.endswith("ffn_gate_inp.weight")
    return Type.F32 if in_f32 else matrices


def as_type(data: np.ndarray, kind: Type) -> np.ndarray:
    if kind == Type.BF16:
        return np.ascontiguousarray(data)
    if data.dtype == np.uint16:
        data = (data.astype(np.uint32) << 16).view(np.float32)
    return data if kind == Type.F32 else gguf.quants.quantize(np.ascontiguousarray(data), kind)


def add_metadata(writer: gguf.GGUFWriter, config: dict, file_type: gguf.LlamaFileType) -> None:
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_name("synthetic")
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    # With the latent absorbed, attention has one key and value head that all heads share.
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(config["rope_theta"])
    if yarn := config["rope_scaling"]:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn["factor"])
        writer.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(yarn["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(yarn["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * yarn["mscale_all_dim"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType[config["scoring_func"].upper()])


def add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    words = sorted(checkpoint.vocabulary, key=checkpoint.vocabulary.get)
    bos, eos = checkpoint.config["bos_token_id"], checkpoint.config["eos_token_id"]
    control = {bos, eos}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    types = (gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in range(len(words)))
    writer.add_token_types(list(types))
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)


def write(folder: pathlib.Path, out: pathlib.Path, dtype: str) -> None:
    checkpoint = Checkpoint(folder)
    matrices, file_type = {
        "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }[dtype]
    unfinished = out.with_name(f"{out.name}.unfinished")
    writer = gguf.GGUFWriter(unfinished, "deepseek2")
    add_metadata(writer, checkpoint.config, file_type)
    add_vocabulary(writer, checkpoint)
    listed = list(tensors(checkpoint))
    for tensor in listed:
        kind = type_of(tensor, matrices)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        size_in_bytes = int(np.prod(tensor.shape)) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size_in_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in listed:
        writer.write_tensor_data(as_type(tensor.read(), type_of(tensor, matrices)))
    writer.close()
    unfinished.rename(out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    write(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3])
