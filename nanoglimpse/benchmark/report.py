"""The tables of a case, its entry in the JSON line, and a line about what was gained."""

import statistics
from dataclasses import asdict
from typing import Any

from nanoglimpse.benchmark.cases import Case
from nanoglimpse.benchmark.contenders import Ours
from nanoglimpse.benchmark.figures import Ratios, spread
from nanoglimpse.benchmark.lengths import STAGES
from nanoglimpse.benchmark.output import Cell, Output
from nanoglimpse.benchmark.roofs import INVALID
from nanoglimpse.flops import decoder, predict

BETWEEN = ("pixels", "preprocess", "vision", "all prefill", "first token", "a token", "end to end")
COLD = ("first token", "end to end")
Entry = dict[str, Any]


def report(case: Case, out: Output) -> Entry:
    """Writes the tables; returns the entry of the JSON line."""
    rounds, new = case.rounds, case.args.new
    out.note(f"{case.title}, {new} new tokens, medians of {rounds} rounds, ± half their quartiles")
    roofs = case.roofs.record()
    out.note("roofs beside it: " + ", ".join(f"{key} {value}" for key, value in roofs.items()))
    entries = {name: _stages(case, name, ours, out) for name, ours in case.ours.items()}
    for name in case.peers:
        entries[name] = {stage: _figure(case, name, stage) for stage in BETWEEN}
    for name, entry in entries.items():
        entry |= {f"{stage}, cold": {"ms": case.cold[name][stage]} for stage in COLD}
    rates = {name: _rates(case, name) for name in entries}
    for name in entries:
        entries[name] |= rates[name]
    _side_by_side(entries, out)
    columns = ("ms", "ms_spread", "tokens/s", "tokens/s_spread")
    rows = [
        [name, test, *(rate[column] for column in columns)]
        for name, tests in rates.items()
        for test, rate in tests.items()
    ]
    out.table("tokens a second", ["contender", "test", "ms", "±", "tokens/s", "±"], rows)
    return {
        "title": case.title,
        "visual_tokens": case.visual,
        "batch": len(case.workload.prompts),
        "rounds": rounds,
        "roofs": roofs,
        "arms": entries,
        "new_lengths": _new_lengths(case, out),
        "ratios": _ratios(case, out),
    }


def _figure(case: Case, name: str, stage: str) -> Entry:
    values = case.figures[name][stage]
    return {"ms": statistics.median(values), "ms_spread": spread(values)}


def _stages(case: Case, name: str, ours: Ours, out: Output) -> Entry:
    """Writes one of our contenders stage by stage; returns its entry of the JSON line."""
    costs, floors, figures = ours.costs, ours.floors(case.roofs), case.figures[name]
    entry: Entry = {}
    rows, total, below = [], case.middle(name, "end to end"), case.below(name)
    for stage in [stage for stage in figures if stage != "memory"]:
        figure, cost, floor = _figure(case, name, stage), costs.get(stage), floors.get(stage)
        value, times = figure["ms"], case.args.new - 1 if stage.startswith("a token") else 1
        # Beside the answer: questions to a session, pixels as a part of preprocessing, streaming.
        beside = stage.endswith(("question", "streamed")) or stage == "pixels"
        share = None if beside else 100 * value * times / total
        amounts = [cost.flops / 1e9, cost.bytes / 1e6] if cost else [None, None]
        over = (INVALID if stage in below else value / floor) if floor else None
        rows.append([named(stage), value, figure["ms_spread"], share, *amounts, floor, over])
        entry[stage] = figure | {"floor_ms": floor, **(asdict(cost) if cost else {})}
        if floor:
            entry[stage]["roof_invalid"] = stage in below
    head = ["stage", "ms", "±", "% of the answer", "GFLOP", "MB", "floor ms", "× floor"]
    out.table(name, head, rows)
    if below:
        out.note(f"{INVALID}: {', '.join(below)} took less than the roofs, measured again, allow")
    of_what = "beyond the models" if case.engine.device.type == "cuda" else "of the process"
    memory, (_, kv_rows, kv_bytes) = case.middle(name, "memory"), ours.counts
    conventions = _conventions(case, ours)
    exact, paper = (flops / 1e9 for flops in conventions.values())
    out.note(
        f"{name}: KV {kv_rows} rows, {kv_bytes / 1e6:.2f} MB; peak memory {memory / 1e6:.1f} MB "
        f"{of_what}; prefill {exact:.2f} GFLOP, {paper:.2f} by the paper's convention"
    )
    entry |= {"kv_rows": kv_rows, "kv_bytes": kv_bytes, "peak_bytes": memory}
    return entry | conventions


def _conventions(case: Case, ours: Ours) -> dict[str, float]:
    """The FLOPs of the decoder's prefill, counted exactly and as the paper does."""
    exact = sum(ours.costs[stage].flops for stage in ours.prefill_stages())
    paper = decoder(case.engine.config.text_config, ours.counts[0].paper_prefill())
    prompts = case.workload.prompts
    if ours.method != "dense":
        paper += predict(case.engine.model.glimpse_weights.predictor, prompts[0].grids)
    return {"prefill_flops": exact, "prefill_flops_paper": paper * len(prompts)}


