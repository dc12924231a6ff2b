"""The engine: a prompt through vision encoder, decoder and GlimpsePrune to an answer.

The pruning step is control flow here and nowhere else: `Engine.read` is written as the method goes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batch import Batch
from .cache import Cache, Stack
from .config import Config, read_config, read_json
from .decoder import Decoder
from .errors import UsageError
from .glimpse import Glimpse, Selection
from .graph import Graphs
from .kernels.ops import Ops, Rope, select
from .kernels.quantized import check as check_quantized
from .many import Item, Many, Outcome
from .methods import METHODS, Choice, Look, Method
from .pixels import joined
from .processor import Processor, Prompt, Visual
from .reading import KV_DROPS, Reading, Seen
from .results import Answer, Clock, Prefill
from .rope import Grid, mrope
from .sampling import Sampler, Sampling
from .stream import Stream
from .vision import VisionEncoder, Watch
from .weights import load_glimpse, load_model, locate, read_adapter
from .weights.checkpoint import Progress

if TYPE_CHECKING:
    from .session import Session

MODEL_FILES = ["*.json", "*.safetensors", "glimpse/*"]
GLIMPSE_FILES = ["config.json", "new_modules_gp.pt", "glimpse.safetensors"]
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
# On a CPU low-precision products pay off on large matrices alone.
SMALL_HIDDEN_SIZE = 512
# Steps that a GPU runs before somebody looks whether all answers have ended.
AHEAD = 7


def load(
    model: str | Path = "nano",
    *,
    glimpse: str | Path | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    backend: str | Ops = "auto",
    quantize: str | None = None,
    fold_pixels: bool = False,
    progress: Progress = lambda done, total: None,
) -> "Engine":
    """An engine for a Qwen2.5-VL checkpoint.

    Args:
        model: "nano" (embedded), a folder, or a Hub id.
        glimpse: folder or Hub id of glimpse weights; the model's own folder `glimpse` if None.
        adapter: folder or Hub id of a LoRA adapter (PEFT layout), merged into the weights.
        device: "auto" (cuda where there is one), or a torch device.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16, but float32 for a small model
            on a CPU.
        backend: "auto" is the fastest on the device, and inference only; "torch" is plain torch,
            through which gradients flow; or operations of one's own.
        quantize: "int8" or "int4": the decoder's matrices in so many bits.
        fold_pixels: normalise pixels inside the patch embedding: exact to rounding, and faster.
        progress: called with bytes of weights read so far and in all.

    Raises:
        UsageError: an argument names something that does not exist here.
        NanoglimpseError: a file is missing, broken, or of another model.
    """
    place = find_device(device)
    ops = select(backend, place)
    folder = locate(model, MODEL_FILES)
    config = read_config(folder / "config.json")
    kind = find_dtype(dtype, place, config)
    if quantize is not None:
        check_quantized(quantize, place, kind)
    # The small files first, so that a mistake shows before gigabytes are read.
    processor, eos = Processor(folder, config), _eos(folder / "generation_config.json", config)
    own = folder / "glimpse"
    source = locate(glimpse, GLIMPSE_FILES) if glimpse else own if own.is_dir() else None
    extra = load_glimpse(source, config, ops, kind, place) if source else None
    lora = read_adapter(locate(adapter, ADAPTER_FILES)) if adapter else None
    vision, decoder = load_model(folder, config, ops, kind, place, lora, progress, quantize)
    take_raw(processor, vision, ops, fold_pixels)
    vision.pack(ops)
    decoder.pack(ops)
    return Engine(str(model), config, vision, decoder, extra, processor, eos, ops, quantize)


def take_raw(processor: Processor, vision: VisionEncoder, ops: Ops, fold: bool) -> None:
    """Leaves pixels to the encoder where that pays; to a GPU they travel in an eighth of bytes."""
    on_gpu = vision.patch_embed.weight.is_cuda
    processor.pixels = replace(processor.pixels, raw=fold or on_gpu)
    vision.take_pixels(processor.pixels, ops if fold else None)


def find_method(
    name: str,
    max_ratio: float | None,
    max_frame_ratio: float | None = None,
    anchors: Sequence[str] | None = None,
) -> Method:
    """The pruning method of this name.

    Raises:
        UsageError: there is none, it needs a cap, or it has no place for a part of the rule.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method '{name}'; choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    if method.capped and max_ratio is None:
        raise UsageError(
            f"method {name} keeps a share of the visual tokens that it has to be told; give "
            "max_ratio (--max-ratio), for example 0.111"
        )
    wanted = {"max_frame_ratio (--max-frame-ratio)": max_frame_ratio, "anchors": anchors or None}
    given = " and ".join(option for option, value in wanted.items() if value is not None)
    if given and not method.pooled:
        pooled = ", ".join(one for one in METHODS if METHODS[one].pooled)
        raise UsageError(
            f"method {name} does not choose once over whole pictures and clips, so that {given} "
            f"would have no meaning; leave that out, or choose one of {pooled}"
        )
    return method


