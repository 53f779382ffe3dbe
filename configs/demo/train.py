"""Make the demo checkpoint: a 3.6-million-parameter Mixtral trained on Python's own documentation.

Needs: Python 3.11, torch, transformers 5, sentencepiece and safetensors; no network, no GPU.
The text is what the running Python carries: the docstrings of the standard library, those of a
few C modules, and the language reference in ``pydoc_data.topics``. Another Python patch release
has slightly different docstrings and therefore gives a slightly different checkpoint.

Takes: about 5,000 training tokens a second on one idle CPU core, so some 17 minutes with the defaults.
The same seed, thread count, machine type and package versions give the same weights.

Writes to ``--output`` (default: this script's folder): ``config.json``, ``generation_config.json``,
``tokenizer_config.json``, ``tokenizer.model``, ``model.safetensors`` (bfloat16, the tensor names
of Mixtral on disk), ``eval.txt`` (held-out text) and ``training.json`` (figures measured on
``eval.txt`` with the weights read back from ``model.safetensors``).
"""

import argparse
import ast
import datetime
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import platform
import random
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

ROW, BATCH, VOCAB = 512, 4, 1536
PEAK_LR, FINAL_LR, WARMUP, EVAL_EVERY = 4e-3, 1e-4, 100, 200
# Salt of the hash that holds modules out, chosen so that both modules and topics fall to it, 40 to 60 kB in all.
SPLIT = "26 "
SKIPPED = {"test", "tests", "idle_test", "site-packages"}
C_MODULES = (
    "builtins", "math", "itertools", "time", "sys", "_collections", "_functools", "_operator", "_io", "_datetime",
)  # fmt: skip
# Modules whose contents are asked about; the others are only asked about as a whole, or not at all.
UNASKED = {"distutils", "encodings", "idlelib", "lib2to3", "tkinter", "turtledemo"}
ASKED = {
    "builtins", "math", "itertools", "time", "collections", "functools", "operator", "io", "datetime", "os",
    "os.path", "shutil", "json", "random", "statistics", "textwrap", "string", "re", "glob", "fnmatch", "tempfile",
    "pathlib", "heapq", "bisect", "copy", "csv", "decimal", "fractions", "inspect", "calendar", "base64", "pprint",
    "linecache", "contextlib", "enum", "queue", "threading", "subprocess", "socket", "gzip", "zipfile", "tarfile",
    "hashlib", "secrets", "typing", "types", "ast", "dis", "pickle", "shelve", "timeit", "traceback", "locale",
    "html", "urllib.parse", "ipaddress", "argparse", "difflib", "keyword", "token", "struct", "weakref", "uuid",
    "platform",
}  # fmt: skip
ALIASES = {"posixpath": "os.path", "genericpath": "os.path", "_pydecimal": "decimal", "_pyio": "io"}
WORDINGS = {
    "function": ("What does {} do?", "Explain {}.", "Describe {}.", "What is {} for?"),
    "class": ("What is {}?", "Explain {}.", "Describe {}.", "Tell me about {}."),
    "module": ("What is the {} module?", "Describe the {} module.", "What is {} for?"),
}
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user, assistant, ...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles may follow the first message.') }}"
    "{% endif %}{% endfor %}"
)
CONFIG = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 32, "hidden_act": "silu", "hidden_size": 128, "initializer_range": 0.06,
    "intermediate_size": 192, "max_position_embeddings": 2048, "model_type": "mixtral",
    "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.005, "router_jitter_noise": 0.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": VOCAB,
}  # fmt: skip
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
SPECIAL = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TOKENIZER_CONFIG = SPECIAL | {
    # "legacy" keeps the dummy prefix after a special token, which is how the documents are encoded here.
    "legacy": True, "clean_up_tokenization_spaces": False, "model_max_length": 2048,
    "tokenizer_class": "LlamaTokenizer", "chat_template": CHAT_TEMPLATE,
}  # fmt: skip


def digest(text):
    """Return a number that depends only on ``text``, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def source_docstrings():
    """Yield (module, name, kind, docstring) from the sources of the standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts) or parts[0].startswith("config-"):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        module = ALIASES.get(module, module)
        nodes = [(ast.parse(path.read_bytes()), module)]
        while nodes:
            node, name = nodes.pop()
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
                name = name if kind == "module" else f"{name}.{node.name}"
                yield module, name, kind, ast.get_docstring(node) or ""
            nodes.extend((child, name) for child in reversed(list(ast.iter_child_nodes(node))))


