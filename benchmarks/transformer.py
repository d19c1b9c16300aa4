"""A small transformer that prunes its own tokens by soft top-k, trained in several ways that must agree.

    python -m benchmarks.transformer                # writes results/transformer-DEVICE.json

The task: 64 tokens, each a digit and perhaps a mark; the answer is the sum of the two marked digits.
After the first block a linear score of each token goes through SoftTopK with a learned share of
tokens and log p is added to the attention of the second block, so that a pruned token is not
attended to. Every way of training starts from the same weights and sees the same batches:

    eager       autocast to bfloat16
    compiled    torch.compile(fullgraph=True) around the same
    graph       the eager step captured in one CUDA graph, and replayed (GPU only)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.environment import RESULTS, device_label, write
from softtopk import SoftTopK, log_soft_topk

TOKENS, DIGITS, MARKED, WIDTH, HEADS = 64, 10, 2, 64, 4
ANSWERS = MARKED * (DIGITS - 1) + 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, h: Tensor, bias: Tensor | None = None) -> Tensor:
        """h (batch, tokens, width); bias (batch, tokens) is added to the attention to each token."""
        batch, tokens, _ = h.shape
        qkv = self.qkv(self.norm1(h)).view(batch, tokens, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if bias is not None:
            bias = bias[:, None, None].expand(-1, HEADS, tokens, -1).to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        h = h + self.out(attended.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return h + self.mlp(self.norm2(h))


class PruningTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2 * DIGITS, WIDTH)
        self.first, self.second = Block(), Block()
        self.score = nn.Linear(WIDTH, 1)
        self.prune = SoftTopK(0.25, alpha=0.2, fraction=True, learn_k=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, ANSWERS)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, TOKENS) int64 -> logits (batch, ANSWERS)."""
        h = self.first(self.embedding(tokens))
        score = self.score(h).squeeze(-1)
        h = h * self.prune(score).unsqueeze(-1)
        h = self.second(h, log_soft_topk(score, self.prune.budget(tokens.shape[1]), 0.2))
        return self.head(self.norm(h.sum(1)))


def batches(steps: int, size: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (size, TOKENS) and answers (size,), the same on every device."""
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        digits = torch.randint(DIGITS, (size, TOKENS), generator=g)
        marks = torch.rand(size, TOKENS, generator=g).argsort(1) < MARKED
        answers = (digits * marks).sum(1)
        yield (digits + DIGITS * marks).to(device), answers.to(device)


class Training:
    """One model and optimiser; `step` is a pure function of its buffers, so that a graph can hold it."""

    def __init__(self, device: str, compile_with: str | None = None):
        torch.manual_seed(0)
        self.device = device
        self.model = PruningTransformer().to(device)
        self.forward: Callable = self.model
        if compile_with:
            self.forward = torch.compile(self.model, fullgraph=True, backend=compile_with)
        capturable = device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, capturable=capturable)

    def step(self, tokens: Tensor, answers: Tensor) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16):
            logits = self.forward(tokens)
        loss = F.cross_entropy(logits.float(), answers)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def train(training: Training, steps: int, size: int) -> list[float]:
    """The loss of every step."""
    return torch.stack([training.step(*batch) for batch in batches(steps, size, training.device)]).tolist()


def train_captured(training: Training, steps: int, size: int) -> list[float]:
    """The same from one captured step, replayed. Capturing needs a warm-up, whose changes are undone."""
    stream = torch.cuda.Stream()
    tokens, answers = (t.clone() for t in next(batches(1, size, training.device)))
    weights = {name: t.clone() for name, t in training.model.state_dict().items()}
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training.step(tokens, answers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training.step(tokens, answers)
    training.model.load_state_dict(weights)
    for state in training.optimizer.state.values():
        for value in state.values():
            value.zero_()
    losses = []
    for new_tokens, new_answers in batches(steps, size, training.device):
        tokens.copy_(new_tokens)
        answers.copy_(new_answers)
        graph.replay()
        losses.append(loss.clone())
    return torch.stack(losses).tolist()


def run(device: str, steps: int, size: int, compile_with: str = "inductor") -> list[dict]:
    """Each way of training: its losses, and how many tokens it keeps in the end."""
    ways: dict[str, Callable[[], tuple[Training, list[float]]]] = {
        "eager": lambda: (t := Training(device), train(t, steps, size)),
        "compiled": lambda: (t := Training(device, compile_with), train(t, steps, size)),
    }
    if device == "cuda":
        ways["graph"] = lambda: (t := Training(device), train_captured(t, steps, size))
    rows = []
    for name, way in ways.items():
        training, losses = way()
        rows.append(
            {
                "way": name,
                "steps": steps,
                "batch": size,
                "first_loss": losses[0],
                "last_loss": sum(losses[-20:]) / len(losses[-20:]),
                "tokens_kept": training.model.prune.budget(TOKENS).item(),
                "losses": losses,
            }
        )
    eager = rows[0]["losses"]
    for row in rows:
        gaps = [abs(a - b) for a, b in zip(row["losses"], eager, strict=True)]
        row["largest_gap_in_100_steps"] = max(gaps[:100])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/transformer-DEVICE.json")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)  # attention's backward adds in any order
    rows = run(args.device, args.steps, args.batch)
    for row in rows:
        losses = row.pop("losses")
        row["every_50th_loss"] = [round(loss, 4) for loss in losses[::50]]
        print(row)
    write(args.out or RESULTS / f"transformer-{device_label(args.device)}.json", rows)


if __name__ == "__main__":
    main()