def find_device(name: str) -> torch.device:
    """The device that `load` is told of, if it exists here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}'; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name} was asked for, but torch finds no CUDA here; use cpu")
    return device


def find_dtype(name: str, device: torch.device, config: Config) -> torch.dtype:
    """The dtype that `load` is told of."""
    if name == "auto":
        small = config.text_config.hidden_size <= SMALL_HIDDEN_SIZE
        return torch.float32 if small and device.type == "cpu" else torch.bfloat16
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise UsageError(f"unknown dtype '{name}'; use auto, {', '.join(kinds)}")
    return kinds[name]


@dataclass(frozen=True)
class Plan:
    """A pruning method and what it was told."""

    method: Method
    rule: Selection
    kv_drop: str
    prune_videos: bool


@dataclass(frozen=True)
class Sight:
    """What the vision encoder says of N visual tokens.

    Attributes:
        visual: [N, C].
        taps: [M, N, Cv].
        watch: what the method wanted to know of the blocks.
    """

    visual: Tensor
    taps: Tensor
    watch: Watch


@dataclass(frozen=True)
class Request:
    """What one prefill is about.

    Attributes:
        batch: the prompts before any pruning.
        sight: of their pictures.
        plan: what to do with them.
        room: cache rows to leave free behind each prompt, for its answer.
        seeds: of methods that draw, one a prompt.
        evidence: bool [N], the visual tokens that the answers need, where they are known.
        trace: keep the rows behind layer K.
    """

    batch: Batch
    sight: Sight
    plan: Plan
    room: int
    seeds: list[int]
    evidence: Tensor | None = None
    trace: bool = False


class Engine:
    """A loaded model. It keeps no state between calls; one engine may serve any order of them.

    Attributes:
        name: as it was asked for.
        config: of the checkpoint.
        vision, decoder: the model.
        glimpse: GlimpsePrune's part, or None.
        processor: builds prompts.
        eos_token_id: tokens that end an answer.
        quantized: how the decoder's matrices are, as `load` was told.
        graphs: decode steps to replay; None where they run as they come.
        ahead: for `decode_many`, where tokens are not shown as they come.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        vision: VisionEncoder,
        decoder: Decoder,
        glimpse: Glimpse | None,
        processor: Processor,
        eos_token_id: frozenset[int],
        ops: Ops,
        quantized: str | None = None,
    ):
        self.name, self.config, self.ops = name, config, ops
        self.vision, self.decoder, self.glimpse = vision, decoder, glimpse
        self.processor, self.eos_token_id, self.quantized = processor, eos_token_id, quantized
        self.device = decoder.embed_tokens.weight.device
        self.dtype = decoder.embed_tokens.weight.dtype
        captured = ops.captured and self.device.type == "cuda"
        self.graphs = Graphs(decoder, config.text_config) if captured else None
        self.ahead = AHEAD if self.device.type == "cuda" else 0

    def prompt(
        self,
        images: Visual | Sequence[Visual],
        question: str | Sequence[Visual],
        **options,
    ) -> Prompt:
        """A prompt from pictures and a question; arguments as `Processor.prompt`."""
        return self.processor.prompt(images, question, **options)

    def prefill(self, prompt: Prompt, method: str | None = None, **options) -> Prefill:
        """Reads one prompt; arguments as `prefill_many`. `logits` is [vocab]."""
        prefill = self.prefill_many([prompt], method, **options)
        prefill.logits = prefill.logits[0]
        return prefill

    @torch.inference_mode()
    def prefill_many(
        self,
        prompts: Sequence[Prompt],
        method: str | None = None,
        *,
        threshold: float | None = None,
        max_ratio: float | None = None,
        max_frame_ratio: float | None = None,
        min_tokens: int | None = None,
        anchors: Sequence[str] | None = None,
        max_new_tokens: int = 128,
        kv_drop: str = "all",
        prune_videos: bool = True,
        seed: int | Sequence[int] = 0,
        evidence: Sequence[Tensor] | None = None,
        trace: bool = False,
        see: Callable[[Tensor, Sequence[Grid], Method], Sight] | None = None,
    ) -> Prefill:
        """Reads prompts of any lengths, packed, up to the logits of their first answer tokens.

        Args:
            prompts: with any number of pictures each, or none.
            method: of METHODS; "glimpse" where there are glimpse weights, else "dense", if None.
            threshold, max_ratio, max_frame_ratio, min_tokens, anchors: the rule of `Selection`;
                what the glimpse weights' config.json says where None. `max_ratio=1` lifts a cap.
            max_new_tokens: room that the cache gets for the answer.
            kv_drop: "all": what is dropped leaves the cache of every layer, as in GlimpsePrune;
                "later": of the layers that follow alone, as in the public code of other methods.
            prune_videos: each clip by the rule for itself; if not, all its tokens stay, as in the
                official code.
            seed: of methods that draw, for all prompts or each.
            evidence: bool [N] of each prompt, the visual tokens that its answer needs; the method
                "oracle" keeps them.
            trace: keep `hidden`; pruning then waits for the end of layer K.
            see: in place of `Engine.see`, for pictures that have been seen before.

        Raises:
            UsageError: a prompt exceeds the context, or an argument makes no sense.
        """
        caps = (max_ratio, max_frame_ratio)
        plan = self.plan(method, threshold, *caps, min_tokens, anchors, kv_drop, prune_videos)
        self.check_context([len(prompt) for prompt in prompts], max_new_tokens)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        clock = Clock(self.device)
        batch = Batch.of(prompts, self.config, self.device, prune_videos)
        patches = joined([prompt.patches for prompt in prompts])
        known = None if evidence is None else torch.cat(list(evidence)).to(self.device)

        sight = (see or self.see)(patches, batch.all_grids, plan.method)
        clock.lap("vision")
        reading = Reading(self.decoder, self.config.text_config, self.ops, batch, sight.visual)
        request = Request(batch, sight, plan, max_new_tokens, seeds, known, trace)
        return self.read(reading, request, clock)

    def see(self, patches: Tensor, grids: Sequence[Grid], pruner: Method) -> Sight:
        """Pictures through the vision encoder, with what a method wants to know of it."""
        watch = Watch(pruner.watches(self))
        return Sight(*self.vision(patches.to(self.device), grids, self.taps(pruner), watch), watch)

    def read(
        self,
        reading: Reading,
        request: Request,
        clock: Clock,
        begun: int = 0,
        choice: Choice | None = None,
    ) -> Prefill:
        """Prompts through the decoder, pruned on the way.

        Args:
            reading: of the prompts, the first `begun` stops behind it.
            request: what they are, and what to do.
            clock: what measures it.
            begun: stops that a prefix has passed.
            choice: made at the last of those.
        """
        pruner, choice = request.plan.method, choice or Choice()
        probe, reads = pruner.probe(self), pruner.reads(self)
        inside, traced = not (pruner.needs_hidden or request.trace), None
        for stage, stop in list(enumerate(pruner.stops(self)))[begun:]:
            read = reading.run(stop, probe, reads, inside)
            if stop:
                clock.lap(f"layers < {stop}")
            choice = pruner.choose(self._look(reading, request, stage, read))
            clock.lap("score")
            if reading.inside:
                reading.attend(choice.kept)
                clock.lap(f"layers < {stop}")
            traced = reading.prompts if request.trace else None
            reading.keep(choice.kept, choice.values, request.plan.kv_drop, request.room)
            clock.lap("keep")
        first = reading.layers
        logits, cache = reading.finish(request.room)
        processed, cached = reading.budget()
        clock.lap(f"layers ≥ {first}" if first else "layers")

        return Prefill(
            method=pruner.name,
            visual=request.sight.visual,
            taps=request.sight.taps,
            glimpse_logits=choice.glimpse_logits,
            importance=choice.importance,
            kept=reading.kept,
            positions=reading.batch.positions,
            hidden=traced,
            logits=logits,
            cache=cache,
            processed=processed,
            cached=cached,
            batch=request.batch,
            clock=clock,
        )

    def _look(self, reading: Reading, request: Request, stage: int, read: dict[int, Seen]) -> Look:
        """What the method sees at one of its stops."""
        sight = request.sight
        look = Look(
            engine=self,
            stage=stage,
            batch=reading.batch,
            hidden=None if reading.inside else reading.prompts,
            source=sight.visual,
            source_counts=request.batch.visual_counts,
            visual=sight.visual,
            taps=sight.taps,
            watch=sight.watch,
            asking=reading.asking,
            layers=read,
            rule=request.plan.rule,
            seeds=request.seeds,
            evidence=request.evidence,
        )
        return look.of(reading.kept) if stage else look

    def plan(
        self,
        method: str | None = None,
        threshold: float | None = None,
        max_ratio: float | None = None,
        max_frame_ratio: float | None = None,
        min_tokens: int | None = None,
        anchors: Sequence[str] | None = None,
        kv_drop: str = "all",
        prune_videos: bool = True,
    ) -> Plan:
        """What `prefill_many` does with these arguments."""
        if kv_drop not in KV_DROPS:
            raise UsageError(f"unknown kv_drop '{kv_drop}'; choose one of {', '.join(KV_DROPS)}")
        pruner = self._method(method, max_ratio, max_frame_ratio, anchors)
        if not pruner.pooled:
            anchors = ()  # what the glimpse weights say of corners is not for it
        caps = (
            pruner.share(self, cap, kv_drop) if cap is not None and pruner.stops(self) else cap
            for cap in (max_ratio, max_frame_ratio)
        )
        rule = self._selection(threshold, *caps, min_tokens, anchors)
        return Plan(pruner, rule, kv_drop, prune_videos)

    def taps(self, pruner: Method) -> Sequence[int]:
        """Vision blocks to tap: the predictor's, so that they can be looked at, or the method's."""
        return pruner.taps(self) or (
            self.glimpse.config.selected_visual_layers if self.glimpse else ()
        )

    def _selection(
        self,
        threshold: float | None,
        max_ratio: float | None,
        max_frame_ratio: float | None,
        min_tokens: int | None,
        anchors: Sequence[str] | None,
    ) -> Selection:
        own = self.glimpse.selection if self.glimpse else Selection()
        return Selection(
            own.threshold if threshold is None else threshold,
            own.max_ratio if max_ratio is None else max_ratio,
            own.max_frame_ratio if max_frame_ratio is None else max_frame_ratio,
            own.min_tokens if min_tokens is None else min_tokens,
            own.anchors if anchors is None else tuple(anchors),
        )

    def _method(
        self,
        name: str | None,
        max_ratio: float | None,
        max_frame_ratio: float | None,
        anchors: Sequence[str] | None,
    ) -> Method:
        name = name or ("glimpse" if self.glimpse else "dense")
        method = find_method(name, max_ratio, max_frame_ratio, anchors)
        if method.name == "glimpse" and not self.glimpse:
            raise UsageError(
                f"method glimpse needs glimpse weights, and {self.name} has none beside it; name "
                "them (published: ashun989/GlimpsePrune_Qwen2.5-VL-3B-Instruct, and -7B-)"
            )
        return method

    def check_context(self, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Refuses prompts of these lengths that leave no room for the answer."""
        limit, longest = self.config.text_config.max_position_embeddings, max(lengths, default=0)
        if not longest:
            raise UsageError("there is no prompt")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens {max_new_tokens} must be at least 1")
        if longest + max_new_tokens > limit:
            raise UsageError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
                f"{limit}; use fewer or smaller pictures (max_pixels), or fewer new tokens"
            )

    def decode(
        self,
        prefill: Prefill,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        ahead: int = 0,
    ) -> Iterator[int]:
        """Tokens of the answer to one prompt, as they are chosen; arguments as `decode_many`."""
        for (token,) in self.decode_many(prefill, max_new_tokens, ignore_eos, sampling, ahead):
            yield token

    @torch.inference_mode()
    def decode_many(
        self,
        prefill: Prefill,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        ahead: int = 0,
    ) -> Iterator[list[int | None]]:
        """Answers all prompts of a prefill in step.

        A second call begins again behind the prompts.

        Args:
            prefill: from `prefill` or `prefill_many`.
            max_new_tokens: at most so many for each prompt.
            ignore_eos: go on behind the tokens that end an answer.
            sampling: greedy if None.
            ahead: steps to run, behind the first token, before tokens are looked at: a GPU then
                does not wait for the host between them, and may run as many for nothing.

        Yields:
            One token a prompt, the ending one included; None for a prompt that has ended.
        """
        prompts = prefill.batch.token_ids.split(prefill.batch.counts)
        sampler = Sampler(sampling or Sampling(), prompts, self.config.text_config.vocab_size)
        self.check_context(prefill.batch.counts, max_new_tokens)
        cache, logits = prefill.rewind(max_new_tokens), prefill.logits.view(len(prompts), -1)
        running, unread = [True] * len(prompts), []
        with self._steps(cache, max_new_tokens) as step:
            for count in range(1, max_new_tokens + 1):
                tokens = sampler(logits)
                unread.append(tokens)
                if count == 1 or len(unread) > ahead or count == max_new_tokens:
                    for chosen in [tokens.tolist() for tokens in unread]:
                        said = zip(chosen, running, strict=True)
                        yield [token if runs else None for token, runs in said]
                        running = [
                            runs and (ignore_eos or token not in self.eos_token_id)
                            for token, runs in zip(chosen, running, strict=True)
                        ]
                        if not any(running):
                            return
                    unread.clear()
                if count < max_new_tokens:
                    logits = step(tokens)

    @contextmanager
    def _steps(self, cache: Cache | Stack, steps: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """What takes token ids [B] to the logits [B, vocab] behind them, so many times."""
        # Layers with rows of their own are nobody's default, and not copied to a graph.
        if self.graphs and isinstance(cache, Cache):
            with self.graphs.lend(cache, steps) as graph:
                yield graph
            return
        rope = self.decode_rope(cache.next_position, steps)
        counted = iter(range(steps))

        def step(token_ids: Tensor) -> Tensor:
            logits = self.decoder.step(token_ids, rope[next(counted)], cache)
            cache.next_position = cache.next_position + 1
            return logits

        yield step

    def decode_rope(self, next_position: Tensor, steps: int) -> Rope:
        """Tables [steps, B, 1, D]: an answer advances on all three axes together."""
        positions = next_position + torch.arange(steps, device=self.device)[:, None]
        rope = mrope(positions.flatten().expand(3, -1), self.config.text_config)
        shape = (steps, len(next_position), 1, -1)
        return Rope(rope.cos.view(shape), rope.sin.view(shape))

    def stream(
        self,
        images: Visual | Sequence[Visual],
        question: str | Sequence[Visual],
        *,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        prompt_options: dict | None = None,
        **prefill_options,
    ) -> Stream:
        """The answer to a question about pictures, piece by piece.

        Args:
            images, question: as `Processor.prompt`; `prompt_options` are its further arguments.
            max_new_tokens, ignore_eos, sampling: as `decode_many`.
            prefill_options: method, max_ratio and the other arguments of `prefill_many`.

        Raises:
            UsageError, NanoglimpseError: from these.
        """
        return Stream(
            self,
            partial(self.prompt, images, question, **(prompt_options or {})),
            partial(self.prefill, **({"max_new_tokens": max_new_tokens} | prefill_options)),
            {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "sampling": sampling},
        )

    def ask(
        self, images: Visual | Sequence[Visual], question: str | Sequence[Visual], **options
    ) -> Answer:
        """The answer to a question about pictures; arguments as `stream`."""
        return self.stream(images, question, **options).finish()

    def session(
        self, images: Visual | Sequence[Visual], method: str | None = None, **options
    ) -> "Session":
        """Reads pictures once, for any number of questions; arguments as `Session.begin`."""
        from .session import Session  # which needs this module

        return Session.begin(self, images, method, **options)

    def load_session(self, path: str | Path) -> "Session":
        """A session that `Session.save` has written.

        Raises:
            UsageError, NanoglimpseError: there is none, it is broken, or of another model.
        """
        from .session_file import load_session  # which needs this module

        return load_session(self, path)

    def answers(
        self,
        items: Iterable[Item],
        *,
        max_batch_tokens: int = 8192,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        prompt_options: dict | None = None,
        **prefill_options,
    ) -> Iterator[tuple[int, Outcome]]:
        """Answers to many questions as they finish, with the number of each.

        Every answer is that of `ask`. A question whose pictures cannot be used, or that is too
        long, gets its error for an answer and leaves the others alone.

        Args:
            items: (images, question) each, as `ask` takes them; opened when their turn comes.
            max_batch_tokens: rows that are read at once, and that the cache holds; a prompt counts
                as its tokens and `max_new_tokens`. One that is longer alone runs alone.
            max_new_tokens, ignore_eos, sampling, prompt_options: as `stream`.
            prefill_options: method, max_ratio and the other arguments of `prefill_many` that hold
                for all prompts.

        Raises:
            UsageError: an option makes no sense, whatever the question.
        """
        return iter(
            Many(
                self,
                items,
                max_batch_tokens=max_batch_tokens,
                max_new_tokens=max_new_tokens,
                ignore_eos=ignore_eos,
                sampling=sampling,
                prompt_options=prompt_options or {},
                prefill_options=prefill_options,
            )
        )

    def ask_many(self, items: Iterable[Item], **options) -> list[Outcome]:
        """Answers to many questions in their order; arguments as `answers`."""
        found = dict(self.answers(items, **options))
        return [found[index] for index in range(len(found))]


def _eos(path: Path, config: Config) -> frozenset[int]:
    """Ids that end an answer: generation_config.json where it names some, else config.json."""
    named = read_json(path).get("eos_token_id") if path.exists() else None
    if named is None:
        return frozenset(config.eos_token_id)
    return frozenset([named] if isinstance(named, int) else named)
