"""The Balanced Softmax in a training loop of your own: one line instead of nn.CrossEntropyLoss.

Scikit-learn's digits, of which the first five classes have only four images each, as exemplars of old classes would.
"""

import torch
from sklearn.datasets import load_digits

from fastil.kernels import BalancedSoftmaxLoss


def main() -> dict[str, float]:
    """Return the accuracy on the five rare classes, in percent, by loss."""
    data = load_digits()
    images, labels = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target).long()
    rare = torch.cat([torch.nonzero(labels == c)[:4, 0] for c in range(5)])
    train = torch.cat([rare, torch.nonzero(labels >= 5)[::2, 0]])
    test = torch.nonzero(labels < 5)[:, 0]
    test = test[~torch.isin(test, rare)]
    counts = torch.bincount(labels[train])
    accuracy = {}
    for criterion in (torch.nn.CrossEntropyLoss(), BalancedSoftmaxLoss(counts)):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(100):
            loss = criterion(network(images[train]), labels[train])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        hits = network(images[test]).argmax(1) == labels[test]
        accuracy[type(criterion).__name__] = 100 * hits.float().mean().item()
    return accuracy


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.1f} % of the rare classes")
