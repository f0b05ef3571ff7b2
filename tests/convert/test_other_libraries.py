"""nnsight and TransformerLens open an exported folder: `pip install nnsight sae-lens` beside topklm.

They are in no extra: sae-lens holds transformer-lens and with it other packages back.
"""

import numpy as np
import pytest
from test_hugging_face_folders import TEXT, model_of, written

from topklm.convert import huggingface

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = model_of()
    folder = tmp_path_factory.mktemp("exported")
    huggingface.write(written(model), folder, "float32", "")
    return model, folder


def test_nnsight_reads_and_sets_neurons(exported):
    nnsight, torch = pytest.importorskip("nnsight"), pytest.importorskip("torch")
    model, folder = exported
    lm = nnsight.LanguageModel(str(folder), trust_remote_code=True, device_map="cpu", dispatch=True)
    with torch.no_grad(), lm.trace(TEXT):
        neurons = lm.model.layers[1].topk.output.save()
        logits = lm.lm_head.output.save()
    _, cache = model.run_with_cache(TEXT)
    np.testing.assert_allclose(neurons.numpy(), cache["blocks.1.hook_topk"], atol=1e-4)
    np.testing.assert_allclose(logits.numpy(), model(TEXT), atol=1e-4)
    with torch.no_grad(), lm.trace(TEXT):
        lm.model.layers[1].topk.output[..., 17] = 4.0
        steered = lm.lm_head.output.save()
    np.testing.assert_allclose(steered.numpy(), model(TEXT, steer={(1, 17): 4.0}), atol=1e-4)


def test_the_bridge_of_transformer_lens_hooks_sparse_states(exported):
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    bridge = bridges.TransformerBridge.boot_transformers(
        str(folder), device="cpu", trust_remote_code=True, tokenizer=tokenizer
    )
    ids = torch.tensor(np.array(model.to_tokens(TEXT)))
    assert bridge.to_tokens(TEXT).tolist() == ids.tolist()
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
    np.testing.assert_allclose(logits.numpy(), model(TEXT), atol=1e-4)
    _, ours = model.run_with_cache(TEXT)
    for layer in range(model.cfg.n_topk_layers):
        found = cache[f"blocks.{layer}.hook_resid_post"].numpy()
        assert np.count_nonzero(found, axis=-1).max() <= model.cfg.topk_k
        np.testing.assert_allclose(found, ours[f"blocks.{layer}.hook_topk"], atol=1e-4)
