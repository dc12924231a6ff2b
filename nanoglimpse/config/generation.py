"""generation_config.json: how an answer is chosen, and where it ends."""

from pathlib import Path
from typing import NamedTuple

from nanoglimpse.config.model import TOKEN_IDS, Config, Sampling
from nanoglimpse.config.schema import Schema, ignore, only, read_json, real, truth, whole
from nanoglimpse.errors import NanoglimpseError

# Below this a temperature is 0, as in vLLM; some released checkpoints have 1e-6.
COLDEST = 1e-5


class Generation(NamedTuple):
    """What a checkpoint says about answers.

    Attributes:
        eos: ids of the tokens that end one.
        sampling: how tokens are chosen; unset where the file is silent.
    """

    eos: frozenset[int]
    sampling: Sampling


# Keys that would choose other tokens are refused unless they are at their defaults; all others
# concern what only transformers does.
GENERATION = Schema(
    {
        "eos_token_id": TOKEN_IDS,
        "do_sample": truth(None),
        "temperature": real(0, 1e6, None),
        "top_p": real(1e-9, 1, None),
        "top_k": whole(0, 2**31 - 1, None),
        "repetition_penalty": real(1e-3, 1e3, None),
        **{
            name: only(value)
            for name, value in {
                "num_beams": 1,
                "num_beam_groups": 1,
                "min_p": 0.0,
                "top_h": None,
                "typical_p": 1.0,
                "epsilon_cutoff": 0.0,
                "eta_cutoff": 0.0,
                "encoder_repetition_penalty": 1.0,
                "diversity_penalty": 0.0,
                "no_repeat_ngram_size": 0,
                "encoder_no_repeat_ngram_size": 0,
                "min_length": 0,
                "min_new_tokens": 0,
                "penalty_alpha": 0.0,
                "guidance_scale": 1.0,
                "dola_layers": None,
                "bad_words_ids": None,
                "force_words_ids": None,
                "constraints": None,
                "sequence_bias": None,
                "stop_strings": None,
                "suppress_tokens": None,
                "begin_suppress_tokens": None,
                "forced_bos_token_id": None,
                "forced_eos_token_id": None,
                "exponential_decay_length_penalty": None,
                "watermarking_config": None,
            }.items()
        },
    },
    unknown=ignore,
)


def read_generation(path: Path, config: Config) -> Generation:
    """The generation_config.json in `path`, in the sense of transformers 5 and vLLM.

    Without `do_sample`, or with a temperature of at most 1e-5, an answer is greedy; a penalty of
    repetition applies to it as well. A file that samples and has no `top_k` means 50, as there.

    Raises:
        NanoglimpseError: a value is of another kind, outside its range, or not supported.
    """
    read = GENERATION.read(read_json(path) if path.exists() else {}, str(path))
    ids = read["eos_token_id"]
    eos = frozenset([ids] if isinstance(ids, int) else ids) or frozenset(config.eos_token_id)
    if max(eos, default=0) >= config.text_config.vocab_size:
        raise NanoglimpseError(f"{path}: eos_token_id {max(eos)} is not below vocab_size")
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    given = {name: read[name] for name in names}
    if read["do_sample"]:
        given |= {n: v for n, v in {"temperature": 1.0, "top_k": 50}.items() if given[n] is None}
    elif given["temperature"] is not None:
        given["temperature"] = 0.0
    if given["temperature"] is not None and given["temperature"] <= COLDEST:
        given["temperature"] = 0.0
    return Generation(eos, Sampling(**given))
