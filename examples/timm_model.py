"""Any timm model by name, with timm's parameter groups and scheduler, trained and pruned on scikit-learn's digits."""

import argparse

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader, TensorDataset

from prunetrain_kernels import PruneTrain, save_pruned
from prunetrain_kernels.optim import ProximalSGD

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", default="resnet10t", help="a name of timm.list_models()")
parser.add_argument("--image-size", type=int, default=32, help="the digits are scaled to this many pixels a side")
parser.add_argument("--epochs", type=int, default=20, help="epochs to train")
parser.add_argument("--lr", type=float, default=0.1, help="learning rate of SGD at the start")
parser.add_argument("--penalty-ratio", type=float, default=0.8, help="share of the lasso in the first loss")
parser.add_argument("--interval", type=float, default=2, help="epochs between reconfigurations")
parser.add_argument("--out", default="timm_digits.pt", help="the checkpoint to write")
args = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.3
images = F.interpolate(images, size=(args.image_size, args.image_size), mode="bilinear")
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, val = order[:1437], order[1437:]
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=32, shuffle=True, drop_last=True)

model = timm.create_model(args.model, num_classes=10, in_chans=1)
# any torch.optim optimizer will do; this one prunes soonest, which suits a training of a minute
optimizer = ProximalSGD(param_groups_weight_decay(model, weight_decay=5e-4), lr=args.lr, momentum=0.9)
scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs)
prunetrain = PruneTrain(model, optimizer, (images[:4],), penalty_ratio=args.penalty_ratio, interval=args.interval)

for epoch in range(args.epochs):
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = prunetrain.regularize(F.cross_entropy(model(x), y))
        loss.backward()
        optimizer.step()
    report = prunetrain.epoch_end()
    scheduler.step(epoch + 1)
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[val]).argmax(1) == labels[val]).float().mean()
    print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy:.1%}", flush=True)
    if report is not None and report.reconfiguration.changed:
        print(f"  {report}", flush=True)

save_pruned(args.out, model, optimizer, prunetrain)
