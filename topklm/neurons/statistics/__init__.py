"""The statistics of neurons: `catalog` lists them, `table` computes and keeps them."""
