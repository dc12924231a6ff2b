"""The files of a checkpoint: ties and preferences as in transformers, and what headers claim."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from nanoglimpse import NanoglimpseError, load
from nanoglimpse.config import as_safetensors
from nanoglimpse.weights.checkpoint import Checkpoint
from nanoglimpse.weights.glimpse import read_tensors
from tests.helpers.prompts import SCENE
from tests.helpers.tiny import config_dict, write_checkpoint
from tests.model.test_parity import close, hf_inputs, prompt_of
from tests.test_config import nested

ROOT = Path(__file__).parents[2]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
PARTS = (4, (1, 12, 18), 5)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    write_checkpoint(folder, config_dict(tie_word_embeddings=True))
    return folder


def logits(engine):
    return engine.prefill(prompt_of(engine, PARTS), "dense").logits


def as_transformers(folder):
    """Our logits, which are those of transformers."""
    engine = load(folder, dtype="float32", device="cpu")
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = hf(**hf_inputs(prompt_of(engine, PARTS), engine.config)).logits[0, -1]
    ours = logits(engine)
    close(ours, theirs)
    return ours


def changed(folder, out, **tensors):
    """A copy with other tensors; None removes one."""
    shutil.copytree(folder, out)
    known = {**load_file(folder / "model.safetensors"), **tensors}
    kept = {name: tensor.contiguous() for name, tensor in known.items() if tensor is not None}
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.slow
def test_a_tied_head_that_differs_is_kept_apart(tied, tmp_path):
    other = changed(tied, tmp_path / "a", **{HEAD: torch.randn(130, 48)})
    apart = as_transformers(other)
    assert not torch.equal(apart, as_transformers(tied))
    assert not load(other, dtype="float32").config.tie_word_embeddings


@pytest.mark.slow
def test_a_tied_head_that_is_equal_stays_tied(tied, tmp_path):
    head = load_file(tied / "model.safetensors")[EMBEDDINGS]
    folder = changed(tied, tmp_path / "a", **{HEAD: head})
    assert load(folder, dtype="float32").config.tie_word_embeddings
    assert torch.equal(as_transformers(folder), logits(load(tied, dtype="float32")))


@pytest.mark.slow
def test_a_head_alone_stands_for_both(tied, tmp_path):
    head = load_file(tied / "model.safetensors")[EMBEDDINGS]
    folder = changed(tied, tmp_path / "a", **{HEAD: head, EMBEDDINGS: None})
    assert torch.equal(as_transformers(folder), logits(load(tied, dtype="float32")))


def rewritten(folder, out, change):
    shutil.copytree(folder, out)
    config = change(json.loads((folder / "config.json").read_text()))
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("top", [None, False])
def test_the_text_part_may_tie(tied, tmp_path, top):
    """A flat file has no text part, so that without the key nothing is tied."""

    def change(config):
        new = nested(config)
        new["text_config"]["tie_word_embeddings"] = True
        del new["text_config"]["layer_types"]  # of one layer
        del new["tie_word_embeddings"]
        return new if top is None else new | {"tie_word_embeddings": top}

    as_transformers(rewritten(tied, tmp_path / "a", change))


def test_without_the_key_nothing_is_tied(tied, tmp_path):
    folder = rewritten(
        tied,
        tmp_path / "a",
        lambda config: {k: v for k, v in config.items() if k != "tie_word_embeddings"},
    )
    with pytest.raises(NanoglimpseError, match=r"missing, the first is 'lm_head\.weight'"):
        load(folder, device="cpu")


def index(folder, **weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.slow
def test_the_single_file_is_preferred_and_that_is_said(tiny_folder, tiny, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "a")
    old = {n: torch.zeros_like(t) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(old, folder / "old.safetensors")
    index(folder, **dict.fromkeys(old, "old.safetensors"))
    with pytest.warns(UserWarning, match="the former is read"):
        engine = load(folder, dtype="float32", device="cpu")
    assert torch.equal(logits(engine), logits(tiny))


@pytest.mark.parametrize(
    "name", ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "C:\\x", "x.bin"]
)
def test_paths_outside_the_folder_are_refused(tiny_folder, tmp_path, name):
    folder = shutil.copytree(tiny_folder, tmp_path / "a")
    (folder / "model.safetensors").unlink()
    index(folder, **{EMBEDDINGS: name})
    with pytest.raises(NanoglimpseError, match="in the folder"):
        load(folder, device="cpu")


def test_a_tensor_in_two_shards_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    index(folder, x="a.safetensors", y="b.safetensors")
    with pytest.raises(NanoglimpseError, match="there twice"):
        load(folder, device="cpu")


def test_nothing_is_read_before_all_shapes_are_right(tiny_folder, tmp_path, monkeypatch):
    """Not even the first tensor, where the last one is wrong."""
    folder = changed(tiny_folder, tmp_path / "a", **{"visual.merger.mlp.2.weight": torch.ones(2)})
    shutil.rmtree(folder / "glimpse")
    monkeypatch.setattr(Checkpoint, "__iter__", lambda self: pytest.fail("a tensor has been read"))
    with pytest.raises(NanoglimpseError, match=r"visual\.merger\.mlp\.2\.weight' has shape \[2\]"):
        load(folder, device="cpu")


def test_a_vocabulary_that_is_not_in_the_file_allocates_nothing(tiny_folder, tmp_path):
    """768 MB of embeddings in fp32, of which the file has 25 kB."""
    folder = rewritten(tiny_folder, tmp_path / "a", lambda config: config | {"vocab_size": 2**22})
    shutil.rmtree(folder / "glimpse")
    with pytest.raises(NanoglimpseError, match=r"shape \[130, 48\], but .* \[4194304, 48\]"):
        load(folder, device="cpu")


def test_whole_numbers_are_no_weights(tiny_folder, tmp_path):
    norm = torch.ones(48, dtype=torch.int8)
    folder = changed(tiny_folder, tmp_path / "a", **{"model.norm.weight": norm})
    with pytest.raises(NanoglimpseError, match="is I8; only F64, F32, F16, BF16"):
        load(folder, device="cpu")


@pytest.fixture
def published(tiny_folder, tmp_path):
    """The folder of glimpse weights with new_modules_gp.pt alone."""
    folder = shutil.copytree(tiny_folder / "glimpse", tmp_path / "glimpse")
    (folder / "glimpse.safetensors").unlink()
    return folder


def repacked(file, how=zipfile.ZIP_STORED, **records):
    """Writes the records of a .pt file again."""
    with zipfile.ZipFile(file) as archive:
        known = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, data in known.items():
            archive.writestr(name, records.get(name.rpartition("/")[2], data))


def compressed(file):
    repacked(file, zipfile.ZIP_DEFLATED)


def expanded(file):
    """Storage of one value, seen as 2 GB."""
    content = torch.load(file, weights_only=True)
    torch.save(content | {"learnable_embeddings": torch.zeros(1).expand(2**20, 1, 512)}, file)


def empty(file):
    file.write_bytes(b"")


def calls(file):
    """bytearray(10**10) as a pickle that weights_only allows."""
    repacked(file, **{"data.pkl": pickle.dumps(bytearray(3), protocol=2)})


def whole_numbers(file):
    content = torch.load(file, weights_only=True)
    torch.save(content | {"learnable_embeddings": torch.zeros(6, 1, 48, dtype=torch.int64)}, file)


def two_heads(file):
    """The last head by both of its names."""
    content = torch.load(file, weights_only=True)
    content["attn_fuser"]["attn_out_proj.bias"] = torch.zeros(1)
    torch.save(content, file)


def old_layout(file):
    content = torch.load(file, weights_only=True)
    torch.save(content, file, _use_new_zipfile_serialization=False)


ARCHIVES = {
    compressed: "compressed records",
    expanded: "larger than stored",
    empty: "corrupt",
    calls: "more than tensors",
    whole_numbers: "no floats",
    old_layout: "more than tensors",
}


def test_a_head_under_two_names_is_refused(tiny_folder, tmp_path, published):
    two_heads(published / "new_modules_gp.pt")
    with pytest.raises(NanoglimpseError, match=r"attn_out_proj\.bias' has no place"):
        load(tiny_folder, glimpse=published, device="cpu")


@pytest.mark.parametrize("damage", ARCHIVES, ids=lambda f: f.__name__)
def test_archives_are_checked_before_they_are_read(published, damage):
    damage(published / "new_modules_gp.pt")
    with pytest.raises(NanoglimpseError, match=ARCHIVES[damage]) as caught:
        read_tensors(published)
    assert "\n" not in str(caught.value)


def test_written_tensors_are_those_of_safetensors():
    """To the byte, with any order of names, types and layouts."""
    tensors = {
        "b": torch.randn(3, 5),
        "é": torch.randn(7).bfloat16(),
        "a": torch.randn(4, 6).T,
        "count": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 4, dtype=torch.float16),
        "one": torch.tensor(2.5),
    }
    for metadata in ({"format": "pt"}, {}):
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        assert as_safetensors(tensors, metadata) == save(whole, metadata or None)


WITHOUT_NUMPY = """
import json, sys
sys.modules["numpy"] = None
from pathlib import Path
from nanoglimpse import load
from nanoglimpse.weights.glimpse import read_tensors, save_glimpse
from nanoglimpse.weights.hub import EMBEDDED
picture, folder = sys.argv[1:]
engine = load("nano")
engine.session(picture).save(Path(folder, "s"))
print(engine.load_session(Path(folder, "s")).ask("Which number?", max_new_tokens=2).token_ids)
own = EMBEDDED["nano"] / "glimpse"
config = json.loads((own / "config.json").read_text())
save_glimpse(Path(folder, "glimpse"), read_tensors(own)[1], config)
load("nano", glimpse=Path(folder, "glimpse"))
"""


@pytest.mark.slow
def test_nothing_needs_numpy(tmp_path):
    command = [sys.executable, "-c", WITHOUT_NUMPY, str(SCENE), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")
