"""Memory: no pruning method needs more than no pruning does; thousands of questions leave none."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanoglimpse import Prompt, load
from nanoglimpse.benchmark.measuring import resident
from nanoglimpse.methods import METHODS
from nanoglimpse.methods.cdpruner import conditional
from nanoglimpse.methods.similarity import unit
from tests.helpers.tiny import chat_ids, config_dict, patches_of, write_checkpoint, write_glimpse

# 2,592 visual tokens, of which 1,296 in one picture. No axis of a weight, of a tile, or of a row of
# features is longer than LONG: a tensor with two such axes is one of tokens by tokens.
GRIDS, QUESTION, LONG = [(1, 72, 72), *[(1, 36, 36)] * 4], 120, 1100
RATIO = 0.25


class Live(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed.

    Attributes:
        peak: most bytes alive at once.
        square: shapes of tensors with two long axes.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known, self.square = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for tensor in filter(is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known | given:
                self.add(storage)
            if sum(size > LONG for size in tensor.shape) > 1:
                self.square.add(tuple(tensor.shape))
        return made

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.known.discard(key)
        self.bytes -= size


def is_tensor(x):
    return isinstance(x, torch.Tensor)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Wide enough that rows of features outweigh what a method notes of them, as in real models."""
    config = config_dict(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        max_position_embeddings=4000,
        rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
    )
    config["vision_config"] |= {
        "depth": 2,
        "fullatt_block_indexes": [1],
        "hidden_size": 96,
        "num_heads": 1,
        "intermediate_size": 256,
        "out_hidden_size": 256,
        "patch_size": 2,
        "window_size": 16,
    }
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder, config)
    write_glimpse(folder / "glimpse", folder, selected_visual_layers=[1, 0])
    # Plain torch, whose storages can be seen.
    return load(folder, device="cpu", dtype="float32", backend="torch")


@pytest.fixture(scope="module")
def prompt(engine):
    count = sum(h * w for _, h, w in GRIDS)
    patches = torch.randn(count, engine.config.vision_config.patch_dim)
    return Prompt.from_tokens(chat_ids(5, *GRIDS, QUESTION), patches, GRIDS, config=engine.config)


def counted(engine, prompt, name):
    """Peak bytes of a prefill, weights and prompt aside, and the square tensors in it."""
    evidence = [torch.arange(int(prompt.visual.sum())) % 4 == 0]
    cap = {} if METHODS[name].budget == "fixed" else {"max_ratio": RATIO}
    with Live() as live:
        engine.prefill(prompt, name, evidence=evidence, **cap)
    return live.peak, live.square


@pytest.fixture(scope="module")
def dense(engine, prompt):
    engine.prefill(prompt, "dense")  # the encoder's layout is made once
    return counted(engine, prompt, "dense")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_method_needs_more_memory_than_none(engine, prompt, dense, name):
    peak, square = counted(engine, prompt, name)
    assert peak <= 1.2 * dense
    assert not square


@pytest.mark.slow
def test_cdpruner_of_all_tokens_makes_no_square():
    x, relevance = unit(torch.randn(LONG + 1, 8)), torch.rand(LONG + 1)
    with Live() as live:
        chosen = conditional(x, relevance, LONG + 1)
    assert sorted(chosen.tolist()) == list(range(LONG + 1))
    assert not live.square


def test_memory_is_counted_until_it_is_freed():
    """Of 10, 20 and 5 floats two are alive at once; views and results in place are no news."""
    with Live() as live:
        first = torch.ones(10)
        first.view(2, 5).add_(1)
        second = torch.ones(20) * 2  # the ones are freed
        del first
        torch.ones(5)
        torch.ones(LONG + 1).expand(LONG + 1, -1)
    assert live.bytes == 4 * len(second)
    assert live.peak == 4 * (len(second) + LONG + 1)
    assert live.square == {(LONG + 1, LONG + 1)}


# --- thousands of questions -----------------------------------------------------------------------

COUNT = 2000
LAYOUTS = ((3, (1, 4, 4), 2), (2, (1, 2, 6), 5), (6,), (1, (1, 2, 2), 1, (1, 4, 2), 3))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Few layers, asked in layouts of `chat_ids` instead of pictures and text."""
    folder, config = tmp_path_factory.mktemp("small"), config_dict(num_hidden_layers=3)
    config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    write_checkpoint(folder, config)
    layers = {"selected_layers": [1], "reduce_layer": 1, "le_layers": [0, 1, 2]}
    write_glimpse(folder / "glimpse", folder, selected_visual_layers=[1, 0], **layers)
    engine = load(folder, device="cpu", dtype="float32")

    def prompt(images, layout):
        grids = [part for part in layout if not isinstance(part, int)]
        return Prompt.from_tokens(chat_ids(*layout), patches_of(grids), grids, config=engine.config)

    engine.prompt, engine.processor.decode = prompt, lambda ids: " ".join(map(str, ids))
    return engine


def ask(engine, count):
    """Questions by themselves, and of sessions: alone, in conversations, with another picture."""
    for number in range(count):
        if number % 100 == 0:
            session = engine.session(engine.prompt([], (4, (1, 4, 4))))
            session.tail = lambda layout, history=(): engine.prompt([], (*layout, len(history)))
        if number % 100 == 50:
            session.reset()
            session.add(engine.prompt([], ((1, 2, 4),)))
        if number % 2:
            engine.ask([], LAYOUTS[number // 2 % len(LAYOUTS)], max_new_tokens=2)
        else:
            session.ask((3 + number % 5,), follow_up=number % 3 == 0, max_new_tokens=2)


def held():
    """Objects of Python, bytes of tensors, resident bytes."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    # Packed weights are opaque; they are the model's.
    plain = [tensor for tensor in tensors if tensor.layout is torch.strided]
    bytes_held = sum(tensor.untyped_storage().nbytes() for tensor in plain)
    return len(gc.get_objects()), bytes_held, resident()


@pytest.mark.slow
def test_thousands_of_questions_leave_no_memory_behind(small):
    """Half a kilobyte for each question would be seen; the first hundred fill what is reused."""
    ask(small, 100)
    before = held()
    ask(small, COUNT)
    after = held()
    assert after[0] - before[0] < 32
    assert after[1] == before[1]
    assert after[2] - before[2] < 512 * COUNT
