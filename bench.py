"""Times this engine, dense and pruned, beside transformers on the same checkpoint in one run.

    python bench.py                              the embedded checkpoint, a 448 × 448 picture
    python bench.py --shape 3b --layers 4        random weights of that shape, 4 layers of each kind

Rounds alternate between the arms, so a ratio holds when the machine drifts: it is the median over
rounds of theirs / ours. A gate comes first: if dense tokens differ from transformers', nothing is
printed. Floors are FLOPs over the rate of a large product, and bytes of weights and KV over the
bandwidth of summing a large tensor, both measured in this run. The last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import nanoglimpse
from nanoglimpse.config import Config
from nanoglimpse.engine import Engine
from nanoglimpse.vision import layout

QUESTION = "Which number is written on the red triangle?"
EXAMPLES = Path(__file__).parent / "weights" / "nano" / "examples"
SHAPES = Path(__file__).parent / "tests" / "configs"


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="nano", help="checkpoint to time (default: nano)")
    p.add_argument("--image", default=EXAMPLES / "scene_4.png", help="(default: a 448 px scene)")
    p.add_argument("--shape", choices=["3b", "7b", "32b", "72b"], help="random weights instead")
    p.add_argument("--layers", type=int, default=4, help="of a shape, each tower (default: 4)")
    p.add_argument("--dtype", default="auto", help="(default: auto)")
    p.add_argument("--device", default="auto", help="(default: auto)")
    p.add_argument("--new", type=int, default=64, help="tokens to decode (default: 64)")
    p.add_argument("--rounds", type=int, default=11, help="counted rounds (default: 11)")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model
        if args.shape:
            folder = random_checkpoint(Path(scratch), args.shape, args.layers)
        engine = nanoglimpse.load(folder, dtype=args.dtype, device=args.device)
        arms = {"dense": Ours(engine, args.image, "dense")}
        if engine.glimpse:
            arms["pruned"] = Ours(engine, args.image, "glimpse")
        peer = Peer.load(folder if args.shape else str(engine.processor.folder), engine, args.image)
        if peer:
            theirs, ours = peer.tokens(args.new), arms["dense"].tokens(args.new)
            if theirs != ours:
                print(f"wrong tokens, nothing is timed: {ours} but {theirs}", file=sys.stderr)
                return 1
            arms["transformers"] = peer
        figures = measure(arms, args.new, args.rounds)
        report(engine, arms, figures, args)
    return 0


class Ours:
    """This engine on one question about one picture."""

    def __init__(self, engine: Engine, image, method: str):
        self.engine, self.image, self.method = engine, image, method
        self.prompt = make_prompt(engine, image)

    def preprocess(self):
        """The prompt from the file."""
        return make_prompt(self.engine, self.image)

    @torch.inference_mode()
    def vision(self):
        """Visual tokens."""
        patches = self.prompt.patches.to(self.engine.device)
        return self.engine.vision(patches, self.prompt.grids)

    def forward(self):
        """Vision and decoder up to the first logits."""
        return self.engine.prefill(self.prompt, self.method, max_new_tokens=1)

    def first_token(self):
        """From the file to the first token."""
        prefill = self.engine.prefill(self.preprocess(), self.method, max_new_tokens=1)
        return list(self.engine.decode(prefill, 1))

    def decode(self, count: int) -> float:
        """Seconds for `count` tokens behind the first."""
        prefill = self.engine.prefill(self.prompt, self.method, max_new_tokens=count + 1)
        moments = [now() for _ in self.engine.decode(prefill, count + 1, ignore_eos=True)]
        return moments[-1] - moments[0]

    def tokens(self, count: int) -> list[int]:
        """The first `count` tokens."""
        prefill = self.engine.prefill(self.prompt, self.method, max_new_tokens=count)
        return list(self.engine.decode(prefill, count, ignore_eos=True))


class Peer:
    """transformers as its users run it: SDPA, DynamicCache, `generate`, last-row logits."""

    def __init__(self, model, processor, ours: Engine, image):
        self.model, self.processor, self.ours, self.image = model, processor, ours, image
        self.inputs = self.preprocess()

    @classmethod
    def load(cls, folder, engine: Engine, image) -> "Peer | None":
        """None where transformers is not installed."""
        try:
            import transformers
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
                Qwen2VLImageProcessorPil,
            )
        except ImportError:
            return None
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=engine.dtype, attn_implementation="sdpa"
        )
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        pixels = engine.processor.pixels
        processor = Qwen2VLImageProcessorPil(
            min_pixels=pixels.min_pixels,
            max_pixels=pixels.max_pixels,
            image_mean=pixels.image_mean,
            image_std=pixels.image_std,
        )
        return cls(model.to(engine.device).eval(), processor, engine, image)

    def preprocess(self):
        """Pixels from the file; token ids are taken over, which spares it the chat template."""
        with Image.open(self.image) as picture:
            pixels = self.processor(images=picture, return_tensors="pt")
        ids = make_prompt.ids[None]
        kinds = (ids == self.ours.config.image_token_id).int()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= {**pixels, "mm_token_type_ids": kinds}
        return {name: tensor.to(self.ours.device) for name, tensor in inputs.items()}

    @torch.inference_mode()
    def vision(self):
        """Visual tokens."""
        patches = self.inputs["pixel_values"].to(self.model.dtype)
        return self.model.model.visual(patches, grid_thw=self.inputs["image_grid_thw"])

    @torch.inference_mode()
    def forward(self):
        """Vision and decoder up to the first logits."""
        return self.model(**self.inputs, logits_to_keep=1, use_cache=True)

    def first_token(self):
        """From the file to the first token."""
        return self.model.generate(**self.preprocess(), max_new_tokens=1, do_sample=False)

    def decode(self, count: int) -> float:
        """Seconds for `count` tokens behind the first."""
        moments = []
        for length in (1, count + 1):
            start = now()
            self.model.generate(**self.inputs, max_new_tokens=length, do_sample=False)
            moments.append(now() - start)
        return moments[1] - moments[0]

    def tokens(self, count: int) -> list[int]:
        """The first `count` tokens."""
        out = self.model.generate(**self.inputs, max_new_tokens=count, do_sample=False)
        return out[0, self.inputs["input_ids"].shape[1] :].tolist()


def make_prompt(engine: Engine, image):
    """The question about the picture; without a tokenizer random text of its length."""
    if engine.processor.tokenizer:
        prompt = engine.prompt(image, QUESTION)
    else:
        patches, grid = nanoglimpse.processor.preprocess_image(image)
        config = engine.config
        placeholders = [config.image_token_id] * (grid[1] * grid[2] // 4)
        text = list(range(100, 120))
        ids = [
            *text,
            config.vision_start_token_id,
            *placeholders,
            config.vision_end_token_id,
            *text,
        ]
        prompt = nanoglimpse.Prompt.from_tokens(ids, patches, [grid], config=config)
    make_prompt.ids = prompt.token_ids
    return prompt


def random_checkpoint(folder: Path, shape: str, layers: int) -> Path:
    """A checkpoint of this shape with random bf16 weights and few layers."""
    sys.path.insert(0, str(Path(__file__).parent))
    from safetensors.torch import save_file

    from tests.tiny import model_tensors

    config = json.loads((SHAPES / f"qwen2.5-vl-{shape}.json").read_text())
    config["num_hidden_layers"] = config["vision_config"]["depth"] = layers
    config["vision_config"]["fullatt_block_indexes"] = [layers - 1]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: t.bfloat16() for name, t in model_tensors(config).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def now() -> float:
    """Seconds, after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable) -> float:
    """Milliseconds of one call."""
    start = now()
    call()
    return 1000 * (now() - start)


