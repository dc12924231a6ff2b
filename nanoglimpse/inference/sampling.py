"""Choosing the next token from logits."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nanoglimpse.config import Sampling
from nanoglimpse.errors import NanoglimpseError, UsageError

# In place of a token where the logits are not finite. The host learns of it when it reads tokens.
NOT_FINITE = -1

# Between the seeds of the samples of a prompt: 2**64 over the golden ratio.
SPREAD = 0x9E3779B97F4A7C15


def check_finite(tokens: Iterable[int], dtype: torch.dtype) -> None:
    """Looks for `NOT_FINITE` among tokens.

    Raises:
        NanoglimpseError: it is there.
    """
    if NOT_FINITE in tokens:
        remedy = "check the files of the checkpoint and of the adapter"
        if dtype == torch.float16:
            remedy = "activations do not fit into float16; load the model with --dtype bfloat16"
        raise NanoglimpseError(f"the logits are not finite, so the answer ends here: {remedy}")


def generator_of(sampling: Sampling, row: int, device: torch.device) -> torch.Generator:
    """What a prompt of a batch draws from; sample 0 draws as a single answer does."""
    generator, sample = torch.Generator(device), row % sampling.samples
    if sampling.seed is None:
        generator.seed()
        return generator
    # A CPU generator reads the lower 32 bits of a seed, in which this odd number has no period.
    spread = (sampling.seed + sample * SPREAD) % 2**64
    return generator.manual_seed(spread if sample else sampling.seed)


class Sampler:
    """Chooses the tokens of B sequences, and records them for a repetition penalty."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Tensor], vocab: int, device: torch.device
    ):
        self.temperature, self.top_p, self.top_k, self.penalty = sampling.values()
        if len(prompts) % sampling.samples:
            raise UsageError(f"{len(prompts)} prompts are not groups of {sampling.samples} samples")
        self.generators = [generator_of(sampling, row, device) for row in range(len(prompts))]
        self.seen: Tensor | None = None
        if self.penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=device)
            for seen, token_ids in zip(self.seen, prompts, strict=True):
                seen.index_fill_(0, token_ids, True)

    def __call__(self, logits: Tensor) -> Tensor:
        """Next tokens int64 [B] from logits [B, vocab]; `NOT_FINITE` where one is not finite."""
        # A sum is not finite if a term is not, and 0 times it not 0: two launches, and no wait.
        finite = logits.sum(-1, dtype=torch.float32).mul(0).eq(0)
        if self.seen is not None:
            logits = logits.float()
            penalised = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
            logits = torch.where(self.seen, penalised, logits)
        tokens = logits.argmax(-1) if not self.temperature else self._draw(logits)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return torch.where(finite, tokens, NOT_FINITE)

    def keep(self, stay: Sequence[int], places: Tensor) -> None:
        """Keeps only the sequences `stay`; `places` are these numbers on the device."""
        self.generators = [self.generators[i] for i in stay]
        if self.seen is not None:
            self.seen = self.seen[places]

    def join(self, other: "Sampler") -> None:
        """Appends the sequences of another sampler."""
        self.generators += other.generators
        if self.seen is not None and other.seen is not None:
            self.seen = torch.cat((self.seen, other.seen))

    def _draw(self, logits: Tensor) -> Tensor:
        ranked, order = (logits.float() / self.temperature).sort(-1, descending=True)
        if self.top_k:
            ranked[:, self.top_k :] = -torch.inf
        probabilities = ranked.softmax(-1)
        # A token stays if those before it do not reach top_p, so that the first always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.top_p, 0)
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
