"""The neurons of TopK layers: captured from a model, and shown."""

# Kinds of dictionaries that a Base LM's hidden states are written in, and their names.
DICTIONARIES = {
    "random": "random dictionary",
    "pca": "PCA",
    "sae": "post-hoc TopK SAE",
    "sae-batchtopk": "post-hoc BatchTopK SAE",
    "sae-matryoshka": "post-hoc Matryoshka SAE",
    "sae-jumprelu": "post-hoc JumpReLU SAE",
    "sae-gba": "post-hoc SAE with group bias adaptation",
    "saelens": "SAELens",
}
FITTED = ("random", "pca", "sae")  # made by topklm
DICTIONARY_TOKENS = 1_000_000  # of training text, from which one is made
SHOWN_PER_LAYER = 5  # strongest neurons of a layer, for each token
