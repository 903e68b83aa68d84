"""What several tests need: runs in this process, and models that nobody has trained."""
import signal

import torch

import checkpoint
import train

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

def run(*argv, out=None):
    """A run of train.py in this process, which keeps its own threads and its own answers to signals."""
    handlers, threads = {number: signal.getsignal(number) for number in SIGNALS}, torch.get_num_threads()
    try:
        return train.main([*argv, *(["--out", str(out)] if out else [])])
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)

def untrained(arch):
    """A tiny model, none of whose weights is exactly 0, so that every path carries numbers."""
    file = checkpoint.model_file(arch)
    torch.manual_seed(0)
    model = file.Model(file.CONFIGS["tiny"], checkpoint.load_tokenizer("tiny")).eval()
    for name, p in model.named_parameters():
        if not name.startswith(model.image_tokenizer + "."):
            p.data += 0.02 * torch.randn(p.shape)
    return model
