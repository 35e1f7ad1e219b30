"""Imitation learning: policies that turn observations into a chunk of actions by flow matching."""

from transfusion_pytorch.policy.base import ActionPolicy
from transfusion_pytorch.policy.executor import ChunkExecutor
from transfusion_pytorch.policy.flow import FlowPolicy
from transfusion_pytorch.policy.lerobot import LeRobotConfig, LeRobotPolicy
from transfusion_pytorch.policy.trainer import PolicyTrainer
from transfusion_pytorch.policy.transfusion import TransfusionPolicy

__all__ = [
    "ActionPolicy",
    "ChunkExecutor",
    "FlowPolicy",
    "LeRobotConfig",
    "LeRobotPolicy",
    "PolicyTrainer",
    "TransfusionPolicy",
]
