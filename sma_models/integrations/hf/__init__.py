"""Models of this library as models of Hugging Face Transformers. Importing it registers them with the Auto classes.

The only package that imports Transformers; it comes with the extra ``hf``.
"""

from __future__ import annotations

from sma.errors import MissingExtraError

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"{error.name} is not installed; it comes with the extra 'hf': pip install 'sparse-modular-activation[hf]'"
    ) from error

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from sma_models.integrations.hf.cache import SMACache
from sma_models.integrations.hf.configuration import SMAConfig
from sma_models.integrations.hf.conversion import export, from_model
from sma_models.integrations.hf.modeling import SMAForCausalLM, SMAForSequenceClassification
from sma_models.integrations.hf.tokenization import SMAByteTokenizer

__all__ = [
    "SMAByteTokenizer",
    "SMACache",
    "SMAConfig",
    "SMAForCausalLM",
    "SMAForSequenceClassification",
    "export",
    "from_model",
]

AutoConfig.register(SMAConfig.model_type, SMAConfig, exist_ok=True)
AutoModelForCausalLM.register(SMAConfig, SMAForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SMAConfig, SMAForSequenceClassification, exist_ok=True)
AutoTokenizer.register(SMAConfig, tokenizer_class=SMAByteTokenizer, exist_ok=True)

# Transformers also asks by the name of the class, in lists that the Auto classes do not add to. Of a model in the first
# the Trainer shifts the labels when it smooths them; the model card takes its task from both.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SMAConfig.model_type] = SMAForCausalLM.__name__
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[SMAConfig.model_type] = SMAForSequenceClassification.__name__
