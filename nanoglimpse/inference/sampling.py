"""Choosing the next token from logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoglimpse.errors import UsageError
from nanoglimpse.kernels.varlen import upload

# Between the seeds of the samples of a prompt: 2**64 over the golden ratio.
SPREAD = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedy by default.

    Attributes:
        temperature: sampling temperature; 0 always takes the most likely token.
        top_p: sample from the smallest set of tokens with this probability.
        top_k: sample from the k most likely tokens; 0 for all.
        repetition_penalty: divides the logits of tokens seen before, or multiplies negative ones.
        seed: makes sampling repeatable, with the same result in a batch as alone.
        samples: how many prompts in a row of a batch are the same prompt, asked for several
            answers; sample i of them draws from a generator of (seed, i).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    samples: int = 1

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be in [0, ∞), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise UsageError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(f"repetition_penalty must be in (0, ∞), got {self.repetition_penalty}")
        if self.samples < 1:
            raise UsageError(f"samples must be at least 1, got {self.samples}")

    def generator(self, row: int, device: torch.device) -> torch.Generator:
        """What a prompt of a batch draws from; sample 0 draws as a single answer does."""
        generator, sample = torch.Generator(device), row % self.samples
        if self.seed is None:
            generator.seed()
            return generator
        # A CPU generator reads the lower 32 bits of a seed, in which this odd number has no period.
        return generator.manual_seed((self.seed + sample * SPREAD) % 2**64 if sample else self.seed)


class Sampler:
    """Chooses the tokens of B sequences, and records them for a repetition penalty."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Tensor], vocab: int, device: torch.device
    ):
        self.sampling = sampling
        if len(prompts) % sampling.samples:
            raise UsageError(f"{len(prompts)} prompts are not groups of {sampling.samples} samples")
        self.generators = [sampling.generator(row, device) for row in range(len(prompts))]
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=device)
            for seen, token_ids in zip(self.seen, prompts, strict=True):
                seen.index_fill_(0, token_ids, True)

    def __call__(self, logits: Tensor) -> Tensor:
        """Next tokens int64 [B] from logits [B, vocab]."""
        if self.seen is not None:
            logits = logits.float()
            penalty = self.sampling.repetition_penalty
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.seen, penalised, logits)
        tokens = logits.argmax(-1) if not self.sampling.temperature else self._draw(logits)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def keep(self, stay: Sequence[int]) -> None:
        """Keeps only some of the sequences, by number."""
        self.generators = [self.generators[i] for i in stay]
        if self.seen is not None:
            self.seen = self.seen[upload(torch.tensor(stay, dtype=torch.int64), self.seen.device)]

    def join(self, other: "Sampler") -> None:
        """Appends the sequences of another sampler."""
        self.generators += other.generators
        if self.seen is not None and other.seen is not None:
            self.seen = torch.cat((self.seen, other.seen))

    def _draw(self, logits: Tensor) -> Tensor:
        ranked, order = (logits.float() / self.sampling.temperature).sort(-1, descending=True)
        if self.sampling.top_k:
            ranked[:, self.sampling.top_k :] = -torch.inf
        probabilities = ranked.softmax(-1)
        # A token stays if those before it do not reach top_p, so that the first always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.sampling.top_p, 0)
        # As torch.multinomial samples, but without its check of the input, which synchronises: the
        # first arrival among exponential variables with these rates.
        arrivals = torch.stack(
            [
                torch.empty_like(row).exponential_(generator=generator)
                for row, generator in zip(probabilities, self.generators, strict=True)
            ]
        )
        choices = (probabilities / arrivals).argmax(1, keepdim=True)
        return order.gather(1, choices).squeeze(1)
