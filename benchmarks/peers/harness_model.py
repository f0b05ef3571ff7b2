"""A run's weights as the model `hf` of lm-evaluation-harness: Hugging Face's Llama with a TopK hook."""

from typing import Any

from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
import transformers

from benchmarks.peers import llama
from topklm.inference.language_model import LanguageModel


def build(lm: LanguageModel, batch_size: int, attention: str = "sdpa") -> Any:
    """Builds it, float32, on the CPU; a separator stands before every text."""
    peer = llama.build(lm.cfg, attention)
    llama.load(peer, llama.state_dict(lm.cfg, lm.params))
    separator = lm.tokenizer.separator_id
    name = lm.tokenizer.token_strings([separator])[0]
    backend = Tokenizer.from_str(lm.tokenizer.to_bytes().decode())
    backend.post_processor = TemplateProcessing(single=f"{name} $A", special_tokens=[(name, separator)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=name, eos_token=name, pad_token=name, split_special_tokens=True
    )
    return HFLM(
        pretrained=peer.eval(),
        tokenizer=tokenizer,
        add_bos_token=True,
        batch_size=batch_size,
        max_length=lm.cfg.context_length,
    )
