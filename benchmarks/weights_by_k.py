"""What ``loss.top_k`` does to the weights of a real model on real rows: ``python -m benchmarks.weights_by_k``.

Prints, as JSON, for each K the correlation of the weights (alpha 1) with those over the whole vocabulary, their mean,
and how many tokens are confident conflicts: SmolLM2-135M in float32 on the first 48 training rows of the demo.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from itertools import islice

import torch

from benchmarks.machine import device_name
from nemo_eaft import EAFTConfig, eaft_loss
from nemo_eaft.compare.forward import log_probabilities
from nemo_eaft.compare.measure import load_model
from nemo_eaft.data import tokenize_chat
from nemo_eaft.demo_data import build
from nemo_eaft.gates import is_conflict
from nemo_eaft.hf_model import home

SIZES = (2, 5, 10, 20, 50, 100, None)
ROWS = 48


def main() -> None:
    from transformers import AutoTokenizer

    demo = home() / "demo"
    build(demo)
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    with open(demo / "train.jsonl", encoding="utf-8") as file:
        rows = [tokenize_chat(tokenizer, json.loads(line)) for line in islice(file, ROWS)]
    places = [[place - 1 for start, end in row.answers for place in range(start, end)] for row in rows]
    weights: dict[int | None, list[torch.Tensor]] = {size: [] for size in SIZES}
    conflicts = dict.fromkeys(SIZES, 0)
    model = load_model(demo / "model", "float32", "cpu")
    for index, logits in log_probabilities(model, [row.input_ids for row in rows], places):
        labels = torch.tensor([rows[index].input_ids[place + 1] for place in places[index]])
        for size in SIZES:
            config = EAFTConfig(top_k=size)
            out = eaft_loss(logits, labels, config)
            weights[size].append(out.weight.double())
            ratio = out.entropy / config.entropy_normalizer(logits.shape[-1])
            conflicts[size] += int(is_conflict(out.cross_entropy, ratio, config).sum())
    whole = torch.cat(weights[None])
    found = []
    for size in SIZES:
        mine = torch.cat(weights[size])
        correlation = float(torch.corrcoef(torch.stack([mine, whole]))[0, 1])
        found.append(
            {"top_k": size, "correlation": round(correlation, 4), "mean": round(float(mine.mean()), 4),
             "conflicts": conflicts[size]}
        )  # fmt: skip
    versions = {name: version(name) for name in ("torch", "transformers")}
    device = device_name(torch.device("cpu"))
    print(json.dumps({"tokens": len(whole), "device": device, "versions": versions, "by_k": found}, indent=1))


if __name__ == "__main__":
    main()
