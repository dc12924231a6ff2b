"""The tables of a case, its entry in the JSON line, and a line about what was gained."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nanoglimpse.benchmark.cases import Case
from nanoglimpse.benchmark.contenders import Ours
from nanoglimpse.benchmark.measuring import speedup, spread
from nanoglimpse.flops import decoder, predict

BETWEEN = ("pixels", "preprocess", "vision", "all prefill", "first token", "a token", "end to end")


def report(case: Case) -> dict[str, Any]:
    """Prints the tables; returns the entry of the JSON line."""
    print(f"\n{case.title}, {case.args.new} new tokens, medians of {case.args.rounds} rounds")
    entries = {name: _stages(case, name, ours) for name, ours in case.ours.items()}
    for name in case.peers:
        entries[name] = {"ms": {stage: round(case.middle(name, stage), 4) for stage in BETWEEN}}
    print("\nmilliseconds")
    cells = [[named(s), *(f"{case.middle(n, s):.2f}" for n in entries)] for s in BETWEEN]
    table(["", *entries], cells)
    return {
        "title": case.title,
        "visual_tokens": case.visual,
        "batch": len(case.workload.prompts),
        "arms": entries,
        "ratios": _ratios(case),
    }


def _stages(case: Case, name: str, ours: Ours) -> dict[str, Any]:
    """Prints one of our contenders stage by stage; returns its entry of the JSON line."""
    costs, floors, figures = ours.costs, ours.floors(case.roofs), case.figures[name]
    entry: dict[str, Any] = {}
    rows, total = [], case.middle(name, "end to end")
    for stage in [stage for stage in figures if stage not in ("memory", "tokens")]:
        value, cost, floor = case.middle(name, stage), costs.get(stage), floors.get(stage)
        share = f"{value * (case.args.new - 1 if stage == 'a token' else 1) / total:.1%}"
        # Questions to a session stand beside the answer, and pixels are a part of preprocessing.
        beside = stage.endswith("question") or stage == "pixels"
        amounts = (cost.flops / 1e9, cost.bytes / 1e6) if cost else (None, None)
        cells = [shown(value), "" if beside else share, *map(shown, amounts)]
        times = shown(value / floor if floor else None)
        rows.append([named(stage), *cells, shown(floor, ".3f"), times])
        entry[stage] = {"ms": round(value, 4), "floor_ms": floor, **(asdict(cost) if cost else {})}
    p20, p80 = spread([ms for tokens in figures["tokens"] for ms in tokens])
    entry["a token"] |= {"p20": round(p20, 4), "p80": round(p80, 4)}
    table([name, "ms", "share", "GFLOP", "MB", "floor ms", "× floor"], rows)
    of_what = "beyond the models" if case.engine.device.type == "cuda" else "of the process"
    memory, (_, kv_rows, kv_bytes) = case.middle(name, "memory"), ours.counts
    print(
        f"a token, p20 to p80: {p20:.2f} to {p80:.2f} ms; KV {kv_rows} rows, "
        f"{kv_bytes / 1e6:.2f} MB; peak memory {memory / 1e6:.1f} MB {of_what}"
    )
    entry |= {"kv_rows": kv_rows, "kv_bytes": kv_bytes, "peak_bytes": memory}
    return entry | _conventions(case, ours)


def _conventions(case: Case, ours: Ours) -> dict[str, float]:
    """The FLOPs of the decoder's prefill, counted exactly and as the paper does."""
    exact = sum(ours.costs[stage].flops for stage in ours.prefill_stages())
    paper = decoder(case.engine.config.text_config, ours.counts[0].paper_prefill())
    prompts = case.workload.prompts
    if ours.method != "dense":
        paper += predict(case.engine.model.glimpse_weights.predictor, prompts[0].grids)
    paper *= len(prompts)
    print(f"prefill {exact / 1e9:.2f} GFLOP; {paper / 1e9:.2f} by the paper's convention")
    return {"prefill_flops": exact, "prefill_flops_paper": paper}


def _ratios(case: Case) -> dict[str, dict[str, float | None]]:
    """Speed-ups of the engine over transformers and of pruning over dense, with their ceilings."""
    floors = {name: ours.floors(case.roofs) for name, ours in case.ours.items()}
    pruned, peers = [name for name in case.ours if name != "dense"], [*case.peers]
    result: dict[str, dict[str, float | None]] = {}
    for stage in BETWEEN:
        times = {name: figures[stage] for name, figures in case.figures.items()}
        least, entry = floors["dense"].get(stage), result.setdefault(stage, {})
        if peers:
            entry["engine"] = speedup(times[peers[0]], times["dense"])
            entry["engine_ceiling"] = case.middle(peers[0], stage) / least if least else None
        if peers[1:]:
            entry["engine_static"] = speedup(times[peers[1]], times["dense"])
        for name in pruned:
            entry[name] = speedup(times["dense"], times[name])
            entry[f"{name}_ceiling"] = least / floors[name][stage] if least else None
            if peers:
                entry[f"{name}_both"] = speedup(times[peers[0]], times[name])
    print("\ntimes as fast; a ceiling is what this engine's floor would give")
    rows = [[named(stage), *map(shown, entry.values())] for stage, entry in result.items()]
    table(["", *map(_heading, result["a token"])], rows)
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
    return "prefill, all" if stage == "all prefill" else stage


def shown(value: float | None, form: str = ".2f") -> str:
    """A number in a table; empty if there is none."""
    return "" if value is None else f"{value:{form}}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as they need to be; the first one is left-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def gains(case: dict[str, Any]) -> str:
    """What was gained by what, in a line."""
    entries, ratios = case["arms"], case["ratios"]
    prefill, token, first = (ratios[s] for s in ("all prefill", "a token", "first token"))
    parts = []
    if "engine" in first:
        parts.append(
            f"the engine makes the first token {first['engine']:.2f}, a token "
            f"{token['engine']:.2f} times as fast as transformers"
        )
    for name in [name for name in entries if "kv_rows" in entries[name] and name != "dense"]:
        rows = entries["dense"]["kv_rows"] / entries[name]["kv_rows"]
        parts.append(
            f"{name}, its prefill is {prefill[name]:.2f} (floors: "
            f"{prefill[f'{name}_ceiling']:.2f}), a token {token[name]:.2f} (floors: "
            f"{token[f'{name}_ceiling']:.2f}) times as fast as dense, with {rows:.1f} times fewer "
            "KV rows"
        )
    return f"{case['title']}: " + "; ".join(parts)
