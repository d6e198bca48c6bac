"""Writes ``golden/llama_ring.*``: a run of the reference's formulas, spelled out in float64.

Same layout as the recorded fixtures; here the ring of K = 2 wraps around, which the recordings never do.
``python tests/models/golden_upstream.py`` writes the files anew.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent / "golden"
NAME = "llama_ring"
ARGS = {
    "vocab": 24,
    "hid": 16,
    "inter": 24,
    "layers": 2,
    "heads": 2,
    "kv": 1,
    "queriers": 3,
    "clusters": 2,
    "K": 2,
    "T": 0.2,
    "lam": 0.7,
    "proj": 8,
}
RANK, BATCH, LENGTH, STEPS, LEARNING_RATE = 4, 5, 9, 5, 0.05
SIZE = ARGS["hid"] // ARGS["heads"]
CLASSES = ARGS["queriers"] + 2


def random_weights():
    torch.manual_seed(0)
    hidden, inter, kv = ARGS["hid"], ARGS["inter"], ARGS["kv"] * SIZE
    shapes = {"model.embed_tokens.weight": (ARGS["vocab"], hidden), "lm_head.weight": (ARGS["vocab"], hidden)}
    norms = ["model.norm", "model.norm_specific", "model.norm_role_proj"]
    for layer in range(ARGS["layers"]):
        prefix = f"model.layers.{layer}."
        norms += [prefix + "input_layernorm", prefix + "post_attention_layernorm"]
        for name, width in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (width, hidden)
        for module, suffix, width in (("mlp", "", inter), ("mlp_specific", "_low_rank", RANK)):
            for name in ("gate", "up"):
                shapes[f"{prefix}{module}.{name}_proj{suffix}.weight"] = (width, hidden)
            shapes[f"{prefix}{module}.down_proj{suffix}.weight"] = (hidden, width)
    for view in (1, 2):
        for cluster in range(ARGS["clusters"]):
            shapes[f"role_proj_v{view}.{cluster}.weight"] = (ARGS["proj"], hidden)
            shapes[f"role_proj_v{view}.{cluster}.bias"] = (ARGS["proj"],)
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return weights | {f"{name}.weight": 1 + 0.2 * torch.randn(hidden) for name in norms}


def random_inputs():
    tokens = torch.randint(1, ARGS["vocab"], (BATCH, LENGTH))
    attended = torch.ones_like(tokens)
    attended[1, -2:] = 0
    spoken = torch.zeros_like(tokens)
    spoken[:, 4:7] = 1
    spoken[:, 1:3] = 3
    return {
        "input_ids": tokens,
        "attention_mask": attended,
        "labels": torch.where((spoken == 1) & (attended == 1), tokens, -100),
        "role_pos_ids": spoken,
        "role_pair_id": torch.randint(2, 2 + ARGS["queriers"], (BATCH,)),
        "cluster_ids": torch.randint(0, ARGS["clusters"], (BATCH,)),
    }


def norm(weights, name, x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]


def rotate(x):
    half = SIZE // 2
    angle = torch.arange(LENGTH).double()[:, None, None] / 10000.0 ** (torch.arange(half).double() / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1
    )


def attention(weights, prefix, x, attended):
    query, key, value = (
        (x @ weights[f"{prefix}{name}_proj.weight"].T).unflatten(-1, (-1, SIZE)) for name in "qkv"
    )
    scores = torch.einsum("bqhd,bkgd->bhqk", rotate(query), rotate(key)) / SIZE**0.5
    visible = torch.ones(LENGTH, LENGTH).tril().bool() & attended[:, None, None].bool()
    probabilities = scores.masked_fill(~visible, -1e30).softmax(-1)
    mixed = torch.einsum("bhqk,bkgd->bqhd", probabilities, value).flatten(2)
    return mixed @ weights[f"{prefix}o_proj.weight"].T


def swiglu(weights, prefix, suffix, x):
    gate, up, down = (weights[f"{prefix}.{name}_proj{suffix}.weight"] for name in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def decode(weights, tokens, attended):
    """Both towers of the reference, general first, before the final norms."""
    hidden = weights["model.embed_tokens.weight"][tokens]
    streams = torch.cat((hidden, hidden))
    for layer in range(ARGS["layers"]):
        prefix = f"model.layers.{layer}."
        normed = norm(weights, prefix + "input_layernorm", streams)
        streams = streams + attention(weights, prefix + "self_attn.", normed, attended.repeat(2, 1))
        general, specific = norm(weights, prefix + "post_attention_layernorm", streams).chunk(2)
        general = swiglu(weights, prefix + "mlp", "", general)
        specific = swiglu(weights, prefix + "mlp_specific", "_low_rank", specific)
        streams = streams + torch.cat((general, specific))
    return streams.chunk(2)


def logits_of(weights, general, specific):
    mixed = norm(weights, "model.norm", general) + norm(weights, "model.norm_specific", specific)
    return mixed / 2 @ weights["lm_head.weight"].T


def contrastive_loss(weights, past, specific, batch):
    """The loss before this batch is remembered, and the batch's projections."""
    losses, new = [], []
    for row, (pair, cluster) in enumerate(zip(batch["role_pair_id"], batch["cluster_ids"], strict=True)):
        label, cluster = int(pair) - 2, int(cluster)
        spoken = norm(weights, "model.norm_role_proj", specific[row])[batch["role_pos_ids"][row] == 1].mean(0)
        views = [
            weights[f"role_proj_v{view}.{cluster}.weight"] @ spoken
            + weights[f"role_proj_v{view}.{cluster}.bias"]
            for view in (1, 2)
        ]
        new.append((cluster, label, [view.detach() for view in views]))
        for view in (0, 1):
            scores = []
            for other in range(CLASSES):
                entries = [entry[1 - view] for entry in past.get((cluster, other), [])[-ARGS["K"] :]]
                empty = torch.full_like(views[0], 1e-6)
                prototype = torch.stack(entries).mean(0) if entries else empty
                scores.append(F.cosine_similarity(views[view], prototype, dim=0) / ARGS["T"])
            losses.append(F.cross_entropy(torch.stack(scores), torch.tensor(label)))
    return torch.stack(losses).mean().clamp(0, 10), new