STAGES = ("preprocess", "vision", "forward", "first_token", "decode")


def measure(arms: dict, new: int, rounds: int) -> dict:
    """Milliseconds by arm and stage, one value a round; the first two rounds warm up."""
    figures = {name: {stage: [] for stage in STAGES} for name in arms}
    for number in range(rounds + 2):
        for stage in STAGES:
            for name, arm in arms.items():
                if stage == "decode":
                    value = 1000 * arm.decode(new) / new
                else:
                    value = timed(getattr(arm, stage))
                if number > 1:
                    figures[name][stage].append(value)
    return figures


def flops(config: Config, grids, rows: int) -> dict[str, float]:
    """Multiply-adds counted twice: vision encoder, and the dense decoder up to the last logits."""
    v, t = config.vision_config, config.text_config
    plan = layout(tuple(grids), v, torch.device("cpu"))
    patches = len(plan.patches)
    linear = v.hidden_size * (4 * v.hidden_size + 3 * v.intermediate_size)
    pairs = {True: sum(n * n for n in plan.frames.lengths)}
    pairs[False] = sum(n * n for n in plan.windows.lengths)
    attention = sum(pairs[i in v.fullatt_block_indexes] for i in range(v.depth)) * v.hidden_size
    unit = v.hidden_size * v.merge_unit
    vision = 2 * patches * (v.depth * linear + v.patch_dim * v.hidden_size) + 4 * attention
    vision += 2 * patches // v.merge_unit * unit * (unit + v.out_hidden_size)
    kv = 2 * t.num_key_value_heads * t.head_dim
    layer = t.hidden_size * (2 * t.hidden_size + kv + 3 * t.intermediate_size)
    depth = t.num_hidden_layers - 1  # the last layer needs keys and values of all rows, no more
    decoder = 2 * rows * (depth * layer + t.hidden_size * kv) + 2 * depth * rows**2 * t.hidden_size
    return {
        "vision": vision,
        "forward": vision + decoder + 2 * (layer + t.hidden_size * t.vocab_size),
    }


