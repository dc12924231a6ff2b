"""Tables of a case, its entry in the JSON line, and what was gained by what."""

import statistics

from nanoglimpse.benchmark.cases import Case
from nanoglimpse.benchmark.contenders import Ours
from nanoglimpse.benchmark.work import Cost
from nanoglimpse.flops import decoder, predict

BETWEEN = ("pixels", "preprocess", "vision", "all prefill", "first token", "a token", "end to end")


def report(case: Case) -> dict:
    """Prints the tables; what goes into the JSON line."""
    print(f"\n{case.title}, {case.args.new} new tokens, medians of {case.args.rounds} rounds")
    ours = [name for name, arm in case.arms.items() if isinstance(arm, Ours)]
    entry = {"title": case.title, "visual_tokens": case.visual, "batch": case.task.batch}
    entry["arms"] = {name: _arm(case, name) for name in ours}
    for name in case.arms:
        if name not in ours:
            entry["arms"][name] = {"ms": {s: _rounded(case, name, s) for s in BETWEEN}}
    entry["ratios"] = _ratios(case, ours)
    return entry


def _rounded(case: Case, name: str, stage: str) -> float | None:
    value = case.middle(name, stage)
    return None if value is None else round(value, 4)


def _arm(case: Case, name: str) -> dict:
    """One of our arms, stage by stage."""
    arm = case.arms[name]
    costs, floors = case.costs(arm), case.floors(arm)
    total, rows, entry = case.middle(name, "end to end"), [], {}
    for stage in [s for s in case.figures[name] if s not in ("memory", "tokens")]:
        value, cost, floor = case.middle(name, stage), costs.get(stage), floors.get(stage)
        share = value * (case.args.new - 1 if stage == "a token" else 1) / total
        # Questions to a session stand beside the answer, and pixels are a part of preprocessing.
        asked = stage.endswith("question") or stage == "pixels"
        rows.append(
            [
                named(stage),
                f"{value:.2f}",
                "" if asked else f"{share:.1%}",
                f"{cost.flops / 1e9:.2f}" if cost else "",
                f"{cost.bytes / 1e6:.2f}" if cost else "",
                "" if floor is None else f"{floor:.3f}",
                "" if not floor else f"{value / floor:.2f}",
            ]
        )
        entry[stage] = {"ms": round(value, 4), "floor_ms": floor}
        entry[stage] |= cost._asdict() if cost else {}
    p20, p80 = spread([ms for tokens in case.figures[name]["tokens"] for ms in tokens])
    entry["a token"] |= {"p20": round(p20, 4), "p80": round(p80, 4)}
    table([f"{name}", "ms", "share", "GFLOP", "MB", "floor ms", "× floor"], rows)
    of_what = "beyond the models" if case.engine.device.type == "cuda" else "of the process"
    memory, (kv_rows, kv_bytes) = case.middle(name, "memory"), arm.kv
    print(
        f"a token, p20 to p80: {p20:.2f} to {p80:.2f} ms; KV {kv_rows} rows, "
        f"{kv_bytes / 1e6:.2f} MB; peak memory {memory / 1e6:.1f} MB {of_what}"
    )
    entry["kv_rows"], entry["kv_bytes"], entry["peak_bytes"] = kv_rows, kv_bytes, memory
    entry |= _conventions(case, arm, costs)
    return entry


def _conventions(case: Case, arm: Ours, costs: dict[str, Cost]) -> dict:
    """FLOPs of the decoder's prefill, counted exactly and as the paper does."""
    exact = sum(costs[s].flops for s in [*case.stages, "lm_head"] if s != "vision")
    paper = decoder(case.engine.config.text_config, arm.rows.paper_prefill())
    if arm.method != "dense":
        paper += predict(case.engine.glimpse.predictor, case.task.prompt.grids)
    paper *= case.task.batch
    print(f"prefill {exact / 1e9:.2f} GFLOP; {paper / 1e9:.2f} by the paper's convention")
    return {"prefill_flops": exact, "prefill_flops_paper": paper}


def _ratios(case: Case, ours: list[str]) -> dict:
    """Speed-ups, of the engine over transformers and of pruning over dense, and ceilings."""
    peer, *others = [name for name, arm in case.arms.items() if not isinstance(arm, Ours)] or [None]
    dense_floor, result, rows = case.floors(case.arms["dense"]), {}, []
    head = [""]
    if peer:
        head += ["engine over transformers", "ceiling"]
    head += ["engine over static"] * len(others)
    for name in ours[1:]:
        head += [f"{name} over dense", "ceiling"] + (["over transformers"] if peer else [])
    for stage in BETWEEN:
        row, entry = [named(stage)], {}
        if peer:
            entry["engine"] = _ratio(case, peer, "dense", stage)
            floor = dense_floor.get(stage)
            entry["engine_ceiling"] = case.middle(peer, stage) / floor if floor else None
            row += [shown(entry["engine"]), shown(entry["engine_ceiling"])]
        for other in others:
            entry["engine_static"] = _ratio(case, other, "dense", stage)
            row += [shown(entry["engine_static"])]
        for name in ours[1:]:
            floor = case.floors(case.arms[name]).get(stage)
            entry[name] = _ratio(case, "dense", name, stage)
            entry[f"{name}_ceiling"] = dense_floor[stage] / floor if floor else None
            row += [shown(entry[name]), shown(entry[f"{name}_ceiling"])]
            if peer:
                entry[f"{name}_both"] = _ratio(case, peer, name, stage)
                row += [shown(entry[f"{name}_both"])]
        result[stage] = entry
        rows.append(row)
    print("\nmilliseconds")
    cells = [[named(s), *(f"{case.middle(n, s):.2f}" for n in case.arms)] for s in BETWEEN]
    table(["", *case.arms], cells)
    print("\ntimes as fast; a ceiling is what this engine's floor would give")
    table(head, rows)
    return result


def _ratio(case: Case, over: str, under: str, stage: str) -> float:
    """The median over rounds of the quotient."""
    pairs = zip(case.figures[over][stage], case.figures[under][stage], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def spread(values: list[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile."""
    values = sorted(values)
    fifth = len(values) // 5
    return values[fifth], values[-1 - fifth]


def named(stage: str) -> str:
    """A stage in a table."""
    return "prefill, all" if stage == "all prefill" else stage


def shown(ratio: float | None) -> str:
    """A ratio in a table."""
    return "" if ratio is None else f"{ratio:.2f}"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they need to be, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def gains(case: dict) -> str:
    """What was gained by what, in a line."""
    prefill, token = case["ratios"]["all prefill"], case["ratios"]["a token"]
    first = case["ratios"]["first token"]
    parts_of = []
    if "engine" in first:
        parts_of.append(
            f"the engine makes the first token {first['engine']:.2f}, a token "
            f"{token['engine']:.2f} times as fast as transformers"
        )
    arms = case["arms"]
    for name in [n for n in arms if "kv_rows" in arms[n] and n != "dense"]:
        rows = arms["dense"]["kv_rows"] / arms[name]["kv_rows"]
        parts_of.append(
            f"{name}, its prefill is {prefill[name]:.2f} (floors: "
            f"{prefill[f'{name}_ceiling']:.2f}), a token {token[name]:.2f} (floors: "
            f"{token[f'{name}_ceiling']:.2f}) times as fast as dense, with {rows:.1f} times fewer "
            "KV rows"
        )
    return f"{case['title']}: " + "; ".join(parts_of)
