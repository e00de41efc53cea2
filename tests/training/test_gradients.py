import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lit_generative.training import gradients
from lit_generative.training.gradients import average_gradients


def _average(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    gradients.BUCKET = 10  # some tensors share a bucket, one is larger than it
    shapes = [(2, 3), (4,), (5, 5), (), (3,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters.append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(10 * i + rank))
    parameters[4].grad = None
    average_gradients(parameters)
    torch.save([p.grad for p in parameters], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_each_gradient_becomes_the_mean_over_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_average, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found[4] is None
        for i in (0, 1, 2, 3, 5):
            assert set(found[i].flatten().tolist()) == {10 * i + 0.5}
        assert found[5].dtype == torch.float64
