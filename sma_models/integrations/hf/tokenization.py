"""The vocabulary of the library's text tasks, as a tokenizer: 256 bytes, and padding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizer, StoppingCriteria

from sma.errors import ConfigError
from sma_models.integrations.hf.loader import Loadable, write_loader

N_BYTES = 256
PAD = N_BYTES
"""The number of padding. A language model of 256 tokens never gets it."""


class SMAByteTokenizer(Loadable, PreTrainedTokenizer):
    """Text to the bytes of its UTF-8, and back.

    Every byte is its own number and padding is 256, as for ``sma train``. Nothing is added to a text, nothing in it is
    taken for a special token, and every text comes back as it was; bytes that are no UTF-8 are replaced. Batches are
    padded on the left, so that texts can be continued. Padding also stands for the end of a text, for tools that ask
    for such a token; a language model of 256 tokens never writes it.

    Args:
        pad_token: name of the padding.
        **kwargs: as for every tokenizer.

    Example:
        >>> tokenizer = SMAByteTokenizer()
        >>> tokenizer("né").input_ids
        [110, 195, 169]
        >>> tokenizer(["a", "bc"], padding=True).input_ids
        [[256, 97], [98, 99]]
        >>> tokenizer.decode([256, 110, 195, 169], skip_special_tokens=True)
        'né'
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  # as the base class has it
    vocab_files_names: dict[str, str] = {}  # noqa: RUF012
    padding_side = "left"

    def __init__(self, pad_token: str | AddedToken = "<pad>", **kwargs: Any) -> None:
        kwargs.setdefault("split_special_tokens", True)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        if isinstance(pad_token, str):
            pad_token = AddedToken(pad_token, normalized=False, special=True)
        self._added_tokens_decoder = {PAD: pad_token}
        kwargs.setdefault("eos_token", pad_token)
        super().__init__(pad_token=pad_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        """256; ``len(tokenizer)`` counts the padding too."""
        return N_BYTES

    def get_vocab(self) -> dict[str, int]:
        """Bytes as the characters of these numbers, and what was added."""
        return {**{chr(byte): byte for byte in range(N_BYTES)}, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < N_BYTES else None

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of some tokens."""
        return b"".join(bytes([ord(token)]) if len(token) == 1 else token.encode() for token in tokens).decode(
            errors="replace"
        )

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing to save."""
        return ()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write ``tokenizer_config.json`` and the module by which ``trust_remote_code=True`` finds this package."""
        self.init_kwargs["auto_map"] = {
            auto: [name, None] for auto, name in write_loader(save_directory, AutoTokenizer=type(self).__name__).items()
        }
        files: tuple[str, ...] = super().save_pretrained(save_directory, *args, **kwargs)
        return files


class StopBytes(StoppingCriteria):
    """Ends a text with one of some strings, as bytes.

    The criterion of Transformers compares what single tokens decode to, and a byte of a character beyond ASCII decodes
    to nothing that is in the string.

    Args:
        strings: not empty.

    Raises:
        ConfigError: one of them is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if not strings or not all(strings):
            raise ConfigError(f"stop_strings: must not be empty, got {list(strings)}")
        self._endings = [list(string.encode()) for string in strings]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """``(B,)`` bool: which texts ``(B, L)`` end with one of them."""
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for ending in self._endings:
            if len(ending) <= input_ids.shape[1]:
                last = input_ids[:, -len(ending) :]
                done |= (last == torch.tensor(ending, device=last.device, dtype=last.dtype)).all(1)
        return done
