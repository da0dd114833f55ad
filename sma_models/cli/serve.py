"""``sma serve``: an OpenAI-compatible endpoint for the language model of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sma.errors import ConfigError
from sma_models.cli.common import RUNS, RunsOption, extra, find_run, notes, usable_device

if TYPE_CHECKING:
    from sma.interfaces import Model

KEY = "SMA_API_KEY"
_LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Folder of a run, recipe/name, or a recipe for its latest run; or a .safetensors file.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model for clients; by default that of the run.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes cuda if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    key_file: Annotated[
        Path | None, typer.Option(help=f"File with the key that clients must send; or set the variable {KEY}.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Sequences that are generated together.")] = 16,
    queue: Annotated[int, typer.Option(help="Sequences that may wait for a slot.")] = 512,
    prefill_chunk: Annotated[
        int, typer.Option(help="Tokens of prompts that are prefilled between two decoding steps.")
    ] = 512,
    max_prompt: Annotated[int, typer.Option(help="Longest prompt, in bytes.")] = 131_072,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate for a sequence.")] = 4096,
    max_seconds: Annotated[float, typer.Option(help="Longest time for a request, in seconds.")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(help="Seconds for requests to finish after SIGTERM.")] = 30.0,
    runs: RunsOption = RUNS,
) -> int:
    """Serve the language model of a run: OpenAI's completions, and a page that shows what each byte activates."""
    with extra("serve"):
        from sma_models.inference.engine import Engine
        from sma_models.serving.app import Service
        from sma_models.serving.limits import Limits
        from sma_models.serving.server import address_of, bind
        from sma_models.serving.server import serve as serve_on

    limits = Limits(
        slots=slots,
        queue=queue,
        prefill_chunk=prefill_chunk,
        prompt_tokens=max_prompt,
        body_bytes=max(1 << 20, 8 * max_prompt),
        max_tokens=max_tokens,
        seconds=max_seconds,
        drain_seconds=drain_seconds,
    )
    key = read_key(key_file)
    listening = bind(host, port)  # before the model is loaded, so that an error appears at once
    try:
        model, its_name = load_model(run, runs, device, dtype)
        service = Service(Engine(model, limits), name or its_name, key)  # type: ignore[arg-type]
        if key is None and host not in _LOCAL:
            notes().print(
                f"every client that reaches {host} can use this server: neither --key-file nor {KEY} is given"
            )
        notes().print(f"serving {service.model} at {address_of(listening)}", soft_wrap=True)
        return serve_on(service, listening)
    finally:
        listening.close()


def read_key(file: Path | None) -> str | None:
    """The key that clients must send, None if they need none.

    Raises:
        ConfigError: the key is empty or not printable ASCII, or is given twice.
    """
    place, value = KEY, os.environ.get(KEY)
    if file is not None:
        if value is not None:
            raise ConfigError(f"key: must be given once, got --key-file and {KEY}")
        place, value = str(file), file.read_bytes().decode("utf-8", "replace").strip()
    if value is not None and not (value and value.isascii() and value.isprintable() and " " not in value):
        raise ConfigError(f"{place}: must hold a key of printable ASCII without spaces, got {len(value)} characters")
    return value


def load_model(text: str, runs: Path, device: str, dtype: str) -> tuple[Model, str]:
    """The model that the user names, on its device, and its name.

    Raises:
        SMAError: it does not exist or has no weights yet, or the device or the dtype is not available.
    """
    import torch

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype: must be float32, bfloat16 or float16, got {dtype!r}")
    chosen = usable_device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    if text.endswith(".safetensors"):
        from sma.weights import load

        model, name = load(text), Path(text).stem
    else:
        found = find_run(text, runs)
        model, name = found.model(), found.name
        if not found.finished:
            notes().print(f"{found.path} is not finished: this is its last checkpoint", soft_wrap=True)
    return model.to(chosen, getattr(torch, dtype)).eval(), name