def _rates(case: Case, name: str) -> dict[str, Entry]:
    """Tokens a second as llama-bench names them: pp<N> reads N rows, tg<N> generates N tokens."""
    batch, rates = len(case.workload.prompts), {}
    rows, new = len(case.workload.prompts[0]), case.args.new - 1
    for test, stage, tokens, steps in (
        (f"pp{rows}", "all prefill", rows, 1),
        (f"tg{new}", "a token", new, new),
    ):
        milliseconds = [steps * value for value in case.figures[name][stage]]
        speeds = [1000 * batch * tokens / value for value in milliseconds]
        rates[test] = {
            "ms": statistics.median(milliseconds),
            "ms_spread": spread(milliseconds),
            "tokens/s": statistics.median(speeds),
            "tokens/s_spread": spread(speeds),
        }
    return rates


def _side_by_side(entries: dict[str, Entry], out: Output) -> None:
    stages = [
        s for stage in BETWEEN for s in ([f"{stage}, cold"] if stage in COLD else []) + [stage]
    ]
    rows: list[list[Cell]] = []
    for stage in stages:
        figures = [entry[stage] for entry in entries.values()]
        cells = [cell for f in figures for cell in (f["ms"], f.get("ms_spread"))]
        rows.append([named(stage), *cells])
    out.table("milliseconds", ["stage", *(c for name in entries for c in (name, "±"))], rows)


def _new_lengths(case: Case, out: Output) -> dict[str, Entry] | None:
    """Writes what a new length costs beside the same length again; returns the JSON entry."""
    if case.new_lengths is None:
        out.note("no lengths that change every round: the context is too short for them")
        return None
    name, ratios = case.new_lengths.name, Ratios()
    entry, rows = {}, []
    for stage in STAGES:
        new, again = (_figure(case, name, s) for s in (stage, f"{stage}, again"))
        figures = case.figures[name]
        slower = ratios.tell(stage, figures[stage], figures[f"{stage}, again"])
        entry[stage] = {"new": new, "again": again, "slower": slower}
        rows.append([stage, *new.values(), *again.values(), slower])
    head = ["stage", "ms", "±", "the same length again, ms", "±", "times as slow"]
    out.table(name, head, rows)
    ratios.write(out)
    return entry


def _ratios(case: Case, out: Output) -> dict[str, dict[str, float | None]]:
    """Speed-ups of the engine over transformers and of pruning over dense, with their ceilings."""
    floors = {name: ours.floors(case.roofs) for name, ours in case.ours.items()}
    pruned, peers = [name for name in case.ours if name != "dense"], [*case.peers]
    result: dict[str, dict[str, float | None]] = {}
    ratios = Ratios()

    def tell(stage: str, key: str, slow: str, fast: str) -> None:
        figures = (case.figures[name][stage] for name in (slow, fast))
        result[stage][key] = ratios.tell(f"{named(stage)}, {_heading(key)}", *figures)

    for stage in BETWEEN:
        least, entry = floors["dense"].get(stage), result.setdefault(stage, {})
        if peers:
            tell(stage, "engine", peers[0], "dense")
            entry["engine_ceiling"] = case.middle(peers[0], stage) / least if least else None
        if peers[1:]:
            tell(stage, "engine_static", peers[1], "dense")
        for name in pruned:
            tell(stage, name, "dense", name)
            entry[f"{name}_ceiling"] = least / floors[name][stage] if least else None
            if peers:
                tell(stage, f"{name}_both", peers[0], name)
    rows = [[named(stage), *entry.values()] for stage, entry in result.items()]
    title = "times as fast; a ceiling is what this engine's floor would give"
    if result["a token"]:
        out.table(title, ["stage", *map(_heading, result["a token"])], rows)
        ratios.write(out)
    return result


def _heading(key: str) -> str:
    """The head of a column of ratios."""
    known = {"engine": "engine over transformers", "engine_static": "engine over static"}
    for ending, words in (("_ceiling", "ceiling"), ("_both", "over transformers")):
        if key.endswith(ending):
            return words
    return known.get(key, f"{key} over dense")


def named(stage: str) -> str:
    """The name of a stage in a table."""
    names = {"all prefill": "prefill, all", "first token": "first token, warm"}
    return names.get(stage, stage)


def times(ratio: float | None) -> str:
    """A ratio in a sentence."""
    return "?" if ratio is None else f"{ratio:.2f}"


def gains(case: Entry) -> str:
    """What was gained by what, in a line; ? stands for a ratio that means nothing."""
    entries, ratios = case["arms"], case["ratios"]
    prefill, token, first = (ratios[s] for s in ("all prefill", "a token", "first token"))
    parts = []
    if "engine" in first:
        parts.append(
            f"the engine makes the first token {times(first['engine'])}, a token "
            f"{times(token['engine'])} times as fast as transformers"
        )
    for name in [name for name in entries if "kv_rows" in entries[name] and name != "dense"]:
        rows = entries["dense"]["kv_rows"] / entries[name]["kv_rows"]
        parts.append(
            f"{name}, its prefill is {times(prefill[name])} (floors: "
            f"{times(prefill[f'{name}_ceiling'])}), a token {times(token[name])} (floors: "
            f"{times(token[f'{name}_ceiling'])}) times as fast as dense, with {rows:.1f} times "
            "fewer KV rows"
        )
    return f"{case['title']}: " + "; ".join(parts)
