"""Loss of a dense model with TopK put on it and no training: how a conversion should begin.

    python -m benchmarks.untrained_topk runs/smollm2 --text FILE --out untrained_topk

The first tokens of the text are one sequence; loss in nats per token. Written to benchmarks/results/.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import topklm
from topklm.commands.shared import Output, table

RESULTS = Path(__file__).parent / "results"
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the coordinates, kept


def main() -> None:
    """Prints a table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="of a Base LM")
    parser.add_argument("--text", required=True, help="a file of text")
    parser.add_argument("--tokens", type=int, default=1023)
    parser.add_argument("--out", required=True, help="name of the JSON file")
    arguments = parser.parse_args()
    model = topklm.load(arguments.run)
    ids = model.to_tokens(Path(arguments.text).read_text(encoding="utf-8")[: 20 * arguments.tokens])
    ids = ids[:, : arguments.tokens + 1]

    def loss(**topk: Any) -> float:
        config = dataclasses.replace(model.config, model=dataclasses.replace(model.cfg, **topk))
        return float(dataclasses.replace(model, config=config).loss(ids))

    d = model.cfg.d_model
    found = [{"activation": "none", "k": d, "loss": loss()}]
    for activation in ("abs", "identity", "relu"):
        for share in SHARES if activation == "relu" else SHARES[1:]:
            k = round(share * d)
            nats = loss(n_nontopk=1, topk_activation=activation, topk_k=k)
            found.append({"activation": activation, "k": k, "loss": nats})
    output = Output()
    rows = [[one["activation"], str(one["k"]), f"{one['loss']:.3f}"] for one in found]
    output.console.print(table(["activation", f"k of {d}", "nats per token"], rows, left=["activation"]))
    facts = {
        "run": Path(arguments.run).name,
        "tokens": int(ids.shape[1] - 1),
        "text": Path(arguments.text).name,
    }
    path = RESULTS / f"{arguments.out}.json"
    path.write_text(json.dumps({**facts, "losses": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
