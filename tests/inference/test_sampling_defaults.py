"""How tokens are chosen where nobody says so, and what happens where they cannot be."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from nanoglimpse import NanoglimpseError, Sampling, UsageError, load
from nanoglimpse.cli.ask import main
from nanoglimpse.cli.ask import parser as cli_parser
from nanoglimpse.cli.options import sampling_of
from nanoglimpse.cli.report import as_dict, report
from nanoglimpse.inference.sampling import NOT_FINITE, Sampler
from nanoglimpse.weights.hub import EMBEDDED

SCENE = EMBEDDED["nano"] / "examples" / "scene_000003.png"
QUESTION = "Which number does the diamond show?"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EMBEDDED["nano"], tmp_path / "model")


def says(folder, **content):
    """Writes generation_config.json; returns the engine."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 378} | content))
    return load(folder, dtype="float32", device="cpu")


@pytest.mark.slow
def test_a_penalty_of_the_checkpoint_counts_as_in_transformers(folder, nano):
    engine = says(folder, repetition_penalty=3.0)
    answer = engine.ask(SCENE, QUESTION, method="dense", ignore_eos=True, max_new_tokens=12)
    plain = nano.ask(SCENE, QUESTION, method="dense", ignore_eos=True, max_new_tokens=12)
    assert answer.token_ids != plain.token_ids
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = engine.prompt(SCENE, QUESTION)
    ids = prompt.token_ids[None]
    theirs = hf.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=prompt.patches,
        image_grid_thw=torch.tensor(prompt.grids),
        mm_token_type_ids=(ids == engine.config.image_token_id).int(),
        max_new_tokens=12,
        eos_token_id=None,
    )
    assert answer.token_ids == theirs[0, len(prompt) :].tolist()
    assert answer.stats.sampling_defaults == ("repetition_penalty",)
    (line,) = [line for line in report(answer) if line.startswith("sampling")]
    assert "repetition_penalty 3 (generation_config.json: repetition_penalty)" in line
    assert as_dict(engine.model, QUESTION, [], answer)["sampling"]["repetition_penalty"] == 3


@pytest.mark.slow
def test_who_takes_the_defaults_and_who_does_not(folder, nano):
    """Questions in all forms do; `decode` and an explicit value do not."""
    engine = says(folder, repetition_penalty=3.0)
    options = {"method": "dense", "max_new_tokens": 12, "ignore_eos": True}
    plain, other = (e.ask(SCENE, QUESTION, **options).token_ids for e in (nano, engine))
    assert plain != other
    (batched,) = engine.ask_many([(SCENE, QUESTION)], **options)
    assert batched.token_ids == other
    assert batched.stats.sampling_defaults == ("repetition_penalty",)
    session = engine.session(SCENE, "dense")
    assert session.ask(QUESTION, max_new_tokens=12, ignore_eos=True).token_ids == other
    explicit = Sampling(repetition_penalty=1.0)
    answer = engine.ask(SCENE, QUESTION, sampling=explicit, **options)
    assert answer.token_ids == plain
    assert answer.stats.sampling_defaults == ()
    prefill = engine.prefill(engine.prompt(SCENE, QUESTION), "dense", max_new_tokens=12)
    assert list(engine.decode(prefill, 12, ignore_eos=True)) == plain
    assert [t for (t,) in engine.decode_many(prefill, 12, ignore_eos=True)] == plain


@pytest.mark.slow
def test_a_checkpoint_that_samples(folder):
    engine = says(folder, do_sample=True, temperature=50.0, top_k=0)
    options = {"max_new_tokens": 12, "ignore_eos": True}
    one, same, other = (
        engine.ask(SCENE, QUESTION, sampling=Sampling(seed=seed), **options).token_ids
        for seed in (1, 1, 2)
    )
    assert one == same != other
    assert engine.ask(SCENE, QUESTION, sampling=Sampling(temperature=0.0)).text.endswith("is 70.")


def sampling(*options):
    return sampling_of(cli_parser().parse_args(list(options)))


def test_the_command_line_leaves_unset_what_is_not_given():
    assert sampling() == Sampling()
    assert sampling("--top-p", "0.5") == Sampling(top_p=0.5)
    assert sampling("--greedy") == Sampling(0.0, 1.0, 0, 1.0)
    assert sampling("--greedy", "--repetition-penalty", "2") == Sampling(0.0, 1.0, 0, 2.0)
    with pytest.raises(UsageError, match="--greedy cannot be combined"):
        sampling("--greedy", "--temperature", "1")


@pytest.mark.slow
def test_greedy_on_the_command_line(folder, capsys):
    says(folder, repetition_penalty=3.0)
    command = [QUESTION, "--image", str(SCENE), "--model", str(folder), "--device", "cpu"]
    assert main([*command, "--greedy"]) == 0
    out, err = capsys.readouterr()
    assert out == "The number on the diamond is 70.\n"
    assert "\nsampling" not in err
    assert main(command) == 0
    assert "\nsampling    repetition_penalty 3 (generation_config.json" in capsys.readouterr().err


@pytest.mark.slow
def test_the_end_token_of_the_layout_always_ends(folder):
    engine = says(folder, eos_token_id=376)
    assert engine.model.eos_token_id == {376, 378}
    answer = engine.ask(SCENE, QUESTION)
    assert (answer.text, answer.finish_reason) == ("The number on the diamond is 70.", "eos")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.3}, {"top_k": 2}], ids=str
)
def test_a_row_that_is_not_finite_gives_no_token(value, options):
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, value, 3.0], [6e4, 6e4, 6.5e4]]).half()
    sampler = Sampler(Sampling(seed=0, **options), list(torch.zeros(3, 1).long()), 3, logits.device)
    tokens = sampler(logits)
    assert tokens[1] == NOT_FINITE
    assert all(0 <= tokens[i] < 3 for i in (0, 2))


@pytest.fixture
def overflowing(folder):
    """A checkpoint with an embedding that has overflowed."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][300] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.slow
def test_logits_that_are_not_finite_end_an_answer(overflowing, capsys):
    engine = load(overflowing, dtype="float32", device="cpu")
    with pytest.raises(NanoglimpseError, match=r"logits are not finite.*check the files"):
        engine.ask(SCENE, QUESTION)
    results = engine.ask_many([(SCENE, QUESTION), ([], "")], max_new_tokens=8)
    assert "not finite" in str(results[0])
    command = [QUESTION, "--image", str(SCENE), "--model", str(overflowing), "--quiet"]
    assert main([*command, "--device", "cpu"]) == 1
    assert "logits are not finite" in capsys.readouterr().err


def test_overflow_of_float16_names_bfloat16():
    from nanoglimpse.inference.sampling import check_finite

    check_finite([3, 0], torch.float16)
    with pytest.raises(NanoglimpseError, match="--dtype bfloat16"):
        check_finite([3, NOT_FINITE], torch.float16)


@pytest.mark.slow
def test_one_broken_answer_of_a_batch_leaves_the_others(nano):
    """The rows of a batch are independent, and so are their errors."""
    queries = [(SCENE, QUESTION), (SCENE, "Which shape has 70?")]
    expected = nano.ask_many(queries)
    called, original = [], Sampler.__call__

    def damaged(self, logits):
        called.append(len(logits))
        if len(called) == 3:
            logits = logits.clone()
            logits[0] = float("nan")
        return original(self, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "__call__", damaged)
        broken, whole = nano.ask_many(queries)
    assert isinstance(broken, NanoglimpseError)
    assert whole.token_ids == expected[1].token_ids
