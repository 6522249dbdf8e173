"""A plain PyTorch trainer: handwritten digits, SGD, a step schedule. `after.py` is the same file with PruneTrain."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from prunetrain_kernels.models import resnet20

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=60)
args = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.3
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, val = order[:1437], order[1437:]
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=32, shuffle=True, drop_last=True)

model = resnet20(num_classes=10, in_channels=1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
milestones = [int(0.7 * args.epochs), int(0.9 * args.epochs)]
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)

for epoch in range(args.epochs):
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[val]).argmax(1) == labels[val]).float().mean()
    print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy:.1%}")

torch.save(model.state_dict(), "digits.pt")
