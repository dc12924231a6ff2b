"""bench.py on a tiny shape: what it prints, what it refuses, and that its costs are right."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from nanoglimpse import flops as cost
from nanoglimpse import load
from nanoglimpse.benchmark import roofs
from nanoglimpse.benchmark.contenders import Peer, Static
from nanoglimpse.engine import Engine
from nanoglimpse.kvcache.pool import KVPool
from nanoglimpse.model.decoder import Block
from tests.helpers.commands import exit_code
from tests.helpers.tiny import config_dict
from tests.methods.test_methods import prompt_of

ROOT = Path(__file__).parents[2]
GRID = (1, 12, 18)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:  # the roofs do not matter here
        patch.setattr(roofs, "SIDE", {"cpu": 128})
        patch.setattr(roofs, "READ", {"cpu": 2**20})
        yield module


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    file = tmp_path_factory.mktemp("shape") / "config.json"
    file.write_text(
        json.dumps(
            config_dict(
                hidden_size=64,
                out_hidden_size=64,
                intermediate_size=128,
                num_attention_heads=8,
                vocab_size=144,
            )
        )
    )
    return file


def call(bench, shape, capsys, *more):
    arguments = ["--shape", shape, "--dtype", "float32", "--device", "cpu", "--text", 12]
    arguments += ["--visual-tokens", 24, "--rounds", 1, "--new", 4, *more]
    code = exit_code(bench.main, arguments)
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_contenders_side_by_side(bench, shape, capsys, tmp_path):
    figure = tmp_path / "figure.png"
    options = ("--retain", 1, 0.25, "--batch", 1, 2, "--plot", figure)
    code, out, _ = call(bench, shape, capsys, *options)
    assert code == 0
    summary = json.loads(out.splitlines()[-1])
    assert {"torch", "commit", "matrix_gflops", "read_gb_per_s"} <= summary["machine"].keys()
    assert [case["batch"] for case in summary["cases"]] == [1, 2]
    for case in summary["cases"]:
        dense, pruned, peer = case["arms"].values()
        assert list(case["arms"])[:2] == ["dense", "pruned to 25.0%"]
        assert list(case["arms"])[2].startswith("transformers")
        assert dense["kv_rows"] == 6 * case["batch"] * (24 + 12 + 2)
        assert pruned["kv_rows"] == 6 * case["batch"] * (6 + 12 + 2)
        stages = {
            "pixels",
            "preprocess",
            "vision",
            "prefill < 4",
            "score",
            "keep",
            "prefill ≥ 4",
            "lm_head",
        }
        assert stages | {"first token", "a token", "end to end"} <= pruned.keys()
        assert peer["first token"]["ms"] > 0
        assert ("further question" in dense) == (case["batch"] == 1)
        for arm in (dense, pruned) if case["batch"] == 1 else ():
            first, further = arm["first question"], arm["further question"]
            assert first["ms"] > 0 < further["ms"]
            assert first["flops"] > arm["prefill_flops"] > further["flops"]
            assert first["floor_ms"] > further["floor_ms"]
        # One round has no spread.
        assert pruned["a token"]["ms_spread"] is None
        assert dense["a token"]["floor_ms"] > pruned["a token"]["floor_ms"]
        assert set(case["ratios"]["a token"]) >= {"engine", "engine_ceiling", "pruned to 25.0%"}
    # Dense, prefix and question take what the prompt does.
    dense = summary["cases"][0]["arms"]["dense"]
    assert dense["first question"]["flops"] == dense["vision"]["flops"] + dense["prefill_flops"]
    assert "paper's convention" in out
    assert "times as fast as dense" in out.splitlines()[-3]
    with Image.open(figure) as image:
        assert len(image.getcolors(10**6)) > 5


@pytest.mark.slow
def test_transformers_with_a_static_cache(bench, shape, capsys, monkeypatch):
    """Here without the compilation, which takes half a minute; not timed if it says otherwise."""
    asked, plain = [], Peer.tokens

    def tokens(self, count, cache_implementation=None, compile_config=None, **options):
        asked.append((cache_implementation, getattr(compile_config, "_compile_all_devices", None)))
        return plain(self, count, **options)

    monkeypatch.setattr(Peer, "tokens", tokens)
    code, out, _ = call(bench, shape, capsys, "--static", "--retain", 0.25)
    assert code == 0
    assert set(asked) == {("static", True), (None, None)}
    (case,) = json.loads(out.splitlines()[-1])["cases"]
    arms, version = case["arms"], [*case["arms"]][2].split()[1].rstrip(",")
    assert [*arms][2:] == [
        f"transformers {version}, SDPA",
        f"transformers {version}, static cache, compiled",
    ]
    assert case["ratios"]["a token"]["engine_static"] > 0
    assert "engine over static" in out
    monkeypatch.setattr(Static, "tokens", lambda *args, **options: 0 * plain(*args, **options))
    code, out, _ = call(bench, shape, capsys, "--static", "--retain", 0.25)
    assert code == 1
    assert "static cache, compiled differ" in out


@pytest.mark.slow
def test_nothing_is_timed_that_computes_wrong(bench, shape, capsys, monkeypatch):
    """Here: a pruned model whose surviving rows attend to all rows alike."""
    query = Block.query_of_normed
    monkeypatch.setattr(Block, "query_of_normed", lambda *args: torch.zeros_like(query(*args)))
    code, out, _ = call(bench, shape, capsys, "--retain", 0.25, "--alone")
    assert code == 1
    assert "not timed, it computes wrong: " in out
    assert "GFLOP " not in out
    assert json.loads(out.splitlines()[-1])["cases"] == []


@pytest.mark.slow
def test_the_gate_holds_transformers_beside(bench, shape, capsys, monkeypatch):
    monkeypatch.setattr(
        "nanoglimpse.model.decoder.Decoder.logits",
        lambda self, hidden: hidden.new_ones(len(hidden), 144),
    )
    code, out, _ = call(bench, shape, capsys, "--retain", 1)
    assert code == 1
    assert "logits from transformers' differ" in out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_questions_of_different_sizes(bench, shape, capsys, dtype):
    """At once, one by one and padded: the same answers, which end at different places."""
    options = ("--ragged", 5, "--new", 12, "--retain", 0.25, "--dtype", dtype)
    code, out, _ = call(bench, shape, capsys, *options)
    assert code == 0
    assert "5 questions at once, 6 to 24 visual tokens, 13 to 38 rows, answers of" in out
    (case,) = json.loads(out.splitlines()[-1])["cases"]
    arms = case["arms"]
    ours = [f"{n}, {w}" for n in ("dense", "pruned to 25.0%") for w in ("at once", "one by one")]
    assert [*arms][:4] == ours
    assert len(arms) == 5
    assert [*arms][4].startswith("transformers")
    if dtype == "float32":
        tokens = [arm["tokens"] for arm in arms.values()]
        assert tokens[0] == tokens[1] == tokens[4]
        assert tokens[2] == tokens[3]
        assert 5 < tokens[0] < 5 * 12
    for arm in arms.values():
        assert arm["questions/s"] == pytest.approx(5000 / arm["ms"], rel=1e-3)
        assert arm["tokens/s"] == pytest.approx(1000 * arm["tokens"] / arm["ms"], rel=1e-3)
        assert arm["ms_spread"] is None
    # One round was counted, so that its quotients are the medians.
    dense, pruned = case["ratios"].values()
    for name, ratios in zip(("dense", "pruned to 25.0%"), (dense, pruned), strict=True):
        own, others = arms[f"{name}, at once"]["ms"], arms[f"{name}, one by one"]["ms"]
        assert ratios["one by one"] == pytest.approx(others / own, rel=1e-3)
        assert ratios["transformers"] == pytest.approx([*arms.values()][4]["ms"] / own, rel=1e-3)
    assert pruned["dense"] == pytest.approx(arms[ours[0]]["ms"] / arms[ours[2]]["ms"], rel=1e-3)
    assert "dense" not in dense
    assert "times transformers" in out.splitlines()[-3]


def misplaced(self, source, sequence, room, admit=KVPool.admit):
    """Answers in a batch go on from a position too far."""
    admit(self, source, sequence, room)
    self.next_position = self.next_position + 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("place", "other", "words"),
    [
        (
            "nanoglimpse.kvcache.pool.KVPool.admit",
            misplaced,
            "tokens, dense at once and one by one differ",
        ),
        (
            "nanoglimpse.model.decoder.Decoder.logits",
            lambda self, hidden: torch.arange(144.0, device=hidden.device).expand(len(hidden), -1),
            "transformers",
        ),
    ],
    ids=["at once", "one by one"],
)
def test_no_different_answers_are_timed(
    bench, shape, capsys, monkeypatch, dtype, place, other, words
):
    if dtype == "bfloat16" and "KVPool" in place:
        other, place = unlike, "nanoglimpse.engine.Engine.prefill_many"
        words = "logits, dense at once and one by one differ by"
    monkeypatch.setattr(place, other)
    options = ("--ragged", 5, "--new", 12, "--retain", 1, "--dtype", dtype)
    code, out, _ = call(bench, shape, capsys, *options)
    assert code == 1
    assert "not timed, it computes wrong: " in out
    assert words in out
    assert json.loads(out.splitlines()[-1])["cases"] == []


def unlike(self, prompts, *rest, prefill_many=Engine.prefill_many, **options):
    """Several prompts are read in another order."""
    return prefill_many(self, prompts[::-1], *rest, **options)


@pytest.mark.slow
def test_questions_without_transformers_or_several_counts(bench, shape, capsys):
    options = ("--ragged", 2, 3, "--retain", 1, "--alone", "--visual-tokens", 24, 40)
    code, out, _ = call(bench, shape, capsys, *options)
    assert code == 0
    found = json.loads(out.splitlines()[-1])["cases"]
    assert [case["questions"] for case in found] == [2, 3, 2, 3]
    assert [*found[0]["arms"]] == ["dense, at once", "dense, one by one"]
    assert [*found[0]["ratios"]["dense"]] == ["one by one"]


@pytest.mark.slow
def test_operations_alone(bench, shape, capsys):
    code, out, _ = call(bench, shape, capsys, "--kernels")
    assert code == 0
    entries = json.loads(out.splitlines()[-1])["kernels"]
    assert {"prefill attention", "cache keep"} <= {entry["name"] for entry in entries}
    assert all(entry["ms"] > 0 < entry["of_roof"] for entry in entries)


@pytest.mark.slow
def test_accuracy_in_few_bits(bench, shape, capsys):
    code, out, _ = call(bench, shape, capsys, "--quantize", "int8", "--alone", "--retain", 1)
    assert code == 0
    errors = json.loads(out.splitlines()[-1])["accuracy"]
    assert 0 < errors["int8"] < 0.2
    assert 0 < errors["bfloat16"] < 0.2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--retain", "0"), "--retain: must be in (0, 1]"),
        (("--new", "1"), "--new: must be a whole number of at least 2"),
        (("--layers", "0"), "--layers: must be a whole number of at least 1"),
        (("--ragged", "4", "0"), "--ragged: must be a whole number of at least 1"),
        (("--ragged", "4", "--plot", "x.png"), "--plot"),
        (("--shape", "no.json"), "no.json"),
        (("--device", "tpu"), "--device: must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_misuse_is_one_line(bench, shape, capsys, options, words):
    code, out, err = call(bench, shape, capsys, *options)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "glimpse", "random"])
def test_products_are_counted_as_torch_counts_them(tiny_folder, method):
    """Matrix products of both towers and the predictor; attention is left to its own formula."""
    engine = load(tiny_folder, dtype="float32", device="cpu", backend="torch")
    width, prompt = engine.config.text_config.hidden_size, prompt_of(engine, 5, GRID, 7)

    def products(call) -> tuple[int, Any]:
        with FlopCounterMode(display=False) as counter:
            result = call()
        counts = counter.get_flop_counts()["Global"]
        return sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm")), result

    cap = {} if method == "dense" else {"max_ratio": 0.4}
    vision, _ = products(lambda: engine.vision(prompt.patches, prompt.grids))
    both, prefill = products(lambda: engine.prefill(prompt, method, **cap))
    found = cost.count(engine.model, prefill, 0, 1)
    # Windows of 4 × 4 visual tokens in a grid of 6 × 9, and two blocks that see all 216 patches.
    windows = 2 * 64**2 + 2 * 32**2 + 16**2 + 8**2
    attention = 4 * (3 * windows + 2 * 216**2) * engine.config.vision_config.hidden_size
    assert vision == found["vision"] - attention
    pairs = sum(layer.pairs for layer in cost.RowCounts.of(prefill).prefill())
    attention = 4 * pairs * width
    if method == "glimpse":
        glimpse, visual = engine.glimpse.config, len(prefill.kept)
        sizes = 2 * glimpse.attn_fuse_size + glimpse.visual_cond_size
        attention += 2 * len(glimpse.selected_visual_layers) * visual**2 * sizes
        attention += 2 * len(glimpse.selected_layers) * len(prompt) * width
    assert both - vision == found["prefill"] - attention
