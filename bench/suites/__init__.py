"""One module per table or figure; each has `run(session)`, which measures and writes rows."""

SUITES = {
    "fig7": "Fig. 7: the last convolution of each block of ResNet-50, gating against union, reshaping and convolution",
    "gating": "whole layers under channel union and every form of channel gating, and what `auto` chooses",
    "bn": "batch norm with what follows it, against the byte floor; the paper's savings of BN traffic (section 5.1)",
    "lasso": "the group lasso's value and gradient over all weights, against autograd",
    "sgd": "one update of all weights, with and without the lasso inside, against torch.optim.SGD",
    "gather": "channel gather, scatter and scatter-add, against index_select, index_copy and index_add",
    "conv": "every distinct convolution of the network: dense, pruned, and pruned to multiples of 8",
    "step": "a whole training step: dense and pruned by 20, 40, 60 %; eager, compile, ours; eta",
    "inference": "Tab. 2: images per second, dense against pruned, batches of 10 and 100",
    "reconfigure": "seconds of a reconfiguration, against rebuilding the network and against Torch-Pruning",
    "memory": "Fig. 9: bytes of a training step, dense and pruned",
    "comm": "Fig. 11: bytes and seconds of the gradients' all-reduce for 16 to 256 GPUs, by formula",
    "native": "CPU: the native library against its plain-PyTorch reference and PyTorch's own, on one thread and on all",
    "kernels": "what every Triton kernel compiles to, per architecture; needs no GPU",
}
