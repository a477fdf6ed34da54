"""Draw docs/results/authors_log.png: python docs/make_results.py"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

DOCS = Path(__file__).parent
LOG = DOCS.parent / "benchmarks" / "results" / "authors_log.json"

# Final test accuracies that others have published.
PUBLISHED = {
    "paper, LRD": (0.9554, "tab:green"),
    "paper, SGD": (0.9530, "black"),
    "first public implementation, SGD": (0.9545, "tab:grey"),
    "first public implementation, LRD": (0.9443, "tab:red"),
}


def main() -> None:
    log = json.loads(LOG.read_text(encoding="utf-8"))
    epochs = range(1, len(log["test_accuracy"]) + 1)

    figure, (whole, end) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for axes in (whole, end):
        axes.plot(epochs, log["test_accuracy"], color="tab:blue", label="authors' log, LRD: test")
        axes.set(xlabel="epoch", ylabel="accuracy on CIFAR-10")
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        axes.grid(alpha=0.3)
    label = "authors' log, LRD: training"
    whole.plot(epochs, log["train_accuracy"], color="tab:orange", label=label)
    whole.set(title="the whole run", ylim=(0.6, 1.005))
    whole.legend(loc="lower right")

    for name, (accuracy, color) in PUBLISHED.items():
        label = f"{name}: {100 * accuracy:.2f} %"
        end.axhline(accuracy, color=color, linestyle="--", linewidth=1, label=label)
    end.set(title="after the first drop of the lr", xlim=(98, 201), ylim=(0.929, 0.96))
    end.legend(loc="lower right", fontsize="small")

    path = DOCS / "results" / "authors_log.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
