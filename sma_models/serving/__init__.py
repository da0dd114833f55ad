"""Serving: an OpenAI-compatible completions endpoint with continuous batching over states of constant size.

Needs the extra ``serve``. :mod:`~sma_models.inference.engine` generates and knows nothing of HTTP;
:mod:`~sma_models.serving.app` is the web application; :mod:`~sma_models.serving.server` runs it.
"""