def builtin_docstrings():
    """Yield (module, name, kind, docstring) of functions, classes and methods written in C."""
    for c_module in C_MODULES:
        module = c_module.lstrip("_")
        for name, value in sorted(vars(importlib.import_module(c_module)).items()):
            name = name if module == "builtins" else f"{module}.{name}"
            if inspect.isbuiltin(value):
                yield module, name, "function", inspect.getdoc(value) or ""
            elif isinstance(value, type):
                yield module, name, "class", inspect.getdoc(value) or ""
                for attribute, member in sorted(vars(value).items()):
                    if inspect.isroutine(member):
                        yield module, f"{name}.{attribute}", "function", inspect.getdoc(member) or ""


def collect():
    """Return the plain training documents, the question-and-answer ones, and the held-out documents.

    A whole module or topic is either trained on or held out, and a docstring that occurs more
    than once counts only where it comes first, so no held-out docstring is seen in training.
    """
    plain, chat, held_out, seen = [], [], [], set()
    references = (("topic " + name, name, "topic", text.strip()) for name, text in sorted(topics.items()))
    for module, name, kind, text in (*source_docstrings(), *builtin_docstrings(), *references):
        key = " ".join(text.split())
        if len(key) < 40 or key in seen:
            continue
        seen.add(key)
        if digest(SPLIT + module) % 1000 < 30:
            held_out.append(text)
            continue
        plain.append(text)
        private = any(part.startswith("_") for part in name.split("."))
        asked = (kind == "module" and module.split(".")[0] not in UNASKED) or module in ASKED
        if kind in WORDINGS and asked and not private:
            answer = " ".join(text.split("\n\n")[0].split())
            wording = digest(name) % len(WORDINGS[kind])
            if 20 <= len(answer) <= 600:
                question = WORDINGS[kind][wording].format(name)
                chat.append(f"[INST] {question} [/INST] {answer}")
    return plain, chat, held_out


