"""The script that made the caption pieces of the text encoder 'scratch': t2i/text/assets/captions.model.

    raev2 data build t2i-embedded && python -m raev2_data_recipes.make.caption_tokenizer data/t2i-embedded

Sentencepiece (byte pair encoding) on all captions of the training split, each as often as it occurs. Capital letters
and digits are pieces of their own, so that the spelling of a word that is to be drawn is visible; what is in no piece
is spelled in bytes, so that no caption is unknown. The result depends on the captions and on the version of
sentencepiece alone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import string
from collections.abc import Iterable
from pathlib import Path

from raev2_tasks.t2i.shards.reader import TextImageDataset
from raev2_tasks.t2i.text.encoder import CAPTION_MODEL, VOCAB_SIZE

PAD, UNKNOWN, END = 0, 1, 2


def train_pieces(captions: Iterable[str], vocab_size: int = VOCAB_SIZE) -> bytes:
    """The sentencepiece model of these captions, as the bytes of its file."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, split_digits=True, character_coverage=1.0, normalization_rule_name="nmt_nfkc",
        user_defined_symbols=list(string.ascii_uppercase), num_threads=1, hard_vocab_limit=False,
        pad_id=PAD, unk_id=UNKNOWN, bos_id=-1, eos_id=END, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def card(dataset: TextImageDataset, num_captions: int, model: bytes) -> str:
    """What the model is made of."""
    import sentencepiece

    return f"""# captions.model

Text pieces of the text encoder `scratch`: a sentencepiece model (byte pair encoding) with {VOCAB_SIZE:,} pieces.

- made by `raev2_data_recipes.make.caption_tokenizer` with sentencepiece {sentencepiece.__version__}
- from {num_captions:,} different captions of `{dataset.manifest["name"]}`, split `train`
  (fingerprint {dataset.fingerprint[:12]}): English, of this project's own renderer and emoji names
- capital letters and digits are single pieces; characters that never occurred are spelled as UTF-8 bytes
- id {PAD} padding, id {END} end of the caption
- SHA-256 {hashlib.sha256(model).hexdigest()}
- licence: that of this project; emoji names are Unicode data (Unicode License v3)

It has seen a few thousand words. Captions about other things become long rows of short pieces.
"""


def main() -> None:
    """Read the captions, write the model and its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data recipe t2i-embedded")
    options = parser.parse_args()
    dataset = TextImageDataset(options.data, "train", (64, 64), batch_size=64)
    captions = [caption.text for index in range(len(dataset)) for caption in dataset.captions(index)]
    model = train_pieces(captions)
    CAPTION_MODEL.parent.mkdir(exist_ok=True)
    CAPTION_MODEL.write_bytes(model)
    (CAPTION_MODEL.parent / "README.md").write_text(card(dataset, len(set(captions)), model), encoding="utf-8")
    print(f"{CAPTION_MODEL}: {len(model):,} bytes")


if __name__ == "__main__":
    main()
