"""A tokenizer for the world: Qwen's byte-level BPE and control tokens, but without merges.

The words of the world's phrases are tokens, and any other word is spelled byte by byte. Merges
would split names into pieces that differ from name to name (" m", "el", "on"), and a model that has
to read new names would have to learn every piece both as print and as output.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

# Qwen2's pattern: contractions, words with a leading space, single digits, punctuation, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def make_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of single bytes, the words of `texts` and, as its last ids, control tokens."""
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    words = sorted(
        as_bytes.pre_tokenize_str(piece)[0][0]
        for piece in pieces
        if len(piece) > 1 and not piece.isupper()  # codes are in capitals and have to be spelled
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet + words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    return tokenizer