def roofs(engine: Engine) -> tuple[float, float]:
    """FLOP/s of a large product and bytes/s of reading, in this dtype on this device."""
    a = torch.randn(2048, 2048, device=engine.device).to(engine.dtype)
    product = min(timed(lambda: a @ a) for _ in range(9))
    big = torch.ones(2**27, dtype=torch.float32, device=engine.device)
    read = min(timed(big.sum) for _ in range(9))
    return 2 * 2048**3 / product * 1000, big.nbytes / read * 1000


def report(engine: Engine, arms: dict, figures: dict, args: argparse.Namespace) -> None:
    """The table, the ratios, and the JSON line."""
    prompt = arms["dense"].prompt
    rate, bandwidth = roofs(engine)
    work = flops(engine.config, prompt.grids, len(prompt))
    weights = sum(p.nbytes for p in engine.decoder.parameters())
    floors = {stage: 1000 * count / rate for stage, count in work.items()}
    floors["decode"] = 1000 * weights / bandwidth
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(engine.dtype)[6:],
        "torch": torch.__version__,
        "nanoglimpse": nanoglimpse.__version__,
        "commit": commit(),
        "matrix_gflops": round(rate / 1e9),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "model": args.shape or args.model,
        "visual_tokens": int(prompt.visual.sum()),
        "prompt_tokens": len(prompt),
    }
    print("  ".join(f"{key} {value}" for key, value in machine.items()))
    names = {"forward": "vision + prefill", "first_token": "file to 1st token", "decode": "a token"}
    head = f"{'ms, median (p20-p80)':20}" + "".join(f"{name:>26}" for name in arms)
    print(head + f"{'floor':>9}" + "".join(f"{'x ' + n:>10}" for n in arms if n != "transformers"))
    summary: dict = {"machine": machine, "floor_ms": floors, "ms": {}, "ratio": {}}
    for stage in STAGES:
        line = f"{names.get(stage, stage):20}"
        for name in arms:
            values = sorted(figures[name][stage])
            fifth = len(values) // 5
            middle = statistics.median(values)
            line += f"{middle:12.2f} ({values[fifth]:.2f}-{values[-1 - fifth]:.2f})".rjust(26)
            summary["ms"].setdefault(name, {})[stage] = round(middle, 3)
        line += f"{floors[stage]:9.2f}" if stage in floors else " " * 9
        for name in arms:
            if name != "transformers" and "transformers" in arms:
                pairs = zip(figures["transformers"][stage], figures[name][stage], strict=True)
                ratio = statistics.median(theirs / ours for theirs, ours in pairs)
                line += f"{ratio:10.2f}"
                summary["ratio"].setdefault(name, {})[stage] = round(ratio, 3)
        print(line)
    print(json.dumps(summary))


def commit() -> str:
    """Of this checkout, marked if it has changes; empty elsewhere."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
