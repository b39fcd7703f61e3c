"""The torch side of `torch_lora.py`, run by an interpreter that has torch and peft; no JAX here.

It runs where JAX does, on the CPU or on the GPU, with products of float32 in TF32 if JAX has them so. On a
GPU "temp bytes" are what the allocator held at most in a step beyond what it held before.

It reads one JSON line at its start (the problem, a file of arrays, the ways), answers one JSON line per way,
and then one for each line ``reset NAME`` or ``step NAME``: the seconds and the loss of a step.
"""

import json
import sys
import time

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.heads = p["heads"]
        width, hidden = p["width"], p["hidden"]
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        for name in "qkvo":
            setattr(self, name, nn.Linear(width, width))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, past=None):
        h = self.norm_1(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        new = k, v
        if past is not None:
            k, v = (torch.cat([old, own], 2) for old, own in zip(past, new, strict=True))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh")), new


class Transformer(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.checkpointed = p["scanned"]
        self.layers = nn.ModuleList(Block(p) for _ in range(p["layers"]))
        self.norm = nn.LayerNorm(p["width"], eps=1e-6)

    def forward(self, x, keys=None, values=None):
        news = []
        for i, layer in enumerate(self.layers):
            if self.checkpointed:
                x, new = checkpoint(layer, x, use_reentrant=False)
            else:
                x, new = layer(x, None if keys is None else (keys[i], values[i]))
            news.append(new)
        return self.norm(x) if keys is None else (self.norm(x), news)


class MiniLM(nn.Module):
    """BERT of transformers, with its real weights; ``ids [B, T] -> [B, T, D]``."""

    def __init__(self, p):
        super().__init__()
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(
            p["folder"], add_pooling_layer=False, attn_implementation="sdpa"
        )

    def forward(self, ids):
        return self.bert(ids.long()).last_hidden_state


class SmolLM2(nn.Module):
    """Llama of transformers, in whose weights those of SmolLM2 are written; ``ids -> logits``."""

    def __init__(self, p):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=p["width"],
            intermediate_size=p["hidden"],
            num_hidden_layers=p["layers"],
            num_attention_heads=p["heads"],
            num_key_value_heads=p["kv_heads"],
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        self.llama = LlamaForCausalLM(config)

    def forward(self, ids):
        return self.llama(ids.long(), use_cache=False).logits


MODELS = {"transformer": Transformer, "minilm": MiniLM, "smollm2": SmolLM2}
TARGETS = {
    "transformer": ["q", "k", "v", "o", "up", "down"],
    "minilm": ["query", "key", "value", "intermediate.dense", "output.dense"],
    "smollm2": [f"{name}_proj" for name in ("q", "k", "v", "o", "up", "gate", "down")],
}


def linear_of(net, i, name):
    """A linear module of any of the models."""
    if isinstance(net, Transformer):
        return getattr(net.layers[i], name)
    if isinstance(net, SmolLM2):
        layer = net.llama.model.layers[i]
        return getattr(layer.self_attn if name in "qkvo" else layer.mlp, f"{name}_proj")
    layer = net.bert.encoder.layer[i]
    if name in "qkv":
        return getattr(layer.attention.self, {"q": "query", "k": "key", "v": "value"}[name])
    return {"o": layer.attention.output, "up": layer.intermediate, "down": layer.output}[name].dense


def fill(module, held, path):
    if isinstance(module, nn.Linear):
        module.weight.copy_(torch.from_numpy(held[f"{path}/kernel"].T.copy()))
    else:
        module.weight.copy_(torch.from_numpy(held[f"{path}/scale"]))
    if f"{path}/bias" in held:
        module.bias.copy_(torch.from_numpy(held[f"{path}/bias"]))


def fill_transformer(net, held):
    for i, layer in enumerate(net.layers):
        for name in (*TARGETS["transformer"], "norm_1", "norm_2"):
            fill(getattr(layer, name), held, f"layers_{i}/{name}")
    fill(net.norm, held, "norm")


def factors_of(held, place):
    """A ``[r, n]`` and B ``[m, r]``, as torch has them."""
    return [torch.from_numpy(held[f"{place}/{name}"].T.copy()) for name in "ab"]


def set_factors(layer, a, b):
    layer.lora_A["default"].weight.copy_(a)
    layer.lora_B["default"].weight.copy_(b)


class Way:
    """One model with its optimizer; ``lora``, ``dora``, ``full`` or ``merged``, and perhaps compiled."""

    def __init__(self, way, p, held, device):
        self.p, kind = p, way.split()[0]
        net = self.model = MODELS[p["model"]](p)
        net.eval()  # without dropout
        adapted, linear = kind != "full", p["linear"]
        targets = TARGETS[p["model"]]
        if adapted:
            config = peft.LoraConfig(
                r=p["rank"], lora_alpha=p["alpha"], target_modules=targets, use_dora=kind == "dora"
            )
        with torch.no_grad():
            if isinstance(net, Transformer):
                fill_transformer(net, held)
            if isinstance(net, SmolLM2):
                net.llama.model.embed_tokens.weight.copy_(torch.from_numpy(held["embed/embedding"]))
                fill(net.llama.model.norm, held, "norm")
                for i, layer in enumerate(net.llama.model.layers):
                    fill(layer.input_layernorm, held, f"layers_{i}/norm_1")
                    fill(layer.post_attention_layernorm, held, f"layers_{i}/norm_2")
                    for name in linear:
                        fill(linear_of(net, i, name), held, f"layers_{i}/{name}")
            if adapted:
                self.model = peft.get_peft_model(net, config)
            for i in range(p["layers"]):
                for name in linear:
                    a, b = factors_of(held, f"layers_{i}/{name}")
                    layer = linear_of(net, i, name)
                    if adapted:
                        set_factors(layer, a, b)
                    else:
                        layer.weight += p["alpha"] / p["rank"] * b @ a
        if kind == "merged":
            self.model = self.model.merge_and_unload().requires_grad_(False)
        self.model.to(device, DTYPES[p["dtype"]])
        self.start = {n: x.detach().clone() for n, x in self.model.named_parameters() if x.requires_grad}
        self.trained = [x for x in self.model.parameters() if x.requires_grad]
        self.trainable = sum(x.numel() for x in self.trained)
        self.x, *rest = (
            to_device(torch.from_numpy(held[n]), device, p)
            for n in (("x", "keys", "values") if p["decode"] else ("x", "target"))
        )
        if p["decode"]:
            self.past = [
                part.transpose(2, 3).contiguous() for part in rest
            ]  # [L, B, H, T, d], as torch keeps them
        else:
            (self.target,) = rest
        modes = {"compiled": "default", "graphs": "reduce-overhead"}
        mode = modes.get(way.split()[-1])
        self.run = torch.compile(self.model, mode=mode) if mode else self.model

    def reset(self):
        with torch.no_grad():
            for name, x in self.model.named_parameters():
                if name in self.start:
                    x.copy_(self.start[name])
        self.token = self.x.clone()
        self.tx = None if self.p["decode"] else torch.optim.AdamW(self.trained, 1e-4, weight_decay=1e-4)

    def step(self):
        if self.p["decode"]:
            with torch.no_grad():
                self.token, _ = self.run(self.token, *self.past)
                return self.token.square().mean()
        self.tx.zero_grad()
        y = self.run(self.x).float()
        if self.target.is_floating_point():
            loss = F.mse_loss(y, self.target.float())
        else:
            loss = F.cross_entropy(y.flatten(0, 1), self.target.flatten().long())
        loss.backward()
        self.tx.step()
        return loss


def to_device(x, device, p):
    return x.to(device, DTYPES[p["dtype"]]) if x.is_floating_point() else x.to(device)


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def main():
    start = json.loads(sys.stdin.readline())
    device = start["device"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = start["tf32"]
    held, ways = dict(np.load(start["arrays"])), {}
    for name in start["ways"]:
        answer = {
            "name": name,
            "torch": torch.__version__,
            "peft": peft.__version__,
            "threads": torch.get_num_threads(),
        }
        try:
            way = ways[name] = Way(name, start["problem"], held, device)
            way.reset()
            # XLA counts the body of a loop once, so that nothing could be compared with scanned layers.
            if not name.endswith(("compiled", "graphs")) and not start["problem"]["scanned"]:
                with FlopCounterMode(display=False) as counter:
                    way.step()
                answer["flops"] = counter.get_total_flops()
            clock = time.perf_counter()
            way.step()
            wait(device)
            answer |= {"trainable": way.trainable, "first": time.perf_counter() - clock}
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                way.step()
                answer["temp bytes"] = torch.cuda.max_memory_allocated() - before
        except Exception as error:  # said in the table: a way that does not run is a finding
            answer["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            ways.pop(name, None)
        print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        command, name = line.strip().split(" ", 1)
        if command == "reset":
            ways[name].reset()
            print("{}", flush=True)
            continue
        wait(device)
        clock = time.perf_counter()
        loss = ways[name].step()
        wait(device)
        seconds = time.perf_counter() - clock
        print(json.dumps({"seconds": seconds, "loss": float(loss)}), flush=True)


if __name__ == "__main__":
    main()