def memory_tensors(past):
    """The ring buffers that hold the last K of each list in ``past``."""
    shape = (ARGS["clusters"], CLASSES, ARGS["K"], ARGS["proj"])
    memory, pointer = [torch.zeros(shape) for _ in range(2)], torch.zeros(shape[:2], dtype=torch.int64)
    for (cluster, label), entries in past.items():
        pointer[cluster, label] = len(entries)
        for index, entry in enumerate(entries):
            for view in (0, 1):
                memory[view][cluster, label, index % ARGS["K"]] = entry[view].float()
    return {
        "role_avg_emb_view1": memory[0],
        "role_avg_emb_view2": memory[1],
        "role_avg_emb_ptr": pointer,
    }


def run():
    """The settings, the checkpoint and the record of a whole run."""
    initial = random_weights()
    weights = {name: tensor.double().requires_grad_() for name, tensor in initial.items()}
    past, steps, record = {}, [], {}
    for step in range(STEPS):
        batch = random_inputs()
        general, specific = decode(weights, batch["input_ids"], batch["attention_mask"])
        logits = logits_of(weights, general, specific)
        lm_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        contrast, new = contrastive_loss(weights, past, specific, batch)
        loss = lm_loss + ARGS["lam"] * contrast
        grads = dict(
            zip(weights, torch.autograd.grad(loss, weights.values(), materialize_grads=True), strict=True)
        )
        steps.append(
            {"loss": loss.item(), "loss_lm": lm_loss.item(), "loss_specific": contrast.item()},
        )
        record |= {f"step{step}.in.{name}": tensor for name, tensor in batch.items()}
        record[f"step{step}.logits"] = logits.detach().float()
        record |= {
            f"step{step}.grad.{name}": grads[name].float()
            for name in grads
            if "layers.0.mlp" in name or "role_proj" in name
        }
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor -= LEARNING_RATE * grads[name]
        for cluster, label, views in new:
            past.setdefault((cluster, label), []).append(views)
    batch = random_inputs()
    record |= {f"eval.in.{name}": tensor for name, tensor in batch.items()}
    with torch.no_grad():
        logits = logits_of(weights, *decode(weights, batch["input_ids"], batch["attention_mask"]))
    record["eval.logits"] = logits.float()
    record |= {f"final.{name}": tensor for name, tensor in memory_tensors(past).items()}
    return {"family": "llama", "args": ARGS, "steps": steps}, initial | memory_tensors({}), record


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    info, checkpoint, record = run()
    (FOLDER / f"{NAME}.json").write_text(json.dumps(info, indent=1) + "\n")
    save_file(checkpoint, FOLDER / f"{NAME}.model.safetensors")
    save_file(record, FOLDER / f"{NAME}.record.safetensors")
