"""The peer of :mod:`benchmarks.serving`: a Llama of bytes under Hugging Face's continuous batching.

The clients call its manager in their own process. The HTTP server of Transformers takes and returns text, not tokens,
so the peer runs without one, which favours it: it converts nothing to JSON and sends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import llama, optional

ATTENTIONS = ("flash", "sdpa")
TORCH_FLASH = "torch_flash"
"""What Transformers calls :func:`flash_attention`; a digit in it would stand for a version of flash-attn."""
PAGE = 256
"""Tokens in a page of the cache."""
TOLERANCE = 0.1
"""How far below the most likely token a generated one may be, in standard deviations of the logits, to be timed."""


@dataclass(frozen=True)
class BatchingSetting:
    """How the peer is set up.

    Attributes:
        sizes: layers, width, heads and hidden values of the feed-forward networks.
        device: where it runs.
        dtype: of its weights.
        slots: requests that are decoded together.
        step: most tokens, of prompts and of generated sequences, in one step.
        longest: tokens of a prompt and its generated tokens together.
    """

    sizes: tuple[int, int, int, int]
    device: torch.device
    dtype: torch.dtype
    slots: int
    step: int
    longest: int


class Peer:
    """A manager that runs, and its description.

    Args:
        manager: of Transformers, started.
        about: the server, its version, the model and how it is set, for the results.
    """

    def __init__(self, manager: Any, about: dict[str, Any]) -> None:
        self.manager, self.about = manager, about
        self._count = itertools.count()

    async def ask(self, prompt: list[int], tokens: int) -> list[float]:
        """When each of the tokens came, by :func:`time.perf_counter`.

        Raises:
            RuntimeError: the manager has stopped, or the sequence is not complete.
        """
        return (await self.write(prompt, tokens))[0]

    async def write(self, prompt: list[int], tokens: int) -> tuple[list[float], list[int]]:
        """As :meth:`ask`, and the tokens."""
        times: list[float] = []
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def on_result(output: Any) -> None:
            times.extend([time.perf_counter()] * (len(output.generated_tokens) - len(times)))
            if output.is_finished() and not done.done():
                done.set_result(output)

        name = f"request {next(self._count)}"
        self.manager.register_result_handler(name, on_result)
        if self.manager.add_request(prompt, request_id=name, max_new_tokens=tokens, streaming=True) is None:
            raise RuntimeError(f"Transformers has stopped: {self.manager.background_thread_status.fatal_error}")
        output = await done
        if output.error is not None or len(times) != tokens:
            raise RuntimeError(f"a request for {tokens} tokens got {len(times)}: {output.error}")
        return times, output.generated_tokens


@contextlib.contextmanager
def batching(setting: BatchingSetting, attention: str) -> Iterator[Peer]:
    """The peer, greedy and without an end token; checked before it is returned.

    Args:
        setting: sizes and limits.
        attention: ``sdpa``, or ``flash``: that of the package flash-attn, or PyTorch's where it is not installed. With
            ``flash`` Transformers captures its steps as CUDA graphs and prepares one while the other runs.

    Raises:
        RuntimeError: Transformers is not installed, attention does not run on this device, or sequences are wrong.
    """
    transformers = optional("transformers")
    layers, width, heads, hidden = setting.sizes
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": hidden}
    # Weights so large that the next token depends on what is attended to: otherwise no sequence would show an error.
    built = llama(layers, setting.longest, initializer_range=width**-0.5, **sizes)
    model = built.to(setting.device, setting.dtype).eval()
    plain = copy.deepcopy(model).float()
    if attention == "flash":
        attend_by_flash(model)
    greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)
    limits = transformers.ContinuousBatchingConfig(
        max_requests_per_batch=setting.slots,
        max_batch_tokens=setting.step,
        page_size=PAGE,
        num_blocks=2 * setting.slots * math.ceil(setting.longest / PAGE),  # so that no request waits for memory
        allow_block_sharing=False,  # random prompts have nothing in common
        auto_switch_to_flash=attention == "flash",
    )
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=limits) as manager:
        peer = Peer(manager, _about(model, manager, setting))
        asyncio.run(check(peer, plain, setting))
        yield peer


def _about(model: Any, manager: Any, setting: BatchingSetting) -> dict[str, Any]:
    """The description of the peer, with the settings that Transformers has chosen."""
    layers, width, heads, hidden = setting.sizes
    chosen = manager.continuous_batching_config
    return {
        "server": "Transformers",
        "version": optional("transformers").__version__,
        "model": f"Llama, {layers} layers of width {width}, {heads} heads, {hidden} hidden",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "slots": setting.slots,
        "how": "continuous batching, greedy, called in the process of the clients, without HTTP",
        "attention": model.config._attn_implementation,
        "cuda_graphs": any(chosen.use_cuda_graph),
        "asynchronous": chosen.use_async_batching,
        "tokens_a_step": setting.step,
    }


def attend_by_flash(model: Any) -> None:
    """Give a model PyTorch's flash attention, unless flash-attn is installed: the manager takes that by itself.

    Raises:
        RuntimeError: this version of PyTorch has none.
    """
    transformers = optional("transformers")
    if not (transformers.utils.is_flash_attn_2_available() or transformers.utils.is_flash_attn_3_available()):
        optional("torch.nn.attention.varlen")
        transformers.AttentionInterface.register(TORCH_FLASH, flash_attention)
        model.config._attn_implementation = TORCH_FLASH


def flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **batch: Any,
) -> tuple[Tensor, None]:
    """PyTorch's flash attention to sequences one after the other, in the form that Transformers calls.

    Args:
        module: the layer.
        query: ``(1, H, Q, D)``, all sequences in one row.
        key: ``(1, H, K, D)`` with the past.
        value: as the keys.
        attention_mask: none; each sequence sees its own past.
        scaling: of the scores.
        batch: where sequences begin and how long the longest are, among other things.

    Returns:
        ``(1, Q, H, D)``, and no weights.
    """
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]
    lengths = (batch[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
    causal = (-1, 0)  # aligned at the ends: the last query sees every key
    attended = optional("torch.nn.attention.varlen").varlen_attn(*rows, *lengths, scale=scaling, window_size=causal)
    return attended[None], None


async def check(peer: Peer, plain: Any, setting: BatchingSetting) -> None:
    """Check that sequences of several lengths, generated together, hold the tokens that the plain model finds most
    likely.

    Args:
        peer: what is checked.
        plain: the same weights in float32, without a cache.
        setting: where it runs.

    Raises:
        RuntimeError: they do not.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [max(1, setting.longest // part - 8) for part in (2, 3, 5)]
    prompts = [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]
    # All end before the first error is raised: no result may arrive without a handler.
    written = await asyncio.gather(*(peer.write(prompt, 8) for prompt in prompts), return_exceptions=True)
    for prompt, answer in zip(prompts, written, strict=True):
        if isinstance(answer, BaseException):
            raise answer
        tokens = answer[1]
        text = torch.tensor([prompt + tokens], device=setting.device)
        with torch.no_grad():
            logits = plain(text).logits[0, len(prompt) - 1 : -1]
        below = logits.amax(-1) - logits.gather(-1, text[0, len(prompt) :, None])[:, 0]
        worst = float(below.max() / logits.std())
        if not worst <= TOLERANCE:
            raise RuntimeError(
                f"not timed, its results are wrong: a token is {worst:.2g} standard deviations below the most likely, "
                f"allowed {TOLERANCE:g}"
            )