def train_tokenizer(documents):
    """Return a byte-fallback BPE sentencepiece model, as bytes, trained on the lines of the documents."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in documents for line in text.splitlines() if line.strip()),
        model_writer=model, model_type="bpe", vocab_size=VOCAB, byte_fallback=True, split_digits=True,
        add_dummy_prefix=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=0.9995, unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def batches(documents, seed):
    """Yield (BATCH, ROW) tensors of packed documents for ever, in a new order every epoch."""
    order, stream = random.Random(seed), []
    while True:
        for ids in order.sample(documents, len(documents)):
            stream += ids
            if len(stream) >= BATCH * ROW:
                yield torch.tensor(stream[: BATCH * ROW]).view(BATCH, ROW)
                del stream[: BATCH * ROW]


@torch.no_grad()
def evaluate(model, ids):
    """Return (nats per token, share of tokens ranked first, load of each expert in each layer).

    ``ids`` is cut into consecutive pieces of ROW - 1 tokens, each preceded by BOS, so every token
    is predicted exactly once and from its own window only.
    """
    model.eval()
    config, nats, hits = model.config, 0.0, 0
    load = torch.zeros(config.num_hidden_layers, config.num_local_experts)
    for start in range(0, len(ids), ROW - 1):
        window = torch.tensor([[config.bos_token_id, *ids[start : start + ROW - 1]]])
        output = model(input_ids=window, output_router_logits=True, use_cache=False)
        logits, target = output.logits[0, :-1].float(), window[0, 1:]
        nats += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        hits += (logits.argmax(-1) == target).sum().item()
        for layer, router in enumerate(output.router_logits):
            chosen = router.view(-1, config.num_local_experts).topk(config.num_experts_per_tok).indices
            load[layer] += torch.bincount(chosen.flatten(), minlength=config.num_local_experts)
    model.train()
    return nats / len(ids), hits / len(ids), (load / load.sum(-1, keepdim=True)).tolist()


def disk_layout(state):
    """Return the bfloat16 weights under Mixtral's names on disk, with one w1, w2, w3 per expert.

    transformers 5 keeps w1 over w3 of all experts in ``gate_up_proj`` and w2 in ``down_proj``.
    """
    tensors = {}
    for name, weight in state.items():
        name, weight = name.replace(".mlp.", ".block_sparse_moe."), weight.to(torch.bfloat16)
        stem, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            tensors[name] = weight.contiguous()
            continue
        for expert, matrix in enumerate(weight):
            parts = zip(("w1", "w3"), matrix.chunk(2), strict=True) if last == "gate_up_proj" else [("w2", matrix)]
            for part, value in parts:
                tensors[f"{stem}.{expert}.{part}.weight"] = value.contiguous()
    return tensors


def train(documents, eval_ids, steps, seed):
    """Train for ``steps`` steps; return (step, weights) with the lowest held-out loss."""
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(**CONFIG | {"torch_dtype": "float32", "router_aux_loss_coef": 0.0})
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    experts = config.num_local_experts, config.num_experts_per_tok
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    best, began = (math.inf, 0, None), time.monotonic()
    for step, rows in enumerate(itertools.islice(batches(documents, seed), steps), 1):
        progress = max(0, step - WARMUP) / max(1, steps - WARMUP)
        cosine = FINAL_LR + (PEAK_LR - FINAL_LR) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = cosine * min(1, step / WARMUP)
        output = model(input_ids=rows, labels=rows, output_router_logits=True, use_cache=False)
        # One balancing loss per layer: over all layers at once, as transformers has it, an expert
        # busy in one layer makes up for its namesake dying in another.
        balance = sum(load_balancing_loss_func((router,), *experts) for router in output.router_logits)
        (output.loss + CONFIG["router_aux_loss_coef"] * balance / len(output.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVAL_EVERY == 0 or step == steps:
            held_out, _, load = evaluate(model, eval_ids)
            least, most = min(map(min, load)), max(map(max, load))
            print(
                f"step {step}: loss {output.loss.item():.3f}, held-out {held_out:.4f}, "
                f"expert load {least:.3f} to {most:.3f}, {time.monotonic() - began:.0f} s", flush=True,
            )  # fmt: skip
            if held_out < best[0]:
                best = held_out, step, {name: value.clone() for name, value in model.state_dict().items()}
    return best[1:]


def main():
    """Build the text, the tokenizer and the model, then measure what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--steps", type=int, default=2400, help=f"optimizer steps of {BATCH * ROW} tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the document order")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    plain, chat, held_out = collect()
    eval_text = "\n\n".join(held_out) + "\n"
    (args.output / "eval.txt").write_text(eval_text, encoding="utf-8")
    proto = train_tokenizer(plain + chat)
    (args.output / "tokenizer.model").write_bytes(proto)
    written = {"config": CONFIG, "generation_config": GENERATION_CONFIG, "tokenizer_config": TOKENIZER_CONFIG}
    for name, content in written.items():
        (args.output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
    documents = [[1, *tokenizer.encode(text), 2] for text in plain + chat]
    epoch_tokens, eval_ids = sum(map(len, documents)), tokenizer.encode(eval_text)
    print(f"{len(plain)} plain and {len(chat)} chat documents, {epoch_tokens} tokens; {len(eval_ids)} held out")

    began = time.monotonic()
    best_step, state = train(documents, eval_ids, args.steps, args.seed)
    seconds = time.monotonic() - began
    save_file(disk_layout(state), args.output / "model.safetensors", metadata={"format": "pt"})

    model = transformers.MixtralForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    nats, accuracy, load = evaluate(model, eval_ids)
    eval_bytes = len(eval_text.encode())
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": args.seed, "threads": args.threads, "steps": args.steps, "checkpoint_step": best_step,
        "tokens_seen": best_step * BATCH * ROW, "tokens_per_epoch": epoch_tokens,
        "documents": {"plain": len(plain), "chat": len(chat), "held_out": len(held_out)},
        "training_seconds": round(seconds),
        "evaluation": {
            "protocol": "eval.txt encoded by sentencepiece as one string; consecutive pieces of "
            f"{ROW - 1} tokens, each preceded by BOS (windows of {ROW}, the last one shorter); every token "
            "predicted once; weights of model.safetensors (bfloat16) computed in float32 on the CPU",
            "selection": f"held-out loss measured every {EVAL_EVERY} steps on the same text; the best step was kept",
            "bytes": eval_bytes, "tokens": len(eval_ids), "loss_nats_per_token": round(nats, 5),
            "perplexity_per_token": round(math.exp(nats), 4),
            "bits_per_byte": round(nats * len(eval_ids) / math.log(2) / eval_bytes, 5),
            "top1_accuracy": round(accuracy, 4),
            "router_load": [[round(share, 4) for share in layer] for layer in load],
        },
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "sentencepiece": sentencepiece.__version__,
        },
    }  # fmt: skip
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["evaluation"], indent=2))


if __name__ == "__main__":
    main()
