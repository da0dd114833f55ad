"""The tokenizer is the vocabulary of the library's text tasks: bytes, and padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sma_models.integrations.hf import SMAByteTokenizer
from sma_models.integrations.hf.conversion import START
from sma_models.integrations.hf.tokenization import N_BYTES, PAD
from sma_models.training.data.labelled import BYTE_PAD
from sma_models.training.data.language import VOCAB_SIZE
from sma_models.training.data.streams import START as STREAM_START
from sma_models.training.data.streams import ByteStream

TOKENIZER = SMAByteTokenizer()


@given(st.text(max_size=30))
def test_every_text_becomes_its_bytes_and_comes_back(text: str) -> None:
    tokenizer = TOKENIZER
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text


def test_it_is_the_vocabulary_of_the_library() -> None:
    assert (N_BYTES, PAD, START) == (VOCAB_SIZE, BYTE_PAD, STREAM_START)
    stream = ByteStream.join([("a", "naïve\n".encode())])
    tokens, targets = stream.window(0, len(stream))
    assert targets.tolist() == SMAByteTokenizer()("naïve\n").input_ids
    assert tokens[0] == START
    tokenizer = SMAByteTokenizer()
    assert sorted(tokenizer.get_vocab().values()) == list(range(257))
    assert (tokenizer.vocab_size, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (
        256,
        257,
        256,
        256,
    )


def test_batches_are_padded_on_the_left() -> None:
    batch = SMAByteTokenizer()(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[256, 256, 97], [98, 99, 100]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    right = SMAByteTokenizer(padding_side="right")(["a", "bcd"], padding="max_length", max_length=2, truncation=True)
    assert right["input_ids"] == [[97, 256], [98, 99]]


def test_what_is_no_utf8_is_replaced() -> None:
    tokenizer = SMAByteTokenizer()
    assert tokenizer.decode([0xC3, 0x28, 0xFF]) == b"\xc3\x28\xff".decode(errors="replace")
    assert tokenizer.decode(torch.tensor([256, 104, 105, 256])) == "<pad>hi<pad>"
    assert tokenizer.batch_decode([[256, 104], [105, 256]], skip_special_tokens=True) == ["h", "i"]
    assert tokenizer.convert_ids_to_tokens([10, 256]) == ["\n", "<pad>"]
    assert tokenizer.convert_tokens_to_ids(["\n", "<pad>"]) == [10, 256]


def test_nothing_in_a_text_is_taken_for_a_special_token() -> None:
    assert SMAByteTokenizer()("<pad>").input_ids == list(b"<pad>")
    assert SMAByteTokenizer()("<pad>", split_special_tokens=False).input_ids == [256]


@pytest.mark.parametrize("auto", [False, True])
def test_it_is_saved_and_loaded(tmp_path: Path, auto: bool) -> None:
    tokenizer = SMAByteTokenizer(model_max_length=100)
    assert tokenizer.add_tokens(["<x>"]) == 1
    tokenizer.save_pretrained(tmp_path)
    loaded = (AutoTokenizer if auto else SMAByteTokenizer).from_pretrained(tmp_path)
    assert isinstance(loaded, SMAByteTokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.model_max_length, loaded.padding_side, len(loaded)) == (100, "left", 258)
    assert loaded("é<pad>").input_ids == tokenizer("é<pad>").input_ids == list("é<pad>".encode())
